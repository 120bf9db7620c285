# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""What happens over depth while a model trains, for any `Trainer`:

    Trainer(..., callbacks=[DepthCallback("outputs/run", probe={"input_ids": held_out[:1]})])

Every `every` steps, and when training ends, one short forward of the same text, the probe, shows each sublayer and each
read, so that steps and models are comparable and nothing of it touches training. Works on donors too, whose reads are
the residual stream.
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

    The `step` of an entry is how many steps have been taken before: 0 for the first weights. Its gradient is that of
    the step that follows, before clipping; the norm of a layer that isn't trained is null. The last entry is of the
    weights that training ends with, and has no `gradient_norm`, as no step follows; there is none with
    `load_best_model_at_end`, which may end with others. The Trainer logs each step that follows a look, because only
    its log has the norm from before clipping.

    Args:
        folder: where to; TensorBoard's part goes to its `tensorboard/depth`.
        probe: what the model is shown, for instance `{"input_ids": ids}` `(batch, seq)`. One sequence is enough.
        every: steps between two looks, of which the first is at step 0. By default the looks of 200 steps or more
            together take less than one percent of them, also where a batch is no larger than the probe.
    """

    def __init__(self, folder: str | Path, probe: dict[str, torch.Tensor], every: int = 200):
        self.folder, self.probe, self.every = Path(folder), probe, every

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        check_can_be_watched(model)
        self.writer = self.entry = None
        if state.is_world_process_zero:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds

            self.folder.mkdir(parents=True, exist_ok=True)
            # the look at a checkpoint's own step happens again
            self.lines = JsonLines(self.folder / DEPTH_FILE, state.global_step - 1)
            self.writer = SummaryWriter(self.folder / "tensorboard" / "depth", purge_step=state.global_step)

    def look(self, model, step: int, with_gradient: bool) -> dict:
        """An entry; all processes look, each of which may have a part of the model."""
        started = time.perf_counter()
        entry = {"step": step, **look(model, self.probe)}
        if with_gradient:
            entry["gradient_norm"] = gradient_norms(decoder(model).layers)
        return {**entry, "seconds": time.perf_counter() - started}

    def write(self, entry: dict):
        for name, values in entry.items():
            for index, value in enumerate(values if isinstance(values, list) else ()):
                if value is not None:
                    self.writer.add_scalar(f"{name}/{index:03d}", value, entry["step"])
        self.lines.write(entry)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every or uses_deepspeed():
            return  # DeepSpeed has already taken the step, and keeps the parameters in pieces
        self.entry = self.look(model, state.global_step, with_gradient=True)

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
        self.write(entry)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        is_known = not (args.load_best_model_at_end or uses_deepspeed())
        last = self.look(model, state.global_step, with_gradient=False) if is_known else None
        if self.writer is None:
            return
        if last is not None:
            self.write(last)
        self.writer.flush()
