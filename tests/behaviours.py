# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""What every family must do. A test class takes the mixin and a list of families:

@pytest.mark.parametrize("family", ["llama"])
class TestLlama(FamilyBehaviours): ...
"""

import copy
import functools
from typing import NamedTuple

import pytest
import torch
from attnres_convert.verification import Float64
from families import attn_res_from_donor, relative_error, tiny_donor, tiny_model, tokens
from transformers import AutoModelForCausalLM, StaticCache


# mode and block size of a model of 5 layers: the last block is full or shorter, or the only one
MODES = pytest.mark.parametrize("mode, block_size", [("full", None), ("block", 1), ("block", 2), ("block", 5)])
TWO_MODES = pytest.mark.parametrize("mode, block_size", [("full", None), ("block", 2)])

REORDERED = 1e-5  # float32 sums in another order, where little amplifies: 168 roundings of 2^-24
# These models have queries far from zero, whose softmax amplifies: against float64, logits are off by 1e-6 to 2e-5 of
# the largest, gradients by 5e-6 to 3e-4, by family. So bounds are multiples of a model's own error. Each of the two
# results that are compared may be off by four times that: processors differ in the order of sums, and so by chance in
# errors. Results that are wrong are off by 1e-2 and more.
ROOM = 8


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = REORDERED):
    """Equal but for rounding, relative to the largest expected value."""
    assert actual.shape == expected.shape
    assert relative_error(actual, expected) <= tolerance


def in_float64(model):
    """A copy to run under `Float64`."""
    model = copy.deepcopy(model).double()
    if getattr(type(model), "_can_set_experts_implementation", bool)():
        model.set_experts_implementation("eager")  # others have no float64
    return model


@torch.no_grad()
def error_against_float64(model, input_ids: torch.Tensor) -> float:
    """How far rounding takes a model's logits, relative to the largest."""
    with Float64():
        expected = in_float64(model)(input_ids).logits
    return relative_error(model(input_ids).logits, expected)


class Rounding(NamedTuple):
    """How far apart results may be that are sums in another order, relative to the largest."""

    logits: float
    gradients: float


@functools.cache
@torch.enable_grad()
def rounding(family: str = "llama", mode: str = "block", block_size: int | None = None) -> Rounding:
    """That of a tiny model: `ROOM` times its error against itself in float64, the largest over some batches."""
    model = tiny_model(family, attn_res_mode=mode, attn_res_block_size=block_size)
    exact, of_logits, of_gradients = in_float64(model), [], []
    for input_ids in (tokens(3, 9, seed=seed) for seed in range(4)):  # each gives an error by chance
        outputs, gradients = loss_and_gradients(model, input_ids)
        with Float64():
            expected, expected_gradients = loss_and_gradients(exact, input_ids)
        assert expected.loss.dtype == torch.float64
        of_logits.append(relative_error(outputs.logits, expected.logits))
        of_gradients += [relative_error(gradient, expected_gradients[name]) for name, gradient in gradients.items()]
    assert max(of_logits) < 1e-4 and max(of_gradients) < 2e-3  # no mistake, which would widen the bounds
    return Rounding(*(max(REORDERED, ROOM * max(errors)) for errors in (of_logits, of_gradients)))


def greedy_without_cache(model, input_ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    for _ in range(new_tokens):
        next_token = model(input_ids, use_cache=False).logits[:, -1].argmax(-1)
        input_ids = torch.cat([input_ids, next_token[:, None]], dim=1)
    return input_ids


def loss_and_gradients(model, input_ids: torch.Tensor, **kwargs) -> tuple:
    model.train()
    model.zero_grad()
    outputs = model(input_ids, labels=input_ids, **kwargs)
    outputs.loss.backward()
    return outputs, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


class FamilyBehaviours:
    conversion_error = 3e-6  # relative, of the logits in float32

    @MODES
    @torch.no_grad()
    def test_zero_queries_reproduce_the_donor(self, family, mode, block_size):
        """A converted model has the donor's logits, hidden states and greedy continuation."""
        donor = tiny_donor(family)
        model = attn_res_from_donor(donor, mode, block_size)
        input_ids = tokens()
        expected = donor(input_ids, output_hidden_states=True)
        outputs = model(input_ids, output_hidden_states=True)
        assert relative_error(outputs.logits, expected.logits) <= self.conversion_error
        assert len(outputs.hidden_states) == len(expected.hidden_states) == donor.config.num_hidden_layers + 1
        for hidden_states, expected_states in zip(outputs.hidden_states, expected.hidden_states):
            assert relative_error(hidden_states, expected_states) <= self.conversion_error
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        assert torch.equal(model.generate(input_ids, **options), donor.generate(input_ids, **options))

    @MODES
    @torch.no_grad()
    def test_unscaled_or_shifted_conversion_differs(self, family, mode, block_size):
        """The negative control: without the scale, or with one query moved, the logits are not the donor's."""
        donor = tiny_donor(family)
        expected = donor(tokens()).logits
        unscaled = attn_res_from_donor(donor, mode, block_size, attn_res_sum_scale=False)
        assert relative_error(unscaled(tokens()).logits, expected) > 10 * self.conversion_error
        moved = attn_res_from_donor(donor, mode, block_size)
        moved.model.depth_attention.query[-1] = 0.1
        assert relative_error(moved(tokens()).logits, expected) > 10 * self.conversion_error

    @MODES
    @torch.no_grad()
    def test_depth_attentions(self, family, mode, block_size):
        """All 2L + 1 reads return weights over their sources, which sum to 1 and are what the mix was made with."""
        model = tiny_model(family, attn_res_mode=mode, attn_res_block_size=block_size)
        config, input_ids = model.config, tokens()
        outputs = model(input_ids, output_depth_attentions=True)
        assert len(outputs.depth_attentions) == 2 * config.num_hidden_layers + 1
        for row, weights in enumerate(outputs.depth_attentions):
            assert weights.shape == (3, config.num_depth_sources(row), 7)
            assert weights.dtype == torch.float32 and (weights > 0).all()
            assert_close(weights.sum(1), torch.ones(3, 7))
        assert outputs.depth_attentions[-1].std() > 1e-3  # not the uniform weights of zero queries
        assert torch.equal(outputs.logits, model(input_ids).logits)
        assert model(input_ids).depth_attentions is None

        base = model.model(input_ids, output_depth_attentions=True)
        for weights, expected in zip(base.depth_attentions, outputs.depth_attentions, strict=True):
            assert torch.equal(weights, expected)
        as_tuple = model(input_ids, output_depth_attentions=True, return_dict=False)
        assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[-1][-1], outputs.depth_attentions[-1])
        base_as_tuple = model.model(input_ids, output_depth_attentions=True, return_dict=False)
        assert isinstance(base_as_tuple, tuple) and torch.equal(base_as_tuple[-1][-1], outputs.depth_attentions[-1])
        config.output_depth_attentions = True
        assert torch.equal(model(input_ids).depth_attentions[-1], outputs.depth_attentions[-1])
        assert model(input_ids, output_depth_attentions=False).depth_attentions is None

    @TWO_MODES
    @torch.no_grad()
    def test_hidden_states_are_what_the_layers_read(self, family, mode, block_size):
        """Entry i enters the pre-norm of layer i, entry 0 is the embedding, the last the normalised output."""
        model = tiny_model(family, attn_res_mode=mode, attn_res_block_size=block_size)
        read = []
        for layer in model.model.layers:
            layer.input_layernorm.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        outputs = model(tokens(), output_hidden_states=True)
        assert len(outputs.hidden_states) == model.config.num_hidden_layers + 1
        for hidden_states, expected in zip(outputs.hidden_states[:-1], read, strict=True):
            assert torch.equal(hidden_states, expected)
        assert torch.equal(outputs.hidden_states[-1], model.model(tokens()).last_hidden_state)
        assert not torch.equal(read[1], read[0])

    @TWO_MODES
    @torch.no_grad()
    def test_cached_decoding_equals_uncached(self, family, mode, block_size):
        """Token by token, in chunks, and with a static cache the logits are those of the whole sequence."""
        model = tiny_model(family, attn_res_mode=mode, attn_res_block_size=block_size)
        input_ids = tokens(2, 9)
        expected = model(input_ids, use_cache=False).logits
        for chunks in ([1] * 9, [4, 1, 1, 1, 1, 1], [5, 4]):
            cache, logits = None, []
            for chunk in input_ids.split(chunks, dim=1):
                outputs = model(chunk, past_key_values=cache, use_cache=True)
                cache = outputs.past_key_values
                logits.append(outputs.logits)
            assert_close(torch.cat(logits, dim=1), expected, rounding(family, mode, block_size).logits)
        assert cache.get_seq_length() == 9

    @TWO_MODES
    @torch.no_grad()
    def test_generate_equals_a_loop_without_cache(self, family, mode, block_size):
        """Greedy generation, with the dynamic and the static cache and with a chunked prompt."""
        model = tiny_model(family, attn_res_mode=mode, attn_res_block_size=block_size)
        input_ids = tokens(2, 6)
        expected = greedy_without_cache(model, input_ids, 6)
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        assert torch.equal(model.generate(input_ids, **options), expected)
        assert torch.equal(model.generate(input_ids, use_cache=False, **options), expected)
        assert torch.equal(model.generate(input_ids, prefill_chunk_size=4, **options), expected)
        if model._can_compile_fullgraph:
            cache = StaticCache(config=model.config, max_cache_len=16)
            generated = model.generate(input_ids, past_key_values=cache, disable_compile=True, **options)
            assert torch.equal(generated, expected)

    @TWO_MODES
    @torch.no_grad()
    def test_left_padding_does_not_matter(self, family, mode, block_size):
        """A padded row has the logits and the continuation it has alone."""
        model = tiny_model(family, attn_res_mode=mode, attn_res_block_size=block_size)
        prompt = tokens(1, 5)
        padded = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.long), prompt], dim=1), tokens(1, 8, seed=3)])
        attention_mask = torch.ones_like(padded)
        attention_mask[0, :3] = 0
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(padded, attention_mask=attention_mask, position_ids=position_ids).logits
        assert_close(logits[:1, 3:], model(prompt).logits, rounding(family, mode, block_size).logits)
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        generated = model.generate(padded, attention_mask=attention_mask, **options)
        assert torch.equal(generated[:1, 3:], model.generate(prompt, **options))

    @TWO_MODES
    @torch.no_grad()
    def test_batch_of_two_is_two_batches(self, family, mode, block_size):
        model = tiny_model(family, attn_res_mode=mode, attn_res_block_size=block_size)
        input_ids = tokens(2, 7)
        both, tolerance = model(input_ids, output_depth_attentions=True), rounding(family, mode, block_size).logits
        for row in range(2):
            alone = model(input_ids[row : row + 1], output_depth_attentions=True)
            assert_close(both.logits[row : row + 1], alone.logits, tolerance)
            weights = both.depth_attentions[-1][row : row + 1]
            assert_close(weights, alone.depth_attentions[-1], tolerance)

    @torch.no_grad()
    def test_inputs_embeds_and_logits_to_keep(self, family):
        """Embeddings may be given instead of ids; only the last logits are computed on request."""
        model, tolerance = tiny_model(family), rounding(family).logits
        input_ids = tokens()
        expected = model(input_ids).logits
        embeds = model.get_input_embeddings()(input_ids)
        assert_close(model(inputs_embeds=embeds).logits, expected, tolerance)
        kept = model(input_ids, logits_to_keep=2).logits
        assert kept.shape[1] == 2
        assert_close(kept, expected[:, -2:], tolerance)
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        generated = model.generate(inputs_embeds=embeds, **options)
        assert torch.equal(generated, model.generate(input_ids, **options)[:, 7:])
        with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
            model(input_ids, inputs_embeds=embeds)

    @TWO_MODES
    @pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
    def test_gradient_checkpointing_changes_nothing(self, family, mode, block_size, use_reentrant):
        """Loss, every gradient and the additional outputs are those without checkpointing."""
        model = tiny_model(family, attn_res_mode=mode, attn_res_block_size=block_size)
        expected, expected_gradients = loss_and_gradients(model, tokens())
        tolerance = rounding(family, mode, block_size).gradients
        assert all(gradient.any() for gradient in expected_gradients.values())
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        for options in ({}, {"output_hidden_states": True, "output_depth_attentions": True, "use_cache": False}):
            outputs, gradients = loss_and_gradients(model, tokens(), **options)
            assert_close(outputs.loss, expected.loss)
            for name, gradient in gradients.items():
                assert_close(gradient, expected_gradients[name], tolerance)
        assert len(outputs.hidden_states) == model.config.num_hidden_layers + 1
        assert len(outputs.depth_attentions) == model.config.num_depth_reads

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    @torch.no_grad()
    def test_save_and_load(self, family, dtype, tmp_path):
        """Every tensor and the logits survive bit for bit; queries and gains stay float32 in a model of any dtype."""
        tiny_model(family).save_pretrained(tmp_path / "fp32")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "fp32", dtype=dtype)
        depth_attention = model.model.depth_attention
        assert model.lm_head.weight.dtype == dtype
        assert depth_attention.query.dtype == depth_attention.key_norm.dtype == torch.float32
        assert torch.equal(depth_attention.query, tiny_model(family).model.depth_attention.query)
        model.save_pretrained(tmp_path / "again")
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto", output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        assert loaded.dtype == dtype
        for name, tensor in model.state_dict().items():
            assert loaded.state_dict()[name].dtype == tensor.dtype, name
            assert torch.equal(loaded.state_dict()[name], tensor), name
        torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits)

    @torch.no_grad()
    def test_loading_a_plain_donor_checkpoint(self, family, tmp_path, caplog):
        """The donor's tensors are taken, queries are zero and gains one, and the loading report names both as new."""
        donor = tiny_donor(family)
        donor.save_pretrained(tmp_path)
        template = attn_res_from_donor(donor)
        loaded, info = type(template).from_pretrained(tmp_path, config=template.config, output_loading_info=True)
        names = {"model.depth_attention.query", "model.depth_attention.key_norm"}
        assert set(info["missing_keys"]) == names and not info["unexpected_keys"] and not info["mismatched_keys"]
        for name, tensor in template.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        assert not loaded.model.depth_attention.query.any()
        assert (loaded.model.depth_attention.key_norm == 1).all()
        assert relative_error(loaded(tokens()).logits, donor(tokens()).logits) <= self.conversion_error

    @pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
    @torch.no_grad()
    def test_tied_embeddings_and_resize(self, family, tie, tmp_path):
        """The head shares the embedding if it is tied, also after resizing and after a round trip to disk."""
        model = tiny_model(family, tie_word_embeddings=tie)
        before = model(tokens()).logits
        model.resize_token_embeddings(80, mean_resizing=False)
        assert model.config.vocab_size == 80
        assert_close(model(tokens()).logits[..., :67], before, rounding(family).logits)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        shared = loaded.lm_head.weight.data_ptr() == loaded.get_input_embeddings().weight.data_ptr()
        assert shared == tie
        torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits)

    @torch.no_grad()
    def test_attention_implementations_agree(self, family):
        """Eager attention returns its weights; the implementations that the donor supports can be switched."""
        model = tiny_model(family, attn_implementation="eager")
        outputs = model(tokens(), output_attentions=True)
        assert len(outputs.attentions) == model.config.num_hidden_layers
        assert outputs.attentions[0].shape == (3, model.config.num_attention_heads, 7, 7)
        if model._supports_sdpa:
            model.set_attn_implementation("sdpa")
            assert model.config._attn_implementation == "sdpa"
            assert_close(model(tokens()).logits, outputs.logits, rounding(family).logits)

    @torch.no_grad()
    def test_deepcopy_and_fresh_initialisation(self, family):
        """A copy computes the same and shares nothing; a fresh model has zero queries and unit gains."""
        model = tiny_model(family)
        copied = copy.deepcopy(model)
        assert torch.equal(copied(tokens()).logits, model(tokens()).logits)
        copied.model.depth_attention.query.zero_()
        assert not torch.equal(copied(tokens()).logits, model(tokens()).logits)
        fresh = type(model)(model.config)
        assert not fresh.model.depth_attention.query.any()
        assert (fresh.model.depth_attention.key_norm == 1).all()

    def test_training_lowers_the_loss(self, family):
        """A few steps of AdamW on one batch, from a fresh model, move queries and gains and lower the loss."""
        model = type(tiny_model(family))(tiny_model(family).config).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(15):
            loss = model(tokens(4, 12), labels=tokens(4, 12)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]
        assert model.model.depth_attention.query[1:].any(dim=1).all()
        assert not model.model.depth_attention.query[0].any()  # a read of one source has no gradient
