"""The folder that a file-based logger writes a run into, on the local disk or on anything that fsspec reaches."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC
from typing import Any, Final

from treadle_fabric.errors import MisconfigurationException, MissingArgumentError
from treadle_fabric.loggers.files import file_system, read_file, write_file
from treadle_fabric.loggers.logger import Logger
from treadle_fabric.types import PathLike

__all__ = ["FolderLogger", "RunFolder"]

PARENT: Final = "parent.json"
"""The file that tells which run, and which checkpoint of it, a branch has begun from."""
_RUN: Final = ("id", "name", "version", "root")


class RunFolder:
    """The folder ``root/name/version`` of a run; the version is counted up from the runs that are already there.

    Args:
        save_dir: The folder above all experiments, a local path or an fsspec URL.
        name: The experiment's name; with None or "" the runs lie in ``save_dir`` itself.
        version: A number n for ``version_n``, or the folder's name as a string; None: the next free number.
        sub_dir: A folder inside the run's folder to write to. Default: the run's folder itself.
        root_dir: Another name for ``save_dir``.

    Raises:
        MissingArgumentError: Neither ``save_dir`` nor ``root_dir`` is given.
        MisconfigurationException: The two contradict each other.
    """

    def __init__(
        self,
        save_dir: PathLike | None,
        name: str | None,
        version: int | str | None,
        sub_dir: PathLike | None = None,
        *,
        root_dir: PathLike | None = None,
    ) -> None:
        if root_dir is None and save_dir is None:
            raise MissingArgumentError("A logger needs a folder to write to. Give save_dir (or root_dir).")
        if root_dir is not None and save_dir is not None and os.fspath(root_dir) != os.fspath(save_dir):
            raise MisconfigurationException(
                f"root_dir={os.fspath(root_dir)!r} and save_dir={os.fspath(save_dir)!r} are two values for the folder. "
                "Give one."
            )
        self.called_root = root_dir is not None
        """Whether the user calls the folder above all experiments ``root_dir``."""
        self.elsewhere: str | None = None
        """Where a subclass of the user's wants the run."""
        given = root_dir if root_dir is not None else save_dir
        assert given is not None
        self.root = os.path.expandvars(os.path.expanduser(os.fspath(given)))
        self.name = name or ""
        self.sub_dir = None if sub_dir is None else os.path.expandvars(os.path.expanduser(os.fspath(sub_dir)))
        self._given_version = self._version = version
        self.id = _new_id()
        """Names the run, in checkpoints too."""
        self.parent: dict[str, Any] | None = None
        """The run and the checkpoint that this run has branched from; until the folder is made."""

    @property
    def version(self) -> int | str:
        """The version; the next free number is looked up when it is first needed."""
        if self._version is None:
            self._version = self._next_version()
        return self._version

    def renew(self) -> None:
        """Count the version up for another run, unless the user has named the version."""
        self._version, self.id, self.parent, self.elsewhere = self._given_version, _new_id(), None, None

    def state_dict(self) -> dict[str, Any]:
        """Return which run this is."""
        return {"id": self.id, "name": self.name, "version": self.version, "root": self._absolute_root}

    def go_on(self, state: Mapping[str, Any], holds: Callable[[Callable[[str], str]], bool]) -> bool:
        """Become the folder of the run in ``state``, if the run is to be found here.

        Args:
            state: What :meth:`state_dict` returned.
            holds: Asked where the folder above the experiments is another one, because the files were moved or because
                the user wants the new run elsewhere: whether the run's files are there. It gets a function from the
                names of files to paths.

        Returns:
            Whether it is that folder now. It is not if the user has named another version.
        """
        if any(state.get(key) is None for key in _RUN) or state["name"] != self.name:
            return False
        name = _folder_name(state["version"])
        if os.path.isabs(name) or os.pardir in name.split("/"):  # a checkpoint does not choose where files go
            return False
        if self._given_version is not None and _folder_name(self._given_version) != name:
            return False
        if state["root"] != self._absolute_root:
            folder = _join(self.root, self.name, name, self.sub_dir or "")
            if not holds(lambda file: _join(folder, file)):
                return False
        self._version, self.id, self.parent = state["version"], state["id"], None
        return True

    @property
    def runs(self) -> str:
        """The folder of all versions, or of the one that the user has named."""
        version = "" if self._given_version is None else _folder_name(self._given_version)
        return _join(self.root, self.name, version)

    @property
    def _absolute_root(self) -> str:
        return self.root.rstrip("/") if "://" in self.root else os.path.abspath(self.root)

    @property
    def path(self) -> str:
        """The path of the folder as the user would write it, which may be a URL."""
        return self.elsewhere or _join(self.root, self.name, _folder_name(self.version), self.sub_dir or "")

    def file(self, name: str) -> str:
        """Return the path of a file in the folder."""
        return _join(self.path, name)

    def local_path(self) -> str | None:
        """Make the folder if needed, and return its path on the local disk; None if the folder is not local."""
        from fsspec.implementations.local import LocalFileSystem  # heavy

        fs, path = file_system(self.path)
        local = isinstance(fs, LocalFileSystem)
        if local:
            os.makedirs(path, exist_ok=True)
        self._name_parent()
        return str(path) if local else None

    def set_aside(self, name: str) -> str | None:
        """Rename a file that an earlier run left, and return the new name; None if there is no such file."""
        fs, path = file_system(self.file(name))
        if not fs.exists(path):
            return None
        stem, extension = os.path.splitext(path)
        n = 0
        while fs.exists(aside := f"{stem}_{n}{extension}"):
            n += 1
        fs.mv(path, aside)
        return os.path.basename(aside)

    def write(self, name: str, content: bytes) -> None:
        """Write a small file, whole or not at all."""
        self.local_path()
        write_file(self.file(name), content)

    def upload(self, source: str, name: str) -> None:
        """Copy a local file into the folder."""
        fs, path = file_system(self.file(name))
        fs.makedirs(fs._parent(path), exist_ok=True)
        fs.put_file(source, path)

    def read(self, name: str) -> bytes | None:
        """Return what a file in the folder holds; None if there is no such file."""
        return read_file(self.file(name))

    def modified(self, name: str) -> str:
        """Return when a file was written last, in UTC; empty where the file system does not tell."""
        fs, path = file_system(self.file(name))
        try:
            return str(fs.modified(path).astimezone(UTC).isoformat())
        except (NotImplementedError, FileNotFoundError):
            return ""

    def remove(self, name: str) -> None:
        """Remove a file from the folder, if it is there."""
        fs, path = file_system(self.file(name))
        if fs.exists(path):
            fs.rm_file(path)

    def _name_parent(self) -> None:
        """Write the parent of a branch, once, when its folder is made."""
        parent, self.parent = self.parent, None
        if parent is not None:
            self.write(PARENT, (json.dumps(parent, indent=2, default=str) + "\n").encode())

    def _next_version(self) -> int:
        fs, path = file_system(_join(self.root, self.name))
        try:
            found = [entry["name"] for entry in fs.ls(path, detail=True) if entry["type"] == "directory"]
        except FileNotFoundError:
            found = []
        names = [os.path.basename(str(entry).rstrip("/")) for entry in found]
        taken = [int(match[1]) for name in names if (match := re.fullmatch(r"version_(\d+)", name))]
        return max(taken, default=-1) + 1


class FolderLogger(Logger):
    """The base class of loggers that write into a folder of the run.

    A subclass may replace ``name``, ``version``, ``save_dir``, ``root_dir`` and ``log_dir``: the files follow.

    Args:
        folder: The folder that the files go to.
    """

    LOGGER_JOIN_CHAR = "-"

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._experiment: Any = None  # writes the files; made when first needed, never pickled
        self._resumed: dict[str, Any] | None = None  # the state of the run that goes on, until that is written to
        self._begun = False  # whether values were logged to the run
        self._folder_of_all = folder.root

    @property
    def name(self) -> str:
        return self._folder.name

    @property
    def version(self) -> int | str:
        return self._folder.version

    @property
    def root_dir(self) -> str:
        """The folder of the experiment: its name in ``save_dir``. Given as ``root_dir``, the folder above all of them.

        Loggers of Lightning's Trainer have ``save_dir``, and those of Fabric ``root_dir``.
        """
        return self._folder.root if self._folder.called_root else _join(self.save_dir or "", self.name or "")

    @property
    def log_dir(self) -> str:
        name = self.name or "" if self._folder.called_root else ""
        return _join(self.root_dir, name, _folder_name(self.version), self._folder.sub_dir or "")

    def _settle(self) -> None:
        """Let the files go where the properties of this class say; called before the first file is made."""
        place, self._folder.elsewhere = self.log_dir, None
        if place != self._folder.path:
            self._folder.elsewhere = place

    @property
    def runs_dir(self) -> str:
        return self._folder.runs

    def branch(self, state: Mapping[str, Any]) -> None:
        """Begin a run in a new version whose ``parent.json`` names the run, the checkpoint and its step.

        A version that the user has named stays. The parent's files are not touched.

        Args:
            state: What :meth:`state_dict` returned; ``checkpoint`` and ``global_step`` are added by a trainer.
        """
        if self._begun or self._resumed is not None or self._folder.id == state.get("id"):
            self.begin_anew()
        self._folder.parent = {key: state.get(key) for key in (*_RUN, "checkpoint", "global_step")}

    def _renew(self) -> None:
        """End the experiment and begin another one in a new version."""
        self.finalize("success")
        self._experiment, self._resumed, self._begun = None, None, False
        self._folder.renew()

    def __getstate__(self) -> dict[str, Any]:
        resumed = None if self._begun else self._resumed  # a copy does not take back what was written since
        return {**self.__dict__, "_experiment": None, "_resumed": resumed}


def _join(*parts: str) -> str:
    """Join the parts of a local path or of an fsspec URL; empty ones are left out."""
    head, *tail = [part for part in parts if part]
    if "://" in head:
        return "/".join([head.rstrip("/"), *(part.strip("/") for part in tail)])
    return os.path.join(head, *tail)


def _folder_name(version: int | str) -> str:
    return version if isinstance(version, str) else f"version_{version}"


def _new_id() -> str:
    return uuid.uuid4().hex[:12]
