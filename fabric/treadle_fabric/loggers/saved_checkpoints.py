"""Which files of a checkpoint callback a logger sends to its service, and when."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Literal

from treadle_fabric.errors import MisconfigurationException

__all__ = ["SavedCheckpoint", "SavedCheckpoints"]

_SETTINGS = ("monitor", "mode", "save_last", "save_top_k", "save_weights_only", "every_n_epochs")


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that a callback has saved.

    Args:
        path: A file or a folder, local or an fsspec URL.
        score: The value of the monitored metric; None without one.
        best: Whether it is the best so far.
        settings: What the callback monitors and keeps.
    """

    path: str
    score: float | None
    best: bool
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """The name of the file."""
        return os.path.basename(self.path.rstrip("/"))

    @property
    def stem(self) -> str:
        """The name of the file without its extension."""
        return os.path.splitext(self.name)[0]

    @property
    def aliases(self) -> list[str]:
        """The names under which services find this version: "latest", and "best" if it is."""
        return ["latest", "best"] if self.best else ["latest"]

    @property
    def metadata(self) -> dict[str, Any]:
        """The score, the name of the file, and the settings of the callback."""
        return {"score": self.score, "original_filename": self.name, "ModelCheckpoint": self.settings}

    @contextlib.contextmanager
    def local(self) -> Generator[str]:
        """Give a path on the local disk; a remote checkpoint is copied for as long as that takes."""
        if "://" not in self.path:
            yield self.path
            return
        import fsspec  # heavy

        fs, source = fsspec.url_to_fs(self.path)
        folder = tempfile.mkdtemp(prefix="treadle-checkpoint-")
        try:
            target = os.path.join(folder, self.name)
            fs.get(source, target, recursive=fs.isdir(source))
            yield target
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class SavedCheckpoints:
    """Remembers what was sent, so that each checkpoint is sent once, when it is due.

    Args:
        log_model: False: none is sent. True: those that are there at the end of the run; at once where the callback
            keeps all. "all": each one when it was saved.

    Raises:
        MisconfigurationException: ``log_model`` is something else.
    """

    def __init__(self, log_model: bool | Literal["all"]) -> None:
        if log_model not in (True, False, "all"):
            raise MisconfigurationException(f"log_model={log_model!r} must be True, False or 'all'.")
        self.log_model = log_model
        self._callbacks: list[Any] = []
        self._sent: dict[str, float | None] = {}  # path: when it was written, or its score if that is not known

    def saved(self, callback: Any) -> list[SavedCheckpoint]:
        """Take notice that a callback has saved, and return what to send now."""
        if self.log_model == "all" or (self.log_model is True and callback.save_top_k == -1):
            return self._new(callback)
        if self.log_model and all(callback is not known for known in self._callbacks):
            self._callbacks.append(callback)
        return []

    def remaining(self) -> list[SavedCheckpoint]:
        """Return what to send at the end of a run."""
        return [checkpoint for callback in self._callbacks for checkpoint in self._new(callback)]

    def _new(self, callback: Any) -> list[SavedCheckpoint]:
        scores = dict(getattr(callback, "best_k_models", {}))
        for path, score in (
            (callback.last_model_path, getattr(callback, "current_score", None)),
            (callback.best_model_path, callback.best_model_score),
        ):
            if path and path not in scores:
                scores[path] = score
        settings = {name: getattr(callback, name, None) for name in _SETTINGS}
        found = []
        for path, score in scores.items():
            if (written := _written(path)) is None:
                continue
            number = None if score is None else float(score)
            stamp = written if written >= 0 else number
            if path not in self._sent or self._sent[path] != stamp:
                self._sent[path] = stamp
                checkpoint = SavedCheckpoint(path, number, path == callback.best_model_path, settings)
                found.append((written, checkpoint))
        return [checkpoint for _, checkpoint in sorted(found, key=lambda pair: pair[0])]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_callbacks": []}  # a copy hears of its own callbacks


def _written(path: str) -> float | None:
    """Return when a local file or folder was written, -1 for one elsewhere, None for one that is gone."""
    if "://" in path:
        return -1.0
    try:
        return os.path.getmtime(path)
    except OSError:
        return None
