# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python scripts/quickstart.py --output outputs/quickstart

The whole story on a small scale: trains a Llama of transformers, converts it, continues its pretraining with Attention
Residuals and without, fine-tunes it with LoRA, generates from every model and draws what depth attention has learned.

The text is the Python standard library's own source, so nothing is downloaded, and takes about four minutes on two CPU
cores. `--model` and `--text` put one's own checkpoint folder or text in its place. The last line of the output is JSON.
"""

import argparse
import json
import shutil
import time
from pathlib import Path


def check_output(output: Path):
    """Only a folder that this script wrote is replaced."""
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not (output / "results.json").is_file()):
        raise SystemExit(f"quickstart: {output} exists and isn't a quickstart's output; choose another --output.")


def replace(partial: Path, output: Path):
    old = output.with_name(f".{output.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    partial.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="quickstart.py",
        description="Trains a small Llama, converts it to Attention Residuals, trains both on, and compares them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"), help="folder for models and results")
    parser.add_argument("--model", type=Path, help="checkpoint folder of a supported family, instead of a new donor")
    parser.add_argument(
        "--text", type=Path, help="file, or folder of .py, .txt, .md and .rst, instead of Python's library"
    )
    parser.add_argument("--max-text-mb", type=float, default=16, help="how much text is read at most")
    parser.add_argument("--prompt", default="    def __init__(self", help="what the models continue")
    parser.add_argument("--new-tokens", type=positive, default=80, help="how far they continue it")
    parser.add_argument("--mode", choices=("block", "full"), default="block", help="kind of Attention Residuals")
    parser.add_argument(
        "--block-size", type=positive, help="decoder layers per block; an eighth of the layers by default"
    )
    parser.add_argument("--donor-steps", type=positive, default=360, help="training steps of the new donor")
    parser.add_argument("--steps", type=positive, default=90, help="steps of each of the three runs that follow")
    parser.add_argument("--batch-size", type=positive, default=4, help="sequences per step")
    parser.add_argument("--seq-len", type=positive, default=256, help="tokens per sequence")
    parser.add_argument("--eval-sequences", type=positive, default=32, help="held-out sequences that are evaluated")
    parser.add_argument("--layers", type=positive, default=12, help="decoder layers of the new donor")
    parser.add_argument(
        "--hidden-size", type=positive, default=128, help="hidden size of the new donor, a multiple of 32"
    )
    parser.add_argument("--vocab-size", type=positive, default=4096, help="tokens of the new donor's tokenizer")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="of the new donor")
    parser.add_argument(
        "--continue-learning-rate",
        type=float,
        help="of the runs that follow: as before, or 5e-5 with --model, by default",
    )
    parser.add_argument(
        "--depth-lr-scale", type=float, default=1.0, help="depth attention's share of the learning rate"
    )
    parser.add_argument("--lora-rank", type=positive, default=8, help="rank of the adapters")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.hidden_size % 32:
        parser.error(f"--hidden-size {args.hidden_size} is not a multiple of 32")
    if args.mode == "full" and args.block_size is not None:
        parser.error("--block-size goes with --mode block only")
    if args.model is None and args.block_size is not None and args.block_size > args.layers:
        parser.error(f"--block-size {args.block_size} must be at most --layers {args.layers}")
    if args.text is not None and not args.text.exists():
        raise SystemExit(f"quickstart: --text {args.text} doesn't exist.")
    if args.model is not None and not (args.model / "config.json").is_file():
        raise SystemExit(f"quickstart: --model {args.model} is not a checkpoint folder, it has no config.json.")
    if args.continue_learning_rate is None:
        args.continue_learning_rate = args.learning_rate if args.model is None else 5e-5
    return args


def main(argv: list[str] | None = None):
    started = time.perf_counter()
    args = parse_arguments(argv)
    check_output(args.output)
    args.output = args.output.resolve()
    args.model = args.model and args.model.resolve()
    args.partial = args.output.with_name(f".{args.output.name}.partial")
    from quickstart_steps import quickstart  # not before, as it takes seconds

    shutil.rmtree(args.partial, ignore_errors=True)
    try:
        args.partial.mkdir(parents=True)
    except OSError as error:
        raise SystemExit(f"quickstart: can't write to {args.output}: {error.strerror}.") from None
    try:
        results = quickstart(args)
        results["seconds"] = time.perf_counter() - started
        (args.partial / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(args.partial / "trainer")
        replace(args.partial, args.output)
    finally:
        shutil.rmtree(args.partial, ignore_errors=True)
    summary = {"output": str(args.output), "seconds": round(results["seconds"], 1)}
    summary["relative_error_of_conversion"] = results["conversion"]["relative_error"]
    summary["held_out_loss"] = {name: run["held_out_loss_after"] for name, run in results["runs"].items()}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
