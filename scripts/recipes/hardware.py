# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""What a machine is; it needs nothing but Python."""

import platform
import re
from contextlib import suppress
from pathlib import Path


def cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def has_bfloat16() -> bool | None:
    """Whether the processor has instructions for bfloat16, without which float32 is faster; None if nothing tells."""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", text) is not None
    return None
