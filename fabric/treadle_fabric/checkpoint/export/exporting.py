"""Checkpoints whose weights are also exported, for programs that know nothing of checkpoints."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, Final, Protocol, TypeVar

import torch
from torch import Tensor

from treadle_fabric.checkpoint.distributed.ranks import Ranks
from treadle_fabric.checkpoint.export.safetensors_file import bytes_of, check_dtypes, write_safetensors
from treadle_fabric.checkpoint.export.weights import Weights, in_files, weights_in
from treadle_fabric.checkpoint.folder.manifest import sync_folder
from treadle_fabric.checkpoint.folder.names import hidden_beside
from treadle_fabric.checkpoint.host.arena import Arena
from treadle_fabric.checkpoint.host.checked import trusting
from treadle_fabric.checkpoint.io import CheckpointIO, SharedSave, SharedSaves
from treadle_fabric.checkpoint.per_rank import parts_on_demand
from treadle_fabric.checkpoint.reading import folder_at, read_folder
from treadle_fabric.checkpoint.stored.tensor import tensors_on_demand
from treadle_fabric.checkpoint.torch_file import file_system, reason_of
from treadle_fabric.checkpoint.torch_io import TorchCheckpointIO
from treadle_fabric.errors import CheckpointError, MisconfigurationException
from treadle_fabric.rank_zero import rank_zero_warn
from treadle_fabric.types import PathLike

__all__ = ["ExportingCheckpointIO", "export_path"]

T = TypeVar("T")
_OURS: Final = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_INDEX: Final = "model.safetensors.index.json"
_WORTHWHILE: Final = 16 * 1024 * 1024
"""Bytes of a file, at least, before the ranks share the export out to several files."""


class ExportingCheckpointIO(CheckpointIO):
    """Stores checkpoints with another CheckpointIO, and beside each its weights as safetensors.

    The weights of ``epoch=3.ckpt`` are in the folder ``epoch=3.hf``, as Hugging Face has them: ``model.safetensors``,
    or ``model-00001-of-00004.safetensors`` and so on with ``model.safetensors.index.json``. The library safetensors
    alone reads them. Of a checkpoint that is a folder, each rank exports some of the files, and reads what they hold
    from the folder in pieces: nothing is sent between ranks, and no rank needs the memory for all. Tied weights are in
    the files once; the metadata of the files tells their other names. When a checkpoint is removed, its export is, too.

    To write in the background, put :class:`AsyncCheckpointIO` around it.

    Args:
        checkpoint_io: Stores the checkpoints. Default: :class:`TorchCheckpointIO`.
        key: The entry of the checkpoint with the weights: ``"model"`` of ``fabric.save(path, {"model": model, ...})``.
            Default: ``state_dict``, where a Trainer has them, or the only entry that holds tensors by name.
        dtype: What tensors of floating-point numbers become: ``torch.bfloat16``. Default: what they are.
        strip_prefix: What names lose where they begin with it: ``"model."`` for a LightningModule whose network is
            ``self.model``. Default: nothing.
        max_shard_size: Bytes of a file at most. Default: 5 GB.

    Raises:
        MisconfigurationException: An argument is of another kind, or ``checkpoint_io`` writes in the background.
    """

    def __init__(
        self,
        checkpoint_io: CheckpointIO | None = None,
        *,
        key: str | None = None,
        dtype: torch.dtype | None = None,
        strip_prefix: str = "",
        max_shard_size: int = 5 * 10**9,
    ) -> None:
        if checkpoint_io is not None and not isinstance(checkpoint_io, CheckpointIO):
            raise MisconfigurationException(
                f"ExportingCheckpointIO(checkpoint_io={checkpoint_io!r}): give a CheckpointIO, or nothing."
            )
        if checkpoint_io is not None and checkpoint_io.after_saves is not None:
            kind = type(checkpoint_io).__name__
            raise MisconfigurationException(
                f"ExportingCheckpointIO(checkpoint_io={kind}): that one has not written when it returns. Put it around "
                f"this one: {kind}(ExportingCheckpointIO(...))."
            )
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise MisconfigurationException(
                f"dtype={dtype!r} must be a torch.dtype of floating-point numbers, such as torch.bfloat16, or None."
            )
        if type(max_shard_size) is not int or max_shard_size < 1:
            raise MisconfigurationException(f"max_shard_size={max_shard_size!r} must be a number of bytes from 1.")
        self._checkpoint_io = checkpoint_io or TorchCheckpointIO()
        self._key, self._dtype, self._strip_prefix, self._most = key, dtype, strip_prefix, max_shard_size

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """What stores the checkpoints."""
        return self._checkpoint_io

    @property
    def sharded(self) -> bool:
        return self._checkpoint_io.sharded

    @property
    def shared_saves(self) -> SharedSaves | None:
        begin = self._checkpoint_io.shared_saves
        return None if begin is None else _SharedSaves(begin, self._export_folder)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: PathLike, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``, and then its weights beside it.

        Args:
            checkpoint: As for the wrapped CheckpointIO.
            path: As for the wrapped CheckpointIO.
            storage_options: As for the wrapped CheckpointIO; not for folders, which are read again.

        Raises:
            CheckpointError: The checkpoint was not written; or it was, and its weights were not exported.
        """
        if self.sharded and storage_options:
            raise MisconfigurationException(
                "storage_options are not for a folder whose weights are exported, because it is read again. Set them "
                "in fsspec's own configuration (fsspec.config.conf)."
            )
        self._checkpoint_io.save_checkpoint(checkpoint, path, storage_options)
        if self.sharded:
            self._export_folder(path, None)
        else:
            target = _target_of(path, storage_options)
            self._export(_Alone(path), lambda: checkpoint, path, target)

    def load_checkpoint(
        self, path: PathLike, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return self._checkpoint_io.load_checkpoint(path, map_location, weights_only)

    def remove_checkpoint(self, path: PathLike) -> None:
        """Delete the checkpoint at ``path``, and its export; one to which other files were added stays."""
        self._checkpoint_io.remove_checkpoint(path)
        try:
            _target_of(path, None).remove()
        except (CheckpointError, OSError) as e:
            reason = str(e) if isinstance(e, CheckpointError) else f"{reason_of(e)}."
            rank_zero_warn(f"The export {export_path(path)!r} stays: {reason}")

    def teardown(self) -> None:
        self._checkpoint_io.teardown()

    def _export_folder(self, path: PathLike, group: Any) -> None:
        """Export from the folder that all ranks have just written; every rank calls this."""

        def content() -> dict[str, Any]:
            source = folder_at(path)
            if source is None:
                raise CheckpointError("it is not a folder of Treadle, from which ranks read")
            written = source.identity()
            with tensors_on_demand(), parts_on_demand(), trusting([] if written is None else [written]):
                return read_folder(source, "cpu", packed=True)

        self._export(Ranks(group, _failure(path)), content, path, _target_of(path, None))

    def _export(
        self, ranks: _Together, content: Callable[[], Mapping[str, Any]], path: PathLike, target: _Target
    ) -> None:
        def find() -> tuple[Weights, list[dict[str, Tensor]]]:
            found = weights_in(content(), os.fspath(path), self._key, self._strip_prefix)
            check_dtypes(found.tensors, self._dtype)
            total = sum(bytes_of(tensor, self._dtype) for tensor in found.tensors.values())
            wanted = min(ranks.size, max(1, total // _WORTHWHILE))
            return found, in_files(found.tensors, self._dtype, self._most, wanted)

        weights, files = ranks.together(find)
        names = [
            "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
            for number in range(1, len(files) + 1)
        ]

        def write() -> None:
            for name, tensors in [*zip(names, files, strict=True)][ranks.rank :: ranks.size]:
                tied = {other: kept for other, kept in weights.metadata.items() if kept in tensors or other == "format"}
                with target.file(name) as file:
                    write_safetensors(file, tensors, self._dtype, tied)

        def publish() -> None:
            if len(files) > 1:
                total = sum(bytes_of(tensor, self._dtype) for tensor in weights.tensors.values())
                places = {each: name for name, tensors in zip(names, files, strict=True) for each in tensors}
                index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
                with target.file(_INDEX) as file:
                    file.write(json.dumps(index, indent=2).encode())
            target.publish()

        target.follow(ranks.of_first(target.begin))
        try:
            ranks.together(write)
            ranks.of_first(publish)
        finally:
            if ranks.rank == 0:
                target.end()


def export_path(path: PathLike) -> str:
    """Where the export of a checkpoint lies."""
    return f"{os.fspath(path).rstrip('/').removesuffix('.ckpt')}.hf"


def _failure(path: PathLike) -> str:
    return f"The checkpoint {os.fspath(path)!r} was written, but its weights were not exported"


# --- who writes ---


class _Together(Protocol):
    """Ranks that act together, as far as an export needs them."""

    rank: int
    size: int

    def together(self, action: Callable[[], T]) -> T: ...

    def of_first(self, action: Callable[[], T]) -> T: ...


class _Alone:
    """This process, which exports alone."""

    rank, size = 0, 1

    def __init__(self, path: PathLike) -> None:
        self._path = path

    def together(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except (CheckpointError, OSError) as e:
            raise CheckpointError(
                f"{_failure(self._path)}: {e if isinstance(e, CheckpointError) else reason_of(e)}"
            ) from e

    of_first = together


class _SharedSaves:
    """Begins saves of all ranks that export when they are written."""

    def __init__(self, begin: SharedSaves, export: Callable[[PathLike, Any], None]) -> None:
        self._begin, self._export = begin, export

    def __call__(
        self,
        checkpoint: dict[str, Any],
        path: PathLike,
        storage_options: Any | None,
        /,
        *,
        before: Callable[[], None],
        arena: Arena,
    ) -> SharedSave:
        save = self._begin(checkpoint, path, storage_options, before=before, arena=arena)
        return _Exported(save, lambda group: self._export(path, group))


class _Exported:
    """A save of all ranks, and the export after it."""

    def __init__(self, save: SharedSave, export: Callable[[Any], None]) -> None:
        self._save, self._export = save, export

    def write(self, group: Any) -> None:
        self._save.write(group)
        self._export(group)


# --- where to ---


class _Target(ABC):
    """The folder of an export."""

    @abstractmethod
    def begin(self) -> str:
        """On the first rank: make room; returns what the other ranks need to know."""

    @abstractmethod
    def follow(self, begun: str) -> None:
        """On every rank: take what the first one returned."""

    @abstractmethod
    def file(self, name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        """Open a new file for writing."""

    @abstractmethod
    def publish(self) -> None:
        """On the first rank: all is written."""

    @abstractmethod
    def end(self) -> None:
        """On the first rank: remove what was not published."""

    @abstractmethod
    def remove(self) -> None:
        """Delete the export, if there is one."""


def _target_of(path: PathLike, storage_options: Any | None) -> _Target:
    fs, where = file_system(export_path(path), storage_options)
    return _Local(os.path.abspath(where)) if fs is None else _Remote(fs, where)


class _Local(_Target):
    """On a disk: a hidden folder, which takes the name when all is written."""

    def __init__(self, where: str) -> None:
        self._where, self._fresh = where, ""

    def begin(self) -> str:
        _refuse_foreign(self._where, os.listdir(self._where) if os.path.isdir(self._where) else [])
        self._fresh = hidden_beside(self._where, "tmp")
        os.makedirs(self._fresh)
        return self._fresh

    def follow(self, begun: str) -> None:
        self._fresh = begun

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[IO[bytes]]:
        with open(os.path.join(self._fresh, name), "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def publish(self) -> None:
        sync_folder(self._fresh)
        self.remove()
        os.rename(self._fresh, self._where)
        sync_folder(os.path.dirname(self._where))

    def end(self) -> None:
        if self._fresh:
            shutil.rmtree(self._fresh, ignore_errors=True)

    def remove(self) -> None:
        if os.path.isdir(self._where):
            _refuse_foreign(self._where, os.listdir(self._where))
            aside = hidden_beside(self._where, "tmp")
            os.rename(self._where, aside)  # from this moment on it is gone, rather than a part of it
            shutil.rmtree(aside, ignore_errors=True)


class _Remote(_Target):
    """Behind a URL, where no folder can be renamed: the files of the last export go first, the index comes last."""

    def __init__(self, fs: Any, where: str) -> None:
        self._fs, self._where, self._published = fs, where.rstrip("/"), False

    def begin(self) -> str:
        self.remove()
        self._fs.makedirs(self._where, exist_ok=True)
        return ""

    def follow(self, begun: str) -> None:
        pass

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[IO[bytes]]:
        file = self._fs.open(f"{self._where}/{name}", "wb")
        try:
            yield file
        except BaseException:
            with contextlib.suppress(Exception):
                file.discard()  # closing it would store what was written so far
            raise
        file.close()

    def publish(self) -> None:
        self._published = True

    def end(self) -> None:
        if not self._published:
            with contextlib.suppress(Exception):
                self.remove()

    def remove(self) -> None:
        self._fs.invalidate_cache()
        try:
            names = [str(each).rstrip("/").rsplit("/", 1)[-1] for each in self._fs.ls(self._where, detail=False)]
        except (FileNotFoundError, NotADirectoryError):
            return
        _refuse_foreign(self._where, names)
        for name in sorted(names, key=lambda name: name != _INDEX):
            self._fs.rm_file(f"{self._where}/{name}")
        with contextlib.suppress(Exception):  # many stores have no folders
            self._fs.rmdir(self._where)


def _refuse_foreign(where: str, names: list[str]) -> None:
    """Make sure that no more than an export is lost.

    Raises:
        CheckpointError: The folder holds other things.
    """
    foreign = next((name for name in names if not _OURS.fullmatch(name)), None)
    if foreign is not None:
        raise CheckpointError(
            f"{where!r} is a folder that holds {foreign!r}, which is no part of an export, so nothing in it was "
            "replaced or removed. Move that elsewhere, or give the checkpoint another name."
        )
