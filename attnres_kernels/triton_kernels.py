# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The kernels of fused.py for GPUs, written in Triton.

Where there is no GPU, they run in Triton's interpreter when TRITON_INTERPRET=1 is set before triton is imported.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("attnres_kernels.triton_kernels needs triton (pip install triton).") from error

from attnres_kernels.fused import KERNELS, DepthKernels


DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
TABLE_ARGUMENTS = 16


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
def _dot_of_parts(high, middle, low, b, total, PRECISION: tl.constexpr):
    """`total + a @ b` for a float32 `a` that has been split before, so that it can be used again."""
    if b.dtype == tl.bfloat16:
        total = _bfloat16_dot(low, b, total)
        total = _bfloat16_dot(middle, b, total)
        total = _bfloat16_dot(high, b, total)
    else:
        whole = high.to(tl.float32) + middle.to(tl.float32) + low.to(tl.float32)
        total = _dot(whole, b, total, PRECISION)
    return total


@triton.jit
def _rows(table, index, token, like, D: tl.constexpr, ALIGN: tl.constexpr):
    """Pointers to rows `token` of the tensors number `index` of a table of addresses."""
    tensors = tl.load(table + index).to(like.dtype)
    return tl.multiple_of(tensors + token * D, ALIGN)


# Tiles are loaded without a mask where their columns divide the hidden size; rows that don't exist are others twice.


@triton.jit
def _tile(rows, column, D: tl.constexpr, STEP: tl.constexpr, EVICTION: tl.constexpr):
    """(rows, columns), of which there are STEP at a time."""
    at = rows[:, None] + column[None, :]
    if D % STEP == 0:
        return tl.load(at, eviction_policy=EVICTION)
    else:
        return tl.load(at, mask=(column < D)[None, :], other=0.0, eviction_policy=EVICTION)


@triton.jit
def _warp_columns(WARPS: tl.constexpr, PART: tl.constexpr):
    """The first columns of dot products over d, (WARPS, PART): each warp sums a part of them."""
    return tl.arange(0, WARPS)[:, None] * PART + tl.arange(0, PART)[None, :]


@triton.jit
def _warp_tile(rows, column, D: tl.constexpr, STEP: tl.constexpr, EVICTION: tl.constexpr):
    """(WARPS, rows, PART)"""
    at = rows[None, :, None] + column[:, None, :]
    if D % STEP == 0:
        return tl.load(at, eviction_policy=EVICTION)
    else:
        return tl.load(at, mask=(column < D)[:, None, :], other=0.0, eviction_policy=EVICTION)


@triton.jit
def _split_products(products, parts, S: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr):
    """Writes the three parts of each product and zeros, four rows for each read; reads that don't exist are others."""
    read = tl.program_id(0)
    column = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = column < D
    product = tl.load(products + tl.minimum(read, S - 1) * D + column, mask=inside, other=0.0)
    high, middle, low = _three_parts(product)
    at = parts + 4 * read * D + column
    tl.store(at, high, mask=inside)
    tl.store(at + D, middle, mask=inside)
    tl.store(at + 2 * D, low, mask=inside)
    tl.store(at + 3 * D, tl.zeros([CHUNK], tl.bfloat16), mask=inside)


@triton.jit
def _one_of(index, t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15):
    """The addresses of the tensors number `index`."""
    address = tl.where(index == 1, t1.to(tl.int64), t0.to(tl.int64))
    address = tl.where(index == 2, t2.to(tl.int64), address)
    address = tl.where(index == 3, t3.to(tl.int64), address)
    address = tl.where(index == 4, t4.to(tl.int64), address)
    address = tl.where(index == 5, t5.to(tl.int64), address)
    address = tl.where(index == 6, t6.to(tl.int64), address)
    address = tl.where(index == 7, t7.to(tl.int64), address)
    address = tl.where(index == 8, t8.to(tl.int64), address)
    address = tl.where(index == 9, t9.to(tl.int64), address)
    address = tl.where(index == 10, t10.to(tl.int64), address)
    address = tl.where(index == 11, t11.to(tl.int64), address)
    address = tl.where(index == 12, t12.to(tl.int64), address)
    address = tl.where(index == 13, t13.to(tl.int64), address)
    address = tl.where(index == 14, t14.to(tl.int64), address)
    return tl.where(index == 15, t15.to(tl.int64), address)


@triton.jit
def _fill_table(table, t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15):
    """Writes the addresses of 16 tensors. On the device, as a CUDA graph keeps arguments but not host memory."""
    index = tl.arange(0, 16)
    tl.store(table + index, _one_of(index, t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15))


# fmt: off
@triton.jit
def _fill_long_table(
    table,
    t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15,
    t16, t17, t18, t19, t20, t21, t22, t23, t24, t25, t26, t27, t28, t29, t30, t31,
    t32, t33, t34, t35, t36, t37, t38, t39, t40, t41, t42, t43, t44, t45, t46, t47,
    t48, t49, t50, t51, t52, t53, t54, t55, t56, t57, t58, t59, t60, t61, t62, t63,
):
    """The same for 64, as each launch takes longer than what it does."""
    _fill_table(table, t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15)
    _fill_table(table + 16, t16, t17, t18, t19, t20, t21, t22, t23, t24, t25, t26, t27, t28, t29, t30, t31)
    _fill_table(table + 32, t32, t33, t34, t35, t36, t37, t38, t39, t40, t41, t42, t43, t44, t45, t46, t47)
    _fill_table(table + 48, t48, t49, t50, t51, t52, t53, t54, t55, t56, t57, t58, t59, t60, t61, t62, t63)
# fmt: on


# In both kernels of closed reads a program holds TOKENS tokens. It multiplies tiles of ROWS rows (source, token) with
# tiles of TOKENS * READS lines (token, read), of which the pairs with the same token count. It goes through its sources
# twice, as the weights need whole rows; with few tokens per program the second time they come from the cache. Where
# SPLIT, sources are bfloat16, and so are the products, as `_split_products` has written them.


@triton.jit
def _closed_weights(scores, normaliser, source, row_token, token, read, num_tokens, same, S: tl.constexpr):
    """The weights (lines, rows) of sources, zero where line and row have not the same token."""
    at = (source[None, :] * S + read[:, None]) * num_tokens + token[:, None]
    return tl.exp(tl.load(scores + at, mask=same, other=float("-inf")) - normaliser[:, None])


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
    READS_DOT: tl.constexpr,  # rows of products: READS or at least 16; where SPLIT, four for each of them
    WARPS: tl.constexpr,
    PART: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    ONE_GROUP: tl.constexpr,  # whether all sources fit into one tile
    KEEP: tl.constexpr,  # cache policy of what is needed again
    DROP: tl.constexpr,  # and of what isn't
):
    STEP: tl.constexpr = WARPS * PART
    first = tl.program_id(0).to(tl.int64) * TOKENS
    last_token = tl.cast(num_tokens, tl.int64) - 1
    row = tl.arange(0, ROWS)
    row_source = (row // TOKENS).to(tl.int64)  # its products with the number of tokens may be large
    row_token = first + row % TOKENS
    read_dot = tl.arange(0, READS_DOT)
    product_rows = products + (read_dot if SPLIT else tl.minimum(read_dot, S - 1)) * D
    for group in range(0, num_sources, ROWS // TOKENS):
        source = group + row_source
        inside = (source < num_sources) & (row_token < num_tokens)
        rows = _rows(table, tl.minimum(source, num_sources - 1), tl.minimum(row_token, last_token), like, D, ALIGN)
        dots = tl.zeros([WARPS, ROWS, READS_DOT], tl.float32)
        gram = tl.zeros([WARPS, ROWS, ROWS], tl.float32)  # its diagonal has the squares
        column = _warp_columns(WARPS, PART)
        value = _warp_tile(rows, column, D, STEP, KEEP)
        product = _warp_tile(product_rows, column, D, STEP, "")
        for start in range(0, D, STEP):
            # on its way while this one is multiplied; after the last one the first again
            next_column = _warp_columns(WARPS, PART) + tl.where(start + STEP < D, start + STEP, 0)
            next_value = _warp_tile(rows, next_column, D, STEP, KEEP)
            next_product = _warp_tile(product_rows, next_column, D, STEP, "")
            dots = _dot(value, tl.permute(product, (0, 2, 1)), dots, PRECISION)
            gram = _dot(value, tl.permute(value, (0, 2, 1)), gram, PRECISION)
            value, product = next_value, next_product
        dots = tl.sum(dots, 0)
        if SPLIT:
            dots = tl.sum(tl.reshape(dots, [ROWS, READS_DOT // 4, 4]), 2)
        squares = tl.sum(tl.where(row[:, None] == row[None, :], tl.sum(gram, 0), 0.0), 1)
        rms = tl.rsqrt(squares / D + eps)
        read_row = tl.arange(0, READS_DOT // 4 if SPLIT else READS_DOT)
        at = (source[:, None] * S + read_row[None, :]) * num_tokens + row_token[:, None]
        tl.store(scores + at, dots * rms[:, None], mask=inside[:, None] & (read_row < S)[None, :])
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

    results = _rows(table, num_sources + tl.minimum(read, S - 1), tl.minimum(token, last_token), mixed_like, D, ALIGN)
    same_token = (token[:, None] == row_token[None, :]) & inside_line[:, None]
    if ONE_GROUP:
        same = same_token & (row_source < num_sources)[None, :]
        weight = _closed_weights(scores, normaliser, row_source, row_token, token, read, num_tokens, same, S)
        high, middle, low = _three_parts(weight)
        rows = _rows(table, tl.minimum(row_source, num_sources - 1), tl.minimum(row_token, last_token), like, D, ALIGN)
    for start in range(0, D, CHUNK):
        column = start + tl.arange(0, CHUNK)
        mixed = tl.zeros([TOKENS * READS, CHUNK], tl.float32)
        if ONE_GROUP:
            value = _tile(rows, column, D, CHUNK, DROP)
            mixed = _dot_of_parts(high, middle, low, value, mixed, PRECISION)
        else:
            for group in range(0, num_sources, ROWS // TOKENS):
                source = group + row_source
                at_source = tl.minimum(source, num_sources - 1)
                rows = _rows(table, at_source, tl.minimum(row_token, last_token), like, D, ALIGN)
                same = same_token & (source < num_sources)[None, :]
                weight = _closed_weights(scores, normaliser, source, row_token, token, read, num_tokens, same, S)
                mixed = _dot(weight, _tile(rows, column, D, CHUNK, DROP), mixed, PRECISION)
        result = _cast(mixed, mixed_like.dtype.element_ty)
        inside_tile = inside_line[:, None] & (column < D)[None, :]
        tl.store(results[:, None] + column[None, :], result, mask=inside_tile, eviction_policy=DROP)


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
    SPLIT: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    KEEP: tl.constexpr,
    DROP: tl.constexpr,
    HAS_GRAD_SCORES: tl.constexpr,
    GRAD_SOURCES: tl.constexpr,
):
    STEP: tl.constexpr = WARPS * PART
    first = tl.program_id(0).to(tl.int64) * TOKENS
    last_token = tl.cast(num_tokens, tl.int64) - 1
    row = tl.arange(0, ROWS)
    row_source = (row // TOKENS).to(tl.int64)  # its products with the number of tokens may be large
    row_token = first + row % TOKENS
    line = tl.arange(0, TOKENS * READS)
    token = first + line // READS
    read = line % READS
    inside_line = (token < num_tokens) & (read < S)
    same_token = (token[:, None] == row_token[None, :]) & inside_line[:, None]
    results = _rows(table, num_sources + tl.minimum(read, S - 1), tl.minimum(token, last_token), mixed_like, D, ALIGN)
    for group in range(0, num_sources, ROWS // TOKENS):
        source = group + row_source
        rows = _rows(table, tl.minimum(source, num_sources - 1), tl.minimum(row_token, last_token), like, D, ALIGN)
        dots = tl.zeros([WARPS, TOKENS * READS, ROWS], tl.float32)
        column = _warp_columns(WARPS, PART)
        grad_mixed = _warp_tile(results, column, D, STEP, KEEP)
        value = _warp_tile(rows, column, D, STEP, KEEP)
        for start in range(0, D, STEP):
            column = _warp_columns(WARPS, PART) + tl.where(start + STEP < D, start + STEP, 0)
            next_grad = _warp_tile(results, column, D, STEP, KEEP)
            next_value = _warp_tile(rows, column, D, STEP, KEEP)
            dots = _dot(grad_mixed, tl.permute(value, (0, 2, 1)), dots, PRECISION)
            grad_mixed, value = next_grad, next_value
        grad_weights = tl.sum(dots, 0)
        at = (source[None, :] * S + read[:, None]) * num_tokens + token[:, None]
        tl.store(grad_scores + at, grad_weights, mask=same_token & (source < num_sources)[None, :])
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
        product_rows = products + (read_dot if SPLIT else tl.minimum(read_dot, S - 1)) * D
        read_row = read_dot // 4 if SPLIT else read_dot
        part = read_dot % 4 if SPLIT else read_dot
        for group in range(0, num_sources, ROWS // TOKENS):
            source = group + row_source
            inside = (source < num_sources) & (row_token < num_tokens)
            at_source, at_token = tl.minimum(source, num_sources - 1), tl.minimum(row_token, last_token)
            rows = _rows(table, at_source, at_token, like, D, ALIGN)
            grad_rows = _rows(table, num_sources + S + at_source, at_token, like, D, ALIGN)
            same = same_token & (source < num_sources)[None, :]
            weight = tl.trans(_closed_weights(scores, normaliser, source, row_token, token, read, num_tokens, same, S))
            weight_high, weight_middle, weight_low = _three_parts(weight)
            at = (source[:, None] * S + read_row[None, :]) * num_tokens + row_token[:, None]
            inside_scores = inside[:, None] & (read_row < S)[None, :]
            score = tl.load(scores + at, mask=inside_scores, other=0.0)
            grad_score = tl.load(grad_scores + at, mask=inside_scores, other=0.0)
            rms = tl.load(inverse_rms + source * num_tokens + row_token, mask=inside, other=0.0)
            along = tl.sum(tl.where((part == 0)[None, :], score * grad_score, 0.0) if SPLIT else score * grad_score, 1)
            along *= rms / D  # and once more below, as the square vanishes where a source is huge
            by_product = grad_score * rms[:, None]
            if SPLIT:  # what is less than the rounding of a product of the highest parts is left out
                high, middle, low = _three_parts(by_product)
                middle = tl.where((part < 2)[None, :], middle, 0.0).to(tl.bfloat16)
                low = tl.where((part < 1)[None, :], low, 0.0).to(tl.bfloat16)
            for start in range(0, D, CHUNK):
                column = start + tl.arange(0, CHUNK)
                grad = tl.zeros([ROWS, CHUNK], tl.float32)
                product = _tile(product_rows, column, D, CHUNK, "")
                if SPLIT:
                    grad = _dot_of_parts(high, middle, low, product, grad, PRECISION)
                else:
                    grad = _dot(by_product, product, grad, PRECISION)
                result = _tile(results, column, D, CHUNK, "")
                grad = _dot_of_parts(weight_high, weight_middle, weight_low, result, grad, PRECISION)
                grad -= along[:, None] * (rms[:, None] * _tile(rows, column, D, CHUNK, DROP).to(tl.float32))
                inside_tile = inside[:, None] & (column < D)[None, :]
                grad = _cast(grad, like.dtype.element_ty)
                tl.store(grad_rows[:, None] + column[None, :], grad, mask=inside_tile, eviction_policy=DROP)


# The same where the sources of a token fit into the registers of a program: it fetches them once, and does one read
# after the other without matrix units, all in float32.


@triton.jit
def _held_forward(
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
    WIDTH: tl.constexpr,
    SOURCES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < D
    index = tl.arange(0, SOURCES).to(tl.int64)
    is_source = index < num_sources
    key = tl.load(products + column, mask=inside, other=0.0)
    rows = _rows(table, tl.minimum(index, num_sources - 1), token, like, D, ALIGN)
    value = tl.load(rows[:, None] + column[None, :], mask=is_source[:, None] & inside[None, :], other=0.0)
    value = value.to(tl.float32)
    rms = tl.rsqrt(tl.sum(value * value, 1) / D + eps)
    tl.store(inverse_rms + index * num_tokens + token, rms, mask=is_source)
    for read in range(S):
        dots = tl.sum(value * key[None, :], 1)
        # the next one's, while this one is computed; after the last its own again
        key = tl.load(products + tl.minimum(read + 1, S - 1) * D + column, mask=inside, other=0.0)
        score = tl.where(is_source, dots * rms, float("-inf"))
        tl.store(scores + (index * S + read) * num_tokens + token, score, mask=is_source)
        peak = tl.max(score, 0)
        weight = tl.exp(score - peak)
        total = tl.sum(weight, 0)
        tl.store(lse + tl.cast(read, tl.int64) * num_tokens + token, peak + tl.log(total))
        mixed = tl.sum((weight / total)[:, None] * value, 0)
        result = tl.load(table + num_sources + read).to(mixed_like.dtype) + token * D
        tl.store(tl.multiple_of(result, ALIGN) + column, _cast(mixed, mixed_like.dtype.element_ty), mask=inside)


@triton.jit
def _held_backward(
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
    WIDTH: tl.constexpr,
    SOURCES: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_GRAD_SCORES: tl.constexpr,
    GRAD_SOURCES: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < D
    index = tl.arange(0, SOURCES).to(tl.int64)
    is_source = index < num_sources
    at_source = tl.minimum(index, num_sources - 1)
    inside_tile = is_source[:, None] & inside[None, :]
    result = tl.multiple_of(tl.load(table + num_sources).to(mixed_like.dtype) + token * D, ALIGN)
    next_grad = tl.load(result + column, mask=inside, other=0.0)
    next_score = tl.load(scores + index * S * num_tokens + token, mask=is_source, other=float("-inf"))
    rows = _rows(table, at_source, token, like, D, ALIGN)
    value = tl.load(rows[:, None] + column[None, :], mask=inside_tile, other=0.0).to(tl.float32)
    rms = tl.load(inverse_rms + at_source * num_tokens + token)
    grad = tl.zeros([SOURCES, WIDTH], tl.float32)
    along = tl.zeros([SOURCES], tl.float32)
    for read in range(S):
        at_read = tl.cast(read, tl.int64) * num_tokens + token
        at = (index * S + read) * num_tokens + token
        grad_mixed, score = next_grad.to(tl.float32), next_score
        key = tl.load(products + read * D + column, mask=inside, other=0.0)
        # the next one's, while this one is computed; after the last its own again
        after = tl.minimum(read + 1, S - 1)
        result = tl.multiple_of(tl.load(table + num_sources + after).to(mixed_like.dtype) + token * D, ALIGN)
        next_grad = tl.load(result + column, mask=inside, other=0.0)
        at_next = (index * S + after) * num_tokens + token
        next_score = tl.load(scores + at_next, mask=is_source, other=float("-inf"))
        weight = tl.exp(score - tl.load(lse + at_read))
        grad_weight = tl.sum(value * grad_mixed[None, :], 1)
        mean_grad = tl.sum(weight * grad_weight, 0) - tl.load(grad_lse + at_read)
        grad_score = weight * (grad_weight - mean_grad)
        if HAS_GRAD_SCORES:
            grad_score += tl.load(given_grad_scores + at, mask=is_source, other=0.0)
        tl.store(grad_scores + at, grad_score, mask=is_source)
        if GRAD_SOURCES:
            along += tl.where(is_source, score, 0.0) * grad_score
            grad += weight[:, None] * grad_mixed[None, :]
            grad += (grad_score * rms)[:, None] * key[None, :]
    if GRAD_SOURCES:
        grad -= (along * rms / D)[:, None] * (rms[:, None] * value)
        grad_rows = _rows(table, num_sources + S + at_source, token, like, D, ALIGN)
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
    STAGES: tl.constexpr,
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
        for source in tl.range(0, num_sources, num_stages=STAGES):
            tensor = tl.load(table + source).to(like.dtype)
            rows = tl.multiple_of(tensor + tl.minimum(token, num_tokens - 1) * D, ALIGN)
            value = _tile(rows, column, D, CHUNK, "")
            rms = tl.load(inverse_rms + tl.cast(source, tl.int64) * num_tokens + token, mask=inside, other=0.0)
            at = (tl.cast(source, tl.int64) * S + read[:, None]) * num_tokens + token[None, :]
            grad_score = tl.load(grad_scores + at, mask=(read < S)[:, None] & inside[None, :], other=0.0)
            total = _dot(grad_score * rms[None, :], value, total, PRECISION)
    at = (tl.program_id(1) * S + read[:, None]).to(tl.int64) * D + column[None, :]
    tl.store(partial_sums + at, total, mask=(read < S)[:, None] & (column < D)[None, :])


@triton.jit
def _score(value, product, eps, D: tl.constexpr):
    """The score of a source, and its inverse RMS. Both sums are one, as it is the wait for others that takes time."""
    squares, dot = tl.split(tl.sum(tl.join(value * value, value * product), 0))
    rms = tl.rsqrt(squares / D + eps)
    return dot * rms, rms


@triton.jit
def _write_normed(read, gain, results, inside, eps, D: tl.constexpr, DTYPE: tl.constexpr):
    """Stores the norm of a read, as Llama casts it. Returns the inverse RMS."""
    rms = tl.rsqrt(tl.sum(read * read, 0) / D + eps)
    result = _cast(read * rms, DTYPE).to(tl.float32) * gain.to(tl.float32)
    tl.store(results, _cast(result, results.dtype.element_ty), mask=inside)
    return rms


# fmt: off
@triton.jit
def _closed_tile(
    index, num_closed, table, token, column,
    t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15,
    D: tl.constexpr, ALIGN: tl.constexpr, HAS_TABLE: tl.constexpr,
):
    # fmt: on
    """The rows of a token in the sources number `index`."""
    if HAS_TABLE:
        address = tl.load(table + index, mask=index < num_closed, other=0)
    else:
        address = _one_of(index, t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15)
    rows = tl.multiple_of(address.to(t0.dtype) + token * D, ALIGN)
    inside = (index < num_closed)[:, None] & (column < D)[None, :]
    return tl.load(rows[:, None] + column[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=["seq_len", "num_closed"])
def _read_forward(
    t0,  # the sources, if they aren't in a table
    t1,
    t2,
    t3,
    t4,
    t5,
    t6,
    t7,
    t8,
    t9,
    t10,
    t11,
    t12,
    t13,
    t14,
    t15,
    table,
    output,
    product,
    norm_weight,
    partial,
    normed,
    hidden,
    weights,  # (batch, n, seq), with the output as the last source
    seq_len,
    num_closed,  # sources that no output joins
    eps,
    scale,
    norm_eps,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    SOURCES: tl.constexpr,
    ONE_TILE: tl.constexpr,  # whether there are no more sources than in one tile
    ALIGN: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    EXTENDS: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,
    HAS_NORM: tl.constexpr,
    WRITE_HIDDEN: tl.constexpr,
    WRITE_WEIGHTS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """A whole read of a token, a few sources at a time, by an online softmax."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < D
    at = token * D + column
    # what is needed later is on its way while something else is computed, as for a single token nothing else hides it
    key = tl.load(product + column, mask=inside, other=0.0)
    if HAS_NORM:
        gain = tl.load(norm_weight + column, mask=inside, other=0.0)
    next_index = tl.arange(0, SOURCES)
    next_tile = _closed_tile(
        next_index, num_closed, table, token, column,
        t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15,
        D, ALIGN, HAS_TABLE,
    )  # fmt: skip
    num_sources = num_closed
    if HAS_OUTPUT:
        num_sources += 1
    at_weights = (token // seq_len) * num_sources * seq_len + token % seq_len
    peak = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    read = tl.zeros([WIDTH], tl.float32)
    if HAS_OUTPUT:
        read = tl.load(output + at, mask=inside, other=0.0).to(tl.float32)
        if EXTENDS:
            last = num_closed + tl.arange(0, 1)
            open_sum = _closed_tile(
                last, num_closed + 1, table, token, column,
                t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15,
                D, ALIGN, HAS_TABLE,
            ).to(tl.float32)  # fmt: skip
            rounded = _cast(read + tl.sum(open_sum, 0), partial.dtype.element_ty)
            tl.store(partial + at, rounded, mask=inside)
            read = rounded.to(tl.float32)
        peak, _ = _score(read, key, eps, D)
        total += 1.0
        if WRITE_WEIGHTS:
            tl.store(weights + at_weights + tl.cast(num_closed, tl.int64) * seq_len, peak)
    for first in range(0, 1 if ONE_TILE else num_closed, SOURCES):
        index, value = next_index, next_tile.to(tl.float32)
        is_source = index < num_closed
        if not ONE_TILE:
            next_index = first + SOURCES + tl.arange(0, SOURCES)
            next_tile = _closed_tile(
                next_index, num_closed, table, token, column,
                t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15,
                D, ALIGN, HAS_TABLE,
            )  # fmt: skip
        squares, dots = tl.split(tl.sum(tl.join(value * value, value * key[None, :]), 1))
        score = tl.where(is_source, dots * tl.rsqrt(squares / D + eps), float("-inf"))
        if WRITE_WEIGHTS:
            tl.store(weights + at_weights + index.to(tl.int64) * seq_len, score, mask=is_source)
        new_peak = tl.maximum(peak, tl.max(score, 0))
        weight = tl.exp(score - new_peak)
        before = tl.exp(peak - new_peak)
        total = total * before + tl.sum(weight, 0)
        read = read * before + tl.sum(weight[:, None] * value, 0)
        peak = new_peak
    if WRITE_WEIGHTS:
        tl.debug_barrier()  # threads read each other's scores
        for first in range(0, num_sources, SOURCES):
            number = first + tl.arange(0, SOURCES)
            at_score = weights + at_weights + number.to(tl.int64) * seq_len
            given_score = tl.load(at_score, mask=number < num_sources, other=0.0)
            tl.store(at_score, tl.exp(given_score - peak) / total, mask=number < num_sources)
    read *= scale / total
    if WRITE_HIDDEN:
        tl.store(hidden + at, _cast(read, hidden.dtype.element_ty), mask=inside)
    if HAS_NORM:
        _write_normed(read, gain, normed + at, inside, norm_eps, D, DTYPE)


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
    # everything is on its way before the first sum over the columns, which nothing passes
    read = tl.load(mixed + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        gain = tl.load(norm_weight + column, mask=inside, other=0.0)
    score, rms, closed_score, closed_rms, norm_rms = 0.0, 0.0, 0.0, 0.0, 0.0  # unless they are computed
    if HAS_OUTPUT:
        value = tl.load(output + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_LSE:
            closed_score = tl.load(lse + token)
        if HAS_SCORE:
            score = tl.load(given_score + token)
        else:
            key = tl.load(product + column, mask=inside, other=0.0)
        if HAS_PARTIAL:
            value += tl.load(partial + at, mask=inside, other=0.0).to(tl.float32)
            # what is scored is what later reads will see: the rounded sum
            rounded = _cast(value, new_partial.dtype.element_ty)
            tl.store(new_partial + at, rounded, mask=inside)
            value = rounded.to(tl.float32)
        if not HAS_SCORE:
            score, rms = _score(value, key, key_eps, D)
        if not HAS_LSE:
            closed_score, closed_rms = _score(read, key, key_eps, D)
        share = 1.0 / (1.0 + tl.exp(closed_score - score))
        read = (1.0 - share) * read + share * value
        tl.store(weight + token, share)
    read *= scale
    if WRITE_HIDDEN:
        tl.store(hidden + at, _cast(read, hidden.dtype.element_ty), mask=inside)
    if HAS_NORM:
        norm_rms = _write_normed(read, gain, normed + at, inside, norm_eps, D, DTYPE)
    tl.store(statistics + token, score)
    tl.store(statistics + num_tokens + token, rms)
    tl.store(statistics + 2 * num_tokens + token, closed_score)
    tl.store(statistics + 3 * num_tokens + token, closed_rms)
    tl.store(statistics + 4 * num_tokens + token, norm_rms)


@triton.jit
def _row(tensor, token, column, inside, D: tl.constexpr, PRESENT: tl.constexpr):
    """A token's numbers, or 0 where there is no such tensor."""
    return tl.load(tensor + token * D + column, mask=inside, other=0.0) if PRESENT else 0.0


@triton.jit
def _number(numbers, token, PRESENT: tl.constexpr):
    return tl.load(numbers + token) if PRESENT else 0.0


@triton.jit
def _step_inputs(
    value,
    mixed,
    statistics,
    grad_partial,
    grad_normed,
    token,
    num_tokens,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,
    HAS_GRAD_PARTIAL: tl.constexpr,
    HAS_GRAD_NORMED: tl.constexpr,
):
    """What the backward pass of a step takes of a token, or of the last, if there is none."""
    column = tl.arange(0, WIDTH)
    inside = column < D
    token = tl.minimum(token, num_tokens - 1)
    return (
        _row(value, token, column, inside, D, HAS_OUTPUT),
        _row(mixed, token, column, inside, D, True),
        _row(grad_partial, token, column, inside, D, HAS_OUTPUT and HAS_GRAD_PARTIAL),
        _row(grad_normed, token, column, inside, D, HAS_GRAD_NORMED),
        _number(statistics, token, HAS_OUTPUT),
        _number(statistics + num_tokens, token, HAS_OUTPUT),
        _number(statistics + 2 * num_tokens, token, HAS_OUTPUT),
        _number(statistics + 3 * num_tokens, token, HAS_OUTPUT),
        _number(statistics + 4 * num_tokens, token, HAS_GRAD_NORMED),
    )


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
    AHEAD: tl.constexpr,  # whether a token is loaded while the one before is computed
):
    column = tl.arange(0, WIDTH)
    inside = column < D
    product_sum = tl.zeros([WIDTH], tl.float32)
    norm_sum = tl.zeros([WIDTH], tl.float32)
    token = tl.program_id(0).to(tl.int64)
    if AHEAD:
        key = _row(product, 0, column, inside, D, HAS_OUTPUT and not HAS_SCORE)
        gain = _row(norm_weight, 0, column, inside, D, HAS_GRAD_NORMED)
        value_, mixed_, partial_, normed_, score_, rms_, closed_score_, closed_rms_, norm_rms_ = _step_inputs(
            value_pointer,
            mixed,
            statistics,
            grad_partial,
            grad_normed,
            token,
            num_tokens,
            D,
            WIDTH,
            HAS_OUTPUT,
            HAS_GRAD_PARTIAL,
            HAS_GRAD_NORMED,
        )
    for _ in range(tl.program_id(0), num_tokens, tl.num_programs(0)):
        if not AHEAD:
            value_, mixed_, partial_, normed_, score_, rms_, closed_score_, closed_rms_, norm_rms_ = _step_inputs(
                value_pointer,
                mixed,
                statistics,
                grad_partial,
                grad_normed,
                token,
                num_tokens,
                D,
                WIDTH,
                HAS_OUTPUT,
                HAS_GRAD_PARTIAL,
                HAS_GRAD_NORMED,
            )
        at = token * D + column
        closed = mixed_.to(tl.float32)
        read, grad_partial_row = closed, partial_
        score, rms, closed_score, closed_rms, norm_rms = score_, rms_, closed_score_, closed_rms_, norm_rms_
        if HAS_OUTPUT:
            value = value_.to(tl.float32)
        if HAS_GRAD_NORMED:
            grad_unit = normed_.to(tl.float32)
        if AHEAD:
            value_, mixed_, partial_, normed_, score_, rms_, closed_score_, closed_rms_, norm_rms_ = _step_inputs(
                value_pointer,
                mixed,
                statistics,
                grad_partial,
                grad_normed,
                token + tl.num_programs(0),
                num_tokens,
                D,
                WIDTH,
                HAS_OUTPUT,
                HAS_GRAD_PARTIAL,
                HAS_GRAD_NORMED,
            )
        if HAS_OUTPUT:
            share = 1.0 / (1.0 + tl.exp(closed_score - score))
            read = (1.0 - share) * closed + share * value
        grad = tl.zeros([WIDTH], tl.float32)
        if HAS_GRAD_NORMED:
            unit = read * scale * norm_rms
            if not AHEAD:
                gain = _row(norm_weight, 0, column, inside, D, True)
            norm_sum += grad_unit * _cast(unit, DTYPE).to(tl.float32)
            grad_unit *= gain.to(tl.float32)
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
                if not AHEAD:
                    key = _row(product, 0, column, inside, D, True)
                product_sum += grad_score * rms * value
                result += grad_score * rms * (key - (score * rms / D) * value)
            if HAS_LSE:
                tl.store(grad_lse + token, -grad_score)
            else:
                product_sum -= grad_score * closed_rms * closed
                grad -= grad_score * closed_rms * (key - (closed_score * closed_rms / D) * closed)
            if HAS_GRAD_PARTIAL:
                result += grad_partial_row.to(tl.float32)
            tl.store(grad_value + at, _cast(result, grad_value.dtype.element_ty), mask=inside)
        tl.store(grad_mixed + at, _cast(grad, grad_mixed.dtype.element_ty), mask=inside)
        token += tl.num_programs(0)
    at = tl.program_id(0).to(tl.int64) * D + column
    if HAS_OUTPUT and not HAS_SCORE:
        tl.store(product_sums + at, product_sum, mask=inside)
    if HAS_GRAD_NORMED:
        tl.store(norm_sums + at, norm_sum, mask=inside)


def _on_device(tensor: torch.Tensor):
    """Context of kernel launches, which go to the current device, not to the tensors'."""
    if INTERPRETED.value and tensor.is_cuda:
        raise RuntimeError("TRITON_INTERPRET=1 runs the Triton kernels on the CPU only: unset it to use the GPU.")
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


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
    few = len(tensors) <= TABLE_ARGUMENTS
    fill, at_once = (_fill_table, TABLE_ARGUMENTS) if few else (_fill_long_table, 4 * TABLE_ARGUMENTS)
    tensors = [*tensors, *[tensors[0]] * (-len(tensors) % at_once)]
    table = torch.empty(len(tensors), dtype=torch.int64, device=tensors[0].device)
    for start in range(0, len(tensors), at_once):
        fill[(1,)](table[start:], *tensors[start : start + at_once], num_warps=1)
    return table


def _alignment(tensors: Sequence[torch.Tensor], hidden_size: int) -> int:
    """Bytes that every row's address is a multiple of, at most 16."""
    for alignment in (16, 8, 4):
        row_bytes = [hidden_size * tensor.element_size() for tensor in tensors]
        if all(tensor.data_ptr() % alignment == 0 for tensor in tensors) and not any(b % alignment for b in row_bytes):
            return alignment
    return 2


# What programs hold and how they go through it; found by benchmarks/gpu_tuning.py
TUNED = {
    # rows (source, token) at a time, what the sources of the programs that run at one time may take of the cache
    # divided by their number, columns that a warp multiplies and mixes at a time, cache hints
    "closed_forward": {"rows": 16, "cache_bytes": 1 << 17, "warps": 4, "part": 32, "chunk": 64, "hints": True},
    "closed_backward": {"rows": 16, "cache_bytes": 1 << 17, "warps": 4, "part": 32, "chunk": 32, "hints": False},
    # the widest sources, columns per warp, most numbers of sources that a thread holds (half as many where there are 16
    # warps), and by the number of warps the registers that such a thread gets, so that more of them run at a time
    "held_forward": {"widest": 2048, "columns": 512, "numbers": 128, "registers": [[4, 168]]},
    "held_backward": {"widest": 2048, "columns": 512, "numbers": 32, "registers": [[4, 168], [8, 128]]},
    "products_backward": {"tokens": 32, "chunk": 128, "warps": 4, "stages": 2, "programs": 4},
    # columns per warp; warps of a processor, the widest token that is loaded while the one before is computed
    "step_forward": {"columns": 512},
    "step_backward": {"columns": 256, "warps": 16, "ahead": 4096},
    # columns per warp, of which most hold so many numbers of sources in each thread; of many tokens, and of so few that
    # what counts is how long one takes
    "read_forward": {"columns": 512, "numbers": 16, "warps": 1},
    "token_read": {"columns": 512, "numbers": 128, "warps": 4},
}


def _closed_tiles(sources: Sequence[torch.Tensor], num_reads: int, kernel: str) -> dict:
    """Tile sizes: few tokens per program, so that the second look at its sources hits the cache."""
    tuned, most_warps = TUNED[kernel], 16 if kernel == "closed_forward" else 8
    hidden_size = sources[0].shape[-1]
    num_tokens = sources[0].numel() // hidden_size
    token_bytes = len(sources) * hidden_size * sources[0].element_size()
    reads = triton.next_power_of_2(num_reads)
    enough_programs = 2 * _num_processors(sources[0])
    rows = tuned["rows"]  # at least 16, which a matrix unit takes
    tokens = 1
    while (
        2 * tokens * triton.next_power_of_2(len(sources)) <= rows
        and 2 * tokens * reads <= 64
        and 2 * tokens * token_bytes <= tuned["cache_bytes"]
        and 2 * tokens * enough_programs <= num_tokens
    ):
        tokens *= 2
    split = sources[0].dtype == torch.bfloat16
    reads_dot = max(4 * reads if split else reads, 16)
    reads = max(reads, 16 // tokens)
    warps, chunk = tuned["warps"], tuned["chunk"]
    if hidden_size > 4096:
        warps = min(2 * warps, most_warps)
    if num_tokens <= enough_programs:  # as in decoding: what counts is how long one program takes
        warps = min(max(triton.next_power_of_2(hidden_size) // 64, 4), most_warps)
    if tokens * reads > 32:
        chunk //= 2
    return {
        "ROWS": rows,
        "TOKENS": tokens,
        "READS": reads,
        "READS_DOT": reads_dot,
        "WARPS": warps,
        "PART": min(tuned["part"], 32) if reads_dot > 32 else tuned["part"],
        "CHUNK": min(max(triton.next_power_of_2(hidden_size), 16), chunk * warps),
        "SPLIT": split,
        "ONE_GROUP": len(sources) * tokens <= rows,
        "KEEP": "evict_last" if tuned["hints"] else "",
        "DROP": "evict_first" if tuned["hints"] else "",
        "num_warps": warps,
        "num_stages": 1,  # with more, loads go past the first-level cache, and triton 3.2 fails
    }


def _held_tiles(sources: Sequence[torch.Tensor], kernel: str) -> dict | None:
    """Tile sizes of the kernels that hold the sources of a token, or None if these are too many or too wide."""
    tuned, width = TUNED[kernel], triton.next_power_of_2(sources[0].shape[-1])
    rows = triton.next_power_of_2(len(sources))
    warps = _step_warps(width, tuned["columns"])
    if width > tuned["widest"]:
        return None
    while warps < 16 and rows * width > 32 * warps * tuned["numbers"]:
        warps *= 2
    if rows * width > 32 * warps * tuned["numbers"] // (2 if warps == 16 else 1):
        return None
    tiles = {"WIDTH": width, "SOURCES": rows, "num_warps": warps}
    is_full = rows * width == 32 * warps * tuned["numbers"]
    registers = dict(tuned["registers"])
    if is_full and warps in registers and torch.version.hip is None:
        tiles["maxnreg"] = registers[warps]
    return tiles


def _as_split(products: torch.Tensor, tiles: dict) -> torch.Tensor:
    """Products as the kernels of closed reads take them."""
    if not tiles["SPLIT"]:
        return products
    num_reads, hidden_size = products.shape
    parts = products.new_empty(tiles["READS_DOT"], hidden_size, dtype=torch.bfloat16)
    chunk = min(triton.next_power_of_2(hidden_size), 1024)
    _split_products[(tiles["READS_DOT"] // 4, triton.cdiv(hidden_size, chunk))](
        products, parts, S=num_reads, D=hidden_size, CHUNK=chunk, num_warps=4
    )
    return parts


def _step_warps(hidden_size: int, columns_per_warp: int) -> int:
    return min(max(triton.next_power_of_2(hidden_size) // columns_per_warp, 1), 16)


class TritonKernels(DepthKernels):
    name = "triton"
    dtypes = tuple(DTYPES)
    reads_few_tokens = True

    def read_forward(
        self, sources, output, product, eps, scale, norm_weight, norm_eps, dtype, partial, normed, hidden, weights
    ):
        _, seq_len, hidden_size = sources[0].shape
        sources = [source.to(dtype) for source in sources]
        few_sources = len(sources) <= TABLE_ARGUMENTS
        width, extends = triton.next_power_of_2(hidden_size), partial.numel() > 0
        num_tokens, num_closed = sources[0].shape[:-1].numel(), len(sources) - extends
        tuned = TUNED["read_forward" if num_tokens > _num_processors(product) else "token_read"]
        warps = max(_step_warps(hidden_size, tuned["columns"]), min(tuned["warps"], max(width // 64, 1)))
        numbers = min(tuned["numbers"], 32 if warps == 16 else 128)  # as such threads have few registers
        tile = max(1, min(TABLE_ARGUMENTS, 32 * warps * numbers // width))
        tile = min(tile, triton.next_power_of_2(max(num_closed, 1)))

        def given(tensor):
            return product if tensor is None else tensor

        with _on_device(product):
            _read_forward[(num_tokens,)](
                *(sources[index if few_sources and index < len(sources) else 0] for index in range(TABLE_ARGUMENTS)),
                product if few_sources else _address_table(sources),
                given(output),
                product,
                given(norm_weight),
                partial,
                normed,
                hidden,
                weights,
                seq_len,
                num_closed,
                eps,
                scale,
                norm_eps,
                D=hidden_size,
                WIDTH=width,
                SOURCES=tile,
                ONE_TILE=num_closed <= tile,
                ALIGN=_alignment(sources, hidden_size),
                HAS_TABLE=not few_sources,
                EXTENDS=extends,
                HAS_OUTPUT=output is not None,
                HAS_NORM=norm_weight is not None,
                WRITE_HIDDEN=hidden.numel() > 0,
                WRITE_WEIGHTS=weights.numel() > 0,
                DTYPE=DTYPES[dtype],
                num_warps=warps,
            )

    def closed_forward(self, sources, products, eps, mixed, lse, scores, inverse_rms):
        (num_reads, hidden_size), (num_sources, num_tokens) = products.shape, inverse_rms.shape
        held = _held_tiles(sources, "held_forward")
        sizes = {"S": num_reads, "D": hidden_size, "ALIGN": _alignment([*sources, *mixed], hidden_size)}
        with _on_device(products):
            table = _address_table([*sources, *mixed])
            results = (lse, scores, inverse_rms, num_tokens, num_sources, eps)
            if held is not None:
                _held_forward[(num_tokens,)](sources[0], mixed[0], table, products, *results, **sizes, **held)
                return
            tiles = _closed_tiles(sources, num_reads, "closed_forward")
            products = _as_split(products, tiles)
            _closed_forward[(triton.cdiv(num_tokens, tiles["TOKENS"]),)](
                sources[0], mixed[0], table, products, *results, PRECISION=_precision(products), **sizes, **tiles
            )

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
        (num_reads, hidden_size), (num_sources, num_tokens) = products.shape, inverse_rms.shape
        held = _held_tiles(sources, "held_backward")
        tensors = [*sources, *grad_mixed, *grad_sources]
        alignment, precision = _alignment(tensors, hidden_size), _precision(products)
        given_grad_scores, grad_scores = grad_scores, torch.empty_like(scores)
        sizes = {"S": num_reads, "D": hidden_size, "ALIGN": alignment}
        options = {"HAS_GRAD_SCORES": given_grad_scores is not None, "GRAD_SOURCES": len(grad_sources) > 0}
        with _on_device(products):
            table = _address_table(tensors)
            given = scores if given_grad_scores is None else given_grad_scores
            statistics = (lse, grad_lse, scores, inverse_rms, given, grad_scores, num_tokens, num_sources)
            like = (sources[0], grad_mixed[0], table)
            if held is not None:
                _held_backward[(num_tokens,)](*like, products, *statistics, **sizes, **options, **held)
            else:
                tiles = _closed_tiles(sources, num_reads, "closed_backward")
                _closed_backward[(triton.cdiv(num_tokens, tiles["TOKENS"]),)](
                    *like,
                    _as_split(products, tiles),
                    *statistics,
                    PRECISION=precision,
                    **sizes,
                    **options,
                    **tiles,
                )
            if not need_products:
                return None
            tuned = TUNED["products_backward"]
            chunk, tokens = min(max(triton.next_power_of_2(hidden_size), 16), tuned["chunk"]), tuned["tokens"]
            chunks = triton.cdiv(hidden_size, chunk)
            enough_programs = triton.cdiv(tuned["programs"] * _num_processors(products), chunks)
            programs = max(1, min(enough_programs, triton.cdiv(num_tokens, tokens)))
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
                READS_DOT=max(triton.next_power_of_2(num_reads), 16),
                TOKENS=tokens,
                CHUNK=chunk,
                PRECISION=precision,
                STAGES=tuned["stages"],
                num_warps=tuned["warps"],
                **sizes,
            )
        return partial_sums.sum(0)

    def step_forward(
        self, partial, output, mixed, lse, product, score, key_eps, scale, norm_weight, norm_eps, dtype, results
    ):
        num_tokens, hidden_size = mixed.shape[:-1].numel(), mixed.shape[-1]

        def given(tensor):
            return mixed if tensor is None else tensor

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
                WRITE_HIDDEN=results[2].numel() > 0,
                DTYPE=DTYPES[dtype],
                num_warps=_step_warps(hidden_size, TUNED["step_forward"]["columns"]),
            )

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
        num_tokens, hidden_size = statistics.shape[1], mixed.shape[-1]
        grad_partial, grad_normed, grad_hidden, grad_weight = grads
        has_product = value is not None and product is not None

        def given(tensor):
            return mixed if tensor is None else tensor

        tuned = TUNED["step_backward"]
        warps = _step_warps(hidden_size, tuned["columns"])
        # as many as run at one time
        programs = min(num_tokens, max(tuned["warps"] // warps, 1) * _num_processors(mixed))
        # of the product, of the norm, one after the other, so that a single call adds them up
        sums = statistics.new_empty(has_product + (grad_normed is not None), programs, hidden_size)
        with _on_device(mixed):
            _step_backward[(programs,)](
                given(value),
                mixed,
                given(product),
                given(norm_weight),
                statistics,
                *map(given, grads),
                grad_value,
                grad_mixed,
                grad_lse,
                sums[:1],
                sums[-1:],
                num_tokens,
                scale,
                D=hidden_size,
                WIDTH=triton.next_power_of_2(hidden_size),
                HAS_OUTPUT=value is not None,
                HAS_LSE=grad_lse.numel() > 0,
                HAS_SCORE=product is None,
                HAS_GRAD_PARTIAL=grad_partial is not None,
                HAS_GRAD_NORMED=grad_normed is not None,
                HAS_GRAD_HIDDEN=grad_hidden is not None,
                HAS_GRAD_WEIGHT=grad_weight is not None,
                DTYPE=DTYPES[dtype],
                AHEAD=hidden_size <= tuned["ahead"],
                num_warps=warps,
            )
        totals = sums.sum(1)
        return totals[0] if has_product else None, totals[-1] if grad_normed is not None else None


TRITON_KERNELS = TritonKernels()
KERNELS["cpu" if INTERPRETED.value else "cuda"] = TRITON_KERNELS
