# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Several runs with the same data order, seed and budget, and one table."""

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from accelerate import PartialState
from attnres_convert import InputError, reading
from attnres_convert.reading import sha256
from attnres_convert.writing import json_text, table

from .figures import plot_losses, without_seed
from .folders import FAILURE_FILE, METRICS_FILE, RESULTS_FILE, digest_of, write_output
from .log import losses, read_lines
from .options import RunOptions
from .process import end_with_parent, main_process_first, versions
from .run import open_run, read_results


def compare_table(runs: dict[str, dict], columns: dict[str, str]) -> str:
    """One row for each run, then, where seeds were swept, one for each mean over seeds.

    Args:
        columns: the last columns, numbers of which every run has one: name in the results by heading.
    """
    groups = {}
    for name, run in runs.items():
        groups.setdefault(without_seed(name), []).append(run)
    rows = [("run", "held-out loss", "tokens/s", "peak memory, MB", *columns)]
    rows += [table_row(name, [run], columns) for name, run in runs.items()]
    if any("seed=" in name for name in runs):
        rows += [table_row(f"mean: {name}", group, columns) for name, group in groups.items() if len(group) > 1]
    return table(rows)


def table_row(name: str, runs: list[dict], columns: dict[str, str]) -> tuple[str, ...]:
    failed = [run for run in runs if "held_out_loss" not in run]
    if failed:
        missing = ("-",) * (len(columns) + 2)
        return name, f"none: {failed[0]['what']} {failed[0]['value']} at step {failed[0]['step']}", *missing
    values = [run["held_out_loss"] for run in runs]
    loss = f"{statistics.mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")
    speed = statistics.mean(run["tokens_per_second"] for run in runs)
    memory = max(run["peak_memory_bytes"] for run in runs) / 1e6
    return name, loss, f"{speed:,.0f}", f"{memory:,.0f}", *(f"{runs[0][column]:,}" for column in columns.values())


def open_comparison(options: RunOptions):
    if PartialState().num_processes > 1:
        with main_process_first():
            raise InputError("--compare and --sweep start processes themselves; launch the runs one by one instead.")
    compared = options.compare.split(",") if options.compare else []
    open_run(options.output, {**options.settled().arguments, "compare": compared, "sweep": options.sweep})


def own_files(record: Path) -> dict[str, str]:
    """Hashes of the files that the last comparison wrote, by name; `record` is one of them, if it is as it was."""
    try:
        content = reading.read_json(record)
        files = reading.typed(content, "files", dict, str(record)) or {}
    except InputError:
        return {}
    own = digest_of(json_text(content).encode())
    rest = {name: value for name, value in content.items() if name != "files"}
    is_whole = files.get(record.name) == digest_of(json_text(rest).encode())
    return {**files, record.name: own if is_whole else None}


def train_all(name: str, runs: dict[str, RunOptions], jobs: int) -> Iterator[tuple[str, int]]:
    """Trains each run in a process of its own, `jobs` at a time, and tells which one has ended, and with which status.

    If the block that takes them is left, those that still train are interrupted, and go on with the same command.
    """
    commands = Path(find_spec("attnres_commands").submodule_search_locations[0])
    environment = {**os.environ}
    if jobs > 1:
        environment |= {"TQDM_DISABLE": "1"}  # bars of several runs would write over one another
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    waiting, running = list(runs.items()), {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                variant, options = waiting.pop(0)
                print(f"--- {variant}", flush=True)
                command = [sys.executable, str(commands / f"{name}.py"), *options.words()]
                running[variant] = subprocess.Popen(
                    command, stdout=subprocess.DEVNULL, env=environment, preexec_fn=end_with_parent
                )
            if ended := [variant for variant, process in running.items() if process.poll() is not None]:
                yield ended[0], running.pop(ended[0]).returncode
            else:
                time.sleep(0.1)
    finally:
        for process in running.values():
            process.send_signal(signal.SIGINT)
        for process in running.values():
            process.wait()


def compare(name: str, options: RunOptions, shared: dict, columns: dict[str, str]) -> dict:
    """Trains each variant in a process of its own, with the same data order, seed and budget.

    Finished ones are not trained again, interrupted ones go on. Writes `comparison.json`, `.md` and `.png`.

    Args:
        name: of the command, without `attnres-`.
        shared: options that all runs get.
        columns: as in [`compare_table`].
    """
    singles = {variant: options.variant(variant, values, **shared) for variant, values in options.variants()}
    runs, metrics, output = {}, {}, options.output
    for variant, status in train_all(name, singles, options.jobs):
        result = singles[variant].output / (FAILURE_FILE if status else RESULTS_FILE)
        if not result.exists():
            raise InputError(f"the run {variant} failed; its message is above.")
        runs[variant] = read_results(result, *columns.values())
    runs = {variant: runs[variant] for variant in singles}
    for variant, single in singles.items():
        if "held_out_loss" not in runs[variant]:
            continue
        metrics[variant] = read_lines(single.output / METRICS_FILE)
        if runs[variant]["steps"] not in losses(metrics[variant], "held_out_loss"):
            print(f"{single.output / METRICS_FILE} isn't whole; the figure lacks some of it", file=sys.stderr)
    record, text = output / "comparison.json", compare_table(runs, columns)
    own, files = own_files(record), {}
    if metrics:
        path = output / "comparison.png"
        plot_losses(metrics, path, "Same data order, seed and budget", own.get(path.name))
        files[path.name] = sha256(path)
    path = output / "comparison.md"
    write_output(path, text.encode(), own.get(path.name))
    files[path.name] = sha256(path)
    command = [f"attnres-{name}", *options.words()]
    results = {"output": str(output), "runs": runs, "versions": versions(), "command": command}
    results["files"] = {**files, record.name: digest_of(json_text(results).encode())}
    write_output(record, json_text(results).encode(), own.get(record.name))
    print(text)
    return {"output": str(output), "held_out_loss": {name: run.get("held_out_loss") for name, run in runs.items()}}
