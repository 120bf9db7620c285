# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""What a machine is; it needs nothing but Python."""

import platform
from contextlib import suppress
from pathlib import Path


def cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
