# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The command in processes of its own that can be stopped and killed, forked from one that has done the imports."""

import multiprocessing
import os
import resource
import sys
import time

from attnres_convert.cli import main


PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["attnres_convert.conversion", "attnres_convert.report"])


def run(arguments, error_file, file_limit):
    descriptor = os.open(error_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, sys.stderr.fileno())
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.exit(main(arguments))


def start(*arguments, error_file, file_limit=None):
    """A running `attnres-convert`. Its standard error goes to a file; `file_limit` bounds what it writes, in bytes."""
    process = PROCESSES.Process(target=run, args=([str(argument) for argument in arguments], error_file, file_limit))
    process.start()
    return process


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.002)
