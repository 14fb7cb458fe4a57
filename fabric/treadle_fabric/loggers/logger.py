"""The base class of all loggers, and loggers that write nothing."""

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
    """The base class of loggers, which write metrics and hyper-parameters, on rank 0 only."""

    @property
    @abstractmethod
    def name(self) -> str | None:
        """The name of the experiment."""

    @property
    @abstractmethod
    def version(self) -> int | str | None:
        """The number or the name of this run of the experiment."""

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
        """The same as :attr:`root_dir`, under the name that the trainer's users know."""
        return self.root_dir

    @property
    def runs_dir(self) -> str | None:
        """The folder that has the runs which this logger may go on in; None: those of its name in ``save_dir``."""
        return None

    @property
    def group_separator(self) -> str:
        """The separator between the prefix and the name of a metric."""
        return "/"

    @abstractmethod
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Record metrics.

        Args:
            metrics: Numbers, or tensors of one element, by name.
            step: The step that the values belong to.
        """

    @abstractmethod
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Record the settings of the run: a mapping, a ``Namespace`` or a dataclass."""

    def log_graph(self, model: Module, input_array: Any | None = None) -> None:
        """Record the graph of ``model``; by default nothing happens."""

    def save(self) -> None:
        """Write what is still held in memory; by default nothing happens."""

    def finalize(self, status: str) -> None:
        """Close the logger after a run with ``status`` "success", "failed" or "finished". Default: nothing happens."""

    def begin_anew(self) -> None:
        """Begin another run, such as the next fold of a cross-validation, in a version of its own.

        Default: nothing happens, so that the values go where they went before.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of this logger: which run it writes, and how far. Default: nothing.

        Called on rank 0, after :meth:`save`. Plain containers only.
        """
        return {}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on in the run that ``state`` names, before anything is written.

        What that run has of later steps than the checkpoint is superseded: a reader sees each step once, as in a run
        that was never interrupted. Every rank calls this method, before a hook of the fit runs; what is written changes
        with the next value, and not before. Default: nothing happens, and the values go into the run that this logger
        has.

        Args:
            state: What :meth:`state_dict` returned when the checkpoint was saved. A trainer adds ``checkpoint``, its
                path, and ``global_step``, the optimizer steps that had been made.
        """

    def supersede_nothing(self) -> None:
        """Keep all that the resumed run has, because nothing is trained again after all. Default: nothing happens."""

    def branch(self, state: Mapping[str, Any]) -> None:
        """Begin a run of its own that names the run in ``state`` as its parent, and leave that run untouched.

        Every rank calls this method, before a hook of the fit runs. Default: nothing happens.

        Args:
            state: As for :meth:`resume`.
        """

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Called after a checkpoint callback has saved; by default nothing happens."""


class DummyExperiment:
    """An experiment that ignores every call. Ranks other than 0 get it, so that the same code runs on every rank."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _nothing

    def __getitem__(self, index: Any) -> DummyExperiment:
        return self

    def __setitem__(self, index: Any, value: Any) -> None:
        return None


class DummyLogger(Logger):
    """A logger that writes nothing: it has every method, and no method does anything."""

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
        """An object that ignores every call."""
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
    """Decorate an ``experiment`` property: rank 0 gets the experiment, any other rank one that ignores every call."""

    @functools.wraps(fn)
    def experiment(self: Any) -> Any:
        return fn(self) if getattr(rank_zero_only, "rank", 0) == 0 else DummyExperiment()

    return experiment
