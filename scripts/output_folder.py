# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The folder that a script writes to in the end, tried at the beginning."""

import os
from contextlib import contextmanager, suppress
from pathlib import Path

from training_run import make_writable


@contextmanager
def output_folder(folder: Path):
    """Makes `folder` for the block, and takes it away again if the block fails and has written nothing to it.

    Raises:
        RunError: it can't be written to.
    """
    made = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        make_writable(folder)
        yield
    except BaseException:
        with suppress(OSError):  # what isn't empty stays
            for path in made:
                path.rmdir()
        raise
