"""What every logger offers."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from treadle_fabric.rank_zero import rank_zero_only

if TYPE_CHECKING:
    from torch.nn import Module

__all__ = ["DummyExperiment", "DummyLogger", "Logger", "rank_zero_experiment"]


class Logger(ABC):
    """Writes metrics and hyper-parameters somewhere; on rank 0 only."""

    @property
    @abstractmethod
    def name(self) -> str | None:
        """The name of the experiment."""

    @property
    @abstractmethod
    def version(self) -> int | str | None:
        """Which run of the experiment this is."""

    @property
    def root_dir(self) -> str | None:
        """The folder above all experiments; None for a logger that keeps no files."""
        return None

    @property
    def log_dir(self) -> str | None:
        """The folder of this run; None for a logger that keeps no files."""
        return None

    @property
    def save_dir(self) -> str | None:
        """The name that the trainer's users know for ``root_dir``."""
        return self.root_dir

    @property
    def group_separator(self) -> str:
        """What stands between the prefix and the name of a metric."""
        return "/"

    @abstractmethod
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Record values.

        Args:
            metrics: Numbers, or tensors of one element.
            step: The step that they belong to.
        """

    @abstractmethod
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Record the settings of the run: a mapping, a ``Namespace`` or a dataclass."""

    def log_graph(self, model: Module, input_array: Any | None = None) -> None:
        """Record the graph of ``model``; by default nothing happens."""

    def save(self) -> None:
        """Write what is still held in memory; by default nothing is."""

    def finalize(self, status: str) -> None:
        """The run is over, with ``status`` "success", "failed" or "finished"; by default nothing happens."""

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """A checkpoint callback has saved; by default nothing happens."""


class DummyExperiment:
    """Swallows every call. Ranks other than 0 get it, so that code which uses the experiment runs everywhere."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _nothing

    def __getitem__(self, index: Any) -> DummyExperiment:
        return self

    def __setitem__(self, index: Any, value: Any) -> None:
        return None


class DummyLogger(Logger):
    """Stands in for the logger where nothing should be written. It has every method, and none does anything."""

    def __init__(self) -> None:
        self._experiment = DummyExperiment()

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def experiment(self) -> DummyExperiment:
        """An object that swallows every call."""
        return self._experiment

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        return None

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        return None

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _nothing

    def __getitem__(self, index: int) -> DummyLogger:
        return self


def _nothing(*_: Any, **__: Any) -> None:
    return None


def rank_zero_experiment(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Decorate an ``experiment`` property: rank 0 gets the real one, any other rank one that swallows every call."""

    @functools.wraps(fn)
    def experiment(self: Any) -> Any:
        return fn(self) if getattr(rank_zero_only, "rank", 0) == 0 else DummyExperiment()

    return experiment
