# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The options that all training scripts have, and what transformers' Trainer is told of them."""

import argparse
import importlib.util
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import datasets
import torch
import transformers
from accelerate import PartialState
from attnres_convert import reading
from training_optim import DEPTH_LR_SCALE, OPTIMIZERS, uses_deepspeed
from training_run import RunError, end_with_parent, end_without_a_word
from transformers import TrainingArguments


NOT_OF_A_RUN = ("output", "compare", "sweep", "set_options", "command")
SCHEDULES = ("cosine", "wsd", "constant")


def number(kind: type, lowest: float, highest: float = math.inf, without: tuple[float, ...] = ()) -> Callable:
    """The type of an option that takes a finite number from `lowest` to `highest`, but none of `without`."""

    def parse(text: str):
        value = kind(text)
        if not (math.isfinite(value) and lowest <= value <= highest) or value in without:
            limits = f"more than {lowest}" if lowest in without else f"at least {lowest}"
            if highest < math.inf:
                limits += f" and less than {highest}" if highest in without else f" and at most {highest}"
            elif kind is float:
                limits += " and finite"
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {limits}")
        return value

    parse.__name__ = kind.__name__  # argparse names it
    return parse


class Lists(argparse.Action):
    """For an option of several values, which holds them all if it is given several times, and none if given without."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if before is self.default or not values else [*before, *values])


HIGHEST = 10**9  # far beyond what trains
positive = number(int, 1, HIGHEST)
natural = number(int, 0, HIGHEST)
non_negative = number(float, 0, HIGHEST)
above_zero = number(float, 0, HIGHEST, without=(0,))
learning_rate = number(float, 0, 1e28, without=(0,))  # HIGHEST times as much is still finite in float32
batch = number(int, 1, 10**6)
rank = number(int, 1, 2**16)  # beyond the sizes of the layers
workers = number(int, 0, 1024)
share = number(float, 0, 1, without=(0, 1))


def add_training_options(parser: argparse.ArgumentParser, compared: str, example: str):
    """The groups "training" and "run"; `set_defaults` of the parser changes defaults, also in the help.

    Args:
        compared, example: what `--compare` takes, for the help.
    """
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=positive, default=1000, help="default: %(default)s")
    add("--batch-size", type=batch, default=8, help="sequences per device and forward; default: 8")
    add("--accumulate", type=batch, default=1, help="forwards per step; default: 1")
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="muon: for matrices, AdamW for the rest; "
        "default: adamw")  # fmt: skip
    add("--learning-rate", type=learning_rate, default=1e-3, help="default: %(default)s")
    add("--depth-lr-scale", type=non_negative, default=DEPTH_LR_SCALE, help="depth attention's learning rate as a "
        "multiple of --learning-rate; default: %(default)s")  # fmt: skip
    add("--weight-decay", type=non_negative, default=0.1, help="of matrices; default: %(default)s")
    add("--max-grad-norm", type=non_negative, default=1.0, help="0 for no clipping; default: 1")
    add("--schedule", choices=SCHEDULES, default="cosine", help="default: cosine; wsd: warm-up, stable, decay")
    add("--warmup", type=natural, default=100, help="steps; default: %(default)s, at most a tenth of --steps")
    add("--decay", type=number(float, 0, 1, without=(0,)), default=0.2, help="share of the steps in which wsd decays; "
        "default: 0.2")  # fmt: skip
    add("--min-lr-ratio", type=number(float, 0, 1), default=0.1, help="of the last learning rate to --learning-rate; "
        "default: 0.1")  # fmt: skip
    add("--bf16", action="store_true", help="compute in bfloat16, weights stay in float32")
    add("--gradient-checkpointing", action="store_true", help="recompute activations: less memory, more time")
    add("--compile", action="store_true", help="torch.compile")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of new weights, dropout and the order of the data; "
        "default: 0")  # fmt: skip
    add = parser.add_argument_group("run").add_argument
    add("--output", type=Path, required=True, help="run folder; the same command again resumes what is in it")
    add("--logging-steps", type=positive, default=1, help="default: 1")
    add("--eval-steps", type=positive, help="default: a tenth of --steps")
    add("--save-steps", type=positive, help="steps between checkpoints; default: a tenth of --steps")
    add("--keep-checkpoints", type=positive, default=2, help="default: the last 2")
    add("--depth-every", type=natural, default=100, help="steps between looks at each layer, 0 for none; default: 100")
    add("--compare", help=f"{compared} to train one after the other, such as {example}")
    add("--sweep", nargs="*", action=Lists, default=[], metavar="OPTION=V1,V2", help="values to try, such as "
        "seed=0,1,2")  # fmt: skip


def check_training_options(parser: argparse.ArgumentParser, args: argparse.Namespace, compared: tuple[str, ...]):
    """Refuses what can't work, and takes the lists apart."""
    if args.save_steps and args.save_steps % args.logging_steps:
        parser.error("--save-steps must be a multiple of --logging-steps, so that a resumed run logs the same losses")
    if (args.steps or 1) * args.batch_size * args.accumulate > HIGHEST**2:
        parser.error("--steps, --batch-size and --accumulate are more sequences than can be counted")
    args.compare = args.compare.split(",") if args.compare else []
    for name in args.compare:
        if name not in compared:
            parser.error(f"--compare: {name!r} is not one of {', '.join(compared)}")
    if len(set(args.compare)) < len(args.compare):
        parser.error(f"--compare {','.join(args.compare)} names one twice")
    takes_a_value = {action.dest for action in parser._actions if action.nargs is None} - {"output", "compare"}
    for sweep in args.sweep:
        name, _, values = sweep.partition("=")
        values = values.split(",")
        if name not in takes_a_value or "" in values:
            parser.error(f"--sweep {sweep}: give an option that takes a value, and values: depth_lr_scale=0.1,1,10")
        if len(set(values)) < len(values) or [other.partition("=")[0] for other in args.sweep].count(name) > 1:
            parser.error(f"--sweep {sweep}: an option or value is given twice")


def given_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[str]:
    """The options that aren't at their defaults, as words of a command line."""
    words = []
    for action in parser._actions:
        value = getattr(args, action.dest, action.default)
        if value == action.default or value in ("", []):
            continue
        words.append(action.option_strings[-1])
        if action.nargs != 0:  # not a flag
            words += map(str, value if isinstance(value, list) else [value])
    return words


def set_intervals(args: argparse.Namespace):
    """Fills in what depends on the number of steps."""
    args.logging_steps = min(args.logging_steps, args.steps)
    args.warmup = min(args.warmup, args.steps // 10)
    args.eval_steps = args.eval_steps or math.ceil(args.steps / 10)
    args.save_steps = args.save_steps or math.ceil(args.steps / 10 / args.logging_steps) * args.logging_steps


def run_arguments(args: argparse.Namespace) -> dict:
    """The options that make a run what it is."""
    return {name: value for name, value in vars(args).items() if name not in NOT_OF_A_RUN}


def training_arguments(args: argparse.Namespace) -> TrainingArguments:
    schedule = {"cosine": "cosine_with_min_lr", "wsd": "warmup_stable_decay", "constant": "constant_with_warmup"}
    ratio = {"cosine": "min_lr_rate", "wsd": "min_lr_ratio"}
    schedule_options = {ratio[args.schedule]: args.min_lr_ratio} if args.schedule in ratio else {}
    if args.schedule == "wsd":
        after_warmup = args.steps - 1 - args.warmup  # the schedule's length is one less, see RunTrainer
        schedule_options["num_decay_steps"] = max(1, min(round(args.decay * args.steps), after_warmup))
    is_cpu = not torch.accelerator.is_available()
    if args.bf16 and is_cpu and uses_deepspeed():
        raise RunError("DeepSpeed computes in bfloat16 on GPUs alone; leave out --bf16, or use FSDP2 or DDP.")
    checkpointing = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
    return TrainingArguments(
        output_dir=str(args.output),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulate,
        learning_rate=args.learning_rate,
        max_grad_norm=args.max_grad_norm,
        lr_scheduler_type=schedule[args.schedule],
        lr_scheduler_kwargs=schedule_options,
        warmup_steps=args.warmup,
        use_cpu=is_cpu and not uses_deepspeed(),
        ddp_backend="gloo" if is_cpu and uses_deepspeed() else None,
        ddp_find_unused_parameters=False,
        bf16=args.bf16,
        torch_compile=args.compile,
        **{f"{checkpointing}_checkpointing": args.gradient_checkpointing},
        logging_steps=args.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=args.eval_steps,
        prediction_loss_only=True,
        label_names=["labels"],
        save_strategy="steps",
        save_steps=args.save_steps,
        remove_unused_columns=False,
        dataloader_num_workers=args.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        seed=args.seed,
    )


@contextmanager
def enough_memory() -> Iterator[None]:
    """
    Raises:
        RunError: the block needs more memory than there is, or a library in Rust fails in it.
    """
    try:
        with reading.no_panic():
            yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or re.search("(can't|not) allocate memory|out of memory", str(error)[:1000]):
            advice = "choose a smaller --batch-size or --seq-len, or --gradient-checkpointing"
            raise RunError(f"there isn't enough memory: {reading.reason(error)}; {advice}.") from None
        raise


def start_process() -> PartialState:
    """Joins the other processes of a launch, and leaves the terminal to the script."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # or a killed launcher's processes would go on, and keep the run folder
        end_with_parent()
    is_cpu = not torch.accelerator.is_available()
    options = {"cpu": is_cpu}
    if uses_deepspeed():
        if importlib.util.find_spec("deepspeed") is None:
            if os.environ.get("RANK", "0") != "0":
                end_without_a_word()
            raise SystemExit("ZeRO-3 needs DeepSpeed: pip install deepspeed, or use FSDP2.")
        if is_cpu:
            # accelerate leaves out DeepSpeed where it is told to use the CPU; where it isn't, DeepSpeed finds the CPU
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
            options = {"backend": "gloo"}
    # the others wait for the main process to prepare the data
    state = PartialState(**options, timeout=timedelta(hours=3))
    transformers.utils.logging.disable_progress_bar()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    # AttnRes layers return views to nothing that changes them in place
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(FSDPAttnRes\w+\) returned a view")
    return state
