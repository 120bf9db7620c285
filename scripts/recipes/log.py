# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The log of a run: `metrics.jsonl` and TensorBoard."""

import collections
import json
import math
import os
import statistics
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
from attnres_convert import InputError, reading, staging
from attnres_convert.writing import write_text
from tqdm import tqdm
from transformers import TrainerCallback

from .folders import METRICS_FILE


def read_lines(path: Path) -> list[dict]:
    """The entries of a JSON lines file that have a `step`; a last line that a killed run didn't finish is left out."""
    return parse_lines(path)[0]


def parse_lines(path: Path) -> tuple[list[dict], int]:
    """The entries of a JSON lines file, and how many of its lines hold none."""
    if not os.path.lexists(path):
        return [], 0
    with reading.open_regular(path) as file:
        *lines, _ = file.read().split(b"\n")
    entries = []
    for line in lines:
        with suppress(InputError, UnicodeDecodeError):
            entry = reading.parse_json(line.decode(), path.name)
            if isinstance(entry, dict) and type(entry.get("step")) is int:
                entries.append(entry)
    return entries, len(lines) - len(entries)


class JsonLines:
    """A log with an entry per line, each with its `step`; entries after `last_step` are removed when it is opened.

    Args:
        expected: what is known of the entries up to `last_step`. A log that lacks some of it, or that has lines which
            can't be read, is kept under another name, and goes on with what is known or can be read; a line says so.
    """

    def __init__(self, path: Path, last_step: int, expected: list[dict] | None = None):
        found, unreadable = parse_lines(path)
        kept = [entry for entry in found if entry["step"] <= last_step]
        lacks = expected is not None and not is_covered(expected, kept)
        is_gone = last_step >= 0 and not os.path.lexists(path)
        if unreadable or lacks or is_gone:
            problem = f"has {unreadable} lines that can't be read" if unreadable else "lacks entries"
            aside = "" if is_gone else f", and is kept as {staging.set_aside(path).name}"
            kept = expected if lacks else kept
            source = "those of the checkpoint" if lacks else f"the {len(kept)} left"
            print(f"{path} {'is gone' if is_gone else problem}{aside}; it goes on with {source}", file=sys.stderr)
        write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
        self.path = path

    def write(self, entry: dict):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def is_covered(expected: list[dict], entries: list[dict]) -> bool:
    """Whether each expected entry is there; a found one may hold more, as checkpoints of old versions hold less."""
    rest = iter(entries)
    return all(any(entry.items() <= found.items() for found in rest) for entry in expected)


RISE = 1.0  # nats per token: a model that loses so much is being destroyed
LAST_LOSSES = 5  # of training, which go up and down with the data: all of them have risen by so much


class RunLog(TrainerCallback):
    """Writes losses, gradient norms, learning rate and tokens per second to `metrics.jsonl` and TensorBoard.

    Times are those of the steps alone, without evaluation and checkpoints. A loss that rises by more than RISE over the
    held-out loss before training is said in one line, once.
    """

    def __init__(self, folder: Path, tokens_per_step: int):
        self.folder, self.tokens_per_step = folder, tokens_per_step
        self.seconds = []
        self.before, self.last_losses = None, collections.deque(maxlen=LAST_LOSSES)

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        from torch.utils.tensorboard import SummaryWriter  # takes seconds

        step = state.global_step
        known = [{"step": logs["step"], **entry} for logs in state.log_history if (entry := self.entry(logs))]
        self.lines = JsonLines(self.folder / METRICS_FILE, step if step else -1, known)
        self.before = losses(known, "held_out_loss").get(0)
        self.writer = SummaryWriter(self.folder / "tensorboard", purge_step=step + 1 if step else 0)
        self.bar = tqdm(
            total=state.max_steps, initial=step, unit="step", desc="training", disable=not sys.stderr.isatty()
        )

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.started)
        if state.is_world_process_zero:
            self.bar.update()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        entry = self.entry(logs)
        if "loss" in entry:
            entry["tokens_per_second"] = self.tokens_per_step * len(self.seconds) / sum(self.seconds)
            state.log_history[-1]["tokens_per_second"] = entry["tokens_per_second"]  # a checkpoint has all of the log
            self.seconds = []
        if not entry:
            return
        self.lines.write({"step": state.global_step, **entry})
        for name, value in entry.items():
            self.writer.add_scalar(name, value, state.global_step)
        self.bar.set_postfix({name: f"{value:.3f}" for name, value in entry.items() if "loss" in name})
        self.warn_of_rise(state.global_step, entry, args.learning_rate)

    def warn_of_rise(self, step: int, entry: dict, learning_rate: float):
        if step == 0:
            self.before = entry.get("held_out_loss")
        if self.before is None:
            return
        if "loss" in entry:
            self.last_losses.append(entry["loss"])
            loss = min(self.last_losses) if len(self.last_losses) == LAST_LOSSES else 0.0
        else:
            loss = entry["held_out_loss"]
        if loss > self.before + RISE:
            text = f"step {step}: the loss is {loss:.2f}, and the held-out loss before training was {self.before:.2f}; "
            self.bar.write(text + f"--learning-rate {learning_rate:g} may be too large for this model", file=sys.stderr)
            self.before = None

    @staticmethod
    def entry(logs: dict) -> dict:
        """What of a Trainer's log belongs to ours."""
        if "eval_loss" in logs:
            return {"held_out_loss": logs["eval_loss"]}
        names = ("loss", "grad_norm", "depth_grad_norm", "learning_rate", "tokens_per_second")
        return {name: logs[name] for name in names if name in logs and "loss" in logs}

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.bar.close()
            self.writer.flush()


def losses(metrics: list[dict], name: str) -> dict[int, float]:
    """By step, from the entries of `metrics.jsonl`: `"loss"` or `"held_out_loss"`, in nats per token."""
    return {entry["step"]: entry[name] for entry in metrics if name in entry}


def tokens_per_second(metrics: list[dict]) -> float:
    """The median over the logged steps, so that starting up and interruptions don't count."""
    speeds = [entry["tokens_per_second"] for entry in metrics if "tokens_per_second" in entry]
    return statistics.median(speeds or [math.nan])
