# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""What happens over depth while a model trains, for any `Trainer`:

    Trainer(..., callbacks=[DepthCallback("outputs/run", probe={"input_ids": held_out[:1]})])

Every `every` steps one short forward of the same text, the probe, shows each sublayer and each read, so that steps and
models are comparable and nothing of it touches training. Works on donors too, whose reads are the residual stream.
"""

import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from .log import JsonLines
from .look import check_can_be_watched, decoder, gradient_norms, look
from .optim import uses_deepspeed


DEPTH_FILE = "depth.jsonl"


class DepthCallback(TrainerCallback):
    """Writes what [`look`] sees and the gradient norm of each layer to `depth.jsonl` and TensorBoard.

    An entry is of the weights that a step starts from and of the gradient that it computes, before clipping; the norm
    of a layer that isn't trained is null. The Trainer logs each step that is looked at, because only its log has the
    norm from before clipping.

    Args:
        folder: where to; TensorBoard's part goes to its `tensorboard/depth`.
        probe: what the model is shown, for instance `{"input_ids": ids}` `(batch, seq)`. One sequence is enough.
        every: steps between two looks; the first step is always looked at. By default both looks of the first 200
            steps together take less than one percent of them, also where a batch is no larger than the probe.
    """

    def __init__(self, folder: str | Path, probe: dict[str, torch.Tensor], every: int = 200):
        self.folder, self.probe, self.every = Path(folder), probe, every

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        check_can_be_watched(model)
        self.writer = self.entry = None
        if state.is_world_process_zero:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds

            self.folder.mkdir(parents=True, exist_ok=True)
            self.lines = JsonLines(self.folder / DEPTH_FILE, state.global_step)
            self.writer = SummaryWriter(self.folder / "tensorboard" / "depth", purge_step=state.global_step + 1)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        step = state.global_step + 1
        if step % self.every and step != 1 or uses_deepspeed():
            return  # DeepSpeed has already taken the step, and keeps the parameters in pieces
        started = time.perf_counter()
        self.entry = {**look(model, self.probe), "gradient_norm": gradient_norms(decoder(model).layers)}
        self.seconds = time.perf_counter() - started

    def on_step_end(self, args, state, control, **kwargs):
        if self.entry is not None:
            control.should_log = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Writes the entry of a step; its log comes before its checkpoint, so that no resumed run misses it."""
        if self.entry is None or "loss" not in logs:
            return
        entry, self.entry = self.entry, None
        if self.writer is None:
            return
        if args.max_grad_norm and "grad_norm" in logs:  # what torch has clipped by
            factor = max(1.0, (logs["grad_norm"] + 1e-6) / args.max_grad_norm)
            entry["gradient_norm"] = [norm and norm * factor for norm in entry["gradient_norm"]]
        for name, values in entry.items():
            for index, value in enumerate(values):
                if value is not None:
                    self.writer.add_scalar(f"{name}/{index:03d}", value, state.global_step)
        self.lines.write({"step": state.global_step, **entry, "seconds": self.seconds})

    def on_train_end(self, args, state, control, **kwargs):
        if self.writer is not None:
            self.writer.flush()
