"""Files that are mapped into memory while a state is restored from them, and not for longer.

The tensors of a mapped file have the system's copy of the file as their memory, which all processes of a host share;
what is written to such a tensor is its process's own. That is right as long as nobody else changes the file: a program
that rewrites the file in place (``cp`` does) changes the tensors, and one that shortens it has the process killed
(SIGBUS) where it reads them. So a restore copies from the map into parameters, and at its end :meth:`FileMaps.release`
gives memory of their own to all tensors that are still referenced: the state of an optimizer on the CPU, what a hook
has kept, or what is returned to the user. A file that is replaced by a rename, as all saves here do, harms nobody.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import mmap
import os
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import IO, Any, Final

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.serialization import default_restore_location

__all__ = ["FileMaps", "active_maps", "files_mapped", "mappable"]

_MAPS: Final = "/proc/self/maps"
_ALONE: Final = 0x4000  # MAP_NORESERVE of Linux: no room is set aside for the pages that are never written
_MAY_MOVE_TO: Final = 1 | 2  # MREMAP_MAYMOVE | MREMAP_FIXED
_WORTHWHILE: Final = 2**20
"""Bytes of a file; a smaller one is read in less time than it takes to keep account of its storages."""
_COLLECTED: Final = 2**26
"""Bytes that take longer to be copied than a collection of garbage takes."""
_active: ContextVar[FileMaps | None] = ContextVar("treadle_file_maps", default=None)


class FileMaps:
    """The files that are mapped for one restore."""

    def __init__(self) -> None:
        self._storages: list[StorageWeakRef] = []

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Local files that are loaded inside are mapped, and belong to this object."""
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)

    def placing(self, map_location: Any) -> Callable[[torch.UntypedStorage, str], Any]:
        """A ``map_location`` for :func:`torch.load` that does as the given one, and keeps account of the storages."""

        def placed(storage: torch.UntypedStorage, location: str) -> Any:
            self._storages.append(StorageWeakRef(storage))  # type: ignore[no-untyped-call]
            if callable(map_location):
                found = map_location(storage, location)
                return default_restore_location(storage, location) if found is None else found  # type: ignore[no-untyped-call]
            if isinstance(map_location, dict):
                location = map_location.get(location, location)
            else:
                location = str(map_location)
            return default_restore_location(storage, location)  # type: ignore[no-untyped-call]

        return placed

    def release(self) -> None:
        """Unmap the files; tensors that are still referenced keep their values, in memory of their own.

        Call it when no other thread writes to such a tensor.
        """
        alive = _alive(self._storages)
        if sum(storage.nbytes() for storage in alive) > _COLLECTED:
            del alive
            gc.collect()  # what torch.load leaves behind refers to all storages, in a circle
            alive = _alive(self._storages)
        self._storages = []
        # referred to by ``alive``, no storage ends meanwhile, and with it the map
        used = sorted((each.data_ptr(), each.nbytes()) for each in alive if each.nbytes())
        for begin, end in _mapped_regions() if used else ():
            inside = used[bisect_left(used, (begin, 0)) : bisect_left(used, (end, 0))]
            if inside:
                _detach(begin, end, inside)


@contextmanager
def files_mapped() -> Iterator[None]:
    """Local files that are loaded inside are mapped into memory; after the outermost of such blocks nothing is.

    Make what is loaded the affair of a function that is called inside: what is no longer referenced at the end of the
    block never takes memory of this process's own. An error inside keeps references, so that then nothing is copied.
    """
    if _active.get() is not None:
        yield
        return
    maps = FileMaps()
    with maps.reading():
        yield
    maps.release()


def active_maps() -> FileMaps | None:
    """What the files that are loaded here belong to; None: they are read."""
    return _active.get()


def mappable(file: IO[bytes]) -> bool:
    """Whether the file is to be mapped: where it can be, can be let go of while tensors are still there, and is large
    enough.
    """
    if sys.platform != "linux" or os.fstat(file.fileno()).st_size < _WORTHWHILE or not os.path.exists(_MAPS):
        return False
    try:
        mmap.mmap(file.fileno(), 1, access=mmap.ACCESS_READ).close()
    except (OSError, ValueError):  # a file system that cannot map, or an empty file
        return False
    return True


def _alive(storages: Sequence[StorageWeakRef]) -> list[torch.UntypedStorage]:
    """The storages that somebody still refers to."""
    new: Any = torch.UntypedStorage._new_with_weak_ptr
    found = [new(weak.cdata) for weak in storages]
    return [storage for storage in found if storage is not None]


def _mapped_regions() -> list[tuple[int, int]]:
    """Begin and end of the regions of the address space that are mapped from files."""
    with open(_MAPS, "rb") as file:  # span, permissions, offset, device, inode, path; without a file the inode is 0
        spans = [fields[0].split(b"-") for line in file if (fields := line.split(None, 5))[4] != b"0"]
    return [(int(begin, 16), int(end, 16)) for begin, end in spans]


def _detach(begin: int, end: int, used: Sequence[tuple[int, int]]) -> None:
    """Put memory of the process's own in the place of a mapped region.

    Args:
        begin: The address of the region.
        end: Where it ends.
        used: Address and size of all that has to have the same content.

    The exchange is one step for all threads: there is no moment at which a tensor has another content.
    """
    libc, size = _libc(), end - begin
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _ALONE
    own = libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if own == ctypes.c_void_p(-1).value:
        raise MemoryError(f"{size} bytes of address space: {os.strerror(ctypes.get_errno())}")
    for address, nbytes in used:
        ctypes.memmove(own + address - begin, address, nbytes)
    if libc.mremap(own, size, size, _MAY_MOVE_TO, begin) != begin:
        error = ctypes.get_errno()
        libc.munmap(own, size)
        raise OSError(error, os.strerror(error))


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.argtypes, libc.mmap.restype = [address, size, number, number, number, ctypes.c_long], address
    libc.mremap.argtypes, libc.mremap.restype = [address, size, size, number, address], address
    libc.munmap.argtypes = [address, size]
    return libc
