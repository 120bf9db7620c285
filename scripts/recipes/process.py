# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Processes of a run: how they were launched, what they run on, and how they end."""

import ctypes
import importlib.util
import logging
import os
import platform
import re
import resource
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from attnres_convert import InputError, reading

from .hardware import cpu_name
from .optim import uses_deepspeed


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


def tensor_parallel_size() -> int:
    """How many processes share each layer; 1 where `accelerate launch` wasn't told."""
    return int(os.environ.get("PARALLELISM_CONFIG_TP_SIZE", "1"))


def data_processes() -> int:
    """How many processes there are that train on batches of their own: those that share a layer have the same."""
    return max(1, PartialState().num_processes // tensor_parallel_size())


def launched() -> dict:
    """How `accelerate launch` started this process; a run goes on as it began."""
    sharding = [name for name in ("FSDP", "DeepSpeed") if os.environ.get(f"ACCELERATE_USE_{name.upper()}") == "true"]
    if tensor_parallel_size() > 1:
        sharding.append(f"tensor parallelism in {tensor_parallel_size()}")
    return {"processes": PartialState().num_processes, "sharding": sharding[0] if sharding else None}


def versions() -> dict[str, str]:
    packages = ("attnres", "torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy", "peft")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return {
        "python": platform.python_version(),
        **{name: import_module(name).__version__ for name in packages},
        "device": device,
        "threads": torch.get_num_threads(),
    }


def peak_memory() -> int:
    """Bytes: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def start_process() -> PartialState:
    """Joins the other processes of a launch, and leaves the terminal to the script."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # or a killed launcher's processes would go on, and keep the run folder
        end_with_parent()
    is_cpu = not torch.accelerator.is_available()
    options = {"cpu": is_cpu}
    if uses_deepspeed():
        if importlib.util.find_spec("deepspeed") is None:
            if os.environ.get("RANK", "0") != "0":
                end_without_a_word()
            raise SystemExit("ZeRO-3 needs DeepSpeed: pip install deepspeed, or use FSDP2.")
        if is_cpu:
            # accelerate leaves out DeepSpeed where it is told to use the CPU; where it isn't, DeepSpeed finds the CPU
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
            options = {"backend": "gloo"}
    # the others wait for the main process to prepare the data
    state = PartialState(**options, timeout=timedelta(hours=3))
    quieten_libraries()
    # nothing changes in place what the embedding, the layers and the head return
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(.+\) returned a view")
    return state


def quieten_libraries():
    """What is wrong shows as an error."""
    import datasets  # not what a trainer alone needs

    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


@contextmanager
def command(name: str, interrupted: str = "") -> Iterator[None]:
    """Ends a command that is interrupted or whose input is bad with one line.

    Args:
        name: of the script.
        interrupted: what is said of it then.
    """
    quieten_libraries()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of libraries
    try:
        with reading.no_panic():
            yield
    except InputError as error:
        raise SystemExit(f"{name}: {error}") from None
    except KeyboardInterrupt:
        if interrupted:
            print(f"{name}: interrupted; {interrupted}", file=sys.stderr)
        raise SystemExit(130) from None


@contextmanager
def enough_memory() -> Iterator[None]:
    """
    Raises:
        InputError: the block needs more memory than there is, or a library in Rust fails in it.
    """
    try:
        with reading.no_panic():
            yield
    except (MemoryError, RuntimeError) as error:
        while isinstance(error.__cause__, (MemoryError, RuntimeError)):  # of a pipeline's stage
            error = error.__cause__
        if isinstance(error, MemoryError) or re.search("(can't|not) allocate memory|out of memory", str(error)[:1000]):
            advice = "choose a smaller --batch-size or --seq-len, or --gradient-checkpointing"
            raise InputError(f"there isn't enough memory: {reading.reason(error)}; {advice}.") from None
        raise
