# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Files that appear complete or not at all, as text, JSON and Markdown tables of numbers; it needs nothing but
Python."""

import json
import secrets
from pathlib import Path


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
    """As transformers writes JSON, in the order of `content`."""
    return json.dumps(content, indent=2, default=str) + "\n"


def decimals(value: float, digits: int = 4, sign: str = "") -> str:
    """A number with so many decimals; what rounds to zero has no sign.

    Args:
        sign: "+" for a difference.
    """
    rounded = round(value, digits)
    return f"{rounded:{sign}.{digits}f}" if rounded else f"{0:.{digits}f}"


def table(rows: list[tuple[str, ...]], aligned: bool = True) -> str:
    """A Markdown table; the first row is the heading.

    Args:
        aligned: all columns but the first hold numbers.
    """
    rows = [tuple(cell.replace("|", "\\|") for cell in row) for row in rows]
    widths = [max(len(row[column]) if aligned else 0 for row in rows) for column in range(len(rows[0]))]
    rule = ("-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])) if aligned else ("---",) * len(widths)
    lines = []
    for first, *others in (rows[0], rule, *rows[1:]):
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:]))]
        lines.append("| " + " | ".join(cells) + " |\n")
    return "".join(lines)
