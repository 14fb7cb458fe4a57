"""DeepSpeed is imported once: ranks are forks of the process of the tests, and need not import it anew."""

from __future__ import annotations

import importlib
import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def _imported() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    importlib.import_module("deepspeed")
