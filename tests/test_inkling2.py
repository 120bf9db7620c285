# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Inkling 2, whose depth attention is a mode here, against transformers' own class of it."""

import pytest
import torch
from families import perturb, tokens


pytest.importorskip("transformers.models.inkling2", reason="this transformers doesn't have Inkling 2")

from transformers import AutoModelForCausalLM, Inkling2ForCausalLM, Inkling2TextConfig  # noqa: E402

from attnres import AttnResInkling2TextConfig, AttnResInkling2TextForCausalLM  # noqa: E402


# A block of one and a last one, full attention at a block's first layer, within one and in the first layer
SIZES = {
    "vocab_size": 67,
    "unpadded_vocab_size": 61,
    "hidden_size": 40,
    "num_hidden_layers": 7,
    "layer_types": [
        "hybrid",
        "hybrid_sliding",
        "hybrid",
        "hybrid_sliding",
        "hybrid_sliding",
        "hybrid",
        "hybrid_sliding",
    ],
    "n_layers_per_attn_res_block": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 10,
    "sliding_window_size": 4,
    "d_rel": 4,
    "rel_extent": 8,
    "log_scaling_n_floor": 4,
    "n_routed_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "initializer_range": 0.1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
}
# Of float32: transformers computes parts of this family in float32 whatever its dtype is, so that there is no truth in
# float64. Weights moved by half a unit in the last place change the logits by 2e-5 of the largest one.
ROUNDING = 1e-4


def query_names(num_layers: int) -> dict[str, int]:
    """Transformers' names of depth queries, and the row that each one is."""
    rows = {f"model.layers.{layer}.mlp_input.query": 2 * layer + 1 for layer in range(num_layers)}
    rows |= {f"model.layers.{layer}.attention_input.query": 2 * layer for layer in range(1, num_layers)}
    return rows | {"model.final_input.query": 2 * num_layers}


def from_donor(donor) -> AttnResInkling2TextForCausalLM:
    fields = {name: value for name, value in donor.config.to_dict().items() if name != "model_type"}
    model = AttnResInkling2TextForCausalLM(AttnResInkling2TextConfig(**fields)).eval()
    state = donor.state_dict()
    query = torch.zeros_like(model.model.depth_attention.query)
    for name, row in query_names(donor.config.num_hidden_layers).items():
        queries = state.pop(name).view(-1, query.shape[-1])
        query[row, : len(queries)] = queries
    model.load_state_dict(state | {"model.depth_attention.query": query})
    return model


@pytest.fixture
def pair() -> list[torch.nn.Module]:
    torch.manual_seed(0)
    donor = perturb(Inkling2ForCausalLM(Inkling2TextConfig(**SIZES)))
    with torch.no_grad():
        for name in query_names(7):  # large enough for weights of all sizes
            donor.get_parameter(name).mul_(30)
    return [donor, from_donor(donor)]


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return (found - expected).abs().max() < ROUNDING * expected.abs().max()


def test_logits(pair):
    """Those of transformers' own class, padded too."""
    ids = tokens(3, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for inputs in ({}, {"attention_mask": mask}):
        expected, found = (model(ids, **inputs).logits for model in pair)
        assert found.shape == (3, 9, 61)
        assert close(found[mask.bool()], expected[mask.bool()])


def test_each_query_counts(pair):
    """The control: with any row of the queries moved to another place, the logits are far off."""
    donor, model = pair
    ids = tokens(2, 7)
    expected, query = donor(ids).logits, model.model.depth_attention.query
    with torch.no_grad():
        for row in (3, 4, 14):
            kept = query[row].clone()
            for axis in {-1, 0 if row == 4 else -1}:  # of three queries each has its place
                query[row] = kept.roll(1, dims=axis)
                difference = (model(ids).logits - expected).abs().max()
                assert difference > 20 * ROUNDING * expected.abs().max()
            query[row] = kept


def test_gradients(pair):
    """Of all parameters, also of the three queries of a read."""
    ids = tokens(2, 9)
    for model in pair:
        model.train()(ids, labels=ids.clamp(max=60)).loss.backward()
    donor, model = pair
    found, rows = dict(model.named_parameters()), query_names(7)
    for name, parameter in donor.named_parameters():
        gradient = found.pop(name).grad if name not in rows else model.model.depth_attention.query.grad[rows[name]]
        expected = parameter.grad
        if name in rows:
            gradient = gradient[: expected.view(-1, 40).shape[0]].view_as(expected)
        # of an expert without tokens nothing, and of a small sum of large numbers their rounding
        assert (gradient - expected).abs().max() <= 2 * ROUNDING * expected.abs().max() + 1e-6, name
    assert list(found) == ["model.depth_attention.query"]


def test_generation(pair):
    """The same greedy tokens, left-padded, with states of the convolutions in the cache as without one."""
    ids = tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask}
    expected = pair[1].generate(ids, use_cache=False, **options)
    for model in pair:
        assert torch.equal(model.generate(ids, **options), expected)


def test_hidden_states_and_weights(pair):
    """One entry per layer; a read of several queries shows the mean of their weights."""
    _, model = pair
    outputs = model(tokens(2, 5), output_hidden_states=True, output_depth_attentions=True)
    assert [tuple(states.shape) for states in outputs.hidden_states] == [(2, 5, 40)] * 8
    for row, weights in enumerate(outputs.depth_attentions):
        assert weights.shape == (2, model.config.num_depth_sources(row), 5)
        assert torch.allclose(weights.sum(1), torch.ones(2, 5))


def test_save_and_load(pair, tmp_path):
    _, model = pair
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    weights = loaded.state_dict()
    assert list(weights) == list(model.state_dict())
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    assert close(loaded(tokens(1, 5)).logits, model(tokens(1, 5)).logits)


@pytest.mark.parametrize("mode", ["block", "full_delta", "mhc"])
def test_other_modes(mode):
    """One read is the input of queries, keys and values then."""
    config = AttnResInkling2TextConfig(**SIZES, attn_res_mode=mode)
    model = perturb(AttnResInkling2TextForCausalLM(config))
    ids = tokens(2, 7)
    past = model(ids[:, :4], use_cache=True).past_key_values
    assert close(model(ids[:, 4:], past_key_values=past).logits, model(ids).logits[:, 4:])
    model.train()(ids, labels=ids.clamp(max=60)).loss.backward()
    assert all(parameter.grad.any() for parameter in model.model.depth_attention.parameters())


def test_defaults():
    config = AttnResInkling2TextConfig(num_hidden_layers=12)
    assert (config.attn_res_mode, config.attn_res_block_size, config.attn_res_norm_eps) == ("block_inkling2", 6, 1e-6)
    assert [row for row in range(config.num_depth_reads) if config.num_depth_queries(row) == 3] == [10, 22]


def test_fewer_layers(tmp_path):
    """The shape of the queries doesn't depend on which layers there are."""
    kinds = ["hybrid" if layer == 3 else "hybrid_sliding" for layer in range(4)]
    config = AttnResInkling2TextConfig(**{**SIZES, "num_hidden_layers": 4, "layer_types": kinds})
    perturb(AttnResInkling2TextForCausalLM(config)).save_pretrained(tmp_path)
    fewer = AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=2, layer_types=kinds[:2])
    fewer.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert close(again(tokens(1, 5)).logits, fewer(tokens(1, 5)).logits)
