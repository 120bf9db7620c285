# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""What setup.py promises about versions is what the tests run with, and what it builds is whole."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
BOUNDS = dict(re.findall(r'"([\w-]+)>=([\d.]+)', (ROOT / "setup.py").read_text(encoding="utf-8")))


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(re.findall(r"^([\w-]+)==([\d.]+)", "\n".join(reversed(lines)), flags=re.MULTILINE))


def version(text: str) -> tuple[int, ...]:
    numbers = [int(number) for number in text.split(".")]
    while numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def build(folder: Path, *command: str):
    """With the setuptools that is installed, as isolated builds would download it."""
    run = subprocess.run([sys.executable, "setup.py", "-q", *command], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("package", ["transformers", "huggingface_hub", "safetensors", "accelerate", "peft"])
def test_oldest_versions_are_tested(package):
    """`make test-oldest` runs with the lower bounds."""
    assert version(pins("constraints-oldest.txt")[package]) == version(BOUNDS[package])


def test_newest_versions_are_tested():
    """The others run with versions that the bounds allow."""
    newest = pins("constraints.txt")
    checked = [package for package in BOUNDS if package in newest]
    assert len(checked) > 10
    for package in checked:
        assert version(newest[package]) >= version(BOUNDS[package]), package


def test_the_source_distribution_is_whole(tmp_path):
    """The wheel that is built out of it has each file of code that a clone installs, and neither has what is lying
    around in one."""
    ignored = shutil.ignore_patterns(
        ".git", ".venv*", "outputs", "build", "dist", "*.egg-info", "model_cards", "results"
    )
    shutil.copytree(ROOT, tmp_path / "clone", ignore=ignored)
    for name in ("outputs/run/model.py", "scripts/recipes/junk.tmp", "tests/test_junk.py", "examples/outputs/x.bin"):
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clone" / name).touch()
    build(tmp_path / "clone", "sdist")
    (archive,) = (tmp_path / "clone" / "dist").glob("attnres-*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    source = tmp_path / archive.name.removesuffix(".tar.gz")
    there = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    assert {"LICENSE", "README.md", "CITATION.cff", "constraints.txt", "examples/captain.jsonl"} <= there
    folders = ("attnres_kernels", "convert", "scripts", "serving", "examples", "benchmarks")
    tracked = [path for name in folders for path in (ROOT / name).rglob("*")] + [*ROOT.glob("*.py")]
    code = {path.relative_to(ROOT).as_posix() for path in tracked if path.suffix in (".py", ".cpp", ".html", ".yaml")}
    assert code <= there
    strange = [name for name in there if name.startswith(("tests/", "outputs/", "results/")) or "junk" in name]
    assert strange == [] and not [name for name in there if name.endswith((".bin", ".pyc"))]

    build(source, "bdist_wheel")
    (wheel,) = (source / "dist").glob("attnres-*.whl")
    with zipfile.ZipFile(wheel) as opened:
        installed = set(opened.namelist())
        about = next(opened.read(name).decode() for name in installed if name.endswith("/METADATA"))
    names = {"convert": "attnres_convert", "scripts/recipes": "attnres_recipes", "serving": "attnres_serving"}
    for folder in ("attnres_kernels", *names):
        for name in code:
            if name.startswith(f"{folder}/"):
                assert names.get(folder, folder) + name.removeprefix(folder) in installed
    assert {path.name for path in ROOT.glob("*attnres.py")} <= installed
    assert any(name.endswith("licenses/LICENSE") for name in installed)
    assert re.search(r"^License(-Expression)?: Apache-2.0$", about, flags=re.MULTILINE) and "Python :: 3.13" in about


def test_one_version():
    """That of the package, of the citation and of the changelog's newest entry."""
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("attnres.py", "CITATION.cff", "CHANGELOG.md")}
    (package,) = re.findall(r'^__version__ = "(.+)"', texts["attnres.py"], flags=re.MULTILINE)
    assert re.findall(r"^version: (.+)", texts["CITATION.cff"], flags=re.MULTILINE) == [package]
    released = re.search(r"^date-released: (.+)", texts["CITATION.cff"], flags=re.MULTILINE)[1]
    newest = next(
        entry for entry in re.findall(r"^## (.+)", texts["CHANGELOG.md"], flags=re.MULTILINE) if entry[0] != "U"
    )
    assert newest == f"{package} - {released}"
