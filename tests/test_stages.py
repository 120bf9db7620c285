# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Stages of a pipeline, which hand on sources, compute together what the whole model does."""

import copy
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from attnres_convert.verification import Float64
from families import FAMILIES, relative_error, tiny_model, tokens
from torch import nn
from transformers import AutoModel

from attnres import ALL_DEPTH_ATTENTION_FUNCTIONS


class Missing(nn.Identity):
    """What serving engines put where a layer is on another machine."""


def stages_of(model: nn.Module, bounds: list[int]) -> list[nn.Module]:
    stages = []
    for first, end in pairwise(bounds):
        stage = copy.deepcopy(model)
        for i in range(len(stage.layers)):
            if not first <= i < end:
                stage.layers[i] = Missing()
        if end < bounds[-1]:
            stage.norm = Missing()
        stage.stage = slice(first, None if end == bounds[-1] else end)
        stages.append(stage)
    return stages


def run(stages: list[nn.Module], ids: torch.Tensor) -> torch.Tensor:
    outputs = stages[0](ids, use_cache=False).last_hidden_state
    for stage in stages[1:]:
        outputs = stage(inputs_embeds=outputs, use_cache=False).last_hidden_state
    return outputs


def model_of(family: str, **options) -> nn.Module:
    model = tiny_model(family, AutoModel, attn_res_block_size=2, **options)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the others have no float64
    return model


@pytest.mark.parametrize("bounds", [[0, 2, 5], [0, 1, 3, 5], [0, 4, 5]], ids=str)
@pytest.mark.parametrize("mode", ["block", "full", "denseformer"])
@pytest.mark.parametrize("implementation", ["eager", "two_phase", "cpp"])
@torch.no_grad()
def test_stages(implementation, mode, bounds):
    """Also where a stage begins in the middle of a block; for one token, a few and many."""
    if implementation not in ALL_DEPTH_ATTENTION_FUNCTIONS:
        pytest.skip("no compiler")
    model = model_of("llama", attn_res_mode=mode, attn_res_implementation=implementation)
    if implementation == "cpp":
        number, bound = nullcontext(), 1e-5
    else:
        number, bound = Float64(), 1e-11
        model.double()
    with number:
        for shape in [(1, 1), (3, 7), (2, 40)]:
            ids = tokens(*shape)
            expected = model(ids, use_cache=False).last_hidden_state
            assert relative_error(run(stages_of(model, bounds), ids), expected) < bound


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_families(family):
    model, ids = model_of(family).double(), tokens(2, 40)
    with Float64():
        expected = model(ids, use_cache=False).last_hidden_state
        assert relative_error(run(stages_of(model, [0, 3, 5]), ids), expected) < 1e-11


@pytest.mark.parametrize("mode", ["block", "full"])
def test_gradients(mode):
    """Each stage has the gradients of its own rows, and the sum over stages is that of the whole model."""
    model, ids = model_of("llama", attn_res_mode=mode).double(), tokens(2, 40)
    stages = stages_of(model, [0, 3, 5])
    with Float64():
        for whole in ([model], stages):
            run(whole, ids).square().sum().backward()
    for name, parameter in model.named_parameters():
        parts = [dict(stage.named_parameters()).get(name) for stage in stages]
        found = sum(part.grad for part in parts if part is not None and part.grad is not None)
        assert relative_error(found, parameter.grad) < 1e-10, name
