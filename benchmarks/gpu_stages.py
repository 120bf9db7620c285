# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Runs a stage of benchmarks/gpu.py, as `python gpu_stages.py STAGE`; the stages `kernels` and `peers`.

What stages do is done by workers, which begin to import PyTorch at once: most of the stages don't.
"""

import importlib
import importlib.util
import sys
import time
from functools import partial

from gpu_worker import Pool, Results, Worker, WorkerError, seconds_left, settings, side_by_side


MODULES = {
    "card": "gpu_kernels",
    "correctness": "gpu_correctness",
    "checks": "gpu_correctness",
    "kernels": "gpu_stages",
    "models": "gpu_models",
    "profile": "gpu_models",
    "tuning": "gpu_tuning",
    "peers": "gpu_stages",
}
WIDTHS = [2048, 4096, 8192, 1024]
PEER_SHAPES = ((2048, 8, 8), (4096, 8, 8), (2048, 8, 1), (2048, 16, 1))  # hidden size, sources, sublayers
PEER_SECONDS = 22  # after which no other shape begins
# package and number of processes, each of which compiles a share of the variants from which an implementation chooses
PEERS = {
    "triton": ("triton", 1),
    "fla": ("fla", 8),
    "liger": ("liger_kernel", 1),
    "flash_attn_res": ("flash_attn_res", 4),
}


def kernels(results: Results):
    """How close to the speed of a copy each kernel is."""
    widths = [16, 32] if settings().tiny else WIDTHS
    pool = Pool("gpu_kernels", len(widths))

    def measure(function, index, width):
        try:
            return pool.call(function, seconds_left(), index, hidden_size=width)
        except WorkerError as error:
            results.fail(f"kernels, d {width}: {error}")
            return []

    side_by_side([partial(measure, "prepare_kernels", *item) for item in enumerate(widths)])
    for index, width in enumerate(widths):
        results.add("rows", *measure("time_kernels", index, width))
    pool.close()


def peers(results: Results):
    """Other projects' reads on the same inputs."""
    started, timer, compilers = time.monotonic(), Worker("gpu_peers"), []
    shapes = PEER_SHAPES[:1] if settings().tiny else PEER_SHAPES
    names = [name for name, (package, _) in PEERS.items() if importlib.util.find_spec(package)]
    results.set(installed=names[1:], seconds=[])
    for name in names:
        count = 1 if settings().tiny else PEERS[name][1]
        for number in range(count):
            compilers.append((name, Worker("gpu_peers")))
            for shape in shapes:
                compilers[-1][1].send("prepare", name=name, shape=shape, number=number, count=count)
    for shape in shapes:
        what = "{1} sources, {2} sublayers, d {0}".format(*shape)
        if time.monotonic() - started > PEER_SECONDS and results.content.get("rows"):
            results.add("left_out", what)
            continue
        for name, worker in compilers:
            try:
                worker.receive(seconds_left())
            except WorkerError as error:  # it is timed nevertheless, and says itself what it can't do
                print(f"{what}: {name} not prepared: {error}", file=sys.stderr, flush=True)
        try:
            rows, not_timed = timer.call("time_reads", seconds_left(), names=names, shape=shape)
        except WorkerError as error:
            results.fail(f"{what}: {error}")
            if error.is_gone:
                break
            continue
        results.add("rows", *rows)
        results.add("seconds", round(time.monotonic() - started, 1))
        for name, reason in not_timed.items():
            results.fail(f"{what}: {name}: {reason}")
    for worker in (timer, *(worker for _, worker in compilers)):
        worker.close()


def stage(name: str):
    results = Results(name)
    try:
        getattr(importlib.import_module(MODULES[name]), name)(results)
    except Exception as error:
        results.fail(f"{type(error).__name__}: {error}".splitlines()[0][:300])
        raise
    if results.content["failures"]:
        raise SystemExit(f"{len(results.content['failures'])} failures, the first: {results.content['failures'][0]}")


if __name__ == "__main__":
    stage(sys.argv[1])
