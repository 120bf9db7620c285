# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""All ways to mix depth: each against formulas of its own, against a donor, and in what users do to a model."""

import copy

import pytest
import torch
from attnres_convert.verification import Float64
from behaviours import assert_close, greedy_without_cache, loss_and_gradients
from depth_references import reference_reads
from families import config_class, perturb, relative_error, tiny_config, tiny_donor, tokens
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as deepseek_v4

from attnres import AttnResForCausalLM
from depth_attention_attnres import DepthPlace
from depth_mixers_attnres import DEPTH_MIXERS, HyperConnections, NormedValues, manifold_connections


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
        layer.transform = lambda normed, row=row, **kwargs: sublayers(row + 1, normed)
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


@pytest.mark.parametrize("num_queries", [1, 3])
def test_normed_values_of_transformers(num_queries):
    """Inkling 2's reads are those of transformers, also of several queries."""
    inkling2 = pytest.importorskip("transformers.models.inkling2.modeling_inkling2")
    theirs = inkling2.Inkling2BlockAttentionResidual(inkling2.Inkling2TextConfig(hidden_size=12), num_queries)
    generator = torch.Generator().manual_seed(8)
    nn.init.normal_(theirs.query, std=5.0, generator=generator)
    *closed, open_source = sources = [size * torch.randn(2, 5, 12, generator=generator) for size in (1, 20, 3)]
    mixes, weights = NormedValues.all_reads(tuple(sources), theirs.query.view(num_queries, 12), theirs.norm.eps)
    for found, expected in zip(mixes, theirs(torch.stack(closed, dim=-2), open_source), strict=True):
        assert_close(found, expected)
    assert_close(weights.sum(1), torch.ones(2, 5))


# --- Models


def from_donor(donor, mode: str):
    """The model of the mode that has the donor's tensors, new depth attention, and reads that are scaled."""
    config = config_class("llama")(
        **{**donor.config.to_dict(), "model_type": "attnres", **FIELDS},
        attn_res_mode=mode,
        attn_res_sum_scale=True,
    )
    model = AutoModelForCausalLM.from_config(config)
    missing, unexpected = model.load_state_dict(donor.state_dict(), strict=False)
    assert missing and all(name.startswith("model.depth_attention.") for name in missing) and not unexpected
    return model.eval()


@MODES
@torch.no_grad()
def test_a_donor_is_where_modes_begin(mode):
    """With massive activations too, as long as the idle parameters are as at first, and no longer; unless a reason is
    given why a mode can't compute what a donor computes, and then it doesn't."""
    donor, mixer_class, input_ids = tiny_donor(), DEPTH_MIXERS[mode], tokens(2, 17)
    model, expected = from_donor(donor, mode), donor(input_ids).logits
    error = relative_error(model(input_ids).logits, expected)
    if mixer_class.why_no_donor(model.config) is not None:
        assert error > 1e-2
        return
    assert error <= 3e-6  # the bound of conversion
    parameters = dict(model.model.depth_attention.named_parameters())
    idle = {name: parameters.pop(name) for name in mixer_class.idle or list(parameters)}
    for are_idle, moved in ((True, parameters), (False, idle)):
        for parameter in moved.values():
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
        assert (relative_error(model(input_ids).logits, expected) <= 3e-6) == are_idle


@MODES
def test_from_there_they_learn(mode):
    """A gradient where modes begin is more than what an epsilon lets through: they aren't stuck where all that they
    could learn is a factor of a read, which the norm after it undoes."""
    model = from_donor(tiny_donor(rms_norm_eps=1e-12), mode).double().train()
    _, gradients = loss_and_gradients(model, tokens(2, 17))
    assert max(gradient.norm() for name, gradient in gradients.items() if "depth_attention" in name) > 1e-3


def test_a_window_of_all_sources_computes_what_a_donor_computes():
    config = config_of("full_window", attn_res_window=10)
    assert DEPTH_MIXERS["full_window"].why_no_donor(config) is None
    config.attn_res_window = 9
    assert "attn_res_window = 10 leaves out none" in DEPTH_MIXERS["full_window"].why_no_donor(config)


@MODES
def test_gradients_and_checkpointing(mode):
    """Each parameter has a gradient that isn't zero, in all rows, and the same with gradient checkpointing, in both
    ways."""
    model = model_of(mode)
    outputs, gradients = loss_and_gradients(model, tokens())
    assert outputs.loss.isfinite()
    for name, gradient in gradients.items():
        assert gradient.isfinite().all() and gradient.abs().max() > 0, name
        if "depth_attention" in name and len(gradient) == model.config.num_depth_reads:
            is_idle = gradient.flatten(1).abs().amax(1) == 0
            single = [0] if DEPTH_MIXERS[mode].sums_to_one else []  # where there is one source, there is no choice
            closed = (
                [0, 4, 8] if name.endswith(("connections.weight", "connections.scale")) else []
            )  # where streams begin, as zeros
            assert set(is_idle.nonzero().flatten().tolist()) <= {*single, *closed}, name
    for use_reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        again, others = loss_and_gradients(model, tokens())
        assert_close(again.loss, outputs.loss)
        for name, gradient in gradients.items():
            assert_close(others[name], gradient, 1e-4)  # queries far from zero amplify roundings


@MODES
@torch.no_grad()
def test_outputs(mode):
    """Weights of all reads, hidden states, and each sequence of a batch as if it were alone."""
    model, input_ids = model_of(mode), tokens()
    outputs = model(input_ids, output_depth_attentions=True, output_hidden_states=True)
    assert torch.equal(outputs.logits, model(input_ids).logits)
    for row, weights in enumerate(outputs.depth_attentions):
        assert weights.shape == (3, model.config.num_depth_sources(row), 7) and weights.dtype == torch.float32
        if DEPTH_MIXERS[mode].sums_to_one:
            assert_close(weights.sum(1), torch.ones(3, 7))
    by_token = outputs.depth_attentions[-1].std(dim=(0, 2)).max() > 1e-4
    assert by_token == DEPTH_MIXERS[mode].depends_on_input
    assert len(outputs.hidden_states) == 6 and outputs.hidden_states[2].shape == (3, 7, 40)
    for index in range(3):
        assert_close(model(input_ids[index : index + 1]).logits, outputs.logits[index : index + 1], 1e-4)


@MODES
@torch.no_grad()
def test_decoding(mode):
    """With a cache and without, and with a padded prompt beside a longer one, a text goes on in the same way."""
    model, prompt = model_of(mode), tokens(2, 6)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    generated = model.generate(prompt, **options)
    assert torch.equal(generated, greedy_without_cache(model, prompt, 5))
    padded = torch.cat([torch.zeros(2, 3, dtype=prompt.dtype), prompt], dim=1)
    again = model.generate(padded, attention_mask=(padded != 0).long(), **options)
    assert torch.equal(again[:, 3:], generated)


@MODES
@torch.no_grad()
def test_saved_and_rounded(mode, tmp_path):
    """A saved model computes the same; in bfloat16 depth attention stays as it is, and the rest is near."""
    model, input_ids = model_of(mode), tokens()
    expected = model(input_ids).logits
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    torch.testing.assert_close(loaded(input_ids).logits, expected)
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for found in (rounded, loaded.to(torch.bfloat16)):
        assert found.dtype == torch.bfloat16
        for name, parameter in found.model.depth_attention.named_parameters():
            assert torch.equal(parameter, model.model.depth_attention.get_parameter(name)), name
        logits = found(input_ids).logits
        assert logits.dtype == torch.bfloat16
        assert (logits - expected).float().norm() <= 0.2 * expected.norm()  # 8 bits, amplified by far queries


@MODES
@torch.no_grad()
def test_fewer_layers(mode, tmp_path):
    """Loading the first layers is cutting the others off, and layers keep what they have learned where some between
    them go."""
    model, input_ids = model_of(mode), tokens()
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", num_hidden_layers=3)
    cut = copy.deepcopy(model)
    cut.model.layers = nn.ModuleList(list(cut.model.layers)[:3])
    cut.config.num_hidden_layers = 3
    assert torch.equal(cut(input_ids).logits, loaded(input_ids).logits)
    model.model.layers = nn.ModuleList([model.model.layers[index] for index in (0, 3, 4)])
    model.config.num_hidden_layers = 3
    expected = model(input_ids).logits
    model.save_pretrained(tmp_path / "middle")
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "middle")(input_ids).logits, expected)


@pytest.mark.parametrize("mode", ["block_delta", "full_low_rank", "block_mhc"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gemma2"])
def test_other_families(mode, family):
    """Experts, and norms behind sublayers."""
    model = model_of(mode, family)
    outputs, gradients = loss_and_gradients(model, tokens())
    assert outputs.loss.isfinite() and all(gradient.abs().max() > 0 for gradient in gradients.values())
    model.eval()
    expected = model(tokens(), output_depth_attentions=True)
    assert_close(model(tokens()).logits, expected.logits, 1e-4)
    assert len(expected.depth_attentions) == 11


@pytest.mark.parametrize("mode", ["block_low_rank", "mhc"])
@torch.no_grad()
def test_compile(mode):
    """Without breaks in the graph; by the backend that takes no minute."""
    torch.compiler.reset()
    model = model_of(mode, num_hidden_layers=2, attn_res_block_size=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(tokens()).logits, model(tokens()).logits, 1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attn_res_mode": "blocks"}, "attn_res_mode is 'blocks'; it must be one of block, full"),
        ({"attn_res_mode": "full_heads", "attn_res_num_heads": 3}, "must divide hidden_size = 40"),
        ({"attn_res_mode": "full_window", "attn_res_window": 0}, "attn_res_window is 0; it must be at least 1"),
        ({"attn_res_mode": "mhc", "attn_res_num_streams": 1}, "attn_res_num_streams is 1; it must be at least 2"),
        ({"attn_res_mode": "full_low_rank", "attn_res_rank": 0}, "attn_res_rank is 0; it must be at least 1"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)
