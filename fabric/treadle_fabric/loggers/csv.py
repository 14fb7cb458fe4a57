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
from typing import Any, NamedTuple

from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.loggers.hyperparameters import keep_entries, to_dict, to_yaml
from treadle_fabric.loggers.logger import rank_zero_experiment
from treadle_fabric.loggers.rewinding import JOURNAL, Journal, cut_journal, encode, holds_rows, rewind
from treadle_fabric.loggers.run_folder import FolderLogger, RunFolder
from treadle_fabric.loggers.scalars import add_prefix, to_numbers
from treadle_fabric.rank_zero import rank_zero_only, rank_zero_warn
from treadle_fabric.types import PathLike

__all__ = ["CSVLogger", "ExperimentWriter"]


class CSVLogger(FolderLogger):
    """Writes ``metrics.csv`` and ``hparams.yaml`` into ``save_dir/name/version_n``.

    Values logged at the same step share a row. If an earlier run left a ``metrics.csv`` in the folder, that file is
    renamed first, with a warning; a run that goes on (:meth:`resume`) goes on in its file.

    Args:
        save_dir: The folder above all experiments, a local path or an fsspec URL.
        name: The experiment's name; with None or "" the runs lie in ``save_dir`` itself.
        version: A number n for ``version_n``, or the folder's name as a string. Default: the next free number.
        prefix: Put before the name of each metric, with a ``-`` between them. Default: none.
        flush_logs_every_n_steps: Rows are written to the file after this many steps, or this many calls. Default: 100.
        root_dir: Another name for ``save_dir``.

    Raises:
        MissingArgumentError: No folder is given.
        MisconfigurationException: Two folders are given, or ``flush_logs_every_n_steps`` is below 1.
    """

    _experiment: ExperimentWriter | None

    def __init__(
        self,
        save_dir: PathLike | None = None,
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
        *,
        root_dir: PathLike | None = None,
    ) -> None:
        if flush_logs_every_n_steps < 1:
            raise MisconfigurationException(
                f"flush_logs_every_n_steps={flush_logs_every_n_steps} must be 1 or more. 1 writes at every step."
            )
        super().__init__(RunFolder(save_dir, name, version, root_dir=root_dir))
        self._prefix = prefix
        self._flush_every = flush_logs_every_n_steps
        self._calls = 0
        self._flushed_at = 0

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer of the files."""
        if self._experiment is None:
            self._settle()
            self._experiment = ExperimentWriter(self._folder, self._resumed)
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        writer: ExperimentWriter = self.experiment
        self._begun = True
        step = writer.log_metrics(add_prefix(metrics, self._prefix, self.LOGGER_JOIN_CHAR), step)
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

    def state_dict(self) -> dict[str, Any]:
        writer = self.experiment
        if not isinstance(writer, ExperimentWriter):  # not rank 0
            return {}
        writer.save()
        return {**self._folder.state_dict(), **writer.state_dict()}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on in the ``metrics.csv`` of the run in ``state``, which :meth:`state_dict` returned when it was saved.

        With the next row that is written, later rows than the state's move to ``metrics_superseded.csv``, each with the
        number of the resume, and later values in the state's rows do too. If the user has named another version, or
        the run's file is not under this logger's folder, the logger begins a run of its own (:meth:`branch`).

        A loop of one's own keeps ``logger.state_dict()`` in its checkpoint, and calls this method before it logs.
        """
        before: ExperimentWriter | None = self._experiment
        if before is not None and before.begun:
            before.save()
            before = None
        if not self._folder.go_on(state, lambda path: holds_rows(path(ExperimentWriter.METRICS), state)):
            self.branch(state)
            return
        self._resumed, self._begun, self._calls, self._flushed_at = dict(state), False, 0, 0
        self._settle()
        self._experiment = ExperimentWriter(self._folder, self._resumed)
        if before is not None:
            self._experiment.take_over(before)

    def supersede_nothing(self) -> None:
        if self._resumed is not None:
            self._resumed["everything"] = True  # the writer has this dict, too

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
        resumed: The state of the run that goes on. Default: a run begins.
    """

    METRICS = NAME_METRICS_FILE = "metrics.csv"
    HPARAMS = NAME_HPARAMS_FILE = "hparams.yaml"

    def __init__(self, folder: RunFolder, resumed: Mapping[str, Any] | None = None) -> None:
        state = resumed or {}
        self.hparams: dict[str, Any] = {}
        self._folder = folder
        self._goes_on = resumed is not None
        self._resumed = resumed  # until the first row is written
        self._hparams_changed = False
        self._columns: dict[str, None] = dict.fromkeys(state.get("columns", ["step"]))  # in the order of first values
        self._written = 0  # the columns of the file, the first ones
        self._pending: dict[int, dict[str, Any]] = {}
        self._step: int = state.get("step", -1)
        self._file: str | None = None  # the local file, and for a remote folder the local copy
        self._is_copy = False
        self._steps: set[int] = set()  # the steps that have a row in the file
        self._last: _LastRow | None = None
        self._size = 0
        self._journal = Journal()

    @property
    def metrics_file_path(self) -> str:
        """The path of ``metrics.csv``."""
        return self._folder.file(self.METRICS)

    @property
    def log_dir(self) -> str:
        """The folder of the run."""
        return self._folder.path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows that are not written yet, each with its ``step``."""
        return list(self._pending.values())

    @property
    def begun(self) -> bool:
        """Whether rows were written."""
        return self._file is not None

    def state_dict(self) -> dict[str, Any]:
        """Return how far the file has come, when all rows are written."""
        if self._resumed is not None:
            return {key: self._resumed[key] for key in ("columns", "rows", "last", "merges", "step")}
        self._journal.saved(len(self._steps))
        columns = list(self._columns)[: self._written] if self.begun else ["step"]
        last = None if self._last is None else [self._last.values.get(name, "") for name in columns]
        cells = None if last is None else next(csv.reader(io.StringIO(encode(last).decode(), newline="")))
        rows, merges = len(self._steps), self._journal.count
        return {"columns": columns, "rows": rows, "last": cells, "merges": merges, "step": self._step}

    def take_over(self, other: ExperimentWriter) -> None:
        """Write here what another writer holds that has written nothing yet."""
        self.log_hparams(other.hparams)
        for step, row in other._pending.items():
            self.log_metrics({name: value for name, value in row.items() if name != "step"}, step)

    def log_hparams(self, params: Mapping[str, Any]) -> None:
        """Add hyper-parameters."""
        self.hparams.update(params)
        self._hparams_changed = bool(self.hparams)

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
        if not row.keys() <= self._columns.keys():  # named here, their order does not depend on when rows are written
            self._columns.update(dict.fromkeys(row))
        return step

    def save(self) -> None:
        """Write the rows and the hyper-parameters that are not written yet."""
        if self._hparams_changed:
            self._write_hparams()
            self._hparams_changed = False
        if not self._pending:
            return
        if self._file is None:
            self._file = self._start()
        known = self._pending.keys() & self._steps
        if self._last is not None:
            known.discard(self._last.step)
        if known or len(self._columns) > self._written or not self._size:
            self._rewrite(self._file)
        else:
            self._append(self._file)
        self._steps.update(self._pending)
        self._pending = {}
        if self._is_copy:
            self._folder.upload(self._file, self.METRICS)

    def _write_hparams(self) -> None:
        text = to_yaml(self.hparams)
        if self._goes_on and (before := self._folder.read(self.HPARAMS)) is not None:
            text = keep_entries(before.decode("utf-8", "replace"), text)
        self._folder.write(self.HPARAMS, text.encode())

    def _start(self) -> str:
        """Return the path of the local file; a resumed run's file is taken back, another run's file is set aside."""
        folder = self._folder.local_path()
        if folder is None:
            folder = tempfile.mkdtemp(prefix="treadle-csv-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            self._is_copy = True
        path = os.path.join(folder, self.METRICS)
        if self._resumed is not None:
            state, self._resumed = self._resumed, None
            if self._go_on(path, state):
                return path
        self._folder.remove(JOURNAL)
        aside = self._folder.set_aside(self.METRICS)
        if aside is not None:
            rank_zero_warn(
                f"Experiment logs directory {os.path.dirname(self.metrics_file_path)} exists and is not empty: the"
                f" {self.METRICS} of an earlier run in it is now called {aside!r}. Leave out `version` to give each run"
                " a folder of its own."
            )
        return path

    def _go_on(self, path: str, state: Mapping[str, Any]) -> bool:
        """Take the file back to where the resumed run was saved; return whether it is there, and the run's."""
        if self._is_copy:
            self._copy_here(self.METRICS, path)
        found = rewind(path, self._folder, state)
        if found is None:
            return False
        if self._is_copy:
            self._folder.upload(path, self.METRICS) if found.steps else self._folder.remove(self.METRICS)
        entries = cut_journal(self._folder, None if state.get("everything") else state["merges"])
        if self._is_copy:
            self._copy_here(JOURNAL, os.path.join(os.path.dirname(path), JOURNAL))
        self._columns = dict.fromkeys([*found.columns, *self._columns])
        self._written, self._steps, self._size = len(found.columns), found.steps, found.size
        self._journal = Journal(entries, len(found.steps))
        if found.last is not None:
            values: dict[str, Any] = dict(zip(found.columns, found.last))
            self._last = _LastRow(int(found.last[0]), values, found.size - found.last_size)
        return True

    def _copy_here(self, name: str, path: str) -> None:
        content = self._folder.read(name)
        if content is not None:
            with open(path, "wb") as file:
                file.write(content)

    def _append(self, path: str) -> None:
        """Append the new rows to the file; a new row of the same step as the last row is merged into that row."""
        rows = dict(self._pending)
        start = self._size
        if self._last is not None and self._last.step in rows:
            rows = {self._last.step: self._last.values | rows.pop(self._last.step), **rows}
            start = self._last.offset
        chunks = [self._encode(row) for row in rows.values()]
        with open(path, "r+b") as file:
            file.seek(start)
            file.write(b"".join(chunks))
            file.truncate()
        self._remember(list(rows.items())[-1], start + sum(map(len, chunks)), len(chunks[-1]))

    def _rewrite(self, path: str) -> None:
        """Write a new file with all columns beside the old file, and move it into the old file's place."""
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"
        before: dict[int, list[str]] = {}
        try:
            with open(temporary, "xb") as file:
                size = file.write(encode(self._columns))
                for row in self._all_rows(path, before):
                    line = self._encode(row)
                    size += file.write(line)
            if before:
                self._note(os.path.dirname(path), before)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            raise
        self._written = len(self._columns)
        self._remember((int(row["step"]), row), size, len(line))

    def _note(self, folder: str, before: Mapping[int, list[str]]) -> None:
        self._journal.append(folder, before)
        if self._is_copy:
            self._folder.upload(os.path.join(folder, JOURNAL), JOURNAL)

    def _all_rows(self, path: str, before: dict[int, list[str]]) -> Iterator[dict[str, Any]]:
        """Give the old rows with their new values, then the new rows; ``before`` gets what the journal lacks."""
        rows = dict(self._pending)
        last = None if self._last is None else self._last.step  # a checkpoint has its last row
        if self._size:
            with open(path, newline="", encoding="utf-8") as file:
                old = csv.reader(file)
                columns = next(old)
                for place, cells in enumerate(old):
                    step = int(cells[0])
                    later = rows.pop(step, None)
                    if later is not None and step != last and self._journal.lacks(place, step):
                        before[step] = cells
                    yield dict(zip(columns, cells)) | (later or {})
        yield from rows.values()

    def _encode(self, row: Mapping[str, Any]) -> bytes:
        return encode([row.get(name, "") for name in self._columns])

    def _remember(self, last: tuple[int, dict[str, Any]], size: int, length: int) -> None:
        self._last, self._size = _LastRow(*last, size - length), size


class _LastRow(NamedTuple):
    """The last row in the file, into which later values of its step go."""

    step: int
    values: dict[str, Any]
    offset: int
