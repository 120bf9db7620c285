# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
import os

import pytest
import transformers


def pytest_addoption(parser):
    parser.addoption("--part", default="1/1", metavar="K/N", help="of the chosen tests every N-th, from the K-th")


@pytest.hookimpl(trylast=True)  # when marks have chosen
def pytest_collection_modifyitems(config, items):
    part, num_parts = map(int, config.getoption("--part").split("/"))
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items, start=1) if (i - part) % num_parts])
    items[:] = items[part - 1 :: num_parts]


VERBOSITY = transformers.utils.logging.get_verbosity()


@pytest.fixture(autouse=True)
def same_verbosity():
    """Scripts that run inside a test's process, or in a fixture of a whole file, quieten transformers, which the next
    test must not inherit."""
    yield
    transformers.utils.logging.set_verbosity(VERBOSITY)


@pytest.fixture(autouse=True)
def same_environment():
    """What a test sets in the environment ends with it: processes that a later test starts would inherit it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
