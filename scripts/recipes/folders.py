# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Folders that a command writes to: tried at the beginning, and what is in them complete or absent."""

import errno
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager
from pathlib import Path

from attnres_convert import InputError, reading, staging
from attnres_convert.reading import first_line, sha256
from attnres_convert.writing import write_bytes
from safetensors import SafetensorError


RUN_FILE, METRICS_FILE, RESULTS_FILE, FAILURE_FILE = "run.json", "metrics.jsonl", "results.json", "failure.json"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
WORK_NAME = ".attnres-tmp"  # in a run folder, for what isn't whole yet


def sync_folder(folder: Path):
    """Brings a folder's files to the disk, so that a name given to it afterwards never stands for less."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
        InputError: what has the name of our hidden folder isn't ours.
    """
    work = run / WORK_NAME
    if os.path.lexists(work):
        if not staging.is_marked(work, work, exactly=False):  # a run folder may be moved to another machine
            raise InputError(f"{work} wasn't made by this script; move it away.")
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


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


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
def writable(folder: Path):
    """Makes a folder if there is none, and tries it; what it has made goes again if the block fails.

    Raises:
        InputError: it can't be written to.
    """
    with ExitStack() as stack:
        try:
            new = stack.enter_context(staging.made(folder))
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise InputError(f"can't write to {folder}: {error.strerror}.") from None
        yield new


def no_space(folder: Path, error: Exception) -> str:
    free = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
    return (
        f"can't write to {folder}, where {free / 1e6:,.0f} MB are free: {first_line(error)}; make room and try again."
    )


@contextmanager
def no_space_in_one_line(run: Path):
    """
    Raises:
        InputError: the block can't write to the folder of a run.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # the second: torch
        raise InputError(no_space(run, error)) from None


@contextmanager
def output_folder(folder: Path, script: str, files: dict[str, Iterable[str]]):
    """Makes `folder` for the block, and takes it away again if the block fails and has written nothing to it.

    Args:
        script: its name, which it writes into records.
        files: what the block may write, by the record that tells who wrote it: JSON with a `command` that begins with
            the script, or a figure that names it as its software.

    Raises:
        InputError: it can't be written to, or has such a file that isn't the script's own.
    """
    with writable(folder):
        for record, names in files.items():
            for name in names:
                path = folder / name
                if os.path.lexists(path) and (path.is_symlink() or not was_written_by(script, folder / record)):
                    raise InputError(f"{path} wasn't written by {script}; move it away, or choose another --output.")
        yield


def was_written_by(script: str, record: Path) -> bool:
    try:
        if record.suffix == ".json":
            command = reading.read_json(record).get("command")
            return isinstance(command, list) and command[:1] == [script]
        with reading.open_regular(record) as file:
            return f"Software\0{script}".encode() in file.read(4096)
    except InputError:
        return False
