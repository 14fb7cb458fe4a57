"""What a profiler is, and how functions are wrapped where a run has one."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Final, TypeVar

from torch import nn

from treadle_fabric import MisconfigurationException, PathLike, rank_zero_info, rank_zero_only

__all__ = ["Profiler", "timed", "timed_iteration", "write_file"]

_T = TypeVar("_T")
_LONGEST_NAME: Final = 150  # file systems allow 255 bytes


class Profiler(ABC):
    """Measures the actions of a run: what happens between ``start`` and ``stop`` of the same name.

    A Trainer calls ``setup`` when a stage begins, and ``describe`` and ``teardown`` when the stage ends, also after an
    error or Ctrl-C. In a Fabric loop, use ``with profiler.profile("forward"): ...``, and ``describe`` at the end. A
    subclass implements ``start`` and ``stop``, and ``summary`` if there is something to report.

    Args:
        dirpath: The folder of the report, a local path or an fsspec URL. Default: the run's log folder.
        filename: The report goes to the file ``{stage}-{filename}.txt``, with several ranks to a file of each,
            ``{stage}-{filename}-{rank}.txt``. Default: with ``dirpath`` ``{stage}.txt``; without it, the report of
            rank 0 is logged.

    Raises:
        MisconfigurationException: ``filename`` is no plain name.
    """

    records: ClassVar[bool] = True
    """Whether the profiler measures anything; if not, a Trainer wraps nothing."""

    stage: str | None = None
    """The stage of the Trainer that runs or ran last: "fit", "validate", "test" or "predict"; None in a loop."""
    _local_rank: int | None = None
    _log_dir: str | None = None
    dirpath: PathLike | None = None
    filename: str | None = None

    def __init__(self, dirpath: PathLike | None = None, filename: str | None = None) -> None:
        if dirpath is not None and not isinstance(dirpath, (str, os.PathLike)):
            raise MisconfigurationException(f"dirpath={dirpath!r} of a profiler must be a path, or None.")
        plain = isinstance(filename, str) and filename and os.path.basename(filename) == filename
        if filename is not None and not plain:
            raise MisconfigurationException(
                f"filename={filename!r} of a profiler must be the name of a file, without its folder and ending: give"
                " the folder as dirpath."
            )
        self.dirpath, self.filename = dirpath, filename

    @abstractmethod
    def start(self, action_name: str) -> None:
        """Begin to measure an action."""

    @abstractmethod
    def stop(self, action_name: str) -> None:
        """End to measure an action."""

    @contextmanager
    def profile(self, action_name: str) -> Generator[str]:
        """While entered, measure an action.

        Args:
            action_name: The name of the action in the report.
        """
        self.start(action_name)
        try:
            yield action_name
        finally:
            self.stop(action_name)

    def summary(self) -> str:
        """Return the report of what was measured. Default: nothing."""
        return ""

    def watch(self, module: nn.Module) -> None:
        """Take the module whose layers are to be named in the report, if the profiler names layers."""

    def begin(self) -> None:
        """Forget what was measured in an earlier stage; called by :meth:`setup`."""

    def finish(self) -> None:
        """End what still runs, and write files other than the report; called by :meth:`teardown`."""

    @property
    def local_rank(self) -> int:
        """This process's rank on its node; 0 in a single process."""
        return 0 if self._local_rank is None else self._local_rank

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """Begin a stage.

        Args:
            stage: Such as "fit".
            local_rank: This process's rank on its node; None in a single process.
            log_dir: The run's folder, for a report whose folder was not given.
        """
        self.stage, self._local_rank, self._log_dir = stage, local_rank, log_dir
        self.begin()

    def describe(self) -> None:
        """Write the report into its file, or log it on rank 0."""
        report = self.summary()
        if not report:
            return
        if self.filename is None and self.dirpath is None:
            rank_zero_info(report)
            return
        path = self.path_of(".txt")
        write_file(path, f"{report}\n".encode())
        rank_zero_info(f"{type(self).__name__}: {path}")

    def teardown(self, stage: str | None) -> None:
        """End a stage; what was measured can still be read.

        Args:
            stage: Such as "fit".
        """
        self.finish()

    @property
    def folder(self) -> str:
        """The folder of this profiler's files."""
        given = self.dirpath if self.dirpath is not None else self._log_dir
        return os.fspath(given) if given is not None else "."

    def path_of(self, ending: str, part: str = "") -> str:
        """Return the path of a file of this stage and, where there are several, of this rank.

        Args:
            ending: Of the file, such as ".txt".
            part: What distinguishes the file from others of the stage.
        """
        rank = self._local_rank
        if rank is not None:
            rank = getattr(rank_zero_only, "rank", None) or rank  # of all nodes, which may share a folder
        part = re.sub(r"[^\w.\-\[\]=]+", "_", part)[:_LONGEST_NAME]
        name = "-".join(each for each in (self.stage, self.filename, part, None if rank is None else str(rank)) if each)
        return os.path.join(self.folder, (name or "profile") + ending)

    @property
    def title(self) -> str:
        """The first line of a report."""
        of = f" of {type(self).__name__}" if self.stage is None else ""
        return f"{self.stage.upper()} Profiler Report" if self.stage else f"Profiler Report{of}"


def write_file(path: str, content: bytes) -> None:
    """Write a file of any file system, and make the folders above the file."""
    if "://" in path:
        import fsspec  # heavy, and only for such paths

        fs, where = fsspec.url_to_fs(path)
        fs.makedirs(os.path.dirname(where), exist_ok=True)
        fs.pipe(where, content)
        return
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "wb") as file:
        file.write(content)


def timed(profiler: Profiler | None, action: str, function: Callable[..., _T]) -> Callable[..., _T]:
    """Return a function that is measured; ``function`` itself where there is no profiler.

    Args:
        profiler: Measures; None: nobody does.
        action: The name of the action.
        function: What is called.
    """
    if profiler is None:
        return function

    def measured(*args: Any, **kwargs: Any) -> _T:
        profiler.start(action)
        try:
            return function(*args, **kwargs)
        finally:
            profiler.stop(action)

    return measured


def timed_iteration(profiler: Profiler | None, action: str, items: Iterable[_T]) -> Iterable[_T]:
    """Return an iterable of the same items; how long each takes to come is measured."""
    return items if profiler is None else _measured(profiler, action, iter(items))


def _measured(profiler: Profiler, action: str, items: Iterator[_T]) -> Iterator[_T]:
    while True:
        profiler.start(action)
        try:
            item = next(items)
        except StopIteration:
            return
        finally:
            profiler.stop(action)
        yield item
