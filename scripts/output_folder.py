# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The folder that a script writes to in the end, tried at the beginning."""

import os
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

from training_run import RunError


@contextmanager
def output_folder(folder: Path):
    """Makes `folder` for the block, and takes it away again if the block fails and has written nothing to it.

    Raises:
        RunError: it can't be written to.
    """
    made = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise RunError(f"can't write to {folder}: {error.strerror}.") from None
        yield
    except BaseException:
        with suppress(OSError):  # what isn't empty stays
            for path in made:
                path.rmdir()
        raise
