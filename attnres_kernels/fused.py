# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Fused operators of depth attention (Kimi Team, arXiv 2603.15031), over kernels for one kind of device or another.

Two operators share the work of a block, as in the two-phase computation of the paper. [`closed_reads`] reads each
closed source once for all reads of the block; [`depth_step`], once per sublayer, adds the sublayer's output to the open
partial sum, merges that sum into the read by an online softmax, and normalises the result for the next sublayer.

Letters in shapes: `tokens` is any number of leading dimensions (batch, seq), d the hidden size, n the number of closed
sources, S the number of reads. The score of source i in read s is

    score_si = (p_s . v_i) * rsqrt(mean(v_i^2) + eps),    p_s = query_s * key_norm_s

and its weight the softmax over i. Arithmetic is float32, with one rounding per result. Gradients are the same on every
run: sums over tokens are partial sums in a fixed order, without atomics.

Without gradients, and while sources are small enough to be fetched again for each read, a third one takes their place:
`depth_read` does everything between two sublayers from the sources themselves.

All are custom operators that `torch.compile` takes whole and CUDA graphs capture; of a formula it would make code for
each read of a model anew, and be longer about it. Kernels are in triton_kernels.py for GPUs and in cpu.py for CPUs;
importing a file makes its devices known here.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers.utils import logging

from depth_attention_attnres import (
    NOTHING_READ,
    ClosedDepthRead,
    TokenReads,
    TwoPhaseDepthAttention,
    can_fuse_norm,
    eager_depth_attention,
    is_transformed,
    joined,
)


logger = logging.get_logger(__name__)

MOST_READS = 32  # of one kernel; more would not fit into a GPU's registers
CACHE_BYTES = 1 << 25  # of the last level of a CPU or GPU, about


class DepthKernels:
    """What computes the operators on a kind of device. Tensors are contiguous, and there is at least one token."""

    name: str  # under which users choose them
    dtypes: tuple[torch.dtype, ...]
    few_tokens = TwoPhaseDepthAttention.few_tokens  # at most as many are better left to PyTorch
    reads_few_tokens = False  # but not where `read_forward` reads them

    def __eq__(self, other):  # also of copies and what has been pickled
        return type(self) is type(other)

    def closed_forward(self, sources, products, eps, mixed, lse, scores, inverse_rms):
        """Fills `mixed`, S tensors `(*tokens, d)`, `lse` `(S, *tokens)`, `scores` `(n, S, num_tokens)`, not divided by
        anything, and `inverse_rms` `(n, num_tokens)`."""
        raise NotImplementedError

    def closed_backward(
        self,
        sources,
        products,
        lse,
        scores,
        inverse_rms,
        grad_mixed,
        grad_lse,
        grad_scores,
        grad_sources,
        need_products,
    ):
        """Fills `grad_sources`, a list that is empty if they aren't needed, and returns the gradient of the products,
        if it is. `grad_scores` is what else the loss makes of the scores, or None."""
        raise NotImplementedError

    def step_forward(
        self, partial, output, mixed, lse, product, score, key_eps, scale, norm_weight, norm_eps, dtype, results
    ):
        """Fills the results of [`depth_step`] that aren't empty, of which the last are statistics `(5, num_tokens)`:
        score and inverse RMS of the value, those of `mixed`, and the inverse RMS of the read, zeros where there is no
        such thing."""
        raise NotImplementedError

    def step_backward(
        self,
        value,
        mixed,
        product,
        norm_weight,
        statistics,
        grads,
        scale,
        dtype,
        grad_value,
        grad_mixed,
        grad_lse,
    ):
        """Fills the last three, of which the first and last may be empty, and returns the gradients of product and
        gain, if they are needed. `grads` are those of partial sum, normalised read, read and weight, or Nones."""
        raise NotImplementedError

    def read_forward(
        self, sources, output, product, eps, scale, norm_weight, norm_eps, dtype, partial, normed, hidden, weights
    ):
        """Fills the last four that aren't empty; weights are `(batch, n, seq)`.

        `output` joins the last source if `partial` isn't empty, and is their sum; else it is one more source.
        """
        raise NotImplementedError

    def token_reads(self, embedding, products, eps) -> TokenReads | ClosedDepthRead:
        """What reads a single token on a CPU better than `read_forward`, if there is such a thing."""
        return NOTHING_READ


KERNELS: dict[str, DepthKernels] = {}  # by type of device


# Not a public name; in a torch without it, operators are always used
num_dispatch_modes = getattr(getattr(torch, "_C", None), "_len_torch_dispatch_stack", lambda: 1)


def is_untraced() -> bool:
    """Whether kernels may be called themselves, as nothing but gradients needs to see operators; it takes less time."""
    return not torch.compiler.is_compiling() and num_dispatch_modes() == 0


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is no subclass, distributed or fake."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter)


def kernels_for(tensor: torch.Tensor) -> DepthKernels:
    if tensor.device.type not in KERNELS:
        raise RuntimeError(
            f"There are no fused kernels for tensors on the device {tensor.device}: move the model, or choose another "
            "attn_res_implementation (two_phase, eager)."
        )
    return KERNELS[tensor.device.type]


def contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


# Schemas are written out because older versions of torch infer fewer types


def _closed_reads_kernel(
    sources: list[torch.Tensor], products: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    results = _closed_reads_results(sources, products, dtype)
    if results[3].numel() > 0:
        sources, (products,) = contiguous(*sources), contiguous(products)
        kernels_for(products).closed_forward(sources, products, eps, *results)
    return results


_closed_reads = torch.library.custom_op(
    "attnres::closed_reads",
    _closed_reads_kernel,
    mutates_args=(),
    schema="(Tensor[] sources, Tensor products, float eps, ScalarType dtype) -> (Tensor[], Tensor, Tensor, Tensor)",
)


def _closed_reads_results(sources, products, dtype):
    """Uninitialised results."""
    (num_reads, _), num_sources, shape = products.shape, len(sources), sources[0].shape
    num_tokens = sources[0].numel() // shape[-1]
    return (
        [products.new_empty(shape, dtype=dtype) for _ in range(num_reads)],
        products.new_empty(num_reads, *shape[:-1]),
        products.new_empty(num_sources, num_reads, num_tokens),
        products.new_empty(num_sources, num_tokens),
    )


@_closed_reads.register_fake
def _(sources, products, eps, dtype):
    return _closed_reads_results(sources, products, dtype)


def _closed_reads_backward_kernel(
    sources: list[torch.Tensor],
    products: torch.Tensor,
    lse: torch.Tensor,
    scores: torch.Tensor,
    inverse_rms: torch.Tensor,
    grad_mixed: list[torch.Tensor],
    grad_lse: torch.Tensor,
    grad_scores: torch.Tensor | None,
    need_sources: bool,
    need_products: bool,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    grad_sources = [source.new_empty(source.shape) for source in sources] if need_sources else []
    if inverse_rms.numel() == 0:
        return grad_sources, torch.zeros_like(products) if need_products else products.new_empty(0)
    sources, grad_mixed = contiguous(*sources), contiguous(*grad_mixed)
    products, grad_lse, grad_scores = contiguous(products, grad_lse, grad_scores)
    grad_products = kernels_for(products).closed_backward(
        sources,
        products,
        lse,
        scores,
        inverse_rms,
        grad_mixed,
        grad_lse,
        grad_scores,
        grad_sources,
        need_products,
    )
    return grad_sources, grad_products if need_products else products.new_empty(0)


_closed_reads_backward = torch.library.custom_op(
    "attnres::closed_reads_backward",
    _closed_reads_backward_kernel,
    mutates_args=(),
    schema="(Tensor[] sources, Tensor products, Tensor lse, Tensor scores, Tensor inverse_rms, Tensor[] grad_mixed, "
    "Tensor grad_lse, Tensor? grad_scores, bool need_sources, bool need_products) -> (Tensor[], Tensor)",
)


@_closed_reads_backward.register_fake
def _(sources, products, lse, scores, inverse_rms, grad_mixed, grad_lse, grad_scores, need_sources, need_products):
    grad_sources = [source.new_empty(source.shape) for source in sources] if need_sources else []
    return grad_sources, products.new_empty(products.shape if need_products else 0)


def _closed_reads_setup(ctx, inputs, output):
    sources, products, _, ctx.dtype = inputs
    _, lse, scores, inverse_rms = output
    ctx.save_for_backward(*sources, products, lse, scores, inverse_rms)
    ctx.mark_non_differentiable(inverse_rms)
    ctx.set_materialize_grads(False)


def _closed_reads_gradients(ctx, grad_mixed, grad_lse, grad_scores, need_sources, need_products):
    *sources, products, lse, scores, inverse_rms = ctx.saved_tensors
    if any(grad is None for grad in grad_mixed):  # a read that nothing used
        zeros = torch.zeros_like(sources[0], dtype=ctx.dtype)
        grad_mixed = [zeros if grad is None else grad for grad in grad_mixed]
    grad_sources, grad_products = (_closed_reads_backward_kernel if is_untraced() else _closed_reads_backward)(
        sources,
        products,
        lse,
        scores,
        inverse_rms,
        list(grad_mixed),
        torch.zeros_like(lse) if grad_lse is None else grad_lse,
        grad_scores,
        need_sources,
        need_products,
    )
    return list(grad_sources) if need_sources else [None] * len(sources), grad_products if need_products else None


def _closed_reads_autograd(ctx, grad_mixed, grad_lse, grad_scores, _):
    needs = any(ctx.needs_input_grad[0]), ctx.needs_input_grad[1]
    return *_closed_reads_gradients(ctx, grad_mixed, grad_lse, grad_scores, *needs), None, None


_closed_reads.register_autograd(_closed_reads_autograd, setup_context=_closed_reads_setup)


class ClosedReadsFunction(torch.autograd.Function):
    """The operator without the dispatcher, which may take longer than the kernel does."""

    @staticmethod
    def forward(ctx, products, eps, dtype, *sources):
        inputs = (sources, products, eps, dtype)
        output = _closed_reads_kernel(*inputs)
        _closed_reads_setup(ctx, inputs, output)
        return *output[0], *output[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        *grad_mixed, grad_lse, grad_scores, _ = grads
        needs = any(ctx.needs_input_grad[3:]), ctx.needs_input_grad[0]
        grad_sources, grad_products = _closed_reads_gradients(ctx, grad_mixed, grad_lse, grad_scores, *needs)
        return grad_products, None, None, *grad_sources


def _closed_reads_untraced(sources, products, eps, dtype):
    *mixed, lse, scores, inverse_rms = ClosedReadsFunction.apply(products, eps, dtype, *sources)
    return mixed, lse, scores, inverse_rms


def _closed_reads_compiled(sources, products, eps, dtype):
    if not torch.is_grad_enabled():
        return _closed_reads(sources, products, eps, dtype)

    # a compiler would keep all mixes for the backward pass, which would take more memory than the stock model does
    def run(products, *sources):
        return _closed_reads(list(sources), products, eps, dtype)

    return checkpoint(run, products, *sources, use_reentrant=False, preserve_rng_state=False)


def closed_reads(
    sources: Sequence[torch.Tensor],
    products: torch.Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
    return_weights: bool = False,
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor] | tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]:
    """All reads of a block over its closed sources, `mixed_s = sum_i softmax_i(score_si) v_i`, not yet scaled.

    Moves (n + S) d numbers per token to and from memory, in the backward pass (2n + S) d, and n d more where the
    products need a gradient. Saves 4 (nS + n + S) bytes per token besides its arguments. When compiled, it saves its
    arguments alone, and computes the rest again in the backward pass.

    Args:
        sources: n tensors `(*tokens, d)`, the values v_i, float32, bfloat16 or float16. Where dtypes differ, that of
            the first counts.
        products: `(S, d)`, query times key norm gain of each read.
        eps: epsilon of the RMSNorm of the keys.
        dtype: of the result; default the sources'. float32 leaves the only rounding to what follows.
        return_weights: also return the weights.

    Returns:
        S tensors `(*tokens, d)` (tensors of their own, so that their gradients need no copy), and float32
        `(S, *tokens)`, the log of the sum of exponentials of the scores, with which more sources can be merged; on
        request the weights, float32 `(S, n, *tokens)`.

    Raises:
        ValueError: no source, or shapes that don't agree.
        TypeError: a dtype without kernels, such as float64.
    """
    if not sources:
        raise ValueError("closed_reads needs at least one source.")
    shape = sources[0].shape
    if any(source.shape != shape for source in sources):
        raise ValueError(f"Sources differ in shape: {sorted({tuple(source.shape) for source in sources})}.")
    if products.dim() != 2 or products.shape[0] == 0 or products.shape[1:] != shape[-1:]:
        raise ValueError(f"products {tuple(products.shape)} is not (reads, {shape[-1]}), with at least one read.")
    source_dtype = sources[0].dtype
    _check_dtypes(products, *(source.dtype for source in sources), products.dtype)
    if dtype not in (None, source_dtype, torch.float32):
        raise TypeError(f"closed_reads of {source_dtype} sources gives {source_dtype} or torch.float32, not {dtype}.")
    sources = [source.to(source_dtype) for source in sources]
    if torch.compiler.is_compiling():
        run = _closed_reads_compiled
    else:
        run = _closed_reads_untraced if is_untraced() else _closed_reads
    parts = [run(sources, part, eps, dtype or source_dtype) for part in products.float().split(MOST_READS)]
    lse = parts[0][1] if len(parts) == 1 else torch.cat([lse for _, lse, _, _ in parts])
    mixed = tuple(read for mixed, _, _, _ in parts for read in mixed)
    if not return_weights:
        return mixed, lse
    scores = torch.cat([scores for _, _, scores, _ in parts], dim=1).transpose(0, 1)
    return mixed, lse, (scores.view(len(products), len(sources), *shape[:-1]) - lse.unsqueeze(1)).exp()


def _check_dtypes(tensor: torch.Tensor, *dtypes: torch.dtype | None):
    kernels = kernels_for(tensor)
    for dtype in dtypes:
        if dtype is not None and dtype not in kernels.dtypes:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in kernels.dtypes)
            raise TypeError(
                f"The {kernels.name} kernels take {known}, not {dtype}: choose another attn_res_implementation "
                "(two_phase, eager)."
            )


def _depth_step_kernel(
    partial: torch.Tensor | None,
    output: torch.Tensor | None,
    mixed: torch.Tensor,
    lse: torch.Tensor | None,
    product: torch.Tensor | None,
    score: torch.Tensor | None,
    key_eps: float,
    scale: float,
    norm_weight: torch.Tensor | None,
    norm_eps: float,
    return_hidden: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    results = _depth_step_results(partial, output, mixed, norm_weight, return_hidden, dtype)
    if mixed.numel() > 0:
        partial, output, mixed, lse, product, score, norm_weight = contiguous(
            partial, output, mixed, lse, product, score, norm_weight
        )
        kernels_for(mixed).step_forward(
            partial, output, mixed, lse, product, score, key_eps, scale, norm_weight, norm_eps, dtype, results
        )
    return results


_depth_step = torch.library.custom_op(
    "attnres::depth_step",
    _depth_step_kernel,
    mutates_args=(),
    schema="(Tensor? partial, Tensor? output, Tensor mixed, Tensor? lse, Tensor? product, Tensor? score, "
    "float key_eps, float scale, Tensor? norm_weight, float norm_eps, bool return_hidden, ScalarType dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _depth_step_results(partial, output, mixed, norm_weight, return_hidden, dtype):
    """Uninitialised results; those that are not asked for are empty."""
    absent = (0,)
    if partial is None:
        new_partial = mixed.new_empty(absent)
    else:
        new_partial = mixed.new_empty(mixed.shape, dtype=torch.promote_types(partial.dtype, output.dtype))
    if norm_weight is None:
        normed = mixed.new_empty(absent)
    else:
        normed = mixed.new_empty(mixed.shape, dtype=torch.promote_types(dtype, norm_weight.dtype))
    return (
        new_partial,
        normed,
        mixed.new_empty(mixed.shape if return_hidden else absent, dtype=dtype),
        mixed.new_empty(absent if output is None else mixed.shape[:-1], dtype=torch.float32),
        mixed.new_empty(5, mixed.numel() // mixed.shape[-1], dtype=torch.float32),
    )


@_depth_step.register_fake
def _(partial, output, mixed, lse, product, score, key_eps, scale, norm_weight, norm_eps, return_hidden, dtype):
    return _depth_step_results(partial, output, mixed, norm_weight, return_hidden, dtype)


def _depth_step_backward_kernel(
    value: torch.Tensor | None,
    mixed: torch.Tensor,
    product: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    statistics: torch.Tensor,
    has_lse: bool,
    grad_partial: torch.Tensor | None,
    grad_normed: torch.Tensor | None,
    grad_hidden: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_value, grad_mixed, grad_lse, grad_product, grad_norm_weight = _depth_step_grads(
        value, mixed, product, norm_weight, statistics, has_lse, grad_normed
    )
    if mixed.numel() == 0:
        return grad_value, grad_mixed, grad_lse, grad_product.zero_(), grad_norm_weight.zero_()
    value, mixed, product, norm_weight = contiguous(value, mixed, product, norm_weight)
    product_sum, norm_sum = kernels_for(mixed).step_backward(
        value,
        mixed,
        product,
        norm_weight,
        statistics,
        contiguous(grad_partial, grad_normed, grad_hidden, grad_weight),
        scale,
        dtype,
        grad_value,
        grad_mixed,
        grad_lse,
    )
    if product_sum is not None:
        grad_product = product_sum
    if norm_sum is not None:
        grad_norm_weight = norm_sum.to(grad_norm_weight.dtype, copy=True)  # it may be part of the same tensor
    return grad_value, grad_mixed, grad_lse, grad_product, grad_norm_weight


_depth_step_backward = torch.library.custom_op(
    "attnres::depth_step_backward",
    _depth_step_backward_kernel,
    mutates_args=(),
    schema="(Tensor? value, Tensor mixed, Tensor? product, Tensor? norm_weight, Tensor statistics, bool has_lse, "
    "Tensor? grad_partial, Tensor? grad_normed, Tensor? grad_hidden, Tensor? grad_weight, float scale, "
    "ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _depth_step_grads(value, mixed, product, norm_weight, statistics, has_lse, grad_normed):
    return (
        mixed.new_empty(0) if value is None else value.new_empty(value.shape),
        mixed.new_empty(mixed.shape),
        statistics.new_empty(mixed.shape[:-1] if has_lse and value is not None else 0),
        statistics.new_empty(0 if value is None or product is None else product.shape),
        mixed.new_empty(0) if grad_normed is None else norm_weight.new_empty(norm_weight.shape),
    )


@_depth_step_backward.register_fake
def _(
    value,
    mixed,
    product,
    norm_weight,
    statistics,
    has_lse,
    grad_partial,
    grad_normed,
    grad_hidden,
    grad_weight,
    scale,
    dtype,
):
    return _depth_step_grads(value, mixed, product, norm_weight, statistics, has_lse, grad_normed)


def _depth_step_setup(ctx, inputs, output):
    partial, sublayer_output, mixed, lse, product, score, _, ctx.scale, norm_weight, *_ = inputs
    new_partial, _, _, _, statistics = output
    ctx.return_hidden, ctx.dtype = inputs[-2:]
    ctx.has_lse, ctx.has_score = lse is not None, score is not None
    ctx.input_dtypes = [None if t is None else t.dtype for t in (partial, sublayer_output)]
    value = sublayer_output if partial is None else new_partial
    ctx.save_for_backward(value, mixed, product, norm_weight, statistics)
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)


def _depth_step_autograd(ctx, grad_partial, grad_normed, grad_hidden, grad_weight, _):
    value, mixed, product, norm_weight, statistics = ctx.saved_tensors
    partial_dtype, output_dtype = ctx.input_dtypes
    if partial_dtype is None:
        grad_partial = None
    if norm_weight is None:
        grad_normed = None
    if not ctx.return_hidden:
        grad_hidden = None
    if value is None:
        grad_weight = None
    run = _depth_step_backward_kernel if is_untraced() else _depth_step_backward
    grad_value, grad_mixed, grad_lse, grad_product, grad_norm_weight = run(
        value,
        mixed,
        product,
        norm_weight,
        statistics,
        ctx.has_lse,
        grad_partial,
        grad_normed,
        grad_hidden,
        grad_weight,
        ctx.scale,
        ctx.dtype,
    )
    return (
        None if partial_dtype is None else grad_value.to(partial_dtype),
        None if output_dtype is None else grad_value.to(output_dtype),
        grad_mixed,
        grad_lse if ctx.has_lse and value is not None else None,
        None if value is None or product is None else grad_product,
        -grad_lse if ctx.has_score else None,
        None,
        None,
        None if grad_normed is None else grad_norm_weight,
        None,
        None,
        None,
    )


_depth_step.register_autograd(_depth_step_autograd, setup_context=_depth_step_setup)


class DepthStepFunction(torch.autograd.Function):
    """As [`ClosedReadsFunction`]."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _depth_step_kernel(*inputs)
        _depth_step_setup(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        return _depth_step_autograd(ctx, *grads)


class DepthStep(NamedTuple):
    """What [`depth_step`] returns; what was not asked for, or does not exist, is None."""

    partial: torch.Tensor | None  # (*tokens, d), the open partial sum with the new output in it
    normed: torch.Tensor | None  # (*tokens, d), the pre-norm of the read
    hidden: torch.Tensor | None  # (*tokens, d), the read
    weight: torch.Tensor | None  # (*tokens), float32, the weight of the partial sum in the read


def depth_step(
    partial: torch.Tensor | None,
    output: torch.Tensor | None,
    mixed: torch.Tensor,
    lse: torch.Tensor | None,
    product: torch.Tensor | None,
    key_eps: float,
    scale: float = 1.0,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    return_hidden: bool = False,
    dtype: torch.dtype | None = None,
    score: torch.Tensor | None = None,
) -> DepthStep:
    """Everything between two sublayers in one pass over the tokens.

        v = partial + output,    beta = sigmoid(score(v) - lse)
        hidden = scale * ((1 - beta) * mixed + beta * v)
        normed = norm_weight * RMSNorm(hidden), cast before the weight is applied, as in Llama

    Moves 5d numbers per token to and from memory, in the backward pass 6d.

    Args:
        partial: `(*tokens, d)`, the open partial sum, or None where `output` is the first of its block.
        output: `(*tokens, d)`, what the last sublayer wrote, or None at the first read of a block, which sees closed
            sources only.
        mixed: `(*tokens, d)`, this read's result of [`closed_reads`].
        lse: `(*tokens)`, likewise; None where a single source is closed, which is then given as `mixed` itself: its
            score is computed here.
        product: `(d,)`, query times key norm gain of this read; None without an output, or with a `score`.
        key_eps: epsilon of the RMSNorm of the keys.
        scale: factor of the read.
        norm_weight: `(d,)`, gain of the pre-norm, or None for no pre-norm.
        norm_eps: epsilon of the pre-norm.
        return_hidden: also write `hidden`; without a pre-norm it always is.
        dtype: of `hidden` and of the normalised value before the gain; default that of `mixed`.
        score: `(*tokens)`, where `output` is itself a mix of sources: their log-sum-exp, which is then its score. So
            the results of two [`closed_reads`] are merged, as Full mode needs it.

    Raises:
        ValueError: arguments that don't go together, or shapes that don't agree.
        TypeError: a dtype without kernels, such as float64.
    """
    if partial is not None and output is None:
        raise ValueError("depth_step got a partial sum without an output to add to it.")
    if (product is None) == (score is None) and output is not None:
        raise ValueError("depth_step needs a product or the score of the output, and not both.")
    if score is not None and (partial is not None or output is None or lse is None):
        raise ValueError("depth_step takes a score with an output alone and a lse, without a partial sum.")
    tensors = (partial, output, mixed, lse, product, score, norm_weight)
    _check_dtypes(mixed, *(None if tensor is None else tensor.dtype for tensor in tensors), dtype)
    hidden_size = mixed.shape[-1:]
    for name, tensor, shape in (
        ("partial", partial, mixed.shape),
        ("output", output, mixed.shape),
        ("lse", lse, mixed.shape[:-1]),
        ("score", score, mixed.shape[:-1]),
        ("product", product, hidden_size),
        ("norm_weight", norm_weight, hidden_size),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}; with mixed {tuple(mixed.shape)} it is {tuple(shape)}.")
    return_hidden = return_hidden or norm_weight is None
    run = DepthStepFunction.apply if is_untraced() else _depth_step
    new_partial, normed, hidden, weight, *_ = run(
        partial,
        output,
        mixed,
        None if lse is None else lse.float(),
        None if product is None else product.float(),
        None if score is None else score.float(),
        key_eps,
        float(scale),
        norm_weight,
        norm_eps,
        return_hidden,
        dtype or mixed.dtype,
    )
    return DepthStep(
        partial=output if partial is None else new_partial,
        normed=None if norm_weight is None else normed,
        hidden=hidden if return_hidden else None,
        weight=None if output is None else weight,
    )


def _depth_read_kernel(
    sources: list[torch.Tensor],
    output: torch.Tensor | None,
    extends: bool,
    product: torch.Tensor,
    eps: float,
    scale: float,
    norm_weight: torch.Tensor | None,
    norm_eps: float,
    return_hidden: bool,
    return_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    results = _depth_read_results(sources, output, extends, product, norm_weight, return_hidden, return_weights)
    if sources[0].numel() > 0:
        dtype = sources[0].dtype
        *sources, output, product, norm_weight = contiguous(*sources, output, product, norm_weight)
        kernels_for(product).read_forward(sources, output, product, eps, scale, norm_weight, norm_eps, dtype, *results)
    return results


_depth_read = torch.library.custom_op(
    "attnres::depth_read",
    _depth_read_kernel,
    mutates_args=(),
    schema="(Tensor[] sources, Tensor? output, bool extends, Tensor product, float eps, float scale, "
    "Tensor? norm_weight, float norm_eps, bool return_hidden, bool return_weights) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)


def _depth_read_results(sources, output, extends, product, norm_weight, return_hidden, return_weights):
    """Uninitialised results; those that are not asked for are empty."""
    like, shape, absent = sources[0], sources[0].shape, (0,)
    num_sources = len(sources) + (output is not None and not extends)
    return (
        like.new_empty(shape, dtype=torch.promote_types(like.dtype, output.dtype))
        if extends
        else like.new_empty(absent),
        like.new_empty(absent)
        if norm_weight is None
        else like.new_empty(shape, dtype=torch.promote_types(like.dtype, norm_weight.dtype)),
        like.new_empty(shape if return_hidden else absent),
        product.new_empty((shape[0], num_sources, shape[1]) if return_weights else absent),
    )


@_depth_read.register_fake
def _(sources, output, extends, product, eps, scale, norm_weight, norm_eps, return_hidden, return_weights):
    return _depth_read_results(sources, output, extends, product, norm_weight, return_hidden, return_weights)


# Without gradients, a compiler would compute what is not an operator's result again for each operator that takes it
_stored = torch.library.custom_op(
    "attnres::stored",
    lambda tensor: tensor.clone(memory_format=torch.contiguous_format),
    mutates_args=(),
    schema="(Tensor tensor) -> Tensor",
)
_stored.register_fake(lambda tensor: tensor.new_empty(tensor.shape))


@torch.compiler.assume_constant_result
def works_on(device: torch.device) -> bool:
    """Whether the kernels give on `device` what eager depth attention gives; if not, a warning says why."""
    return try_on(device)


@cache
def try_on(device: torch.device) -> bool:
    reason = "they are wrong"
    try:
        with ThreadPoolExecutor(1) as thread:  # without the modes, hooks and gradients of what is going on here
            if thread.submit(_error_on, device).result() < 1e-2:
                return True
    except Exception as error:  # of the kernels' compiler, the driver, a device that lacks something
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    logger.warning(
        f"The {KERNELS[device.type].name} kernels don't run on {device} ({reason}): depth attention runs in PyTorch "
        "instead."
    )
    return False


def _error_on(device: torch.device) -> float:
    """The largest relative error of results and gradients of a small block of reads in bfloat16."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        generator = torch.Generator().manual_seed(0)

        def random(*shape):
            tensor = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
            return tensor.to(device).requires_grad_()

        sources, output = [random(2, 24, 80) for _ in range(3)], random(2, 24, 80)
        product, gain = random(80), random(80)
        inputs = (*sources, output, product, gain)

        def fused(*inputs):
            *sources, output, product, gain = inputs
            (mixed,), lse = closed_reads([v.bfloat16() for v in sources], product[None], 1e-5, torch.float32)
            step = depth_step(None, output.bfloat16(), mixed, lse[0], product, 1e-5, 1.0, gain, 1e-5, True)
            return step.normed, step.hidden

        def eager(*inputs):
            *sources, product, gain = inputs
            hidden = eager_depth_attention(tuple(v.bfloat16().float() for v in sources), product, 1e-5, 1.0)[0]
            return torch.nn.functional.rms_norm(hidden, gain.shape, gain, 1e-5), hidden

        def with_gradients(results):
            # 2.12 aborts some processes if a thread has computed gradients and ended
            if torch.__version__.startswith("2.12."):
                return results
            return [*results, *torch.autograd.grad([r.float().square().sum() for r in results], inputs)]

        found, exact = with_gradients(fused(*inputs)), with_gradients(eager(*inputs))
        rounded = [v.detach().bfloat16() for v in (*sources, output)]
        at_once = _depth_read_kernel(
            rounded[:-1], rounded[-1], False, product.detach(), 1e-5, 1.0, gain.detach(), 1e-5, True, False
        )
        found, exact = [*found, *at_once[1:3]], [*exact, *exact[:2]]
        return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, exact))


class FusedDepthAttention(TwoPhaseDepthAttention):
    """The two phases in `kernels`; arguments and results as those of [`TwoPhaseDepthAttention`].

    Each read of a model is one fused step with what comes before and after it, unless its norm can't be fused: then
    the norm follows. What the kernels don't take, and devices on which they fail, are left to PyTorch.
    """

    def __init__(self, kernels: DepthKernels):
        self.kernels = kernels

    def runs(self, tensors) -> bool:
        """Whether the kernels take these tensors."""
        device = tensors[0].device
        if self.kernels != KERNELS.get(device.type) or is_transformed():
            return False
        # of few, a compiler makes fewer kernels than there are operators
        few_tokens = self.few_tokens if torch.compiler.is_compiling() else self.kernels.few_tokens
        at_once = self.kernels.reads_few_tokens and self.reads_at_once(*tensors)
        if not at_once and tensors[0].shape[:-1].numel() <= few_tokens:
            return False
        takes = all(tensor.dtype in self.kernels.dtypes and is_plain(tensor) for tensor in tensors)
        return takes and works_on(device)

    @staticmethod
    def reads_at_once(*tensors) -> bool:
        """Whether a read of these tensors can be done in one kernel, which has no backward pass."""
        # with a gradient, they come from the first forward of re-entrant checkpointing, to which the second is equal
        return not (torch.is_grad_enabled() or any(tensor.requires_grad for tensor in tensors))

    def pays_phase_1(self, sources, products):
        # what the cache holds may be fetched again, rather than take memory for the results of a first phase
        at_once = self.reads_at_once(products, *sources) and self.runs(sources)
        if at_once and sum(source.numel() * source.element_size() for source in sources) <= CACHE_BYTES:
            return False
        return super().pays_phase_1(sources, products)

    def begin(self, sources, products, eps, watched):
        embedding, *others = sources
        if not self.runs([embedding]):
            return super().begin(sources, products, eps, watched)
        shared = NOTHING_READ
        if is_untraced():
            if not watched and TokenReads.fit(embedding, products):
                shared = self.kernels.token_reads(embedding, products, eps)
        elif self.reads_at_once(embedding, products):
            embedding, products = _stored(embedding), _stored(products)
        return (embedding, *others), products, shared

    def phase_1(self, sources, products, eps, watched=True, rounded=False):
        if not self.runs(sources):
            return super().phase_1(sources, products, eps, watched, rounded)
        dtype = sources[0].dtype if rounded else torch.float32
        mixed, lse, *weights = closed_reads(sources, products.float(), eps, dtype, return_weights=watched)
        weights = [w.transpose(0, 1).contiguous() for w in weights[0]] if watched else [None] * len(mixed)
        return [ClosedDepthRead(*read, len(sources)) for read in zip(mixed, lse.unbind(), weights)]

    def mix(self, sources, product, eps, watched, rounded) -> ClosedDepthRead:
        """Phase 1 of one read. A single source is not copied, and its score is left to [`depth_step`]."""
        if len(sources) > 1:
            return self.phase_1(sources, product.unsqueeze(0), eps, watched, rounded)[0]
        weights = torch.ones_like(sources[0][..., 0], dtype=torch.float32).unsqueeze(1) if watched else None
        return ClosedDepthRead(sources[0], None, weights, 1)

    def phase_2(self, place, product, sources, norm, closed_read, watched):
        if not self.runs(sources):
            return super().phase_2(place, product, sources, norm, closed_read, watched)
        num_sources = min(len(sources), place.num_sources)  # there are fewer after fewer layers
        arguments = (closed_read, sources, num_sources, product, place.eps, place.scale)
        if can_fuse_norm(norm) and norm.weight.dtype in self.kernels.dtypes and is_plain(norm.weight):
            return self.fused(*arguments, norm, watched)
        hidden, weights, _, sources = self.fused(*arguments, None, watched)
        return hidden, weights, norm(hidden), sources

    def merge(self, closed_read, sources, product, eps, scale, norm=None):
        if not self.runs(sources):
            return super().merge(closed_read, sources, product, eps, scale, norm)
        watched = closed_read.num_sources == 0 or closed_read.weights is not None
        if closed_read.num_sources == 0 and not self.reads_at_once(product, *sources):
            closed_read = self.mix(sources, product, eps, watched, False)
        hidden, weights, normed, _ = self.fused(closed_read, sources, len(sources), product, eps, scale, norm, watched)
        return hidden if norm is None else normed, weights

    def fused(self, closed_read, sources, num_sources, product, eps, scale, norm, watched):
        """A read with the norm after it, if there is one; the result is that of [`read`]."""
        if closed_read.num_sources == 0 and self.reads_at_once(product, *sources):
            return self.whole_read(sources, num_sources, product, eps, scale, norm, watched)
        rounded = norm is not None and not watched
        if closed_read.num_sources == 0:  # the last source is merged on the way
            closed_read = self.mix(sources[: max(num_sources - 1, 1)], product, eps, watched, rounded)
        num_closed = closed_read.num_sources
        partial = output = score = None
        if num_sources - num_closed > 1:
            sources = joined(sources, num_sources)
            new_read = self.mix(sources[num_closed:], product, eps, watched, rounded)
            output, score = new_read.mixed, new_read.lse
        elif num_sources > num_closed:
            *partials, output = sources[num_closed:]
            partial = partials[0].to(sources[0].dtype) if partials else None
        step = depth_step(
            partial,
            output,
            closed_read.mixed,
            closed_read.lse,
            None if output is None or score is not None else product.float(),
            eps,
            scale,
            None if norm is None else norm.weight,
            0.0 if norm is None else norm.variance_epsilon,
            return_hidden=watched,
            dtype=sources[0].dtype,
            score=score,
        )
        weights = closed_read.weights if watched else None
        if watched and output is not None:
            weight = step.weight.unsqueeze(1)
            new_weights = 1 if score is None else new_read.weights
            weights = torch.cat([weights * (1 - weight), new_weights * weight], dim=1)
        if partial is not None:
            sources = (*sources[:num_closed], step.partial)
        return step.hidden, weights, step.normed, sources

    def whole_read(self, sources, num_sources, product, eps, scale, norm, watched):
        """[`fused`] of all sources without gradients, in one kernel."""
        shape, product = sources[0].shape, product.float()
        gain, norm_eps = (None, 0.0) if norm is None else (norm.weight, norm.variance_epsilon)
        if product.shape != shape[-1:] or any(source.shape != shape for source in sources):
            shapes = [tuple(source.shape) for source in sources]
            raise ValueError(f"Sources {shapes} don't go with a product {tuple(product.shape)}.")
        extends = len(sources) > num_sources
        *others, output = sources if len(sources) > 1 else (*sources, None)
        partial, normed, hidden, weights = (_depth_read_kernel if is_untraced() else _depth_read)(
            others, output, extends, product, eps, float(scale), gain, norm_eps, watched or norm is None, watched
        )
        if extends:
            sources = (*others[:-1], partial)
        return None if norm and not watched else hidden, weights if watched else None, normed if norm else None, sources
