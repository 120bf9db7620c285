# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""What reports of all scripts are made of; it needs nothing but Python."""

import json
import platform
import secrets
from contextlib import suppress
from pathlib import Path


def cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def write_text(path: Path, text: str):
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes):
    """The file appears complete or not at all; a link that has its name is replaced, not followed."""
    partial = path.with_name(f".{path.name}.attnres-tmp-{secrets.token_hex(4)}")
    with open(partial, "xb") as file:
        try:
            file.write(content)
            file.close()
            partial.replace(path)
        except BaseException:
            partial.unlink()
            raise


def write_json(path: Path, content: dict):
    write_text(path, json_text(content))


def json_text(content: dict) -> str:
    return json.dumps(content, indent=1, default=str) + "\n"


def table(rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; the first row is the heading, all columns but the first hold numbers."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rule = ("-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:]))
    lines = []
    for first, *others in (rows[0], rule, *rows[1:]):
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:]))]
        lines.append("| " + " | ".join(cells) + " |\n")
    return "".join(lines)
