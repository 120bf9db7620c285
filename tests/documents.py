# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""What tests look for in Markdown pages."""

import re
from collections import Counter


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def headings(text: str) -> list[str]:
    """The names that GitHub gives to the headings of a page, by which links lead to them."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    text = re.sub(r"^ *(```+).*?^ *\1", "", text, flags=re.MULTILINE | re.DOTALL)
    names, seen = [], Counter()
    for title in re.findall(r"^#+ +(.*?)#*$", text, flags=re.MULTILINE):
        title = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title)
        name = re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
        names.append(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return names
