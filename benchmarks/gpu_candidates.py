# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""What the workers of the stage `tuning` of benchmarks/gpu.py do: a kernel of triton_kernels.py with other values of
`TUNED`. What one has compiled, all find in Triton's cache."""

import copy
import statistics
from functools import partial

import torch
from gpu_kernels import FORMULAS, SETS, TOKEN_READS, dtype, graphs_of, is_cuda, kernel_calls, seconds_of
from gpu_tuning import SPACE
from gpu_worker import Gate, settings

import attnres  # noqa: F401  registers the kernels
from attnres_kernels import triton_kernels


MOST_ERROR = 2e-2  # by which candidates may differ, as they round elsewhere
CALLS, EXPECTED = {}, {}  # by hidden size and number of sets; what each kernel yields with the values of now


def values_of_now() -> dict:
    return triton_kernels.TUNED


def tokens(hidden_size: int) -> int:
    return 8 if settings().tiny else min(16384, (1 << 26) // hidden_size)  # as all workers have tensors of their own


def calls(kernel: str, hidden_size: int, sets: int) -> list[tuple]:
    if (hidden_size, sets) not in CALLS:
        release()
        CALLS[hidden_size, sets] = kernel_calls(hidden_size, tokens(hidden_size), sets)
    return CALLS[hidden_size, sets][SPACE[kernel][0]]


def run(of_sets: list[tuple], kernel: str, changes: dict) -> list:
    now = copy.deepcopy(triton_kernels.TUNED)
    try:
        if kernel.startswith("closed"):  # else others take their place
            triton_kernels.TUNED[f"held_{kernel.removeprefix('closed_')}"]["numbers"] = 0
        triton_kernels.TUNED[kernel] |= changes
        return [operator(*arguments) for operator, arguments in of_sets]
    finally:
        triton_kernels.TUNED |= now


def tensors_of(result) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for part in result for tensor in tensors_of(part)]


@torch.no_grad()
def prepare(kernel: str, hidden_size: int, changes: dict):
    """Compiles a candidate.

    Raises:
        ValueError: its results aren't those of the values of now.
    """
    with Gate()():
        of_sets = calls(kernel, hidden_size, 1)
        if kernel not in EXPECTED:
            EXPECTED[kernel] = tensors_of(run(of_sets, kernel, {}))
        for value, expected in zip(tensors_of(run(of_sets, kernel, changes)), EXPECTED[kernel]):
            if expected.numel() and not (value - expected).float().norm() <= MOST_ERROR * expected.float().norm():
                raise ValueError("other results")


def release():
    CALLS.clear()
    EXPECTED.clear()
    if is_cuda():
        torch.cuda.empty_cache()


@torch.no_grad()
def time_candidates(kernel: str, hidden_size: int, candidates: list[dict]) -> dict:
    """Seconds of each, why others aren't timed, and the bytes that the kernel moves."""
    failed, case = {}, SPACE[kernel][0]
    with Gate()(alone=True):
        of_sets = calls(kernel, hidden_size, SETS)
        runs = {str(changes): partial(run, of_sets, kernel, changes) for changes in candidates}
        runs |= graphs_of(runs, failed)
        seconds = seconds_of(runs, f"{kernel}, values", failed)
        release()
    return {
        "seconds": {name: statistics.median(values) / SETS for name, values in seconds.items()},
        "failed": failed,
        "bytes": FORMULAS[case] * (1 if case == TOKEN_READS else tokens(hidden_size)) * hidden_size * dtype().itemsize,
    }
