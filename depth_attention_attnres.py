# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Depth attention: what a read of Attention Residuals computes (Kimi Team, arXiv 2603.15031), and how.

Knows tensors and no model.
"""

import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, reduce

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.utils.generic import GeneralInterface


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


def write(sources: tuple[torch.Tensor, ...], output: torch.Tensor | None, extends: bool) -> tuple[torch.Tensor, ...]:
    """The sources after a sublayer's `output` has joined them, which extends the open block or opens a new one."""
    if output is None:
        return sources
    if extends:
        # in the dtype of the embedding, as a residual stream under autocast
        return *sources[:-1], sources[-1].to(sources[0].dtype) + output
    return *sources, output


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


__all__ = [
    "ALL_DEPTH_ATTENTION_FUNCTIONS",
    "ClosedDepthRead",
    "DepthAttentionInterface",
    "TwoPhaseDepthAttention",
    "eager_depth_attention",
]
