"""The folder that a file-based logger writes a run into, on the local disk or on anything that fsspec reaches."""

from __future__ import annotations

import os
import re
import uuid
from typing import Any

from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.loggers.logger import Logger
from treadle_fabric.types import PathLike

__all__ = ["FolderLogger", "RunFolder"]


class RunFolder:
    """The folder ``root/name/version`` of a run; the version is counted up from the runs that are already there.

    Args:
        root_dir: The folder above all experiments, a local path or an fsspec URL.
        name: The experiment's name; with None or "" the runs lie in ``root_dir`` itself.
        version: A number n for ``version_n``, or the folder's name as a string; None: the next free number.
        sub_dir: A folder inside the run's folder to write to. Default: the run's folder itself.
        save_dir: Another name for ``root_dir``.

    Raises:
        MisconfigurationException: Neither ``root_dir`` nor ``save_dir`` is given, or they contradict each other.
    """

    def __init__(
        self,
        root_dir: PathLike | None,
        name: str | None,
        version: int | str | None,
        sub_dir: PathLike | None = None,
        *,
        save_dir: PathLike | None = None,
    ) -> None:
        if root_dir is None and save_dir is None:
            raise MisconfigurationException("A logger needs a folder to write to. Give root_dir (or save_dir).")
        if root_dir is not None and save_dir is not None and os.fspath(root_dir) != os.fspath(save_dir):
            raise MisconfigurationException(
                f"root_dir={os.fspath(root_dir)!r} and save_dir={os.fspath(save_dir)!r} are two values for the folder. "
                "Give one."
            )
        given = root_dir if root_dir is not None else save_dir
        assert given is not None
        self.root = os.path.expandvars(os.path.expanduser(os.fspath(given)))
        self.name = name or ""
        self.sub_dir = None if sub_dir is None else os.path.expandvars(os.path.expanduser(os.fspath(sub_dir)))
        self._given_version = self._version = version

    @property
    def version(self) -> int | str:
        """The version; the next free number is looked up when it is first needed."""
        if self._version is None:
            self._version = self._next_version()
        return self._version

    def renew(self) -> None:
        """Count the version up for another run, unless the user has named the version."""
        self._version = self._given_version

    @property
    def path(self) -> str:
        """The path of the folder as the user would write it, which may be a URL."""
        version = self.version if isinstance(self.version, str) else f"version_{self.version}"
        return _join(self.root, self.name, version, self.sub_dir or "")

    def file(self, name: str) -> str:
        """Return the path of a file in the folder."""
        return _join(self.path, name)

    def local_path(self) -> str | None:
        """Make the folder if needed, and return its path on the local disk; None if the folder is not local."""
        from fsspec.implementations.local import LocalFileSystem  # heavy

        fs, path = self._file_system(self.path)
        if not isinstance(fs, LocalFileSystem):
            return None
        os.makedirs(path, exist_ok=True)
        return str(path)

    def set_aside(self, name: str) -> str | None:
        """Rename a file that an earlier run left, and return the new name; None if there is no such file."""
        fs, path = self._file_system(self.file(name))
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
        folder = self.local_path()
        if folder is None:
            fs, path = self._file_system(self.file(name))
            fs.makedirs(fs._parent(path), exist_ok=True)
            fs.pipe_file(path, content)
            return
        temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
        try:
            with open(temporary, "xb") as file:
                file.write(content)
            os.replace(temporary, os.path.join(folder, name))
        except BaseException:
            if os.path.exists(temporary):
                os.remove(temporary)
            raise

    def upload(self, source: str, name: str) -> None:
        """Copy a local file into the folder."""
        fs, path = self._file_system(self.file(name))
        fs.makedirs(fs._parent(path), exist_ok=True)
        fs.put_file(source, path)

    def _next_version(self) -> int:
        fs, path = self._file_system(_join(self.root, self.name))
        try:
            names = [os.path.basename(str(entry).rstrip("/")) for entry in fs.ls(path, detail=False)]
        except FileNotFoundError:
            names = []
        taken = [int(match[1]) for name in names if (match := re.fullmatch(r"version_(\d+)", name))]
        return max(taken, default=-1) + 1

    @staticmethod
    def _file_system(path: str) -> tuple[Any, str]:
        import fsspec  # heavy

        fs, where = fsspec.url_to_fs(path, use_listings_cache=False)  # another run may have made a folder since
        return fs, where


class FolderLogger(Logger):
    """The base class of loggers that write into a folder of the run.

    Args:
        folder: The folder that the files go to.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._experiment: Any = None  # writes the files; made when first needed, never pickled

    @property
    def name(self) -> str:
        return self._folder.name

    @property
    def version(self) -> int | str:
        return self._folder.version

    @property
    def root_dir(self) -> str:
        return self._folder.root

    @property
    def log_dir(self) -> str:
        return self._folder.path

    def _renew(self) -> None:
        """End the experiment and begin another one in a new version."""
        self.finalize("success")
        self._experiment = None
        self._folder.renew()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_experiment": None}


def _join(*parts: str) -> str:
    head, *tail = [part for part in parts if part]
    if "://" in head:
        return "/".join([head.rstrip("/"), *(part.strip("/") for part in tail)])
    return os.path.join(head, *tail)
