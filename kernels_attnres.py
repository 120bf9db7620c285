# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Fused operators of depth attention (Kimi Team, arXiv 2603.15031) for GPUs, written in Triton.

Two operators share the work of a block, as in the two-phase computation of the paper. [`closed_reads`] reads each
closed source once for all reads of the block; [`depth_step`], once per sublayer, adds the sublayer's output to the open
partial sum, merges that sum into the read by an online softmax, and normalises the result for the next sublayer.

Letters in shapes: `tokens` is any number of leading dimensions (batch, seq), d the hidden size, n the number of closed
sources, S the number of reads. The score of source i in read s is

    score_si = (p_s . v_i) * rsqrt(mean(v_i^2) + eps),    p_s = query_s * key_norm_s

and its weight the softmax over i. Arithmetic is float32, with one rounding per result. Gradients are the same on every
run: sums over tokens are partial sums in a fixed order, without atomics.

Both are custom operators that `torch.compile` takes whole and CUDA graphs capture. Where there is no GPU, they run in
Triton's interpreter when TRITON_INTERPRET=1 is set before triton is imported.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import NamedTuple

import torch
from transformers.utils import logging


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("kernels_attnres needs triton (pip install triton).") from error

from modeling_attnres import (
    ClosedDepthRead,
    TwoPhaseDepthAttention,
    can_fuse_norm,
    eager_depth_attention,
    write,
)


logger = logging.get_logger(__name__)

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
TABLE_ARGUMENTS = 16
MOST_READS = 32  # of one kernel; more would not fit into registers


@triton.jit
def _cast(x, dtype: tl.constexpr):
    """Float32 `x`, rounded to the nearest value of another dtype."""
    if INTERPRETED and dtype == tl.bfloat16:  # a cast would cut the digits off there
        bits = x.to(tl.uint32, bitcast=True)
        bits += ((bits >> 16) & 1) + 0x7FFF
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


INTERPRETED = tl.constexpr(not isinstance(_cast, triton.runtime.JITFunction))


@triton.jit
def _bfloat16_dot(a, b, total):
    # the interpreter cannot multiply bfloat16 matrices
    return tl.dot(a.to(tl.float32), b.to(tl.float32), total) if INTERPRETED else tl.dot(a, b, total)


@triton.jit
def _three_parts(x):
    """Three bfloat16 tensors whose sum is float32 `x`, as three times 8 bits of mantissa make 24."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    return high, middle, low


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    """`total + a @ b` with the precision of float32, on matrix units."""
    if a.dtype == tl.bfloat16:
        if b.dtype == tl.bfloat16:
            total = _bfloat16_dot(a, b, total)
        else:
            high, middle, low = _three_parts(b)
            total = _bfloat16_dot(a, low, total)
            total = _bfloat16_dot(a, middle, total)
            total = _bfloat16_dot(a, high, total)
    elif b.dtype == tl.bfloat16:
        high, middle, low = _three_parts(a)
        total = _bfloat16_dot(low, b, total)
        total = _bfloat16_dot(middle, b, total)
        total = _bfloat16_dot(high, b, total)
    else:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=PRECISION)
    return total


@triton.jit
def _rows(table, index, inside, token, like, D: tl.constexpr, ALIGN: tl.constexpr):
    """Pointers to rows `token` of the tensors number `index` of a table of addresses."""
    tensors = tl.load(table + index, mask=inside, other=0).to(like.dtype)
    return tl.multiple_of(tensors + token * D, ALIGN)


@triton.jit
def _tile(rows, inside, column, D: tl.constexpr):
    return tl.load(rows[:, None] + column[None, :], mask=inside[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def _products(products, read, column, S: tl.constexpr, D: tl.constexpr):
    inside = (read < S)[:, None] & (column < D)[None, :]
    return tl.load(products + read[:, None] * D + column[None, :], mask=inside, other=0.0)


@triton.jit
def _warp_columns(WARPS: tl.constexpr, PART: tl.constexpr):
    """The first columns of dot products over d, (WARPS, PART): each warp sums a part of them."""
    return tl.arange(0, WARPS)[:, None] * PART + tl.arange(0, PART)[None, :]


@triton.jit
def _warp_tile(rows, inside, column, D: tl.constexpr):
    """(WARPS, rows, PART)"""
    mask = inside[None, :, None] & (column < D)[:, None, :]
    return tl.load(rows[None, :, None] + column[:, None, :], mask=mask, other=0.0)


@triton.jit
def _fill_table(table, t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15):
    """Writes the addresses of 16 tensors. On the device, as a CUDA graph keeps arguments but not host memory."""
    tl.store(table, t0.to(tl.int64))
    tl.store(table + 1, t1.to(tl.int64))
    tl.store(table + 2, t2.to(tl.int64))
    tl.store(table + 3, t3.to(tl.int64))
    tl.store(table + 4, t4.to(tl.int64))
    tl.store(table + 5, t5.to(tl.int64))
    tl.store(table + 6, t6.to(tl.int64))
    tl.store(table + 7, t7.to(tl.int64))
    tl.store(table + 8, t8.to(tl.int64))
    tl.store(table + 9, t9.to(tl.int64))
    tl.store(table + 10, t10.to(tl.int64))
    tl.store(table + 11, t11.to(tl.int64))
    tl.store(table + 12, t12.to(tl.int64))
    tl.store(table + 13, t13.to(tl.int64))
    tl.store(table + 14, t14.to(tl.int64))
    tl.store(table + 15, t15.to(tl.int64))


# In both kernels of closed reads a program holds TOKENS tokens. It multiplies tiles of ROWS rows (source, token) with
# tiles of TOKENS * READS lines (token, read), of which the pairs with the same token count. It goes through its sources
# twice, as the weights need whole rows; with few tokens per program the second time they come from the cache.


@triton.jit
def _closed_forward(
    like,
    mixed_like,
    table,  # addresses of n sources, then of S results
    products,
    lse,
    scores,  # (n, S, num_tokens)
    inverse_rms,  # (n, num_tokens)
    num_tokens,
    num_sources,
    eps,
    S: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    READS: tl.constexpr,
    READS_DOT: tl.constexpr,
    WARPS: tl.constexpr,
    PART: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * TOKENS
    row = tl.arange(0, ROWS)
    row_source = (row // TOKENS).to(tl.int64)  # its products with the number of tokens may be large
    row_token = first + row % TOKENS
    read_dot = tl.arange(0, READS_DOT)
    for group in range(0, num_sources, ROWS // TOKENS):
        source = group + row_source
        inside = (source < num_sources) & (row_token < num_tokens)
        rows = _rows(table, source, source < num_sources, row_token, like, D, ALIGN)
        dots = tl.zeros([WARPS, ROWS, READS_DOT], tl.float32)
        gram = tl.zeros([WARPS, ROWS, ROWS], tl.float32)  # its diagonal has the squares
        column = _warp_columns(WARPS, PART)
        value = _warp_tile(rows, inside, column, D)
        for _ in range(0, D, WARPS * PART):
            next_column = column + WARPS * PART
            next_value = _warp_tile(rows, inside, next_column, D)  # on its way while this one is multiplied
            product = _warp_tile(products + read_dot * D, read_dot < S, column, D)
            dots = _dot(value, tl.permute(product, (0, 2, 1)), dots, PRECISION)
            gram = _dot(value, tl.permute(value, (0, 2, 1)), gram, PRECISION)
            column, value = next_column, next_value
        dots = tl.sum(dots, 0)
        squares = tl.sum(tl.where(row[:, None] == row[None, :], tl.sum(gram, 0), 0.0), 1)
        rms = tl.rsqrt(squares / D + eps)
        at = (source[:, None] * S + read_dot[None, :]) * num_tokens + row_token[:, None]
        tl.store(scores + at, dots * rms[:, None], mask=inside[:, None] & (read_dot < S)[None, :])
        tl.store(inverse_rms + source * num_tokens + row_token, rms, mask=inside)
    tl.debug_barrier()  # from here on threads read each other's scores

    line = tl.arange(0, TOKENS * READS)
    token = first + line // READS
    read = line % READS
    inside_line = (token < num_tokens) & (read < S)
    peak = tl.full([TOKENS * READS], float("-inf"), tl.float32)
    total = tl.zeros([TOKENS * READS], tl.float32)
    for group in range(0, num_sources, ROWS):
        source = group + row.to(tl.int64)
        at = (source[None, :] * S + read[:, None]) * num_tokens + token[:, None]
        score = tl.load(scores + at, mask=inside_line[:, None] & (source < num_sources)[None, :], other=0.0)
        score = tl.where((source < num_sources)[None, :], score, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, 1))
        total = total * tl.exp(peak - new_peak) + tl.sum(tl.exp(score - new_peak[:, None]), 1)
        peak = new_peak
    normaliser = peak + tl.log(total)
    tl.store(lse + read * num_tokens + token, normaliser, mask=inside_line)

    results = _rows(table, num_sources + read, read < S, token, mixed_like, D, ALIGN)
    for start in range(0, D, CHUNK):
        column = start + tl.arange(0, CHUNK)
        mixed = tl.zeros([TOKENS * READS, CHUNK], tl.float32)
        for group in range(0, num_sources, ROWS // TOKENS):
            source = group + row_source
            inside = (source < num_sources) & (row_token < num_tokens)
            rows = _rows(table, source, source < num_sources, row_token, like, D, ALIGN)
            at = (source[None, :] * S + read[:, None]) * num_tokens + token[:, None]
            same = (token[:, None] == row_token[None, :]) & inside_line[:, None] & inside[None, :]
            weight = tl.exp(tl.load(scores + at, mask=same, other=float("-inf")) - normaliser[:, None])
            mixed = _dot(weight, _tile(rows, inside, column, D), mixed, PRECISION)
        inside_tile = inside_line[:, None] & (column < D)[None, :]
        tl.store(results[:, None] + column[None, :], _cast(mixed, mixed_like.dtype.element_ty), mask=inside_tile)


@triton.jit
def _closed_backward(
    like,
    mixed_like,
    table,  # addresses of n sources, S gradients of results, n gradients of sources
    products,
    lse,
    grad_lse,
    scores,
    inverse_rms,
    given_grad_scores,  # (n, S, num_tokens), of what else the loss makes of the scores
    grad_scores,  # (n, S, num_tokens)
    num_tokens,
    num_sources,
    S: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    READS: tl.constexpr,
    READS_DOT: tl.constexpr,
    WARPS: tl.constexpr,
    PART: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_GRAD_SCORES: tl.constexpr,
    GRAD_SOURCES: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * TOKENS
    row = tl.arange(0, ROWS)
    row_source = (row // TOKENS).to(tl.int64)  # its products with the number of tokens may be large
    row_token = first + row % TOKENS
    line = tl.arange(0, TOKENS * READS)
    token = first + line // READS
    read = line % READS
    inside_line = (token < num_tokens) & (read < S)
    results = _rows(table, num_sources + read, read < S, token, mixed_like, D, ALIGN)
    for group in range(0, num_sources, ROWS // TOKENS):
        source = group + row_source
        inside = (source < num_sources) & (row_token < num_tokens)
        rows = _rows(table, source, source < num_sources, row_token, like, D, ALIGN)
        dots = tl.zeros([WARPS, TOKENS * READS, ROWS], tl.float32)
        column = _warp_columns(WARPS, PART)
        grad_mixed = _warp_tile(results, inside_line, column, D)
        value = _warp_tile(rows, inside, column, D)
        for _ in range(0, D, WARPS * PART):
            column += WARPS * PART
            next_grad = _warp_tile(results, inside_line, column, D)
            next_value = _warp_tile(rows, inside, column, D)
            dots = _dot(grad_mixed, tl.permute(value, (0, 2, 1)), dots, PRECISION)
            grad_mixed, value = next_grad, next_value
        grad_weights = tl.sum(dots, 0)
        at = (source[None, :] * S + read[:, None]) * num_tokens + token[:, None]
        same = (token[:, None] == row_token[None, :]) & inside_line[:, None] & inside[None, :]
        tl.store(grad_scores + at, grad_weights, mask=same)
    tl.debug_barrier()

    at_line = read * num_tokens + token
    normaliser = tl.load(lse + at_line, mask=inside_line, other=0.0)
    mean_grad = tl.zeros([TOKENS * READS], tl.float32)
    for group in range(0, num_sources, ROWS):
        source = group + row.to(tl.int64)
        at = (source[None, :] * S + read[:, None]) * num_tokens + token[:, None]
        inside_scores = inside_line[:, None] & (source < num_sources)[None, :]
        weight = tl.exp(tl.load(scores + at, mask=inside_scores, other=float("-inf")) - normaliser[:, None])
        mean_grad += tl.sum(weight * tl.load(grad_scores + at, mask=inside_scores, other=0.0), 1)
    mean_grad -= tl.load(grad_lse + at_line, mask=inside_line, other=0.0)
    for group in range(0, num_sources, ROWS):
        source = group + row.to(tl.int64)
        at = (source[None, :] * S + read[:, None]) * num_tokens + token[:, None]
        inside_scores = inside_line[:, None] & (source < num_sources)[None, :]
        weight = tl.exp(tl.load(scores + at, mask=inside_scores, other=float("-inf")) - normaliser[:, None])
        grad_score = weight * (tl.load(grad_scores + at, mask=inside_scores, other=0.0) - mean_grad[:, None])
        if HAS_GRAD_SCORES:
            grad_score += tl.load(given_grad_scores + at, mask=inside_scores, other=0.0)
        tl.store(grad_scores + at, grad_score, mask=inside_scores)
    tl.debug_barrier()

    if GRAD_SOURCES:
        read_dot = tl.arange(0, READS_DOT)
        for group in range(0, num_sources, ROWS // TOKENS):
            source = group + row_source
            inside = (source < num_sources) & (row_token < num_tokens)
            rows = _rows(table, source, source < num_sources, row_token, like, D, ALIGN)
            grad_index = num_sources + S + source
            grad_rows = _rows(table, grad_index, source < num_sources, row_token, like, D, ALIGN)
            at = (source[:, None] * S + read[None, :]) * num_tokens + token[None, :]
            same = (token[None, :] == row_token[:, None]) & inside_line[None, :] & inside[:, None]
            weight = tl.exp(tl.load(scores + at, mask=same, other=float("-inf")) - normaliser[None, :])
            at = (source[:, None] * S + read_dot[None, :]) * num_tokens + row_token[:, None]
            inside_scores = inside[:, None] & (read_dot < S)[None, :]
            score = tl.load(scores + at, mask=inside_scores, other=0.0)
            grad_score = tl.load(grad_scores + at, mask=inside_scores, other=0.0)
            rms = tl.load(inverse_rms + source * num_tokens + row_token, mask=inside, other=0.0)
            along = tl.sum(score * grad_score, 1) * rms * rms / D
            for start in range(0, D, CHUNK):
                column = start + tl.arange(0, CHUNK)
                grad = tl.zeros([ROWS, CHUNK], tl.float32)
                product = _products(products, read_dot, column, S, D)
                grad = _dot(grad_score * rms[:, None], product, grad, PRECISION)
                grad = _dot(weight, _tile(results, inside_line, column, D), grad, PRECISION)
                grad -= along[:, None] * _tile(rows, inside, column, D).to(tl.float32)
                inside_tile = inside[:, None] & (column < D)[None, :]
                tl.store(grad_rows[:, None] + column[None, :], _cast(grad, like.dtype.element_ty), mask=inside_tile)


@triton.jit
def _products_backward(
    like,
    table,
    inverse_rms,
    grad_scores,
    partial_sums,  # (programs, S, D)
    num_tokens,
    num_sources,
    tokens_per_program,
    S: tl.constexpr,
    D: tl.constexpr,
    READS_DOT: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`sum over tokens and i of grad_score_si * inverse_rms_i * v_i` of a range of tokens and columns."""
    column = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    first = tl.program_id(1).to(tl.int64) * tokens_per_program
    last = tl.minimum(first + tokens_per_program, num_tokens)
    read = tl.arange(0, READS_DOT)
    total = tl.zeros([READS_DOT, CHUNK], tl.float32)
    for start in range(first, last, TOKENS):
        token = start + tl.arange(0, TOKENS)
        inside = token < last
        for source in range(0, num_sources):
            tensor = tl.load(table + source).to(like.dtype)
            value = _tile(tl.multiple_of(tensor + token * D, ALIGN), inside, column, D)
            rms = tl.load(inverse_rms + tl.cast(source, tl.int64) * num_tokens + token, mask=inside, other=0.0)
            at = (tl.cast(source, tl.int64) * S + read[:, None]) * num_tokens + token[None, :]
            grad_score = tl.load(grad_scores + at, mask=(read < S)[:, None] & inside[None, :], other=0.0)
            total = _dot(grad_score * rms[None, :], value, total, PRECISION)
    at = (tl.program_id(1) * S + read[:, None]).to(tl.int64) * D + column[None, :]
    tl.store(partial_sums + at, total, mask=(read < S)[:, None] & (column < D)[None, :])


@triton.jit
def _score(value, product, eps, D: tl.constexpr):
    """The score of a source, and its inverse RMS."""
    rms = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    return tl.sum(value * product, 0) * rms, rms


@triton.jit
def _step_forward(
    partial,
    output,
    mixed,
    lse,
    given_score,
    product,
    norm_weight,
    new_partial,
    normed,
    hidden,
    weight,
    statistics,  # (5, num_tokens): score and inverse RMS of the partial sum, those of mixed, inverse RMS of the read
    num_tokens,
    key_eps,
    scale,
    norm_eps,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_PARTIAL: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_SCORE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    WRITE_HIDDEN: tl.constexpr,
    DTYPE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < D
    at = token * D + column
    read = tl.load(mixed + at, mask=inside, other=0.0).to(tl.float32)
    score, rms, closed_score, closed_rms, norm_rms = 0.0, 0.0, 0.0, 0.0, 0.0  # unless they are computed
    if HAS_OUTPUT:
        value = tl.load(output + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_PARTIAL:
            value += tl.load(partial + at, mask=inside, other=0.0).to(tl.float32)
            # what is scored is what later reads will see: the rounded sum
            rounded = _cast(value, new_partial.dtype.element_ty)
            tl.store(new_partial + at, rounded, mask=inside)
            value = rounded.to(tl.float32)
        if HAS_SCORE:
            score = tl.load(given_score + token)
        else:
            key = tl.load(product + column, mask=inside, other=0.0)
            score, rms = _score(value, key, key_eps, D)
        if HAS_LSE:
            closed_score = tl.load(lse + token)
        else:
            closed_score, closed_rms = _score(read, key, key_eps, D)
        share = 1.0 / (1.0 + tl.exp(closed_score - score))
        read = (1.0 - share) * read + share * value
        tl.store(weight + token, share)
    read *= scale
    if WRITE_HIDDEN:
        tl.store(hidden + at, _cast(read, hidden.dtype.element_ty), mask=inside)
    if HAS_NORM:
        norm_rms = tl.rsqrt(tl.sum(read * read, 0) / D + norm_eps)
        gain = tl.load(norm_weight + column, mask=inside, other=0.0).to(tl.float32)
        result = _cast(read * norm_rms, DTYPE).to(tl.float32) * gain
        tl.store(normed + at, _cast(result, normed.dtype.element_ty), mask=inside)
    tl.store(statistics + token, score)
    tl.store(statistics + num_tokens + token, rms)
    tl.store(statistics + 2 * num_tokens + token, closed_score)
    tl.store(statistics + 3 * num_tokens + token, closed_rms)
    tl.store(statistics + 4 * num_tokens + token, norm_rms)


@triton.jit
def _step_backward(
    value_pointer,
    mixed,
    product,
    norm_weight,
    statistics,
    grad_partial,
    grad_normed,
    grad_hidden,
    grad_weight,
    grad_value,
    grad_mixed,
    grad_lse,
    product_sums,  # (programs, D)
    norm_sums,  # (programs, D)
    num_tokens,
    scale,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_SCORE: tl.constexpr,
    HAS_GRAD_PARTIAL: tl.constexpr,
    HAS_GRAD_NORMED: tl.constexpr,
    HAS_GRAD_HIDDEN: tl.constexpr,
    HAS_GRAD_WEIGHT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    column = tl.arange(0, WIDTH)
    inside = column < D
    product_sum = tl.zeros([WIDTH], tl.float32)
    norm_sum = tl.zeros([WIDTH], tl.float32)
    for index in range(tl.program_id(0), num_tokens, tl.num_programs(0)):
        token = tl.cast(index, tl.int64)
        at = token * D + column
        closed = tl.load(mixed + at, mask=inside, other=0.0).to(tl.float32)
        read = closed
        if HAS_OUTPUT:
            value = tl.load(value_pointer + at, mask=inside, other=0.0).to(tl.float32)
            score = tl.load(statistics + token)
            rms = tl.load(statistics + num_tokens + token)
            closed_score = tl.load(statistics + 2 * num_tokens + token)
            closed_rms = tl.load(statistics + 3 * num_tokens + token)
            share = 1.0 / (1.0 + tl.exp(closed_score - score))
            read = (1.0 - share) * closed + share * value
        grad = tl.zeros([WIDTH], tl.float32)
        if HAS_GRAD_NORMED:
            norm_rms = tl.load(statistics + 4 * num_tokens + token)
            unit = read * scale * norm_rms
            grad_unit = tl.load(grad_normed + at, mask=inside, other=0.0).to(tl.float32)
            norm_sum += grad_unit * _cast(unit, DTYPE).to(tl.float32)
            grad_unit *= tl.load(norm_weight + column, mask=inside, other=0.0).to(tl.float32)
            grad = norm_rms * (grad_unit - unit * (tl.sum(grad_unit * unit, 0) / D))
        if HAS_GRAD_HIDDEN:
            grad += tl.load(grad_hidden + at, mask=inside, other=0.0).to(tl.float32)
        grad *= scale
        if HAS_OUTPUT:
            grad_share = tl.sum(grad * (value - closed), 0)
            if HAS_GRAD_WEIGHT:
                grad_share += tl.load(grad_weight + token)
            grad_score = grad_share * share * (1.0 - share)
            result = share * grad
            grad *= 1.0 - share
            if not HAS_SCORE:
                key = tl.load(product + column, mask=inside, other=0.0)
                product_sum += grad_score * rms * value
                result += grad_score * rms * (key - (score * rms / D) * value)
            if HAS_LSE:
                tl.store(grad_lse + token, -grad_score)
            else:
                product_sum -= grad_score * closed_rms * closed
                grad -= grad_score * closed_rms * (key - (closed_score * closed_rms / D) * closed)
            if HAS_GRAD_PARTIAL:
                result += tl.load(grad_partial + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(grad_value + at, _cast(result, grad_value.dtype.element_ty), mask=inside)
        tl.store(grad_mixed + at, _cast(grad, grad_mixed.dtype.element_ty), mask=inside)
    at = tl.program_id(0).to(tl.int64) * D + column
    if HAS_OUTPUT and not HAS_SCORE:
        tl.store(product_sums + at, product_sum, mask=inside)
    if HAS_GRAD_NORMED:
        tl.store(norm_sums + at, norm_sum, mask=inside)


def _on_device(tensor: torch.Tensor):
    """Context of kernel launches, which go to the current device, not to the tensors'."""
    on_cpu = tensor.device.type == "cpu"
    if on_cpu != INTERPRETED.value:
        raise RuntimeError(
            "The Triton kernels got tensors on the CPU: move the model to a GPU, or choose another "
            "attn_res_implementation (two_phase, eager)."
            if on_cpu
            else "TRITON_INTERPRET=1 runs the Triton kernels on the CPU only: unset it to use the GPU."
        )
    return nullcontext() if on_cpu else torch.cuda.device(tensor.device)


def _num_processors(tensor: torch.Tensor) -> int:
    if tensor.device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def _precision(tensor: torch.Tensor) -> str:
    """How float32 matrices are multiplied: exactly in effect, on matrix units where there are some for it."""
    if tensor.device.type == "cpu" or torch.version.hip or torch.cuda.get_device_capability(tensor.device) < (8, 0):
        return "ieee"
    return "tf32x3"


def _address_table(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The addresses of the tensors, int64 on their device."""
    padding = [tensors[0]] * (-len(tensors) % TABLE_ARGUMENTS)
    tensors = [*tensors, *padding]
    table = torch.empty(len(tensors), dtype=torch.int64, device=tensors[0].device)
    for start in range(0, len(tensors), TABLE_ARGUMENTS):
        _fill_table[(1,)](table[start:], *tensors[start : start + TABLE_ARGUMENTS], num_warps=1)
    return table


def _alignment(tensors: Sequence[torch.Tensor], hidden_size: int) -> int:
    """Bytes that every row's address is a multiple of, at most 16."""
    for alignment in (16, 8, 4):
        row_bytes = [hidden_size * tensor.element_size() for tensor in tensors]
        if all(tensor.data_ptr() % alignment == 0 for tensor in tensors) and not any(b % alignment for b in row_bytes):
            return alignment
    return 2


# What the sources of the programs that run at one time may take of the cache, about, divided by their number
CACHE_BYTES_PER_PROGRAM = 128 * 1024


def _closed_tiles(sources: Sequence[torch.Tensor], num_reads: int, chunk_per_warp: int, most_warps: int) -> dict:
    """Tile sizes: few tokens per program, so that the second look at its sources hits the cache."""
    hidden_size = sources[0].shape[-1]
    num_tokens = sources[0].numel() // hidden_size
    token_bytes = len(sources) * hidden_size * sources[0].element_size()
    reads = triton.next_power_of_2(num_reads)
    enough_programs = 2 * _num_processors(sources[0])
    rows = 16  # (source, token), the least that a matrix unit takes
    tokens = 1
    while (
        2 * tokens * triton.next_power_of_2(len(sources)) <= rows
        and 2 * tokens * reads <= 64
        and 2 * tokens * token_bytes <= CACHE_BYTES_PER_PROGRAM
        and 2 * tokens * enough_programs <= num_tokens
    ):
        tokens *= 2
    reads = max(reads, 16 // tokens)
    warps = 4 if hidden_size < 4096 else 8
    if num_tokens <= enough_programs:  # as in decoding: what counts is how long one program takes
        warps = min(max(triton.next_power_of_2(hidden_size) // 64, 4), most_warps)
    if tokens * reads > 32:
        chunk_per_warp //= 2
    return {
        "ROWS": rows,
        "TOKENS": tokens,
        "READS": reads,
        "READS_DOT": max(reads, 16),
        "WARPS": warps,
        "PART": 32,
        "CHUNK": min(max(triton.next_power_of_2(hidden_size), 16), chunk_per_warp * warps),
        "num_warps": warps,
        "num_stages": 1,  # with more, loads go past the first-level cache, and triton 3.2 fails
    }


# Schemas are written out because older versions of torch infer fewer types


@torch.library.custom_op(
    "attnres::closed_reads",
    mutates_args=(),
    schema="(Tensor[] sources, Tensor products, float eps, ScalarType dtype) -> (Tensor[], Tensor, Tensor, Tensor)",
)
def _closed_reads(
    sources: list[torch.Tensor], products: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    (num_reads, hidden_size), num_sources, shape = products.shape, len(sources), sources[0].shape
    sources = [source.contiguous() for source in sources]
    products = products.contiguous()
    num_tokens = shape[:-1].numel()
    mixed = [torch.empty(shape, dtype=dtype, device=products.device) for _ in range(num_reads)]
    lse = products.new_empty(num_reads, *shape[:-1])
    scores = products.new_empty(num_sources, num_reads, num_tokens)
    inverse_rms = products.new_empty(num_sources, num_tokens)
    if num_tokens == 0:
        return mixed, lse, scores, inverse_rms
    tiles = _closed_tiles(sources, num_reads, chunk_per_warp=64, most_warps=16)
    with _on_device(products):
        _closed_forward[(triton.cdiv(num_tokens, tiles["TOKENS"]),)](
            sources[0],
            mixed[0],
            _address_table([*sources, *mixed]),
            products,
            lse,
            scores,
            inverse_rms,
            num_tokens,
            num_sources,
            eps,
            S=num_reads,
            D=hidden_size,
            ALIGN=_alignment([*sources, *mixed], hidden_size),
            PRECISION=_precision(products),
            **tiles,
        )
    return mixed, lse, scores, inverse_rms


@_closed_reads.register_fake
def _(sources, products, eps, dtype):
    (num_reads, _), num_sources, shape = products.shape, len(sources), sources[0].shape
    num_tokens = sources[0].numel() // shape[-1]
    return (
        [torch.empty(shape, dtype=dtype, device=products.device) for _ in range(num_reads)],
        products.new_empty(num_reads, *shape[:-1]),
        products.new_empty(num_sources, num_reads, num_tokens),
        products.new_empty(num_sources, num_tokens),
    )


@torch.library.custom_op(
    "attnres::closed_reads_backward",
    mutates_args=(),
    schema="(Tensor[] sources, Tensor products, Tensor lse, Tensor scores, Tensor inverse_rms, Tensor[] grad_mixed, "
    "Tensor grad_lse, Tensor? grad_scores, bool need_sources, bool need_products) -> (Tensor[], Tensor)",
)
def _closed_reads_backward(
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
    (num_reads, hidden_size), num_sources, num_tokens = products.shape, len(sources), inverse_rms.shape[1]
    sources = [source.contiguous() for source in sources]
    grad_mixed = [grad.contiguous() for grad in grad_mixed]
    products, grad_lse = products.contiguous(), grad_lse.contiguous()
    grad_sources = [torch.empty_like(source) for source in sources] if need_sources else []
    if num_tokens == 0:
        return grad_sources, torch.zeros_like(products) if need_products else products.new_empty(0)
    tiles = _closed_tiles(sources, num_reads, chunk_per_warp=32, most_warps=8)
    tensors = [*sources, *grad_mixed, *grad_sources]
    alignment, precision = _alignment(tensors, hidden_size), _precision(products)
    given_grad_scores, grad_scores = grad_scores, torch.empty_like(scores)
    with _on_device(products):
        table = _address_table(tensors)
        _closed_backward[(triton.cdiv(num_tokens, tiles["TOKENS"]),)](
            sources[0],
            grad_mixed[0],
            table,
            products,
            lse,
            grad_lse,
            scores,
            inverse_rms,
            scores if given_grad_scores is None else given_grad_scores.contiguous(),
            grad_scores,
            num_tokens,
            num_sources,
            S=num_reads,
            D=hidden_size,
            ALIGN=alignment,
            PRECISION=precision,
            HAS_GRAD_SCORES=given_grad_scores is not None,
            GRAD_SOURCES=need_sources,
            **tiles,
        )
        if not need_products:
            return grad_sources, products.new_empty(0)
        chunk, tokens = min(max(triton.next_power_of_2(hidden_size), 16), 128), 32
        chunks = triton.cdiv(hidden_size, chunk)
        programs = max(1, min(triton.cdiv(4 * _num_processors(products), chunks), triton.cdiv(num_tokens, tokens)))
        tokens_per_program = triton.cdiv(triton.cdiv(num_tokens, programs), tokens) * tokens
        programs = triton.cdiv(num_tokens, tokens_per_program)
        partial_sums = products.new_empty(programs, num_reads, hidden_size)
        _products_backward[(chunks, programs)](
            sources[0],
            table,
            inverse_rms,
            grad_scores,
            partial_sums,
            num_tokens,
            num_sources,
            tokens_per_program,
            S=num_reads,
            D=hidden_size,
            READS_DOT=tiles["READS_DOT"],
            TOKENS=tokens,
            CHUNK=chunk,
            ALIGN=alignment,
            PRECISION=precision,
            num_warps=4,
        )
    return grad_sources, partial_sums.sum(0)


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


def _closed_reads_autograd(ctx, grad_mixed, grad_lse, grad_scores, _):
    *sources, products, lse, scores, inverse_rms = ctx.saved_tensors
    need_sources, need_products = any(ctx.needs_input_grad[0]), ctx.needs_input_grad[1]
    if any(grad is None for grad in grad_mixed):  # a read that nothing used
        zeros = torch.zeros_like(sources[0], dtype=ctx.dtype)
        grad_mixed = [zeros if grad is None else grad for grad in grad_mixed]
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    grad_sources, grad_products = _closed_reads_backward(
        sources,
        products,
        lse,
        scores,
        inverse_rms,
        list(grad_mixed),
        grad_lse,
        grad_scores,
        need_sources,
        need_products,
    )
    grad_sources = list(grad_sources) if need_sources else [None] * len(sources)
    return grad_sources, grad_products if need_products else None, None, None


_closed_reads.register_autograd(_closed_reads_autograd, setup_context=_closed_reads_setup)


def closed_reads(
    sources: Sequence[torch.Tensor],
    products: torch.Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
    return_weights: bool = False,
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor] | tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]:
    """All reads of a block over its closed sources, `mixed_s = sum_i softmax_i(score_si) v_i`, not yet scaled.

    Moves (n + S) d numbers per token to and from memory, in the backward pass (2n + S) d, and n d more where the
    products need a gradient. Saves 4 (nS + n + S) bytes per token besides its arguments.

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
    _check_dtypes(*(source.dtype for source in sources), products.dtype)
    if dtype not in (None, source_dtype, torch.float32):
        raise TypeError(f"closed_reads of {source_dtype} sources gives {source_dtype} or torch.float32, not {dtype}.")
    sources = [source.to(source_dtype) for source in sources]
    parts = [_closed_reads(sources, part, eps, dtype or source_dtype) for part in products.float().split(MOST_READS)]
    lse = parts[0][1] if len(parts) == 1 else torch.cat([lse for _, lse, _, _ in parts])
    mixed = tuple(read for mixed, _, _, _ in parts for read in mixed)
    if not return_weights:
        return mixed, lse
    scores = torch.cat([scores for _, _, scores, _ in parts], dim=1).transpose(0, 1)
    return mixed, lse, (scores.view(len(products), len(sources), *shape[:-1]) - lse.unsqueeze(1)).exp()


def _check_dtypes(*dtypes: torch.dtype | None):
    for dtype in dtypes:
        if dtype is not None and dtype not in DTYPES:
            raise TypeError(
                f"The Triton kernels take float32, bfloat16 and float16, not {dtype}: choose another "
                "attn_res_implementation (two_phase, eager)."
            )


def _step_warps(hidden_size: int, columns_per_warp: int) -> int:
    return min(max(triton.next_power_of_2(hidden_size) // columns_per_warp, 1), 16)


@torch.library.custom_op(
    "attnres::depth_step",
    mutates_args=(),
    schema="(Tensor? partial, Tensor? output, Tensor mixed, Tensor? lse, Tensor? product, Tensor? score, "
    "float key_eps, float scale, Tensor? norm_weight, float norm_eps, bool return_hidden, ScalarType dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _depth_step(
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
    num_tokens, hidden_size = mixed.shape[:-1].numel(), mixed.shape[-1]
    results = _depth_step_results(partial, output, mixed, norm_weight, return_hidden, dtype)
    if num_tokens == 0:
        return results
    mixed = mixed.contiguous()

    def given(tensor):
        return mixed if tensor is None else tensor.contiguous()

    with _on_device(mixed):
        _step_forward[(num_tokens,)](
            given(partial),
            given(output),
            mixed,
            given(lse),
            given(score),
            given(product),
            given(norm_weight),
            *results,
            num_tokens,
            key_eps,
            scale,
            norm_eps,
            D=hidden_size,
            WIDTH=triton.next_power_of_2(hidden_size),
            HAS_PARTIAL=partial is not None,
            HAS_OUTPUT=output is not None,
            HAS_LSE=lse is not None,
            HAS_SCORE=score is not None,
            HAS_NORM=norm_weight is not None,
            WRITE_HIDDEN=return_hidden,
            DTYPE=DTYPES[dtype],
            num_warps=_step_warps(hidden_size, 512),
        )
    return results


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
        mixed.new_empty(5, mixed.shape[:-1].numel(), dtype=torch.float32),
    )


@_depth_step.register_fake
def _(partial, output, mixed, lse, product, score, key_eps, scale, norm_weight, norm_eps, return_hidden, dtype):
    return _depth_step_results(partial, output, mixed, norm_weight, return_hidden, dtype)


@torch.library.custom_op(
    "attnres::depth_step_backward",
    mutates_args=(),
    schema="(Tensor? value, Tensor mixed, Tensor? product, Tensor? norm_weight, Tensor statistics, bool has_lse, "
    "Tensor? grad_partial, Tensor? grad_normed, Tensor? grad_hidden, Tensor? grad_weight, float scale, "
    "ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _depth_step_backward(
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
    num_tokens, hidden_size = statistics.shape[1], mixed.shape[-1]
    mixed = mixed.contiguous()
    grad_value, grad_mixed, grad_lse, grad_product, grad_norm_weight = _depth_step_grads(
        value, mixed, product, norm_weight, statistics, has_lse, grad_normed
    )
    if num_tokens == 0:
        return grad_value, grad_mixed, grad_lse, grad_product.zero_(), grad_norm_weight.zero_()
    has_product = value is not None and product is not None

    def given(tensor):
        return mixed if tensor is None else tensor.contiguous()

    warps = _step_warps(hidden_size, 256)
    programs = min(num_tokens, max(20 // warps, 1) * _num_processors(mixed))  # as many as run at one time
    product_sums = statistics.new_empty(programs if has_product else 0, hidden_size)
    norm_sums = statistics.new_empty(programs if grad_normed is not None else 0, hidden_size)
    with _on_device(mixed):
        _step_backward[(programs,)](
            given(value),
            mixed,
            given(product),
            given(norm_weight),
            statistics,
            given(grad_partial),
            given(grad_normed),
            given(grad_hidden),
            given(grad_weight),
            grad_value,
            grad_mixed,
            grad_lse,
            product_sums,
            norm_sums,
            num_tokens,
            scale,
            D=hidden_size,
            WIDTH=triton.next_power_of_2(hidden_size),
            HAS_OUTPUT=value is not None,
            HAS_LSE=has_lse,
            HAS_SCORE=product is None,
            HAS_GRAD_PARTIAL=grad_partial is not None,
            HAS_GRAD_NORMED=grad_normed is not None,
            HAS_GRAD_HIDDEN=grad_hidden is not None,
            HAS_GRAD_WEIGHT=grad_weight is not None,
            DTYPE=DTYPES[dtype],
            num_warps=warps,
        )
    if has_product:
        grad_product = product_sums.sum(0)
    if grad_normed is not None:
        grad_norm_weight = norm_sums.sum(0).to(grad_norm_weight.dtype)
    return grad_value, grad_mixed, grad_lse, grad_product, grad_norm_weight


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
    grad_value, grad_mixed, grad_lse, grad_product, grad_norm_weight = _depth_step_backward(
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
    _check_dtypes(*(None if tensor is None else tensor.dtype for tensor in tensors), dtype)
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
    new_partial, normed, hidden, weight, _ = _depth_step(
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


@cache
def works_on(device: torch.device) -> bool:
    """Whether the kernels give on `device` what eager depth attention gives; if not, a warning says why. Asked once."""
    reason = "they are wrong"
    try:
        if _error_on(device) < 1e-2:
            return True
    except Exception as error:  # of Triton's compiler, the driver, a GPU that lacks something
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    logger.warning(f"The Triton kernels don't run on {device} ({reason}): depth attention runs in PyTorch instead.")
    return False


def _error_on(device: torch.device) -> float:
    """The largest relative error of results and gradients of a small block of reads in bfloat16."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        generator = torch.Generator().manual_seed(0)

        def random(*shape):
            return torch.randn(shape, generator=generator).to(device).requires_grad_()

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

        found, exact = (
            [*results, *torch.autograd.grad([r.float().square().sum() for r in results], inputs)]
            for results in (fused(*inputs), eager(*inputs))
        )
        return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, exact))


__all__ = ["DepthStep", "closed_reads", "depth_step", "works_on"]


class TritonDepthAttention(TwoPhaseDepthAttention):
    """The two phases in these kernels; arguments and results as those of [`TwoPhaseDepthAttention`].

    Each read of a model is one fused step with what comes before and after it, unless its norm can't be fused: then
    the norm follows. Few tokens, float64, tensors on a CPU and devices on which the kernels fail are left to PyTorch.
    """

    def runs(self, tensors) -> bool:
        if tensors[0].shape[:-1].numel() <= self.few_tokens or any(tensor.dtype not in DTYPES for tensor in tensors):
            return False
        if INTERPRETED.value or torch.compiler.is_compiling():
            return tensors[0].is_cuda or INTERPRETED.value
        return tensors[0].is_cuda and works_on(tensors[0].device)

    def closed_reads(self, sources, products, eps):
        if not self.runs(sources):
            return super().closed_reads(sources, products, eps)
        mixed, lse, weights = closed_reads(sources, products.float(), eps, torch.float32, return_weights=True)
        return [
            ClosedDepthRead(mixed[read], lse[read], weights[read].transpose(0, 1).contiguous(), len(sources))
            for read in range(len(products))
        ]

    def mix(self, sources, product, eps) -> ClosedDepthRead:
        """One read of the sources. A single one is not copied, and its score is left to [`depth_step`]."""
        if len(sources) > 1:
            return self.closed_reads(sources, product.unsqueeze(0), eps)[0]
        weights = torch.ones_like(sources[0][..., 0], dtype=torch.float32).unsqueeze(1)
        return ClosedDepthRead(sources[0], None, weights, 1)

    def step(self, depth_read, product, sources, output, norm, closed_read, watched):
        if not self.runs(sources if output is None else (*sources, output)):
            return super().step(depth_read, product, sources, output, norm, closed_read, watched)
        place = (depth_read.extends, product, depth_read.eps, depth_read.scale)
        if can_fuse_norm(norm) and norm.weight.dtype in DTYPES:
            return self.fused(closed_read, sources, output, *place, norm, watched)
        hidden, weights, _, sources = self.fused(closed_read, sources, output, *place)
        return hidden, weights, norm(hidden), sources

    def read(self, closed_read, sources, product, eps, scale, norm=None):
        if not self.runs(sources):
            return super().read(closed_read, sources, product, eps, scale, norm)
        hidden, weights, normed, _ = self.fused(closed_read, sources, None, False, product, eps, scale, norm)
        return hidden if norm is None else normed, weights

    def fused(self, closed_read, sources, output, extends, product, eps, scale, norm=None, watched=False):
        """A read, the output that joins its sources before and the norm after it; the result is [`DepthRead`]'s."""
        dtype, extends = sources[0].dtype, extends and output is not None
        if closed_read is None:
            closed_read = self.mix(sources[: len(sources) - extends], product, eps)
        num_closed = closed_read.num_sources
        partial, score, new_weights = None, None, 1
        if output is not None and len(sources) - num_closed == extends:
            partial = sources[-1].to(dtype) if extends else None
        else:  # several sources have come since, or the output is among them
            sources, output = write(sources, output, extends), None
            if len(sources) > num_closed:
                new_read = self.mix(sources[num_closed:], product, eps)
                output, score, new_weights = new_read.mixed, new_read.lse, new_read.weights
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
            dtype=dtype,
            score=score,
        )
        weights = closed_read.weights
        if output is not None:
            weight = step.weight.unsqueeze(1)
            weights = torch.cat([weights * (1 - weight), new_weights * weight], dim=1)
        if score is None and output is not None:
            sources = (*sources[:num_closed], step.partial)
        return step.hidden, weights, step.normed, sources
