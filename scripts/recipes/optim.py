# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""AdamW, or Muon for the layers' matrices with AdamW for the rest; depth attention is a parameter group of its own."""

import os

import torch
from attnres_convert import InputError

from .defaults import rates_of


def uses_deepspeed() -> bool:
    """Whether `accelerate launch` started this process for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


def is_depth_attention(name: str) -> bool:
    return "depth_attention" in name.split(".")


def parameter_groups(model, learning_rate: float, weight_decay: float, depth_lr_scale: float) -> dict[str, dict]:
    """The trained parameters by what they need: `matrices` of the layers, `other` matrices (embeddings, head, stacked
    experts), `vectors` (norms, biases) and `depth`. Groups without parameters are left out.

    Weight decay would pull the queries towards zero, the plain average of all sources, and the gains of the keys away
    from one; depth attention and vectors have none.
    """
    groups = {
        "matrices": {"params": [], "weight_decay": weight_decay},
        "other": {"params": [], "weight_decay": weight_decay},
        "vectors": {"params": [], "weight_decay": 0.0},
        "depth": {"params": [], "weight_decay": 0.0, "lr": depth_lr_scale * learning_rate},
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if is_depth_attention(name):
            kind = "depth"
        elif parameter.ndim < 2:
            kind = "vectors"
        else:
            kind = "matrices" if parameter.ndim == 2 and "layers" in name.split(".") else "other"
        groups[kind]["params"].append(parameter)
    return {kind: group for kind, group in groups.items() if group["params"]}


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon on one group and torch's AdamW on the others, as one optimizer with one state.

    Muon's updates are scaled to the size of AdamW's, so that both take the same learning rate.
    """

    def __init__(self, matrices: dict, others: list[dict], lr: float, betas: tuple[float, float]):
        self.muon = torch.optim.Muon([matrices], lr=lr, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=betas)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})
        self._share()

    def _share(self):
        for optimizer, groups in ((self.muon, self.param_groups[:1]), (self.adamw, self.param_groups[1:])):
            optimizer.state, optimizer.param_groups = self.state, groups

    def __setstate__(self, state):  # load_state_dict replaces the groups and the state
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.muon.step(closure)
        self.adamw.step()
        return loss


def new_optimizer(
    model,
    name: str = "adamw",
    learning_rate: float = 1e-3,
    weight_decay: float = 0.1,
    depth_lr_scale: float | None = None,
    betas: tuple[float, float] = (0.9, 0.95),
) -> torch.optim.Optimizer:
    """The optimizer `"adamw"` or `"muon"` for the parameters of `model` that are trained.

    Args:
        depth_lr_scale: depth attention's learning rate as a multiple of `learning_rate`; default: that of a
            model that was converted, or of one from scratch, as `rates_of` has them.

    Raises:
        InputError: Muon can't be had: this torch has none, DeepSpeed trains, or no matrices are trained.
    """
    if depth_lr_scale is None:
        is_converted = getattr(getattr(model, "config", None), "attn_res_sum_scale", False)
        depth_lr_scale = rates_of("continued" if is_converted else "from scratch", learning_rate)["depth_lr_scale"]
    groups = parameter_groups(model, learning_rate, weight_decay, depth_lr_scale)
    if name == "adamw":
        return torch.optim.AdamW(list(groups.values()), lr=learning_rate, betas=betas)
    if uses_deepspeed():
        raise InputError("Muon needs whole matrices, and DeepSpeed cuts them up; use AdamW, or FSDP2 or DDP.")
    if not hasattr(torch.optim, "Muon"):
        raise InputError(f"Muon needs torch 2.9 or newer, installed is {torch.__version__}; use AdamW.")
    if "matrices" not in groups:
        raise InputError("Muon trains the matrices of the layers, and all of them are frozen; use AdamW.")
    matrices = groups.pop("matrices")
    return MuonWithAdamW(matrices, list(groups.values()), learning_rate, betas)
