# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""What the commands take. The same classes start them from Python."""

import itertools
import math
import os
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

from attnres_convert import InputError, reading
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .defaults import HELD_OUT, MOST_DEPTH_RATE, PACKAGES, RATES, SOURCES, STDLIB, rates_of
from .leaks import secret_in_text
from .parser import Limits, Lists, Options, flag, kinds_of, option, read_words, takes_one_value


# options of comparisons and where they go, which don't make a run what it is, with what a single run has instead
OF_COMPARISONS = {"output": None, "compare": "", "sweep": [], "tune": None, "tune_steps": None, "jobs": 1}
LONGEST_NAME = 200  # bytes of a folder's; file systems take 255, with what is put before and behind it
OF_SET = "set."  # before a field of the configuration that runs differ in
ADAPTER_METHODS = ("lora", "dora", "qlora")
LORA_RANK = 16

HIGHEST = 10**9  # far beyond what trains
Positive = Annotated[int, Limits(1, HIGHEST)]
Natural = Annotated[int, Limits(0, HIGHEST)]
NonNegative = Annotated[float, Limits(0, HIGHEST)]
AboveZero = Annotated[float, Limits(0, HIGHEST, without=(0,))]
LearningRate = Annotated[float, Limits(0, 1e28, without=(0,))]  # HIGHEST times as much is still finite in float32
Batch = Annotated[int, Limits(1, 10**6)]
SeqLen = Annotated[int, Limits(2)]
Workers = Annotated[int, Limits(0, 1024)]
Share = Annotated[float, Limits(0, 1, without=(0, 1))]
Seed = Annotated[int, Limits(0, 2**32 - 1)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def list_rates(name: str) -> str:
    """The defaults of an option in RATES, for its help."""
    return ", ".join(f"{rates[name]:g} ({what})" for what, rates in RATES.items())


Method = Literal["lora", "dora", "qlora", "full", "depth"]


def check_mode(mode: str | None):
    """Refuses what is no mode. Those of the paper are known without an import that takes seconds."""
    if mode in (None, "donor", "block", "full"):
        return
    from configuration_attnres import ATTN_RES_MODES, known_modes

    if mode not in ATTN_RES_MODES:
        raise InputError(f"--mode is {mode!r}; it must be one of donor, {known_modes()}")


def mode_option():
    return option(None, "donor: a residual stream; block, full: Attention Residuals; or another way to mix depth, such "
        "as block_delta or mhc; default: the model's, or block")  # fmt: skip


@dataclass(kw_only=True)
class DocumentOptions(Options):
    """What a document is."""

    group = "documents"
    column: str = option("text", "column that holds the text")
    sample_by: Literal["document", "paragraph", "line"] | None = option(None, "what a document is in text files; "
        "default: document (a file) if there are several files, else paragraph")  # fmt: skip


@dataclass(kw_only=True)
class StartOptions(Options):
    """What a run starts from."""

    group = "start"
    block_size: Positive | None = option(
        None, "decoder layers per block of a donor or a new model; default: an eighth of the layers"
    )
    tokenizer: str | None = option(None, "folder or Hub id; default: that of the model")
    resize_embeddings: bool = option(False, "enlarge the embeddings of --model to all tokens of the tokenizer; in "
        "fine-tuning with methods that make no adapter")  # fmt: skip

    def check(self):
        check_mode(self.mode)
        super().check()


@dataclass(kw_only=True)
class DataOptions(Options):
    """What a run reads."""

    group = "data"
    data: list[str] = option(
        [STDLIB],
        "stdlib (Python's own source, offline), site-packages (that of the installed packages), files or folders of "
        "text, JSON lines or Parquet, or a Hub id",
    )
    data_config: str | None = option(None, "configuration of the data set on the Hub")
    data_split: str = option("train", "split, also train[:1%%] and the like")
    held_out: Share = option(HELD_OUT, "share of the documents, chosen by hash, at least one sequence")
    eval_sequences: Positive = option(64, "held-out sequences to evaluate at most")
    seq_len: SeqLen = option(256, "tokens per sequence")
    num_workers: Workers = option(0, "processes that read batches")


@dataclass(kw_only=True)
class TrainingOptions(Options):
    """How a run trains."""

    group = "training"
    steps: Positive = option(1000, "steps of the optimizer")
    batch_size: Batch = option(8, "sequences per device and forward")
    accumulate: Batch = option(1, "forwards per step")
    optimizer: Literal["adamw", "muon"] = option("adamw", "muon: for matrices, AdamW for the rest")
    learning_rate: LearningRate | None = option(
        None, "of all but depth attention; default: " + list_rates("learning_rate")
    )
    depth_lr_scale: NonNegative | None = option(
        None,
        "depth attention's learning rate as a multiple of the other; default: "
        + list_rates("depth_lr_scale")
        + f"; beside other weights at most what makes {MOST_DEPTH_RATE:g}",
    )
    weight_decay: NonNegative = option(0.1, "of matrices")
    max_grad_norm: NonNegative = option(1.0, "0 for no clipping")
    schedule: Literal["cosine", "wsd", "constant"] = option("cosine", "wsd: warm-up, stable, decay")
    warmup: Natural = option(100, "steps, at most a tenth of --steps")
    decay: Annotated[float, Limits(0, 1, without=(0,))] = option(0.2, "share of the steps in which wsd decays")
    min_lr_ratio: Annotated[float, Limits(0, 1)] = option(0.1, "of the last learning rate to --learning-rate")
    bf16: bool = option(False, "compute in bfloat16, weights stay in float32")
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, more time")
    compile: bool = option(False, "torch.compile")
    attn_res_implementation: str | None = option(None, "what computes the reads of AttnRes models: eager, two_phase, "
        "cpp, triton or another; default: what is fastest here", metavar="NAME")  # fmt: skip
    expert_parallel: Batch = option(1, "processes that share the experts of each layer, each with whole ones")
    seed: Seed = option(0, "of new weights, dropout and the order of the data")


@dataclass(kw_only=True)
class RunOptions(DataOptions, TrainingOptions):
    """What all runs take."""

    group = "run"
    output: Path = option(help="run folder; the same command again resumes what is in it")
    logging_steps: Positive = option(1, "steps between entries of the log")
    eval_steps: Positive | None = option(None, "default: a tenth of --steps")
    save_steps: Positive | None = option(None, "steps between checkpoints; default: a tenth of --steps, "
        "a third where a checkpoint has 1 GB or more")  # fmt: skip
    keep_checkpoints: Natural = option(2, "how many of the last ones to keep; 0: one, until the run has ended")
    depth_every: Natural = option(100, "steps between looks at each layer, 0 for none")
    compare: str = option("", "modes to train one after the other, such as donor,block,full,mhc; of fine-tuning "
        "methods, such as lora,dora,full,depth; each may have options of its own, as in "
        "donor:learning_rate=6e-3,block:learning_rate=3e-3", metavar="NAME[:OPTION=VALUE],...")  # fmt: skip
    sweep: list[str] = option([], "values to try, such as seed=0,1,2 or, of the configuration, "
        "set.hidden_size=64,128", action=Lists, metavar="OPTION=V1,V2")  # fmt: skip
    tune: str | None = option(
        None,
        "values to try for each run with the first seed, and beyond an edge until the best "
        "isn't at one; all seeds are trained with the best, as in learning_rate=2e-3,4e-3,8e-3 or, in multiples of "
        "each run's default, learning_rate=x0.5,x1,x2",
        metavar="OPTION=V1,V2",
    )
    tune_steps: Positive | None = option(None, "steps of what --tune tries; default: --steps")
    jobs: Annotated[int, Limits(1, 1024)] = option(1, "runs of a comparison at a time; on a CPU they share its cores")

    compared = "mode"  # the option whose values `compare` holds
    pipeline_stages = None

    def __post_init__(self):
        if isinstance(self.compare, (list, tuple)):  # as a file or Python may have it
            self.compare = ",".join(map(str, self.compare))
        super().__post_init__()

    def check(self):
        if self.save_steps and self.save_steps % self.logging_steps:
            raise InputError(
                "--save-steps must be a multiple of --logging-steps, so that a resumed run logs the same losses"
            )
        if (self.steps or 1) * self.batch_size * self.accumulate > HIGHEST**2:
            raise InputError("--steps, --batch-size and --accumulate are more sequences than can be counted")
        self.check_variants()

    def check_variants(self):
        """Refuses a comparison of which one run's options can't work, before the first one is trained."""
        compared = [dict(options) for _, options in self.compared_runs]
        if any(options in compared[:index] for index, options in enumerate(compared)):
            raise InputError(f"--compare {self.compare} names one twice")
        names = [sweep.partition("=")[0] for sweep in self.sweep]
        if compared and self.compared in names:
            raise InputError(f"--compare takes the values of {flag(self.compared)}, which --sweep can't change")
        for sweep, name in zip(self.sweep, names):
            values = sweep.partition("=")[2].split(",")
            if not self.can_vary(name) or "" in values:
                raise InputError(
                    f"--sweep {sweep}: give an option that takes a value, and values: depth_lr_scale=0.1,1,10"
                )
            if len(set(values)) < len(values) or names.count(name) > 1:
                raise InputError(f"--sweep {sweep}: an option or value is given twice")
        for (_, options), item in zip(self.compared_runs, self.compare.split(",")):
            own = [option for option, _ in options[1:]]
            if len(set(own)) < len(own) or not all(map(self.can_vary, own)) or "" in dict(options).values():
                raise InputError(
                    f"--compare {item}: give options behind a name, each once, as block:learning_rate=1e-3"
                )
            if both := {self.compared, *names}.intersection(own):
                raise InputError(f"--compare {item}: {both.pop()} has its values elsewhere")
        if self.tune:
            self.check_tuned({*names, *(option for _, options in self.compared_runs for option, _ in options)})
        elif self.tune_steps:
            raise InputError("--tune-steps goes with --tune")
        runs = []
        for name, values in self.variants():
            try:
                run = self.variant(name, values)
                if self.tune:
                    self.values_to_try(run)
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
            if run.arguments in runs:
                raise InputError(f"{name} is the same run as another one; name each once")
            runs.append(run.arguments)

    def check_tuned(self, taken: set[str]):
        """
        Args:
            taken: options that have their values elsewhere.
        """
        name, _, texts = self.tune.partition("=")
        try:
            values = sorted({float(text.removeprefix("x")) for text in texts.split(",")})
        except ValueError:
            values = []
        is_number = name in self.arguments and float in kinds_of(type(self), name)
        if not is_number or len(values) < 2 or not 0 < values[0] < values[-1] < math.inf:
            raise InputError(f"--tune {self.tune}: give an option that takes a number, and two or more of them above 0")
        if texts.count("x") not in (0, texts.count(",") + 1):
            raise InputError(f"--tune {self.tune}: give numbers, or multiples of the default such as x0.5,x1,x2")
        if name in taken:
            raise InputError(f"--tune {self.tune}: {name} has its values elsewhere")
        if self.tune_steps and "steps" in taken:
            raise InputError("--tune-steps are those of all runs; leave it out where runs differ in steps")

    @property
    def tuned(self) -> str:
        """The option of `tune`."""
        return self.tune.partition("=")[0]

    def values_to_try(self, run: "RunOptions") -> list[float]:
        """Those of `tune`, with six digits; multiples are of what `run` has.

        Raises:
            InputError: it has nothing of which there are multiples, or the values are too close to one another.
        """
        name, _, texts = self.tune.partition("=")
        base = getattr(run.settled(), name) if "x" in texts else 1
        if not base:
            raise InputError(f"--tune {self.tune}: {name} has no default above 0 to multiply; give numbers")
        values = {float(f"{float(text.removeprefix('x')) * base:g}") for text in texts.split(",")}
        if len(values) < texts.count(",") + 1:
            raise InputError(f"--tune {self.tune}: some values are the same to six digits")
        return sorted(values)

    def can_vary(self, name: str) -> bool:
        """Whether the runs of a comparison may differ in an option, or in a field of `--set`."""
        if name.startswith(OF_SET):
            return "set" in self.arguments and name != OF_SET
        return name in self.arguments and takes_one_value(type(self), name)

    @property
    def compared_runs(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """What `compare` holds: for each item a name, and options with their values, that of `compared` first."""
        runs = []
        for item in self.compare.split(",") if self.compare else ():
            value, *own = item.split(":")
            runs.append((item.replace(":", " "), [(self.compared, value), *(word.partition("=")[::2] for word in own)]))
        return runs

    def variants(self) -> list[tuple[str, dict[str, str]]]:
        """Name and options of each run: every value in `compare` with every combination of swept values."""
        axes = [[(name, dict(options)) for name, options in self.compared_runs]] if self.compare else []
        for sweep in self.sweep:
            name, _, values = sweep.partition("=")
            axes.append([(f"{name}={value}", {name: value}) for value in values.split(",")])
        runs = itertools.product(*axes) if axes or self.tune else ()
        return [(" ".join(name for name, _ in run), {k: v for _, own in run for k, v in own.items()}) for run in runs]

    def variant(self, name: str, values: dict[str, str], **others) -> "RunOptions":
        """The options of one run of a comparison, in a folder of its own.

        Args:
            name, values: of [`variants`].
            others: values that all runs get.
        """
        single = {name: default for name, default in OF_COMPARISONS.items() if name != "output"}
        folder = name.replace(" ", ",").replace("/", "%2F")
        if len(os.fsencode(folder)) > LONGEST_NAME:
            raise InputError(f"its folder's name has more than {LONGEST_NAME} bytes; give shorter values")
        words = replace(self, **single, output=self.output / folder, **others).words()
        for own, value in values.items():
            is_field = own.startswith(OF_SET)
            words += ["--set", f"{own.removeprefix(OF_SET)}={value}"] if is_field else [f"{flag(own)}={value}"]
        return read_words(type(self), words)

    @property
    def arguments(self) -> dict:
        """What makes a run what it is, by name."""
        return {name: value for name, value in vars(self).items() if name not in OF_COMPARISONS}

    @property
    def trained(self) -> str:
        """What is trained, of RATES."""
        raise NotImplementedError

    @property
    def rates(self) -> dict[str, float]:
        """The learning rates that aren't given."""
        rates = rates_of(self.trained, self.learning_rate)
        return {name: rate for name, rate in rates.items() if getattr(self, name) is None}

    def settled(self, steps: int | None = None) -> "RunOptions":
        """With what depends on other options filled in, and on the number of steps once that is known."""
        steps = self.steps or steps
        logging_steps = min(self.logging_steps, steps)
        warmup = min(self.warmup, steps // 10)
        settled = replace(self, steps=steps, logging_steps=logging_steps, warmup=warmup, **self.rates)
        settled.eval_steps = self.eval_steps or math.ceil(steps / 10)
        settled.save_steps = self.save_steps or settled.save_steps_of(10)
        return settled

    def save_steps_of(self, checkpoints: int) -> int:
        """The steps between so many checkpoints at most, once the number of steps is known."""
        return math.ceil(self.steps / checkpoints / self.logging_steps) * self.logging_steps


@dataclass(kw_only=True)
class PretrainOptions(StartOptions, DocumentOptions, RunOptions):
    """What pretraining takes."""

    group, either = "model", "(--config MODEL | --model CHECKPOINT)"
    config: str | None = option(
        None, "train from scratch: model type (llama, attnres_qwen3, ...), JSON file, checkpoint or Hub id"
    )
    set: dict = option({}, "fields of --config to replace", action=Lists, metavar="FIELD=VALUE")
    model: str | None = option(None, "train on: AttnRes or donor checkpoint (folder or Hub id); a donor is converted")
    mode: str | None = mode_option()
    init: Literal["default", "scaled"] = option("default", "first weights with --config: default, as transformers "
        "makes them, or scaled, with a deviation of 1/sqrt(hidden size), and 1/sqrt(2 layers) of that in what writes "
        "to the residual stream")  # fmt: skip
    train_tokenizer: Annotated[int, Limits(0, 10**7)] = option(
        0, "train one of N tokens on the training data", metavar="N"
    )
    streaming: bool = option(False, "read the data as training goes on, without preparing all of it")
    shuffle_buffer: Positive = option(1000, "documents shuffled at a time with --streaming")
    num_proc: Annotated[int, Limits(1, 1024)] | None = option(None, "processes that tokenise")
    pipeline_stages: Annotated[int, Limits(2, 1024)] | None = option(None, "cut the layers into so many stages, one or "
        "more for each process; --accumulate is the number of microbatches")  # fmt: skip
    pipeline_schedule: Literal["1f1b", "gpipe"] = option("1f1b", "interleaved if processes have several stages")

    @property
    def trained(self) -> str:
        return "from scratch" if self.model is None else "continued"

    def check(self):
        if (self.config is None) == (self.model is None):
            raise InputError("give either --config, to train from scratch, or --model, to train on")
        if self.model is not None and (self.set or self.train_tokenizer):
            raise InputError(
                "--set and --train-tokenizer go with --config; a checkpoint has a configuration and a tokenizer"
            )
        if self.model is not None and self.init != "default":
            raise InputError("--init goes with --config; a checkpoint has its weights")
        if self.init == "scaled" and "initializer_range" in self.set:
            raise InputError("--init scaled decides on initializer_range; leave out one of them")
        if self.config is not None and self.resize_embeddings:
            raise InputError("--resize-embeddings goes with --model; with --config, --set vocab_size decides")
        if self.pipeline_stages and self.mode == "donor":
            raise InputError("--pipeline-stages cuts AttnRes models; with --mode donor use FSDP2")
        if self.pipeline_stages and self.expert_parallel > 1:
            raise InputError("--pipeline-stages and --expert-parallel don't go together; leave out one of them")
        if self.pipeline_stages and self.compile:
            raise InputError("--pipeline-stages can't compile; leave out --compile")
        if self.streaming and self.num_workers:
            raise InputError("--streaming reads in the main process; leave out --num-workers")
        if self.train_tokenizer and self.set.get("vocab_size", self.train_tokenizer) != self.train_tokenizer:
            raise InputError("--train-tokenizer decides on the vocabulary's size; leave out --set vocab_size or it")
        super().check()


@dataclass(kw_only=True)
class ScalingOptions(DocumentOptions, DataOptions):
    """What a scaling law takes: the options of its runs have the names that they have in pretraining."""

    group = "ladder of models"
    output: Path = option(help="folder; the same command again goes on, and sizes that are done count in the fit")
    sizes: str = option("32x6,48x8,64x10,80x12", "hidden size x layers of each size that is trained; those that are "
        "done already may be left out", metavar="HIDDENxLAYERS,...")  # fmt: skip
    compare: str = option("donor,block,full", "of donor, block and full; the others are compared with the first one")
    seeds: str = option("0,1,2", "of new weights and the order of the data, the same ones for all")
    learning_rates: str = option("2e-3,4e-3,8e-3", "one for all, or several to try for each variant and size with the "
        "first seed, and beyond an edge until the best isn't at one")  # fmt: skip
    tune_share: Annotated[float, Limits(0, 1, without=(0,))] = option(1.0, "share of a run's steps with which "
        "learning rates are tried")  # fmt: skip
    tokens_per_parameter: AboveZero = option(20.0, "tokens to train on for each parameter of a size's donor, without "
        "the embedding")  # fmt: skip
    vocab: Annotated[int, Limits(259, 10**7)] = option(2048, "tokens of the tokenizer, which is trained on the data")
    head_size: Positive | None = option(None, "numbers of an attention head; default: 32, or 16 where the hidden size "
        "has no two heads of 32")  # fmt: skip
    block_size: Positive | None = option(None, "decoder layers per block; default: an eighth of the layers")
    init: Literal["default", "scaled"] = option("scaled", "first weights, as in pretraining")
    batch_size: Batch = option(8, "sequences per step")
    bf16: bool = option(False, "compute in bfloat16, weights stay in float32")
    compile: bool = option(False, "torch.compile")
    attn_res_implementation: str | None = option(None, "what computes the reads, as in pretraining", metavar="NAME")
    jobs: Annotated[int, Limits(1, 1024)] = option(1, "runs at a time; on a CPU they share its cores")
    data: list[str] = option([PACKAGES], "site-packages (source of the installed packages), stdlib (Python's own), "
        "files or folders of text, JSON lines or Parquet, or a Hub id")  # fmt: skip
    eval_sequences: Positive = option(256, "held-out sequences to evaluate at most")

    def check(self):
        for name in (names := self.sizes.split(",")):
            hidden_size, layers = size_of(name, f"--sizes {self.sizes}")
            self.head_size_of(hidden_size)
            if (self.block_size or 1) > layers:
                raise InputError(f"--block-size {self.block_size} is more than the {layers} layers of {name}")
        if len(set(names)) < len(names):
            raise InputError(f"--sizes {self.sizes} names one twice")
        if not set(self.variants) <= {"donor", "block", "full"} or len(set(self.variants)) < len(self.variants):
            raise InputError(f"--compare {self.compare}: give some of donor, block, full, each once")
        seeds = self.seeds.split(",")
        if not all(re.fullmatch(r"0|[1-9]\d{0,8}", seed) for seed in seeds) or len(set(seeds)) < len(seeds):
            raise InputError(f"--seeds {self.seeds}: give whole numbers, each once, as in 0,1,2")
        try:
            rates = [float(rate) for rate in self.learning_rates.split(",")]
        except ValueError:
            rates = [0.0]
        if not all(0 < rate < math.inf for rate in rates) or len(set(rates)) < len(rates):
            raise InputError(f"--learning-rates {self.learning_rates}: give numbers above 0, each once: 2e-3,4e-3")
        for name in names:
            self.run(name, 1, self.vocab)

    @property
    def variants(self) -> list[str]:
        """The modes, the one first with which the others are compared."""
        return self.compare.split(",")

    def head_size_of(self, hidden_size: int) -> int:
        """
        Raises:
            InputError: there is none that divides the hidden size.
        """
        for size in [self.head_size] if self.head_size else [32, 16]:
            if hidden_size % size == 0 and (self.head_size or hidden_size >= 2 * size):
                return size
        what = f"heads of {self.head_size} numbers" if self.head_size else "two or more heads of 32 or 16 numbers"
        raise InputError(f"--sizes {self.sizes}: {hidden_size} isn't made of {what}; change it, or --head-size")

    def run(self, size: str, steps: int, vocab_size: int) -> PretrainOptions:
        """The comparison that trains one size, in a folder of that name."""
        hidden_size, layers = size_of(size, "--sizes")
        shared = {field.name for field in fields(PretrainOptions)} & vars(self).keys()
        if "," in self.learning_rates:
            # of all steps, the best of those that are tried is the first seed's run itself
            tune_steps = None if self.tune_share == 1 else math.ceil(steps * self.tune_share)
            rates = {"tune": f"learning_rate={self.learning_rates}", "tune_steps": tune_steps}
        else:
            rates = {"learning_rate": float(self.learning_rates)}
        return PretrainOptions(
            **{name: value for name, value in vars(self).items() if name in shared - {"output"}},
            **rates,
            config="llama",
            set={
                "hidden_size": hidden_size,
                "num_hidden_layers": layers,
                "intermediate_size": 8 * round(2.75 * hidden_size / 8),
                "num_attention_heads": hidden_size // self.head_size_of(hidden_size),
                "max_position_embeddings": self.seq_len,
                "tie_word_embeddings": True,
                "vocab_size": vocab_size,
            },
            tokenizer=str(self.output / "tokenizer"),
            steps=steps,
            eval_steps=math.ceil(steps / 4),  # small models train for less time than ten evaluations take
            sweep=[f"seed={self.seeds}"],
            output=self.output / size,
        )


def size_of(name: str, option: str) -> tuple[int, int]:
    """Hidden size and layers of a size such as 32x6.

    Raises:
        InputError: it is none.
    """
    if not re.fullmatch(r"[1-9]\d{0,5}x[1-9]\d{0,3}", name):
        raise InputError(f"{option}: give hidden size x layers, separated by commas, as in 32x6,48x8")
    hidden_size, layers = map(int, name.split("x"))
    return hidden_size, layers


@dataclass(kw_only=True)
class AdapterOptions(Options):
    """What fine-tuning trains."""

    group = "method"
    method: Method = option("lora", "lora, dora, qlora (on a quantised model): adapters and depth attention; full: "
        "everything; depth: depth attention alone")  # fmt: skip
    lora_rank: Annotated[int, Limits(1, 2**16)] | None = option(None, f"rank of the adapters; default: {LORA_RANK}")
    lora_alpha: AboveZero | None = option(None, "scale of the adapters, divided by their rank; default: twice the rank")
    lora_dropout: Annotated[float, Limits(0, 1, without=(1,))] | None = option(
        None, "of the adapters' input; default: 0"
    )
    target_modules: list[str] | None = option(None, "layers that get adapters, by the end of their name; default: all "
        "linear layers of attention, MLPs and shared experts", metavar="NAME")  # fmt: skip
    quantization: Literal["nf4", "int8"] = option("nf4", "of qlora: nf4, 4 bits, by bitsandbytes, or int8 by torchao")
    adapter: str | None = option(None, "folder or Hub id of an adapter for --model to train on")
    samples: Natural = option(0, "answer so many held-out prompts at the end, for the card; the first ones, unselected")
    merge: bool = option(False, "also write the model with its adapter merged, which loads without PEFT")

    @property
    def makes_adapter(self) -> bool:
        return self.method in ADAPTER_METHODS


@dataclass(kw_only=True)
class FinetuneOptions(StartOptions, AdapterOptions, RunOptions):
    """What fine-tuning takes."""

    group = "model and data"
    model: str = option(help="AttnRes or donor checkpoint (folder or Hub id); a donor is converted")
    mode: str | None = mode_option()
    data: list[str] = option([STDLIB], "stdlib (functions of Python's library, offline; as chat: stdlib-chat; "
        "docstrings: stdlib-docstrings), files or folders of JSON, JSON lines or Parquet, or a Hub id")  # fmt: skip
    columns: str | None = option(None, "one column, of conversations, or two, of prompts and completions; default: "
        "messages, else prompt,completion, else conversations, else instruction, input and output")  # fmt: skip
    held_out: Share = option(HELD_OUT, "share of the examples, chosen by hash, one at least")
    seq_len: SeqLen = option(512, "tokens per sequence; longer examples lose their ends")
    packing: bool = option(True, "one example per sequence")
    epochs: AboveZero = option(3.0, "times to see the data")
    steps: Positive | None = option(None, "steps of the optimizer, instead of --epochs")
    weight_decay: NonNegative = option(0.0, "of matrices")

    compared = "method"
    of_base = frozenset(("model", "mode", "block_size"))  # what makes a run's base one of its own

    def variant(self, name: str, values: dict[str, str], **others) -> "FinetuneOptions":
        if self.of_base & values.keys():
            others.pop("model", None)
        return super().variant(name, values, **others)

    def check(self):
        if self.adapter:
            for name in ("lora_rank", "lora_alpha", "lora_dropout", "target_modules"):
                if getattr(self, name) is not None:
                    raise InputError(f"--adapter {self.adapter} has its own; leave out {flag(name)}")
            if not self.makes_adapter:
                raise InputError(f"--adapter goes with {', '.join(ADAPTER_METHODS)}")
        if self.resize_embeddings and self.makes_adapter:
            raise InputError(
                "--resize-embeddings goes with --method full or depth: an adapter leaves its base as it is"
            )
        if self.optimizer == "muon" and self.method == "depth":
            raise InputError("--optimizer muon is for matrices of the layers; --method depth trains none")
        if self.column_names and (len(self.column_names) > 2 or len(set(self.column_names)) < len(self.column_names)):
            raise InputError(
                "--columns takes one name, of conversations, or two different ones, of prompts and completions"
            )
        super().check()

    @property
    def arguments(self) -> dict:
        lora = {"lora_rank": self.lora_rank or LORA_RANK, "lora_dropout": self.lora_dropout or 0.0}
        return {**super().arguments, **lora, "columns": self.column_names}

    @property
    def column_names(self) -> list[str] | None:
        return self.columns.split(",") if self.columns else None

    @property
    def trained(self) -> str:
        return self.method

    def settled(self, steps: int | None = None) -> "FinetuneOptions":
        return replace(self, **self.rates) if steps is None else super().settled(steps)


@dataclass(kw_only=True)
class CheckpointOptions(Options):
    """How checkpoints are loaded."""

    group = "loading"
    base: str | None = option(None, "base of the adapters, instead of the one that they name")
    tokenizer: str | None = option(None, "folder or Hub id; default: each model's own")
    dtype: Dtype = option("auto", "auto: as saved")


@dataclass(kw_only=True)
class TextOptions(DocumentOptions):
    """Text that is evaluated: loss, perplexity, bits per byte."""

    group = "text: loss, perplexity, bits per byte"
    data: list[str] | None = option(None, "stdlib (Python's own source, offline), site-packages (of the installed "
        "packages), files or folders of text, JSON lines or Parquet, or a Hub id; default: stdlib, if neither "
        "--choices nor --lm-eval is given")  # fmt: skip
    data_config: str | None = option(None, "configuration of the data set on the Hub")
    data_split: str = option("train", "split, also test[:1000] and the like")
    held_out: Share | None = option(None, "only the documents that pretraining with --held-out SHARE keeps from "
        f"training; default: {HELD_OUT} of stdlib and site-packages, all of other data", metavar="SHARE")  # fmt: skip
    max_documents: Positive | None = option(None, "documents, and questions, to evaluate at most; default: all")
    stride: Positive | None = option(None, "tokens by which windows follow one another; default: half of --seq-len")


@dataclass(kw_only=True)
class QuestionOptions(Options):
    """Questions with choices: accuracy."""

    group = "questions: accuracy"
    choices: str | None = option(None, "file of JSON lines or Parquet, or Hub id: a question, a list of choices and "
        "the answer (index, letter, label or text) in each row", metavar="DATA")  # fmt: skip
    choices_config: str | None = option(None, "configuration of the data set on the Hub")
    choices_split: str = option("train", "train is all of a file")
    question_column: str = option("question", "column of the question")
    choices_column: str = option("choices", "column of the choices")
    answer_column: str = option("answer", "column of the answer")
    prompt_format: str = option("{question}", "for instance 'Question: {question} Answer:'")
    choice_separator: str = option(" ", "between prompt and choice; default: a space")


@dataclass(kw_only=True)
class HarnessOptions(Options):
    """Tasks of EleutherAI's harness."""

    group = "EleutherAI's harness (pip install 'attnres[lm-eval]')"
    lm_eval: str = option("", "names of tasks, groups or tags, separated by commas", metavar="TASKS")
    lm_eval_include: Path | None = option(None, "task files (YAML) of your own", metavar="FOLDER")
    lm_eval_fewshot: int | None = option(None, "examples in the prompt; default: as the task says", metavar="N")
    lm_eval_limit: Positive | None = option(None, "documents of each task at most; default: all", metavar="N")

    @property
    def tasks(self) -> list[str]:
        return [name.strip() for name in self.lm_eval.split(",")] if self.lm_eval else []


@dataclass(kw_only=True)
class EvaluateOptions(TextOptions, QuestionOptions, HarnessOptions, CheckpointOptions):
    """What evaluation takes."""

    group = "models and results"
    checkpoints: list[str] = option(help="folders or Hub ids of models, or folders of PEFT adapters; the others are "
        "compared with the first one", positional=True)  # fmt: skip
    output: Path = option(help="folder for evaluation.json and evaluation.md")
    batch_size: Batch = option(8, "sequences per forward")
    seq_len: Positive | None = option(None, "tokens of context at most; default: the shortest context of the models, "
        "at most 1024")  # fmt: skip
    resamples: Positive = option(1000, "of the bootstrap")
    seed: Seed = option(0, "of the bootstrap, and of the harness")

    def check(self):
        if not (self.data or self.choices or self.tasks):
            self.data = [STDLIB]
        if self.held_out is None and self.data in [[source] for source in SOURCES]:
            self.held_out = HELD_OUT
        if "{question}" not in self.prompt_format:
            raise InputError("--prompt-format needs {question}, where the question comes")
        check_no_file(self.output)


def remote_code_option():
    return option(
        False, "run code that the model brings; needed only for models that neither transformers nor this project knows"
    )


@dataclass(kw_only=True)
class GenerateOptions(CheckpointOptions):
    """What generation takes."""

    group = "generation"
    model: str = option(help="folder or Hub id of a model or adapter", positional=True)
    prompt: str | None = option(None, "one prompt, instead of lines from the terminal")
    complete: bool = option(False, "complete text, also with a model that has a chat template")
    system: str | None = option(None, "system message of a chat")
    max_new_tokens: Positive = option(128, "per answer at most")
    temperature: NonNegative = option(0.8, "0 always takes the most likely token")
    top_k: Positive = option(50, "sample among this many tokens")
    seed: Seed = option(0, "of sampling")
    trust_remote_code: bool = remote_code_option()
    json: bool = option(False, "print a last line of JSON with prompts and texts")


@dataclass(kw_only=True)
class ServeOptions(CheckpointOptions):
    """What serving takes: the names are those of `transformers serve`, but for those of CheckpointOptions."""

    group = "server"
    model: str = option(help="folder or Hub id of a model or adapter, also its name in requests", positional=True)
    host: str = option("localhost", "address to listen at; whoever reaches it may use the model, 0.0.0.0 is everybody")
    port: Annotated[int, Limits(1, 65535)] = option(8000, "port to listen at")
    enable_cors: bool = option(False, "let the pages of all web sites ask")
    log_level: Literal["debug", "info", "warning", "error", "critical"] = option("warning", "of transformers' messages")
    device: str = option("auto", "auto, cpu, cuda:0 and the like")
    attn_implementation: str | None = option(None, "eager, sdpa, flash_attention_2 and the like")
    quantization: Literal["bnb-4bit", "bnb-8bit"] | None = option(None, "quantise the weights with bitsandbytes")
    compile: bool = option(False, "torch.compile")
    reasoning: Literal["on", "off", "auto"] = option("auto", "of models whose template can switch it; auto: as it says")
    chat_template_kwargs: str | None = option(None, "JSON object that chat templates get", metavar="JSON")
    default_seed: Seed | None = option(None, "of sampling")
    trust_remote_code: bool = remote_code_option()
    continuous_batching: bool = option(False, "answer requests together; all sample as the first one asks to, and "
        "their stop strings don't count")  # fmt: skip
    cb_block_size: Positive | None = option(None, "tokens in a block of the cache of --continuous-batching")
    cb_num_blocks: Positive | None = option(None, "blocks of that cache")
    cb_max_batch_tokens: Positive | None = option(None, "tokens in a batch at most")
    cb_max_memory_percent: Annotated[float, Limits(0, 1, without=(0,))] | None = option(
        None, "share of the memory for that cache at most"
    )

    def check(self):
        values = reading.parse_json(self.chat_template_kwargs or "{}", "--chat-template-kwargs")
        if not isinstance(values, dict):
            raise InputError("--chat-template-kwargs must be a JSON object, such as '{\"enable_thinking\": true}'")


@dataclass(kw_only=True)
class ExportOptions(Options):
    """What an export takes."""

    group = "export"
    model: str = option(help="folder or Hub id of a model", positional=True)
    output: Path = option(help="folder to write", positional=True)
    format: Literal["onnx", "torch", "aoti", "executorch"] = option("onnx", "of the program: ONNX, torch.export, "
        "AOTInductor (compiled for this processor), or ExecuTorch with its portable operators")  # fmt: skip
    dtype: Dtype = option("float32", "of the weights; auto: that of the checkpoint")
    force: bool = option(False, "replace an export that is there")
    trust_remote_code: bool = remote_code_option()


@dataclass(kw_only=True)
class PlotOptions(DocumentOptions, CheckpointOptions):
    """What plotting takes."""

    group = "models and figures"
    models: list[str] = option(help="folders or Hub ids of models, or folders of PEFT adapters", positional=True)
    output: Path = option(help="folder for the figures")
    text: list[str] = option([STDLIB], "files or folders of text, JSON lines or Parquet, or a Hub id, to average over; "
        "stdlib, site-packages: the part of that source that pretraining holds out")  # fmt: skip
    sequences: Positive = option(8, "sequences from all over the text")
    seq_len: Positive | None = option(None, "tokens per sequence; default: 256, or the models' context")
    prompt: str | None = option(None, "what to show token by token; default: the beginning of the text")
    tokens: Positive = option(48, "of the prompt, to show at most")
    reads: str | None = option(
        None, "whose weights to show token by token, such as 0m,3a,output; default: five from all over the depth"
    )
    html: bool = option(False, "also write depth.html, a page on which to point at tokens and weights of the prompt")

    def check(self):
        if self.prompt == "":
            raise InputError("--prompt is empty")


@dataclass(kw_only=True)
class PushOptions(Options):
    """What pushing takes."""

    group = "repository"
    folder: Path = option(help="folder of a saved model with its tokenizer and card", positional=True)
    repo: str = option(help="repository: name, or owner/name; it is made if it doesn't exist", positional=True)
    private: bool = option(False, "make a new repository private")
    revision: str = option("main", "branch, made from main if it doesn't exist")
    create_pr: bool = option(False, "open a pull request on the branch instead of changing it")
    message: str = option("Upload model", "of the commit")
    trust_remote_code: bool = option(False, "let the check run code that isn't this project's")
    dry_run: bool = option(False, "list what would go up and check that it loads, without a network")

    def check(self):
        for name, text in (("--message", self.message), ("--revision", self.revision), ("repo", self.repo)):
            if found := secret_in_text(text):
                raise InputError(f"{name} contains {found}, which would be published")
        try:
            validate_repo_id(self.repo)
        except HFValidationError:
            raise InputError(f"{self.repo} is no name of a repository such as my-name/my-model") from None
        if not re.fullmatch(r"[A-Za-z0-9][\w./-]*", self.revision) or ".." in self.revision:
            raise InputError(f"--revision {self.revision} is no name of a branch")
        if not self.message.strip():
            raise InputError("--message is empty")


@dataclass(kw_only=True)
class ClusterOptions(Options):
    """Devices and links; the defaults are those of an NVIDIA H100 SXM with NVLink, and 400 Gbit/s per device between
    nodes."""

    group = "devices and links"
    tflops: AboveZero = option(989.0, "peak of a device in bfloat16, without sparsity, in 1e12 FLOPs per second")
    utilisation: Annotated[float, Limits(0, 1, without=(0,))] = option(0.4, "share of the peak that a model reaches")
    memory_bandwidth: AboveZero = option(3350.0, "GB (1e9 bytes) per second, of a device's memory")
    device_memory: AboveZero = option(80.0, "GB of a device")
    node_size: Positive = option(8, "devices of a node")
    link_bandwidth: AboveZero = option(450.0, "GB per second and direction between devices of a node")
    node_bandwidth: AboveZero = option(50.0, "GB per second and direction of a device, between nodes")
    latency: NonNegative = option(10.0, "microseconds before a transfer begins to arrive")


@dataclass(kw_only=True)
class PlanOptions(ClusterOptions):
    """What planning takes."""

    group = "model and pipeline"
    config: str = option(help="model type (llama, attnres_qwen3, ...), JSON file, checkpoint or Hub id")
    set: dict = option({}, "fields of --config to replace", action=Lists, metavar="FIELD=VALUE")
    devices: list[Positive] = option(help="numbers of devices, each of which is planned")
    block_size: Positive | None = option(None, "decoder layers per block; default: the model's, or an eighth of its "
        "layers")  # fmt: skip
    pipeline_size: Positive | None = option(None, "devices of a pipeline; the others have replicas; default: as many "
        "as divide --devices and leave each stage a layer")  # fmt: skip
    stages_per_device: Annotated[int, Limits(2, 64)] = option(2, "of the interleaved schedule")
    batch_size: Batch = option(256, "sequences per step, of all devices together")
    microbatch_size: Batch = option(1, "sequences per microbatch")
    seq_len: SeqLen | None = option(None, "tokens per sequence; default: 4096, or the model's context if that is less")
    precision: Literal["mixed", "bfloat16", "float32"] = option("mixed", "mixed: weights, gradients and activations "
        "in bfloat16, AdamW's master weights and moments in float32; else all of it in one")  # fmt: skip
    gradient_checkpointing: bool = option(False, "compute each layer again in the backward pass")
    shard_optimizer: bool = option(False, "divide AdamW's state among the replicas, as ZeRO-1 does")
    output: Path | None = option(None, "name without a suffix, of a file .json and a file .md to write")
    json: bool = option(False, "print a last line of JSON")

    def check(self):
        if self.output and (self.output.suffix in (".json", ".md") or not self.output.name):
            raise InputError(f"--output {self.output}: give a name without a suffix; .json and .md are added")


def check_no_file(folder: Path):
    if os.path.isfile(folder):  # unlike a Path, it takes a name of any length
        raise InputError(f"--output {folder} is a file; give a folder")
