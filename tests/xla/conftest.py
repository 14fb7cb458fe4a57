"""Every test of this folder runs in forks that import torch-xla: XLA's runtime, once started, stays in its process."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def _pjrt_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host plays the TPU; what torch-xla starts when it is imported would be lost in forks.

    Graphs run once or twice here: optimizing them takes three times the time of everything else.
    """
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    assert "torch_xla" not in sys.modules
