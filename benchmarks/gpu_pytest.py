# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""A plugin of pytest with which benchmarks/gpu.py runs tests: none of them disturbs what is timed."""

import pytest
from gpu_worker import Gate


GATE = Gate()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol():
    with GATE():
        return (yield)
