# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""What the stages `card` and `kernels` of benchmarks/gpu.py measure, and what others need for it."""

import importlib.util
import statistics
import subprocess
import sys
from types import SimpleNamespace

import torch
import transformers
from benchmark_cases import LEAST_SECONDS, Call, as_graph, hardware, interleaved, quartiles
from gpu_worker import Gate, Results, first_line, settings

import attnres


NUM_SOURCES = NUM_READS = 8
SETS = 2  # of tensors, by turns, so that none is in the cache when it is needed
KEY_EPS = NORM_EPS = 1e-6


def is_cuda() -> bool:
    return settings().device == "cuda"


def dtype() -> torch.dtype:
    return torch.bfloat16 if is_cuda() else torch.float32


def rounds() -> int:
    return 2 if settings().tiny else 9


def seconds_of(calls: dict, what: str, failed: dict[str, str]) -> dict[str, list[float]]:
    args = SimpleNamespace(device=settings().device, rounds=rounds())
    return interleaved(
        {name: Call(run) for name, run in calls.items()}, args, what, failed, LEAST_SECONDS if is_cuda() else 0
    )


# --- Card


def copy_gigabytes_per_second(numbers: int) -> float:
    source = torch.zeros(numbers, dtype=torch.bfloat16, device=settings().device)
    target = torch.empty_like(source)
    seconds = statistics.median(seconds_of({"copy": lambda: target.copy_(source)}, "copy", {})["copy"])
    return 2 * source.numel() * source.element_size() / seconds / 1e9


def card(results: Results):
    """What there is, and how fast it is."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "attnres": attnres.__version__}
    if importlib.util.find_spec("triton"):
        import triton

        versions["triton"] = triton.__version__
    results.set(versions=versions, python=sys.version.split()[0], hardware=hardware(settings().device))
    if is_cuda():
        names = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
        found = subprocess.run(["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader"], capture_output=True)
        results.set(nvidia_smi=found.stdout.decode().strip(), devices=torch.cuda.device_count())
    with Gate()(alone=True):
        results.set(copy_gigabytes_per_second=copy_gigabytes_per_second(1 << 12 if settings().tiny else 1 << 30))
        size = 64 if settings().tiny else 8192
        a, b = (torch.randn(size, size, device=settings().device).to(dtype()) for _ in range(2))
        seconds = statistics.median(seconds_of({"matmul": lambda: a @ b}, "matmul", {})["matmul"])
        results.set(matmul_teraflops_per_second=2 * size**3 / seconds / 1e12)


# --- Kernels


def kernel_calls(hidden_size: int, tokens: int, sets: int = SETS) -> dict:
    """For each kernel what runs it on each set of tensors, and how many numbers per token it moves, in units of the
    hidden size: what it reads and writes once, without what it saves for the backward pass."""
    operators, device = torch.ops.attnres, settings().device
    generator = torch.Generator(device).manual_seed(0)

    def tensors(count, *shape, of=None):
        return [torch.randn(*shape, generator=generator, device=device).to(of or dtype()) for _ in range(count)]

    (products,) = tensors(1, NUM_READS, hidden_size, of=torch.float32)
    products /= hidden_size**0.5
    (gain,) = tensors(1, hidden_size)
    calls = {name: [] for name in FORMULAS}
    for _ in range(sets):
        sources, gradients = (tensors(n, 1, tokens, hidden_size) for n in (NUM_SOURCES, NUM_READS))
        open_sum, output = tensors(2, 1, tokens, hidden_size)
        mixed, lse, scores, inverse_rms = operators.closed_reads(sources, products, KEY_EPS, dtype())
        grad_lse = torch.zeros_like(lse)
        step = (open_sum, output, mixed[0], lse[0], products[0], None, KEY_EPS, 1.0, gain, NORM_EPS, False, dtype())
        value, _, _, _, saved = operators.depth_step(*step)
        step_gradients = (gradients[0], gradients[1], None, None)
        closed_backward = (sources, products, lse, scores, inverse_rms, gradients, grad_lse, None, True)
        step_backward = (value, mixed[0], products[0], gain, saved, True, *step_gradients, 1.0, dtype())
        read = (sources, output, True, products[0], KEY_EPS, 1.0, gain, NORM_EPS, False, False)
        one = ([source[:, :1].contiguous() for source in sources], output[:, :1].contiguous(), *read[2:])
        for name, operator, arguments in (
            ("phase 1 forward", operators.closed_reads, (sources, products, KEY_EPS, dtype())),
            ("phase 1 backward", operators.closed_reads_backward, (*closed_backward, True)),
            ("phase 1 backward, sources alone", operators.closed_reads_backward, (*closed_backward, False)),
            ("step forward", operators.depth_step, step),
            ("step backward", operators.depth_step_backward, step_backward),
            ("whole read", operators.depth_read, read),
            (TOKEN_READS, many_reads, one),
        ):
            calls[name].append((operator, arguments))
    return calls


def many_reads(*arguments):
    """Of a single token, as in decoding: one takes less than what starts it."""
    return [torch.ops.attnres.depth_read(*arguments) for _ in range(MANY)][-1]


TOKEN_READS, MANY = "32 reads of a token", 32
FORMULAS = {
    "phase 1 forward": NUM_SOURCES + NUM_READS,
    "phase 1 backward": 3 * NUM_SOURCES + NUM_READS,
    "phase 1 backward, sources alone": 2 * NUM_SOURCES + NUM_READS,
    "step forward": 5,
    "step backward": 6,
    "whole read": NUM_SOURCES + 3,
    TOKEN_READS: MANY * (NUM_SOURCES + 3),
}


@torch.no_grad()
def prepare_kernels(hidden_size: int):
    """Compiles them, on few tokens."""
    with Gate()():
        for runs in kernel_calls(hidden_size, 8 if settings().tiny else 4096).values():
            operator, arguments = runs[0]
            operator(*arguments)
        if is_cuda():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def graphs_of(runs: dict, failed: dict[str, str]) -> dict:
    """Each as a CUDA graph, without what Python takes to start kernels, where that is possible."""
    found = {}
    for name, run in runs.items() if is_cuda() else ():
        try:
            found[name] = as_graph(run, torch.cuda.graph_pool_handle())
        except Exception as error:
            failed[f"graph of {name}"] = first_line(error)
    return found


@torch.no_grad()
def time_kernels(hidden_size: int) -> list[dict]:
    tokens, failed, runs = 8 if settings().tiny else 16384, {}, {}
    with Gate()(alone=True):
        for name, of_sets in kernel_calls(hidden_size, tokens).items():

            def run(of_sets=of_sets):
                for operator, arguments in of_sets:
                    operator(*arguments)

            runs[name] = run
        graphs = graphs_of(runs, failed)
        runs |= graphs
        seconds = seconds_of(runs, f"kernels, d {hidden_size}", failed)
        copy_speed = copy_gigabytes_per_second(1 << 12 if settings().tiny else 1 << 30)
    if failed:
        print(failed, file=sys.stderr)
    rows = []
    for name, values in seconds.items():
        num_tokens = 1 if name == TOKEN_READS else tokens
        speed = FORMULAS[name] * num_tokens * hidden_size * dtype().itemsize / (statistics.median(values) / SETS) / 1e9
        rows.append(
            {
                "kernel": name,
                "hidden_size": hidden_size,
                "tokens": num_tokens,
                "seconds": [value / SETS for value in quartiles(values)],
                "gigabytes_per_second": speed,
                "share_of_copy": speed / copy_speed,
                "cuda_graph": name in graphs,
                "failed": failed.get(name),
            }
        )
    return rows
