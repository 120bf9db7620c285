# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python scripts/quickstart.py --output outputs/quickstart

The whole story on a small scale, told by the other scripts: attnres-convert converts a small Llama of transformers, the
one in `model_cards`, pretrain.py trains both on with the same batches, finetune.py adds LoRA, each model generates,
plot_depth_attention.py draws what depth attention has learned, and evaluate_model.py compares all models.

The text is the Python standard library's own source, so nothing is downloaded, and it takes two or three minutes on two
CPU cores. `--model` and `--text` put one's own checkpoint and text in its place; `--train-donor` has pretrain.py train
a Llama first. The output folder appears when all is done. The last line of the output is JSON.
"""

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from accelerate import PartialState
from attnres_convert import InputError, convert_checkpoint, reading, staging
from attnres_convert.card import read_json
from attnres_convert.reading import sha256
from attnres_convert.report import report
from attnres_convert.writing import table, write_json
from attnres_recipes.checkpoints import named_checkpoints
from attnres_recipes.configs import check_context
from attnres_recipes.data import load_documents
from attnres_recipes.defaults import DEPTH_LR_SCALE, HELD_OUT, STDLIB
from attnres_recipes.evaluation import evaluate, notes, report_table
from attnres_recipes.examples import load_examples
from attnres_recipes.figures import plot_losses
from attnres_recipes.finetuning import finetune
from attnres_recipes.folders import METRICS_FILE, RESULTS_FILE
from attnres_recipes.loading import load_checkpoint, open_checkpoint
from attnres_recipes.log import read_lines
from attnres_recipes.options import (
    AboveZero,
    Batch,
    DocumentOptions,
    EvaluateOptions,
    FinetuneOptions,
    LearningRate,
    NonNegative,
    PlotOptions,
    Positive,
    PretrainOptions,
    SeqLen,
    Share,
)
from attnres_recipes.parser import Limits, Options, flag, option, parse
from attnres_recipes.plotting import plot
from attnres_recipes.pretraining import pretrain
from attnres_recipes.process import start_process, versions


ROOT = Path(__file__).resolve().parents[1]
ZOO_DONOR = Path("model_cards/llama-1.3m")
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
    """What the quickstart takes."""

    group = "quickstart"
    output: Path = option(Path("outputs/quickstart"), "folder for models and results")
    model: Path | None = option(None, f"checkpoint folder of a supported family, instead of {ZOO_DONOR}")
    tokenizer: str | None = option(None, "folder or Hub id; default: that of --model")
    text: list[str] = option([STDLIB], "files or folders of text, JSON lines or Parquet, or a Hub id, instead of "
        "Python's library")  # fmt: skip
    held_out: Share = option(HELD_OUT, "share of the documents, chosen by hash")
    examples: list[str] = option([STDLIB], "prompts with completions, or conversations, to fine-tune on; stdlib: "
        "functions of Python's library")  # fmt: skip
    prompt: str = option("    def __init__(self", "what the models continue")
    new_tokens: Positive = option(80, "how far they continue it")
    mode: Literal["block", "full"] = option("block", "kind of Attention Residuals")
    block_size: Positive | None = option(None, "decoder layers per block; default: an eighth of the layers")
    steps: Positive = option(60, "steps of each of the three runs")
    batch_size: Batch = option(4, "sequences per step")
    seq_len: SeqLen = option(256, "tokens per sequence")
    eval_sequences: Positive = option(32, "held-out sequences to evaluate at most")
    eval_documents: Positive = option(8, "held-out documents in the last comparison")
    continue_learning_rate: AboveZero | None = option(None, "of the three runs; default: 0.0003 and 0.002 for LoRA, "
        "with --train-donor as before, with --model 5e-5 and for LoRA that of fine-tuning")  # fmt: skip
    depth_lr_scale: NonNegative = option(DEPTH_LR_SCALE, "depth attention's learning rate as a multiple")
    lora_rank: Annotated[int, Limits(1, 2**16)] = option(8, "rank of the adapters")
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
    def rates(self) -> tuple[float, float | None]:
        """Learning rates of the two models that are trained on, and of LoRA; `None` for that of fine-tuning."""
        if self.model is not None:
            rate, lora_rate = 5e-5, None
        elif self.train_donor:
            rate = lora_rate = self.learning_rate
        else:  # trained to the end of its schedule
            rate, lora_rate = 3e-4, 2e-3
        if self.continue_learning_rate is None:
            return rate, lora_rate
        return self.continue_learning_rate, None if self.model is not None else self.continue_learning_rate


def step(number: int, title: str, explanation: str):
    print(f"\n[{number}/6] {title}\n  {explanation}", flush=True)


class Quickstart:
    """All steps, which write into the folder `partial` what becomes the output."""

    def __init__(self, options: QuickstartOptions, partial: Path):
        self.options, self.partial = options, partial
        # also shows exact conversion of a donor that is saved in bfloat16
        self.dtype = "auto" if options.model else "float32"
        self.tokenizer = options.tokenizer if options.model else None
        self.text = {"column": options.column, "sample_by": options.sample_by}

    def run(self, name: str, seed: int, steps: int, **more) -> dict:
        """What all runs share: evaluated a few times, without checkpoints."""
        given = self.options
        lengths = {"batch_size": given.batch_size, "seq_len": given.seq_len, "eval_sequences": given.eval_sequences}
        intervals = {"steps": steps, "eval_steps": -(-steps // 4), "save_steps": steps, "keep_checkpoints": 1}
        shared = {"held_out": given.held_out, "depth_lr_scale": given.depth_lr_scale, "warmup": 20}
        return {**lengths, **intervals, **shared, "seed": given.seed + seed, "output": self.partial / name, **more}

    def train_donor(self) -> dict:
        """A small, deep Llama with random weights, trained on the text."""
        given = self.options
        fields = {
            "hidden_size": given.hidden_size,
            "intermediate_size": given.hidden_size * 8 // 3 // 32 * 32,
            "num_hidden_layers": given.layers,
            "num_attention_heads": given.hidden_size // 32,
            "num_key_value_heads": given.hidden_size // 32,
            "max_position_embeddings": 2 * given.seq_len,
            "initializer_range": (0.4 / given.hidden_size) ** 0.5,  # transformers' default is that of wider models
            "tie_word_embeddings": True,
        }
        run = self.run("donor", 0, given.donor_steps, learning_rate=given.learning_rate, schedule="constant")
        model = {"config": "llama", "set": fields, "mode": "donor", "train_tokenizer": given.vocab_size}
        return described("donor", pretrain(PretrainOptions(data=given.text, **model, **self.text, **run)))

    def train_on(self, name: str, model: Path, mode: str) -> dict:
        """Both models see the same batches, which aren't the ones that a new donor has seen first."""
        run = self.run(name, 1, self.options.steps, learning_rate=self.options.rates[0], min_lr_ratio=0)
        options = {"model": model, "mode": mode, "tokenizer": self.tokenizer, "data": self.options.text}
        return described(name, pretrain(PretrainOptions(**options, **self.text, **run)))

    def train_lora(self, model: Path) -> dict:
        given = self.options
        run = self.run("attnres-lora", 2, given.steps, learning_rate=given.rates[1], lora_rank=given.lora_rank)
        options = {"model": model, "method": "lora", "merge": True, "tokenizer": self.tokenizer, "data": given.examples}
        return described("attnres-lora, on answers", finetune(FinetuneOptions(**options, **run)))

    def convert(self, source: Path) -> dict:
        """Converts with the check of attnres-convert: the logits of both models."""
        given, converted = self.options, self.partial / "attnres"
        result = convert_checkpoint(source, converted, mode=given.mode, block_size=given.block_size)
        print("  " + report(result).replace(str(self.partial), str(given.output)).replace("\n", "\n  "))
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

    def generate(self, path: Path) -> str:
        """Samples a continuation of the prompt, with the same random numbers for every model."""
        checkpoint = open_checkpoint(str(path), tokenizer=self.tokenizer)
        model, tokenizer = load_checkpoint(checkpoint, self.dtype), checkpoint.tokenizer
        inputs = tokenizer(self.options.prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
        torch.manual_seed(self.options.seed)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        choice = {"do_sample": True, "temperature": 0.6, "top_k": 50, "pad_token_id": pad}
        output = model.generate(**inputs, max_new_tokens=self.options.new_tokens, **choice)
        return tokenizer.decode(output[0], skip_special_tokens=True)

    def draw(self, models: list[Path]) -> list[str]:
        """Names of the figures, in the folder `figures`."""
        given, folder = self.options, self.partial / "figures"
        options = {"seq_len": given.seq_len, "tokenizer": self.tokenizer, "text": given.text, **self.text}
        paths = plot(PlotOptions(models=models, output=folder, **options))
        metrics = {path.parent.name: read_lines(path.parent / METRICS_FILE) for path in models}
        plot_losses(metrics, folder / "losses.png", "Training on from the same weights, on the same data")
        return sorted([*(path.name for path in paths), "losses.png"])

    def compare(self, models: list[Path]) -> dict:
        """All models on the same held-out text, in `evaluation.md`."""
        given = self.options
        lengths = {"seq_len": given.seq_len, "stride": given.seq_len, "batch_size": given.batch_size}
        part = {"held_out": given.held_out, "max_documents": given.eval_documents, "tokenizer": self.tokenizer}
        options = {**lengths, **part, "dtype": self.dtype, "data": given.text, **self.text}
        evaluation = evaluate(EvaluateOptions(checkpoints=models, output=self.partial, **options))
        print(report_table(evaluation["checkpoints"]), *notes(evaluation), sep="\n")
        return evaluation["checkpoints"]

    def all_steps(self) -> dict:
        """Runs all steps, and returns every number.

        Raises:
            InputError: bad input; one line says what to do.
        """
        self.check_input()
        given, runs, folder = self.options, {}, self.partial
        step(1, "A donor", "A decoder of transformers, with the residual stream that all of them have.")
        donor = given.model or folder / "donor" / "model"
        if given.train_donor:
            runs["donor"] = self.train_donor()
        elif given.model is None:
            shutil.copytree(ROOT / ZOO_DONOR, donor)
            print(f"  {ZOO_DONOR}, a small Llama that was trained on Python's library; its card tells how.", flush=True)

        step(2, "Conversion", "Every sublayer now reads a softmax over depth, at first uniform: the same function.")
        conversion = self.convert(donor)

        step(3, "Pretraining continued", "Both models train on from the same weights, on the same batches.")
        for name, source, mode in (("donor", donor, "donor"), ("attnres", folder / "attnres", given.mode)):
            runs[f"{name}-continued"] = self.train_on(f"{name}-continued", source, mode)
        continued = [folder / f"{name}-continued" / "model" for name in ("donor", "attnres")]

        step(
            4, "LoRA", "Low-rank adapters on each linear layer, and depth attention in full, trained on answers alone."
        )
        runs["attnres-lora"] = self.train_lora(continued[1])
        error = runs["attnres-lora"]["merged_relative_error"]
        print(f"  reloaded on its base and merged: relative difference of the logits {error:.1e}")

        step(5, "Generation", "The same prompt and the same random numbers for each.")
        models = [donor, folder / "attnres", *continued, folder / "attnres-lora" / "model"]
        names = ["donor", "attnres", "donor-continued", "attnres-continued", "attnres-lora"]
        generated = {}
        for name, path in zip(names, models):
            generated[name] = self.generate(path)
            print(f"  --- {name}", *generated[name].splitlines(), sep="\n  | ", flush=True)

        step(6, "Figures and numbers", f"All of it goes to {given.output}.")
        figures = self.draw(continued)
        models[-1] = folder / "attnres-lora" / "merged"
        evaluation = self.compare(models)
        print("\n" + runs_table(runs), end="")
        return {
            "conversion": conversion,
            "runs": runs,
            "generated": generated,
            "evaluation": evaluation,
            "figures": figures,
            "arguments": vars(given),
            "versions": versions(),
        }

    def check_input(self):
        """Refuses what a later step would, before minutes of training."""
        given = self.options
        reading.check_text(given.prompt, "--prompt")
        for source in filter(None, (given.model, given.tokenizer)):
            reading.check_own_files(source)
        load_documents(given.text, given.column, sample_by=given.sample_by)
        load_examples(given.examples)
        if not given.train_donor:
            model = ROOT / ZOO_DONOR if given.model is None else given.model
            check_context(open_checkpoint(str(model), tokenizer=given.tokenizer).config, given.seq_len)


def described(name: str, results: dict) -> dict:
    """The results of a run, with a line about them."""
    before = results["held_out_loss_before"]
    start = "" if before is None else f"{before:.4f} -> "
    print(f"  {name}: held-out loss {start}{results['held_out_loss']:.4f} after {results['steps']} steps", flush=True)
    return results


def runs_table(runs: dict[str, dict]) -> str:
    rows = [("run", "steps", "parameters trained", "tokens/s", "held-out loss before", "after")]
    for name, run in runs.items():
        before = run["held_out_loss_before"]
        parameters = run.get("trained_parameters", run.get("parameters"))
        name = f"{name}, on answers" if "method" in run else name
        losses = "-" if before is None else f"{before:.4f}", f"{run['held_out_loss']:.4f}"
        rows.append((name, str(run["steps"]), f"{parameters:,}", f"{run['tokens_per_second']:,.0f}", *losses))
    return table(rows)


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


def main(argv: list[str] | None = None):
    started = time.perf_counter()
    given = parse_arguments(argv)
    start_process()
    try:
        if PartialState().num_processes > 1:
            raise InputError("it runs in one process; start it without accelerate launch.")
        if given.model is not None and not (given.model / "config.json").is_file():
            raise InputError(f"--model {given.model} is not a checkpoint folder, it has no config.json.")
        if given.model is None and not given.train_donor and not (ROOT / ZOO_DONOR / "config.json").is_file():
            raise InputError(
                f"{ZOO_DONOR} isn't here, as it is in a clone of the project; give --model or --train-donor."
            )
        output = given.output = given.output.resolve()
        given.model = given.model and given.model.resolve()
        staging.recover(output)
        check_output(output)
        with (
            reading.no_panic(),
            staging.staged(output, check=lambda output, _: check_output(output)) as partial,
        ):
            results = Quickstart(given, partial).all_steps()
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
