# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
import os

import pytest
import transformers


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
