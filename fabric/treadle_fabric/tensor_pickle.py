"""Pickle an object without the bytes of its tensors: these stay in their storages, to be copied or sent as they are."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

__all__ = ["dump", "dump_to_send", "is_picklable", "load"]


def dump(obj: Any) -> tuple[bytes, list[torch.UntypedStorage]]:
    """Pickle ``obj`` and list the storages that its tensors use, each once and on its own device.

    Raises:
        pickle.PicklingError: Something in ``obj`` cannot be pickled; some objects raise AttributeError or TypeError.
    """
    stream = io.BytesIO()
    pickler = _Pickler(stream, protocol=pickle.HIGHEST_PROTOCOL)
    pickler.storages, pickler.places = [], {}
    pickler.dump(obj)
    return stream.getvalue(), pickler.storages


def is_picklable(obj: object) -> bool:
    """Return whether pickle takes an object; the bytes of its tensors are not copied for that."""
    try:
        dump(obj)
    except Exception:  # an object's own __reduce__ may raise anything
        return False
    return True


def dump_to_send(obj: Any) -> tuple[bytes, list[torch.UntypedStorage], list[pickle.PickleBuffer]]:
    """As :func:`dump`, for another process, which may have other devices.

    The bytes of arrays and the like are listed, too. A tensor of another class that is not on the CPU is copied there,
    because such a class may be pickled with its device.
    """
    stream = io.BytesIO()
    buffers: list[pickle.PickleBuffer] = []
    pickler = _SendingPickler(stream, protocol=pickle.HIGHEST_PROTOCOL, buffer_callback=buffers.append)
    pickler.storages, pickler.places = [], {}
    pickler.dump(obj)
    return stream.getvalue(), pickler.storages, buffers


def load(stream: bytes, storages: Sequence[torch.UntypedStorage], buffers: Sequence[Any] = ()) -> Any:
    """The object of :func:`dump`, whose tensors use these storages: the ones that it listed, or copies of them.

    Args:
        stream: The object without its bytes.
        storages: The storages of its tensors.
        buffers: The other bytes that :func:`dump_to_send` listed, or copies of them.
    """
    unpickler = _Unpickler(io.BytesIO(stream), buffers=buffers)
    unpickler.storages = storages
    return unpickler.load()


class _Pickler(pickle.Pickler):
    storages: list[torch.UntypedStorage]
    places: dict[int, int]

    def persistent_id(self, obj: Any) -> tuple[int, torch.dtype | None] | None:
        if isinstance(obj, torch.storage.TypedStorage):
            return self._place_of(obj._untyped_storage), obj.dtype
        if isinstance(obj, torch.UntypedStorage):
            return self._place_of(obj), None
        return None

    def _place_of(self, storage: torch.UntypedStorage) -> int:
        place = self.places.setdefault(storage._cdata, len(self.storages))
        if place == len(self.storages):
            self.storages.append(storage)  # held, so that no other storage takes over its address meanwhile
        return place


class _SendingPickler(_Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor) and type(obj) not in (Tensor, Parameter) and obj.device.type not in ("cpu", "meta"):
            return obj.cpu().__reduce_ex__(pickle.HIGHEST_PROTOCOL)  # type: ignore[no-untyped-call]
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    storages: Sequence[torch.UntypedStorage]

    def find_class(self, module: str, name: str, /) -> Any:
        found = super().find_class(module, name)
        return _rebuild_of_bytes if found is getattr(torch._utils, "_rebuild_tensor_v3", None) else found

    def persistent_load(self, pid: tuple[int, torch.dtype | None]) -> Any:
        place, dtype = pid
        storage = self.storages[place]
        if dtype is None:
            return storage
        return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]


def _rebuild_of_bytes(storage: torch.UntypedStorage, *rest: Any) -> Tensor:
    """Make a tensor of a dtype that has no storage class of its own: float8 and the wide unsigned integers."""
    made: Any = torch.storage.TypedStorage
    return torch._utils._rebuild_tensor_v3(made(wrap_storage=storage, dtype=torch.uint8, _internal=True), *rest)  # type: ignore[no-any-return,no-untyped-call]
