# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Parts of Markdown files that scripts write, each between `<!-- name -->` and `<!-- /name -->`."""

from pathlib import Path


def _split(file: Path, name: str) -> tuple[str, str, str]:
    """What is before the part, the part, and what is after it, the marks left with their neighbours."""
    text = file.read_text(encoding="utf-8")
    start, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"{file} must have the lines {start.strip()} and {end.strip()} once each.")
    before, rest = text.split(start)
    part, after = rest.split(end)
    return before + start, part, end + after


def section(file: Path, name: str) -> str:
    """What is in the part `name` of a file.

    Raises:
        ValueError: the marks aren't there, or more than once; so does [`fill`].
    """
    return _split(file, name)[1]


def fill(file: Path, name: str, content: str):
    """Replaces what is in the part `name` of a file."""
    before, _, after = _split(file, name)
    file.write_text(before + content + after, encoding="utf-8")
