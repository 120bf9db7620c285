# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""What MkDocs doesn't do by itself: the repository's other pages and files are in the site, and parts of the reference
are made from the code.

In the site's sources each file has the path that it has in the repository, so that links mean the same in both. Pages
of `docs` lose that folder's name in their address; the README is the first page, and others at the root are in
`project`.
"""

import ast
import importlib
import io
import logging
import os
import posixpath
import re
import runpy
import sys
import tempfile
import typing
from contextlib import redirect_stdout, suppress
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from unittest.mock import patch
from urllib.parse import unquote, urlsplit, urlunsplit

from markdown.extensions import Extension
from markdown.treeprocessors import Treeprocessor
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files, InclusionLevel


ROOT = Path(__file__).resolve().parents[1]
OTHER_PAGES = ("*.md", "results/**/*.md", "model_cards/**/*.md", "examples/**/*.md")
PACKAGES = {"attnres_convert": "convert", "attnres_recipes": "scripts/recipes", "attnres_commands": "scripts"}
WATCHED = ("results", "model_cards", "convert", "scripts")  # besides `docs`, while pages are written
WIDTH = 100  # of what commands print
log = logging.getLogger("mkdocs.hooks")
packages = tempfile.TemporaryDirectory(prefix="attnres-docs-")


def on_startup(command: str, dirty: bool):
    """Gives this checkout's packages their names, whatever is installed."""
    for name, folder in PACKAGES.items():
        (Path(packages.name) / name).symlink_to(ROOT / folder, target_is_directory=True)
    sys.path[:0] = [packages.name, str(ROOT)]


def on_shutdown():
    packages.cleanup()


@event_priority(100)  # before mkdocstrings, which reads it
def on_config(config):
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [packages.name, str(ROOT)]
    config.nav = list(expanded(config.nav))
    config.watch += [str(path) for path in (*ROOT.glob("*.md"), *ROOT.glob("*.py"), *map(ROOT.joinpath, WATCHED))]
    return config


def expanded(items: list) -> list:
    """The navigation with the pages that a pattern finds, and without those that aren't there."""
    for item in items:
        title, value = next(iter(item.items())) if isinstance(item, dict) else (None, item)
        if isinstance(value, list):
            yield {title: list(expanded(value))}
        elif "*" in value:
            yield from sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(value))
        elif (ROOT / value).is_file():
            yield item
        else:
            log.info("The navigation's %s isn't there.", value)


def address(path: str) -> str:
    """Where a file of the repository is in the site."""
    if path == "README.md":
        return "index.html"
    folder, name = posixpath.split(path)
    stem, suffix = posixpath.splitext(name)
    if suffix == ".md":
        stem = stem.lower() if not folder else "index" if stem == "README" else stem
        suffix = ".html"
    return posixpath.join(folder or "project", stem + suffix).removeprefix("docs/")


def new_file(config, path: str, inclusion: InclusionLevel = InclusionLevel.UNDEFINED) -> File:
    file = File.generated(config, path, abs_src_path=str(ROOT / path), inclusion=inclusion)
    file.dest_uri = address(path)
    return file


def on_files(files: Files, config) -> Files:
    of_theme = [file for file in files if file.src_dir != config.docs_dir]
    own = [f"docs/{file.src_uri}" for file in files if file.src_dir == config.docs_dir and file.inclusion.is_included()]
    others = sorted({path.relative_to(ROOT).as_posix() for pattern in OTHER_PAGES for path in ROOT.glob(pattern)})
    files = Files([*of_theme, *(new_file(config, path) for path in own + others)])
    config.markdown_extensions.append(LinksOfRepository(files, config))
    return files


class LinksOfRepository(Extension):
    """Lets links of pages lead to all that is in the repository."""

    def __init__(self, files: Files, config):
        super().__init__()
        self.files, self.config = files, config
        self.page = None

    def extendMarkdown(self, md):  # noqa: N802
        processor = Treeprocessor(md)
        processor.run = self.run
        md.treeprocessors.register(processor, "links_of_repository", 1)  # just before MkDocs looks at them

    def run(self, root):
        for element in root.iter():
            name = {"a": "href", "img": "src"}.get(element.tag)
            if url := element.get(name):
                element.set(name, self.resolved(url))

    def resolved(self, url: str) -> str:
        """A link to a folder as one to its README; what else a link leads to becomes a file of the site."""
        parts = urlsplit(url)
        if parts.scheme or parts.netloc or not parts.path or parts.path.startswith(("/", "\x02")):
            return url
        target = posixpath.normpath(posixpath.join(posixpath.dirname(self.page.file.src_uri), unquote(parts.path)))
        if target.startswith("..") or self.files.get_file_from_path(target):
            return url
        if self.files.get_file_from_path(posixpath.join(target, "README.md")):
            return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/README.md"))
        if (ROOT / target).is_file() and not target.endswith(".md"):
            self.files.append(new_file(self.config, target, InclusionLevel.INCLUDED))
        return url


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    for extension in config.markdown_extensions:
        if isinstance(extension, LinksOfRepository):
            extension.page = page
    path = page.file.src_uri
    if not path.startswith("docs/"):
        page.meta = {}  # of a card, for the Hub
    if not re.search(r"^# ", markdown, flags=re.MULTILINE):  # a table alone
        page.meta["title"] = path.removeprefix("results/").removesuffix(".md").replace("/", ": ")
    return re.sub(r"^<!-- generated: (\w+) ?(\w*) -->$", generated, markdown, flags=re.MULTILINE)


def generated(mark: re.Match) -> str:
    """What stands for a mark `<!-- generated: what name -->` of a page."""
    return {"commands": commands, "families": families, "fields": fields_of}[mark[1]](*filter(None, [mark[2]]))


@cache
def commands() -> str:
    """A section for each command, with what it prints when it is asked for help."""
    sections = []
    with patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    for entry in setup.call_args.kwargs["entry_points"]["console_scripts"]:
        name, module, function = re.split(" = |:", entry)
        text = io.StringIO()
        with (
            patch.dict(os.environ, COLUMNS=str(WIDTH), NO_COLOR="1"),
            patch.object(sys, "argv", [name]),
            redirect_stdout(text),
            suppress(SystemExit),
        ):
            getattr(importlib.import_module(module), function)(["--help"])
        sections.append(f"## {name}\n\n```text\n{text.getvalue().strip()}\n```\n")
    return "\n".join(sections)


@cache
def families() -> str:
    """The classes of each family: configuration, model, and the donor's class that it extends."""
    classes = {}
    for name in ("configuration_attnres.py", "families_attnres.py"):
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                classes[node.name] = [ast.unparse(base) for base in node.bases]
    configs = (name for name in classes if name.endswith("Config") and name != "AttnResConfig")
    rows = ["| donor's configuration | configuration | model | causal language model |", "| --- | --- | --- | --- |"]
    for config in sorted(configs, key=str.lower):
        stem = config.removesuffix("Config")
        names = [name for name in (f"{stem}{kind}" for kind in ("Config", "Model", "ForCausalLM")) if name in classes]
        rows.append("| " + " | ".join(f"`{name}`" for name in (classes[config][-1], *names)) + " |")
    return "\n".join(rows)


@cache
def fields_of(name: str) -> str:
    """The fields of a class of options."""
    kind = getattr(importlib.import_module("attnres_recipes.options"), name)
    hints, parser = typing.get_type_hints(kind), importlib.import_module("attnres_recipes.parser")
    known = {field.name: field for field in fields(kind)}
    rows = ["| field | type | default | what it is |", "| --- | --- | --- | --- |"]
    for _, group in parser.grouped(kind):
        for field in group:
            default = parser.default_of(known[field.name])
            default = "must be given" if default is MISSING else f"`{default!r}`"
            text = field.metadata["help"].replace("%%", "%")
            rows.append(f"| `{field.name}` | `{type_name(hints[field.name])}` | {default} | {text} |")
    return "\n".join(rows)


def type_name(hint) -> str:
    """`int | None` and the like, as one writes it."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(f'"{value}"' for value in inner)
    if typing.get_origin(hint) is list:
        return f"list[{type_name(inner[0])}]"
    if inner:
        return " | ".join(map(type_name, inner))
    return "None" if hint is type(None) else hint.__name__
