# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
import pytest


def mostly_slow(values, *quick) -> list:
    """Parameters of a test: `make test` takes those in `quick`, and `make test-slow` the others."""
    values = list(values)
    assert set(quick) <= set(values)
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]
