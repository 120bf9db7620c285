# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The kernels for CPUs, compiled for fewer instructions than the processor has, so that any machine tests all."""

import ctypes
import functools
import platform
import shlex

import pytest
import torch

from attnres_kernels import cpu


# vectors of all that there is, of AVX2 and of SSE; elsewhere there is one kind
INSTRUCTIONS = [""]
if platform.machine() == "x86_64":
    INSTRUCTIONS += (
        ["-mno-avx512f", "-mno-avx"] if "AVX512" in torch.backends.cpu.get_cpu_capability() else ["-mno-avx"]
    )
needs_compiler = pytest.mark.skipif(cpu.compiler() is None, reason="needs a C++ compiler")


@functools.cache
def compiled_for(flags: str) -> ctypes.CDLL:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", shlex.join([*cpu.compiler_words(), *flags.split()]))
        return cpu.library.__wrapped__()


def use_instructions(flags: str, patch: pytest.MonkeyPatch):
    library = compiled_for(flags)
    patch.setattr(cpu, "library", lambda: library)
