# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Decoders of transformers whose residual stream is replaced by attention over depth.

Attention Residuals (Kimi Team, arXiv 2603.15031): every sublayer, attention or MLP, reads a softmax-weighted mix of the
embedding and of what the sublayers before it wrote, instead of their plain sum. Everything that is not the residual
stream is the donor family's own code, imported from transformers.
"""

import inspect
import itertools
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, reduce, wraps
from pathlib import Path

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    ModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3ForCausalLM,
    DeepseekV3Model,
)
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer, Gemma2ForCausalLM, Gemma2Model
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer, Gemma3ForCausalLM, Gemma3TextModel
from transformers.models.glm4.modeling_glm4 import Glm4DecoderLayer, Glm4ForCausalLM, Glm4Model
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer, GptOssForCausalLM, GptOssModel
from transformers.models.granite.modeling_granite import GraniteDecoderLayer, GraniteForCausalLM, GraniteModel
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralForCausalLM, MistralModel
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer, MixtralForCausalLM, MixtralModel
from transformers.models.olmo.modeling_olmo import OlmoDecoderLayer, OlmoForCausalLM, OlmoModel
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer, Phi3ForCausalLM, Phi3Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM, Qwen3Model
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer, Qwen3MoeForCausalLM, Qwen3MoeModel
from transformers.models.smollm3.modeling_smollm3 import SmolLM3DecoderLayer, SmolLM3ForCausalLM, SmolLM3Model
from transformers.models.starcoder2.modeling_starcoder2 import (
    Starcoder2DecoderLayer,
    Starcoder2ForCausalLM,
    Starcoder2Model,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import GeneralInterface, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs


try:
    from transformers.models.kimi_linear.modeling_kimi_linear import (
        KimiLinearDecoderLayer,
        KimiLinearForCausalLM,
        KimiLinearModel,
    )
except ImportError:  # an older transformers
    KimiLinearModel = None

try:
    from .configuration_attnres import *  # noqa: F403
    from .configuration_attnres import (
        AttnResConfig,
        __getattr__,  # noqa: F401
    )
    from .configuration_attnres import __all__ as CONFIG_CLASSES
except ImportError:
    if __package__:  # loaded from the Hub: the relative import must work, so the error is real
        raise
    from configuration_attnres import *  # noqa: F403
    from configuration_attnres import (
        AttnResConfig,
        __getattr__,  # noqa: F401
    )
    from configuration_attnres import __all__ as CONFIG_CLASSES


def eager_depth_attention(
    sources: tuple[torch.Tensor, ...], product: torch.Tensor, eps: float, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One read, `h = scale * sum_i softmax_i(w . RMSNorm_g(v_i)) v_i` (Kimi Team, arXiv 2603.15031).

    Scores, softmax and sums are computed in float32 (float64 for float64 sources) whatever the sources' dtype, also
    under autocast, and cast once at the end. There is no division by sqrt(hidden). The root mean square of
    float32 sources may be 1e19 / sqrt(hidden), as they are squared; for gradients, 1e13, as PyTorch's derivative of
    `rsqrt` takes a cube, which other implementations avoid.

    Args:
        sources: num_sources tensors `(batch, seq, hidden)`, the values v_i.
        product: `(hidden,)`, the read's query w times its key norm gain g; the two only enter as this product.
        eps: epsilon of the RMSNorm of the keys.
        scale: factor of the result.

    Returns:
        The mix `(batch, seq, hidden)` in the dtype of the first source, and the weights `(batch, num_sources, seq)`.
    """
    dtype = torch.promote_types(sources[0].dtype, torch.float32)
    values = [source.to(dtype) for source in sources]
    product = product.to(dtype)
    # not a matmul, which autocast would round
    scores = [(v * product).sum(-1) * torch.rsqrt(v.pow(2).mean(-1) + eps) for v in values]
    weights = torch.stack(scores, dim=1).softmax(dim=1)  # (batch, num_sources, seq)
    mixed = sum(weight.unsqueeze(-1) * v for weight, v in zip((weights * scale).unbind(1), values))
    return mixed.to(sources[0].dtype), weights


def to_inverse_rms_(norms: torch.Tensor, hidden: int, eps: float) -> torch.Tensor:
    """Turns the Euclidean norms of vectors of `hidden` numbers into one over their root mean squares, in place."""
    return norms.square_().div_(hidden).add_(eps).rsqrt_()


def rms_norm_forward(
    hidden_states: torch.Tensor, weight: torch.Tensor, eps: float, in_place: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Llama's RMSNorm in few passes over memory, and the inverse root mean squares that its backward pass takes."""
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    norms = torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True, dtype=dtype)
    inverse_rms = to_inverse_rms_(norms, hidden_states.shape[-1], eps)
    normed = hidden_states.mul_(inverse_rms) if in_place else (hidden_states * inverse_rms).to(hidden_states.dtype)
    return normed.mul_(weight) if normed.dtype == weight.dtype else normed * weight, inverse_rms


def rms_norm_backward(
    grad: torch.Tensor, hidden_states: torch.Tensor, weight: torch.Tensor, inverse_rms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients by `hidden_states`, in the dtype of `inverse_rms`, and by `weight`."""
    hidden, dtype = hidden_states.shape[-1], inverse_rms.dtype
    grad = grad.to(dtype)
    normed = hidden_states * inverse_rms
    products = (grad * normed).view(-1, hidden)
    weight_grad = products.sum(0).to(weight.dtype)
    projection = torch.mv(products, weight.to(dtype)).view(inverse_rms.shape).div_(hidden)
    return (grad * weight).addcmul_(normed, projection, value=-1).mul_(inverse_rms), weight_grad


class RMSNormFunction(torch.autograd.Function):
    """Llama's RMSNorm, which saves little besides its input."""

    @staticmethod
    def forward(ctx, hidden_states, weight, eps):
        normed, inverse_rms = rms_norm_forward(hidden_states, weight, eps)
        ctx.save_for_backward(hidden_states, weight, inverse_rms)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden_states, *others = ctx.saved_tensors
        input_grad, weight_grad = rms_norm_backward(grad, hidden_states, *others)
        return input_grad.to(hidden_states.dtype), weight_grad, None


class DepthAttentionFunction(torch.autograd.Function):
    """Several reads of the same sources; each may start from what it has read of other sources before.

    Saves a few numbers per token, read and source, and computes everything else again in the backward pass.

    Args of `apply`:
        products: `(num_reads, hidden)`.
        eps, scale: as in [`eager_depth_attention`]; eps may be a tensor.
        before: None, or for a single read the mix `(batch, seq, hidden)` of the sources before, not scaled.
        before_lse: None, or `(batch, seq)`, the logarithm of the sum of the exponentials of their scores.
        norm_weight: None, or for a single read `(hidden,)`, the gain of the RMSNorm that follows, whose result is
            returned instead of the mix.
        norm_eps: its epsilon.
        sources: num_sources tensors `(batch, seq, hidden)`.

    Returns:
        The logarithm of the sum of the exponentials of all scores `(num_reads, batch, seq)`; the weights `(num_reads,
        num_sources, batch, seq)`, with the sources before as one more, the first; mixes `(batch, seq, hidden)`.
    """

    @staticmethod
    def forward(ctx, *arguments):
        # named in the signature, torch.compile without gradients would drop one if there are exactly two sources
        products, eps, scale, before, before_lse, norm_weight, norm_eps, *sources = arguments
        dtype, hidden = products.dtype, products.shape[-1]
        norms = torch.stack([torch.linalg.vector_norm(v, dim=-1, dtype=dtype) for v in sources])
        inverse_rms = to_inverse_rms_(norms, hidden, eps)  # (num_sources, batch, seq)
        with torch.autocast(products.device.type, enabled=False):
            # (num_sources, batch, seq, num_reads); products @ v.T would take twice as long on a CPU
            scores = torch.stack([nn.functional.linear(v.to(dtype), products) for v in sources])
        scores = scores.movedim(-1, 0).contiguous().mul_(inverse_rms)
        all_scores = scores if before is None else torch.cat([before_lse[None, None], scores], dim=1)
        lse = all_scores.logsumexp(1)
        weights = (all_scores - lse.unsqueeze(1)).exp()
        mixed = mixes(sources if before is None else (before, *sources), weights, scale)
        norm_inverse_rms = None
        if norm_weight is not None:
            mixed[0], norm_inverse_rms = rms_norm_forward(mixed[0].to(sources[0].dtype), norm_weight, norm_eps)
        ctx.save_for_backward(products, scores, inverse_rms, weights, before, norm_weight, norm_inverse_rms, *sources)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        if torch.compiler.is_compiling():  # torch 2.11 loses the gradients of results that were changed in place
            mixed = [read.clone() for read in mixed]
        return lse, weights, *mixed

    @staticmethod
    @once_differentiable
    def backward(ctx, lse_grad, weights_grad, *mixed_grads):
        products, scores, inverse_rms, weights, before, norm_weight, norm_inverse_rms, *sources = ctx.saved_tensors
        dtype = products.dtype
        all_sources = sources if before is None else (before, *sources)
        norm_weight_grad = None
        if norm_weight is not None and mixed_grads[0] is not None:
            (mixed,) = mixes(all_sources, weights, ctx.scale)  # again
            grad, norm_weight_grad = rms_norm_backward(
                mixed_grads[0], mixed.to(sources[0].dtype), norm_weight, norm_inverse_rms
            )
            mixed_grads = (grad,)
        reads = [(read, grad.to(dtype)) for read, grad in enumerate(mixed_grads) if grad is not None]
        # of the loss by the weights, then by the scores
        grads = torch.zeros_like(weights) if weights_grad is None else weights_grad.clone()
        for source, values in enumerate(all_sources):
            values = values.to(dtype)
            for read, grad in reads:
                grads[read, source].add_((grad * values).sum(-1), alpha=ctx.scale)
        grads = weights * (grads - (weights * grads).sum(1, keepdim=True))
        if lse_grad is not None:
            grads.addcmul_(weights, lse_grad.unsqueeze(1))
        before_grad = before_lse_grad = None
        if before is not None:
            before_lse_grad, grads = grads[0, 0], grads[:, 1:]
            if reads:  # a single one; without it, the loss depends on the weights alone
                before_grad = reads[0][1] * (weights[0, 0] * ctx.scale).unsqueeze(-1)
            weights = weights[:, 1:]
        needed = ctx.needs_input_grad[7:]
        product_grad, source_grads = gradients_by_scores(grads, scores, inverse_rms, products, sources, needed)
        for source, source_grad in enumerate(source_grads):
            if source_grad is not None:
                for read, grad in reads:
                    source_grad.addcmul_(grad, (weights[read, source] * ctx.scale).unsqueeze(-1))
                source_grads[source] = source_grad.to(sources[source].dtype)
        return product_grad, None, None, before_grad, before_lse_grad, norm_weight_grad, None, *source_grads


def constant(number: float, like: torch.Tensor) -> float | torch.Tensor:
    """A number as `torch.compile(dynamic=True)`, for which it is a variable, takes it in a function of its own."""
    return like.new_full((), number) if torch.compiler.is_compiling() else number


def mixes(sources, weights: torch.Tensor, scale: float) -> list[torch.Tensor]:
    """For each read, `scale` times the sum of the sources by `weights` `(num_reads, num_sources, batch, seq)`."""
    mixed = [None] * len(weights)
    for values, value_weights in zip(sources, weights.unbind(1)):
        values = values.to(weights.dtype)
        for read, weight in enumerate((value_weights * scale).unsqueeze(-1)):
            mixed[read] = values * weight if mixed[read] is None else mixed[read].addcmul_(values, weight)
    return mixed


def gradients_by_scores(
    grads: torch.Tensor, scores: torch.Tensor, inverse_rms: torch.Tensor, products: torch.Tensor, sources, needed
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """What a loss's gradients by the scores, `grads`, add to those by what the scores are made of.

    Args:
        grads, scores: `(num_reads, num_sources, batch, seq)`.
        inverse_rms: `(num_sources, batch, seq)`, of the sources, with the epsilon.
        products: `(num_reads, hidden)`.
        sources: num_sources tensors `(batch, seq, hidden)`.
        needed: for each source, whether its gradient is needed.

    Returns:
        Gradients by `products`; by the sources in the products' dtype, None where it isn't needed.
    """
    dtype, hidden = products.dtype, products.shape[-1]
    # the square of an inverse vanishes where sources are huge, so it is multiplied by 2^40 until the last operation
    by_value = (grads * scores).sum(0).mul_((inverse_rms * 2.0**20).square()).div_(-hidden).unsqueeze(-1)
    by_product = (grads * inverse_rms).flatten(2)  # (num_reads, num_sources, batch * seq)
    product_grad, source_grads = torch.zeros_like(products), [None] * len(sources)
    with torch.autocast(products.device.type, enabled=False):
        for source, values in enumerate(sources):
            values = values.to(dtype)
            product_grad += by_product[:, source] @ values.reshape(-1, hidden)
            if needed[source]:
                source_grads[source] = (values * by_value[source]).contiguous()
                source_grads[source].view(-1, hidden).addmm_(by_product[:, source].T, products, beta=2.0**-40)
    return product_grad, source_grads


@dataclass
class ClosedDepthRead:
    """What a read gets from the sources that are closed when its block opens.

    Not a tuple, so that wrappers which cast a layer's tensors, as FSDP does, leave it in float32.
    """

    mixed: torch.Tensor  # (batch, seq, hidden)
    lse: torch.Tensor | None  # (batch, seq); None for a single source whose score is left to what merges it
    weights: torch.Tensor | None  # (batch, num_sources, seq)
    num_sources: int

    def to(self, device, non_blocking: bool = False) -> "ClosedDepthRead":
        tensors = (self.mixed, self.lse, self.weights)
        moved = (None if tensor is None else tensor.to(device, non_blocking=non_blocking) for tensor in tensors)
        return ClosedDepthRead(*moved, self.num_sources)


def plain_rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Llama's RMSNorm as it can be fused: in float32, cast before the weight is applied."""
    values = hidden_states.to(torch.float32)
    values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
    return weight * values.to(hidden_states.dtype)


def error_as_plain_rms_norm(norm_class: type) -> float:
    """How far a norm that has nothing but a weight and an epsilon is from [`plain_rms_norm`], 1 standing for far off.

    Compares dtypes, values and, in float32, gradients.
    """
    used = set()

    class Recorded(norm_class):
        def __getattribute__(self, name):
            used.add(name)
            return super().__getattribute__(name)

    norm = object.__new__(Recorded)
    nn.Module.__init__(norm)
    known = {"weight", "variance_epsilon", *dir(nn.Module())}
    norm.variance_epsilon = 0.03
    numbers = torch.arange(192, dtype=torch.float32, device="cpu").view(3, 64)
    values = numbers.sin() * torch.tensor([[0.02], [1.0], [500.0]], device="cpu")  # eps counts, or squares in float16
    weight, grad = 1.5 + (2 * numbers[0]).cos(), (3 * numbers).cos()
    dtypes, errors = (torch.float32, torch.bfloat16, torch.float16), []
    with torch.enable_grad():
        for training, dtype, weight_dtype in itertools.product((False, True), dtypes, dtypes):
            norm.train(training)
            norm.weight = nn.Parameter(weight.to(weight_dtype))
            inputs = values.to(dtype).requires_grad_()
            found, expected = norm(inputs), plain_rms_norm(inputs, norm.weight, norm.variance_epsilon)
            if found.dtype != expected.dtype or found.shape != expected.shape:
                return 1.0
            pairs = [(found, expected)]
            # torch 2.12 aborts some processes if a thread has computed gradients and ended
            if dtype == weight_dtype == torch.float32 and not torch.__version__.startswith("2.12."):
                leaves = (inputs, norm.weight)
                pairs += zip(*(torch.autograd.grad(result, leaves, grad) for result in (found, expected)))
            for value, expected_value in pairs:
                difference = (value.float() - expected_value.float()).abs()
                # of rounded values few may differ, and those by little
                errors.append(difference.gt(1e-5 * expected_value.float().abs() + 1e-6).float().mean().item())
                errors.append((difference.max() / expected_value.float().abs().max()).item())
    # what else it looks at could differ from one norm to the next
    return max(errors) if used <= known else 1.0


@cache
def computes_plain_rms_norm(norm_class: type, forward: Callable) -> bool:
    """Whether norms of a class, whose `forward` this is, compute Llama's RMSNorm, as those of many families do.

    They are tried, as neither a name nor code says what a later transformers, or who has replaced it, computes.
    """
    if not issubclass(norm_class, nn.Module) or issubclass(norm_class, torch.jit.ScriptModule):
        return False
    try:
        with ThreadPoolExecutor(1) as thread:  # without the modes, hooks and gradients of what is going on here
            return thread.submit(error_as_plain_rms_norm, norm_class).result() < 0.02
    except Exception:  # it needs more than a weight and an epsilon
        return False


@torch.compiler.assume_constant_result
def is_plain_rms_norm(norm_class: type) -> bool:
    return computes_plain_rms_norm(norm_class, getattr(norm_class, "forward", None))


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether somebody sees or changes what a module returns; so it is held where torch doesn't tell."""
    return bool(getattr(module, "_forward_hooks", True))


def can_fuse_norm(norm: nn.Module) -> bool:
    """Whether a norm computes what Llama's does and is neither replaced nor watched by hooks."""
    if "forward" in norm.__dict__ or getattr(norm, "_forward_hooks", True) or getattr(norm, "_forward_pre_hooks", True):
        return False
    if getattr(norm, "_backward_hooks", True) or getattr(norm, "_backward_pre_hooks", True):
        return False
    return is_plain_rms_norm(type(norm))


def fused_rms_norm(norm: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """`norm(hidden_states)`, faster where it can be fused."""
    if torch.compiler.is_compiling() or is_transformed():  # compilers fuse the formula with what is around it
        return norm(hidden_states)
    if hidden_states.dtype == torch.float64 or not can_fuse_norm(norm):  # in float64, Llama's norm rounds to float32
        return norm(hidden_states)
    if hidden_states.shape[:-1].numel() > TwoPhaseDepthAttention.few_tokens:
        return RMSNormFunction.apply(hidden_states, norm.weight, norm.variance_epsilon)
    if hidden_states.dtype == norm.weight.dtype == torch.float32:
        return nn.functional.rms_norm(hidden_states, norm.weight.shape, norm.weight, norm.variance_epsilon)
    return norm(hidden_states)


def is_exporting() -> bool:
    """As `torch.compiler.is_exporting`, which `torch.compile` takes for true up to torch 2.11, and 2.6 doesn't have."""
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    return getattr(torch.compiler, "is_exporting", bool)() if flag is None else flag


# None in a torch without this name, which isn't public: code on the Hub stays as it is
peek_interpreter_stack = reduce(
    lambda found, name: getattr(found, name, None), ("_C", "_functorch", "peek_interpreter_stack"), torch
)


class NoTransforms(torch.autograd.Function):
    """Refuses to run inside transforms of functions (`torch.func`), as it has no rule for them."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.clone()


def is_refused(function: Callable, num_arguments: int) -> bool:
    try:
        function(*(torch.zeros((), device="cpu") for _ in range(num_arguments)))
    except RuntimeError:
        return True
    return False


def is_transformed() -> bool:
    """Whether what runs is traced to run elsewhere, or differentiated or batched in a way that kernels don't know."""
    if torch.compiler.is_compiling():
        return is_exporting()
    if peek_interpreter_stack is None:
        in_functorch = is_refused(NoTransforms.apply, 1)
    else:
        in_functorch = peek_interpreter_stack() is not None
    level = getattr(torch.autograd.forward_ad, "_current_level", None)
    if level is None:  # dual numbers can only be made at a level
        level = -is_refused(torch.autograd.forward_ad.make_dual, 2)
    return in_functorch or level >= 0 or torch.jit.is_tracing()


class TwoPhaseDepthAttention:
    """The two phases of Attention Residuals (Kimi Team, arXiv 2603.15031), in PyTorch alone.

    When a block opens, all of its reads take what they need from the sources that are closed by then, each of which is
    fetched once. A read then merges the sources that have come since by an online softmax. Called as any other
    implementation, it reads all sources at once.
    """

    # below, each operation costs its launch, not its arithmetic, and a read is best done in few of them
    few_tokens = 32

    def __call__(self, sources, product, eps, scale):
        """[`eager_depth_attention`], with its arguments and result."""
        if is_transformed():
            return eager_depth_attention(sources, product, eps, scale)
        if sources[0].shape[:-1].numel() <= self.few_tokens:
            return stacked_depth_attention(sources, product, eps, scale)
        return self.read(None, sources, product, eps, scale)

    def batches(self, sources, products: torch.Tensor) -> bool:
        """Whether it pays to read the closed `sources` for a whole block, with the `products` of its reads."""
        return len(sources) > 1 and not is_transformed() and sources[0].shape[:-1].numel() > self.few_tokens

    def closed_reads(
        self, sources, products: torch.Tensor, eps: float, watched: bool = True, rounded: bool = False
    ) -> list[ClosedDepthRead]:
        """Phase 1, for reads with the products `(num_reads, hidden)`; with their weights only if they are `watched`.

        Mixes may be `rounded` to the dtype of the sources where this saves memory. Eager depth attention rounds a read
        before its norm; where both are one step, that is spared.
        """
        products = products.to(torch.promote_types(sources[0].dtype, torch.float32))
        arguments = (products, constant(eps, products), 1, None, None, None, 0)
        lse, weights, *mixed = DepthAttentionFunction.apply(*arguments, *sources)
        weights = [w.transpose(0, 1).contiguous() for w in weights] if watched else [None] * len(mixed)
        return [ClosedDepthRead(*read, len(sources)) for read in zip(mixed, lse.unbind(), weights)]

    def prepare(self, hidden_states, products: torch.Tensor, eps: float, watched: bool) -> tuple:
        """A model's first source and all products, in the form that its reads take best; and what does all reads of a
        single token, if these are such a token's `hidden_states` and the reads aren't `watched`, else None."""
        fits = not watched and TokenReads.fit(hidden_states, products)
        return hidden_states, products, TokenScores(products, eps) if fits else None

    def step(self, depth_read, product, sources, output, norm, closed_read, watched: bool):
        """Everything that [`DepthRead`] does, with its arguments and result, at once; None if it can't be."""
        if watched or torch.compiler.is_compiling() or is_transformed():
            return None
        num_closed = 0 if closed_read is None else closed_read.num_sources
        num_sources = len(sources) + (output is not None and not depth_read.extends)
        merges = num_sources - num_closed + (closed_read is not None) > 1
        many = sources[0].shape[:-1].numel() > self.few_tokens and sources[0].dtype != torch.float64
        with_gradients = torch.is_grad_enabled()
        if not (many and can_fuse_norm(norm)) or (with_gradients and not merges):
            return None
        sources = write(sources, output, depth_read.extends)
        arguments = (closed_read, sources, product, depth_read.eps, depth_read.scale)
        if with_gradients:
            normed, weights = self.read(*arguments, norm)
        else:
            mixed, weights = self.read(*arguments)
            normed, _ = rms_norm_forward(mixed, norm.weight, norm.variance_epsilon, in_place=True)
        return None, weights, normed, sources

    def read(self, closed_read: ClosedDepthRead | None, sources, product, eps, scale, norm: nn.Module | None = None):
        """Phase 2: a read of `sources`, of which the first may have been read before. The result is as without.

        With a `norm`, one of Llama's, it is the normalised mix, and the mix is not kept for the backward pass.
        """
        with_gradients = torch.is_grad_enabled() or product.requires_grad  # or a forward of re-entrant checkpointing
        product = product.to(torch.promote_types(sources[0].dtype, torch.float32))
        before, new_sources = (None, None), sources
        if closed_read is not None:
            before, new_sources = (closed_read.mixed, closed_read.lse), sources[closed_read.num_sources :]
            if not new_sources:
                mixed = closed_read.mixed if scale == 1 else closed_read.mixed * scale
                return mixed.to(sources[0].dtype), closed_read.weights
            if len(new_sources) == 1 and not with_gradients:
                return self.merge(closed_read, new_sources[0], product, eps, scale)
        norm = (None, 0) if norm is None else (norm.weight, norm.variance_epsilon)
        arguments = (product[None], constant(eps, product), scale, *before, *norm)
        _, weights, mixed = DepthAttentionFunction.apply(*arguments, *new_sources)
        weights = weights[0].transpose(0, 1)
        if closed_read is None:
            weights = weights.contiguous()
        elif closed_read.weights is None:
            weights = None
        else:
            weights = torch.cat([closed_read.weights * weights[:, :1], weights[:, 1:]], dim=1)
        return mixed if norm[0] is not None else mixed.to(sources[0].dtype), weights

    def merge(self, closed_read: ClosedDepthRead, source, product, eps, scale):
        """A read of one more source, without gradients, in the memory of what has been read before."""
        values = source.to(closed_read.mixed.dtype)
        with torch.autocast(values.device.type, enabled=False):
            score = values @ product
        norms = torch.linalg.vector_norm(values, dim=-1)
        score *= to_inverse_rms_(norms, values.shape[-1], eps)
        weight = torch.sigmoid(score - closed_read.lse)
        mixed = closed_read.mixed.lerp_(values, weight.unsqueeze(-1))
        if scale != 1:
            mixed *= scale
        if closed_read.weights is None:
            return mixed.to(source.dtype), None
        weight = weight.unsqueeze(1)
        return mixed.to(source.dtype), torch.cat([closed_read.weights * (1 - weight), weight], dim=1)


# a tensor, as adding a number to one would make it one at every call; on a CPU also under a default device
ZERO = torch.zeros((), device="cpu")


class TokenReads:
    """All reads of a single token, without gradients and without weights. For decoding on a CPU."""

    @staticmethod
    def fit(hidden_states: torch.Tensor, products: torch.Tensor) -> bool:
        """Whether this is such a token, and its numbers may be looked at."""
        if hidden_states.numel() != hidden_states.shape[-1] or torch.is_grad_enabled():
            return False
        if type(hidden_states) is not torch.Tensor or not hidden_states.is_cpu:
            return False
        if products.dtype != torch.promote_types(hidden_states.dtype, torch.float32):
            return False
        return not (torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling() or is_transformed())

    def step(self, depth_read, product, sources, output, norm) -> tuple:
        """Everything that [`DepthRead`] does, with its arguments and result."""
        raise NotImplementedError


class TokenScores(TokenReads):
    """Keeps the scores of the sources as numbers of Python, as a read costs its operations, not their arithmetic.

    A source gets its scores in all reads when it is closed; a read mixes the sources one by one in an online softmax.
    """

    def __init__(self, products: torch.Tensor, eps: float):
        self.products, self.eps = products, eps  # (num_reads, hidden)
        self.values = []  # the closed sources (1, 1, hidden), in the dtype of the products
        self.scores = [[] for _ in range(products.shape[0])]  # for each read, those of these sources

    def step(self, depth_read, product, sources, output, norm) -> tuple:
        sources = write(sources, output, depth_read.extends)
        dtype, scale = product.dtype, depth_read.scale
        for source in sources[len(self.values) : depth_read.num_closed_sources]:
            source = source.to(dtype)
            vector = source.reshape(-1)
            factor = self.inverse_rms(vector, self.eps)
            self.values.append(source)
            for scores, score in zip(self.scores, torch.mv(self.products, vector).tolist()):
                scores.append(score * factor)
        values, scores = self.values, self.scores[depth_read.row]
        if len(sources) > len(values):  # the open block
            source = sources[-1].to(dtype)
            vector = source.reshape(-1)
            score = torch.dot(vector, product).item() * self.inverse_rms(vector, self.eps)
            values, scores = [*values, source], [*scores, score]
        highest = max(scores)
        mixed, total = values[0], math.exp(scores[0] - highest)
        for index in range(1, len(values)):
            weight = math.exp(scores[index] - highest)
            if weight != 0:
                total += weight
                mixed = torch.lerp(mixed, values[index], weight / total)
        if sources[0].dtype == torch.float32 and can_fuse_norm(norm) and norm.weight.dtype == torch.float32:
            factor = scale * self.inverse_rms(mixed.reshape(-1), norm.variance_epsilon, scale)
            return None, None, torch.addcmul(ZERO, mixed, norm.weight, value=factor), sources
        mixed = mixed if scale == 1 else mixed * scale
        return None, None, norm(mixed.to(sources[0].dtype)), sources

    @staticmethod
    def inverse_rms(vector: torch.Tensor, eps: float, scale: float = 1) -> float:
        """One over the root mean square of `scale` times a vector."""
        return (scale * scale * torch.dot(vector, vector).item() / vector.numel() + eps) ** -0.5


def stacked_depth_attention(sources, product, eps, scale):
    """[`eager_depth_attention`], with its arguments and result, in few operations on a copy of all sources."""
    dtype = torch.promote_types(sources[0].dtype, torch.float32)
    values = torch.stack(tuple(sources)).to(dtype)
    scores = nn.functional.rms_norm(values, values.shape[-1:], product.to(dtype), eps).sum(-1)
    weights = scores.softmax(0)  # (num_sources, batch, seq)
    mixed = (values * (weights * scale).unsqueeze(-1)).sum(0)
    return mixed.to(sources[0].dtype), weights.transpose(0, 1).contiguous()


def fixed_depth_mix(
    sources: tuple[torch.Tensor, ...], weights: torch.Tensor, eps: float, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The read of DenseFormer, `h = sum_i w_i v_i`, with the signature and result of [`eager_depth_attention`].

    Args:
        sources: num_sources tensors `(batch, seq, hidden)`.
        weights: `(num_depth_reads,)`, of which the first num_sources count.
        eps: not used.
        scale: not used.
    """
    dtype = torch.promote_types(sources[0].dtype, torch.float32)
    weights = weights[: len(sources)].to(dtype)
    mixed = sum(weight * source.to(dtype) for weight, source in zip(weights, sources))
    return mixed.to(sources[0].dtype), weights[None, :, None].expand(sources[0].shape[0], -1, sources[0].shape[1])


class DepthAttentionInterface(GeneralInterface):
    """Implementations of depth attention by name, each with the signature and result of [`eager_depth_attention`].

    Select one with `from_pretrained(..., attn_res_implementation=name)` or `model.set_attn_res_implementation(name)`;
    add one with `DepthAttentionInterface.register(name, function)`.
    """

    default = "two_phase"
    absent: dict[str, str] = {}  # names that can't be had here, with the reason
    _global_mapping = {"eager": eager_depth_attention, "two_phase": TwoPhaseDepthAttention()}

    def get_interface(self, name: str) -> Callable:
        if name not in self:
            if name in self.absent:
                raise ValueError(
                    f"{name!r} depth attention can't be had: {self.absent[name]}. There are {', '.join(sorted(self))}."
                )
            raise ValueError(
                f"{name!r} is not an implementation of depth attention; choose one of {', '.join(sorted(self))} or add "
                "it with DepthAttentionInterface.register."
            )
        return self[name]


ALL_DEPTH_ATTENTION_FUNCTIONS = DepthAttentionInterface()


class DepthParameters(nn.Module):
    """Parameters that stay in float32: `model.to(torch.bfloat16)` and the like move them but don't round them."""

    def _apply(self, fn, recurse=True):
        def move(tensor):
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        return super()._apply(move, recurse)

    @staticmethod
    def rows_of(parameter: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """A copy of what belongs to the reads with these `rows`, two of each layer that stays, and to the last read."""
        return parameter[[*rows, -1]]

    def keep_rows(self, rows: Sequence[int]):
        for name, parameter in list(self.named_parameters(recurse=False)):
            kept = nn.Parameter(self.rows_of(parameter.detach(), rows), parameter.requires_grad)
            kept._is_hf_initialized = getattr(parameter, "_is_hf_initialized", False)
            setattr(self, name, kept)


class DepthAttention(DepthParameters):
    """The learned queries and key norm gains of all reads of a model, kept in float32.

    Zero queries, the initial value, weight all sources equally. Returns the products `query * key_norm`
    `(num_depth_reads, hidden)`: fresh float32 tensors, as a sharded parameter may be freed after this module's forward.

    As a group of torch's `fully_shard` has one dtype, it gets one of its own in a model of another dtype:

    ```python
    fully_shard(model.model.depth_attention)
    fully_shard(model)
    ```
    """

    def __init__(self, config):
        super().__init__()
        shape = (config.num_depth_reads, config.hidden_size)
        self.query = nn.Parameter(torch.zeros(shape, dtype=torch.float32))
        self.key_norm = nn.Parameter(torch.ones(shape, dtype=torch.float32))

    def forward(self) -> torch.Tensor:
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        return self.query.to(dtype) * self.key_norm.to(dtype)


class DepthScalars(DepthParameters):
    """What denseformer mode has in place of depth attention: the learned weight of each source in each read."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.num_depth_reads, config.num_depth_reads, dtype=torch.float32))

    @staticmethod
    def rows_of(parameter: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        return DepthParameters.rows_of(parameter, rows)[:, [0, *(row + 1 for row in rows)]]  # each is a source too

    def forward(self) -> torch.Tensor:
        return self.weight.clone()


class RowsOfLayers(ConversionOps):
    """Loads and saves the rows of depth attention that belong to the layers of a model, the checkpoint's first ones,
    and the last row, that of the output."""

    @torch.no_grad
    def convert(self, input_dict: dict, source_patterns, target_patterns, *, model, config, full_layer_name, **kwargs):
        (values,) = input_dict.values()
        parameter = values[0] if isinstance(values, list) else values
        if hasattr(model.get_parameter_or_buffer(full_layer_name), "device_mesh"):  # comes in pieces
            return {target_patterns[0]: parameter}
        num_reads = config.num_depth_reads
        if len(parameter) < num_reads:
            raise ValueError(
                f"{full_layer_name} has {len(parameter)} rows, those of {len(parameter) // 2} layers, and "
                f"num_hidden_layers is {config.num_hidden_layers}: there is nothing from which the others could get "
                "theirs. Set num_hidden_layers to the number of layers, or fewer."
            )
        if len(parameter) > num_reads:
            module = model.get_submodule(full_layer_name.rpartition(".")[0])
            parameter = module.rows_of(parameter, range(num_reads - 1))
        return {target_patterns[0]: parameter}

    @property
    def reverse_op(self) -> ConversionOps:
        return self


def write(sources: tuple[torch.Tensor, ...], output: torch.Tensor | None, extends: bool) -> tuple[torch.Tensor, ...]:
    """The sources after a sublayer's `output` has joined them, which extends the open block or opens a new one."""
    if output is None:
        return sources
    if extends:
        # in the dtype of the embedding, as a residual stream under autocast
        return *sources[:-1], sources[-1].to(sources[0].dtype) + output
    return *sources, output


class NormOfRead:
    """A norm as an argument of a read: what wraps the read, as accelerate does, moves modules that it sees to a device,
    which it can't do to one that lies elsewhere or on disk."""

    def __init__(self, module: nn.Module):
        self.module = module


class DepthRead(nn.Module):
    """Everything between two sublayers: the read of `row`, in the place that it has in a model. Holds no parameters.

    What the sublayer before has put out is handed over as it is, and joins the sources here.
    """

    def __init__(self, config, row: int):
        super().__init__()
        self.set_place(config, row)
        self.set_implementation(config)

    def set_place(self, config, row: int):
        self.row = row
        self.num_closed_sources = config.num_closed_depth_sources(row)
        self.extends = row > 0 and config.extends_open_depth_source(row - 1)
        self.eps = config.attn_res_norm_eps
        self.scale = config.num_depth_sources(row) if config.attn_res_sum_scale else 1

    def set_implementation(self, config):
        if config.attn_res_mode == "denseformer":
            self.depth_attention = fixed_depth_mix
        else:
            self.depth_attention = ALL_DEPTH_ATTENTION_FUNCTIONS.get_interface(config._attn_res_implementation)
        self.has_steps = isinstance(self.depth_attention, TwoPhaseDepthAttention)

    def forward(
        self,
        product: torch.Tensor,
        sources: tuple[torch.Tensor, ...],
        output: torch.Tensor | None,
        norm: nn.Module | NormOfRead,
        closed_read: ClosedDepthRead | TokenReads | None = None,
        watched: bool = False,
    ) -> tuple:
        """
        Args:
            product: `(hidden,)`, the read's query times its key norm gain.
            sources: tensors `(batch, seq, hidden)`.
            output: `(batch, seq, hidden)`, which the sublayer before has put out, or None if it is in the sources.
            norm: what is applied to the result before the sublayer gets it.
            closed_read: what the read has got from the first sources, if anything, or what it needs for a single token.
            watched: whether the read itself and its weights are needed, not only what the norm makes of it.

        Returns:
            The read and its weights `(batch, num_sources, seq)`, Nones if they aren't needed and weren't computed; the
            read after the norm; the sources with `output`.
        """
        watched = watched or has_forward_hooks(self)
        norm = norm.module if isinstance(norm, NormOfRead) else norm
        if watched and isinstance(closed_read, ClosedDepthRead) and closed_read.weights is None:
            closed_read = None
        if isinstance(closed_read, TokenReads):
            if product.is_cpu and not watched:  # layers may lie on several devices
                return closed_read.step(self, product, sources, output, norm)
            closed_read = None
        if self.has_steps:
            step = self.depth_attention.step(self, product, sources, output, norm, closed_read, watched)
            if step is not None:
                return step
        sources = write(sources, output, self.extends)
        if closed_read is None:
            mixed, weights = self.depth_attention(sources, product, self.eps, self.scale)
        else:
            mixed, weights = self.depth_attention.read(closed_read, sources, product, self.eps, self.scale)
        normed = fused_rms_norm(norm, mixed) if self.has_steps else norm(mixed)
        return mixed, weights, normed, sources


class HiddenStateRecorded:
    """Marks modules whose first output, unless it is None, is an entry of a model's `hidden_states`."""


class OutputRead(DepthRead, HiddenStateRecorded):
    """The read before the final norm."""


class AttnResDecoderLayerMixin(HiddenStateRecorded):
    """A donor's decoder layer that reads sources where the donor's adds to a residual stream.

    The sources of a token are one tuple of tensors `(batch, seq, hidden)`: the embedding, the finished blocks and, at
    the end, the sum of the open block where there is one.
    """

    @property
    def attention_norm(self) -> nn.Module:
        return self.input_layernorm

    @property
    def mlp_norm(self) -> nn.Module:
        return self.post_attention_layernorm

    def attend(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """What attention of a normalised read, with the donor's norms after it, adds to the residual stream."""
        attn_output, _ = self.self_attn(hidden_states=hidden_states, **kwargs)
        return attn_output

    def transform(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the MLP of a normalised read, with the donor's norms after it, adds to the residual stream."""
        return self.mlp(hidden_states)

    def set_place(self, config, layer_idx: int):
        """Tells the layer which of the model it is. What it needs at each call is looked up once."""
        self.layer_idx = layer_idx
        self.depth_row = 2 * layer_idx
        if not hasattr(self, "attention_read"):
            self.attention_read = DepthRead(config, self.depth_row)
            self.mlp_read = DepthRead(config, self.depth_row + 1)
        self.attention_read.set_place(config, self.depth_row)
        self.mlp_read.set_place(config, self.depth_row + 1)
        self.output_extends = config.extends_open_depth_source(2 * layer_idx + 1)
        self.opens_block = layer_idx % config.attn_res_block_size == 0
        self.num_closed_before = config.num_closed_depth_sources(2 * layer_idx - 1)

    def num_unchanged_sources(self, output: torch.Tensor | None) -> int:
        """How many sources neither this layer changes nor the `output` of the layer before, if it gets that."""
        return self.num_closed_before + (self.opens_block and output is None)

    def forward(
        self,
        *sources_and_products: torch.Tensor | None,
        closed_reads: tuple[ClosedDepthRead | None, ...] = (None, None),
        watched: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple:
        """
        Args:
            sources_and_products: the sources; the output of the layer before, or None if it is among them; the products
                `(hidden,)` of this layer's two reads. Positional, as re-entrant checkpointing sees only positional
                tensors.
            closed_reads: what the two reads have got from the sources before this layer's block, if anything.
            watched: whether the depth weights are needed.
            kwargs: what the donor's attention takes.

        Returns:
            What attention reads, or None in the first layer, where it is the first source, or if nobody watches; the
            depth weights of the two reads `(batch, num_sources, seq)`, or Nones; the sources that are new or changed,
            all but the first `num_unchanged_sources`; and this layer's output, or None if it is among them.
        """
        *sources, output, attention_product, mlp_product = sources_and_products
        num_unchanged = self.num_unchanged_sources(output)
        watched = watched or has_forward_hooks(self)
        attention_input, attention_weights, normed, sources = self.attention_read(
            attention_product, sources, output, NormOfRead(self.attention_norm), closed_reads[0], watched
        )
        output = self.attend(normed, **kwargs)
        _, mlp_weights, normed, sources = self.mlp_read(
            mlp_product, sources, output, NormOfRead(self.mlp_norm), closed_reads[1], watched
        )
        output = self.transform(normed)
        if self.gradient_checkpointing and self.training:  # what a layer returns is kept until the backward pass
            sources, output = write(sources, output, self.output_extends), None
        new_sources = sources[num_unchanged:]
        return attention_input if self.layer_idx else None, attention_weights, mlp_weights, *new_sources, output


@dataclass
class AttnResModelOutputWithPast(BaseModelOutputWithPast):
    """`depth_attentions`: the weights of each read, `(batch, num_sources, seq)`, summing to 1 over the sources."""

    router_logits: tuple[torch.FloatTensor, ...] | None = None
    depth_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class AttnResCausalLMOutputWithPast(CausalLMOutputWithPast):
    aux_loss: torch.FloatTensor | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    depth_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class AttnResSequenceClassifierOutputWithPast(SequenceClassifierOutputWithPast):
    depth_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class AttnResTokenClassifierOutput(TokenClassifierOutput):
    depth_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class AttnResQuestionAnsweringModelOutput(QuestionAnsweringModelOutput):
    depth_attentions: tuple[torch.FloatTensor, ...] | None = None


class AttnResPreTrainedModelMixin:
    """What models and heads of every family share."""

    # as in the configuration: a plan's stage hands on one tensor
    _pp_plan = None

    def __init__(self, config, attn_res_implementation: str | None = None):
        self.prepare_config(config, attn_res_implementation)
        super().__init__(config)

    @classmethod
    def prepare_config(cls, config, attn_res_implementation: str | None):
        if config.model_type != cls.config_class.model_type:  # the class differs in remote code
            cls.config_class.check_model_type(config.model_type)
            raise ValueError(
                f"{cls.__name__} needs an {cls.config_class.__name__}; make it of a donor's with "
                f"{cls.config_class.__name__}(**config.to_dict())."
            )
        config.validate_attn_res()
        name = attn_res_implementation or config._attn_res_implementation or DepthAttentionInterface.default
        ALL_DEPTH_ATTENTION_FUNCTIONS.get_interface(name)
        config._attn_res_implementation = name

    def set_attn_res_implementation(self, attn_res_implementation: str):
        """Switches the implementation of depth attention, a key of `ALL_DEPTH_ATTENTION_FUNCTIONS`.

        Raises:
            ValueError: the name is unknown; the message lists the known ones.
        """
        ALL_DEPTH_ATTENTION_FUNCTIONS.get_interface(attn_res_implementation)
        self.config._attn_res_implementation = attn_res_implementation
        for module in self.modules():
            if isinstance(module, DepthRead):
                module.set_implementation(self.config)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, DepthAttention):
            init.zeros_(module.query)
            init.ones_(module.key_norm)
        elif isinstance(module, DepthScalars):
            init.ones_(module.weight)

    # transformers looks for these two abilities in the source file of a class, here that of the donor
    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return _donor_class(cls)._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return _donor_class(cls)._can_set_experts_implementation()

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, *args, **kwargs):
        # transformers splits layers into stages without a look at the plan
        if getattr(distributed_config, "pp_size", 1) > 1:
            raise ValueError(
                f"{cls.__name__} has no pipeline parallelism: a stage hands on one tensor, and the layers after it "
                "read all sources. Use pp_size=1 with tensor parallelism or FSDP."
            )
        return super().maybe_distribute_model(model, distributed_config, *args, **kwargs)

    def enable_adapters(self):
        """As in transformers, which leaves off what adapters hold in full (`modules_to_save`): depth attention."""
        super().enable_adapters()
        for module in self.modules():
            if type(module).__name__ == "ModulesToSaveWrapper":  # of PEFT, which need not be installed
                module.enable_adapters(enabled=True)

    @classmethod
    def is_remote_code(cls) -> bool:
        # transformers' own copying enters only the saved class, under the name that FSDP gave it: see save_pretrained
        return False

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs):
        """As in transformers; the folder also gets the code files, so that it loads without this project."""
        self.base_model.check_layers()
        self.config.auto_map = self.config.hub_classes()
        if is_main_process and not Path(save_directory).is_file():
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            for module in (AttnResPreTrainedModelMixin.__module__, AttnResConfig.__module__):
                code_file = Path(sys.modules[module].__file__)
                shutil.copyfile(code_file, Path(save_directory) / code_file.name)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)


def _donor_class(cls: type) -> type:
    return next(base for base in cls.__mro__ if base.__module__.startswith("transformers.models."))


class ReceivedWeights:
    """What a head gets of the model under it besides that model's outputs. Not a list, which wrappers would copy."""

    weights: tuple[torch.Tensor, ...] | None = None


class AttnResModelMixin(AttnResPreTrainedModelMixin):
    """A donor's decoder that carries sources instead of hidden states from layer to layer."""

    layer_class: type[AttnResDecoderLayerMixin]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # One recorder, as donors have, so that hidden states can be selected by index. It takes the first entry, the
        # embedding, from the first argument of the first layer.
        recorder = OutputRecorder(HiddenStateRecorded, index=0)
        cls._can_record_outputs = {**(getattr(cls, "_can_record_outputs", None) or {}), "hidden_states": recorder}
        if "layer_class" in cls.__dict__:
            cls._no_split_modules = [cls.layer_class.__name__]

    def post_init(self):
        # The donor's constructor calls this last. Its layers differ from ours in nothing but methods, so they change
        # their class instead of being built twice, and depth attention joins before the weights are initialised.
        for layer_idx, layer in enumerate(self.layers):
            layer.__class__ = self.layer_class
            layer.set_place(self.config, layer_idx)
        depth_class = DepthScalars if self.config.attn_res_mode == "denseformer" else DepthAttention
        self.depth_attention = depth_class(self.config)
        self.output_read = OutputRead(self.config, self.config.num_depth_reads - 1)
        kept = getattr(self, "_keep_in_fp32_modules_strict", None) or ()
        self._keep_in_fp32_modules_strict = {*kept, "depth_attention"}
        super().post_init()

    def __setattr__(self, name, value):
        if name == "layers" and hasattr(self, "depth_attention") and isinstance(value, nn.ModuleList):
            self.place_layers(value)
        super().__setattr__(name, value)

    def place_layers(self, layers: nn.ModuleList):
        """Gives depth attention the rows of the `layers` that the model is about to get, of which some may be gone,
        copies (which get copies of the rows) or in another order.

        Raises:
            ValueError: a layer is in the list twice, or has no rows here.
        """
        first_rows = [getattr(layer, "depth_row", -1) for layer in layers]
        num_rows = self.output_read.row
        if len({id(layer) for layer in layers}) < len(layers):
            raise ValueError("A layer can't be in a model twice, as it has one place in it: use copy.deepcopy(layer).")
        if not all(0 <= row < num_rows for row in first_rows):
            raise ValueError("Layers must be this model's or copies of them: others have no rows in depth attention.")
        rows = [row for first in first_rows for row in (first, first + 1)]
        if rows == list(range(num_rows)):
            return
        for module in self.depth_attention.modules():
            if isinstance(module, DepthParameters):
                module.keep_rows(rows)
        for layer_idx, layer in enumerate(layers):
            for module in layer.modules():
                if hasattr(module, "layer_idx"):  # its place in the cache
                    module.layer_idx = layer_idx
            layer.set_place(self.config, layer_idx)
        self.output_read.set_place(self.config, len(rows))

    def check_layers(self):
        """Raises a `ValueError` if layers have changed without [`place_layers`]; those at the end may be missing."""
        rows = [layer.depth_row for layer in self.layers]
        if rows != list(range(0, 2 * len(rows), 2)) or 2 * len(rows) > self.output_read.row:
            raise ValueError(
                "The list of layers has been changed in place, so that depth attention doesn't know with which of its "
                "rows they read. Give the model a new list, as in model.layers = torch.nn.ModuleList([...])."
            )

    def embed(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """The first source, from the token embeddings."""
        return inputs_embeds

    def position_embeddings(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor):
        """What the layers' attention takes as `position_embeddings`; a dictionary if it depends on the layer type."""
        return self.rotary_emb(inputs_embeds, position_ids=position_ids)

    def open_block(
        self,
        block: list,
        products: torch.Tensor,
        sources: tuple[torch.Tensor, ...],
        output: torch.Tensor | None,
        watched: bool,
    ) -> tuple:
        """The sources and the output of the layer before, as the first layer of a `block` takes them; and what the
        block's reads, with `products`, get from the sources that are closed by then: Nones if each read does it itself.
        """
        depth_attention = self.output_read.depth_attention
        if torch.is_grad_enabled():  # what layers hand on is kept, and the sum is one source for all that read it
            sources, output = write(sources, output, block[0].attention_read.extends), None
        each_itself = sources, output, products.shape[0] * [None]
        if not isinstance(depth_attention, TwoPhaseDepthAttention):
            return each_itself
        if self.training and any(layer.gradient_checkpointing for layer in block):
            return each_itself  # closed reads would be kept for the backward pass
        if not depth_attention.batches(sources if output is None else (*sources, output), products):
            return each_itself
        sources = write(sources, output, block[0].attention_read.extends)
        device = sources[-1].device  # earlier layers may lie on others
        closed, products = [v.to(device) for v in sources], products.to(device)
        norms = (self.norm, *(norm for layer in block for norm in (layer.attention_norm, layer.mlp_norm)))
        rounded = not watched and all(map(can_fuse_norm, norms))
        return sources, None, depth_attention.closed_reads(closed, products, self.output_read.eps, watched, rounded)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        output_depth_attentions: bool | None = None,
        depth_attentions: ReceivedWeights | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> AttnResModelOutputWithPast:
        """
        The arguments of the donor's forward, and:

        Args:
            output_depth_attentions: whether the outputs hold `depth_attentions`, the weights of all reads.
            depth_attentions: receives these weights, for heads, whose forward is the donor's.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past_seen_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_seen_tokens
            position_ids = position_ids.unsqueeze(0)
        if not isinstance(causal_mask := attention_mask, dict):
            causal_mask = create_masks_for_generate(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        position_embeddings = self.position_embeddings(inputs_embeds, position_ids)

        def for_layer(value, layer_idx):
            return value[self.config.layer_types[layer_idx]] if isinstance(value, dict) else value

        if output_depth_attentions is None:
            output_depth_attentions = self.config.output_depth_attentions
        with_weights = output_depth_attentions or depth_attentions is not None
        all_weights = []
        self.check_layers()
        layers = list(self.layers)[: self.config.num_hidden_layers]
        block_size = self.config.attn_res_block_size
        products = self.depth_attention()
        embedding, output = self.embed(inputs_embeds), None
        watched = with_weights or any(has_forward_hooks(layer) for layer in layers)
        depth_attention, token_reads = self.output_read.depth_attention, None
        if isinstance(depth_attention, TwoPhaseDepthAttention):
            prepared = depth_attention.prepare(embedding, products, self.output_read.eps, watched)
            embedding, products, token_reads = prepared
        sources, product_of_read = (embedding,), products.unbind(0)
        closed_reads = (2 * block_size + 1) * [token_reads]
        with_output_read = token_reads is not None
        for layer_idx, decoder_layer in enumerate(layers):
            row, row_in_block = 2 * layer_idx, 2 * (layer_idx % block_size)
            if row_in_block == 0 and token_reads is None:
                block = layers[layer_idx : layer_idx + block_size]
                end = 2 * (layer_idx + len(block))
                with_output_read = end + 1 == products.shape[0]  # the model's last block
                of_block = products[row : end + with_output_read]
                sources, output, closed_reads = self.open_block(block, of_block, sources, output, watched)
            unchanged = sources[: decoder_layer.num_unchanged_sources(output)]
            _, attention_weights, mlp_weights, *written, output = decoder_layer(
                *sources,
                output,
                *product_of_read[row : row + 2],
                closed_reads=closed_reads[row_in_block : row_in_block + 2],
                watched=with_weights,
                attention_mask=for_layer(causal_mask, layer_idx),
                position_embeddings=for_layer(position_embeddings, layer_idx),
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
            sources = (*unchanged, *written)
            all_weights += [attention_weights, mlp_weights]

        # layers may lie on several devices
        device = (sources[-1] if output is None else output).device
        sources = tuple(source.to(device) for source in sources)
        closed_read = closed_reads[-1] if with_output_read else None  # fewer layers than there are may have run
        if isinstance(closed_read, ClosedDepthRead):
            closed_read = closed_read.to(device)
        _, output_weights, hidden_states, _ = self.output_read(
            product_of_read[-1].to(device), sources, output, NormOfRead(self.norm), closed_read, with_weights
        )
        all_weights.append(output_weights)
        if with_weights and output_weights is None:
            raise ValueError(
                f"The implementation {self.config._attn_res_implementation!r} of depth attention returns no weights; "
                "choose another, such as two_phase, or leave out output_depth_attentions."
            )
        if depth_attentions is not None:
            depth_attentions.weights = tuple(all_weights)
        return AttnResModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            depth_attentions=tuple(all_weights) if output_depth_attentions else None,
        )


OUTPUT_DEPTH_ATTENTIONS_DOC = """
        output_depth_attentions (`bool`, *optional*):
            Whether the outputs hold `depth_attentions`, the weights of all reads: a tuple of 2 * num_hidden_layers + 1
            tensors `(batch, num_sources, seq)`.
"""


def with_depth_attentions(forward: Callable, output_class: type[ModelOutput]) -> Callable:
    """The `forward` of a donor's head, with the argument `output_depth_attentions` and outputs that hold them."""

    @wraps(forward)
    @can_return_tuple
    def head_forward(self, *args, output_depth_attentions: bool | None = None, **kwargs) -> output_class:
        if output_depth_attentions is None:
            output_depth_attentions = self.config.output_depth_attentions
        received = ReceivedWeights()
        if output_depth_attentions:
            kwargs["depth_attentions"] = received
        outputs = forward(self, *args, return_dict=True, **kwargs)
        return output_class(**outputs, depth_attentions=received.weights)

    head_forward.__doc__ = (forward.__doc__ or "") + OUTPUT_DEPTH_ATTENTIONS_DOC
    parameters = dict(inspect.signature(forward).parameters)
    rest = parameters.pop("kwargs")
    option = inspect.Parameter(
        "output_depth_attentions", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=bool | None
    )
    head_forward.__signature__ = inspect.Signature([*parameters.values(), option, rest], return_annotation=output_class)
    return head_forward


class AttnResHeadMixin(AttnResPreTrainedModelMixin):
    """A donor's head on top of an AttnRes model."""

    model_class: type[AttnResModelMixin]
    output_class: type[ModelOutput]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # transformers may build a head's class once more from its dictionary, in which the forward is wrapped already
        if "model_class" in cls.__dict__ and "forward" not in cls.__dict__:
            cls._no_split_modules = cls.model_class._no_split_modules
            cls.forward = with_depth_attentions(cls.forward, cls.output_class)

    def __init__(self, config, attn_res_implementation: str | None = None):
        self.prepare_config(config, attn_res_implementation)
        PreTrainedModel.__init__(self, config)  # the donor's constructor would build the donor's model
        setattr(self, self.base_model_prefix, self.model_class(config))
        self.add_head(config)
        self.post_init()


@dataclass
class AttnResGenerateDecoderOnlyOutput(GenerateDecoderOnlyOutput):
    """`depth_attentions`: for each generated token the weights of all reads, a tuple of 2 * num_hidden_layers + 1
    tensors `(batch, num_sources, seq)`. `seq` is the prompt's length for the first token, then 1."""

    depth_attentions: tuple[tuple[torch.FloatTensor, ...], ...] | None = None


@dataclass
class AttnResGenerateBeamDecoderOnlyOutput(GenerateBeamDecoderOnlyOutput):
    """`depth_attentions` as those of [`AttnResGenerateDecoderOnlyOutput`], of `batch * num_beams` sequences in the
    order in which they were run; `beam_indices` tells which of them became a result."""

    depth_attentions: tuple[tuple[torch.FloatTensor, ...], ...] | None = None


GENERATED_DEPTH_ATTENTIONS = ContextVar("a list that receives those of each step, if they are asked for", default=None)


class AttnResForCausalLMMixin(AttnResHeadMixin):
    output_class = AttnResCausalLMOutputWithPast

    def generate(self, *args, output_depth_attentions: bool | None = None, **kwargs):
        """As in transformers, and:

        Args:
            output_depth_attentions: whether the outputs hold `depth_attentions`, the weights of all reads at each step,
                if `return_dict_in_generate` is set: an [`AttnResGenerateDecoderOnlyOutput`] or, with beams, an
                [`AttnResGenerateBeamDecoderOnlyOutput`].

        Raises:
            ValueError: they are asked of assisted generation, whose steps are of several tokens.
        """
        if output_depth_attentions is None:
            output_depth_attentions = self.config.output_depth_attentions
        if output_depth_attentions:
            kwargs["output_depth_attentions"] = True
        steps = [] if output_depth_attentions else None
        token = GENERATED_DEPTH_ATTENTIONS.set(steps)
        try:
            outputs = super().generate(*args, **kwargs)
        finally:
            GENERATED_DEPTH_ATTENTIONS.reset(token)
        if steps is None or not isinstance(outputs, ModelOutput):
            return outputs
        with_beams = isinstance(outputs, GenerateBeamDecoderOnlyOutput)
        output_class = AttnResGenerateBeamDecoderOnlyOutput if with_beams else AttnResGenerateDecoderOnlyOutput
        return output_class(**outputs, depth_attentions=tuple(steps))

    def _update_model_kwargs_for_generation(self, outputs, *args, **kwargs):
        steps = GENERATED_DEPTH_ATTENTIONS.get()
        if steps is not None:
            steps.append(outputs.depth_attentions)
        return super()._update_model_kwargs_for_generation(outputs, *args, **kwargs)

    def _assisted_decoding(self, *args, **kwargs):
        if GENERATED_DEPTH_ATTENTIONS.get() is not None:
            raise ValueError("Assisted generation doesn't return depth_attentions: leave out output_depth_attentions.")
        return super()._assisted_decoding(*args, **kwargs)

    def add_head(self, config):
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


class AttnResMoeForCausalLMMixin(AttnResForCausalLMMixin):
    def add_head(self, config):
        super().add_head(config)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts = config.num_local_experts
        self.num_experts_per_tok = config.num_experts_per_tok


class AttnResDecoderLayer(AttnResDecoderLayerMixin, LlamaDecoderLayer):
    """A Llama layer that reads over depth."""


class AttnResModel(AttnResModelMixin, LlamaModel):
    """The Llama decoder with Attention Residuals."""

    config: AttnResConfig
    layer_class = AttnResDecoderLayer


class AttnResForCausalLM(AttnResForCausalLMMixin, LlamaForCausalLM):
    """[`AttnResModel`] with a language modelling head."""

    config: AttnResConfig
    model_class = AttnResModel


class AttnResForSequenceClassification(AttnResHeadMixin, LlamaForSequenceClassification):
    """[`AttnResModel`] that classifies a sequence by its last token."""

    config: AttnResConfig
    model_class = AttnResModel
    output_class = AttnResSequenceClassifierOutputWithPast

    def add_head(self, config):
        self.num_labels = config.num_labels
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)


class AttnResForTokenClassification(AttnResHeadMixin, LlamaForTokenClassification):
    """[`AttnResModel`] that classifies each token."""

    config: AttnResConfig
    model_class = AttnResModel
    output_class = AttnResTokenClassifierOutput

    def add_head(self, config):
        self.num_labels = config.num_labels
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", 0.1))
        self.score = nn.Linear(config.hidden_size, config.num_labels)


class AttnResForQuestionAnswering(AttnResHeadMixin, LlamaForQuestionAnswering):
    """[`AttnResModel`] that finds the span of an answer."""

    config: AttnResConfig
    model_class = AttnResModel
    output_class = AttnResQuestionAnsweringModelOutput

    def add_head(self, config):
        self.qa_outputs = nn.Linear(config.hidden_size, 2)


# The other families. Each says only where its layer or its embedding differs from the pattern of Llama.


class AttnResMistralDecoderLayer(AttnResDecoderLayerMixin, MistralDecoderLayer):
    pass


class AttnResMistralModel(AttnResModelMixin, MistralModel):
    config: AttnResMistralConfig  # noqa: F405
    layer_class = AttnResMistralDecoderLayer


class AttnResMistralForCausalLM(AttnResForCausalLMMixin, MistralForCausalLM):
    config: AttnResMistralConfig  # noqa: F405
    model_class = AttnResMistralModel


class AttnResQwen2DecoderLayer(AttnResDecoderLayerMixin, Qwen2DecoderLayer):
    pass


class AttnResQwen2Model(AttnResModelMixin, Qwen2Model):
    config: AttnResQwen2Config  # noqa: F405
    layer_class = AttnResQwen2DecoderLayer


class AttnResQwen2ForCausalLM(AttnResForCausalLMMixin, Qwen2ForCausalLM):
    config: AttnResQwen2Config  # noqa: F405
    model_class = AttnResQwen2Model


class AttnResQwen3DecoderLayer(AttnResDecoderLayerMixin, Qwen3DecoderLayer):
    pass


class AttnResQwen3Model(AttnResModelMixin, Qwen3Model):
    config: AttnResQwen3Config  # noqa: F405
    layer_class = AttnResQwen3DecoderLayer


class AttnResQwen3ForCausalLM(AttnResForCausalLMMixin, Qwen3ForCausalLM):
    config: AttnResQwen3Config  # noqa: F405
    model_class = AttnResQwen3Model


class AttnResQwen3MoeDecoderLayer(AttnResDecoderLayerMixin, Qwen3MoeDecoderLayer):
    pass


class AttnResQwen3MoeModel(AttnResModelMixin, Qwen3MoeModel):
    config: AttnResQwen3MoeConfig  # noqa: F405
    layer_class = AttnResQwen3MoeDecoderLayer


class AttnResQwen3MoeForCausalLM(AttnResMoeForCausalLMMixin, Qwen3MoeForCausalLM):
    config: AttnResQwen3MoeConfig  # noqa: F405
    model_class = AttnResQwen3MoeModel


class AttnResMixtralDecoderLayer(AttnResDecoderLayerMixin, MixtralDecoderLayer):
    pass


class AttnResMixtralModel(AttnResModelMixin, MixtralModel):
    config: AttnResMixtralConfig  # noqa: F405
    layer_class = AttnResMixtralDecoderLayer


class AttnResMixtralForCausalLM(AttnResMoeForCausalLMMixin, MixtralForCausalLM):
    config: AttnResMixtralConfig  # noqa: F405
    model_class = AttnResMixtralModel


class AttnResSmolLM3DecoderLayer(AttnResDecoderLayerMixin, SmolLM3DecoderLayer):
    pass


class AttnResSmolLM3Model(AttnResModelMixin, SmolLM3Model):
    config: AttnResSmolLM3Config  # noqa: F405
    layer_class = AttnResSmolLM3DecoderLayer


class AttnResSmolLM3ForCausalLM(AttnResForCausalLMMixin, SmolLM3ForCausalLM):
    config: AttnResSmolLM3Config  # noqa: F405
    model_class = AttnResSmolLM3Model


class AttnResPhi3DecoderLayer(AttnResDecoderLayerMixin, Phi3DecoderLayer):
    def attend(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.resid_attn_dropout(super().attend(hidden_states, **kwargs))

    def transform(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.resid_mlp_dropout(super().transform(hidden_states))


class AttnResPhi3Model(AttnResModelMixin, Phi3Model):
    config: AttnResPhi3Config  # noqa: F405
    layer_class = AttnResPhi3DecoderLayer


class AttnResPhi3ForCausalLM(AttnResForCausalLMMixin, Phi3ForCausalLM):
    config: AttnResPhi3Config  # noqa: F405
    model_class = AttnResPhi3Model


class AttnResStarcoder2DecoderLayer(AttnResDecoderLayerMixin, Starcoder2DecoderLayer):
    pass


class AttnResStarcoder2Model(AttnResModelMixin, Starcoder2Model):
    config: AttnResStarcoder2Config  # noqa: F405
    layer_class = AttnResStarcoder2DecoderLayer

    def embed(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(inputs_embeds, p=self.embedding_dropout, training=self.training)


class AttnResStarcoder2ForCausalLM(AttnResForCausalLMMixin, Starcoder2ForCausalLM):
    config: AttnResStarcoder2Config  # noqa: F405
    model_class = AttnResStarcoder2Model


class AttnResOlmoDecoderLayer(AttnResDecoderLayerMixin, OlmoDecoderLayer):
    pass


class AttnResOlmoModel(AttnResModelMixin, OlmoModel):
    config: AttnResOlmoConfig  # noqa: F405
    layer_class = AttnResOlmoDecoderLayer


class AttnResOlmoForCausalLM(AttnResForCausalLMMixin, OlmoForCausalLM):
    config: AttnResOlmoConfig  # noqa: F405
    model_class = AttnResOlmoModel


class AttnResDeepseekV3DecoderLayer(AttnResDecoderLayerMixin, DeepseekV3DecoderLayer):
    pass


class AttnResDeepseekV3Model(AttnResModelMixin, DeepseekV3Model):
    config: AttnResDeepseekV3Config  # noqa: F405
    layer_class = AttnResDeepseekV3DecoderLayer


class AttnResDeepseekV3ForCausalLM(AttnResForCausalLMMixin, DeepseekV3ForCausalLM):
    config: AttnResDeepseekV3Config  # noqa: F405
    model_class = AttnResDeepseekV3Model


class AttnResGptOssDecoderLayer(AttnResDecoderLayerMixin, GptOssDecoderLayer):
    def transform(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output, _ = super().transform(hidden_states)  # and router scores
        return output


class AttnResGptOssModel(AttnResModelMixin, GptOssModel):
    config: AttnResGptOssConfig  # noqa: F405
    layer_class = AttnResGptOssDecoderLayer


class AttnResGptOssForCausalLM(AttnResMoeForCausalLMMixin, GptOssForCausalLM):
    config: AttnResGptOssConfig  # noqa: F405
    model_class = AttnResGptOssModel


class AttnResGraniteDecoderLayer(AttnResDecoderLayerMixin, GraniteDecoderLayer):
    def attend(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        return super().attend(hidden_states, **kwargs) * self.residual_multiplier

    def transform(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().transform(hidden_states) * self.residual_multiplier


class AttnResGraniteModel(AttnResModelMixin, GraniteModel):
    config: AttnResGraniteConfig  # noqa: F405
    layer_class = AttnResGraniteDecoderLayer

    def embed(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        return inputs_embeds * self.embedding_multiplier


class AttnResGraniteForCausalLM(AttnResForCausalLMMixin, GraniteForCausalLM):
    config: AttnResGraniteConfig  # noqa: F405
    model_class = AttnResGraniteModel


class AttnResGemma2DecoderLayerMixin(AttnResDecoderLayerMixin):
    @property
    def mlp_norm(self) -> nn.Module:
        return self.pre_feedforward_layernorm

    def attend(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.post_attention_layernorm(super().attend(hidden_states, **kwargs))

    def transform(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.post_feedforward_layernorm(super().transform(hidden_states))


class AttnResGemma2DecoderLayer(AttnResGemma2DecoderLayerMixin, Gemma2DecoderLayer):
    pass


class AttnResGemma2Model(AttnResModelMixin, Gemma2Model):
    config: AttnResGemma2Config  # noqa: F405
    layer_class = AttnResGemma2DecoderLayer


class AttnResGemma2ForCausalLM(AttnResForCausalLMMixin, Gemma2ForCausalLM):
    config: AttnResGemma2Config  # noqa: F405
    model_class = AttnResGemma2Model


class AttnResGemma3TextDecoderLayer(AttnResGemma2DecoderLayerMixin, Gemma3DecoderLayer):
    pass


class AttnResGemma3TextModel(AttnResModelMixin, Gemma3TextModel):
    config: AttnResGemma3TextConfig  # noqa: F405
    layer_class = AttnResGemma3TextDecoderLayer

    def position_embeddings(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> dict:
        layer_types = set(self.config.layer_types)
        return {layer_type: self.rotary_emb(inputs_embeds, position_ids, layer_type) for layer_type in layer_types}


class AttnResGemma3TextForCausalLM(AttnResForCausalLMMixin, Gemma3ForCausalLM):
    config: AttnResGemma3TextConfig  # noqa: F405
    model_class = AttnResGemma3TextModel


class AttnResGlm4DecoderLayer(AttnResDecoderLayerMixin, Glm4DecoderLayer):
    def attend(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.post_self_attn_layernorm(super().attend(hidden_states, **kwargs))

    def transform(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.post_mlp_layernorm(super().transform(hidden_states))


class AttnResGlm4Model(AttnResModelMixin, Glm4Model):
    config: AttnResGlm4Config  # noqa: F405
    layer_class = AttnResGlm4DecoderLayer


class AttnResGlm4ForCausalLM(AttnResForCausalLMMixin, Glm4ForCausalLM):
    config: AttnResGlm4Config  # noqa: F405
    model_class = AttnResGlm4Model


if KimiLinearModel is not None:

    class AttnResKimiLinearDecoderLayer(AttnResDecoderLayerMixin, KimiLinearDecoderLayer):
        def attend(self, hidden_states: torch.Tensor, past_key_values: Cache | None = None, **kwargs) -> torch.Tensor:
            if self.block_type == "linear_attention":
                return self.self_attn(hidden_states, cache_params=past_key_values, **kwargs)
            attn_output, _ = self.self_attn(hidden_states, past_key_values=past_key_values, **kwargs)
            return attn_output

    class AttnResKimiLinearModel(AttnResModelMixin, KimiLinearModel):
        config: AttnResKimiLinearConfig  # noqa: F405
        layer_class = AttnResKimiLinearDecoderLayer

        def position_embeddings(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> None:
            return None  # MLA without rotary positions; KDA's decay carries them

    class AttnResKimiLinearForCausalLM(AttnResForCausalLMMixin, KimiLinearForCausalLM):
        config: AttnResKimiLinearConfig  # noqa: F405
        model_class = AttnResKimiLinearModel


# Checkpoints keep the donor's tensor names, which for some families (experts) are not those of the modules; and may
# have more layers than are loaded
for _config_class in (globals()[name] for name in CONFIG_CLASSES):
    _mapping = get_checkpoint_conversion_mapping(_config_class.donor_config_class().model_type) or []
    _mapping = [*_mapping, WeightConverter("depth_attention.", "depth_attention.", [RowsOfLayers()])]
    register_checkpoint_conversion_mapping(_config_class.model_type, _mapping, overwrite=True)


__all__ = [
    "ALL_DEPTH_ATTENTION_FUNCTIONS",
    "DepthAttention",
    "DepthAttentionInterface",
    "ClosedDepthRead",
    "TwoPhaseDepthAttention",
    "eager_depth_attention",
    *(
        name
        for name in globals()
        if name.startswith("AttnRes") and name.endswith(("Model", "ForCausalLM", "Classification", "Answering"))
    ),
]
