# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The processes of benchmarks/gpu.py: workers that obey commands, and how all share one device.

Run as `python gpu_worker.py MODULE`, it calls functions of the module as it is told, one line of JSON after the other.
"""

import fcntl
import importlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace


BENCHMARKS = Path(__file__).resolve().parent
SETTINGS = "ATTNRES_GPU"  # environment variable of every process


def settings() -> SimpleNamespace:
    """What benchmarks/gpu.py was told: device, tiny, folder (of results and locks), deadline."""
    return SimpleNamespace(**json.loads(os.environ[SETTINGS]))


def first_line(error: BaseException) -> str:
    return next(iter(f"{type(error).__name__}: {error}".splitlines()))[:300]


class Gate:
    """Lets processes use the device together, or one of them alone while it measures time, in the order in which they
    come. What a killed process held is free."""

    def __init__(self):
        folder = Path(settings().folder)
        names = ("first", "door", "room")
        self.first, self.door, self.room = (open(folder / f".{name}.lock", "a") for name in names)  # noqa: SIM115
        self.inside = False

    @contextmanager
    def before_timing(self):
        """Nobody has the device alone, nor keeps others out to get it, before the block has ended."""
        fcntl.flock(self.first, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self.first, fcntl.LOCK_UN)

    def enter(self, alone: bool = False):
        if self.inside:
            return
        if alone:
            fcntl.flock(self.first, fcntl.LOCK_SH)
            fcntl.flock(self.first, fcntl.LOCK_UN)
        fcntl.flock(self.door, fcntl.LOCK_EX)  # who waits for the room keeps the door closed to others
        fcntl.flock(self.room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(self.door, fcntl.LOCK_UN)
        self.inside = True

    def leave(self):
        if self.inside:
            torch = sys.modules.get("torch")
            if torch is not None and torch.cuda.is_initialized():
                torch.cuda.synchronize()
            fcntl.flock(self.room, fcntl.LOCK_UN)
            self.inside = False

    @contextmanager
    def __call__(self, alone: bool = False):
        self.enter(alone)
        try:
            yield
        finally:
            self.leave()


class WorkerError(Exception):
    """A worker's command failed; the message is one line. `is_gone` says whether the worker has ended."""

    def __init__(self, message: str, is_gone: bool = False):
        super().__init__(message)
        self.is_gone = is_gone


class Worker:
    """A process that calls functions of a module, one at a time. Commands can be sent before the last has ended."""

    def __init__(self, module: str, environment: dict[str, str] | None = None):
        self.process = subprocess.Popen(
            [sys.executable, str(BENCHMARKS / "gpu_worker.py"), module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self.replies, self.waiting = queue.SimpleQueue(), 0
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.process.stdout:
            self.replies.put(json.loads(line))
        self.replies.put(None)

    def send(self, function: str, **arguments):
        self.waiting += 1
        try:
            self.process.stdin.write(json.dumps({"function": function, "arguments": arguments}) + "\n")
            self.process.stdin.flush()
        except OSError:  # it has ended, which `receive` says
            pass

    def receive(self, timeout: float):
        """What the first command returned that has not been received yet.

        Raises:
            WorkerError: it failed or took longer, or the process ended.
        """
        try:
            reply = self.replies.get(timeout=max(timeout, 0))
        except queue.Empty:
            self.close()
            raise WorkerError(f"no answer within {timeout:.0f} s", is_gone=True) from None
        self.waiting -= 1
        if reply is None:
            self.replies.put(None)
            raise WorkerError(f"the process ended with {self.process.wait()}", is_gone=True)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply["result"]

    def call(self, function: str, timeout: float, **arguments):
        self.send(function, **arguments)
        return self.receive(timeout)

    def close(self):
        self.process.kill()
        self.process.wait()


class Pool:
    """Workers that take tasks from a list. They import at once; one in which the device has failed is replaced."""

    def __init__(self, module: str, count: int, environment: dict[str, str] | None = None):
        self.new_worker = partial(Worker, module, environment)
        self.workers = [self.new_worker() for _ in range(count)]

    def call(self, function: str, timeout: float, index: int = 0, **arguments):
        """Lets one worker call a function; see [`Worker.receive`]."""
        try:
            return self.workers[index].call(function, timeout, **arguments)
        except WorkerError as error:
            if error.is_gone or "CUDA error" in str(error) or "AcceleratorError" in str(error):
                self.workers[index].close()  # nothing works in a process after such an error
                self.workers[index] = self.new_worker()
            raise

    def run(self, function: str, tasks: list[dict], done: Callable, most_seconds: float):
        """Calls a function with the arguments of each task, and `done(task, result, failure, seconds)`, one at a
        time, with what it returned or a line why it didn't."""
        todo, lock = list(tasks), threading.Lock()

        def work(index):
            while True:
                with lock:
                    if not todo:
                        return
                    task = todo.pop(0)
                started, result, failure = time.monotonic(), None, None
                try:
                    result = self.call(function, min(most_seconds, seconds_left()), index, **task)
                except WorkerError as error:
                    failure = str(error)
                with lock:
                    done(task, result, failure, time.monotonic() - started)

        side_by_side([partial(work, index) for index in range(len(self.workers))])

    def close(self):
        for worker in self.workers:
            worker.close()


def serve(module: str):
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print goes to the log
    functions = importlib.import_module(module)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            reply = {"result": getattr(functions, command["function"])(**command["arguments"])}
        except Exception as error:
            traceback.print_exc()
            reply = {"error": first_line(error)}
            del error  # and what its frames hold
        print(json.dumps(reply), file=answers, flush=True)
    os._exit(0)  # the device's own threads take their time


class Results:
    """What a stage has found so far, in a file after each change. `failures` are lines that name what went wrong."""

    def __init__(self, stage: str, **content):
        self.path = Path(settings().folder) / f"{stage}.json"
        self.content = {**content, "failures": []}
        self.lock = threading.RLock()
        self.write()

    def write(self):
        with self.lock:
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.content, default=str), encoding="utf-8")
            partial.replace(self.path)

    def set(self, **content):
        with self.lock:
            self.content |= content
            self.write()

    def add(self, name: str, *rows):
        with self.lock:
            self.content.setdefault(name, []).extend(rows)
            self.write()

    def fail(self, line: str):
        print(line, file=sys.stderr, flush=True)
        self.add("failures", line)


def side_by_side(functions):
    """Calls functions at the same time, each in a thread."""
    with ThreadPoolExecutor(len(functions)) as pool:
        for future in [pool.submit(function) for function in functions]:
            future.result()


def waiting_compile(before_run):
    """`torch.compile`, which calls `before_run` before what has been compiled runs: so processes that compile needn't
    keep others from the device. On a CPU, whose compiler takes too long for a rehearsal, nothing but traces."""
    import torch
    from torch._dynamo import lookup_backend
    from torch._inductor.compile_fx import compile_fx

    torch._functorch.config.force_non_lazy_backward_lowering = True  # the backward pass too, before anything runs

    def compile(model, mode=None):
        options = torch._inductor.list_mode_options(mode) if mode else {}

        def backend(graph, inputs):
            if settings().device == "cpu":
                run = lookup_backend("aot_eager")(graph, inputs)
            else:
                run = compile_fx(graph, inputs, config_patches=options)

            def waiting_run(*arguments):
                before_run()
                return run(*arguments)

            return waiting_run

        return torch.compile(model, backend=backend)

    return compile


def seconds_left() -> float:
    return settings().deadline - time.time()


if __name__ == "__main__":
    sys.path[:0] = [str(BENCHMARKS.parent), str(BENCHMARKS)]
    serve(sys.argv[1])
