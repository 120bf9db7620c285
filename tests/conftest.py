# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
import pytest
import transformers


@pytest.fixture(autouse=True)
def same_verbosity():
    """Scripts that run inside a test's process quieten transformers, which the next test must not inherit."""
    verbosity = transformers.utils.logging.get_verbosity()
    yield
    transformers.utils.logging.set_verbosity(verbosity)
