# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""What could go wrong without a word: norms that aren't Llama's, a later torch, activations near float32's limits."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from behaviours import Float64, assert_close, in_float64, loss_and_gradients
from families import relative_error, tiny_model, tokens
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import depth_attention_attnres
from attnres import ALL_DEPTH_ATTENTION_FUNCTIONS, TwoPhaseDepthAttention, eager_depth_attention
from attnres_kernels.fused import depth_step
from depth_attention_attnres import NOTHING_READ, can_fuse_norm, fused_rms_norm


IMPLEMENTATIONS = sorted({"two_phase", "cpp"} & set(ALL_DEPTH_ATTENTION_FUNCTIONS))
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


# --- Norms that may be fused


class OtherFormula(LlamaRMSNorm):
    """The same code but for what it calls."""

    def forward(self, hidden_states):
        return super().forward(hidden_states)


class SquareRoot(nn.Module):
    """The same numbers from other code."""

    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(hidden_size)), eps

    def forward(self, inputs):
        values = inputs.float()
        rms = (values.square().sum(-1, keepdim=True) / values.shape[-1] + self.variance_epsilon).sqrt()
        return (values / rms).type_as(inputs) * self.weight


class FromOne(LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states) + hidden_states


class WithOffset(LlamaRMSNorm):
    offset = 0

    def forward(self, hidden_states):
        return super().forward(hidden_states) + self.offset


class WithRareOffset(LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states) + getattr(self, "offset", 0)


class CastLast(LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states.float()).to(hidden_states.dtype)


class NotInFloat32(LlamaRMSNorm):
    def forward(self, hidden_states):
        rms = (hidden_states.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt()
        return self.weight * (hidden_states / rms)


class EpsilonOutside(LlamaRMSNorm):
    def forward(self, hidden_states):
        rms = hidden_states.float().square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon
        return self.weight * (hidden_states.float() / rms).to(hidden_states.dtype)


class OtherGradient(LlamaRMSNorm):
    def forward(self, hidden_states):
        values = hidden_states.float()
        rms = (values.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt().detach()
        return self.weight * (values / rms).to(hidden_states.dtype)


class OnlyInEvaluation(LlamaRMSNorm):
    def forward(self, hidden_states):
        return hidden_states if self.training else super().forward(hidden_states)


class OtherCall(LlamaRMSNorm):
    def __call__(self, hidden_states):
        return 2 * super().__call__(hidden_states)


class Raises(LlamaRMSNorm):
    def forward(self, hidden_states):
        raise NotImplementedError


@pytest.mark.parametrize("norm_class", [LlamaRMSNorm, MistralRMSNorm, Qwen3RMSNorm, OtherFormula, SquareRoot])
def test_norms_that_are_fused(norm_class):
    """They compute what Llama's does, whatever their name and code."""
    assert can_fuse_norm(norm_class(8))


OTHERS = [
    FromOne,
    WithOffset,
    WithRareOffset,
    CastLast,
    NotInFloat32,
    EpsilonOutside,
    OtherGradient,
    OnlyInEvaluation,
    OtherCall,
    Raises,
    Gemma2RMSNorm,
    GptOssRMSNorm,
    nn.RMSNorm,
    nn.LayerNorm,
    nn.Identity,
]


@pytest.mark.parametrize("norm_class", OTHERS, ids=lambda norm_class: norm_class.__name__)
def test_norms_that_are_not_fused(norm_class):
    if torch.__version__.startswith("2.12.") and norm_class is OtherGradient:
        pytest.skip("gradients aren't tried")
    assert not can_fuse_norm(norm_class(8))


def test_a_norm_that_is_not_as_its_class():
    """Hooks, parametrizations, a forward or an offset of its own."""
    hidden_states = torch.randn(3, 40, 8)
    norms = [LlamaRMSNorm(8) for _ in range(5)]
    norms[0].register_forward_hook(lambda module, args, output: 2 * output)
    norms[1].register_forward_pre_hook(lambda module, args: (1 + args[0],))
    norms[2].register_full_backward_hook(lambda module, grads, _: (2 * grads[0],))
    norms[3].forward = lambda hidden_states: 2 * hidden_states
    nn.utils.parametrize.register_parametrization(norms[4], "weight", nn.Softplus())
    for norm in norms:
        assert torch.equal(fused_rms_norm(norm, hidden_states), norm(hidden_states))
    assert not any(map(can_fuse_norm, norms[:4]))
    # a plain one first: what is found of its class must not count
    assert not can_fuse_norm(WithOffset(8))
    norm = WithOffset(8)
    norm.offset = 1
    assert torch.equal(fused_rms_norm(norm, hidden_states), norm(hidden_states))


def from_one(self, hidden_states):
    values = hidden_states.to(torch.float32)
    values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return (1 + self.weight) * values.to(hidden_states.dtype)


@implementations
def test_another_norm_in_llamas_place(implementation, monkeypatch):
    """A transformers whose LlamaRMSNorm has another formula: as eager, in many tokens, few and one, and in gradients.

    The class has been tried before it changes.
    """
    model = tiny_model(attn_res_implementation=implementation)
    assert can_fuse_norm(model.model.norm)
    before = model(tokens(2, 40)).logits
    monkeypatch.setattr(LlamaRMSNorm, "forward", from_one)
    eager = tiny_model(attn_res_implementation="eager")
    (outputs, gradients), (expected, expected_gradients) = (
        loss_and_gradients(m, tokens(2, 40)) for m in (model, eager)
    )
    assert relative_error(before, expected.logits) > 0.1
    assert_close(outputs.logits, expected.logits, 1e-4)
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name], 2e-3)
    with torch.no_grad():
        for shape in ((2, 40), (2, 3), (1, 1)):
            assert_close(model(tokens(*shape)).logits, eager(tokens(*shape)).logits, 1e-4)


def fresh(norm: nn.Module) -> bool:
    depth_attention_attnres.computes_plain_rms_norm.cache_clear()
    return can_fuse_norm(norm)


def test_norms_are_tried_apart_from_what_is_going_on():
    """Neither modes nor transforms change what is found, and the trial leaves no trace: no random number, no grad."""
    norm, hidden_states = LlamaRMSNorm(8), torch.randn(2, 3, 8)
    state, grad_mode = torch.get_rng_state(), torch.is_grad_enabled()
    found = [fresh(norm)]
    with torch.device("meta"), torch.no_grad():
        found.append(fresh(LlamaRMSNorm(8)))
    with torch.inference_mode():
        found.append(fresh(norm))
    with torch.autocast("cpu", torch.bfloat16):
        found.append(fresh(norm))
    with Float64():
        found.append(fresh(norm))
    torch.vmap(lambda row: found.append(fresh(norm)) or row)(hidden_states)
    torch.func.grad(lambda rows: found.append(fresh(norm)) or rows.sum())(hidden_states)
    with torch._subclasses.FakeTensorMode():
        found.append(fresh(norm))
    torch.set_default_dtype(torch.float64)
    try:
        found.append(fresh(norm))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(found) and len(found) == 9
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled() == grad_mode
    assert norm.weight.grad is None


@pytest.mark.parametrize("norm_class", [LlamaRMSNorm, WithOffset])
def test_norms_are_tried_when_compiled(norm_class):
    """The compiler takes what is found as a constant."""
    depth_attention_attnres.computes_plain_rms_norm.cache_clear()
    torch._dynamo.reset()
    norm = norm_class(8)
    run = torch.compile(lambda x: norm(x) if can_fuse_norm(norm) else -norm(x), backend="eager", fullgraph=True)
    hidden_states = torch.randn(2, 8)
    sign = 1 if norm_class is LlamaRMSNorm else -1
    assert_close(run(hidden_states), sign * norm(hidden_states))


def test_norms_are_tried_once(monkeypatch):
    """One trial per class; a forward costs no more."""
    tried = []
    error = depth_attention_attnres.error_as_plain_rms_norm
    monkeypatch.setattr(depth_attention_attnres, "error_as_plain_rms_norm", lambda c: tried.append(c) or error(c))
    depth_attention_attnres.computes_plain_rms_norm.cache_clear()
    model = tiny_model(attn_res_implementation="two_phase")
    for shape in ((2, 40), (1, 1), (2, 40)):
        model(tokens(*shape))
    assert tried == [LlamaRMSNorm]


# --- A torch or transformers without one of their private names

FOLDER = Path(depth_attention_attnres.__file__).parent
KERNELS = FOLDER / "attnres_kernels"
MODULES = {  # by name, each after those that it imports
    **{
        name: FOLDER / f"{name}.py"
        for name in ("configuration_attnres", "depth_attention_attnres", "depth_mixers_attnres", "modeling_attnres")
    },
    **{name: KERNELS / f"{name}.py" for name in ("fused", "cpu")},
}
# of one underscore before and none after them; private modules of C++ too
PRIVATE = re.compile(r"(?<![\w])_[A-Za-z]\w*(?<!_)\b")


def private_names() -> list[str]:
    """Names that begin with an underscore, in code or strings, and that the modules don't define themselves."""
    used, own = set(), set()
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                used.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
                used.update(PRIVATE.findall(node.value))
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
    return sorted(name for name in used - own if PRIVATE.fullmatch(name))


def test_private_names_are_found():
    """The scan sees attributes and the strings of getattr: it finds those that are known to be there."""
    known = {
        "_is_exporting_flag",
        "_current_level",
        "_functorch",
        "_len_torch_dispatch_stack",
        "_forward_hooks",
        "_apply",
    }
    assert known <= set(private_names())


@pytest.fixture
def modules_without(tmp_path, monkeypatch):
    """Copies of the modules that look for another name, as if torch and transformers no longer had this one."""

    def copy(name: str):
        package = f"without{name}"
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
        shutil.copy(KERNELS / "cpu.cpp", tmp_path / package)
        for module, path in MODULES.items():
            text = re.sub(rf"(?<!\w){name}\b", f"{name}_has_gone", path.read_text())
            own = rf"^from (?:attnres_kernels\.)?({'|'.join(MODULES)}) import"
            text = re.sub(own, r"from .\1 import", text, flags=re.MULTILINE)
            (tmp_path / package / f"{module}.py").write_text(text.replace('"attnres::', f'"{package}::'))
        monkeypatch.syspath_prepend(tmp_path)
        return [importlib.import_module(f"{package}.{module}") for module in MODULES]

    yield copy
    for name in [name for name in sys.modules if name.startswith("without_")]:
        del sys.modules[name]


@pytest.mark.parametrize("name", private_names())
def test_without_a_private_name(name, modules_without):
    """Forward, backward and decoding work in a torch or transformers without it, and what changes is speed alone."""
    configuration, operator, _, modeling, fused, kernels = modules_without(name)
    if kernels.compiler() is not None:
        attention = fused.FusedDepthAttention(kernels.CPP_KERNELS)
        operator.DepthAttentionInterface.register("cpp", attention)
        assert fused.works_on(torch.device("cpu"))
    reference = tiny_model(attn_res_implementation="eager")
    fields = reference.config.to_dict()
    for implementation in IMPLEMENTATIONS:
        config = configuration.AttnResConfig(**{k: v for k, v in fields.items() if k != "model_type"})
        model = modeling.AttnResForCausalLM(config, attn_res_implementation=implementation).eval()
        model.load_state_dict(reference.state_dict())
        outputs, gradients = loss_and_gradients(model, tokens(2, 40))
        expected, expected_gradients = loss_and_gradients(reference, tokens(2, 40))
        assert_close(outputs.logits, expected.logits, 1e-4)
        for key, gradient in gradients.items():
            assert_close(gradient, expected_gradients[key], 2e-3)
        model.eval(), reference.eval()
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        generated = [m.generate(tokens(1, 5), **options) for m in (model, reference)]
        assert torch.equal(*generated)


@pytest.mark.parametrize("name", ["_functorch", "_current_level"])
@torch.no_grad()
def test_transforms_without_a_private_name(name, modules_without):
    """What is batched or differentiated forward is noticed without these names as with them."""
    operator = modules_without(name)[1]
    found = [operator.is_transformed()]
    torch.vmap(lambda row: found.append(operator.is_transformed()) or row)(torch.zeros(2))
    torch.func.grad(lambda x: found.append(operator.is_transformed()) or x)(torch.zeros(()))
    with torch.autograd.forward_ad.dual_level():
        found.append(operator.is_transformed())
    with torch.inference_mode():
        found.append(operator.is_transformed())
    assert found == [False, True, True, True, False]


@pytest.mark.parametrize("name", ["", "_is_exporting_flag"], ids=["as it is", "without the name"])
def test_exporting_without_a_private_name(name, modules_without):
    """Export is told from compilation."""
    operator = modules_without(name)[1] if name else depth_attention_attnres
    if name and torch.__version__ < "2.12":
        pytest.skip("torch.compile counts as export by its public name")

    class Told(nn.Module):
        def forward(self, inputs):
            return inputs + 1 if operator.is_exporting() else inputs - 1

    torch._dynamo.reset()
    inputs = torch.zeros(2)
    assert torch.equal(torch.compile(Told(), backend="eager", fullgraph=True)(inputs), inputs - 1)
    assert torch.equal(torch.export.export(Told(), (inputs,)).module()(inputs), inputs + 1)
    assert not operator.is_exporting()


# --- Huge and tiny activations

# Squares of 64 numbers of this size are still less than 3e38. From about 1e14 on, PyTorch's own gradients of a norm,
# and so those of eager and of a donor, are wrong: they take the cube of an inverse. A float64 reference needs its norms
# in float64 too.
SIZES = [1e-18, 1e-12, 1e-6, 1.0, 1e6, 1e12, 1e15, 1e16, 1e18]


def two_phases(attention):
    def read(sources, product, eps, scale):
        closed_read = attention.phase_1(sources[:2], torch.stack([product.flip(0), product]), eps)[1]
        return attention.merge(closed_read, sources, product, eps, scale)[0]

    return read


def one_phase(attention):
    return lambda sources, *args: attention.merge(NOTHING_READ, sources, *args)[0]


def plain_sum(sources, product, eps, scale):
    """The first source and the sum of two others."""
    return eager_depth_attention((sources[0], sources[1] + sources[2]), product, eps, scale)[0]


def step(sources, product, eps, scale):
    return depth_step(sources[1], sources[2], sources[0], None, product, eps, scale, return_hidden=True).hidden


def plain_read(*args):
    return eager_depth_attention(*args)[0]


READS = {"one phase": (one_phase, plain_read), "two phases": (two_phases, plain_read)}
CASES = {f"{name}, {way}": (READS[way][0](ALL_DEPTH_ATTENTION_FUNCTIONS[name]), plain_read)
         for name in IMPLEMENTATIONS for way in READS}  # fmt: skip
if "cpp" in IMPLEMENTATIONS:
    CASES["cpp, step"] = (step, plain_sum)


@pytest.mark.parametrize("gradient", [1.0, 1e-6], ids=["sum", "mean"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_reads_of_any_size(case, size, gradient):
    """A read and all its gradients are those in float64, also where squares of inverses are less than float32 has."""
    generator = torch.Generator().manual_seed(0)
    tensors = [size * torch.randn(2, 40, 64, generator=generator) for _ in range(4)]
    tensors.append(torch.randn(64, generator=generator))
    # as a norm after the read and a mean over many tokens make it
    grad = torch.randn(2, 40, 64, generator=generator) * gradient / size
    function, formula = CASES[case]

    def results(function, dtype):
        *sources, product = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        mixed = function(tuple(sources), product, 1e-6, 3.0)
        return [mixed, *torch.autograd.grad(mixed, [*sources, product], grad.to(dtype), allow_unused=True)]

    for found, expected in zip(results(function, torch.float32), results(formula, torch.float64), strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            assert_close(found, expected, 1e-5)


TRITON = """
import sys
import torch
from attnres import eager_depth_attention
from attnres_kernels.fused import KERNELS, closed_reads
from attnres_kernels import triton_kernels

assert KERNELS["cpu"].name == "triton"
if sys.argv[1] == "tiles":
    triton_kernels._held_tiles = lambda *arguments: None
generator = torch.Generator().manual_seed(0)
tensors = [size * torch.randn(1, 5, 64, generator=generator) for size in (1e18, 1e18, 1e18)]
tensors.append(torch.randn(2, 64, generator=generator))
grad = 1e-24 * torch.randn(2, 1, 5, 64, generator=generator)

def results(function, dtype):
    leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    mixed = torch.stack(function(leaves[:-1], leaves[-1]))
    return [mixed, *torch.autograd.grad(mixed, leaves, grad.to(dtype))]

found = results(lambda sources, products: closed_reads(sources, products, 1e-6)[0], torch.float32)
exact = results(lambda sources, rows: [eager_depth_attention(sources, row, 1e-6, 1)[0] for row in rows], torch.float64)
for a, b in zip(found, exact, strict=True):
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()
"""


@pytest.mark.parametrize("kernels", ["held", "tiles"])
def test_triton_reads_of_huge_sources(kernels):
    """The kernels for GPUs, in Triton's interpreter."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", TRITON, kernels], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@implementations
@pytest.mark.parametrize("size", [1e-16, 1e-8, 1e8, 1e14, 1e16])
def test_embeddings_of_any_size(implementation, size):
    """A whole model's logits and the gradient of its embeddings are those in float64."""
    model = tiny_model(attn_res_implementation=implementation, attn_res_block_size=2)
    exact = in_float64(model)
    exact.set_attn_res_implementation("eager")
    embeds = size * torch.randn(2, 40, model.config.hidden_size, generator=torch.Generator().manual_seed(0))

    def results(model, dtype):
        inputs = embeds.to(dtype).requires_grad_()
        logits = model(inputs_embeds=inputs, use_cache=False).logits
        return logits, *torch.autograd.grad(logits.logsumexp(-1).mean(), inputs)

    with Float64():
        expected = results(exact, torch.float64)
    for value, expected_value in zip(results(model, torch.float32), expected, strict=True):
        assert_close(value, expected_value, 1e-4)


@implementations
def test_beyond_the_range(implementation):
    """Where squares are more than float32 has, all implementations see what eager sees: a source without a score."""
    sources = [torch.full((2, 40, 64), 1e20), torch.ones(2, 40, 64)]
    product = torch.linspace(-1, 2, 64)
    expected, expected_weights = eager_depth_attention(sources, product, 1e-6, 1)
    found, weights = TwoPhaseDepthAttention().merge(NOTHING_READ, sources, product, 1e-6, 1)
    if implementation == "cpp":
        found, weights = ALL_DEPTH_ATTENTION_FUNCTIONS["cpp"](sources, product, 1e-6, 1)
    assert_close(weights, expected_weights)
    assert_close(found, expected)
