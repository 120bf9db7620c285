# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Records what became of each test, with every subtest, in a JSON file."""

import json
from pathlib import Path


def pytest_addoption(parser):
    parser.addoption("--outcomes", type=Path, help="JSON file that receives the outcome of each test")


class OutcomeRecorder:
    """`{class: {test: {"outcome": ..., "skipped_subtests": ..., "message": ...}}}`; a failed subtest fails its test."""

    def __init__(self, path: Path):
        self.path = path
        self.outcomes = {}

    def pytest_runtest_logreport(self, report):
        class_name, test = report.nodeid.split("::")[1:3]
        tests = self.outcomes.setdefault(class_name, {})
        entry = tests.setdefault(test, {"outcome": "passed", "skipped_subtests": 0, "seconds": 0.0})
        entry["seconds"] = round(entry["seconds"] + report.duration, 2)
        is_subtest = hasattr(report, "context")
        if report.failed:
            entry["outcome"] = "failed"
            entry.setdefault("message", report.longreprtext)
        elif report.skipped and is_subtest:
            entry["skipped_subtests"] += 1
        elif report.skipped and entry["outcome"] == "passed":
            entry["outcome"] = "skipped"
            entry["message"] = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)

    def pytest_sessionfinish(self):
        self.path.write_text(json.dumps(self.outcomes, indent=1))


def pytest_configure(config):
    # a plain `pytest` finds this file too late for the option to exist
    if path := config.getoption("--outcomes", default=None):
        config.pluginmanager.register(OutcomeRecorder(path))
