# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""That the comparison with donors and the support table can fail. The comparison itself runs in `make conformance`."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest


HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "benchmarks")]

import conformance  # noqa: E402
import support_table  # noqa: E402


def test_outcomes_are_recorded(tmp_path):
    """A failed subtest fails its test; a skipped one is counted; reasons are kept."""
    (tmp_path / "suite.py").write_text("""
import unittest

class Tests(unittest.TestCase):
    def test_passes(self):
        pass

    def test_fails(self):
        self.fail("on purpose")

    def test_skips(self):
        self.skipTest("no accelerator")

    def test_subtests(self):
        for number in range(4):
            with self.subTest(number=number):
                if number > 1:
                    self.skipTest("large")

    def test_failed_subtest(self):
        for number in range(2):
            with self.subTest(number=number):
                self.assertEqual(number, 0)
""")
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "--outcomes", "outcomes.json", "suite.py"]
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 1, result.stdout + result.stderr
    tests = json.loads((tmp_path / "outcomes.json").read_text())["Tests"]
    assert {name: (test["outcome"], test["skipped_subtests"]) for name, test in tests.items()} == {
        "test_passes": ("passed", 0),
        "test_fails": ("failed", 0),
        "test_skips": ("skipped", 0),
        "test_subtests": ("passed", 2),
        "test_failed_subtest": ("failed", 0),
    }
    assert "on purpose" in tests["test_fails"]["message"] and "no accelerator" in tests["test_skips"]["message"]


def outcome(name: str, skipped_subtests: int = 0) -> dict:
    return {"outcome": name, "skipped_subtests": skipped_subtests, "seconds": 1.0, "message": f"it {name}"}


# what the donor did, what AttnRes did, whether that is worse
COMPARED = {
    "both_pass": (outcome("passed"), outcome("passed"), False),
    "fails": (outcome("passed"), outcome("failed"), True),
    "is_skipped": (outcome("passed"), outcome("skipped"), True),
    "fails_instead_of_skipped": (outcome("skipped"), outcome("failed"), True),
    "skips_more_subtests": (outcome("passed", 1), outcome("passed", 2), True),
    "skips_fewer_subtests": (outcome("passed", 2), outcome("passed", 1), False),
    "runs_more": (outcome("skipped"), outcome("passed"), False),
    "donor_fails_too": (outcome("failed"), outcome("failed"), False),
}


def test_comparison(monkeypatch):
    """What AttnRes does worse is a regression unless it is an exception, and an exception that is none is reported."""
    outcomes = {
        f"{side}_llama": {name: compared[index] for name, compared in COMPARED.items()}
        for index, side in enumerate(("donor", "attnres"))
    }
    row = conformance.compare("llama", outcomes)
    assert set(row["regressions"]) == {name for name, compared in COMPARED.items() if compared[2]}
    assert row["donor"] == {"failed": 1, "skipped": 2, "passed": 5, "failures": ["donor_fails_too"]}
    assert row["exceptions"] == {} and row["stale_exceptions"] == []

    exceptions = {"fails": {"llama": "one reason"}, "is_skipped": {"*": "another"}, "both_pass": {"llama": "none"}}
    monkeypatch.setattr(conformance, "EXCEPTIONS", {**exceptions, "runs_more": {"qwen2": "not of Llama"}})
    row = conformance.compare("llama", outcomes)
    assert row["exceptions"] == {"fails": "one reason", "is_skipped": "another"}
    assert row["stale_exceptions"] == ["both_pass"]
    assert set(row["regressions"]) == {"fails_instead_of_skipped", "skips_more_subtests"}


def test_tests_of_another_transformers_are_refused(tmp_path):
    """The archive's code is compared with the installed one before its tests are used."""
    installed = (Path(conformance.transformers.__file__).parent / "modeling_utils.py").read_bytes()
    for name, code in (("same", installed), ("other", installed + b"#")):
        with tarfile.open(tmp_path / f"{name}.tar.gz", "w:gz") as archive:
            for path, content in (("src/transformers/modeling_utils.py", code), ("tests/test_a.py", b"a = 1\n")):
                member = tarfile.TarInfo(f"transformers-1.0/{path}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        (tmp_path / name).mkdir()
    conformance.unpack_tests(tmp_path / "same.tar.gz", tmp_path / "same")
    assert (tmp_path / "same" / "test_a.py").read_bytes() == b"a = 1\n"
    assert (tmp_path / "same" / "generation" / "test_utils.py").is_file()
    with pytest.raises(SystemExit, match="modeling_utils.py is not that of transformers"):
        conformance.unpack_tests(tmp_path / "other.tar.gz", tmp_path / "other")


@pytest.mark.parametrize("script", [conformance, support_table], ids=["conformance", "support_table"])
def test_help(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    assert "--output" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        (["--families", "llama,olmo2"], "unknown family olmo2; choose from llama"),
        (["--processes", "0"], "--processes must be at least 1"),
    ],
    ids=["family", "processes"],
)
def test_bad_options(options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        conformance.main(options)
    assert message in capsys.readouterr().err


def test_support_table(tmp_path, monkeypatch):
    """The table is filled in place from measured rows; a family that fails is shown and makes the command fail."""
    counts = {"donor": {"passed": 9}, "regressions": {}, "exceptions": {}, "versions": {"transformers": "5"}}
    right = {"different_tokens": 0, "logprob_error": 2e-5}
    good = support_table.measure("llama", counts, {"block": right, "full": right})
    assert support_table.is_supported(good) and 0 < good["error"] <= 3e-6 and good["last_loss"] < good["first_loss"]
    assert support_table.markdown([good]).splitlines()[-1].endswith("| yes | yes | yes, 2e-05 | 9 of 9 |")
    monkeypatch.setattr(support_table, "ERROR_BOUND", good["error"] / 2)
    bad = support_table.measure("llama", {**counts, "regressions": {"test_a": "it failed"}})
    assert not bad["exact"] and not support_table.is_supported(bad)
    assert "| no, " in support_table.markdown([bad]) and "8 of 9" in support_table.markdown([bad])
    excepted = {**good, "conformance": {"donor_passes": 9, "worse": 1, "exceptions": {"test_a": "the reason"}}}
    assert support_table.is_supported(excepted) and "`test_a`: the reason" in support_table.markdown([excepted])
    assert not support_table.is_supported({**good, "conformance": None})

    page = tmp_path / "page.md"
    page.write_text("before\n<!-- support -->\nold\n<!-- /support -->\nafter\n")
    support_table.fill(page, "support", "new")
    support_table.fill(page, "support", "newer")
    assert page.read_text() == "before\n<!-- support -->\nnewer\n<!-- /support -->\nafter\n"
    page.write_text("no marks\n")
    with pytest.raises(ValueError, match="must have the lines"):
        support_table.fill(page, "support", "new")
