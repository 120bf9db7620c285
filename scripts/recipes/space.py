# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""What a run needs on the disk, known before it trains."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from attnres_convert.files import check_space
from peft import PeftModel

from .checkpoints import checkpoints, step_of
from .optim import MuonWithAdamW
from .options import RunOptions


LARGE = 10**9  # bytes of a checkpoint, from which on few are written
FEW = 3


@dataclass(frozen=True)
class Sizes:
    """Bytes of what a run writes: a checkpoint, which is weights and the optimizer's state; the model or adapter at the
    end; and the model that an adapter is merged into, if it is."""

    checkpoint: int
    model: int
    merged: int = 0


def num_bytes(tensors) -> int:
    """Of tensors, each counted once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def sizes(model: torch.nn.Module, optimizer: torch.optim.Optimizer, merge: bool) -> Sizes:
    """What a model that isn't sharded yet needs, but for tokenizers and other small files.

    AdamW keeps two tensors for each that it trains, Muon one, in its precision. A merged model is in float32.
    """
    is_adapter = isinstance(model, PeftModel)
    weights = (p for p in model.parameters() if p.requires_grad) if is_adapter else model.state_dict().values()
    saved, state = num_bytes(weights), 0
    for index, group in enumerate(optimizer.param_groups):
        is_muon = isinstance(optimizer, MuonWithAdamW) and index == 0
        state += num_bytes(group["params"]) * (1 if is_muon else 2)
    merged = 4 * model.get_base_model().num_parameters() if is_adapter and merge else 0
    return Sizes(saved + state, saved, merged)


def check_run_space(folder: Path, options: RunOptions, sizes: Sizes, checkpoint: Path | None):
    """Whether there is room for what a run has still to write: a new checkpoint is whole before an old one goes.

    Args:
        options: settled.
        checkpoint: from which the run goes on, if it does.

    Raises:
        InputError: there isn't.
    """
    done, held = (step_of(checkpoint), len(checkpoints(folder))) if checkpoint else (0, 0)
    to_write = math.ceil(options.steps / options.save_steps) - done // options.save_steps if done < options.steps else 0
    number = max(0, min(max(1, options.keep_checkpoints) + 1 - held, to_write))
    needed = number * sizes.checkpoint + sizes.model + sizes.merged
    what = [f"{number} checkpoint{'s' * (number > 1)} of {sizes.checkpoint / 1e9:.2f}"] if number else []
    what += ["the model", *(["the merged one"] if sizes.merged else [])]
    advice = "make room, choose another --output" + (", or --keep-checkpoints 1" if number > 2 else "")
    check_space(folder, needed, ", ".join(what), advice)
