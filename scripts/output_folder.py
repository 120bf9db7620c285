# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The folder that a script writes to in the end, tried at the beginning."""

import os
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

from attnres_convert import InputError, reading
from training_run import RunError, writable


@contextmanager
def output_folder(folder: Path, script: str, files: dict[str, Iterable[str]]):
    """Makes `folder` for the block, and takes it away again if the block fails and has written nothing to it.

    Args:
        script: its name, which it writes into records.
        files: what the block may write, by the record that tells who wrote it: JSON with a `command` that begins with
            the script, or a figure that names it as its software.

    Raises:
        RunError: it can't be written to, or has such a file that isn't the script's own.
    """
    with writable(folder):
        for record, names in files.items():
            for name in names:
                path = folder / name
                if os.path.lexists(path) and (path.is_symlink() or not was_written_by(script, folder / record)):
                    raise RunError(f"{path} wasn't written by {script}; move it away, or choose another --output.")
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
