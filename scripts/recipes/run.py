# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The folder of a run.

It holds `run.json` (arguments and versions), `metrics.jsonl` (one line per logged step), `tensorboard/`,
`checkpoint-<step>/`, `model/` and, when the run is done, `results.json` and figures.
"""

import fcntl
import json
import math
import os
import re
import secrets
import shutil
import stat
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from accelerate import PartialState
from attnres_convert import InputError, reading, staging
from attnres_convert.writing import write_json

from .checkpoints import checkpoints, last_good_checkpoint
from .folders import (
    FAILURE_FILE,
    METRICS_FILE,
    NO_SPACE,
    RESULTS_FILE,
    RUN_FILE,
    begin_work,
    end_work,
    no_space,
    writable,
)
from .log import read_lines
from .process import launched, versions


CONVERTED_NAME = "converted"
EARLY_NAMES = ("tokenizer", CONVERTED_NAME, "data.json", METRICS_FILE, "depth.jsonl", "tensorboard", RUN_FILE)
FIGURE_FILE = "loss.png"
RUN_FILES = (RUN_FILE, METRICS_FILE, RESULTS_FILE, FAILURE_FILE, "data.json", "depth.jsonl", FIGURE_FILE)
OF_SEVERAL = (f"{name}.{kind}" for name in ("comparison", "scaling_law") for kind in ("json", "md", "png"))
WRITTEN = (*RUN_FILES, *OF_SEVERAL, "differences.png")
LEFTOVER = re.compile(rf"\.{{1,2}}({'|'.join(map(re.escape, WRITTEN))})(\.attnres-tmp-[0-9a-f]{{8}}){{1,2}}")
PART_OF_COMPARISON = "ATTNRES_PART_OF_COMPARISON"  # in the environment of a run that a comparison has started
MODULES = ("attnres", "torch", "transformers")  # whose version may change the losses
# arguments that runs of old versions don't have
OF_OLD_RUNS = {"processes": 1, "resize_embeddings": False, "samples": 0, "expert_parallel": 1}
OF_OLD_RUNS |= {"pipeline_schedule": "1f1b", "init": "default"}
OF_GROWING_COMPARISONS = ("compare", "sweep", "tune", "tune_steps")  # which of its runs a command is about


def read_results(path: Path, *counts: str) -> dict:
    """Of a finished run or, in the file of a failure, of one that stopped.

    Args:
        counts: names of more whole numbers that a finished run has.

    Raises:
        InputError: the file isn't as it was written.
    """
    results = reading.read_json(path)
    failed = {"what": str, "value": str, "step": int}
    done = {"output": str, "held_out_loss": float, "steps": int, "tokens_per_second": float, "peak_memory_bytes": int}
    for name, kind in (failed if path.name == FAILURE_FILE else {**done, **dict.fromkeys(counts, int)}).items():
        if reading.typed(results, name, kind, str(path)) is None:
            raise InputError(f"{path} is damaged, it has no {name}; restore it, or choose another --output.")
    if path.name == FAILURE_FILE:
        return results
    given = read_run(path.parent)["arguments"].get("steps") if os.path.lexists(path.with_name(RUN_FILE)) else None
    if not math.isfinite(results["held_out_loss"]) or type(given) is int and results["steps"] != given:
        wrong = f"a held_out_loss of {results['held_out_loss']} after {results['steps']} steps"
        raise InputError(f"{path} is damaged, it has {wrong}; restore it, or choose another --output.")
    return results


def read_run(folder: Path) -> dict[str, dict]:
    """The arguments and versions that a run was begun with."""
    path = folder / RUN_FILE
    content = reading.read_json(path)
    run = {name: reading.typed(content, name, dict, str(path)) for name in ("arguments", "versions")}
    if None in run.values():
        raise InputError(f"{path} is damaged; restore it, or choose another --output.")
    return run


held_locks = {}  # open files by the path of a run's folder


def lock(folder: Path):
    """Keeps other processes from training in a folder until [`unlock`] or the end of this one.

    Raises:
        InputError: one does so already, and doesn't end.
    """
    if folder.resolve() in held_locks:
        return
    file = open(folder / RUN_FILE)  # noqa: SIM115, stays open
    for seconds in range(15, -1, -1):  # what a killed process has started ends some seconds after it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held_locks[folder.resolve()] = file
            return
        except OSError:
            time.sleep(1 if seconds else 0)
    raise InputError(f"another process trains in {folder}; let it end, or stop it.")


def unlock(folder: Path):
    if (file := held_locks.pop(folder.resolve(), None)) is not None:
        file.close()


new_runs = {}  # the folders made for a run that has begun in this process, by its folder


def begin_run(folder: Path, content: dict, new: list[Path]):
    """Writes `run.json`, unless another process was faster."""
    partial = folder / f".{RUN_FILE}.attnres-tmp-{secrets.token_hex(4)}"
    write_json(partial, content)
    with suppress(FileExistsError):
        try:
            os.link(partial, folder / RUN_FILE)
        except PermissionError:  # a file system without links
            if os.path.lexists(folder / RUN_FILE):
                raise FileExistsError from None
            shutil.copyfile(partial, folder / RUN_FILE)
        new_runs[folder.absolute()] = new
    partial.unlink()


def open_run(folder: Path, arguments: dict, is_main_process: bool = True) -> Path | None:
    """Starts a run in `folder` or takes up the one that is there, and returns its last good checkpoint, if any.

    A comparison may go on with other runs than it began with.

    Raises:
        InputError: the folder is in use for something else, or for a run with other arguments.
    """
    arguments = json.loads(json.dumps({**arguments, **launched()}, default=str))
    now = {"id": secrets.token_hex(8), "arguments": arguments, "versions": versions()}
    given = [arguments.get(name) for name in ("config", "model", "tokenizer", "adapter")]
    for source in [*filter(None, given), folder / CONVERTED_NAME]:
        reading.check_own_files(source)
    with writable(folder) as new:
        if not os.path.lexists(folder / RUN_FILE):
            if (other := staging.foreign(folder)) is not None:
                raise InputError(f"{folder} holds {other} and isn't the output of such a run; choose another --output.")
            begin_run(folder, now, new)
    before = read_run(folder)
    begun = {name: OF_OLD_RUNS[name] for name in OF_OLD_RUNS.keys() & arguments.keys()} | before["arguments"]
    may_differ = OF_GROWING_COMPARISONS if "sweep" in arguments.keys() & begun.keys() else ()
    for name in dict.fromkeys([*arguments, *begun]):  # what depends on other options comes after them
        is_gone = name not in arguments and not begun[name]  # an option of old versions that wasn't used
        if arguments.get(name) != begun.get(name) and not is_gone and name not in may_differ:
            raise InputError(
                f"{folder} holds a run with {name} = {begun.get(name)}, not {arguments.get(name)}; "
                "choose another --output, or remove it."
            )
    if not is_main_process:
        return next(reversed(checkpoints(folder)), None)
    check_kinds(folder)
    lock(folder)
    end_work(folder)  # of a killed run, as all below
    staging.recover(folder / CONVERTED_NAME)
    for leftover in folder.glob(".*"):
        if LEFTOVER.fullmatch(leftover.name) and stat.S_ISREG(leftover.lstat().st_mode):
            leftover.unlink()
    last = last_good_checkpoint(folder)
    changed = [f"{name} {old}" for name in MODULES if (old := before["versions"].get(name)) != now["versions"][name]]
    if last is not None and changed:
        print(f"{folder} was begun with {', '.join(changed)}; losses may differ a little", file=sys.stderr)
    if reading.is_regular(folder / FAILURE_FILE):
        (folder / FAILURE_FILE).unlink()
    return last


def check_kinds(folder: Path):
    """
    Raises:
        InputError: something has the name of a file or folder of a run and is none, which would show after training.
    """
    for name in ("tensorboard", "tensorboard/depth"):
        if os.path.lexists(folder / name) and not (folder / name).is_dir():
            raise InputError(f"{folder / name} is no folder; move it away.")
    for name in RUN_FILES:
        path = folder / name
        is_kept = name == FIGURE_FILE and path.is_symlink()
        if os.path.lexists(path) and not is_kept and not reading.is_regular(path):
            raise InputError(f"{path} is no regular file; move it away.")


@contextmanager
def discarded_if_refused(folder: Path):
    """Leaves nothing behind of a new run that can't start, so that the corrected command may use its folder.

    It stays once there is a loss or a failure to look at, or a run that has begun inside it. What else is in the folder
    stays as it is.
    """
    try:
        yield
    except KeyboardInterrupt:  # the same command goes on
        raise
    except BaseException:  # also a panic of code that is in Rust
        new = new_runs.pop(folder.absolute(), None)
        begun = (folder / FAILURE_FILE).exists() or any(folder.glob(f"*/{RUN_FILE}"))
        if new is not None and not begun and not read_lines(folder / METRICS_FILE):
            discard(folder, new)
        raise


def discard(folder: Path, new: list[Path]):
    """Removes what a run writes before its first loss."""
    with suppress(InputError, OSError):
        work = begin_work(folder)
        for name in EARLY_NAMES:
            if os.path.lexists(folder / name):
                (folder / name).rename(work / name)
        end_work(folder)
    unlock(folder)
    staging.remove_empty(new)


@contextmanager
def one_line_errors(script: str, folder: Path):
    """Ends a script that is interrupted, whose input is bad or which can't write to its run folder with one line."""
    try:
        with discarded_if_refused(folder):
            yield
    except InputError as error:
        raise SystemExit(f"{script}: {error}") from None
    except OSError as error:
        message = no_space(folder, error) if error.errno in NO_SPACE else reading.one_line(f"{error}.")
        raise SystemExit(f"{script}: {message}") from None
    except KeyboardInterrupt:
        if PartialState().is_main_process and PART_OF_COMPARISON not in os.environ:  # which says it once
            print(f"{script}: interrupted; the same command goes on from the last checkpoint.", file=sys.stderr)
        raise SystemExit(130) from None
