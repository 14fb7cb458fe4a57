"""The base of the loggers that write to a tracking service through the service's own client."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

from treadle_fabric.loggers.logger import Logger, rank_zero_experiment
from treadle_fabric.loggers.saved_checkpoints import SavedCheckpoint, SavedCheckpoints
from treadle_fabric.rank_zero import rank_zero_only

__all__ = ["ServiceLogger"]


class ServiceLogger(Logger):
    """The base class of loggers whose values go to a run of a tracking service.

    The client is imported, and the run begun, when something is first logged. A copy of the logger goes on in the same
    run, which it opens anew.

    Args:
        prefix: Put before each name.
        log_model: Which checkpoints are sent: False, True or "all".
        run: The service's name for a run that the user has chosen; None: a new run.

    Raises:
        MisconfigurationException: ``log_model`` is something else.
    """

    def __init__(self, prefix: str | None, log_model: bool | Literal["all"], run: str | None) -> None:
        self._prefix = prefix or ""
        self._checkpoints = SavedCheckpoints(log_model)
        self._run = run  # what the service calls the run; None as long as that is not known
        self._chosen = run is not None  # by the user, so that no checkpoint and no new beginning changes it
        self._begun = False  # the run is there, and is opened again
        self._parent: str | None = None
        self._experiment: Any = None  # the client's object; never pickled
        self._unfinished: list[Any] = []  # what the client sends in the background; never pickled

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The client's object for the run, on rank 0; the run is begun when it is first needed."""
        if self._experiment is None:
            self._experiment = self._open()
            self._begun = True
            if self._parent is not None:
                self._name_parent(self._parent)
        return self._experiment

    def state_dict(self) -> dict[str, Any]:
        """Return the names of the run, of what it belongs to, and of the run that it branched from."""
        if self._run is None:
            return {}
        return {"run": self._run, "belongs_to": self.name, "parent": self._parent}

    @rank_zero_only
    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on in the run that ``state`` names.

        The service keeps what that run has of later steps than the checkpoint; see docs/loggers.md. Where the user has
        named another run in the constructor, that one is a branch (:meth:`branch`).
        """
        run = state.get("run")
        if run is None or run == self._run:
            return
        if self._chosen:
            self.branch(state)
            return
        self._close("finished")
        self._experiment = None
        self._run, self._parent, self._begun = run, state.get("parent"), True

    @rank_zero_only
    def branch(self, state: Mapping[str, Any]) -> None:
        """Begin a run of its own that names the run in ``state`` as its parent."""
        parent = state.get("run")
        if parent is None:
            return
        if parent == self._run:
            self.begin_anew()
        if parent == self._run:  # the user's choice
            return
        self._parent = parent
        if self._experiment is not None:
            self._name_parent(parent)

    def begin_anew(self) -> None:
        """Begin another run, unless the user has named the run."""
        if self._chosen:
            return
        self._close("finished")
        self._experiment = None
        self._run, self._parent, self._begun = None, None, False

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        for checkpoint in self._checkpoints.saved(checkpoint_callback):
            self._send(checkpoint)

    def _send_remaining(self, status: str) -> None:
        """Send the checkpoints that wait for the end of a run; a run that failed sends none."""
        for checkpoint in self._checkpoints.remaining() if status != "failed" else ():
            self._send(checkpoint)

    @abstractmethod
    def _open(self) -> Any:
        """Begin the run, or open it again where it has begun, set ``_run``, and return the client's object."""

    @abstractmethod
    def _close(self, status: str) -> None:
        """End the run in the client, if it is open."""

    @abstractmethod
    def _name_parent(self, parent: str) -> None:
        """Record in the open run which run it branched from."""

    @abstractmethod
    def _send(self, checkpoint: SavedCheckpoint) -> None:
        """Send a checkpoint to the service."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_experiment": None, "_unfinished": []}
