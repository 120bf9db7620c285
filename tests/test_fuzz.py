# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Damaged folders of all kinds, see fuzzing.py: a result or one line, never a traceback, a hang or something left."""

import json
import shutil

import fuzzing
import pytest


@pytest.fixture(autouse=True, scope="module")
def without_leftovers():
    yield
    shutil.rmtree(fuzzing.originals())
    fuzzing.originals.cache_clear()


@pytest.mark.parametrize(("target", "damage"), fuzzing.committed())
def test_known_damages(target, damage):
    """What once did something else is a result or one line."""
    fuzzing.check(target, damage)


@pytest.mark.parametrize("target", fuzzing.TARGETS)
def test_sound_folders_give_results(target):
    """Without damage there is no message, so what the others test isn't refused for some other reason."""
    assert fuzzing.check(target, []) is None


@pytest.mark.slow
@pytest.mark.parametrize("target", fuzzing.TARGETS)
def test_made_up_damages(target):
    """The same few on every run; `make fuzz` makes up more."""
    fuzzing.search(target, 3 if target in fuzzing.SLOW else 15, number=0)


def test_a_fault_is_found(monkeypatch):
    """A target that fails at one field is found out, with the damage that makes it fail."""

    def run(folder):
        if json.loads((folder / "config.json").read_text())["hidden_size"] != 40:
            raise KeyError("hidden_size")

    monkeypatch.setitem(fuzzing.TARGETS, "convert", (run, "donor"))
    with pytest.raises(fuzzing.Fault, match=r"(?s)hidden_size|config.json.*Error"):
        fuzzing.search("convert", 500, number=0)
