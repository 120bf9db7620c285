# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Where the JSON files of a model name code that transformers would load: only code of the same folder comes along."""

import json
import re
from collections.abc import Collection, Iterator

from .checkpoint import ConversionError


AUTO_MAP, PIPELINES = "auto_map", "custom_pipelines"
REFERENCE = re.compile(r"([A-Za-z_]\w*)\.[A-Za-z_]\w*", re.ASCII)
# Of a configuration; transformers takes an owner/name for a kernel on the Hub
IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def local_code(content: dict, files: Collection[str], name: str) -> tuple[dict, list[str]]:
    """`content` without references to code that is not in the folder, and a warning for each that was there.

    Args:
        content: of a JSON file.
        files: names of all files of the folder that come along.
        name: of the JSON file, for messages.
    """
    kept, warnings = dict(content), []
    for field in (AUTO_MAP, PIPELINES):
        foreign = [reference for reference in _references(content.get(field)) if not _is_local(reference, files)]
        if foreign:
            del kept[field]
            text = json.dumps(foreign[0])[:80]
            warnings.append(f"{name}: left out {field}, as {text} is no class in a Python file of the folder.")
    return kept, warnings


def check_implementations(config: dict, name: str) -> None:
    """
    Raises:
        ConversionError: a configuration has transformers load a kernel from the Hub.
    """
    for field in IMPLEMENTATIONS:
        if "/" in json.dumps(config.get(field)):
            raise ConversionError(f"{name}: {field} names code of the Hub, {config[field]}; remove it.")


def _references(value) -> Iterator:
    """What an `auto_map` or `custom_pipelines` names; a value of a wrong type is one of its own."""
    if value is None:
        return
    if not isinstance(value, dict):
        yield value
        return
    for inner in value.values():
        inner = inner.get("impl") if isinstance(inner, dict) else inner
        # a slow and a fast tokenizer, of which one may be absent
        yield from (part for part in inner if part is not None) if isinstance(inner, list) else [inner]


def _is_local(reference, files: Collection[str]) -> bool:
    found = REFERENCE.fullmatch(reference) if isinstance(reference, str) else None
    return found is not None and f"{found[1]}.py" in files
