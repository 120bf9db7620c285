# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""What the quickstart does: the story of a chat model, and the one of small models."""

import shutil
import textwrap
import time
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path

import attnres_convert
import torch
from attnres_convert import InputError, convert_checkpoint, reading
from attnres_convert.report import report
from attnres_convert.writing import table, write_text
from attnres_recipes.configs import check_context
from attnres_recipes.data import data_name, load_documents
from attnres_recipes.defaults import DEPTH_LR_SCALE, HELD_OUT, STDLIB
from attnres_recipes.evaluation import evaluate, notes, report_table
from attnres_recipes.examples import encoded_examples, load_examples, without_problems
from attnres_recipes.figures import plot_losses
from attnres_recipes.finetuning import finetune
from attnres_recipes.folders import METRICS_FILE
from attnres_recipes.generation import Conversation
from attnres_recipes.hardware import has_bfloat16
from attnres_recipes.loading import load_checkpoint, load_tokenizer, open_checkpoint
from attnres_recipes.log import read_lines
from attnres_recipes.options import EvaluateOptions, FinetuneOptions, PlotOptions, PretrainOptions
from attnres_recipes.plotting import plot
from attnres_recipes.pretraining import pretrain
from attnres_recipes.process import versions


ROOT = Path(__file__).resolve().parents[1]
ZOO_DONOR = Path("model_cards/llama-1.3m")
CHATS = ROOT / "examples" / "captain.jsonl"
# None of them is in CHATS
QUESTIONS = ["How do I keep bread fresh?", "What is a lighthouse for?", "I can't sleep. What should I do?"]
CONVERSION = "Every sublayer now reads a softmax over depth, at first uniform: the same function."
FOLDERS = {"donor + LoRA": "donor-lora", "AttnRes + LoRA": "attnres-lora"}
COLUMN = 37  # characters of an answer beside others


class Story:
    """All steps, which write into the folder `partial` what becomes the output."""

    defaults = {}  # of the options that are `None`
    steps = 6
    is_chat = False
    dtype = "float32"
    sampling = {}

    def __init__(self, options, partial: Path):
        self.options, self.partial = options, partial
        for name, default in self.defaults.items():
            if getattr(options, name) is None:
                setattr(options, name, default)
        self.tokenizer, self.seconds = None, {}

    @contextmanager
    def step(self, title: str, explanation: str):
        print(f"\n[{len(self.seconds) + 1}/{self.steps}] {title}\n  {explanation}", flush=True)
        started = time.perf_counter()
        yield
        self.seconds[title] = time.perf_counter() - started
        print(f"  {self.seconds[title]:.0f} seconds", flush=True)

    def run(self, name: str, seed: int, steps: int, **more) -> dict:
        """What all runs share: evaluated a few times, without checkpoints."""
        given = self.options
        lengths = {"batch_size": given.batch_size, "seq_len": given.seq_len, "eval_sequences": given.eval_sequences}
        intervals = {"steps": steps, "eval_steps": -(-steps // 4), "save_steps": steps, "keep_checkpoints": 1}
        shared = {"held_out": given.held_out, "depth_lr_scale": given.depth_lr_scale, "warmup": 20}
        return {**lengths, **intervals, **shared, "seed": given.seed + seed, "output": self.partial / name, **more}

    def lora(self, name: str, model: Path, rate: float | None, **more) -> dict:
        given = self.options
        run = self.run(name, 2, given.steps, learning_rate=rate, lora_rank=given.lora_rank, **more)
        options = {"model": model, "method": "lora", "tokenizer": self.tokenizer, "data": given.examples}
        return described(name, finetune(FinetuneOptions(**options, **run)))

    def convert(self, source: Path, link: bool = False) -> dict:
        """Converts with the check of attnres-convert: the logits of both models."""
        given, converted = self.options, self.partial / "attnres"
        result = convert_checkpoint(source, converted, mode=given.mode, block_size=given.block_size, link=link)
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

    def generate(self, path: Path, prompts: list[str]) -> list[dict]:
        """The continuation of each prompt, its text and tokens, with the same random numbers for every model."""
        checkpoint = open_checkpoint(str(path), tokenizer=self.tokenizer)
        model, tokenizer = load_checkpoint(checkpoint, self.dtype), checkpoint.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        generated = []
        for prompt in prompts:
            input_ids = Conversation(checkpoint, self.is_chat).ask(prompt).to(model.device)
            options = {"max_new_tokens": self.options.new_tokens, "pad_token_id": pad, **self.sampling}
            torch.manual_seed(self.options.seed)
            output = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **options)
            tokens = output[0, input_ids.shape[1] :].tolist()
            generated.append({"text": tokenizer.decode(tokens, skip_special_tokens=True), "tokens": tokens})
        return generated

    def draw(self, models: list[Path], text: list[str], title: str, **more) -> list[str]:
        """Names of the figures, in the folder `figures`."""
        folder = self.partial / "figures"
        options = {"seq_len": self.options.seq_len, "tokenizer": self.tokenizer, "text": text, **more}
        paths = plot(PlotOptions(models=models, output=folder, **options))
        metrics = {path.parent.name: read_lines(path.parent / METRICS_FILE) for path in models}
        plot_losses(metrics, folder / "losses.png", title)
        return sorted([*(path.name for path in paths), "losses.png"])

    def told(self, **results) -> dict:
        """Every number, as all stories have them."""
        return {**results, "step_seconds": self.seconds, "arguments": vars(self.options), "versions": versions()}


class ChatStory(Story):
    """A chat model in a GGUF file: its answers, before and after a style was learned, with and without AttnRes."""

    defaults = {"steps": 36, "batch_size": 2, "held_out": 0.15, "lora_rank": 16, "new_tokens": 60}
    defaults |= {"examples": [str(CHATS)], "continue_learning_rate": 1e-3, "depth_lr_scale": 0.1}
    is_chat = True
    sampling = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}

    def __init__(self, options, partial: Path, gguf: Path):
        super().__init__(options, partial)
        self.gguf = gguf
        self.questions = [options.prompt] if options.prompt is not None else QUESTIONS
        self.bf16 = torch.cuda.is_available() or has_bfloat16()

    def all_steps(self) -> dict:
        """Runs all steps, and returns every number.

        Raises:
            InputError: bad input; one line says what to do.
        """
        given, folder, answers, runs = self.options, self.partial, {}, {}
        self.check_input()
        donor, converted = folder / "donor", folder / "attnres"
        with self.step("A chat model", f"SmolLM2-135M-Instruct, out of {self.gguf}; its 4 bits become float32."):
            attnres_convert.dequantize_checkpoint(self.gguf, donor, dtype="float32")
            answers["donor"] = self.ask(donor)
        with self.step("Conversion", CONVERSION):
            conversion = self.convert(donor, link=True)
            answers["attnres"] = self.ask(converted)
            same, tokens = self.same_tokens(answers)
            print(f"  {same} of {tokens} tokens of the answers are the donor's")
        dtype = "" if self.bf16 else ", in float32 as this processor lacks bfloat16, which takes twice as long"
        for name, model, mode, what in (
            ("donor + LoRA", donor, "donor", "Low-rank adapters on each linear layer, trained on the answers of chats"),
            ("AttnRes + LoRA", converted, given.mode, "The same on the same batches, and depth attention beside it"),
        ):
            with self.step(name, f"{what}{dtype}."):
                more = {"mode": mode, "bf16": self.bf16, "depth_every": 0}
                runs[name] = self.lora(FOLDERS[name], model, given.continue_learning_rate, **more)
        with self.step("Answers", "The same questions, none of which was among the chats; always the likeliest token."):
            for name in runs:
                answers[name] = self.ask(folder / FOLDERS[name] / "model", show=False)
            shown = self.side_by_side(answers)
            print("\n" + shown)
        with self.step("Figures and numbers", f"All of it goes to {given.output}."):
            text = folder / "chats.txt"
            write_text(text, "\n\n".join(self.rendered(donor)))
            title = "LoRA on the same chats"
            models = [folder / name / "model" for name in FOLDERS.values()]
            figures = self.draw(models, [str(text)], title, sample_by="paragraph", sequences=2)
        numbers = self.numbers(runs, conversion, same, tokens)
        write_text(folder / "summary.md", f"```text\n{shown}```\n\n{numbers}")
        print("\n" + numbers, end="")
        return self.told(conversion=conversion, runs=runs, generated=answers, figures=figures)

    def check_input(self):
        if self.options.prompt is not None:
            reading.check_text(self.options.prompt, "--prompt")
        load_examples(self.options.examples)

    def ask(self, model: Path, show: bool = True) -> dict[str, dict]:
        """The answer to each question, the likeliest token at a time."""
        answers = dict(zip(self.questions, self.generate(model, self.questions)))
        for question, answer in answers.items() if show else ():
            print(f"  > {question}", *textwrap.wrap(answer["text"], 110), sep="\n  | ", flush=True)
        return answers

    def same_tokens(self, answers: dict) -> tuple[int, int]:
        """How many tokens of the converted model's answers are the donor's, and how many those have."""
        pairs = [
            (answers["donor"][question]["tokens"], answers["attnres"][question]["tokens"])
            for question in self.questions
        ]
        return sum(a == b for pair in pairs for a, b in zip(*pair)), sum(max(map(len, pair)) for pair in pairs)

    def side_by_side(self, answers: dict) -> str:
        """The answers before and after, in columns."""
        columns = {"before": "donor"} | {name: name for name in FOLDERS}
        lines = []
        for question in self.questions:
            texts = [textwrap.wrap(answers[name][question]["text"], COLUMN) for name in columns.values()]
            rows = [list(columns), ["-" * COLUMN] * len(columns), *zip_longest(*texts, fillvalue="")]
            lines += [f"> {question}", *("  ".join(cell.ljust(COLUMN) for cell in row).rstrip() for row in rows), ""]
        return "\n".join(lines)

    def rendered(self, model: Path) -> list[str]:
        """The examples as text, as the model sees them."""
        tokenizer, data = load_tokenizer(str(model)), self.options.examples
        examples, _, _ = without_problems(encoded_examples(load_examples(data), tokenizer, data_name(data)))
        return tokenizer.batch_decode(examples["input_ids"][:])

    def numbers(self, runs: dict, conversion: dict, same: int, tokens: int) -> str:
        """Exactness of the conversion, and losses on held-out answers."""
        heading = ("model", "logits off by", "same tokens", "loss before", "loss after", "trained", "tokens", "seconds")
        error = conversion["relative_error"]
        exact = ("-" if error is None else f"{error:.1e}", f"{same} of {tokens}")
        rows = [heading]
        for (name, run), first in zip(runs.items(), (("-", "-"), exact)):
            losses = [f"{run[key]:.4f}" for key in ("held_out_loss_before", "held_out_loss")]
            sizes = [f"{run['trained_parameters']:,}", f"{run['tokens']:,}", f"{self.seconds[name]:.0f}"]
            rows.append((name, *first, *losses, *sizes))
        return table(rows)


class SmallStory(Story):
    """A small model, converted, trained on beside itself, and with LoRA on top."""

    defaults = {"steps": 60, "batch_size": 4, "held_out": HELD_OUT, "lora_rank": 8, "new_tokens": 80}
    defaults |= {"text": [STDLIB], "examples": [STDLIB], "prompt": "    def __init__(self"}
    defaults |= {"depth_lr_scale": DEPTH_LR_SCALE}
    sampling = {"do_sample": True, "temperature": 0.6, "top_k": 50}

    def __init__(self, options, partial: Path):
        super().__init__(options, partial)
        # also shows exact conversion of a donor that is saved in bfloat16
        self.dtype = "auto" if options.model else "float32"
        self.tokenizer = options.tokenizer if options.model else None
        self.text = {"column": options.column, "sample_by": options.sample_by}

    @property
    def rates(self) -> tuple[float, float | None]:
        """Learning rates of the two models that are trained on, and of LoRA; `None` for that of fine-tuning."""
        given = self.options
        if given.model is not None:
            rate, lora_rate = 5e-5, None
        elif given.train_donor:
            rate = lora_rate = given.learning_rate
        else:  # trained to the end of its schedule
            rate, lora_rate = 3e-4, 2e-3
        if given.continue_learning_rate is None:
            return rate, lora_rate
        return given.continue_learning_rate, None if given.model is not None else given.continue_learning_rate

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
        run = self.run(name, 1, self.options.steps, learning_rate=self.rates[0], min_lr_ratio=0)
        options = {"model": model, "mode": mode, "tokenizer": self.tokenizer, "data": self.options.text}
        return described(name, pretrain(PretrainOptions(**options, **self.text, **run)))

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
        with self.step("A donor", "A decoder of transformers, with the residual stream that all of them have."):
            donor = given.model or folder / "donor" / "model"
            if given.train_donor:
                runs["donor"] = self.train_donor()
            elif given.model is None:
                shutil.copytree(ROOT / ZOO_DONOR, donor)
                print(f"  {ZOO_DONOR}, a small Llama that was trained on Python's library; its card tells how.")
        with self.step("Conversion", CONVERSION):
            conversion = self.convert(donor)
        with self.step("Pretraining continued", "Both models train on from the same weights, on the same batches."):
            for name, source, mode in (("donor", donor, "donor"), ("attnres", folder / "attnres", given.mode)):
                runs[f"{name}-continued"] = self.train_on(f"{name}-continued", source, mode)
            continued = [folder / f"{name}-continued" / "model" for name in ("donor", "attnres")]
        with self.step("LoRA", "Low-rank adapters on each linear layer, and depth attention, trained on answers."):
            runs["attnres-lora"] = self.lora("attnres-lora", continued[1], self.rates[1], merge=True)
            error = runs["attnres-lora"]["merged_relative_error"]
            print(f"  reloaded on its base and merged: relative difference of the logits {error:.1e}")
        with self.step("Generation", "The same prompt and the same random numbers for each."):
            models = [donor, folder / "attnres", *continued, folder / "attnres-lora" / "model"]
            names = ["donor", "attnres", "donor-continued", "attnres-continued", "attnres-lora"]
            generated = {}
            for name, path in zip(names, models):
                generated[name] = given.prompt + self.generate(path, [given.prompt])[0]["text"]
                print(f"  --- {name}", *generated[name].splitlines(), sep="\n  | ", flush=True)
        with self.step("Figures and numbers", f"All of it goes to {given.output}."):
            title = "Training on from the same weights, on the same data"
            figures = self.draw(continued, given.text, title, **self.text)
            models[-1] = folder / "attnres-lora" / "merged"
            evaluation = self.compare(models)
        print("\n" + runs_table(runs), end="")
        return self.told(conversion=conversion, runs=runs, generated=generated, evaluation=evaluation, figures=figures)

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
            if not (model / "config.json").is_file():
                raise InputError(
                    f"{model} isn't here, as it is in a clone of the project; give --model or --train-donor."
                )
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


def tell(options, gguf: Path | None, partial: Path) -> dict:
    """Tells the story of the chat model in the file `gguf` or, without one, that of small models.

    Args:
        options: those of the quickstart.
        partial: the folder to write into.

    Returns:
        Every number.

    Raises:
        InputError: bad input; one line says what to do.
    """
    return (ChatStory(options, partial, gguf) if gguf else SmallStory(options, partial)).all_steps()
