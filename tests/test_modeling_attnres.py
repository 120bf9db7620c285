# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The Llama family with Attention Residuals: the numbers, and everything a user of Llama does with a model."""

import io
import logging
import pickle

import pytest
import torch
from behaviours import (
    REORDERED,
    ROOM,
    FamilyBehaviours,
    assert_close,
    greedy_without_cache,
    loss_and_gradients,
    rounding,
)
from families import COMMON, attn_res_from_donor, perturb, relative_error, tiny_config, tiny_donor, tiny_model, tokens
from reference import read, reference_forward, reference_loss
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
    PreTrainedTokenizerFast,
    StaticCache,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import attnres
from attnres import (
    ALL_DEPTH_ATTENTION_FUNCTIONS,
    AttnResConfig,
    AttnResForCausalLM,
    AttnResModel,
    DepthAttentionImplementation,
    DepthAttentionInterface,
    DepthMixer,
    TwoPhaseDepthAttention,
    eager_depth_attention,
)
from attnres_kernels.cpu import CppTokenReads, compiler
from depth_attention_attnres import (
    NOTHING_READ,
    DepthPlace,
    DepthRead,
    TokenScores,
    fused_rms_norm,
    joined,
    stacked_depth_attention,
)


FLOAT64 = 1e-12  # two ways to write the same sums in float64
# Weights and reads in float32: scores are sums of 13 products, a handful in size, and the exponential makes their
# absolute error the weights' relative one. 64 roundings of 2^-24.
FLOAT32 = 4e-6


@pytest.mark.parametrize("family", ["llama"])
class TestLlama(FamilyBehaviours):
    """What every family must do, for the Llama family."""


# --- Depth attention against the formulas


def with_float64_norms(model: torch.nn.Module) -> torch.nn.Module:
    """The model in float64, with torch's own norms: Llama's round to float32 whatever they are given."""
    model = model.double()
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            norm = torch.nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon)
            norm.weight = module.weight
            model.set_submodule(name, norm)
    return model


def random_sources(num_sources: int, shape=(3, 5, 13), dtype=torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(num_sources)
    scales = [10.0**-power for power in range(num_sources)]  # of very different size
    return tuple((scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for scale in scales)


def one_phase(sources, product, eps, scale):
    return TwoPhaseDepthAttention().merge(NOTHING_READ, sources, product, eps, scale)


def two_phases(sources, product, eps, scale):
    """The first half of the sources in phase 1, with the read of another query."""
    attention, closed = TwoPhaseDepthAttention(), sources[: (len(sources) + 1) // 2]
    closed_read = attention.phase_1(closed, torch.stack([product.flip(0), product]), eps)[1]
    return attention.merge(closed_read, sources, product, eps, scale)


reads = pytest.mark.parametrize(
    "depth_attention", [eager_depth_attention, stacked_depth_attention, one_phase, two_phases]
)


@reads
@pytest.mark.parametrize("num_sources", [1, 2, 5])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, FLOAT64), (torch.float32, 1e-6)], ids=["fp64", "fp32"])
def test_read_is_the_formula(depth_attention, num_sources, dtype, tolerance):
    """One read equals the paper's formula, token by token, in value and in every gradient."""
    query, gain = torch.randn(2, 13, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sources = random_sources(num_sources, dtype=dtype)
    leaves = [leaf.clone().requires_grad_() for leaf in (query.to(dtype), gain.to(dtype), *sources)]
    mixed, weights = depth_attention(tuple(leaves[2:]), leaves[0] * leaves[1], 1e-5, 3.0)
    (mixed.square().sum() + weights[:, 0].square().sum()).backward()
    assert mixed.dtype == weights.dtype == dtype and weights.shape == (3, num_sources, 5)

    exact = [leaf.double().detach().requires_grad_() for leaf in leaves]
    rows, row_weights = [], []
    for batch in range(3):
        for position in range(5):
            vectors = [source[batch, position] for source in exact[2:]]
            mix, mix_weights = read(vectors, exact[0], exact[1], 1e-5)
            rows.append(3.0 * mix)
            row_weights.append(torch.stack(mix_weights))
    expected = torch.stack(rows).view(3, 5, 13)
    expected_weights = torch.stack(row_weights).view(3, 5, num_sources).transpose(1, 2)
    (expected.square().sum() + expected_weights[:, 0].square().sum()).backward()
    assert relative_error(mixed, expected) <= tolerance
    assert relative_error(weights, expected_weights) <= tolerance
    for leaf, exact_leaf in zip(leaves, exact):
        scale = exact_leaf.grad.abs().max()
        assert (leaf.grad.double() - exact_leaf.grad).abs().max() <= 20 * tolerance * scale + tolerance


@pytest.mark.parametrize("num_sources", [1, 2, 25])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_read_of_one_token(num_sources, dtype):
    """The read of a single token is eager's in value and in every gradient, also under autocast and of zeros."""
    sources = [source.requires_grad_() for source in random_sources(num_sources, (1, 1, 13), dtype)]
    product = torch.randn(13, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    tolerance = {torch.float64: FLOAT64, torch.float32: 1e-5, torch.bfloat16: 8e-3}[dtype]

    def results(function, autocast=False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            mixed, weights = function(tuple(sources), product, 1e-5, 3.0)
        loss = mixed.double().square().sum() + weights[:, 0].double().square().sum()
        return [mixed, weights, *torch.autograd.grad(loss, [product, *sources])]

    expected = results(eager_depth_attention)
    found = results(TwoPhaseDepthAttention(), autocast=dtype == torch.float32)
    for value, expected_value in zip(found, expected, strict=True):
        assert value.dtype == expected_value.dtype and value.shape == expected_value.shape
        scale = max(1.0, expected_value.abs().max().item())
        assert (value.double() - expected_value.double()).abs().max() <= tolerance * scale
    zeros = [torch.zeros_like(source).requires_grad_() for source in sources]
    mixed, weights = TwoPhaseDepthAttention()(tuple(zeros), product, 1e-5, 1)
    grads = torch.autograd.grad(mixed.sum() + weights[:, 0].sum(), zeros)
    assert not mixed.any() and all(grad.isfinite().all() for grad in grads)


@reads
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixing_is_float32(depth_attention, dtype):
    """Sources of half precision are mixed in float32 and rounded once: the result is the exact mix, rounded."""
    product = torch.randn(13, generator=torch.Generator().manual_seed(0))
    sources = random_sources(4, dtype=dtype)
    mixed, weights = depth_attention(sources, product, 1e-5, 1.0)
    exact, exact_weights = eager_depth_attention(tuple(source.double() for source in sources), product, 1e-5, 1.0)
    assert mixed.dtype == dtype and weights.dtype == torch.float32
    assert_close(weights, exact_weights, FLOAT32)
    half_ulp = torch.finfo(dtype).eps / 2 * 1.001  # and float32 rounding
    assert ((mixed.double() - exact).abs() <= half_ulp * exact.abs() + 1e-6).all()


@reads
def test_autocast_does_not_touch_the_mixing(depth_attention):
    """Under autocast a read of float32 sources is bit for bit that without, and a whole model's weights are float32."""
    product, sources = torch.randn(13), random_sources(4, dtype=torch.float32)
    expected = depth_attention(sources, product, 1e-5, 1.0)
    model = tiny_model(attn_res_block_size=2)
    exact = model(tokens(), output_depth_attentions=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, weights = depth_attention(sources, product, 1e-5, 1.0)
        outputs = model(tokens(), output_depth_attentions=True, output_hidden_states=True)
    assert torch.equal(mixed, expected[0]) and torch.equal(weights, expected[1])
    for weights in outputs.depth_attentions:
        assert weights.dtype == torch.float32
        assert_close(weights.sum(1), torch.ones(3, 7), 1e-6)
    # as Llama's, the residual stream keeps the dtype of the embedding
    assert all(hidden_states.dtype == torch.float32 for hidden_states in outputs.hidden_states[:-1])
    assert 0 < relative_error(outputs.logits, exact.logits) < 0.1


@pytest.mark.parametrize("scaled", [False, True], ids=["mean", "sum"])
@pytest.mark.parametrize("mode, block_size", [("full", None), ("block", 1), ("block", 2), ("block", 3)])
def test_model_is_the_reference(mode, block_size, scaled):
    """Logits, depth weights, loss and every gradient equal those of an independent model in float64."""
    config = {"num_hidden_layers": 3, "attn_res_norm_eps": 3e-5}
    config |= {"attn_res_mode": mode, "attn_res_block_size": block_size, "attn_res_sum_scale": scaled}
    model = with_float64_norms(tiny_model(**config))
    input_ids = tokens()
    outputs = model(input_ids, output_depth_attentions=True)
    # the loss of transformers is computed in float32
    loss = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
    loss.backward()

    state = {name: tensor.detach().clone().requires_grad_() for name, tensor in model.state_dict().items()}
    per_block = 1 if mode == "full" else 2 * block_size
    logits, weights = reference_forward(state, model.config, input_ids, per_block, scaled)
    expected_loss = reference_loss(logits, input_ids)
    expected_loss.backward()
    assert relative_error(outputs.logits, logits) <= FLOAT64
    assert len(outputs.depth_attentions) == len(weights) == 7
    for row, expected in zip(outputs.depth_attentions, weights, strict=True):
        assert relative_error(row, expected) <= FLOAT64
    assert_close(loss, expected_loss, FLOAT64)
    for name, parameter in model.named_parameters():
        assert state[name].grad.abs().max() > 1e-6, name
        assert relative_error(parameter.grad, state[name].grad) <= 1e-11, name
    assert not model.model.depth_attention.query.grad[0].any()

    single = tiny_model(**config)(input_ids, labels=input_ids)
    assert relative_error(single.logits, logits) <= 1e-5
    assert relative_error(single.loss, expected_loss) <= 1e-5


@torch.no_grad()
def test_reference_sees_a_wrong_model():
    """The negative control of the comparison: another block size, one query or one gain changed is seen."""
    model = with_float64_norms(tiny_model(num_hidden_layers=3, attn_res_block_size=2))
    logits = model(tokens()).logits
    state = model.state_dict()

    def error(per_block: int = 4, **changes) -> float:
        changed = {**state, **{f"model.depth_attention.{name}": value for name, value in changes.items()}}
        return relative_error(reference_forward(changed, model.config, tokens(), per_block, False)[0], logits)

    query, gain = state["model.depth_attention.query"], state["model.depth_attention.key_norm"]
    assert error() <= FLOAT64
    assert error(per_block=2) > 1e-3
    assert error(query=query.flip(1)) > 1e-3
    assert error(query=query.roll(1, 0)) > 1e-3
    assert error(key_norm=gain.flip(1)) > 1e-4


@pytest.mark.parametrize("mode, block_size", [("full", None), ("block", 2)])
def test_gradcheck(mode, block_size):
    """Numerical and analytical derivatives of a whole model agree, for the embeddings and the depth attention."""
    sizes = {"num_hidden_layers": 3, "hidden_size": 12, "intermediate_size": 10, "vocab_size": 5, "pad_token_id": None}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = tiny_model(attn_res_mode=mode, attn_res_block_size=block_size, **sizes, **heads)
    model = with_float64_norms(model)
    depth_attention = model.model.depth_attention

    def logits(embeds, query, key_norm):
        changed = {"model.depth_attention.query": query, "model.depth_attention.key_norm": key_norm}
        return torch.func.functional_call(model, changed, kwargs={"inputs_embeds": embeds, "use_cache": False}).logits

    embeds = torch.randn(1, 3, 12, dtype=torch.float64, requires_grad=True)
    inputs = (embeds, depth_attention.query, depth_attention.key_norm)
    assert torch.autograd.gradcheck(logits, inputs, atol=1e-7, rtol=1e-5)


@torch.no_grad()
def test_bfloat16_error_is_that_of_the_donor(tmp_path):
    """A converted model in bfloat16 is no further from float32 than twice what its donor is."""
    donor = tiny_donor()
    exact = donor.double()(tokens()).logits
    donor_error = relative_error(donor.to(torch.bfloat16)(tokens()).logits, exact)
    for mode, block_size in [("full", None), ("block", 1), ("block", 2)]:
        model = attn_res_from_donor(tiny_donor(), mode, block_size).to(torch.bfloat16)
        assert model(tokens()).logits.dtype == torch.bfloat16
        assert relative_error(model(tokens()).logits, exact) <= 2 * donor_error < 0.1


# --- Implementations of depth attention


@pytest.mark.parametrize("implementation", ["eager", "two_phase", "cpp"])
@torch.no_grad()
def test_zero_queries_weigh_each_source_by_one(implementation):
    """A scaled read with a zero query is the sum that a donor would compute, to the bit, of any number of sources."""
    if implementation == "cpp" and compiler() is None:
        pytest.skip("needs a C++ compiler")
    read_sources = ALL_DEPTH_ATTENTION_FUNCTIONS.get_interface(implementation)
    outputs = torch.randn(200, 1, 40, 8, generator=torch.Generator().manual_seed(0))  # for few tokens, sums differ
    stream = torch.zeros(1, 40, 8)
    for number in range(1, 201):
        stream = stream + outputs[number - 1]
        mixed, weights = read_sources(tuple(outputs[:number]), torch.zeros(8), 1e-6, number)
        assert torch.equal(mixed, stream), number
        assert weights.unique().tolist() == [torch.tensor(1 / number).item()]


@torch.no_grad()
def test_a_deep_full_model_is_its_donor_to_the_bit():
    """With eager, Full mode adds in the donor's order: nothing is left of rounding, also with 61 sources."""
    donor = tiny_donor(num_hidden_layers=30)
    model = attn_res_from_donor(donor, "full")
    model.set_attn_res_implementation("eager")
    outputs, expected = (one(tokens(), output_hidden_states=True) for one in (model, donor))
    assert torch.equal(outputs.logits, expected.logits)
    assert all(map(torch.equal, outputs.hidden_states, expected.hidden_states))


def outputs_and_gradients(model, implementation: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Of a loss that depends on the depth weights too, on enough tokens for both phases."""
    model.set_attn_res_implementation(implementation)
    model.zero_grad()
    input_ids = torch.randint(0, model.config.vocab_size, (3, 17), generator=torch.Generator().manual_seed(0))
    outputs = model(input_ids, labels=input_ids, output_depth_attentions=True)
    (outputs.loss + sum(weights[:, 0].square().mean() for weights in outputs.depth_attentions)).backward()
    found = {f"weights of read {row}": weights for row, weights in enumerate(outputs.depth_attentions)}
    found.update((name, parameter.grad) for name, parameter in model.named_parameters())
    return {"logits": outputs.logits, **{name: value.detach().clone() for name, value in found.items()}}


@pytest.mark.parametrize("mode, block_size", [("block", 1), ("block", 2), ("block", 3), ("full", 2), ("full", 5)])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_implementations_agree(mode, block_size, checkpointing):
    """two_phase gives the logits, depth weights and gradients of eager to float64 rounding, whatever the blocks."""
    model = tiny_model(attn_res_mode=mode, attn_res_block_size=block_size, attn_res_sum_scale=True).double().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    expected, found = (outputs_and_gradients(model, name, torch.float64) for name in ("eager", "two_phase"))
    for name, value in expected.items():
        assert_close(found[name], value, FLOAT64 * max(1.0, value.abs().max().item()))


def test_two_phase_in_bfloat16():
    """In bfloat16 two_phase is as far from float64 as eager is: by at most a tenth more, in sum over all parameters."""
    model = tiny_model(attn_res_mode="full", attn_res_block_size=3).double()
    exact = outputs_and_gradients(model, "eager", torch.float64)
    model = model.to(torch.bfloat16)
    errors = {}
    for name in ("eager", "two_phase"):
        found = outputs_and_gradients(model, name, torch.bfloat16)
        errors[name] = sum(relative_error(found[key], value) for key, value in exact.items())
    assert errors["two_phase"] <= 1.1 * errors["eager"]


@pytest.mark.parametrize("shape", [(3, 17, 48), (2, 3, 48)], ids=["many tokens", "few tokens"])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_norm(shape, weight_dtype, dtype):
    """The norm after a read is the donor's, in value and gradients: as far from float64 as the donor's own."""
    norm = LlamaRMSNorm(shape[-1], eps=1e-3).to(weight_dtype)
    torch.nn.init.normal_(norm.weight)
    exact_norm = torch.nn.RMSNorm(shape[-1], eps=1e-3, dtype=torch.float64)
    exact_norm.weight.data.copy_(norm.weight)
    inputs = torch.randn(shape).to(dtype).requires_grad_()
    grad = torch.randn(shape).to(torch.promote_types(dtype, weight_dtype))

    def results(function, inputs, weight):
        output = function(inputs)
        return [output, *torch.autograd.grad(output, [inputs, weight], grad.to(output.dtype))]

    exact_inputs = inputs.detach().double().requires_grad_()
    exact = results(exact_norm, exact_inputs, exact_norm.weight)
    own = results(norm, inputs, norm.weight)
    found = results(lambda inputs: fused_rms_norm(norm, inputs), inputs, norm.weight)
    for value, own_value, exact_value in zip(found, own, exact, strict=True):
        assert value.dtype == own_value.dtype and value.shape == own_value.shape
        assert relative_error(value, exact_value) <= 1.1 * relative_error(own_value, exact_value) + 1e-6


@pytest.mark.parametrize("num_closed, num_sources", [(0, 2), (0, 5), (1, 2), (3, 4), (2, 5)])
def test_norm_fused_with_a_read(num_closed, num_sources):
    """A read that returns its RMSNorm is the formula in float64, in value, weights and every gradient."""
    norm = LlamaRMSNorm(13, eps=1e-3).double()
    torch.nn.init.normal_(norm.weight)
    sources = [source.requires_grad_() for source in random_sources(num_sources)]
    products = torch.randn(2, 13, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 5, 13, dtype=torch.float64)
    attention = TwoPhaseDepthAttention()

    def fused():
        closed = attention.phase_1(sources[:num_closed], products, 1e-5)[1] if num_closed else NOTHING_READ
        return attention.merge(closed, sources, products[1], 1e-5, 3.0, norm)

    def plain():
        mixed, weights = eager_depth_attention(tuple(sources), products[1], 1e-5, 3.0)
        return torch.nn.functional.rms_norm(mixed, (13,), norm.weight, 1e-3), weights

    def results(function):
        normed, weights = function()
        loss = (normed * grad).sum() + weights[:, 0].square().sum()
        return [normed, weights, *torch.autograd.grad(loss, [products, norm.weight, *sources])]

    for found, expected in zip(results(fused), results(plain), strict=True):
        assert_close(found, expected, FLOAT64 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_reads_without_gradients(dtype):
    """Without gradients a read gives the same, each in memory of its own, and leaves the sources as they are."""
    sources = random_sources(3, dtype=dtype)
    before = [source.clone() for source in sources]
    products = torch.randn(2, 13, dtype=torch.promote_types(dtype, torch.float32))
    attention, found = TwoPhaseDepthAttention(), []
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
        for closed_read, product in zip(attention.phase_1(sources[:2], products, 1e-5), products):
            found.append(attention.merge(closed_read, sources, product, 1e-5, 3.0))
    # rounded once to bfloat16, by at most 2^-8, the rest in float32
    rounding_error = {torch.float64: FLOAT64, torch.float32: FLOAT32, torch.bfloat16: 2**-8 + FLOAT32}[dtype]
    for (mixed, weights), product in zip(found, products, strict=True):
        exact, exact_weights = eager_depth_attention(tuple(v.double() for v in sources), product.double(), 1e-5, 3.0)
        assert mixed.dtype == dtype and weights.dtype == product.dtype
        assert relative_error(mixed, exact) <= rounding_error
        assert relative_error(weights, exact_weights) <= (FLOAT64 if dtype == torch.float64 else FLOAT32)
    assert all(torch.equal(source, value) for source, value in zip(sources, before))


def test_a_training_step_keeps_no_more_than_the_donors(tmp_path):
    """What a forward keeps for the backward pass is at most what the donor's keeps, and the states of the blocks."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 8, "num_attention_heads": 4}
    donor, model = tiny_donor(**sizes).train(), tiny_model(**sizes, attn_res_block_size=2).train()
    input_ids = torch.randint(0, 64, (2, 128), generator=torch.Generator().manual_seed(0))

    def kept(model) -> int:
        storages = {}
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(input_ids, labels=input_ids, use_cache=False)
        return sum(nbytes for nbytes, _ in storages.values())

    state = input_ids.numel() * 64 * 4
    assert kept(model) <= kept(donor) + 4 * state


def test_fused_norm_leaves_others_alone():
    """A norm with another formula, a replaced forward or a hook is called as it is."""
    hidden_states = torch.randn(2, 20, 8)
    gemma, seen = Gemma2RMSNorm(8), []
    torch.nn.init.normal_(gemma.weight)
    assert torch.equal(fused_rms_norm(gemma, hidden_states), gemma(hidden_states))
    scripted = torch.jit.trace(torch.nn.RMSNorm(8), hidden_states)
    assert torch.equal(fused_rms_norm(scripted, hidden_states), scripted(hidden_states))
    norm = LlamaRMSNorm(8)
    norm.register_forward_hook(lambda *args: seen.append(args))
    fused_rms_norm(norm, hidden_states)
    assert len(seen) == 1
    norm = LlamaRMSNorm(8)
    norm.forward = lambda hidden_states: 7 * hidden_states
    assert torch.equal(fused_rms_norm(norm, hidden_states), 7 * hidden_states)
    model = tiny_model().train()
    model.model.layers[1].post_attention_layernorm.register_forward_hook(lambda *args: seen.append(args))
    model(tokens())
    assert len(seen) == 2


def test_layers_hand_on_little_under_checkpointing():
    """With checkpointing a layer returns one new tensor per token: what it has put out joins the sources first."""
    model = tiny_model(num_hidden_layers=4, attn_res_block_size=2).train()

    def returned():
        found = []
        handles = [
            layer.register_forward_hook(lambda m, i, output: found.append(output[3:])) for layer in model.model.layers
        ]
        model(tokens())
        [handle.remove() for handle in handles]
        return [sum(tensor is not None for tensor in tensors) for tensors in found]

    model.gradient_checkpointing_enable()
    assert max(returned()[::2]) == 1
    model.gradient_checkpointing_disable()
    assert max(returned()[::2]) == 2


@pytest.mark.parametrize("depth_attention", [one_phase, two_phases])
def test_gradients_of_the_weights_alone(depth_attention):
    """A loss of nothing but depth weights has eager's gradients."""
    sources = [source.requires_grad_() for source in random_sources(3)]
    product = torch.randn(13, dtype=torch.float64, requires_grad=True)

    def gradients(function):
        return torch.autograd.grad(function(sources, product, 1e-5, 1)[1][:, 0].square().sum(), [product, *sources])

    for found, expected in zip(gradients(depth_attention), gradients(eager_depth_attention)):
        assert_close(found, expected, FLOAT64 * max(1.0, expected.abs().max().item()))


def test_two_phase_keeps_little_for_the_backward_pass():
    """A read keeps its sources, not copies of them, and a few numbers per token."""
    sources = [torch.randn(2, 50, 64, requires_grad=True) for _ in range(4)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        one_phase(sources, torch.randn(64, requires_grad=True), 1e-5, 1.0)
    own = {source.data_ptr() for source in sources}
    others = [tensor for tensor in kept if tensor.data_ptr() not in own]
    assert sum(tensor.numel() for tensor in others) <= 100 * 3 * len(sources) + 64


@pytest.fixture
def nearest():
    """A user's implementation: all the weight on the last source."""

    def nearest_depth_attention(sources, product, eps, scale):
        weights = torch.zeros(sources[0].shape[0], len(sources), sources[0].shape[1])
        weights[:, -1] = 1
        return sources[-1] * scale, weights

    DepthAttentionInterface.register("nearest", nearest_depth_attention)
    yield "nearest"
    del DepthAttentionInterface._global_mapping["nearest"]


@torch.no_grad()
def test_users_implementation(nearest, tmp_path):
    """A registered function runs, however it is selected, and is not written to disk."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    expected = model(tokens()).logits
    model.set_attn_res_implementation(nearest)
    outputs = model(tokens(), output_depth_attentions=True)
    assert all((weights[:, -1] == 1).all() for weights in outputs.depth_attentions)
    assert relative_error(outputs.logits, expected) > 1e-2

    config = tiny_config()
    models = [
        AttnResForCausalLM.from_pretrained(tmp_path, attn_res_implementation=nearest),
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_res_implementation=nearest),
        AttnResForCausalLM.from_pretrained(tmp_path, config=config, attn_res_implementation=nearest),
    ]
    for selected in models:
        assert torch.equal(selected(tokens()).logits, outputs.logits)
    base = AutoModel.from_pretrained(tmp_path, attn_res_implementation=nearest)
    assert torch.equal(base(tokens()).last_hidden_state, model.model(tokens()).last_hidden_state)
    fresh = AutoModelForCausalLM.from_config(tiny_config(), attn_res_implementation=nearest)
    assert fresh.config._attn_res_implementation == nearest
    assert AttnResModel(tiny_config(attn_res_implementation=nearest)).config._attn_res_implementation == nearest
    assert AttnResModel(tiny_config(), attn_res_implementation=nearest).config._attn_res_implementation == nearest

    models[0].save_pretrained(tmp_path / "again")
    assert nearest not in (tmp_path / "again" / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.config._attn_res_implementation == DepthAttentionInterface.default
    torch.testing.assert_close(again(tokens()).logits, expected)
    model.set_attn_res_implementation(DepthAttentionInterface.default)
    assert torch.equal(model(tokens()).logits, expected)


def test_unknown_implementation(tmp_path):
    """An unknown name raises wherever it is given, lists the choices, and leaves model and configuration usable."""
    message = "'cuda' is not an implementation of depth attention; choose one of .*eager, .*two_phase"
    config = tiny_config()
    with pytest.raises(ValueError, match=message):
        AttnResForCausalLM(config, attn_res_implementation="cuda")
    model = AttnResForCausalLM(config)
    with pytest.raises(ValueError, match=message):
        model.set_attn_res_implementation("cuda")
    assert model.config._attn_res_implementation == DepthAttentionInterface.default
    with pytest.raises(ValueError, match=message):
        AttnResForCausalLM(tiny_config(attn_res_implementation="cuda"))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_config(tiny_config(), attn_res_implementation="cuda")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_res_implementation="cuda")
    assert "eager" in ALL_DEPTH_ATTENTION_FUNCTIONS


# --- Generation

GENERATION = {"max_new_tokens": 8, "eos_token_id": None}
STRATEGIES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 20},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "do_sample": False, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "offloaded cache": {"cache_implementation": "offloaded"},
    "offloaded static cache": {"cache_implementation": "offloaded_static", "disable_compile": True},
    "quanto cache": {"cache_implementation": "quantized", "cache_config": {"backend": "quanto", "nbits": 4}},
    "hqq cache": {"cache_implementation": "quantized", "cache_config": {"backend": "hqq", "nbits": 4}},
    "fp8 cache": {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}},
    "no cache": {"use_cache": False},
    "chunked prompt": {"prefill_chunk_size": 3},
    "repetition penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@torch.no_grad()
def test_generation_is_the_donors(strategy):
    """A converted model generates what its donor does with every strategy and cache that the donor can use here."""
    donor = tiny_donor()
    model = attn_res_from_donor(donor, "block", 2)

    def generate(generator):
        torch.manual_seed(5)
        return generator.generate(tokens(2, 6), **GENERATION, **STRATEGIES[strategy])

    try:
        expected = generate(donor)
    except Exception as error:  # a package or a device is missing: each cache says so in its own way
        pytest.skip(f"the donor can't do this here: {error}")
    assert expected.shape[1] == 14
    assert torch.equal(generate(model), expected)


@torch.no_grad()
def test_assisted_generation():
    """Speculation, by AttnRes for its donor or the other way or from the prompt, gives the greedy continuation."""
    donor = tiny_donor()
    converted = attn_res_from_donor(donor, "block", 2)
    model = attn_res_from_donor(donor, "block", 2)
    torch.nn.init.normal_(model.model.depth_attention.query, std=0.02)
    for target, assistant in [(model, donor), (donor, model), (model, converted), (converted, model)]:
        expected = greedy_without_cache(target, tokens(1, 6), 8)
        options = {**GENERATION, "do_sample": False}
        assert torch.equal(target.generate(tokens(1, 6), assistant_model=assistant, **options), expected)
        assert torch.equal(target.generate(tokens(1, 6), prompt_lookup_num_tokens=2, **options), expected)


@torch.no_grad()
def test_generate_returns_scores_and_states():
    """`generate` hands on hidden states and attentions; asking for depth weights does not disturb it."""
    model = tiny_model(attn_implementation="eager")
    options = {**GENERATION, "do_sample": False, "return_dict_in_generate": True}
    plain = model.generate(tokens(), **options)
    flags = {"output_hidden_states": True, "output_attentions": True, "output_logits": True}
    outputs = model.generate(tokens(), **options, **flags, output_depth_attentions=True)
    assert torch.equal(outputs.sequences, plain.sequences)
    assert len(outputs.hidden_states) == 8 and len(outputs.hidden_states[0]) == 6
    assert len(outputs.attentions[0]) == 5
    model.config.output_depth_attentions = True
    assert torch.equal(model.generate(tokens(), **options).sequences, plain.sequences)


@torch.no_grad()
def test_static_cache_in_forward():
    """A static cache of the caller, filled in two steps, gives the logits without a cache."""
    model = tiny_model(attn_res_mode="full")
    cache = StaticCache(config=model.config, max_cache_len=12)
    first = model(tokens(2, 9)[:, :5], past_key_values=cache).logits
    second = model(tokens(2, 9)[:, 5:], past_key_values=cache).logits
    assert_close(torch.cat([first, second], dim=1), model(tokens(2, 9), use_cache=False).logits)


def token_by_token(model, input_ids: torch.Tensor, **kwargs) -> list:
    """The outputs of a model that gets a single sequence one token at a time."""
    cache, outputs = DynamicCache(config=model.config), []
    for token in input_ids.split(1, dim=1):
        outputs.append(model(token, past_key_values=cache, use_cache=True, **kwargs))
    return outputs


needs_compiler = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
READ_TOKENS = pytest.mark.parametrize(
    "implementation, token_reads",
    [("two_phase", TokenScores), pytest.param("cpp", CppTokenReads, marks=needs_compiler)],
    ids=["two_phase", "cpp"],
)


def counted_steps(monkeypatch, token_reads) -> list:
    """Grows by one with each read of a single token by `token_reads`."""
    steps, step = [], token_reads.read
    monkeypatch.setattr(token_reads, "read", lambda *args: steps.append(1) or step(*args))
    return steps


@READ_TOKENS
@pytest.mark.parametrize("sum_scale", [False, True])
@pytest.mark.parametrize("mode, block_size", [("block", 1), ("block", 2), ("block", 5), ("full", 1), ("full", 2)])
def test_reads_of_one_token(monkeypatch, mode, block_size, sum_scale, implementation, token_reads):
    """Token by token, read by the code for one, the logits are those of eager reads of all tokens in float64."""
    options = {"attn_res_mode": mode, "attn_res_block_size": block_size, "attn_res_sum_scale": sum_scale}
    steps, sequences = counted_steps(monkeypatch, token_reads), [tokens(1, 6, seed=seed) for seed in range(4)]
    exact_model = with_float64_norms(tiny_model(**options, attn_res_implementation="eager"))
    exact = torch.cat([exact_model(input_ids, use_cache=False).logits for input_ids in sequences], dim=1)

    def error(dtype, implementation):
        model = tiny_model(**options, attn_res_implementation=implementation).to(dtype)
        outputs = [output for input_ids in sequences for output in token_by_token(model, input_ids)]
        return ((torch.cat([output.logits for output in outputs], dim=1) - exact).norm() / exact.norm()).item()

    with torch.no_grad():
        assert error(torch.float32, implementation) <= max(REORDERED, ROOM * error(torch.float32, "eager"))
        # a ratio of errors that are chance, over four sequences 0.8 to 1.3
        assert error(torch.bfloat16, implementation) <= 2 * error(torch.bfloat16, "eager")
    assert len(steps) == 2 * 4 * 6 * tiny_config(**options).num_depth_reads


@READ_TOKENS
@torch.no_grad()
def test_one_token_is_read_otherwise_where_more_is_asked(monkeypatch, implementation, token_reads):
    """Weights, hooks, gradients and autocast leave the code for one token aside, and the result is the same."""
    model, steps, seen = tiny_model(attn_res_implementation=implementation), counted_steps(monkeypatch, token_reads), []
    input_ids = tokens(1, 3)
    expected = [output.logits for output in token_by_token(model, input_ids)]
    num_steps = len(steps)

    def check(outputs):
        for output, logits in zip(outputs, expected, strict=True):
            assert_close(output.logits, logits, 1e-5)

    outputs = token_by_token(model, input_ids, output_depth_attentions=True)
    check(outputs)
    assert len(outputs[0].depth_attentions) == model.config.num_depth_reads
    assert all(weights.shape[::2] == (1, 1) for weights in outputs[0].depth_attentions)
    with torch.enable_grad():
        check(token_by_token(model, input_ids))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        token_by_token(model, input_ids)
    handle = model.model.layers[1].register_forward_hook(lambda module, args, output: seen.append(output[2]))
    check(token_by_token(model, input_ids))
    handle.remove()
    assert len(steps) == num_steps and all(weights.shape[::2] == (1, 1) for weights in seen)
    handle = model.model.layers[1].mlp_read.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    check(token_by_token(model, input_ids))
    handle.remove()
    assert len(steps) == 2 * num_steps - 3 and all(mixed.shape == (1, 1, 40) for mixed in seen[3:])
    check(token_by_token(model, input_ids, output_hidden_states=True))


@torch.no_grad()
@pytest.mark.parametrize("seq_len", [1, 40])
@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("mode", ["block", "full"])
def test_early_exit(mode, num_layers, seq_len):
    """Models of which only the first layers run, as in self-speculative decoding, read as eager does."""
    model = tiny_model(attn_res_mode=mode, attn_res_block_size=2)
    model.config.num_hidden_layers = num_layers
    logits = model(tokens(1, seq_len), use_cache=False).logits
    model.set_attn_res_implementation("eager")
    tolerance = rounding(mode=mode, block_size=2).logits
    assert_close(logits, model(tokens(1, seq_len), use_cache=False).logits, tolerance)


@pytest.mark.parametrize("score, expected", [(800.0, 1), (-800.0, 0), (float("nan"), float("nan"))])
@torch.no_grad()
def test_one_token_of_extreme_scores(score, expected):
    """Weights that underflow are zero, and what is no number stays none."""
    config = tiny_config(attn_res_implementation="two_phase", attn_res_block_size=1)
    sources = torch.randn(4, 1, 1, config.hidden_size).unbind(0)
    token_scores = TokenScores(torch.zeros(config.num_depth_reads, config.hidden_size), 1e-5)
    token_scores.values, token_scores.scores[5] = list(sources[:3]), [-1600.0, -1600.0, score]
    place, norm = DepthPlace.of(config, 5), torch.nn.Identity()
    _, _, mixed, _ = token_scores.read(place, token_scores.products[5], sources, norm)
    torch.testing.assert_close(mixed, expected * sources[2] + (1 - expected) * sources[3], equal_nan=True)


@torch.no_grad()
def test_nothing_of_depth_attention_is_cached():
    """The cache holds the keys and values of the donor's, tensor by tensor."""
    donor = tiny_donor()
    model = attn_res_from_donor(donor, "block", 2)
    cache, expected = model(tokens()).past_key_values, donor(tokens()).past_key_values
    assert len(cache.layers) == len(expected.layers) == 5
    for layer, expected_layer in zip(cache.layers, expected.layers):
        assert_close(layer.keys, expected_layer.keys)
        assert_close(layer.values, expected_layer.values)


@torch.no_grad()
def test_masks():
    """Masks of the caller, in four dimensions or none at all (`is_causal=False`), act as in the donor."""
    donor = tiny_donor()
    model = attn_res_from_donor(donor, "block", 2)
    mask = torch.full((7, 7), torch.finfo(torch.float32).min).triu(1).expand(3, 1, 7, 7).clone()
    mask[1, :, :, 3] = torch.finfo(torch.float32).min
    causal = donor(tokens()).logits
    for options in ({"attention_mask": mask}, {"is_causal": False}):
        expected = donor(tokens(), **options).logits
        assert relative_error(expected, causal) > 1e-2
        assert relative_error(model(tokens(), **options).logits, expected) <= 3e-6


@pytest.fixture
def transformers_log(caplog):
    """What transformers logs, which doesn't reach the root logger."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_pipeline(transformers_log):
    """`pipeline("text-generation")` accepts the model without complaint and generates what the donor's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 67)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    donor = tiny_donor()
    results = []
    for model in (donor, attn_res_from_donor(donor, "full")):
        generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        prompts = ["w5 w6 w7", "w9"]
        results.append(generator(prompts, batch_size=2, max_new_tokens=5, do_sample=False, eos_token_id=None))
    assert results[0] == results[1]
    assert not [record for record in transformers_log.records if record.levelno >= logging.ERROR]


# --- Attention implementations


@pytest.mark.slow  # flex attention compiles itself
@torch.no_grad()
def test_flex_attention():
    """Flex attention can be selected and gives the logits of eager attention."""
    donor = tiny_donor(head_dim=16)
    try:
        donor.set_attn_implementation("flex_attention")
        donor(tokens())
    except (ImportError, RuntimeError, NotImplementedError) as error:
        pytest.skip(f"the donor can't do this here: {error}")
    model = tiny_model(head_dim=16, attn_implementation="eager")
    expected = model(tokens()).logits
    model.set_attn_implementation("flex_attention")
    assert model.model.config._attn_implementation == "flex_attention"
    assert_close(model(tokens()).logits, expected)


@torch.no_grad()
def test_selecting_attention(tmp_path):
    """Attention is chosen at construction, at loading and by the setter, and refused by name, as in the donor."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert model.config._attn_implementation == tiny_donor().config._attn_implementation == "sdpa"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert loaded.config._attn_implementation == "eager"
    assert loaded(tokens(), output_attentions=True).attentions[0] is not None
    for ability in ("_supports_flash_attn", "_supports_sdpa", "_supports_flex_attn", "_supports_attention_backend"):
        assert getattr(model, ability) == getattr(tiny_donor(), ability) is True
    for name in ("nonsense", "flash_attention_2"):
        errors = []
        for refused in (tiny_donor(), model):
            with pytest.raises((ValueError, ImportError)) as error:
                refused.set_attn_implementation(name)
            errors.append(error.type)
        assert errors[0] == errors[1]
    assert torch.equal(model(tokens()).logits, tiny_model()(tokens()).logits)


# --- Precision, memory, devices


def test_half_precision_keeps_depth_attention():
    """`.to(dtype)`, `.half()`, `.bfloat16()` and a dtype at construction round all but queries and gains."""
    converters = {
        "to": lambda: tiny_model().to(torch.bfloat16),
        "to device and dtype": lambda: tiny_model().to("cpu", torch.bfloat16),
        "bfloat16": lambda: tiny_model().bfloat16(),
        "half": lambda: tiny_model().half(),
    }
    expected = tiny_model().model.depth_attention
    for name, convert in converters.items():
        model = convert()
        assert model.lm_head.weight.dtype in (torch.bfloat16, torch.float16), name
        assert torch.equal(model.model.depth_attention.query, expected.query), name
        assert torch.equal(model.model.depth_attention.key_norm, expected.key_norm), name
        assert model.model.depth_attention.query.dtype == torch.float32, name
        assert model(tokens()).logits.dtype == model.lm_head.weight.dtype, name
    built = AutoModelForCausalLM.from_config(tiny_config(), dtype=torch.bfloat16)
    assert built.lm_head.weight.dtype == torch.bfloat16
    assert built.model.depth_attention.query.dtype == built.model.depth_attention.key_norm.dtype == torch.float32
    doubled = tiny_model().double().model.depth_attention
    assert doubled.query.dtype == torch.float64


def test_gradients_in_bfloat16():
    """A model of bfloat16 has the gradients of float32 but for rounding; those of queries and gains are float32."""

    def gradients_in(dtype):
        model = attn_res_from_donor(tiny_donor(), "block", 2)
        torch.manual_seed(0)
        torch.nn.init.normal_(model.model.depth_attention.query, std=0.05)
        return loss_and_gradients(model.to(dtype), tokens())[1]

    exact = gradients_in(torch.float32)
    for name, gradient in gradients_in(torch.bfloat16).items():
        assert gradient.dtype == (torch.float32 if "depth_attention" in name else torch.bfloat16), name
        # the donor's own are off by up to 4 %
        assert (gradient.float() - exact[name]).norm() <= 0.1 * exact[name].norm(), name


@pytest.mark.parametrize("head", [AutoModel, AutoModelForCausalLM], ids=["base", "causal"])
@torch.no_grad()
def test_device_maps(head, tmp_path):
    """A model that is split between memory and disk, or all of it offloaded, computes what it does in memory."""
    tiny_model().save_pretrained(tmp_path / "model")
    model = head.from_pretrained(tmp_path / "model")
    expected = model(tokens(), output_hidden_states=True, output_depth_attentions=True)
    prefix = "" if head is AutoModel else "model."
    names = {name: "cpu" for name, _ in model.named_children()} if head is AutoModel else {"lm_head": "cpu"}
    split = {
        **names,
        **{f"{prefix}{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb", "depth_attention")},
    }
    split |= {f"{prefix}layers.{layer}": "disk" if layer % 2 else "cpu" for layer in range(5)}
    split.pop("layers", None)
    device_maps = {"one": {"": "cpu"}, "auto": "auto", "layers": split}
    device_maps["depth attention too"] = {**split, f"{prefix}depth_attention": "disk", f"{prefix}embed_tokens": "disk"}
    for name, device_map in device_maps.items():
        loaded = head.from_pretrained(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / name)
        outputs = loaded(tokens(), output_hidden_states=True, output_depth_attentions=True)
        # with accelerate's hooks, a norm is not fused with the read before it
        assert_close(outputs[0], expected[0])
        assert_close(outputs.depth_attentions[-1], expected.depth_attentions[-1])
        if name in ("layers", "depth attention too"):
            assert any(parameter.device.type == "meta" for parameter in loaded.parameters()), name
        if head is AutoModelForCausalLM:
            generated = loaded.generate(tokens(), max_new_tokens=3, do_sample=False, eos_token_id=None)
            assert torch.equal(generated, greedy_without_cache(model, tokens(), 3)), name


@torch.no_grad()
def test_cpu_and_disk_offload_of_accelerate(tmp_path):
    """accelerate's cpu_offload and disk_offload, which free each module's parameters after its forward, work."""
    from accelerate import cpu_offload, disk_offload

    expected = tiny_model()(tokens()).logits
    assert_close(cpu_offload(tiny_model(), execution_device="cpu")(tokens()).logits, expected)
    offloaded = disk_offload(tiny_model(), tmp_path, execution_device="cpu")
    assert_close(offloaded(tokens()).logits, expected)


def test_no_split():
    """A device map never cuts a layer, whose reads and writes belong together."""
    for model in (tiny_model(), tiny_model().model):
        assert type(model.base_model.layers[0]).__name__ in model._no_split_modules


# --- Compilation


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("mode, block_size", [("full", None), ("block", 1)])
def test_compiled_training_step(mode, block_size, fresh_compiler):
    """Loss and gradients compile into one graph and are those without."""
    model = tiny_model(attn_res_mode=mode, attn_res_block_size=block_size, num_hidden_layers=2)
    expected, gradients = loss_and_gradients(model, tokens(), use_cache=False)
    model.zero_grad()

    def loss_of(input_ids):
        return model(input_ids, labels=input_ids, use_cache=False).loss

    # the graphs are captured and differentiated; the inductor would spend a minute on C++
    loss = torch.compile(loss_of, fullgraph=True, backend="aot_eager")(tokens())
    loss.backward()
    assert_close(loss, expected.loss)
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, gradients[name], 1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_forward(fresh_compiler):
    """A forward compiles into one graph, here down to machine code, and gives the same numbers."""
    model = tiny_model(attn_res_block_size=1, num_hidden_layers=2)
    options = {"use_cache": False, "output_depth_attentions": True}
    expected = model(tokens(), **options)
    outputs = torch.compile(model, fullgraph=True)(tokens(), **options)
    assert_close(outputs.logits, expected.logits)
    assert_close(outputs.depth_attentions[-1], expected.depth_attentions[-1])


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["two_phase", pytest.param("cpp", marks=needs_compiler)])
@pytest.mark.parametrize("mode, block_size", [("block", 2), ("full", 1)])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_compiled_for_all_lengths(fresh_compiler, implementation, mode, block_size, with_gradients):
    """A second graph does for all further lengths of sequences, and each gives the same numbers."""
    options = {"attn_res_mode": mode, "attn_res_block_size": block_size, "num_hidden_layers": 4}
    model = tiny_model(**options, attn_res_implementation=implementation)
    counter, tolerance = CompileCounterWithBackend("aot_eager"), rounding(mode=mode, block_size=block_size)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.set_grad_enabled(with_gradients):
        for length in (40, 50, 64, 99):
            expected = model(tokens(2, length), use_cache=False).logits
            found = compiled(tokens(2, length), use_cache=False).logits
            assert_close(found, expected, tolerance.logits)
            if with_gradients:
                parameters = list(model.parameters())
                gradients = [torch.autograd.grad(x.square().sum(), parameters) for x in (found, expected)]
                for ours, theirs in zip(*gradients):
                    assert_close(ours, theirs, tolerance.gradients)
    assert counter.frame_count == 2


@torch.no_grad()
def test_compiled_decoding(fresh_compiler):
    """A compiled forward decodes with a static cache, with no more graphs than the donor needs."""
    generated, graphs = [], []
    donor = tiny_donor(num_hidden_layers=2)
    for model in (donor, attn_res_from_donor(donor, "block", 2)):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
        cache = StaticCache(config=model.config, max_cache_len=16)
        options = {**GENERATION, "do_sample": False, "past_key_values": cache, "disable_compile": True}
        generated.append(model.generate(tokens(2, 6), **options))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert torch.equal(generated[0], generated[1])
    assert graphs[0] == graphs[1] > 0


# --- Heads

HEADS = {
    "sequence": (AutoModelForSequenceClassification, {"labels": torch.tensor([0, 2, 1])}, "model"),
    "token": (AutoModelForTokenClassification, {"labels": tokens(3, 7, 6) % 3}, "model"),
    "question": (
        AutoModelForQuestionAnswering,
        {"start_positions": torch.tensor([0, 2, 1]), "end_positions": torch.tensor([3, 4, 6])},
        "transformer",
    ),
}


def head_logits(outputs) -> torch.Tensor:
    return outputs.logits if hasattr(outputs, "logits") else torch.stack([outputs.start_logits, outputs.end_logits])


@pytest.mark.parametrize("head", HEADS)
def test_heads(head, tmp_path):
    """Heads compute a loss, train, return depth weights, and survive a round trip to disk."""
    auto_class, labels, prefix = HEADS[head]
    model = tiny_model(auto_class=auto_class, num_labels=3, attn_res_block_size=2)
    assert "AttnRes" in type(model).__name__
    with torch.no_grad():
        outputs = model(tokens(), **labels, output_depth_attentions=True, output_hidden_states=True)
        assert outputs.loss > 0 and len(outputs.hidden_states) == 6
        assert [weights.shape[1] for weights in outputs.depth_attentions] == [
            model.config.num_depth_sources(row) for row in range(11)
        ]
        assert model(tokens()).get("depth_attentions") is None
        as_tuple = model(tokens(), output_depth_attentions=True, return_dict=False)
        assert torch.equal(as_tuple[-1][-1], outputs.depth_attentions[-1])
        model.save_pretrained(tmp_path)
        loaded = auto_class.from_pretrained(tmp_path)
        assert torch.equal(head_logits(loaded(tokens())), head_logits(outputs))

    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = model(tokens(), **labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert getattr(model, prefix).depth_attention.query[1:].any(dim=1).all()


@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_heads_are_the_donors(head):
    """With zero queries and the donor's tensors a head has the donor's outputs."""
    auto_class, labels, prefix = HEADS[head]
    donor = tiny_donor(auto_class=auto_class, num_labels=3)
    config = tiny_config(num_labels=3, attn_res_sum_scale=True, attn_res_block_size=2)
    model = auto_class.from_config(config).eval()
    missing, unexpected = model.load_state_dict(donor.state_dict(), strict=False)
    assert set(missing) == {f"{prefix}.depth_attention.query", f"{prefix}.depth_attention.key_norm"} and not unexpected
    expected, outputs = donor(tokens(), **labels), model(tokens(), **labels)
    assert relative_error(head_logits(outputs), head_logits(expected)) <= 3e-6
    assert_close(outputs.loss, expected.loss)


@pytest.mark.parametrize("head", ["sequence", "token"])  # Llama's question answering names its decoder otherwise
@torch.no_grad()
def test_heads_take_the_depth_attention_of_a_causal_model(head, tmp_path):
    """A head on a trained causal model keeps its tensors, depth attention included; only the head is new."""
    auto_class, _, prefix = HEADS[head]
    causal = tiny_model()
    causal.save_pretrained(tmp_path / "attnres")
    loaded, info = auto_class.from_pretrained(tmp_path / "attnres", num_labels=3, output_loading_info=True)
    tiny_donor().save_pretrained(tmp_path / "donor")
    _, donor_info = auto_class.from_pretrained(tmp_path / "donor", num_labels=3, output_loading_info=True)
    assert set(info["missing_keys"]) == set(donor_info["missing_keys"])
    base = getattr(loaded, prefix)
    for name, tensor in causal.model.state_dict().items():
        assert torch.equal(base.state_dict()[name], tensor), name


@torch.no_grad()
def test_donor_folder_without_a_configuration_of_ours(transformers_log, tmp_path):
    """A donor's folder loads straight into an AttnRes class, with a report that names what is new."""
    tiny_donor().to(torch.bfloat16).save_pretrained(tmp_path)
    model = AttnResForCausalLM.from_pretrained(tmp_path)
    assert type(model.config) is AttnResConfig
    assert model.config.attn_res_mode == "block" and not model.config.attn_res_sum_scale  # the paper's
    assert "depth_attention.query" in transformers_log.text and "depth_attention.key_norm" in transformers_log.text
    query, key_norm = model.model.depth_attention.query, model.model.depth_attention.key_norm
    assert not query.any() and (key_norm == 1).all()
    assert model.dtype == torch.bfloat16 and query.dtype == key_norm.dtype == torch.float32
    scaled = AttnResForCausalLM.from_pretrained(tmp_path, attn_res_sum_scale=True, dtype=torch.float32)
    donor = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert relative_error(scaled(tokens()).logits, donor(tokens()).logits) <= 3e-6


def test_base_model_of_a_causal_checkpoint(tmp_path):
    """AutoModel reads the decoder out of a causal checkpoint, and the other way round only the head is new."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "causal")
    base, info = AutoModel.from_pretrained(tmp_path / "causal", output_loading_info=True)
    assert type(base) is AttnResModel and not info["missing_keys"]
    assert torch.equal(base(tokens()).last_hidden_state, model.model(tokens()).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    causal, info = AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"}
    assert torch.equal(causal.model.depth_attention.query, model.model.depth_attention.query)


# --- Everyday use


def test_pickle():
    """Outputs survive pickle, models torch.save."""
    model = tiny_model()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    with torch.no_grad():
        outputs = model(tokens(), output_depth_attentions=True, output_hidden_states=True)
        assert torch.equal(again(tokens()).logits, outputs.logits)
    pickled = pickle.loads(pickle.dumps(outputs))
    assert type(pickled) is type(outputs)
    assert torch.equal(pickled.logits, outputs.logits)
    assert torch.equal(pickled.depth_attentions[-1], outputs.depth_attentions[-1])
    assert torch.equal(pickled.hidden_states[1], outputs.hidden_states[1])


def test_arguments_by_position():
    """Arguments may be given by position, as in the donor."""
    model, input_ids = tiny_model(), tokens()
    mask = torch.ones_like(input_ids)
    mask[0, 5:] = 0
    assert torch.equal(model(input_ids, mask).logits, model(input_ids, attention_mask=mask).logits)
    by_name = model.model(input_ids, attention_mask=mask).last_hidden_state
    assert torch.equal(model.model(input_ids, mask)[0], by_name)


def test_packed_sequences():
    """Positions that begin anew separate packed sequences, as in the donor."""
    model = tiny_model()
    first, second = tokens(1, 5), tokens(1, 4, seed=2)
    packed = torch.cat([first, second], dim=1)
    positions = torch.cat([torch.arange(5), torch.arange(4)])[None]
    logits = model(packed, position_ids=positions, use_cache=False).logits
    assert_close(logits[:, :5], model(first).logits)
    assert_close(logits[:, 5:], model(second).logits)


def test_selected_hidden_states():
    """Hidden states can be asked for by index, as in the donor."""
    model = tiny_model()
    every = model(tokens(), output_hidden_states=True).hidden_states
    selected = model(tokens(), output_hidden_states=[0, 3, -1]).hidden_states
    donors = tiny_donor()(tokens(), output_hidden_states=[0, 3, -1]).hidden_states
    assert [entry is None for entry in selected] == [entry is None for entry in donors]
    for entry, expected in zip(selected, every, strict=True):
        assert entry is None or torch.equal(entry, expected)


def test_parameters_added():
    """AttnRes adds (2L + 1) * 2 * d parameters, under two names, and no buffer."""
    donor, model = tiny_donor(), tiny_model()
    assert model.num_parameters() - donor.num_parameters() == (2 * 5 + 1) * 2 * 40
    new = set(model.state_dict()) - set(donor.state_dict())
    assert new == {"model.depth_attention.query", "model.depth_attention.key_norm"}
    assert set(donor.state_dict()) <= set(model.state_dict())
    assert {name for name, _ in model.named_buffers()} == {name for name, _ in donor.named_buffers()}
    assert model.model.depth_attention.query.shape == (11, 40)


def test_reinitialisation_keeps_loaded_weights():
    """`init_weights` on the meta device and a fresh model agree: queries zero, gains one, nothing left empty."""
    torch.manual_seed(0)
    fresh = AttnResForCausalLM(tiny_config())
    with torch.device("meta"):
        empty = AttnResForCausalLM(tiny_config())
    assert all(parameter.device.type == "meta" for parameter in empty.parameters())
    assert {n: (p.shape, p.dtype) for n, p in empty.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in fresh.named_parameters()
    }
    perturb(fresh)
    fresh.apply(fresh._init_weights)
    assert not fresh.model.depth_attention.query.any() and (fresh.model.depth_attention.key_norm == 1).all()
    std = fresh.model.layers[0].mlp.up_proj.weight.std().item()
    assert std == pytest.approx(COMMON["initializer_range"], rel=0.1)


def test_lora_with_depth_attention(tmp_path):
    """A LoRA adapter with depth attention trained in full learns, is saved, reloaded and merged with equal logits."""
    from peft import LoraConfig, PeftModel, get_peft_model

    tiny_model().save_pretrained(tmp_path / "base")
    adapter = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", modules_to_save=["depth_attention"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter)
    before = model.get_base_model().model.depth_attention.original_module.query.clone()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[-1] for name in trained if "depth_attention" in name} == {"query", "key_norm"}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    model.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(input_ids=tokens()).logits
        with model.disable_adapter():
            assert_close(model(input_ids=tokens()).logits, tiny_model()(tokens()).logits, 1e-6)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        reloaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert torch.equal(reloaded(input_ids=tokens()).logits, expected)
        merged = reloaded.merge_and_unload()
        assert type(merged) is AttnResForCausalLM
        assert not torch.equal(merged.model.depth_attention.query, before)
        assert_close(merged(tokens()).logits, expected)
        merged.save_pretrained(tmp_path / "merged")
        assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(tokens()).logits, expected)
        generated = merged.generate(tokens(), max_new_tokens=3, do_sample=False, eos_token_id=None)
        assert torch.equal(
            model.generate(input_ids=tokens(), max_new_tokens=3, do_sample=False, eos_token_id=None), generated
        )


def test_trainer(tmp_path):
    """Trainer, with autocast to bfloat16 and checkpointing, trains, evaluates, saves, and continues."""
    examples = [{"input_ids": ids, "labels": ids} for ids in tokens(8, 8)]

    def trainer(steps):
        options = {"max_steps": steps, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
        options |= {"bf16": True, "gradient_checkpointing": True, "use_cpu": True, "report_to": []}
        arguments = TrainingArguments(str(tmp_path), **options)
        return Trainer(tiny_model(), arguments, train_dataset=examples, eval_dataset=examples)

    first = trainer(4)
    before = first.evaluate()["eval_loss"]
    first.train()
    assert first.evaluate()["eval_loss"] < before
    query = first.model.model.depth_attention.query
    assert query.dtype == torch.float32
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert torch.equal(loaded.model.depth_attention.query, query)
    again = trainer(4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_close(again.model.model.depth_attention.query, query)


@torch.no_grad()
def test_export():
    """torch.export captures the model in one graph."""
    model = tiny_model(num_hidden_layers=2)
    exported = torch.export.export(model, (tokens(),), {"use_cache": False}).module()
    assert_close(exported(tokens(), use_cache=False).logits, model(tokens()).logits)


def test_plans_of_a_model():
    """Tensor and FSDP plans are the donor's, entry by entry; no pipeline plan is offered."""
    donor, model = tiny_donor(), tiny_model()
    assert model.tp_plan == donor.tp_plan and model.tp_plan
    assert model.fsdp_plan == donor.fsdp_plan and model.fsdp_plan
    assert donor.pp_plan and not model.pp_plan


# --- The interface of implementations and modes


def test_functions_are_wrapped_once(monkeypatch):
    """A function becomes an implementation where it is registered, in either way; an implementation stays itself."""
    monkeypatch.setattr(DepthAttentionInterface, "_global_mapping", dict(DepthAttentionInterface._global_mapping))
    two_phase, registry = TwoPhaseDepthAttention(), DepthAttentionInterface()
    DepthAttentionInterface.register("function", eager_depth_attention)
    DepthAttentionInterface.register("object", two_phase)
    registry["local"] = eager_depth_attention
    assert registry["object"] is two_phase and "local" not in ALL_DEPTH_ATTENTION_FUNCTIONS
    assert all(isinstance(registry[name], DepthAttentionImplementation) for name in registry)
    DepthAttentionInterface.register("again", registry["function"])
    assert registry["again"] is registry["function"]


def test_a_single_method_is_enough():
    """An implementation that has nothing but its call runs all reads of a model, as eager does."""
    calls = []

    class Single(DepthAttentionImplementation):
        def __call__(self, *args):
            calls.append(args)
            return eager_depth_attention(*args)

    model = tiny_model(attn_res_implementation="eager")
    expected = model(tokens(), output_depth_attentions=True)
    for module in model.modules():
        if isinstance(module, DepthRead):
            module.implementation = Single()
    outputs = model(tokens(), output_depth_attentions=True)
    assert torch.equal(outputs.logits, expected.logits) and len(calls) == model.config.num_depth_reads
    assert all(torch.equal(*pair) for pair in zip(outputs.depth_attentions, expected.depth_attentions))


def test_joined_sources():
    """One tensor more than there are sources is added to the one before; else all stay as they are."""
    sources = random_sources(4)
    assert all(a is b for a, b in zip(joined(list(sources), 4), sources, strict=True))
    first, second, total = joined(sources, 3)
    assert first is sources[0] and second is sources[1] and torch.equal(total, sources[2] + sources[3])
    mixed = joined((sources[0].bfloat16(), sources[1], sources[2].bfloat16()), 2)
    assert mixed[1].dtype == torch.bfloat16  # as under autocast


class TanhMixer(DepthMixer):
    """Blocks, mixed by tanh of one number for each read."""

    def __init__(self, config):
        super().__init__()
        self.number = torch.nn.Parameter(torch.empty(config.num_depth_reads, 1))

    def reset_parameters(self):
        torch.nn.init.constant_(self.number, 0.5)

    @staticmethod
    def implementation(config):
        return TanhMix()

    def forward(self):
        return self.number.float().clone()


class TanhMix(DepthAttentionImplementation):
    def __call__(self, sources, number, eps, scale):
        weights = number.tanh() ** torch.arange(len(sources), device=number.device)
        mixed = sum(weight * source.float() for weight, source in zip(weights, sources))
        return mixed.to(sources[0].dtype), weights[None, :, None].expand(len(mixed), -1, mixed.shape[1])


@pytest.mark.parametrize("sums_blocks", [True, False])
def test_another_mixer(sums_blocks, tmp_path, monkeypatch):
    """A mixer that is registered under a mode brings parameters and operator: it trains, is saved and is loaded."""
    for modes in (attnres.ATTN_RES_MODES, attnres.DEPTH_MIXERS):
        monkeypatch.setitem(modes, "tanh", None)  # removed afterwards
    attnres.register_depth_mixer("tanh", TanhMixer, sums_blocks)
    model = tiny_model(attn_res_mode="tanh")
    assert isinstance(model.model.depth_attention, TanhMixer)
    outputs = model(tokens(), labels=tokens(), output_depth_attentions=True)
    assert len(outputs.depth_attentions[-1][0]) == model.config.num_depth_sources(2 * model.config.num_hidden_layers)
    outputs.loss.backward()
    number = model.model.depth_attention.number
    assert number.grad[1:].count_nonzero() == len(number) - 1  # the first read has one source
    model.bfloat16().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.model.depth_attention.number, number) and number.dtype == torch.float32
    model.model.layers = model.model.layers[1:]
    assert len(model.model.depth_attention.number) == model.config.num_depth_reads - 2
