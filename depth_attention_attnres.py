# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Depth attention: what a read of Attention Residuals computes (Kimi Team, arXiv 2603.15031), and ways to compute it.

Knows no model. In this order: the specification, the interface between a model and what runs its depth attention, the
two phases of the paper in PyTorch, the norms that are fused with a read, reads of a single token, the registry of all
implementations, what a mode learns (mixers), the module of a read, and the rows of checkpoints.

A *source* is the embedding, the sum of a block's outputs or, in full mode, one output. It is *closed* when nothing will
be added to it; at most one is open. A *product* is what depth attention has learned for one read, its query times its
key norm gain.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, reduce

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.utils.generic import GeneralInterface


Sources = tuple[torch.Tensor, ...]  # each (batch, seq, hidden)


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
    values = upcast(sources)
    return scaled_sum(key_scores(values, product, eps), values, sources, scale)


def upcast(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """In float32, or float64 if the first is."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return [tensor.to(dtype) for tensor in tensors]


def key_scores(values: list[torch.Tensor], product: torch.Tensor, eps: float) -> torch.Tensor:
    """`w . RMSNorm_g(v_i)` of values `(batch, seq, hidden)`, as `(batch, num_sources, seq)`."""
    product = product.to(values[0].dtype)
    # not a matmul, which autocast would round
    scores = [(v * product).sum(-1) * torch.rsqrt(v.pow(2).mean(-1) + eps) for v in values]
    return torch.stack(scores, dim=1)


def weighted_sum(factors: torch.Tensor, values: list[torch.Tensor]) -> torch.Tensor:
    """Of values `(batch, seq, hidden)`, times factors `(batch, num_sources, seq)`."""
    return sum(factor.unsqueeze(-1) * v for factor, v in zip(factors.unbind(1), values))


def depth_softmax(scores: torch.Tensor, dim: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The softmax over `dim`, and that times `scale`.

    Of n equal scores the exponentials are 1 and their sum is n, so that n times the softmax, computed as (1 n) / n, is
    1 for any n. In float32 n (1 / n) isn't, first for n = 41.
    """
    exponentials = (scores - scores.detach().amax(dim, keepdim=True)).exp()
    total = exponentials.sum(dim, keepdim=True)
    return exponentials / total, exponentials * scale / total


def scaled_sum(
    scores: torch.Tensor, values: list[torch.Tensor], sources: Sources, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result of a read whose weights are the softmax of `scores`, `(batch, num_sources, seq)`."""
    weights, factors = depth_softmax(scores, 1, scale)
    return weighted_sum(factors, values).to(sources[0].dtype), weights


@dataclass(frozen=True)
class DepthPlace:
    """Where in a model a read is.

    Args:
        row: which of the model's reads it is.
        num_closed_sources: how many of its sources are closed, the first ones.
        num_sources: how many it has.
        eps, scale: as in [`eager_depth_attention`].
        sizes: how many vectors each source sums, the embedding or outputs.
    """

    row: int
    num_closed_sources: int
    num_sources: int
    eps: float
    scale: float
    sizes: tuple[int, ...] = ()

    @classmethod
    def of(cls, config, row: int) -> "DepthPlace":
        num_sources = config.num_depth_sources(row)
        scale = num_sources if config.attn_res_sum_scale else 1
        num_closed, sizes = config.num_closed_depth_sources(row), config.depth_source_sizes(row)
        return cls(row, num_closed, num_sources, config.attn_res_norm_eps, scale, sizes)


def joined(sources: Sources, num_sources: int) -> Sources:
    """The `num_sources` sources of a read: where there is one tensor more, the last is an output that has yet to be
    added to the open source before it."""
    if len(sources) <= num_sources:
        return tuple(sources)
    # in the dtype of the embedding, as a residual stream under autocast
    return *sources[:-2], sources[-2].to(sources[0].dtype) + sources[-1]


@dataclass
class ClosedDepthRead:
    """What phase 1 gives a read: its mix of the sources that are closed when its block opens, none of them in
    [`NOTHING_READ`].

    Not a tuple, so that wrappers which cast a layer's tensors, as FSDP does, leave it in float32.
    """

    mixed: torch.Tensor | None  # (batch, seq, hidden), not scaled
    lse: torch.Tensor | None  # (batch, seq), log-sum-exp of the scores; None if that is left to who merges one source
    weights: torch.Tensor | None  # (batch, num_sources, seq); None if nobody needs them
    num_sources: int

    def to(self, device, non_blocking: bool = False) -> "ClosedDepthRead":
        tensors = (self.mixed, self.lse, self.weights)
        moved = (None if tensor is None else tensor.to(device, non_blocking=non_blocking) for tensor in tensors)
        return ClosedDepthRead(*moved, self.num_sources)


NOTHING_READ = ClosedDepthRead(None, None, None, 0)


class DepthAttentionImplementation:
    """What runs a model's depth attention. A subclass has [`__call__`]; the other methods have plain defaults.

    A forward: the embedding is the first source, for which the model calls [`begin`]. For each block it calls
    [`open_block`], and for each of the block's sublayers [`read`], whose normed result goes into the donor's attention
    or MLP. What that puts out becomes the last of the sources, and the next read adds it to the open block (unless it
    is a source of its own: the block's first, or any in full mode). One more read comes before the final norm.

    What [`begin`] and [`open_block`] return for reads to share is handed to [`read`] as it is.

    What goes from read to read is a tuple of tensors: the sources, unless an implementation keeps something else, such
    as several streams. Then it has a [`begin`], [`joined`] and [`num_unchanged`] of its own.
    """

    def __call__(
        self, sources: Sources, product: torch.Tensor, eps: float, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One read; arguments and result as those of [`eager_depth_attention`]. An implementation that can't tell the
        weights returns None for them."""
        raise NotImplementedError

    def begin(self, sources: Sources, products: torch.Tensor, eps: float, watched: bool) -> tuple:
        """
        Args:
            sources: the embedding `(batch, seq, hidden)` alone; in a pipeline's later stage what the one before hands
                on.
            products: `(num_reads, hidden)`, or what else the mode has learned for each read.
            watched: whether reads and weights are needed themselves, not only what norms make of the reads.

        Returns:
            The first two as reads take them best, and what all reads of this forward share.
        """
        return sources, products, NOTHING_READ

    def joined(self, sources: Sources, place: DepthPlace) -> Sources:
        """The sources of the next read, whose `place` this is; the last output may have to be added."""
        return joined(sources, place.num_sources)

    def num_unchanged(self, sources: Sources, place: DepthPlace) -> int:
        """How many of the `sources`, the first ones, stay as they are when they are [`joined`] and outputs follow."""
        num_pending = len(sources) - place.num_sources
        return min(place.num_closed_sources, place.num_sources - num_pending)

    def open_block(
        self, place: DepthPlace, products: torch.Tensor, sources: Sources, norms: Callable, shared, watched: bool
    ) -> tuple[Sources, list]:
        """
        Args:
            place: of the block's first read.
            products: `(num_reads, hidden)` of the block's reads.
            sources: as they are when the block opens, of which the last may have to be [`joined`].
            norms: returns those that follow the reads.
            shared: what [`begin`] has returned for all reads.

        Returns:
            The sources, and for each read what it shares with others of the block.
        """
        return sources, len(products) * [shared]

    def read(
        self, place: DepthPlace, product: torch.Tensor, sources: Sources, norm: nn.Module, shared, watched: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor, Sources]:
        """Everything between two sublayers: the last output is [`joined`], the sources are read, the norm follows.

        Returns:
            The read `(batch, seq, hidden)` and its weights `(batch, num_sources, seq)`, which may be Nones if they
            aren't `watched`; the read after the norm; the joined sources.
        """
        sources = self.joined(sources, place)
        mixed, weights = self(sources, product, place.eps, place.scale)
        return mixed, weights, norm(mixed), sources


class EachReadItself(DepthAttentionImplementation):
    """A function with the signature of [`eager_depth_attention`] as an implementation."""

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, sources, product, eps, scale):
        return self.function(sources, product, eps, scale)


class TwoPhaseDepthAttention(DepthAttentionImplementation):
    """The two phases of Attention Residuals (Kimi Team, arXiv 2603.15031), in PyTorch alone.

    Phase 1: when a block opens, all of its reads take what they need from the sources that are closed by then, each of
    which is fetched once. Phase 2: a read merges the sources that have come since by an online softmax. Called as any
    other implementation, it reads all sources at once.
    """

    # below, each operation costs its launch, not its arithmetic, and a read is best done in few of them
    few_tokens = 32

    def __call__(self, sources, product, eps, scale):
        """[`eager_depth_attention`], with its arguments and result."""
        if is_transformed():
            return eager_depth_attention(sources, product, eps, scale)
        if sources[0].shape[:-1].numel() <= self.few_tokens:
            return stacked_depth_attention(sources, product, eps, scale)
        return self.merge(NOTHING_READ, sources, product, eps, scale)

    def begin(self, sources, products, eps, watched):
        fits = not watched and TokenReads.fit(sources[0], products)
        return sources, products, TokenScores(products, eps) if fits else NOTHING_READ

    def open_block(self, place, products, sources, norms, shared, watched):
        if shared is not NOTHING_READ or not self.pays_phase_1(sources, products):
            return super().open_block(place, products, sources, norms, shared, watched)
        sources = joined(sources, place.num_sources)
        device = sources[-1].device  # earlier layers may lie on others
        closed, products = [source.to(device) for source in sources], products.to(device)
        rounded = not watched and all(map(can_fuse_norm, norms()))
        return sources, self.phase_1(closed, products, place.eps, watched, rounded)

    def read(self, place, product, sources, norm, shared, watched):
        if isinstance(shared, TokenReads):
            if product.is_cpu and not watched and shared.takes(sources):  # layers may lie on several devices
                return shared.read(place, product, sources, norm)
            shared = NOTHING_READ
        if watched and shared.weights is None:
            shared = NOTHING_READ
        return self.phase_2(place, product, sources, norm, shared, watched)

    def pays_phase_1(self, sources: Sources, products: torch.Tensor) -> bool:
        """Whether reads with these `products` had better read closed `sources` together."""
        return len(sources) > 1 and not is_transformed() and sources[0].shape[:-1].numel() > self.few_tokens

    def phase_1(
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

    def phase_2(self, place, product, sources, norm, closed_read: ClosedDepthRead, watched):
        """[`read`] of what has come since `closed_read`."""
        sources = joined(sources, place.num_sources)
        arguments = (closed_read, sources, product, place.eps, place.scale)
        if not self.fuses_norm(closed_read, sources, norm, watched):
            mixed, weights = self.merge(*arguments) if closed_read.num_sources else self(*arguments[1:])
            return mixed, weights, fused_rms_norm(norm, mixed), sources
        if torch.is_grad_enabled():
            normed, weights = self.merge(*arguments, norm)
        else:
            mixed, weights = self.merge(*arguments)
            normed, _ = rms_norm_forward(mixed, norm.weight, norm.variance_epsilon, in_place=True)
        return None, weights, normed, sources

    def fuses_norm(self, closed_read: ClosedDepthRead, sources: Sources, norm: nn.Module, watched: bool) -> bool:
        """Whether a read that nobody sees takes part of the memory or time of the norm after it."""
        if watched or torch.compiler.is_compiling() or is_transformed():
            return False
        few_tokens = sources[0].shape[:-1].numel() <= self.few_tokens
        if few_tokens or sources[0].dtype == torch.float64 or not can_fuse_norm(norm):
            return False
        merges = len(sources) - closed_read.num_sources + (closed_read.num_sources > 0) > 1
        return merges or not torch.is_grad_enabled()

    def merge(self, closed_read: ClosedDepthRead, sources, product, eps, scale, norm: nn.Module | None = None):
        """A read of `sources`, of which the first may have been read before. The result is as without.

        With a `norm`, one of Llama's, it is the normalised mix, and the mix is not kept for the backward pass.
        """
        with_gradients = torch.is_grad_enabled() or product.requires_grad  # or a forward of re-entrant checkpointing
        product = product.to(torch.promote_types(sources[0].dtype, torch.float32))
        new_sources = sources[closed_read.num_sources :]
        if not new_sources:
            mixed = closed_read.mixed if scale == 1 else closed_read.mixed * scale
            return mixed.to(sources[0].dtype), closed_read.weights
        if closed_read.num_sources and len(new_sources) == 1 and not with_gradients:
            return self.merge_in_place(closed_read, new_sources[0], product, eps, scale)
        norm = (None, 0) if norm is None else (norm.weight, norm.variance_epsilon)
        arguments = (product[None], constant(eps, product), scale, closed_read.mixed, closed_read.lse, *norm)
        _, weights, mixed = DepthAttentionFunction.apply(*arguments, *new_sources)
        weights = weights[0].transpose(0, 1)
        if not closed_read.num_sources:
            weights = weights.contiguous()
        elif closed_read.weights is None:
            weights = None
        else:
            weights = torch.cat([closed_read.weights * weights[:, :1], weights[:, 1:]], dim=1)
        return mixed if norm[0] is not None else mixed.to(sources[0].dtype), weights

    def merge_in_place(self, closed_read: ClosedDepthRead, source, product, eps, scale):
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


def stacked_depth_attention(sources, product, eps, scale):
    """[`eager_depth_attention`], with its arguments and result, in few operations on a copy of all sources."""
    dtype = torch.promote_types(sources[0].dtype, torch.float32)
    values = torch.stack(tuple(sources)).to(dtype)
    scores = nn.functional.rms_norm(values, values.shape[-1:], product.to(dtype), eps).sum(-1)
    weights = scores.softmax(0)  # (num_sources, batch, seq)
    mixed = (values * (weights * scale).unsqueeze(-1)).sum(0)
    return mixed.to(sources[0].dtype), weights.transpose(0, 1).contiguous()


class DepthAttentionFunction(torch.autograd.Function):
    """Several reads of the same sources; each may start from what it has read of other sources before.

    Saves a few numbers per token, read and source, and computes everything else again in the backward pass.
    For scores s_i and weights w = softmax(s) of sources v_i, a read h = c sum_i w_i v_i and l = log sum_i exp(s_i), a
    loss L has by the weights G_i = dL/dw_i + c (dL/dh . v_i), where dL/dw_i is what it makes of them itself, and, as
    dw_i/ds_j = w_i ([i = j] - w_j) and dl/ds_j = w_j, by the scores

        dL/ds_j = w_j (G_j - sum_i w_i G_i) + w_j dL/dl

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
        weights, factors = depth_softmax(all_scores, 1, scale)
        mixed = mixes(sources if before is None else (before, *sources), factors)
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
            (mixed,) = mixes(all_sources, weights * ctx.scale)  # again
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


def mixes(sources, factors: torch.Tensor) -> list[torch.Tensor]:
    """For each read, the sum of the sources times its `factors`, `(num_reads, num_sources, batch, seq)`."""
    mixed = [None] * len(factors)
    for values, value_factors in zip(sources, factors.unbind(1)):
        values = values.to(factors.dtype)
        for read, factor in enumerate(value_factors.unsqueeze(-1)):
            mixed[read] = values * factor if mixed[read] is None else mixed[read].addcmul_(values, factor)
    return mixed


def gradients_by_scores(
    grads: torch.Tensor, scores: torch.Tensor, inverse_rms: torch.Tensor, products: torch.Tensor, sources, needed
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """What a loss's gradients by the scores, `grads`, add to those by what the scores are made of.

    A score is s = r (p . v) with r = (v . v / d + eps)^-1/2 of a source v of d numbers and a product p. As
    dr/dv = -r^3 v / d, ds/dp = r v and ds/dv = r p - r^2 s v / d.

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


# a tensor, as adding a number to one would make it one at every call; on a CPU also under a default device
ZERO = torch.zeros((), device="cpu")


class TokenReads:
    """All reads of a single token, without gradients and without weights. For decoding on a CPU. A model whose reads
    share them opens no blocks."""

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

    def takes(self, sources: Sources) -> bool:
        """Whether these can be read here; called before [`read`]."""
        return True

    def to(self, device, non_blocking: bool = False) -> "TokenReads":
        return self

    def read(self, place: DepthPlace, product: torch.Tensor, sources: Sources, norm: nn.Module) -> tuple:
        """[`DepthAttentionImplementation.read`], unwatched."""
        raise NotImplementedError


class TokenScores(TokenReads):
    """Keeps the scores of the sources as numbers of Python, as a read costs its operations, not their arithmetic.

    A source gets its scores in all reads when it is closed; a read mixes the sources one by one in an online softmax.
    """

    def __init__(self, products: torch.Tensor, eps: float):
        self.products, self.eps = products, eps  # (num_reads, hidden)
        self.values = []  # the closed sources (1, 1, hidden), in the dtype of the products
        self.scores = [[] for _ in range(products.shape[0])]  # for each read, those of these sources

    def read(self, place, product, sources, norm):
        sources = joined(sources, place.num_sources)
        dtype, scale = product.dtype, place.scale
        for source in sources[len(self.values) : place.num_closed_sources]:
            source = source.to(dtype)
            vector = source.reshape(-1)
            factor = self.inverse_rms(vector, self.eps)
            self.values.append(source)
            for scores, score in zip(self.scores, torch.mv(self.products, vector).tolist()):
                scores.append(score * factor)
        values, scores = self.values, self.scores[place.row]
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


def as_implementation(function: Callable) -> DepthAttentionImplementation:
    return function if isinstance(function, DepthAttentionImplementation) else EachReadItself(function)


class DepthAttentionInterface(GeneralInterface):
    """Implementations of depth attention by name.

    Select one with `from_pretrained(..., attn_res_implementation=name)` or `model.set_attn_res_implementation(name)`;
    add a [`DepthAttentionImplementation`], or a function with the signature and result of [`eager_depth_attention`],
    with `DepthAttentionInterface.register(name, function)`.
    """

    default = "two_phase"
    absent: dict[str, str] = {}  # names that can't be had here, with the reason
    _global_mapping = {"eager": EachReadItself(eager_depth_attention), "two_phase": TwoPhaseDepthAttention()}

    @classmethod
    def register(cls, key: str, value: Callable):
        super().register(key, as_implementation(value))

    def __setitem__(self, key: str, value: Callable):
        super().__setitem__(key, as_implementation(value))

    def get_interface(self, name: str) -> DepthAttentionImplementation:
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


class DepthMixer(nn.Module):
    """What a mode has learned for all reads of a model, and what mixes the sources with it.

    Parameters stay in float32: `model.to(torch.bfloat16)` and the like move them but don't round them. [`forward`]
    makes of them what each read takes, `(num_depth_reads, ...)`: fresh float32 tensors, as a sharded parameter may be
    freed after this module's forward.

    As a group of torch's `fully_shard` has one dtype, it gets one of its own in a model of another dtype:

    ```python
    fully_shard(model.model.depth_attention)
    fully_shard(model)
    ```
    """

    sums_to_one = True  # the weights of a read; otherwise they are factors, 1 each in the plain sum
    depends_on_input = True  # so that tokens have weights of their own
    shared_by_reads: tuple[str, ...] = ()  # parameters that aren't made of rows
    idle: tuple[str, ...] = ()  # parameters that, as long as they are as at first, make the model a donor; () for all

    def reset_parameters(self):
        """Gives the parameters their initial values: those of a donor, if `attn_res_sum_scale` is set."""
        raise NotImplementedError

    @staticmethod
    def implementation(config) -> DepthAttentionImplementation:
        """What mixes the sources."""
        return ALL_DEPTH_ATTENTION_FUNCTIONS.get_interface(config._attn_res_implementation)

    @staticmethod
    def why_no_donor(config) -> str | None:
        """Why a model of this configuration can't compute what a donor does; None if it can."""
        return None

    def rows_of(self, name: str, parameter: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """A copy of what belongs to the reads with these `rows`, two of each layer that stays, and to the last read."""
        return parameter.clone() if name in self.shared_by_reads else parameter[[*rows, -1]]

    def keep_rows(self, rows: Sequence[int]):
        for name, parameter in list(self.named_parameters(recurse=False)):
            kept = nn.Parameter(self.rows_of(name, parameter.detach(), rows), parameter.requires_grad)
            kept._is_hf_initialized = getattr(parameter, "_is_hf_initialized", False)
            setattr(self, name, kept)

    def _apply(self, fn, recurse=True):
        def move(tensor):
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        return super()._apply(move, recurse)


class DepthQueries(DepthMixer):
    """The queries and key norm gains of Attention Residuals. Zero queries, the initial ones, weight sources equally."""

    idle = ("query",)

    def __init__(self, config):
        super().__init__()
        shape = (config.num_depth_reads, config.hidden_size)
        self.query = nn.Parameter(torch.zeros(shape, dtype=torch.float32))
        self.key_norm = nn.Parameter(torch.ones(shape, dtype=torch.float32))

    def reset_parameters(self):
        init.zeros_(self.query)
        init.ones_(self.key_norm)

    def forward(self) -> torch.Tensor:
        """The products `query * key_norm`, `(num_depth_reads, hidden)`."""
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        return self.query.to(dtype) * self.key_norm.to(dtype)


DEPTH_MIXERS: dict[str, type[DepthMixer]] = {"block": DepthQueries, "full": DepthQueries}  # by mode


class NormOfRead:
    """A norm as an argument of a read: what wraps the read, as accelerate does, moves modules that it sees to a device,
    which it can't do to one that lies elsewhere or on disk."""

    def __init__(self, module: nn.Module):
        self.module = module


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether somebody sees or changes what a module returns; so it is held where torch doesn't tell."""
    return bool(getattr(module, "_forward_hooks", True))


class DepthRead(nn.Module):
    """Everything between two sublayers: the read of a `row`, in the place that it has in a model. Has no parameters."""

    def __init__(self, config, row: int):
        super().__init__()
        self.set_place(config, row)
        self.set_implementation(config)

    def set_place(self, config, row: int):
        self.place = DepthPlace.of(config, row)

    def set_implementation(self, config):
        self.implementation = DEPTH_MIXERS[config.attn_res_mode].implementation(config)

    def forward(
        self, product: torch.Tensor, sources: Sources, norm: NormOfRead, shared=NOTHING_READ, watched: bool = False
    ) -> tuple:
        """Arguments and result are those of [`DepthAttentionImplementation.read`]."""
        watched = watched or has_forward_hooks(self)
        return self.implementation.read(self.place, product, sources, norm.module, shared, watched)


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
        module_name, _, name = full_layer_name.rpartition(".")
        module = model.get_submodule(module_name)
        if name in module.shared_by_reads:
            return {target_patterns[0]: parameter}
        if len(parameter) < num_reads:
            raise ValueError(
                f"{full_layer_name} has {len(parameter)} rows, those of {len(parameter) // 2} layers, and "
                f"num_hidden_layers is {config.num_hidden_layers}: there is nothing from which the others could get "
                "theirs. Set num_hidden_layers to the number of layers, or fewer."
            )
        if len(parameter) > num_reads:
            parameter = module.rows_of(name, parameter, range(num_reads - 1))
        return {target_patterns[0]: parameter}

    @property
    def reverse_op(self) -> ConversionOps:
        return self


def register_checkpoint_names(config_class: type):
    """Checkpoints keep the donor's tensor names, which for some families (experts) are not those of the modules; and
    may have more layers than are loaded."""
    mapping = get_checkpoint_conversion_mapping(config_class.donor_config_class().model_type) or []
    mapping = [*mapping, WeightConverter("depth_attention.", "depth_attention.", [RowsOfLayers()])]
    register_checkpoint_conversion_mapping(config_class.model_type, mapping, overwrite=True)


__all__ = [
    "ALL_DEPTH_ATTENTION_FUNCTIONS",
    "DEPTH_MIXERS",
    "NOTHING_READ",
    "ClosedDepthRead",
    "DepthAttentionImplementation",
    "DepthAttentionInterface",
    "DepthMixer",
    "DepthPlace",
    "DepthQueries",
    "DepthRead",
    "EachReadItself",
    "NormOfRead",
    "Sources",
    "TokenReads",
    "TwoPhaseDepthAttention",
    "eager_depth_attention",
    "has_forward_hooks",
    "joined",
    "register_checkpoint_names",
]
