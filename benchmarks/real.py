# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python benchmarks/real.py models/SmolLM2-135M-Instruct models/gemma-3-270m.gguf

Measures the conversion of real checkpoints, folders or GGUF files, which random weights say little about: seconds and
memory, how far logits are from the donor's beside the donor's own rounding, greedy text, perplexity, and how large
activations are in each layer. Each model gets `results/real/NAME.json`, NAME being that of the folder or file.

Prints a table, then the results as one line of JSON each.
"""

import argparse
import gc
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
import transformers
from attnres_convert.reading import read_json
from attnres_convert.verification import Float64, relative_difference
from attnres_convert.writing import table, write_json
from transformers import AutoModelForCausalLM, AutoTokenizer

import attnres


ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / "model_cards" / "held_out.jsonl"  # files of Python's standard library
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
PROMPT = "Explain in a few sentences why the sky is blue."
CONVERT = """
import json, resource, sys, time
from attnres_convert import cli, conversion  # the imports, which take memory too
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
code = cli.main(sys.argv[1:])
seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": seconds, "peak_bytes": peak * 1024, "peak_bytes_of_imports": before * 1024}))
sys.exit(code)
"""


def convert(source: Path, target: Path, *options: str) -> dict:
    """Runs `attnres-convert` in a process of its own: seconds, and peak resident memory, its imports included."""
    command = [sys.executable, "-c", CONVERT, os.fspath(source), os.fspath(target), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{source.name}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def load(folder: Path, dtype: torch.dtype):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(dtype)
    if dtype == torch.float64 and getattr(type(model), "_can_set_experts_implementation", bool)():
        model.set_experts_implementation("eager")  # the others have no float64
    return model


def logits(model, tokens: torch.Tensor) -> torch.Tensor:
    with Float64() if model.dtype == torch.float64 else nullcontext():
        return model(tokens, use_cache=False).logits.double()


def greedy(model, tokens: torch.Tensor, length: int) -> list[int]:
    options = {"max_new_tokens": length, "do_sample": False, "repetition_penalty": 1.0}
    generated = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    return generated[0, tokens.shape[1] :].tolist()


def perplexity(model, tokens: torch.Tensor, seq_len: int) -> float:
    losses = [model(part, labels=part, use_cache=False).loss.item() for part in tokens.split(seq_len, dim=1)]
    return math.exp(sum(losses) / len(losses))


def activations(model, tokens: torch.Tensor) -> list[dict]:
    """What each layer reads, and last the normalised output: the largest number, where it is, and the median."""
    rows = []
    for hidden in model(tokens, use_cache=False, output_hidden_states=True).hidden_states:
        size = hidden[0].float().abs()
        token, channel = divmod(size.argmax().item(), size.shape[1])
        largest, median = size.max().item(), size.median().item()
        rows.append({"largest": largest, "token": token, "channel": channel, "median": median})
    return rows


def prompt_tokens(tokenizer) -> torch.Tensor:
    if tokenizer.chat_template is None:
        return tokenizer(PROMPT, return_tensors="pt").input_ids
    chat, options = [{"role": "user", "content": PROMPT}], {"return_dict": True, "return_tensors": "pt"}
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, **options)["input_ids"]


def text_tokens(tokenizer, number: int) -> torch.Tensor:
    """The first `number` tokens, so that all sequences are of one length."""
    text = "\n".join(json.loads(line)["text"] for line in TEXT.read_text(encoding="utf-8").splitlines())
    return tokenizer(text[: 20 * number], return_tensors="pt").input_ids[:, :number]


def of_model(model, tokenizer, options: argparse.Namespace) -> dict:
    """All that is compared of a model in one dtype."""
    text, dtype = text_tokens(tokenizer, options.seq_len * options.sequences), model.dtype
    found = {"logits": logits(model, text[:, : options.tokens])}
    if dtype != torch.float64:
        found["generated"] = greedy(model, prompt_tokens(tokenizer), options.new_tokens)
        found["perplexity"] = perplexity(model, text, options.seq_len)
    if dtype == torch.float32:
        found["activations"] = activations(model, text[:, : options.tokens])
    return found


@torch.inference_mode()
def measure(source: Path, options: argparse.Namespace) -> dict:
    """Everything of a checkpoint. Models are loaded one after the other; the float64 donor is what all are compared
    with."""
    shape = ["--mode", "full"] if options.mode == "full" else []
    shape += ["--block-size", str(options.block_size)] if options.block_size else []
    with tempfile.TemporaryDirectory() as folder:
        donor, converted = Path(folder) / "donor", Path(folder) / "attnres"
        costs = {"without_verification": convert(source, converted, "--no-verify", *shape)}
        costs["with_verification"] = convert(source, converted, "--force", *shape)
        convert(converted, donor, "--to-donor", "--no-verify")  # its files, also where they came from another format
        tokenizer = AutoTokenizer.from_pretrained(donor)
        config, results = (read_json(converted / name) for name in ("config.json", "results.json"))
        rows, exact, layers = [], None, None
        for dtype in DTYPES:
            pair = []
            for path in (donor, converted):
                pair.append(of_model(load(path, dtype), tokenizer, options))
                gc.collect()
            original, ours = pair
            exact = original["logits"] if exact is None else exact
            row = {
                "dtype": str(dtype).removeprefix("torch."),
                "difference": relative_difference(ours["logits"], original["logits"]),
                "donor_error": relative_difference(original["logits"], exact),
                "converted_error": relative_difference(ours["logits"], exact),
                "same_top_token": (ours["logits"].argmax(-1) == original["logits"].argmax(-1)).float().mean().item(),
            }
            if "generated" in original:
                row["same_greedy_text"] = ours["generated"] == original["generated"]
                row["greedy_text"] = tokenizer.decode(original["generated"])
                row |= {"donor_perplexity": original["perplexity"], "converted_perplexity": ours["perplexity"]}
            rows.append(row)
            layers = original.get("activations", layers)
    return {
        "name": source.stem if source.suffix == ".gguf" else source.name,
        "model_type": config["model_type"],
        "conversion": costs,
        "verification": results["conversion"],
        "precision": rows,
        "activations": layers,
    }


def markdown(results: list[dict]) -> str:
    lines = [["model", "dtype", "converted to donor", "donor's error", "same greedy text", "perplexity", "converted"]]
    for result in results:
        for row in result["precision"]:
            same = {True: "yes", False: "no"}.get(row.get("same_greedy_text"), "")
            values = [
                f"{row[name]:.6g}" if name in row else "" for name in ("donor_perplexity", "converted_perplexity")
            ]
            errors = [f"{row['difference']:.1e}", f"{row['donor_error']:.1e}"]
            lines.append([result["name"], row["dtype"], *errors, same, *values])
    return table(lines, aligned=False).rstrip()


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description="Measures the conversion of real checkpoints.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("sources", type=Path, nargs="+", metavar="SOURCE", help="checkpoint folder or GGUF file")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "real", help="folder of the JSON files")
    parser.add_argument("--mode", choices=("block", "full"), default="block", help="of the converted models")
    parser.add_argument("--block-size", type=int, help="decoder layers per block")
    parser.add_argument("--tokens", type=int, default=128, help="whose logits are compared")
    parser.add_argument("--new-tokens", type=int, default=64, help="to generate")
    parser.add_argument("--seq-len", type=int, default=512, help="of the sequences for perplexity")
    parser.add_argument("--sequences", type=int, default=4, help="for perplexity")
    args = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    given = {name: value for name, value in vars(args).items() if name not in ("sources", "output")}
    changed = [
        f" --{name.replace('_', '-')} {value}" for name, value in given.items() if value != parser.get_default(name)
    ]
    results = []
    for source in args.sources:
        results.append(
            {
                "command": f"python benchmarks/real.py {source.name}{''.join(changed)}",
                "settings": given,
                "hardware": f"CPU, {platform.machine()}, {torch.get_num_threads()} threads",
                "versions": {"python": platform.python_version()}
                | {module.__name__: module.__version__ for module in (attnres, torch, transformers)},
                **measure(source, args),
            }
        )
        args.output.mkdir(parents=True, exist_ok=True)
        write_json(args.output / f"{results[-1]['name']}.json", results[-1])
    print(markdown(results))
    for result in results:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
