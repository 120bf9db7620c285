# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Kills a conversion with SIGKILL before each of its file operations in turn, each time in a process of its own.

    python tests/convert_kill_sweep.py SRC WORK OPTIONS

WORK/dst holds what was there before, if anything, in WORK/before. Prints one JSON line per kill: the operation, whether
dst is absent, as before, as after or broken, then the same after another run that cleans up, and what else is in WORK.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from attnres_convert.conversion import convert_checkpoint
from attnres_convert.staging import recover


OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "shutil.rmtree")


def kill_before(number, work):
    """Kills this process before file operation `number` inside `work`; files opened for reading don't count."""
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        if event not in OPERATIONS or not str(arguments[0]).startswith(str(work)):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if seen == number:
            (work.parent / "operation").write_text(f"{event} {Path(str(arguments[0])).name}")
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    sys.addaudithook(hook)


def in_child(function):
    """Runs `function` in a forked process; whether it was killed."""
    child = os.fork()
    if child == 0:
        try:
            function()
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise SystemExit("the conversion failed")
    return os.WIFSIGNALED(status)


def content(folder):
    if not folder.exists():
        return None
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def state(dst, before, after):
    found = content(dst)
    if found is None:
        return "absent"
    return "before" if found == before else "after" if found == after else "broken"


def main():
    src, work, options = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    before, dst = work.parent / "before", work / "dst"

    def prepare():
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        if before.exists():
            shutil.copytree(before, dst)

    def convert():
        convert_checkpoint(src, dst, verify=False, **options)

    prepare()
    in_child(convert)
    expected = content(before), content(dst)
    for number in range(1000):
        prepare()
        if not in_child(lambda: (kill_before(number, work), convert())):  # noqa: B023
            return
        line = {"operation": (work.parent / "operation").read_text(), "killed": state(dst, *expected)}
        in_child(lambda: recover(dst))
        line |= {"recovered": state(dst, *expected), "left": sorted(os.listdir(work))}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
