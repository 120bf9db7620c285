# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The stages `correctness` and `checks` of benchmarks/gpu.py: what is checked, in processes side by side."""

import itertools
import os
import random

from gpu_worker import Gate, Pool, Results, settings


WIDTHS = [80, 96, 576, 1000, 1024, 2048, 2050, 4096, 8192]
SOURCES = [1, 2, 3, 7, 8, 9, 16, 17, 49, 200]
READS = [1, 2, 6, 7, 32, 33]
TOKENS = [1, 33, 257]
DTYPES = ["float32", "bfloat16", "float16"]
STEPS = [  # what there is in a step; source: a single closed source
    ("partial", "output", "gain"),
    ("output", "gain"),
    ("gain",),
    ("partial", "output", "gain", "hidden"),
    ("partial", "output"),
    (),
    ("source", "gain"),
    ("source", "output", "gain"),
    ("source", "partial", "output", "gain", "hidden"),
    ("score", "output", "gain"),
    ("score", "output"),
]
KERNEL_PROCESSES, PROCESSES = 12, 10
TASK_SECONDS = 200


def covering(count: int, **values) -> list[dict]:
    """Combinations in which each value appears as often as the others, in an order of its own for each name."""
    rng, columns = random.Random(0), {}
    for name, of_name in values.items():
        column = []
        while len(column) < count:
            column += rng.sample(of_name, len(of_name))
        columns[name] = column[:count]
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def kernel_tasks() -> list[dict]:
    tiny = settings().tiny
    widths, sources, reads, tokens = ([24, 33], [1, 3], [1, 3], [1, 5]) if tiny else (WIDTHS, SOURCES, READS, TOKENS)
    common = {"hidden_size": widths, "tokens": tokens, "dtype": DTYPES}
    closed = {"num_sources": sources, "num_reads": reads, "rounded": [True, False]}
    found = {  # what takes longest to compile comes first
        "check_closed": covering(4 if tiny else 54, **common, **closed),
        "check_step": covering(11 if tiny else 44, **common, present=STEPS),
        "check_whole_read": covering(3 if tiny else 30, **common, num_sources=sources, joins=[None, False, True]),
    }
    return [{"check": check, **row} for check, rows in found.items() for row in rows]


def model_tasks() -> list[dict]:
    families = ["llama"] if settings().tiny else ["llama", "gemma2", "qwen3_moe"]
    models = [
        {"check": check, "family": family, "mode": mode}
        for check in ("check_model", "check_compiled_training", "check_compiled_decoding")
        for family, mode in itertools.product(families, ["block", "full"])
        if check == "check_model" or family != "qwen3_moe"
    ]
    return [{"check": "check_tests"}, *models]


def run_tasks(results: Results, tasks: list[dict], processes: int):
    checks = []
    results.set(tasks=len(tasks), tasks_done=0, checks=0, worst=[])

    def done(task, rows, failure, seconds):
        checks.extend(rows or [])
        for row in rows or []:
            if not row["error"] <= row["bound"]:
                results.fail(f"{row['what']}: error {row['error']:.2e}, at most {row['bound']:.2e}")
        if failure:
            results.fail(f"{' '.join(str(value) for value in task.values())}: {failure}")
        inexact = [row for row in checks if row["bound"]]
        worst = sorted(inexact, key=lambda row: row["error"] / row["bound"], reverse=True)[:10]
        results.add("tasks_seconds", [task["check"], round(seconds, 1)])
        results.set(tasks_done=results.content["tasks_done"] + 1, checks=len(checks), worst=worst)
        results.set(tests=[row["what"] for row in checks if row["what"].startswith("pytest")])

    processes = 2 if settings().tiny else min(processes, os.cpu_count(), len(tasks))
    pool = Pool("gpu_checks", processes, {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"})
    pool.run("run_task", tasks, done, TASK_SECONDS)
    pool.close()


def correctness(results: Results):
    """Every kernel against float64, before anything is timed."""
    with Gate().before_timing():
        run_tasks(results, kernel_tasks(), KERNEL_PROCESSES)


def checks(results: Results):
    """Whole models, and the tests that need a GPU."""
    run_tasks(results, model_tasks(), PROCESSES)
