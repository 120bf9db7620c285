# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""What setup.py promises about versions is what the tests run with."""

import re
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
