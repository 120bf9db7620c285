# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Several runs of a training script, one after the other, with the same data order, seed and budget, and one table."""

import argparse
import io
import itertools
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

from accelerate import PartialState
from attnres_convert import InputError, reading
from attnres_convert.reading import sha256
from attnres_recipes.files import json_text, table
from training_options import run_arguments
from training_run import (
    FAILURE_FILE,
    METRICS_FILE,
    RESULTS_FILE,
    RunError,
    digest_of,
    end_with_parent,
    losses,
    main_process_first,
    open_run,
    plot_losses,
    read_lines,
    read_results,
    versions,
    without_seed,
    write_output,
)


def variants(args: argparse.Namespace, option: str) -> list[tuple[str, list[str]]]:
    """Name and options of each run: every value of `option` in `--compare` with every combination of swept values."""
    axes = [[(value, [option, value]) for value in args.compare]] if args.compare else []
    for sweep in args.sweep:
        name, _, values = sweep.partition("=")
        axes.append([(f"{name}={value}", [f"--{name.replace('_', '-')}={value}"]) for value in values.split(",")])
    return [
        (" ".join(name for name, _ in combination), [option for _, options in combination for option in options])
        for combination in itertools.product(*axes)
    ]


def alone(argv: list[str], options: list[str], folder: Path) -> list[str]:
    """The options of one run of a comparison: those given, then its own."""
    return [*argv, "--compare", "", "--sweep", *options, "--output", str(folder)]


def check_variants(
    parser: argparse.ArgumentParser, args: argparse.Namespace, argv: list[str], option: str, parse: Callable
):
    """Refuses a comparison of which one run's options can't work, before the first one is trained.

    Args:
        option: the option whose values `--compare` holds.
        parse: parses the script's options.
    """
    if args.compare and any(f"--{sweep.partition('=')[0]}" == option for sweep in args.sweep):
        parser.error(f"--compare takes the values of {option}, which --sweep can't change")
    for name, options in variants(args, option):
        message = io.StringIO()
        try:
            with redirect_stderr(message):
                parse(alone(argv, options, args.output))
        except SystemExit:
            parser.error(f"{name}: {message.getvalue().rpartition('error: ')[2].strip()}")


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


def open_comparison(args: argparse.Namespace):
    if PartialState().num_processes > 1:
        with main_process_first():
            raise RunError("--compare and --sweep start processes themselves; launch the runs one by one instead.")
    open_run(args.output, {**run_arguments(args), "compare": args.compare, "sweep": args.sweep})


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


def compare(
    script: Path, args: argparse.Namespace, argv: list[str], option: str, shared: list[str], columns: dict[str, str]
) -> dict:
    """Trains each variant in a process of its own, one after the other, with the same data order, seed and budget.

    Finished ones are not trained again, interrupted ones go on. Writes `comparison.json`, `.md` and `.png`.

    Args:
        script: the training script, and `args` and `argv` its options, parsed and as they were given.
        option: the option whose values `--compare` holds.
        shared: more options for all runs.
        columns: as in [`compare_table`].
    """
    runs, metrics = {}, {}
    for name, options in variants(args, option):
        folder = args.output / name.replace(" ", ",")
        print(f"--- {name}", flush=True)
        single = alone(argv, [*shared, *options], folder)
        run = subprocess.run(
            [sys.executable, str(script), *single], stdout=subprocess.DEVNULL, preexec_fn=end_with_parent
        )
        result = folder / (FAILURE_FILE if run.returncode else RESULTS_FILE)
        if not result.exists():
            raise RunError(f"the run {name} failed; its message is above.")
        runs[name] = read_results(result, *columns.values())
        if run.returncode:
            continue
        metrics[name] = read_lines(folder / METRICS_FILE)
        if runs[name]["steps"] not in losses(metrics[name], "held_out_loss"):
            print(f"{folder / METRICS_FILE} isn't whole; the figure lacks some of it", file=sys.stderr)
    record, text = args.output / "comparison.json", compare_table(runs, columns)
    own, files = own_files(record), {}
    if metrics:
        path = args.output / "comparison.png"
        plot_losses(metrics, path, "Same data order, seed and budget", own.get(path.name))
        files[path.name] = sha256(path)
    path = args.output / "comparison.md"
    write_output(path, text.encode(), own.get(path.name))
    files[path.name] = sha256(path)
    results = {"output": str(args.output), "runs": runs, "versions": versions(), "command": [script.name, *argv]}
    results["files"] = {**files, record.name: digest_of(json_text(results).encode())}
    write_output(record, json_text(results).encode(), own.get(record.name))
    print(text)
    return {"output": str(args.output), "held_out_loss": {name: run.get("held_out_loss") for name, run in runs.items()}}
