# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""What a model does over depth, seen in a forward: outputs of sublayers, reads and their weights, gradients."""

import re
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import torch
from torch import nn

from depth_mixers_attnres import DEPTH_MIXERS


def decoder(model: nn.Module) -> nn.Module | None:
    """The module that holds the layers, in a head, an adapter or a wrapper; None if there is none."""
    modules = (module for module in model.modules() if isinstance(getattr(module, "layers", None), nn.ModuleList))
    return next(modules, None)


def check_can_be_watched(model: nn.Module):
    """Raises ValueError if [`look`] doesn't know where the sublayers of such a model begin."""
    base, norms = decoder(model), ("input_layernorm", "post_attention_layernorm")
    if base is not None and any(isinstance(layer, nn.Identity) for layer in base.layers):
        raise ValueError("processes of a pipeline have some of the layers each, and can't be watched over depth")
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


def sum_starts(config) -> list[int] | None:
    """The sublayers whose outputs begin a new sum: in a residual stream the first one, elsewhere those that open a
    source. None where outputs go into several streams."""
    if not hasattr(config, "attn_res_mode"):
        return [0]
    if config.depth_sources.has_streams:
        return None
    sublayers = range(config.num_depth_reads - 1)
    return [sublayer for sublayer in sublayers if not config.extends_open_depth_source(sublayer)]


def attnres_depth(model: nn.Module, layers: nn.ModuleList, forward: Callable) -> dict[str, list[float]]:
    outputs, sums, reads, weights = [], [], [], []
    starts = sum_starts(decoder(model).config)
    open_sum = None

    def seen_output(output):
        nonlocal open_sum
        if starts is not None:
            is_start = len(outputs) in starts
            open_sum = output.float() if is_start else open_sum.to(output.device) + output.float()
            sums.append(rms(open_sum))
        outputs.append(rms(output))

    def seen_read(_, output):
        reads.append(rms(output[0]))
        if output[1] is not None:
            weights.append(output[1].float())

    with ExitStack() as stack:
        for layer in layers:
            for read in (layer.attention_read, layer.mlp_read):
                stack.enter_context(watched(read, seen_read))
            for method in ("attend", "transform"):
                stack.enter_context(watched_method(layer, method, seen_output))
        stack.enter_context(watched(decoder(model).output_read, seen_read))
        forward()
    seen = {"output_rms": outputs, "read_rms": reads}
    if sums:
        seen["sum_rms"] = sums
    if weights:
        seen["largest_weight"] = [read.abs().amax(1).mean().item() for read in weights]
        if DEPTH_MIXERS[decoder(model).config.attn_res_mode].sums_to_one:
            seen["entropy"] = [torch.special.entr(read).sum(1).mean().item() for read in weights]
    queries = [value for name, value in model.named_parameters() if re.search(r"\bdepth_attention\b.*\.query$", name)]
    if queries:
        query = queries[-1].detach()  # with adapters, the trained copy comes after the original
        query = query.full_tensor() if hasattr(query, "full_tensor") else query
        seen["query_norm"] = query.float().flatten(1).norm(dim=1).tolist()
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
    reads = [rms(hidden_states) for hidden_states in stream]
    return {"output_rms": outputs, "read_rms": reads, "sum_rms": reads[1:]}


@torch.no_grad()
def look(model: nn.Module, probe: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """One forward of `probe`, and what it shows.

    Returns:
        `output_rms`: of what each of the 2L sublayers writes. `sum_rms`: of all that has been summed so far where that
        went: a donor's residual stream, the open block, which begins with the block's first output, or, in modes that
        sum nothing, the output alone; not in modes with several streams. `read_rms`: of what each of the 2L+1 reads
        returns. For AttnRes models also, for each read, `largest_weight` and `entropy` (nats), both means over tokens,
        and `query_norm`; without entropy in modes whose weights are no distribution, and without norms where there are
        no queries.
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


def norm_of_all(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The norm of all together, of which some may be whole and others cut up, over the same processes or others."""
    by_mesh = defaultdict(list)
    for tensor in tensors:
        by_mesh[getattr(tensor, "device_mesh", None)].append(tensor)
    norms = [torch.nn.utils.get_total_norm(group) for group in by_mesh.values()]
    norms = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    return norms[0] if len(norms) == 1 else torch.nn.utils.get_total_norm(norms)


def gradient_norms(layers: nn.ModuleList) -> list[float | None]:
    """Of each layer's parameters together; None for a layer without gradients."""
    norms = []
    for layer in layers:
        gradients = [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]
        norms.append(norm_of_all(gradients).item() if gradients else None)
    return norms


@torch.no_grad()
def token_weights(model, batch: dict[str, torch.Tensor]) -> list[np.ndarray]:
    """The weights of each read for each token, `(num_sources, batch * seq)`."""
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "position_ids") if name in batch}
    reads = model.eval()(**inputs, output_depth_attentions=True, use_cache=False).depth_attentions
    return [read.float().transpose(0, 1).flatten(1).cpu().numpy() for read in reads]


def mean_weights(model, batches: list[dict[str, torch.Tensor]]) -> list[np.ndarray]:
    """The weights of each read, `(num_sources,)`, averaged over the tokens of batches of one size."""
    by_batch = [[read.mean(1) for read in token_weights(model, batch)] for batch in batches]
    return [np.mean(reads, axis=0) for reads in zip(*by_batch)]


def depth_dynamics(model, batches: list[dict[str, torch.Tensor]]) -> dict[str, list[float]]:
    """What a donor or AttnRes model does over depth on some text, given as batches of one size.

    Returns:
        `output_rms` and `sum_rms` of each of the 2L sublayers, `read_rms` of each of the 2L+1 reads (the residual
        stream of a donor), as [`look`] has them; `gradient_norm` of the parameters of each of the L layers, for the
        mean loss; `sum_starts`, the sublayers with which sums begin. Modes with several streams have no sums.
    """
    squares = defaultdict(list)
    layers = decoder(model).layers
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in layers.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    model.zero_grad()
    for batch in batches:
        batch = {name: value.to(model.device) for name, value in batch.items() if name != "documents"}
        seen = look(model, {name: value for name, value in batch.items() if name != "labels"})
        for name in ("output_rms", "sum_rms", "read_rms"):
            if name in seen:
                squares[name].append(np.square(seen[name]))
        (model(**batch, use_cache=False).loss / len(batches)).backward()
    dynamics = {name: np.sqrt(np.mean(values, axis=0)).tolist() for name, values in squares.items()}
    dynamics["gradient_norm"] = gradient_norms(layers)
    if "sum_rms" in dynamics:
        dynamics["sum_starts"] = sum_starts(decoder(model).config)
    model.zero_grad()
    for parameter, requires_grad in trained.items():
        parameter.requires_grad_(requires_grad)
    return dynamics
