"""Tests of kernels: persistent programs process several tiles, and tuning tries one config."""

import pytest
import triton  # noqa: F401  after the root's conftest, which decides whether kernels are compiled
from dsv3_ref.kernels import launch
from triton.runtime.autotuner import Autotuner


@pytest.fixture(autouse=True)
def two_sms_and_the_first_config(monkeypatch):
    """On a GPU as in the interpreter; the benchmark tries all configs on all multiprocessors."""
    prune = Autotuner.prune_configs
    monkeypatch.setattr(launch, "SM_LIMIT", 2)
    monkeypatch.setattr(Autotuner, "prune_configs", lambda self, kwargs: prune(self, kwargs)[:1])
