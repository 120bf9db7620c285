# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Several runs with the same data order, seed and budget, as far as they aren't told otherwise, and one table."""

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import PartialState
from attnres_convert import InputError, reading
from attnres_convert.reading import sha256
from attnres_convert.writing import decimals, json_text, table

from .figures import plot_differences, plot_losses, without_seed
from .folders import FAILURE_FILE, METRICS_FILE, RESULTS_FILE, digest_of, write_output
from .log import losses, read_lines
from .options import RunOptions
from .process import end_with_parent, launched, main_process_first, versions
from .resampling import interval_of_mean
from .run import PART_OF_COMPARISON, open_run, read_results, read_run


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
    tuning = {name: getattr(options, name) for name in ("tune", "tune_steps") if getattr(options, name)}
    open_run(options.output, {**options.settled().arguments, "compare": compared, "sweep": options.sweep, **tuning})


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


def train_all(name: str, runs: dict[str, RunOptions], jobs: int, *counts: str) -> dict[str, dict]:
    """Trains each run in a process of its own, `jobs` at a time, and returns the results.

    Those that have finished or failed are not trained again, interrupted ones go on.

    Args:
        name: of the command, without `attnres-`.
        counts: as in [`read_results`].

    Raises:
        InputError: one failed; those that still trained were interrupted.
    """
    ends = {run: end_of(options) for run, options in runs.items()}
    unfinished = {run: options for run, options in runs.items() if ends[run] is None}
    failures = {run: written(options.output / FAILURE_FILE) for run, options in unfinished.items()}  # of other runs
    results = {run: read_results(end, *counts) for run, end in ends.items() if end is not None}
    for run, end in ends.items():
        if end is not None and end.name == FAILURE_FILE:
            print(f"{run} failed before, and isn't trained again; remove {end} to try it once more", file=sys.stderr)
    with closing(processes(name, unfinished, jobs)) as ended:
        for run, status in ended:
            path = runs[run].output / (FAILURE_FILE if status else RESULTS_FILE)
            if not path.exists() or status and written(path) == failures[run]:
                raise InputError(f"the run {run} failed; its message is above.")
            results[run] = read_results(path, *counts)
    return {run: results[run] for run in runs}


def written(path: Path) -> int | None:
    """When, if the file is there."""
    return path.stat().st_mtime_ns if path.exists() else None


def end_of(options: RunOptions) -> Path | None:
    """The file with the results of this very run, or with its failure, as long as all versions are the same. If the
    folder holds something else, the run itself says so."""
    arguments = json.loads(json.dumps({**options.settled().arguments, **launched()}, default=str))
    results, failure = options.output / RESULTS_FILE, options.output / FAILURE_FILE
    try:
        run = read_run(options.output)
    except InputError:
        return None
    if run["arguments"] != arguments:
        return None
    if results.exists():
        return results
    return failure if failure.exists() and run["versions"] == versions() else None


def processes(name: str, runs: dict[str, RunOptions], jobs: int) -> Iterator[tuple[str, int]]:
    """Of each run its name and the status of its process, when that has ended."""
    commands = Path(find_spec("attnres_commands").submodule_search_locations[0])
    environment = {**os.environ, PART_OF_COMPARISON: "1"}
    if jobs > 1:
        environment |= {"TQDM_DISABLE": "1"}  # bars of several runs would write over one another
        environment.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // jobs)))
    waiting, running, begun = list(runs.items()), {}, time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                variant, options = waiting.pop(0)
                num_ended = len(runs) - len(waiting) - len(running) - 1
                print(f"--- {variant}{progress(num_ended, len(running), len(runs), begun)}", flush=True)
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


def progress(num_ended: int, num_running: int, num_runs: int, begun: float) -> str:
    """What to know of several runs when another one is started."""
    if num_runs == 1:
        return ""
    text = f", {num_ended + num_running + 1} of {num_runs} in this round"
    if num_ended:
        minutes = (time.monotonic() - begun) / num_ended * (num_runs - num_ended) / 60
        text += f", about {max(minutes, 1):.0f} min to its end"
    return text


Variant = tuple[str, dict[str, str]]  # name and options of a run, as RunOptions.variants has them
FIGURES = ("comparison.png", "differences.png")
MOST_BEYOND = 4  # values that are tried beyond those that are given


def with_value(variant: Variant, option: str, value: float) -> Variant:
    """A run with one more option, whose name has the seed last."""
    name, values = variant
    seed = [part for part in name.split(" ") if part.startswith("seed=")]
    parts = [part for part in name.split(" ") if part and part not in seed]
    return " ".join([*parts, f"{option}={value:g}", *seed]), {**values, option: f"{value:g}"}


def best(trials: dict[float, float]) -> float:
    """The value with the least loss, the smallest of several."""
    return min(sorted(trials), key=trials.get)


def beyond(trials: dict[float, float]) -> float | None:
    """The next value to try, if the best one is at an edge."""
    values = sorted(trials)
    if best(trials) == values[0]:
        return values[0] ** 2 / values[1]
    return values[-1] ** 2 / values[-2] if best(trials) == values[-1] else None


def tune(name: str, options: RunOptions, shared: dict) -> dict[str, dict[float, float]]:
    """Trains one run of each group for every value of `options.tune`, and for others until the best isn't at an edge.

    Returns:
        by group, the held-out loss by value; infinite if there was none.
    """
    option, first = options.tuned, {}
    for variant in options.variants():
        first.setdefault(without_seed(variant[0]), variant)
    trials, steps = {group: {} for group in first}, {"steps": options.tune_steps} if options.tune_steps else {}
    values = {group: options.values_to_try(options.variant(*variant)) for group, variant in first.items()}
    wanted = [(group, value) for group in first for value in values[group]]
    while wanted:
        singles = {}
        for group, value in wanted:
            run, own = with_value(first[group], option, value)
            run += f" steps={options.tune_steps}" if steps else ""
            singles[run] = options.variant(run, own, **shared, **steps)
        results = train_all(name, singles, options.jobs)
        for (group, value), result in zip(wanted, results.values()):
            trials[group][value] = result.get("held_out_loss", math.inf)
        wanted = []
        for group, tried in trials.items():
            value = beyond(tried)
            if value and len(tried) < len(values[group]) + MOST_BEYOND and is_allowed(options, first[group], value):
                wanted.append((group, value))
    for group, tried in trials.items():
        if beyond(tried):
            print(f"{group}: the best {option} that was tried, {best(tried):g}, is at an edge", file=sys.stderr)
    return trials


def is_allowed(options: RunOptions, variant: Variant, value: float) -> bool:
    """Whether the option that is tuned takes the value."""
    try:
        options.variant(*with_value(variant, options.tuned, value))
    except InputError:
        return False
    return True


def trials_table(trials: dict[str, dict[float, float]], options: RunOptions) -> str:
    """The losses of what was tried, the best in bold, and what to know of them."""
    values = sorted({value for tried in trials.values() for value in tried})
    steps = options.tune_steps or options.steps
    rows = [(f"tried {options.tuned}" + (f", {steps} steps" if steps else ""), *(f"{value:g}" for value in values))]
    for group, tried in trials.items():
        cells = [f"{tried[value]:.4f}" if value in tried else "-" for value in values]
        rows.append((group, *(f"**{cell}**" if value == best(tried) else cell for value, cell in zip(values, cells))))
    notes = [f"At an edge of what was tried: {group}." for group, tried in trials.items() if beyond(tried)]
    notes.append("Chosen by the held-out loss of the first seed, which makes that seed's losses a little too good.")
    return table(rows) + "\n" + "\n".join(notes) + "\n"


def paired_differences(runs: dict[str, dict]) -> dict[str, dict]:
    """By group, the differences of the held-out losses from those of the first group, seed by seed, with their mean and
    its bootstrap interval over seeds; empty without two groups that share two seeds."""
    by_group = {without_seed(name): {} for name in runs}
    for name, run in runs.items():
        seed = next((part.removeprefix("seed=") for part in name.split(" ") if part.startswith("seed=")), None)
        if seed and "held_out_loss" in run:
            by_group[without_seed(name)][seed] = run["held_out_loss"]
    (first, base), *others = by_group.items()
    differences = {}
    for group, losses_by_seed in others:
        own = {seed: loss - base[seed] for seed, loss in losses_by_seed.items() if seed in base}
        if len(own) > 1:
            found = {"from": first, "mean": statistics.mean(own.values())}
            differences[group] = {**found, "interval": interval_of_mean(list(own.values())), "seeds": own}
    return differences


def differences_table(differences: dict[str, dict]) -> str:
    first = next(iter(differences.values()))["from"]
    rows = [(f"difference from {first}", "mean", "95 % of resampled seeds", "each seed")]
    for group, found in differences.items():
        each = ", ".join(f"{seed}: {decimals(value, sign='+')}" for seed, value in found["seeds"].items())
        low, high = (decimals(bound, sign="+") for bound in found["interval"])
        rows.append((group, decimals(found["mean"], sign="+"), f"{low} to {high}", each))
    return table(rows)


def compare(name: str, options: RunOptions, shared: dict, columns: dict[str, str]) -> dict:
    """Trains each variant in a process of its own.

    Those that have finished or failed are not trained again, interrupted ones go on. Writes `comparison.json`, `.md`
    and `.png`, and, where groups of runs share seeds, `differences.png`.

    Args:
        name: of the command, without `attnres-`.
        shared: options that all runs get.
        columns: as in [`compare_table`].
    """
    variants, trials = options.variants(), {}
    if options.tune:
        trials = tune(name, options, shared)
        found = {group: best(losses) for group, losses in trials.items()}
        variants = [with_value(variant, options.tuned, found[without_seed(variant[0])]) for variant in variants]
    singles = {variant: options.variant(variant, values, **shared) for variant, values in variants}
    runs, metrics, output = train_all(name, singles, options.jobs, *columns.values()), {}, options.output
    for variant, single in singles.items():
        if "held_out_loss" not in runs[variant]:
            continue
        metrics[variant] = read_lines(single.output / METRICS_FILE)
        if runs[variant]["steps"] not in losses(metrics[variant], "held_out_loss"):
            print(f"{single.output / METRICS_FILE} isn't whole; the figure lacks some of it", file=sys.stderr)
    record, text = output / "comparison.json", compare_table(runs, columns)
    own, files = own_files(record), {}
    differences = paired_differences(runs)
    if differences:
        text += "\n" + differences_table(differences)
        path = output / "differences.png"
        write_output(path, plot_differences(differences), own.get(path.name))
        files[path.name] = sha256(path)
    if trials:
        text += "\n" + trials_table(trials, options)
    if metrics:
        path = output / "comparison.png"
        own_options = options.sweep or any(len(run) > 1 for _, run in options.compared_runs)
        title = "Held-out losses" if own_options else "Same data order, seed and budget"
        plot_losses(metrics, path, title, own.get(path.name))
        files[path.name] = sha256(path)
    for path in (output / name for name in FIGURES if name not in files):
        if reading.is_regular(path) and sha256(path) == own.get(path.name):  # of other runs
            path.unlink()
    path = output / "comparison.md"
    write_output(path, text.encode(), own.get(path.name))
    files[path.name] = sha256(path)
    command = [f"attnres-{name}", *options.words()]
    results = {"output": str(output), "runs": runs, "versions": versions(), "command": command}
    if differences:
        results["differences"] = differences
    if trials:
        option = options.tuned
        results["best"] = {group: {option: f"{best(losses):g}"} for group, losses in trials.items()}
        results["trials"] = {
            group: {f"{value:g}": loss if loss < math.inf else None for value, loss in sorted(losses.items())}
            for group, losses in trials.items()
        }
        results["at_an_edge"] = [group for group, losses in trials.items() if beyond(losses)]
    results["files"] = {**files, record.name: digest_of(json_text(results).encode())}
    write_output(record, json_text(results).encode(), own.get(record.name))
    print(text)
    return {"output": str(output), "held_out_loss": {name: run.get("held_out_loss") for name, run in runs.items()}}
