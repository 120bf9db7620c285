# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""What the workers of the stage `peers` of benchmarks/gpu.py do.

Other projects' kernels choose among variants as they run, each of which takes about a second to compile. Processes side
by side compile a share of them each, which all find in Triton's cache; the one that times them then chooses anew.
"""

import gc
from contextlib import suppress
from functools import partial
from types import SimpleNamespace

import torch
from benchmark_cases import check_operators, operator_rows, operators
from gpu_kernels import dtype, is_cuda, rounds
from gpu_worker import Gate, settings

import attnres  # noqa: F401  registers the implementations


TRIAL_MILLISECONDS = {"warmup": 3, "rep": 15}  # of each variant


def change_variants(change):
    """`change(variants)` says among which each kernel chooses: those that are imported, and those that will be."""
    from triton.runtime.autotuner import Autotuner
    from triton.testing import do_bench

    original = Autotuner.__init__

    def set_up(kernel):
        kernel.configs = change(list(kernel.configs))
        kernel.cache_results = False  # by others who have chosen while the device was shared
        kernel._do_bench = partial(do_bench, **TRIAL_MILLISECONDS)

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        set_up(self)

    Autotuner.__init__ = init
    for kernel in [held for held in gc.get_objects() if issubclass(type(held), Autotuner)]:
        set_up(kernel)


CHANGED = []


def changed_once(change):
    if is_cuda() and not CHANGED:
        CHANGED.append(change)
        change_variants(change)


def arguments(names: list[str], shape) -> SimpleNamespace:
    hidden_size, sources, sublayers = shape
    args = SimpleNamespace(
        modes=["block"],
        implementations=names,
        sources=sources,
        sublayers=sublayers,
        hidden_size=hidden_size,
        batch_size=8,
        seq_len=2048,
        device=settings().device,
        dtype=str(dtype()).removeprefix("torch."),
        tolerance=2.5,  # theirs may round once more
        rounds=min(rounds(), 7),
    )
    if settings().tiny:
        args.hidden_size, args.sources, args.batch_size, args.seq_len = 32, 2, 1, 12
    return args


def empty_cache():
    if is_cuda():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def prepare(name: str, shape, number: int, count: int):
    """Compiles an implementation's kernels for a shape: of those it chooses among, every `count`-th."""
    changed_once(lambda variants: variants[number % len(variants) :: count])
    args = arguments([name], shape)
    with Gate()():
        errors = check_operators(args, {})
        if name == "fla":  # the number of tokens isn't compiled in
            args.batch_size = 1
        for operator in operators(args, errors, phases=False):
            if operator.variant == f"block {name}":
                with suppress(Exception):  # a share may have none that runs
                    operator.run()
        empty_cache()


def time_reads(names: list[str], shape) -> tuple[list[dict], dict[str, str]]:
    """Rows, and why others aren't timed."""
    changed_once(lambda variants: variants)
    not_timed, found = {}, []
    with Gate()(alone=True):
        for rows in operator_rows(arguments(names, shape), not_timed, phases=False):
            found += rows
        empty_cache()
    return found, not_timed
