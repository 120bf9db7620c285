# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Commands of a clone as its user runs them, in processes forked from one that has imported the libraries.

The scripts and their library are imported in the fork: they are those of the clone.
"""

import multiprocessing
import os
import runpy
import sys
from multiprocessing import forkserver
from pathlib import Path


def packages(place: Path, folder: Path) -> Path:
    """Makes a folder that lets Python find the scripts' library of a clone before the one that is installed."""
    folder.mkdir(exist_ok=True)
    (folder / "attnres_recipes").unlink(missing_ok=True)
    (folder / "attnres_recipes").symlink_to(place / "scripts" / "recipes")
    return folder


def command(place: Path, arguments: list[str], outputs: tuple[Path, Path], library: Path):
    assert not any(name.startswith("attnres_recipes") for name in sys.modules)
    sys.path.insert(0, str(library))
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.chdir(place)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(place / Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")


class CommandServer:
    """Runs commands; logs lie in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
        self.stop()  # another test's fork server has other modules
        self.context = multiprocessing.get_context("forkserver")
        libraries = ["attnres", "datasets", "evaluate", "matplotlib.pyplot", "transformers.trainer", "command_process"]
        self.context.set_forkserver_preload(libraries)

    @staticmethod
    def stop():
        forkserver._forkserver._stop()

    def run(self, place: Path, *arguments, seconds: float = 200) -> tuple[int, str, str]:
        """The exit code of `python ARGUMENTS` in the folder `place`, and what it has written to both outputs."""
        outputs = self.folder / "stdout", self.folder / "stderr"
        library = packages(place, self.folder / "packages")
        process = self.context.Process(target=command, args=(place, list(map(str, arguments)), outputs, library))
        process.start()
        process.join(seconds)
        timed_out = process.exitcode is None
        process.kill()
        process.join()
        assert not timed_out, arguments
        return process.exitcode, *(path.read_text(encoding="utf-8") for path in outputs)
