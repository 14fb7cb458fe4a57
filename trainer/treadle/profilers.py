"""Profilers, which are still to come."""

from typing import TYPE_CHECKING

from treadle_fabric import not_yet

__all__: list[str] = []

if not TYPE_CHECKING:  # which tell of any other name
    __getattr__ = not_yet(
        __name__,
        {"AdvancedProfiler", "PassThroughProfiler", "Profiler", "PyTorchProfiler", "SimpleProfiler", "XLAProfiler"},
    )
