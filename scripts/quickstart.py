# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python scripts/quickstart.py --output outputs/quickstart

The whole story on a small scale, told by the other scripts: attnres-convert converts a small Llama of transformers, the
one in `model_cards`, pretrain.py trains both on with the same batches, finetune.py adds LoRA, each model generates,
plot_depth_attention.py draws what depth attention has learned, and evaluate_model.py compares all models.

The text is the Python standard library's own source, so nothing is downloaded, and it takes two or three minutes on two
CPU cores. `--model` and `--text` put one's own checkpoint and text in its place; `--train-donor` has pretrain.py train
a Llama first. The output folder appears when all is done. The last line of the output is JSON.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from attnres_convert import InputError, convert_checkpoint, reading, staging
from attnres_convert.card import read_json
from attnres_convert.reading import sha256
from attnres_convert.report import report
from attnres_recipes.files import table, write_json
from evaluate_model import evaluate_checkpoints, notes, report_table, write_report
from evaluate_model import parse_arguments as evaluation_arguments
from finetune import finetune
from finetune import parse_arguments as finetuning_arguments
from finetuning_data import load_examples
from model_loading import load_checkpoint, open_checkpoint
from plot_depth_attention import parse_arguments as plot_arguments
from plot_depth_attention import plot_depth_attention
from pretrain import check_context, pretrain
from pretrain import parse_arguments as pretraining_arguments
from training_data import load_documents
from training_optim import DEPTH_LR_SCALE
from training_options import above_zero, batch, non_negative, number, positive, rank, share, start_process
from training_run import (
    METRICS_FILE,
    RESULTS_FILE,
    RunError,
    named_checkpoints,
    plot_losses,
    read_lines,
    versions,
)


ROOT = Path(__file__).resolve().parents[1]
ZOO_DONOR = Path("model_cards/llama-1.3m")
SMALLEST_VOCABULARY = 259  # bytes and special tokens
# Of a new donor
DEFAULTS = {"donor_steps": 360, "layers": 12, "hidden_size": 128, "vocab_size": 4096, "learning_rate": 2e-3}


def step(number: int, title: str, explanation: str):
    print(f"\n[{number}/6] {title}\n  {explanation}", flush=True)


def shared_options(args) -> dict[str, list[str]]:
    """The options of the other scripts that follow from those of this one."""
    columns = ["--column", args.column] + (["--sample-by", args.sample_by] if args.sample_by else [])
    tokenizer = ["--tokenizer", args.tokenizer] if args.tokenizer else []
    lengths = ["--batch-size", args.batch_size, "--seq-len", args.seq_len]
    split = ["--held-out", args.held_out]
    run = [*lengths, *split, "--eval-sequences", args.eval_sequences, "--depth-lr-scale", args.depth_lr_scale]
    return {
        "pretrain": [*run, *columns, "--data", *args.text, "--keep-checkpoints", 1],
        "finetune": [*run, *tokenizer, "--data", *args.examples, "--keep-checkpoints", 1],
        "evaluate": [*lengths, *split, *columns, *tokenizer, "--data", *args.text, "--stride", args.seq_len]
        + ["--dtype", args.dtype],
        "plot": ["--seq-len", args.seq_len, *columns, *tokenizer, "--text", *args.text],
        "tokenizer": tokenizer,
    }


def length(steps: int) -> list:
    """Of a run that is evaluated a few times and needs no checkpoints."""
    return ["--steps", steps, "--eval-steps", -(-steps // 4), "--save-steps", steps, "--warmup", 20]


def run_pretraining(name: str, args, *options) -> dict:
    """A run of pretrain.py in the folder `name`, and a line about it."""
    options = [*shared_options(args)["pretrain"], *options, "--output", args.partial / name]
    results = pretrain(pretraining_arguments(list(map(str, options))))
    return describe_run(name, results)


def describe_run(name: str, results: dict) -> dict:
    before = results["held_out_loss_before"]
    start = "" if before is None else f"{before:.4f} -> "
    print(f"  {name}: held-out loss {start}{results['held_out_loss']:.4f} after {results['steps']} steps", flush=True)
    return results


def train_donor(args) -> dict:
    """A small, deep Llama with random weights, trained on the text."""
    heads = args.hidden_size // 32
    fields = {
        "hidden_size": args.hidden_size,
        "intermediate_size": args.hidden_size * 8 // 3 // 32 * 32,
        "num_hidden_layers": args.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 2 * args.seq_len,
        "initializer_range": (0.4 / args.hidden_size) ** 0.5,  # transformers' default is that of much wider models
        "tie_word_embeddings": "true",
    }
    model = ["--config", "llama", "--mode", "donor", "--train-tokenizer", args.vocab_size]
    model += ["--set", *(f"{name}={value}" for name, value in fields.items())]
    training = [*length(args.donor_steps), "--learning-rate", args.learning_rate]
    training += ["--schedule", "constant", "--seed", args.seed]
    return run_pretraining("donor", args, *model, *training)


def train_on(name: str, model: Path, mode: str, args) -> dict:
    """Both models see the same batches, which aren't the ones that a new donor has seen first."""
    training = [*length(args.steps), "--learning-rate", args.continue_learning_rate]
    training += ["--min-lr-ratio", 0, "--seed", args.seed + 1]
    tokenizer = shared_options(args)["tokenizer"]
    return run_pretraining(name, args, "--model", model, "--mode", mode, *tokenizer, *training)


def train_lora(model: Path, args) -> dict:
    options = [*shared_options(args)["finetune"], "--model", model, "--method", "lora", "--merge"]
    options += [*length(args.steps), "--lora-rank", args.lora_rank]
    if args.lora_learning_rate is not None:
        options += ["--learning-rate", args.lora_learning_rate]
    options += ["--seed", args.seed + 2, "--output", args.partial / "attnres-lora"]
    return describe_run("attnres-lora, on answers", finetune(finetuning_arguments(list(map(str, options)))))


def convert(source: Path, args) -> dict:
    """Converts with the check of attnres-convert: the logits of both models."""
    result = convert_checkpoint(source, args.partial / "attnres", mode=args.mode, block_size=args.block_size)
    print("  " + report(result).replace(str(args.partial), str(args.output)).replace("\n", "\n  "))
    found = result.verification
    return {
        "mode": result.mode,
        "block_size": result.block_size,
        "parameters": result.num_parameters,
        "parameters_added": result.depth_parameters,
        "relative_error": found and found.relative_difference,
        "top1_agreement": found and found.top1_agreement,
        "verification_skipped": result.verification_skipped,
    }


def generate(path: Path, args) -> str:
    """Samples a continuation of the prompt, with the same random numbers for every model."""
    checkpoint = open_checkpoint(str(path), tokenizer=args.tokenizer)
    model, tokenizer = load_checkpoint(checkpoint, args.dtype), checkpoint.tokenizer
    inputs = tokenizer(args.prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    torch.manual_seed(args.seed)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.generate(
        **inputs, max_new_tokens=args.new_tokens, do_sample=True, temperature=0.6, top_k=50, pad_token_id=pad
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)


def draw(models: list[Path], args) -> list[str]:
    """Names of the figures, in the folder `figures`."""
    folder = args.partial / "figures"
    options = [*models, *shared_options(args)["plot"], "--output", folder]
    paths = plot_depth_attention(plot_arguments(list(map(str, options))))
    metrics = {path.parent.name: read_lines(path.parent / METRICS_FILE) for path in models}
    plot_losses(metrics, folder / "losses.png", "Training on from the same weights, on the same data")
    return sorted([*(path.name for path in paths), "losses.png"])


def compare(models: list[Path], args) -> dict:
    """All models on the same held-out text, in `evaluation.md`."""
    options = [*models, *shared_options(args)["evaluate"], "--max-documents", args.eval_documents]
    options = list(map(str, [*options, "--output", args.partial]))
    evaluation = evaluate_checkpoints(evaluation_arguments(options))
    write_report(args.partial, evaluation, ["evaluate_model.py", *options])
    print(report_table(evaluation["checkpoints"]), *notes(evaluation), sep="\n")
    return evaluation["checkpoints"]


def runs_table(runs: dict[str, dict]) -> str:
    rows = [("run", "steps", "parameters trained", "tokens/s", "held-out loss before", "after")]
    for name, run in runs.items():
        before = run["held_out_loss_before"]
        parameters = run.get("trained_parameters", run.get("parameters"))
        name = f"{name}, on answers" if "method" in run else name
        losses = "-" if before is None else f"{before:.4f}", f"{run['held_out_loss']:.4f}"
        rows.append((name, str(run["steps"]), f"{parameters:,}", f"{run['tokens_per_second']:,.0f}", *losses))
    return table(rows)


def check_input(args):
    """Refuses what a later step would, before minutes of training."""
    reading.check_text(args.prompt, "--prompt")
    for source in filter(None, (args.model, args.tokenizer)):
        reading.check_own_files(source)
    load_documents(args.text, args.column, sample_by=args.sample_by)
    load_examples(args.examples)
    if not args.train_donor:
        model = ROOT / ZOO_DONOR if args.model is None else args.model
        check_context(open_checkpoint(str(model), tokenizer=args.tokenizer).config, args.seq_len)


def quickstart(args) -> dict:
    """Runs all steps, writes into `args.partial`, and returns every number.

    Raises:
        RunError, DataError, ConversionError: bad input; one line says what to do.
    """
    check_input(args)
    runs, folder = {}, args.partial
    step(1, "A donor", "A decoder of transformers, with the residual stream that all of them have.")
    donor = args.model or folder / "donor" / "model"
    if args.train_donor:
        runs["donor"] = train_donor(args)
    elif args.model is None:
        shutil.copytree(ROOT / ZOO_DONOR, donor)
        print(f"  {ZOO_DONOR}, a small Llama that was trained on Python's library; its card tells how.", flush=True)

    step(2, "Conversion", "Every sublayer now reads a softmax over depth, at first uniform: the same function.")
    conversion = convert(donor, args)

    step(3, "Pretraining continued", "Both models train on from the same weights, on the same batches.")
    for name, source, mode in (("donor", donor, "donor"), ("attnres", folder / "attnres", args.mode)):
        runs[f"{name}-continued"] = train_on(f"{name}-continued", source, mode, args)
    continued = [folder / f"{name}-continued" / "model" for name in ("donor", "attnres")]

    step(4, "LoRA", "Low-rank adapters on every linear layer, and depth attention in full, trained on answers alone.")
    runs["attnres-lora"] = train_lora(continued[1], args)
    error = runs["attnres-lora"]["merged_relative_error"]
    print(f"  reloaded on its base and merged: relative difference of the logits {error:.1e}")

    step(5, "Generation", "The same prompt and the same random numbers for each.")
    models = [donor, folder / "attnres", *continued, folder / "attnres-lora" / "model"]
    names = ["donor", "attnres", "donor-continued", "attnres-continued", "attnres-lora"]
    generated = {}
    for name, path in zip(names, models):
        generated[name] = generate(path, args)
        print(f"  --- {name}", *generated[name].splitlines(), sep="\n  | ", flush=True)

    step(6, "Figures and numbers", f"All of it goes to {args.output}.")
    figures = draw(continued, args)
    models[-1] = folder / "attnres-lora" / "merged"
    evaluation = compare(models, args)
    print("\n" + runs_table(runs), end="")
    return {
        "conversion": conversion,
        "runs": runs,
        "generated": generated,
        "evaluation": evaluation,
        "figures": figures,
        "arguments": {name: value for name, value in vars(args).items() if name != "partial"},
        "versions": versions(),
    }


def check_output(output: Path):
    """Only a folder in which all is as a quickstart wrote it is replaced."""
    if output.is_dir() and os.path.ismount(output):
        raise RunError(f"{output} is a mount point; give a folder in it.")
    if not os.path.lexists(output) or output.is_dir() and not any(output.iterdir()):
        return
    results = read_json(output / RESULTS_FILE)  # models have such a file too
    if not {"conversion", "generated"} <= results.keys():
        raise RunError(f"{output} exists and isn't a quickstart's output; choose another --output.")
    files, written = staging.entries(output), results.get("files")
    for name, path in sorted((files or {}).items()):
        if name != RESULTS_FILE and (not isinstance(written, dict) or written.get(name) != sha256(path)):
            raise RunError(f"{output} holds {name}, which isn't as a quickstart wrote it; choose another --output.")
    if files is None:
        raise RunError(f"{output} holds links or special files, which would be lost; choose another --output.")


def finish(partial: Path, output: Path):
    """Puts the folder's name where its files mention it, and takes out what only interrupted runs need."""
    for run in partial.iterdir():
        for checkpoint in named_checkpoints(run):
            shutil.rmtree(checkpoint)
    name = "/".join(partial.parts[-2:])
    for file in [*partial.rglob("*.json"), *partial.rglob("*.md")]:
        text = file.read_text(encoding="utf-8")
        if name in text:
            file.write_text(text.replace(name, output.name), encoding="utf-8")
    files = {file: sha256(path) for file, path in staging.entries(partial).items() if file != RESULTS_FILE}
    write_json(partial / RESULTS_FILE, {**read_json(partial / RESULTS_FILE), "files": files})


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="quickstart.py",
        description=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: " + __doc__.split("\n\n", 1)[0],
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("outputs/quickstart"), help="folder for models and results; default: "
        "outputs/quickstart")  # fmt: skip
    add("--model", type=Path, help=f"checkpoint folder of a supported family, instead of {ZOO_DONOR}")
    add("--tokenizer", help="folder or Hub id; default: that of --model")
    add("--text", nargs="+", default=["stdlib"], help="files or folders of text, JSON lines or Parquet, or a Hub id, "
        "instead of Python's library")  # fmt: skip
    add("--column", default="text", help="column that holds the text; default: text")
    add("--sample-by", choices=("document", "paragraph", "line"), help="what a document is in text files; default: "
        "document (a file) if there are several files, else paragraph")  # fmt: skip
    add("--held-out", type=share, default=0.05, help="share of the documents, chosen by hash; default: 0.05")
    add("--examples", nargs="+", default=["stdlib"], help="prompts with completions, or conversations, to fine-tune "
        "on; default: functions of Python's library")  # fmt: skip
    add("--prompt", default="    def __init__(self", help="what the models continue; default: '%(default)s'")
    add("--new-tokens", type=positive, default=80, help="how far they continue it; default: 80")
    add("--mode", choices=("block", "full"), default="block", help="kind of Attention Residuals; default: block")
    add("--block-size", type=positive, help="decoder layers per block; default: an eighth of the layers")
    add("--steps", type=positive, default=60, help="steps of each of the three runs; default: 60")
    add("--batch-size", type=batch, default=4, help="sequences per step; default: 4")
    add("--seq-len", type=number(int, 2), default=256, help="tokens per sequence; default: 256")
    add("--eval-sequences", type=positive, default=32, help="held-out sequences to evaluate at most; default: 32")
    add("--eval-documents", type=positive, default=8, help="held-out documents in the last comparison; default: 8")
    add("--continue-learning-rate", type=above_zero, help="of the three runs; default: 0.0003 and 0.002 for LoRA, with "
        "--train-donor as before, with --model 5e-5 and for LoRA that of finetune.py")  # fmt: skip
    add("--depth-lr-scale", type=non_negative, default=DEPTH_LR_SCALE, help="depth attention's learning rate as a "
        f"multiple; default: {DEPTH_LR_SCALE:g}")  # fmt: skip
    add("--lora-rank", type=rank, default=8, help="rank of the adapters; default: 8")
    add(
        "--seed",
        type=number(int, 0, 2**32 - 2),
        default=0,
        help="of weights, of the order of the data and of sampling; default: 0",
    )
    add = parser.add_argument_group("a new donor").add_argument
    add("--train-donor", action="store_true", help="train one; the options below are for it, and some minutes more")
    add("--donor-steps", type=positive, help="training steps; default: 360")
    add("--layers", type=positive, help="decoder layers; default: 12")
    add("--hidden-size", type=positive, help="a multiple of 32; default: 128")
    add("--vocab-size", type=number(int, 1, 10**7), help="tokens of its tokenizer; default: 4096")
    add("--learning-rate", type=above_zero, help="default: 0.002")
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    return args


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """Refuses what can't work, and fills in what depends on other options."""
    for name, default in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif not args.train_donor:
            parser.error(f"--{name.replace('_', '-')} is of a new donor and goes with --train-donor")
    if args.train_donor and args.model is not None:
        parser.error("give either --model or --train-donor")
    if args.hidden_size % 32:
        parser.error(f"--hidden-size {args.hidden_size} is not a multiple of 32")
    if args.vocab_size < SMALLEST_VOCABULARY:
        parser.error(f"--vocab-size {args.vocab_size} is less than {SMALLEST_VOCABULARY}")
    if args.mode == "full" and args.block_size is not None:
        parser.error("--block-size goes with --mode block only")
    if args.train_donor and args.block_size is not None and args.block_size > args.layers:
        parser.error(f"--block-size {args.block_size} must be at most --layers {args.layers}")
    if args.model is None and args.tokenizer is not None:
        parser.error("--tokenizer goes with --model; the other donors have their own")
    if args.model is not None:
        rate, lora_rate = 5e-5, None
    elif args.train_donor:
        rate = lora_rate = args.learning_rate
    else:  # trained to the end of its schedule
        rate, lora_rate = 3e-4, 2e-3
    if args.continue_learning_rate is not None and args.model is None:
        lora_rate = args.continue_learning_rate
    args.continue_learning_rate = args.continue_learning_rate or rate
    args.lora_learning_rate = lora_rate
    args.dtype = "auto" if args.model else "float32"  # also shows exact conversion of a donor that is saved in bfloat16


def main(argv: list[str] | None = None):
    started = time.perf_counter()
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    start_process()
    try:
        if PartialState().num_processes > 1:
            raise RunError("it runs in one process; start it without accelerate launch.")
        if args.model is not None and not (args.model / "config.json").is_file():
            raise RunError(f"--model {args.model} is not a checkpoint folder, it has no config.json.")
        if args.model is None and not args.train_donor and not (ROOT / ZOO_DONOR / "config.json").is_file():
            raise RunError(
                f"{ZOO_DONOR} isn't here, as it is in a clone of the project; give --model or --train-donor."
            )
        args.output = args.output.resolve()
        args.model = args.model and args.model.resolve()
        staging.recover(args.output)
        check_output(args.output)
        with (
            reading.no_panic(),
            staging.staged(args.output, check=lambda output, _: check_output(output)) as args.partial,
        ):
            results = quickstart(args)
            results["seconds"] = time.perf_counter() - started
            write_json(args.partial / RESULTS_FILE, results)
            finish(args.partial, args.output)
    except InputError as error:
        raise SystemExit(f"quickstart: {error}") from None
    except OSError as error:
        line = reading.one_line(f"can't write to {args.output}: {error.strerror or error}.")
        raise SystemExit(f"quickstart: {line}") from None
    except KeyboardInterrupt:
        raise SystemExit("quickstart: interrupted; nothing was written.") from None
    summary = {"output": str(args.output), "seconds": round(results["seconds"], 1)}
    summary["relative_error_of_conversion"] = results["conversion"]["relative_error"]
    summary["held_out_loss"] = {name: run["held_out_loss"] for name, run in results["runs"].items()}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
