"""Profilers: how long the parts of a run take, from Python's and from PyTorch's point of view.

Start with ``profiler.py``: what a profiler is, and what wraps functions once where a run has one. ``simple.py``,
``advanced.py`` and ``pytorch.py`` (with ``layer_names.py`` and ``operator_table.py``) measure; ``xla.py`` marks what
runs for torch-xla's profiler; ``passthrough.py`` does nothing; ``report.py`` lays out tables. ``memory.py`` records
memory on CUDA devices. ``choose.py`` reads the Trainer's argument. The package imports nothing of the trainer:
profilers work in Fabric loops.
"""

from typing import TYPE_CHECKING

from treadle.profilers.advanced import AdvancedProfiler
from treadle.profilers.memory import MemorySnapshot
from treadle.profilers.passthrough import PassThroughProfiler
from treadle.profilers.profiler import Profiler
from treadle.profilers.pytorch import PyTorchProfiler
from treadle.profilers.simple import SimpleProfiler
from treadle_fabric import on_demand

if TYPE_CHECKING:
    from treadle.profilers.xla import XLAProfiler

__all__ = [
    "AdvancedProfiler",
    "MemorySnapshot",
    "PassThroughProfiler",
    "Profiler",
    "PyTorchProfiler",
    "SimpleProfiler",
    "XLAProfiler",
]

if not TYPE_CHECKING:
    __getattr__ = on_demand(__name__, {"XLAProfiler": "treadle.profilers.xla"})  # few programs use it
