"""The logger that writes metrics to ``metrics.csv``, one row per step, and hyper-parameters to ``hparams.yaml``."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Iterator, Mapping
from typing import IO, Any

from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.loggers.hyperparameters import to_dict, to_yaml
from treadle_fabric.loggers.logger import rank_zero_experiment
from treadle_fabric.loggers.run_folder import FolderLogger, RunFolder
from treadle_fabric.loggers.scalars import add_prefix, to_numbers
from treadle_fabric.rank_zero import rank_zero_only, rank_zero_warn
from treadle_fabric.types import PathLike

__all__ = ["CSVLogger", "ExperimentWriter"]


class CSVLogger(FolderLogger):
    """Writes ``metrics.csv`` and ``hparams.yaml`` into ``root_dir/name/version_n``.

    Values logged at the same step share a row. If an earlier run left a ``metrics.csv`` in the folder, that file is
    renamed first, with a warning.

    Args:
        root_dir: The folder above all experiments, a local path or an fsspec URL.
        name: The experiment's name; with None or "" the runs lie in ``root_dir`` itself.
        version: A number n for ``version_n``, or the folder's name as a string. Default: the next free number.
        prefix: Put before the name of each metric, with a ``/`` between them. Default: none.
        flush_logs_every_n_steps: Rows are written to the file after this many steps, or this many calls. Default: 100.
        save_dir: Another name for ``root_dir``.

    Raises:
        MisconfigurationException: No folder is given, or ``flush_logs_every_n_steps`` is below 1.
    """

    _experiment: ExperimentWriter | None

    def __init__(
        self,
        root_dir: PathLike | None = None,
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
        *,
        save_dir: PathLike | None = None,
    ) -> None:
        if flush_logs_every_n_steps < 1:
            raise MisconfigurationException(
                f"flush_logs_every_n_steps={flush_logs_every_n_steps} must be 1 or more. 1 writes at every step."
            )
        super().__init__(RunFolder(root_dir, name, version, save_dir=save_dir))
        self._prefix = prefix
        self._flush_every = flush_logs_every_n_steps
        self._calls = 0
        self._flushed_at = 0

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer of the files."""
        if self._experiment is None:
            self._experiment = ExperimentWriter(self._folder)
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        writer: ExperimentWriter = self.experiment
        step = writer.log_metrics(add_prefix(metrics, self._prefix, self.group_separator), step)
        self._calls += 1
        if self._calls >= self._flush_every or step + 1 - self._flushed_at >= self._flush_every:
            writer.save()
            self._calls, self._flushed_at = 0, step + 1

    @rank_zero_only
    def log_hyperparams(self, params: Any = None, *args: Any, **kwargs: Any) -> None:
        self.experiment.log_hparams(to_dict(params))

    def begin_anew(self) -> None:
        self._renew()
        self._calls = self._flushed_at = 0

    @rank_zero_only
    def save(self) -> None:
        if self._experiment is not None:
            self._experiment.save()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()


class ExperimentWriter:
    """Keeps the rows of ``metrics.csv`` that are not written yet, and writes them.

    Args:
        folder: The folder that the files go to.
    """

    METRICS = "metrics.csv"
    HPARAMS = "hparams.yaml"

    def __init__(self, folder: RunFolder) -> None:
        self.hparams: dict[str, Any] = {}
        self._folder = folder
        self._hparams_changed = False
        self._columns: dict[str, None] = {"step": None}
        self._pending: dict[int, dict[str, Any]] = {}
        self._step = -1
        self._file: str | None = None  # the local file, and for a remote folder the local copy
        self._is_copy = False
        self._steps: set[int] = set()  # the steps that have a row in the file
        self._last: tuple[int, dict[str, Any]] | None = None  # the last row in the file: step and values
        self._last_offset = 0
        self._size = 0

    @property
    def metrics_file_path(self) -> str:
        """The path of ``metrics.csv``."""
        return self._folder.file(self.METRICS)

    def log_hparams(self, params: Mapping[str, Any]) -> None:
        """Add hyper-parameters."""
        self.hparams.update(params)
        self._hparams_changed = True

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> int:
        """Add values to the row of ``step`` (None: the step after the last one), and return the step."""
        numbers = to_numbers(metrics)
        self._step = step = self._step + 1 if step is None else int(step)
        row = self._pending.setdefault(step, {})
        for name, value in numbers.items():
            if isinstance(value, Mapping):
                row.update({f"{name}/{key}": inner for key, inner in value.items()})
            else:
                row[name] = value
        row["step"] = step
        return step

    def save(self) -> None:
        """Write the rows and the hyper-parameters that are not written yet."""
        if self._hparams_changed:
            self._folder.write(self.HPARAMS, to_yaml(self.hparams).encode())
            self._hparams_changed = False
        if not self._pending:
            return
        if self._file is None:
            self._file = self._start()
        columns = self._columns | dict.fromkeys(name for row in self._pending.values() for name in row)
        known = self._pending.keys() & self._steps
        if self._last is not None:
            known.discard(self._last[0])
        if known or len(columns) > len(self._columns) or not self._size:
            self._rewrite(self._file, columns)
        else:
            self._append(self._file)
        self._steps.update(self._pending)
        self._pending = {}
        if self._is_copy:
            self._folder.upload(self._file, self.METRICS)

    def _start(self) -> str:
        aside = self._folder.set_aside(self.METRICS)
        if aside is not None:
            rank_zero_warn(
                f"{self.metrics_file_path!r} is there already, from an earlier run: it is now called {aside!r}. "
                "Leave out `version` to give each run a folder of its own."
            )
        folder = self._folder.local_path()
        if folder is None:
            folder = tempfile.mkdtemp(prefix="treadle-csv-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            self._is_copy = True
        return os.path.join(folder, self.METRICS)

    def _append(self, path: str) -> None:
        """Append the new rows to the file; a new row of the same step as the last row is merged into that row."""
        rows = dict(self._pending)
        start = self._size
        if self._last is not None and self._last[0] in rows:
            step, values = self._last
            rows = {step: values | rows.pop(step), **rows}
            start = self._last_offset
        chunks = [_encode(row, self._columns) for row in rows.values()]
        with open(path, "r+b") as file:
            file.seek(start)
            file.write(b"".join(chunks))
            file.truncate()
        self._remember(list(rows.items())[-1], start + sum(map(len, chunks)), len(chunks[-1]))

    def _rewrite(self, path: str, columns: dict[str, None]) -> None:
        """Write a new file with all columns beside the old file, and move it into the old file's place."""
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"
        try:
            with open(temporary, "xb") as file:
                size = file.write(_encode(dict(zip(columns, columns)), columns))
                for row in self._all_rows(path):
                    line = _encode(row, columns)
                    size += file.write(line)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            raise
        self._columns = columns
        self._remember((int(row["step"]), row), size, len(line))

    def _all_rows(self, path: str) -> Iterator[dict[str, Any]]:
        rows = dict(self._pending)
        if self._size:
            with open(path, newline="", encoding="utf-8") as file:
                for old in csv.DictReader(file):
                    yield old | rows.pop(int(old["step"]), {})
        yield from rows.values()

    def _remember(self, last: tuple[int, dict[str, Any]], size: int, length: int) -> None:
        self._last, self._size, self._last_offset = last, size, size - length


def _encode(row: Mapping[str, Any], columns: Mapping[str, None]) -> bytes:
    line: IO[str] = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow([row.get(name, "") for name in columns])
    line.seek(0)
    return line.read().encode("utf-8", "backslashreplace")
