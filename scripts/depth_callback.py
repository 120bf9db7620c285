# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""What happens over depth while a model trains, for any `Trainer`:

    Trainer(..., callbacks=[DepthCallback("outputs/run", probe={"input_ids": held_out[:1]})])

Every `every` steps one short forward of the same text, the probe, shows each sublayer and each read, so that steps and
models are comparable and nothing of it touches training. Works on donors too, whose reads are the residual stream.
"""

import re
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn
from training_optim import uses_deepspeed
from training_run import JsonLines
from transformers import TrainerCallback


DEPTH_FILE = "depth.jsonl"


def decoder(model: nn.Module) -> nn.Module | None:
    """The module that holds the layers, in a head, an adapter or a wrapper; None if there is none."""
    modules = (module for module in model.modules() if isinstance(getattr(module, "layers", None), nn.ModuleList))
    return next(modules, None)


def check_can_be_watched(model: nn.Module):
    """Raises ValueError if [`look`] doesn't know where the sublayers of such a model begin."""
    base, norms = decoder(model), ("input_layernorm", "post_attention_layernorm")
    is_donor = hasattr(base, "norm") and all(hasattr(layer, norm) for layer in base.layers for norm in norms)
    if not is_donor and not hasattr(base, "depth_attention"):
        raise ValueError(
            f"{type(model).__name__} can't be watched over depth; AttnRes models can, and those whose layers have "
            f"{' and '.join(norms)}, such as Llama, Qwen and Gemma."
        )


def rms(tensor: torch.Tensor) -> float:
    return tensor.float().pow(2).mean().sqrt().item()


@contextmanager
def watched(module: nn.Module, seen: Callable):
    """Calls `seen(inputs, output)` after each forward of `module`."""
    handle = module.register_forward_hook(lambda _, inputs, kwargs, output: seen(inputs, output), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def watched_method(module: nn.Module, name: str, seen: Callable):
    """Calls `seen(output)` after each call of a method."""
    method = getattr(module, name)

    def watching(*args, **kwargs):
        output = method(*args, **kwargs)
        seen(output)
        return output

    setattr(module, name, watching)
    try:
        yield
    finally:
        delattr(module, name)


def attnres_depth(model: nn.Module, layers: nn.ModuleList, forward: Callable) -> dict[str, list[float]]:
    outputs, reads, weights = [], [], []

    def seen_read(_, output):
        reads.append(rms(output[0]))
        if output[1] is not None:
            weights.append(output[1].float())

    with ExitStack() as stack:
        for layer in layers:
            for read in (layer.attention_read, layer.mlp_read):
                stack.enter_context(watched(read, seen_read))
            for method in ("attend", "transform"):
                stack.enter_context(watched_method(layer, method, lambda output: outputs.append(rms(output))))
        stack.enter_context(watched(decoder(model).output_read, seen_read))
        forward()
    seen = {"output_rms": outputs, "read_rms": reads}
    if weights:
        seen["largest_weight"] = [read.abs().amax(1).mean().item() for read in weights]
    queries = [value for name, value in model.named_parameters() if re.search(r"\bdepth_attention\b.*\.query$", name)]
    if queries:  # otherwise the weights are no distribution
        seen["entropy"] = [torch.special.entr(read).sum(1).mean().item() for read in weights]
        query = queries[-1].detach()  # with adapters, the trained copy comes after the original
        query = query.full_tensor() if hasattr(query, "full_tensor") else query
        seen["query_norm"] = query.float().norm(dim=1).tolist()
    return seen


def donor_depth(layers: nn.ModuleList, norm: nn.Module, forward: Callable) -> dict[str, list[float]]:
    stream = []
    with ExitStack() as stack:
        for layer in layers:
            before_mlp = getattr(layer, "pre_feedforward_layernorm", None) or layer.post_attention_layernorm
            for module in (layer.input_layernorm, before_mlp):
                stack.enter_context(watched(module, lambda inputs, _: stream.append(inputs[0].float())))
        stack.enter_context(watched(norm, lambda inputs, _: stream.append(inputs[0].float())))
        forward()
    # what a sublayer adds, whatever norms and multipliers its family has around it
    outputs = [rms(after - before) for before, after in zip(stream, stream[1:])]
    return {"output_rms": outputs, "read_rms": [rms(hidden_states) for hidden_states in stream]}


@torch.no_grad()
def look(model: nn.Module, probe: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """One forward of `probe`, and what it shows.

    Returns:
        `output_rms`: of what each of the 2L sublayers writes. `read_rms`: of what each of the 2L+1 reads returns. For
        AttnRes models also, for each read, `largest_weight`, `entropy` (nats), both means over tokens, and
        `query_norm`; denseformer mode, whose weights are no distribution, has only the first of the three.
    """
    base = decoder(model)
    device = next(model.parameters()).device
    probe = {name: tensor.to(device) for name, tensor in probe.items()}
    forward = partial(model, **probe, use_cache=False)
    was_training = model.training
    model.eval()
    try:
        if hasattr(base, "depth_attention"):
            return attnres_depth(model, base.layers, forward)
        return donor_depth(base.layers, base.norm, forward)
    finally:
        model.train(was_training)
        for module in model.modules():
            if hasattr(module, "reshard"):  # FSDP2 expects a backward, and would compute the next step with old weights
                module.reshard()


def gradient_norms(layers: nn.ModuleList) -> list[float | None]:
    """Of each layer's parameters together; None for a layer without gradients."""
    norms = []
    for layer in layers:
        gradients = [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else None
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        norms.append(None if norm is None else norm.item())
    return norms


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
