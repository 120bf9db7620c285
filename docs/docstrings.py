# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Docstrings as the reference shows them: those in transformers' style become Google's, and names in brackets links."""

import ast
import inspect
import re
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

from griffe import Docstring, Extension, GriffeLoader, Module, Object


NAME = re.compile(r"\[`(~?)([\w.]+)`\](?![(\[])")
# name (`type`, *optional*, defaults to `value`):
ARGUMENT = re.compile(r"^( +)(\w+) \(`([^`]+)`(?:, \*optional\*)?(?:, defaults to (.+))?\):$", flags=re.MULTILINE)


# Identifiers of the reference by the names of what they stand for
ENTRIES = {
    name.rpartition(".")[2]: name
    for page in sorted(Path(__file__).parent.glob("reference/*.md"))
    for name in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
}


class Docstrings(Extension):
    def on_package(self, *, pkg: Module, loader: GriffeLoader, **kwargs):
        add_computed(pkg, loader)
        self.walk(pkg)

    def walk(self, obj: Object):
        if obj.docstring is not None:
            text = ARGUMENT.sub(google_argument, obj.docstring.value)
            obj.docstring.value = NAME.sub(lambda match: link(match, obj), text)
        for member in obj.members.values():
            if not member.is_alias:
                self.walk(member)


def google_argument(match: re.Match) -> str:
    indent, name, kind, default = match.groups()
    with suppress(SyntaxError, ValueError):
        ast.literal_eval((default or "None").strip("`"))
        default = None  # which the signature says
    return f"{indent}{name} ({kind}):" + (f" Default: {default}." if default else "")


def link(match: re.Match, obj: Object) -> str:
    """A link if the reference has an entry of that name, otherwise the name alone."""
    is_short, name = match[1], match[2]
    first, *rest = name.split(".")
    while obj is not None and (first not in obj.members or obj.members[first].is_alias):
        obj = obj.parent
    path = ENTRIES.get(first, first) if obj is None else obj.members[first].path
    shown = rest[-1] if is_short and rest else name
    return f'<autoref optional identifier="{".".join([path, *rest])}"><code>{shown}</code></autoref>'


def add_computed(module: Module, loader: GriffeLoader):
    """Gives classes the docstrings that they compute from those of others: `__doc__ = f"..."`."""
    known = {}
    for node in ast.parse(module.filepath.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef):
            continue
        known[node.name] = SimpleNamespace(__doc__=ast.get_docstring(node, clean=False))
        for line in node.body:
            if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "__doc__":
                text = inspect.cleandoc(eval(ast.unparse(line.value), known))
                of_class = module.members[node.name]
                parser = {"parser": loader.docstring_parser, "parser_options": loader.docstring_options}
                of_class.docstring = Docstring(text, lineno=node.lineno, parent=of_class, **parser)
