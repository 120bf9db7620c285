# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""What all training scripts do around training: the run folder, its log, checkpoints that are complete or absent,
and a stop at the first loss that isn't a number.

A run folder holds `run.json` (arguments and versions), `metrics.jsonl` (one line per logged step), `tensorboard/`,
`checkpoint-<step>/`, `model/` and, when the run is done, `results.json` and figures.
"""

import ctypes
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import platform
import re
import resource
import secrets
import shutil
import signal
import stat
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

import accelerate
import datasets
import matplotlib
import numpy
import tokenizers
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from attnres_convert import InputError, reading, staging
from attnres_convert.checkpoint import read_checkpoint, read_shard
from attnres_convert.loading import check_tensors, empty_model
from attnres_convert.reading import first_line, sha256, understood
from attnres_recipes.files import cpu_name, write_bytes, write_json, write_text
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from torch.distributed.fsdp import MixedPrecisionPolicy
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

import attnres


matplotlib.use("Agg")  # no window, also where there is a display
from matplotlib import pyplot as plt  # noqa: E402


RUN_FILE, METRICS_FILE, RESULTS_FILE, FAILURE_FILE = "run.json", "metrics.jsonl", "results.json", "failure.json"
CONVERTED_NAME = "converted"
EARLY_NAMES = ("tokenizer", CONVERTED_NAME, "data.json", METRICS_FILE, "depth.jsonl", "tensorboard", RUN_FILE)
FILES_FILE = "files.json"  # of a checkpoint: names, sizes and hashes of its files
FIGURE_FILE = "loss.png"
RUN_FILES = (RUN_FILE, METRICS_FILE, RESULTS_FILE, FAILURE_FILE, "data.json", "depth.jsonl", FIGURE_FILE)
WRITTEN = (*RUN_FILES, "comparison.json", "comparison.md", "comparison.png")
LEFTOVER = re.compile(rf"\.{{1,2}}({'|'.join(map(re.escape, WRITTEN))})(\.attnres-tmp-[0-9a-f]{{8}}){{1,2}}")
LICENCE_FILES = re.compile("licen[cs]e|notice|copying|use_policy", re.IGNORECASE)
# what a model is, whatever its weights are
MODEL_FACTS = ("model_type", "attn_res_mode", "attn_res_block_size", "attn_res_sum_scale", "attn_res_norm_eps")
MODEL_FACTS += ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
MODEL_FACTS += ("head_dim", "hidden_act", "vocab_size", "rms_norm_eps", "tie_word_embeddings")
TRAINER_READS = re.compile(
    r"((pytorch_|adapter_)?model|optimizer|scheduler|scaler|rng_state)[^/]*\.(safetensors|bin|pt|pth|index\.json)"
    r"|(pytorch_model_fsdp|optimizer|global_step)[^/]*/.*|(adapter_)?config\.json|latest"
)
ADVICE = "rename it to go on from the one before"
MODULES = ("attnres", "torch", "transformers")  # whose version may change the losses


class RunError(InputError):
    """The run can't start or go on; the message is one line that says why and what to do."""


def end_without_a_word():
    """Ends a process that isn't the main one, which is left the time to say why: a launcher ends all with the first."""
    time.sleep(2)
    raise SystemExit(1)


def end_with_parent():
    """Lets a process that was started end when the one that started it is killed; Linux alone can do so."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@contextmanager
def main_process_first():
    """The block runs in the main process, then in all others; if it fails in the main one, they end without a word."""
    is_main, succeeded = PartialState().is_main_process, [False]
    if not is_main and not broadcast_object_list(succeeded)[0]:
        end_without_a_word()
    try:
        yield
        succeeded = [True]
    finally:
        if is_main:
            broadcast_object_list(succeeded)


def launched() -> dict:
    """How `accelerate launch` started this process; a run goes on as it began."""
    sharding = [name for name in ("FSDP", "DeepSpeed") if os.environ.get(f"ACCELERATE_USE_{name.upper()}") == "true"]
    return {"processes": PartialState().num_processes, "sharding": sharding[0] if sharding else None}


def versions() -> dict[str, str]:
    modules = (attnres, torch, transformers, accelerate, datasets, tokenizers, numpy)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return {
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in modules},
        "device": device,
        "threads": torch.get_num_threads(),
    }


def sync_folder(folder: Path):
    """Brings a folder's files to the disk, so that a name given to it afterwards never stands for less."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


WORK_NAME = ".attnres-tmp"  # in a run folder, for what isn't whole yet


def begin_work(run: Path) -> Path:
    """An empty hidden folder in a run's, in which folders are written before they get their names."""
    end_work(run)
    work = run / WORK_NAME
    work.mkdir()
    staging.mark(work, work)
    return work


def end_work(run: Path):
    """
    Raises:
        RunError: what has the name of our hidden folder isn't ours.
    """
    work = run / WORK_NAME
    if os.path.lexists(work):
        if not staging.is_marked(work, work, exactly=False):  # a run folder may be moved to another machine
            raise RunError(f"{work} wasn't made by this script; move it away.")
        staging.clear(work)


@contextmanager
def whole_folder(folder: Path):
    """The block writes a folder that gets its name at the end, in the folder of a run. For the main process alone."""
    partial = begin_work(folder.parent) / folder.name
    try:
        with no_space_in_one_line(folder.parent):
            yield partial
            publish(partial, folder)
    finally:
        end_work(folder.parent)


def publish(partial: Path, folder: Path):
    """Gives a finished folder its name. What had the name is removed if all of it is in the new one too, else kept."""
    sync_folder(partial)
    if os.path.lexists(folder):
        if staging.has_all_of(partial, folder):
            remove(folder)
        else:
            keep(folder)
    partial.rename(folder)


def keep(path: Path):
    """Gives another name to what isn't ours and is in the way."""
    kept = staging.set_aside(path)
    print(f"{path} isn't what this run has written; it is kept as {kept.name}", file=sys.stderr)


def remove(folder: Path):
    """Takes a folder's name away before its files, so that there never is half of it under this name."""
    trash = folder.parent / WORK_NAME / f"removed-{folder.name}"
    folder.rename(trash)
    shutil.rmtree(trash)


def step_of(checkpoint: Path) -> int | None:
    """Of a folder that has the name of a checkpoint."""
    step = checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    is_name = step.isascii() and step.isdecimal() and checkpoint.name == f"{PREFIX_CHECKPOINT_DIR}-{int(step)}"
    return int(step) if is_name else None


def named_checkpoints(folder: Path) -> list[Path]:
    """All that have the name of a checkpoint, oldest first."""
    named = folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return sorted((path for path in named if step_of(path) is not None and path.is_dir()), key=step_of)


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints that a run has written, oldest first."""
    return [path for path in named_checkpoints(folder) if is_own(path)]


def is_own(checkpoint: Path) -> bool:
    with suppress(InputError):
        return bool(listed_files(checkpoint))
    return False


def run_id(folder: Path) -> str | None:
    """What tells a run from others; those of earlier versions have none."""
    with suppress(InputError):
        return reading.typed(reading.read_json(folder / RUN_FILE), "id", str, RUN_FILE)
    return None


def model_facts(config) -> dict:
    content = config if isinstance(config, dict) else json.loads(json.dumps(config.to_dict(), default=str))
    return {name: content[name] for name in MODEL_FACTS if name in content}


def list_files(checkpoint: Path, run: str | None, config):
    """Writes down what a checkpoint consists of, for [`check_files`], while it is still in memory."""
    files = {path.relative_to(checkpoint).as_posix(): path for path in checkpoint.rglob("*") if path.is_file()}
    listed = {name: [path.stat().st_size, sha256(path)] for name, path in files.items()}
    content = {"step": step_of(checkpoint), "run": run, "model": model_facts(config), "files": listed}
    write_json(checkpoint / FILES_FILE, content)


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def listed_files(checkpoint: Path) -> dict[str, list]:
    """Size and hash of each file of a checkpoint, as they were when it was written; the hash of old ones is `None`.

    Raises:
        InputError: there is no such list, it is broken, or it is that of another checkpoint.
    """
    path = checkpoint / FILES_FILE
    content = reading.read_json(path)
    if "files" not in content:  # of an earlier version
        content = {"files": {name: [size, None] for name, size in content.items()}}
    files, step = reading.typed(content, "files", dict, str(path)), reading.typed(content, "step", int, str(path))
    if step not in (None, step_of(checkpoint)):
        raise RunError(f"{checkpoint} is a copy of {PREFIX_CHECKPOINT_DIR}-{step}.")
    if reading.typed(content, "run", str, str(path)) != run_id(checkpoint.parent):
        raise RunError(f"{checkpoint} is of another run.")
    for entry in (files or {}).values():
        if not (isinstance(entry, list) and list(map(type, entry)) in ([int, str], [int, type(None)])):
            raise RunError(f"{checkpoint} is damaged, see its {FILES_FILE}.")
    return files or {}


def check_files(checkpoint: Path):
    """Whether a checkpoint is as it was written.

    Raises:
        InputError: it isn't of this run; or a file is missing, has changed, or is none of those that were written.
    """
    listed = listed_files(checkpoint)
    if lacking := not_listed(listed):
        raise RunError(f"{checkpoint} is damaged, its {FILES_FILE} lists no {lacking}.")
    for path in checkpoint.rglob("*"):
        name = path.relative_to(checkpoint).as_posix()
        if name not in listed and TRAINER_READS.fullmatch(name) and not path.is_dir():
            raise RunError(f"{checkpoint} is damaged, its {FILES_FILE} lists no {name}.")
    for name, (size, digest) in listed.items():
        path = checkpoint / name
        if not reading.is_regular(path) or path.stat().st_size != size or digest not in (None, sha256(path)):
            raise RunError(f"{checkpoint} is damaged, see its {name}.")
    state = reading.read_json(checkpoint / TRAINER_STATE_NAME)
    if state.get("global_step") != step_of(checkpoint):
        raise RunError(f"{checkpoint} is damaged, see its {TRAINER_STATE_NAME}.")


def not_listed(listed: dict[str, list]) -> str | None:
    """What a checkpoint can't be without and isn't listed: a Trainer goes on without most of it, in another way."""
    needed = [(TRAINER_STATE_NAME,)]
    if any(name.startswith("global_step") for name in listed):  # of DeepSpeed
        needed += [("latest",)]
    else:  # whole, or in folders of FSDP
        needed += [(SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME, "pytorch_model_fsdp")]
        needed += [("optimizer.",), ("scheduler.",), ("rng_state",)]
        if any(name.startswith(("pytorch_model_fsdp", "optimizer_")) for name in listed):
            needed[2] = ("optimizer",)
    return next((names[0] for names in needed if not any(name.startswith(names) for name in listed)), None)


def is_untouched(checkpoint: Path) -> bool:
    """Whether a folder holds what a run has written, and nothing else. Only files that are newer than the list of them
    are read."""
    files, listed = staging.entries(checkpoint), listed_files(checkpoint)
    if files is None or files.keys() - {FILES_FILE} != listed.keys():
        return False
    written = files[FILES_FILE].stat().st_mtime_ns
    for name, (size, digest) in listed.items():
        found = files[name].stat()
        is_newer = max(found.st_mtime_ns, found.st_ctime_ns) > written
        if found.st_size != size or is_newer and sha256(files[name]) != digest:
            return False
    return True


def check_same_model(checkpoint: Path, config):
    """
    Raises:
        RunError: the checkpoint is of another model than the one that it is to go on as.
    """
    before = reading.typed(reading.read_json(checkpoint / FILES_FILE), "model", dict, FILES_FILE)
    if before is None and reading.is_regular(checkpoint / reading.CONFIG_NAME):  # of an earlier version
        before = model_facts(reading.read_json(checkpoint / reading.CONFIG_NAME))
    now = model_facts(config)
    for name in MODEL_FACTS:
        if before is not None and name in before and before[name] != now.get(name):
            raise RunError(
                f"{checkpoint} is of a model with {name} = {before[name]}, not {now.get(name)}: what was trained on "
                "has changed; restore it, or choose another --output."
            )


def last_good_checkpoint(folder: Path) -> Path | None:
    """The last one that is as it was written. Damaged ones after it get other names, a line for each says so.

    Raises:
        RunError: there are checkpoints, and none is good.
    """
    bad = []
    for checkpoint in reversed(named_checkpoints(folder)):
        try:
            check_files(checkpoint)
        except InputError as error:
            bad.append((checkpoint, str(error).rstrip(".")))
            continue
        for path, reason in bad:
            kept = f"it is now {staging.set_aside(path, 'damaged').name}" if is_own(path) else "it is left alone"
            print(f"{reason}; {kept}, and the run goes on from {checkpoint.name}", file=sys.stderr)
        return checkpoint
    if bad:
        reason = bad[0][1] + (f" ({len(bad)} are bad)" if len(bad) > 1 else "")
        raise RunError(f"no checkpoint in {folder} is good: {reason}; restore one, or choose another --output.")
    return None


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
            raise RunError(f"{path} is damaged, it has no {name}; restore it, or choose another --output.")
    if path.name == FAILURE_FILE:
        return results
    given = read_run(path.parent)["arguments"].get("steps") if os.path.lexists(path.with_name(RUN_FILE)) else None
    if not math.isfinite(results["held_out_loss"]) or type(given) is int and results["steps"] != given:
        wrong = f"a held_out_loss of {results['held_out_loss']} after {results['steps']} steps"
        raise RunError(f"{path} is damaged, it has {wrong}; restore it, or choose another --output.")
    return results


def read_run(folder: Path) -> dict[str, dict]:
    """The arguments and versions that a run was begun with."""
    path = folder / RUN_FILE
    content = reading.read_json(path)
    run = {name: reading.typed(content, name, dict, str(path)) for name in ("arguments", "versions")}
    if None in run.values():
        raise RunError(f"{path} is damaged; restore it, or choose another --output.")
    return run


held_locks = {}  # open files by the path of a run's folder


def lock(folder: Path):
    """Keeps other processes from training in a folder until this one ends.

    Raises:
        RunError: one does so already, and doesn't end.
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
    raise RunError(f"another process trains in {folder}; let it end, or stop it.")


@contextmanager
def writable(folder: Path):
    """Makes a folder if there is none, and tries it; what it has made goes again if the block fails.

    Raises:
        RunError: it can't be written to.
    """
    with ExitStack() as stack:
        try:
            new = stack.enter_context(staging.made(folder))
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise RunError(f"can't write to {folder}: {error.strerror}.") from None
        yield new


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

    Raises:
        RunError: the folder is in use for something else, or for a run with other arguments.
    """
    arguments = json.loads(json.dumps({**arguments, **launched()}, default=str))
    now = {"id": secrets.token_hex(8), "arguments": arguments, "versions": versions()}
    given = [arguments.get(name) for name in ("config", "model", "tokenizer", "adapter")]
    for source in [*filter(None, given), folder / CONVERTED_NAME]:
        reading.check_own_files(source)
    with writable(folder) as new:
        if not os.path.lexists(folder / RUN_FILE):
            if (other := staging.foreign(folder)) is not None:
                raise RunError(f"{folder} holds {other} and isn't the output of such a run; choose another --output.")
            begin_run(folder, now, new)
    before = read_run(folder)
    begun = {"processes": 1, "resize_embeddings": False, **before["arguments"]}  # runs of old versions have neither
    for name in arguments.keys() | begun.keys():
        if arguments.get(name) != begun.get(name):
            raise RunError(
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
        RunError: something has the name of a file or folder of a run and is none, which would show after training.
    """
    for name in ("tensorboard", "tensorboard/depth"):
        if os.path.lexists(folder / name) and not (folder / name).is_dir():
            raise RunError(f"{folder / name} is no folder; move it away.")
    for name in RUN_FILES:
        path = folder / name
        is_kept = name == FIGURE_FILE and path.is_symlink()
        if os.path.lexists(path) and not is_kept and not reading.is_regular(path):
            raise RunError(f"{path} is no regular file; move it away.")


def write_output(path: Path, content: bytes, own: str | None = None):
    """Writes a file; what is there is kept under another name unless it is the same, or what this script wrote before.

    Args:
        own: the hash of that.
    """
    if os.path.lexists(path):
        is_own = not path.is_symlink() and reading.is_regular(path) and sha256(path) in (own, digest_of(content))
        if not is_own:
            keep(path)
    write_bytes(path, content)


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
    if (file := held_locks.pop(folder.resolve(), None)) is not None:
        file.close()
    staging.remove_empty(new)


NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
        if PartialState().is_main_process:
            print(f"{script}: interrupted; the same command goes on from the last checkpoint.", file=sys.stderr)
        raise SystemExit(130) from None


def no_space(folder: Path, error: Exception) -> str:
    free = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
    return (
        f"can't write to {folder}, where {free / 1e6:,.0f} MB are free: {first_line(error)}; make room and try again."
    )


@contextmanager
def no_space_in_one_line(run: Path):
    """
    Raises:
        RunError: the block can't write to the folder of a run.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # the second: torch
        raise RunError(no_space(run, error)) from None


def read_lines(path: Path) -> list[dict]:
    """The entries of a JSON lines file that have a `step`; a last line that a killed run didn't finish is left out."""
    return parse_lines(path)[0]


def parse_lines(path: Path) -> tuple[list[dict], int]:
    """The entries of a JSON lines file, and how many of its lines hold none."""
    if not os.path.lexists(path):
        return [], 0
    with reading.open_regular(path) as file:
        *lines, _ = file.read().split(b"\n")
    entries = []
    for line in lines:
        with suppress(InputError, UnicodeDecodeError):
            entry = reading.parse_json(line.decode(), path.name)
            if isinstance(entry, dict) and type(entry.get("step")) is int:
                entries.append(entry)
    return entries, len(lines) - len(entries)


class JsonLines:
    """A log with an entry per line, each with its `step`; entries after `last_step` are removed when it is opened.

    Args:
        expected: what is known of the entries up to `last_step`. A log that lacks some of it, or that has lines which
            can't be read, is kept under another name, and goes on with what is known or can be read; a line says so.
    """

    def __init__(self, path: Path, last_step: int, expected: list[dict] | None = None):
        found, unreadable = parse_lines(path)
        kept = [entry for entry in found if entry["step"] <= last_step]
        lacks = expected is not None and not is_covered(expected, kept)
        is_gone = last_step > 0 and not os.path.lexists(path)
        if unreadable or lacks or is_gone:
            problem = f"has {unreadable} lines that can't be read" if unreadable else "lacks entries"
            aside = "" if is_gone else f", and is kept as {staging.set_aside(path).name}"
            kept = expected if lacks else kept
            source = "those of the checkpoint" if lacks else f"the {len(kept)} left"
            print(f"{path} {'is gone' if is_gone else problem}{aside}; it goes on with {source}", file=sys.stderr)
        write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
        self.path = path

    def write(self, entry: dict):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def is_covered(expected: list[dict], entries: list[dict]) -> bool:
    """Whether each expected entry is there; a found one may hold more, as checkpoints of old versions hold less."""
    rest = iter(entries)
    return all(any(entry.items() <= found.items() for found in rest) for entry in expected)


def peak_memory() -> int:
    """Bytes: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class RunLog(TrainerCallback):
    """Writes losses, gradient norm, learning rate and tokens per second to `metrics.jsonl` and TensorBoard.

    Times are those of the steps alone, without evaluation and checkpoints.
    """

    def __init__(self, folder: Path, tokens_per_step: int):
        self.folder, self.tokens_per_step = folder, tokens_per_step
        self.seconds = []

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        from torch.utils.tensorboard import SummaryWriter  # takes seconds

        step = state.global_step
        known = [{"step": logs["step"], **entry} for logs in state.log_history if (entry := self.entry(logs))]
        self.lines = JsonLines(self.folder / METRICS_FILE, step if step else -1, known)
        self.writer = SummaryWriter(self.folder / "tensorboard", purge_step=step + 1 if step else 0)
        self.bar = tqdm(
            total=state.max_steps, initial=step, unit="step", desc="training", disable=not sys.stderr.isatty()
        )

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.started)
        if state.is_world_process_zero:
            self.bar.update()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        entry = self.entry(logs)
        if "loss" in entry:
            entry["tokens_per_second"] = self.tokens_per_step * len(self.seconds) / sum(self.seconds)
            state.log_history[-1]["tokens_per_second"] = entry["tokens_per_second"]  # a checkpoint has all of the log
            self.seconds = []
        if not entry:
            return
        self.lines.write({"step": state.global_step, **entry})
        for name, value in entry.items():
            self.writer.add_scalar(name, value, state.global_step)
        self.bar.set_postfix({name: f"{value:.3f}" for name, value in entry.items() if "loss" in name})

    @staticmethod
    def entry(logs: dict) -> dict:
        """What of a Trainer's log belongs to ours."""
        if "eval_loss" in logs:
            return {"held_out_loss": logs["eval_loss"]}
        names = ("loss", "grad_norm", "learning_rate", "tokens_per_second")
        return {name: logs[name] for name in names if name in logs and "loss" in logs}

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.bar.close()
            self.writer.flush()


@contextmanager
def buffers_left_whole(model: torch.nn.Module):
    """In this block accelerate can shard a model that has buffers in its checkpoints, such as the routers' biases of
    DeepSeek-V3 and Kimi Linear: it takes all that is in a state dict for sharded. All processes get the main one's."""
    persistent = [
        (module, name)
        for module in model.modules()
        for name in module._buffers
        if name not in module._non_persistent_buffers_set
    ]
    values = [[module._buffers[name] for module, name in persistent]]
    for (module, name), value in zip(persistent, broadcast_object_list(values)[0]):
        module._buffers[name].copy_(value)
        module._non_persistent_buffers_set.add(name)
    try:
        yield
    finally:
        for module, name in persistent:
            module._non_persistent_buffers_set.discard(name)


def check_saved(folder: Path, model: torch.nn.Module) -> bool:
    """Whether a folder that `model` was saved to holds safetensors, of which a sharded checkpoint has none.

    Raises:
        RunError: `from_pretrained` wouldn't find what it wants in them, names and shapes.
    """
    name = SAFETENSORS_WEIGHTS_NAME if isinstance(model, PeftModel) else SAFE_WEIGHTS_NAME
    if not ((folder / name).exists() or (folder / SAFE_WEIGHTS_INDEX_NAME).exists()):
        return False
    with understood("the model can't be saved in a form that loads again", kind=RunError):
        if isinstance(model, PeftModel):
            saved, expected = read_shard(folder / name).tensors, get_peft_model_state_dict(model)
            for tensor in sorted(saved.keys() ^ expected.keys()):
                raise KeyError(tensor)
        else:
            config = AutoConfig.from_pretrained(folder)
            shapes = {name: tensor.shape for name, tensor in read_checkpoint(folder).tensors.items()}
            try:
                check_tensors(empty_model(AutoModelForCausalLM._model_mapping[type(config)], config), shapes, 0)
            except InputError as error:
                raise ValueError(str(error)) from None
    return True


class RunTrainer(Trainer):
    """A Trainer that takes the data in the order it is in, writes checkpoints complete or not at all, and stops at a
    loss or gradient that isn't finite, before the step is taken, and before a checkpoint of such a model is written.

    Batches may hold `documents` `(batch, seq)`, which row of the data each token is from.
    """

    def __init__(self, *args, optimizers: tuple = (None, None), keep_checkpoints: int = 2, **kwargs):
        # a Trainer that shards refuses an optimizer that it is given, and takes it from create_optimizer
        self.given_optimizer, scheduler = optimizers
        super().__init__(*args, optimizers=(None, scheduler), **kwargs)
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap is None:
            # accelerate fails at a class that a model names and doesn't have
            classes = {type(module).__name__ for module in self.model.modules()} & set(self.model._no_split_modules)
            self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(classes)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        if self.args.world_size > 1 and self.eval_dataset is not None:
            # What accelerate fills up the last batches with is left out of the mean where it has batches of its own
            size, largest = len(self.eval_dataset), self.args.per_device_eval_batch_size
            divisors = [batch_size for batch_size in range(1, largest + 1) if size % batch_size == 0]
            self.args.per_device_eval_batch_size = divisors[-1]
        self.folder = Path(self.args.output_dir)
        self.keep_checkpoints = keep_checkpoints
        self.batches, self.batches_step = [], -1  # the micro-batches of a step

    def create_accelerator_and_postprocess(self):
        state = self.args.distributed_state
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and state.distributed_type == DistributedType.MULTI_CPU:
            # accelerate would leave the model unsharded on CPUs without a word, and needs no more than this to shard
            state.distributed_type = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()
        if self.accelerator.is_fsdp2 and self.args.bf16:
            # accelerate's policy rounds the loss, the sum of the gradients and what layers get from depth attention
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )

    def _prepare_for_training(self, *args, **kwargs):
        config = self.model.config
        if (config.pad_token_id or 0) >= config.vocab_size:  # a Trainer has taken it from the tokenizer
            config.pad_token_id = None  # padding gets no embedding, and a model that says otherwise doesn't load
        with buffers_left_whole(self.model) if self.is_fsdp_enabled else nullcontext():
            return super()._prepare_for_training(*args, **kwargs)

    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is None:
            self.optimizer = self.given_optimizer
        return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        # transformers' schedules reach their ends after their last steps, here the last step is to have that rate
        return super().create_scheduler(max(1, num_training_steps - 1), optimizer)

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, torch.utils.data.IterableDataset):
            return None
        return torch.utils.data.SequentialSampler(dataset)

    def compute_loss(self, model, inputs, **kwargs):
        # a cache would hide from transformers that the sequences are packed
        inputs = {name: value for name, value in inputs.items() if name != "documents"}
        return super().compute_loss(model, {**inputs, "use_cache": False}, **kwargs)

    def training_step(self, model, inputs, *args, **kwargs):
        if self.batches_step != self.state.global_step:
            self.batches, self.batches_step = [], self.state.global_step
        self.batches.append(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._check_finite(loss, "loss", self.state.global_step + 1)
        return loss

    def _clip_grad_norm(self, model):
        norm = super()._clip_grad_norm(model)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if norm is not None:
            self._check_finite(norm, "gradient norm", self.state.global_step + 1)
        return norm

    def evaluate(self, *args, **kwargs):
        metrics = super().evaluate(*args, **kwargs)
        self._check_finite(metrics["eval_loss"], "held-out loss", self.state.global_step)
        return metrics

    def _check_finite(self, value, name: str, step: int):
        """Stops the run if `value` isn't finite in one of the processes.

        Args:
            step: the one that `value` belongs to, or after which it was measured.
        """
        value = torch.as_tensor(value, device=self.args.device).detach().float().reshape(1)
        values = self.accelerator.gather(value)  # all processes stop together
        if values.isfinite().all():
            return
        batches = [] if value.isfinite() else self.batches
        rows = [int(row) for batch in batches if "documents" in batch for row in batch["documents"].unique()]
        documents = sorted(set(gather_object(rows)))
        last = next(reversed(checkpoints(self.folder)), None)
        reading = ", ".join(str(number) for number in values.tolist() if not math.isfinite(number))
        failure = {"step": step, "what": name, "value": reading, "documents": documents, "checkpoint": last}
        if self.processing_class is not None:
            texts = [self.processing_class.decode(ids) for batch in batches for ids in batch["input_ids"]]
            failure["batch"] = gather_object(texts)
        if not self.is_world_process_zero():
            end_without_a_word()
        write_json(self.folder / FAILURE_FILE, failure)
        shown = ", ".join(map(str, documents[:8])) + (" ..." if len(documents) > 8 else "")
        raise RunError(
            f"the {name} is {reading} at step {step}"
            + (f", with documents {shown} of the data; " if shown else "; ")
            + (f"the last good checkpoint is {last.name}" if last else "there is no good checkpoint yet")
            + (f"; {FAILURE_FILE} holds the batch" if failure.get("batch") else "")
            + f", in {self.folder}."
        )

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if isinstance(resume_from_checkpoint, (str, Path)):
            with main_process_first():
                check_same_model(Path(resume_from_checkpoint), self.model.config)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.is_fsdp_enabled or isinstance(self.model, PeftModel):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        # a Trainer hands the tensors of the file to the module as they are, and leaves out experts, which have other
        # names and shapes there
        with understood(f"{resume_from_checkpoint} is damaged", ADVICE, RunError):
            loaded, info = type(self.model).from_pretrained(
                resume_from_checkpoint, config=self.model.config, dtype=self.model.dtype, output_loading_info=True
            )
        if info["missing_keys"]:
            raise RunError(f"{resume_from_checkpoint} is damaged: it has no {min(info['missing_keys'])}.")
        self.model.load_state_dict(loaded.state_dict())

    # Checkpoints of earlier versions have no hashes by which damage shows before

    def _load_optimizer_and_scheduler(self, checkpoint):
        with understood(f"{checkpoint} is damaged", ADVICE, RunError):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint):
        with understood(f"{checkpoint} is damaged", ADVICE, RunError):
            super()._load_rng_state(checkpoint)

    def _get_output_dir(self, trial):
        return str(self.folder / WORK_NAME) if self.is_saving else super()._get_output_dir(trial)

    is_saving = False
    names_checked = False  # of the tensors in a checkpoint

    def _check_names(self, folder: Path):
        """Whether a folder with the first checkpoint can be loaded again; what is wrong is wrong in all of them."""
        if not self.names_checked and self.is_world_process_zero():
            self.names_checked = check_saved(folder, self.accelerator.unwrap_model(self.model))

    def _loss_of_one(self, model) -> torch.Tensor:
        """The loss of one held-out sequence: what isn't finite for it is no good checkpoint."""
        model.eval()
        inputs = self.data_collator([self.eval_dataset[0]])
        loss, *_ = self.prediction_step(model, inputs, prediction_loss_only=True)
        model.train()
        return loss

    def _save_checkpoint(self, model, trial):
        self._check_finite(self._loss_of_one(model), "held-out loss", self.state.global_step)
        if self.is_world_process_zero():
            begin_work(self.folder)
        self.accelerator.wait_for_everyone()
        self.is_saving = True
        try:
            with self._written_whole():
                super()._save_checkpoint(model, trial)
        finally:
            self.is_saving = False
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            partial = self.folder / WORK_NAME / name
            with self._written_whole():
                if self.is_fsdp_enabled:  # what `accelerate merge-weights` leaves to be added
                    self.model.config.save_pretrained(partial)
                    if self.processing_class is not None:
                        self.processing_class.save_pretrained(partial)
                self._check_names(partial)
                list_files(partial, run_id(self.folder), self.model.config)
                publish(partial, self.folder / name)
            for old in checkpoints(self.folder)[: -self.keep_checkpoints]:
                if is_untouched(old):
                    remove(old)
            end_work(self.folder)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _written_whole(self):
        """What the block can't write whole is removed."""
        try:
            with no_space_in_one_line(self.folder):
                yield
        except Exception:
            with suppress(OSError):
                end_work(self.folder)
            raise

    def save_final_model(self, folder: Path):
        """The model and its tokenizer, as `save_pretrained` writes them, complete or not at all."""
        partial = self.folder / WORK_NAME / folder.name
        if self.is_world_process_zero():
            begin_work(self.folder)
        self.accelerator.wait_for_everyone()
        with self._written_whole():
            if self.is_fsdp_enabled:  # save_model writes nothing if checkpoints are sharded
                state_dict = self.accelerator.get_state_dict(self.model)
                if self.is_world_process_zero():
                    self._save(str(partial), state_dict=state_dict)
            else:
                self.save_model(str(partial), _internal_call=True)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            with self._written_whole():
                (partial / "training_args.bin").unlink(missing_ok=True)
                self._check_names(partial)
                publish(partial, folder)
            end_work(self.folder)


def losses(metrics: list[dict], name: str) -> dict[int, float]:
    """By step, from the entries of `metrics.jsonl`: `"loss"` or `"held_out_loss"`, in nats per token."""
    return {entry["step"]: entry[name] for entry in metrics if name in entry}


def tokens_per_second(metrics: list[dict]) -> float:
    """The median over the logged steps, so that starting up and interruptions don't count."""
    speeds = [entry["tokens_per_second"] for entry in metrics if "tokens_per_second" in entry]
    return statistics.median(speeds or [math.nan])


def without_seed(name: str) -> str:
    return " ".join(part for part in name.split(" ") if not part.startswith("seed=")) or "all"


def plot_losses(runs: dict[str, list[dict]], path: Path, title: str, own: str | None = None):
    """Held-out losses by step, one colour for all seeds of a run, and for few runs the training losses fainter.

    Args:
        runs: entries of `metrics.jsonl` by the name of the run.
        own: as in [`write_output`].
    """
    figure, axes = plt.subplots(figsize=(8.5, 4.5), layout="constrained")
    groups = list(dict.fromkeys(map(without_seed, runs)))
    colors = plt.colormaps["tab10" if len(groups) <= 10 else "viridis"].resampled(max(10, len(groups))).colors
    seen = set()
    for name, metrics in runs.items():
        group = without_seed(name)
        label = None if group in seen else group if len(runs) > 1 else "held-out"
        seen.add(group)
        style = {"color": colors[groups.index(group)], "marker": "o", "markersize": 4}
        held_out, training = losses(metrics, "held_out_loss"), losses(metrics, "loss")
        axes.plot(held_out.keys(), held_out.values(), label=label, **style)
        if len(runs) <= 4:
            style |= {"marker": None, "alpha": 0.3, "linewidth": 1}
            axes.plot(training.keys(), training.values(), label="training" if len(runs) == 1 else None, **style)
    if 1 < len(runs) <= 4:
        axes.plot([], [], color="grey", alpha=0.3, linewidth=1, label="training")
    axes.set_xlabel("training step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("held-out loss (nats per token)" if len(runs) > 4 else "loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    content = io.BytesIO()
    figure.savefig(content, dpi=150, format="png")
    plt.close(figure)
    write_output(path, content.getvalue(), own)
