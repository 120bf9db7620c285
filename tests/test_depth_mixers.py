# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""All ways to mix depth: each against formulas of its own, against a donor, and in what users do to a model."""

import copy

import pytest
import torch
from attnres_convert.verification import Float64
from behaviours import assert_close, greedy_without_cache, loss_and_gradients
from depth_references import reference_reads
from families import attn_res_from_donor, config_class, perturb, relative_error, tiny_config, tiny_donor, tokens
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as deepseek_v4

from attnres import AttnResForCausalLM
from depth_attention_attnres import DepthPlace
from depth_mixers_attnres import DEPTH_MIXERS, HyperConnections, manifold_connections


# hidden size 40: heads of 10 channels; a window that leaves sources out
FIELDS = {"attn_res_block_size": 2, "attn_res_num_heads": 4, "attn_res_rank": 6, "attn_res_window": 3}
FIELDS |= {"attn_res_num_streams": 3}
MODES = pytest.mark.parametrize("mode", DEPTH_MIXERS)
FLOAT64 = 1e-11  # thousands of roundings of 2^-53


def config_of(mode: str, family: str = "llama", **kwargs):
    return tiny_config(family, attn_res_mode=mode, **{**FIELDS, **kwargs})


def model_of(mode: str, family: str = "llama", **kwargs):
    """All tensors are moved away from their initial values."""
    torch.manual_seed(0)
    return perturb(AutoModelForCausalLM.from_config(config_of(mode, family, **kwargs)), std=0.2)


# --- Formulas


class Sublayers(nn.Module):
    """Stand for attention and MLPs: what they put out is of sizes that differ by 100, and depends on one token."""

    def __init__(self, number: int, hidden: int):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(number, hidden, hidden, generator=generator, dtype=torch.float64))
        self.sizes = [0.1, 3.0, 0.5, 10.0]

    def forward(self, row: int, normed: torch.Tensor) -> torch.Tensor:
        return self.sizes[row % 4] * torch.tanh(normed @ self.weight[row])


def rms_norm(vector: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    return gain * vector / torch.sqrt(vector.square().mean(-1, keepdim=True) + eps)


@pytest.mark.parametrize("is_scaled", [False, True], ids=["", "scaled"])
@MODES
def test_formulas(mode, is_scaled):
    """What a model reads and weighs, and all gradients, are those of a token alone by the formulas of the paper."""
    config = config_of(mode, hidden_size=12, num_hidden_layers=3, attn_res_sum_scale=is_scaled, attn_res_norm_eps=0.05)
    config._attn_res_implementation = "eager"
    model = perturb(AttnResForCausalLM(config), std=0.4).double().model
    state = dict(model.depth_attention.named_parameters())
    sublayers, reads = Sublayers(7, 12), [None] * 7
    embedding = nn.Parameter(3 * torch.randn(2, 2, 12, generator=torch.Generator().manual_seed(4)).double())
    gains = []

    def seen(row):
        return lambda module, args, output: reads.__setitem__(row, output[0])

    for index, layer in enumerate(model.layers):
        row = 2 * index
        layer.attend = lambda normed, row=row, **kwargs: sublayers(row, normed)
        layer.transform = lambda normed, row=row: sublayers(row + 1, normed)
        layer.attention_read.register_forward_hook(seen(row))
        layer.mlp_read.register_forward_hook(seen(row + 1))
        gains += [layer.input_layernorm.weight, layer.post_attention_layernorm.weight]
    model.output_read.register_forward_hook(seen(6))
    with Float64():
        outputs = model(inputs_embeds=embedding, output_depth_attentions=True, use_cache=False)

    def sublayer(row, read):
        return sublayers(row, rms_norm(read, gains[row], config.rms_norm_eps)) if row < 6 else torch.zeros(12)

    by_token = [reference_reads(config, state, vector, sublayer) for vector in embedding.flatten(0, 1)]
    expected = [torch.stack([token[row][0] for token in by_token]).view(2, 2, 12) for row in range(7)]
    for row, (read, weights) in enumerate(zip(reads, outputs.depth_attentions, strict=True)):
        assert_close(read, expected[row], FLOAT64)
        assert weights.shape == (2, config.num_depth_sources(row), 2)
        of_tokens = torch.stack([torch.stack(token[row][1]) for token in by_token])  # (tokens, num_sources)
        assert_close(weights, of_tokens.view(2, 2, -1).transpose(1, 2), FLOAT64)
    hidden_states = rms_norm(expected[-1], model.norm.weight, config.rms_norm_eps)
    assert_close(outputs.last_hidden_state, hidden_states, FLOAT64)

    parameters = {**state, "embedding": embedding, "sublayers": sublayers.weight}
    direction = torch.randn(2, 2, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    gradients = [
        torch.autograd.grad((result * direction).sum(), list(parameters.values()))
        for result in (outputs.last_hidden_state, hidden_states)
    ]
    for name, found, wanted in zip(parameters, *gradients):
        assert wanted.abs().max() > 0, name
        assert relative_error(found, wanted) <= 10 * FLOAT64, name  # of gradients that cancel


@MODES
def test_gradcheck(mode):
    """Numeric derivatives of a single read, by what it has learned and by each source, agree with autograd's."""
    config = config_of(mode, hidden_size=4, num_hidden_layers=2, attn_res_rank=2, attn_res_sum_scale=True)
    config._attn_res_implementation = "eager"
    config.attn_res_num_heads, config.attn_res_num_streams, config.attn_res_block_size = 2, 2, 1
    mixer = perturb(DEPTH_MIXERS[mode](config), std=0.5).double()
    implementation, place = mixer.implementation(config), DepthPlace.of(config, 3)  # an open block, behind a closed one
    generator = torch.Generator().manual_seed(6)
    sources = [torch.randn(1, 2, 4, generator=generator).double() for _ in range(config.num_depth_tensors(3))]
    if config.depth_sources.has_streams:  # with an output that is written to them
        sources += [torch.randn(1, 2, 2, generator=generator).double(), torch.ones(1, 2, 4).double()]
    product = mixer()[3].detach()

    def read(product, *sources):
        mixed, weights, normed, _ = implementation.read(place, product, sources, nn.Identity(), None, True)
        return normed, weights

    inputs = [tensor.requires_grad_() for tensor in (product, *sources)]
    assert torch.autograd.gradcheck(read, inputs)


def test_manifold_connections_of_transformers():
    """mHC's connections are those of DeepSeek V4 with the same weights, but for an epsilon that is 0 here."""
    config = deepseek_v4.DeepseekV4Config(hidden_size=12, hc_mult=3, hc_eps=0.0, rms_norm_eps=0.01)
    theirs = deepseek_v4.DeepseekV4HyperConnection(config)
    generator = torch.Generator().manual_seed(7)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.7, generator=generator)
    streams = torch.randn(2, 5, 3, 12, generator=generator)
    learned = torch.cat([theirs.fn.flatten(), theirs.base, theirs.scale])
    post, comb, collapsed = theirs(streams)
    _, written, mixed = manifold_connections(streams, learned, 0.01)
    read, _, _ = HyperConnections(manifold_connections, 3).connect(streams.unbind(2), learned, 0.01)
    for found, expected in ((written, post), (mixed, comb), (read, collapsed)):
        assert_close(found, expected)
