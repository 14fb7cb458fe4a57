"""What objects hold at one moment, to be put back later: in place, so that every object stays itself."""

from __future__ import annotations

import enum
import functools
import io
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, Dataset

from treadle.module import LightningDataModule
from treadle_fabric import Fabric, Strategy, rank_zero_warn
from treadle_fabric.checkpoint import is_sharded_tensor
from treadle_fabric.loggers import Logger

__all__ = ["Snapshot"]

Undo = Callable[[], None]

_PLAIN: Final = frozenset({int, float, str, bool, bytes, complex, type(None), torch.dtype, torch.device, torch.Size})
_NOT_OPENED: Final = (
    type, types.ModuleType, types.FunctionType, types.GeneratorType, enum.Enum, io.IOBase,
    Fabric, Strategy, Logger,
)  # fmt: skip
_NOT_OPENED_FROM: Final = (
    "torch._", "torch.cuda.", "torch.distributed.", "torch.utils.data.dataloader._", "torch.utils.tensorboard.",
    "logging.", "threading.", "multiprocessing.", "concurrent.", "asyncio.", "weakref.", "treadle.trainer.",
    "treadle.run.", "treadle.metrics.", "treadle.callbacks.",
)  # fmt: skip
"""Modules, or beginnings of qualified names, of classes whose objects belong to the process and not to a model."""
_SMALL_BYTES: Final = 1 << 20
_FEW: Final = 1000


class Snapshot:
    """What objects hold at one moment.

    Noted is all that can be reached from the objects: the values of tensors and their gradients, what requires
    gradients, attributes, containers, random generators. Values are kept in host memory, one copy of each; no file is
    written.
    What is not noted: large tensors, arrays and lists of datasets and data modules (data is read and not written);
    files, processes and iterators; variables that functions refer to; and the runtime, loggers and trainers.

    Args:
        *owners: Modules, optimizers and other objects.
        data: Loaders and data modules.
        values: Whether to note the values of tensors. Default: True. False notes the objects alone, so that what has
            been made since can be dropped.
    """

    def __init__(self, *owners: Any, data: Iterable[Any] = (), values: bool = True) -> None:
        self._values = values
        self._seen: dict[int, Any] = {}  # kept, so that no other object gets the id
        self._undo: list[tuple[Any, Undo]] = []
        self._tensors: list[tuple[Any, Undo]] = []
        self.add(*owners, data=data)

    def add(self, *owners: Any, data: Iterable[Any] = ()) -> None:
        """Note further objects, as they are now; of those that are noted already, the first state stays."""
        with torch.no_grad(), torch.inference_mode(False):
            self._note_all([(owner, False) for owner in owners])
            self._note_all([(owner, True) for owner in data])

    def restore(self) -> None:
        """Put everything back; it may be called again after further changes."""
        failed: dict[str, str] = {}
        with torch.no_grad(), torch.inference_mode(False):
            for owner, undo in (*self._undo, *self._tensors):
                try:
                    undo()
                except Exception as error:  # what a class of the user's refuses must not keep the rest from its place
                    failed.setdefault(type(owner).__qualname__, f"{type(error).__name__}: {error}")
        if failed:
            what = "; ".join(f"{name} ({why})" for name, why in failed.items())
            rank_zero_warn(f"After trial batches, objects of these classes could not be put back as they were: {what}.")

    def _note_all(self, stack: list[tuple[Any, bool]]) -> None:
        while stack:
            value, is_data = stack.pop()
            if type(value) in _PLAIN or id(value) in self._seen or not _is_opened(value):
                continue
            self._seen[id(value)] = value
            is_data |= isinstance(value, (Dataset, DataLoader, LightningDataModule))
            stack += [(inner, is_data) for inner in self._note(value, is_data)]

    def _note(self, value: Any, is_data: bool) -> Iterable[Any]:
        """Note what one object holds; returns the objects in it."""
        if isinstance(value, Tensor):
            return self._note_tensor(value, is_data)
        if isinstance(value, (dict, list, deque, set)):
            inside = self._note_container(value)
            return [*(() if is_data and len(value) > _FEW else inside), *self._note_attributes(value)]
        if isinstance(value, (tuple, frozenset)):
            return () if is_data and len(value) > _FEW else value
        if isinstance(value, (types.MethodType, types.BuiltinMethodType)):
            return (value.__self__,)
        if isinstance(value, functools.partial):
            return (value.func, *value.args, *value.keywords.values())
        if (undo := _generator(value)) is not None:
            self._undo.append((value, undo))
            return ()
        if (numpy := sys.modules.get("numpy")) is not None and isinstance(value, numpy.ndarray):
            if value.flags.writeable and not (is_data and value.nbytes > _SMALL_BYTES):
                self._undo.append((value, functools.partial(numpy.copyto, value, value.copy())))
            return ()
        return self._note_attributes(value)

    def _note_container(self, value: Any) -> list[Any]:
        held: Any = value.copy() if type(value) in (dict, list, deque, set) else None
        if held is None:
            held = dict(value.items()) if isinstance(value, Mapping) else list(value)
        mapping = isinstance(value, Mapping)

        def undo() -> None:
            now = list(value.items()) if mapping else list(value)
            if not _same_objects(now, list(held.items()) if mapping else list(held)):
                value.clear()
                (value.extend if isinstance(value, (list, deque)) else value.update)(held)

        self._undo.append((value, undo))
        return [*held.keys(), *held.values()] if mapping else list(held)

    def _note_attributes(self, value: Any) -> Iterable[Any]:
        held: dict[str, Any] = getattr(value, "__dict__", None) or {}
        kind, before = type(value), dict(held)
        every = [slot for cls in kind.__mro__ for slot in vars(cls).values() if _is_slot(slot, cls)]
        slots = {slot: slot.__get__(value) for slot in every if _is_set(slot, value)}

        def undo() -> None:
            if type(value) is not kind:  # a lazy layer has become an ordinary one
                object.__setattr__(value, "__class__", kind)
            now: dict[str, Any] | None = getattr(value, "__dict__", None)
            if now is not None and not _same_objects(list(now.items()), list(before.items())):
                now.clear()
                now.update(before)
            for slot in every:
                if slot not in slots and _is_set(slot, value):
                    slot.__delete__(value)
                elif slot in slots and not (_is_set(slot, value) and slot.__get__(value) is slots[slot]):
                    slot.__set__(value, slots[slot])

        if before or every or isinstance(getattr(value, "__dict__", None), dict):
            self._undo.append((value, undo))
        return [*before.values(), *slots.values()]

    def _note_tensor(self, tensor: Tensor, is_data: bool) -> Iterable[Any]:
        inside: list[Any] = list(vars(tensor).values()) if hasattr(tensor, "__dict__") else []
        kind, attributes = type(tensor), dict(getattr(tensor, "__dict__", {}))
        if is_lazy(tensor):
            self._tensors.append((tensor, functools.partial(_make_lazy_again, tensor, kind, tensor.data)))
            return inside
        leaf, required, gradient = tensor.is_leaf, tensor.requires_grad, tensor.grad if tensor.is_leaf else None
        alias = tensor.data  # the memory itself: it stays where it is when a module moves to another device
        sharded = is_sharded_tensor(tensor)  # torch may give a rank's part other memory, which alone is gathered then
        large = is_data and tensor.numel() * tensor.element_size() > _SMALL_BYTES
        copy = None if large or not self._values else _host_copy(alias)

        def undo() -> None:
            memory = tensor.data if sharded else alias
            if copy is not None:
                with torch.inference_mode(memory.is_inference()):
                    memory.copy_(copy)
            if self._values and not sharded and not _same_memory(tensor.data, alias):
                tensor.data = alias
            if leaf:
                if tensor.grad is not gradient:
                    tensor.grad = gradient
                if tensor.requires_grad is not required:
                    tensor.requires_grad_(required)
            now = getattr(tensor, "__dict__", None)
            if now is not None and not _same_objects(list(now.items()), list(attributes.items())):
                now.clear()
                now.update(attributes)

        self._tensors.append((tensor, undo))
        return inside if gradient is None else [*inside, gradient]


def _is_opened(value: Any) -> bool:
    kind = type(value)
    if isinstance(value, _NOT_OPENED):
        return False
    name = f"{kind.__module__}.{kind.__qualname__}"
    return not name.startswith(_NOT_OPENED_FROM) or isinstance(value, (Tensor, torch.Generator))


def _same_objects(now: list[Any], before: list[Any]) -> bool:
    """Whether two lists hold the same objects, or the same pairs of objects, in the same order."""
    if len(now) != len(before):
        return False
    if now and type(now[0]) is tuple and type(before[0]) is tuple and len(now[0]) == 2 == len(before[0]):
        return all(
            a is b or (type(a) is tuple is type(b) and len(a) == 2 == len(b) and a[0] is b[0] and a[1] is b[1])
            for a, b in zip(now, before, strict=True)
        )
    return all(a is b for a, b in zip(now, before, strict=True))


def _is_slot(member: Any, cls: type) -> bool:
    return isinstance(member, types.MemberDescriptorType) and cls.__module__ != "builtins"


def _is_set(slot: types.MemberDescriptorType, value: Any) -> bool:
    try:
        slot.__get__(value)
    except AttributeError:
        return False
    return True


def _host_copy(memory: Tensor) -> Tensor | None:
    """A copy of a tensor's values; None for memory that cannot be written as a whole, such as an expanded tensor's."""
    if memory.is_meta or (memory.layout is torch.strided and any(s == 0 < n - 1 for s, n in _strides(memory))):
        return None
    return memory.clone() if memory.device.type == "cpu" else memory.to("cpu", copy=True)


def _strides(memory: Tensor) -> Iterable[tuple[int, int]]:
    return zip(memory.stride(), memory.shape, strict=True)


def _same_memory(now: Tensor, before: Tensor) -> bool:
    if now.layout is not torch.strided or before.layout is not torch.strided:
        return now is before
    return (
        now.device == before.device
        and now.dtype == before.dtype
        and now.shape == before.shape
        and now.stride() == before.stride()
        and (now.is_meta or now.data_ptr() == before.data_ptr())
    )


def _make_lazy_again(parameter: Any, kind: type, data: Tensor) -> None:
    if type(parameter) is not kind:
        parameter.data = data
        parameter.__class__ = kind


def _generator(value: Any) -> Undo | None:
    """What puts the state of a random generator back; None for other objects."""
    if isinstance(value, torch.Generator):
        state = value.get_state()

        def undo() -> None:
            value.set_state(state)

        return undo
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return functools.partial(value.setstate, value.getstate())
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return functools.partial(value.set_state, value.get_state())
    if numpy is not None and isinstance(value, (numpy.random.Generator, numpy.random.BitGenerator)):
        bits = getattr(value, "bit_generator", value)
        return functools.partial(setattr, bits, "state", bits.state)
    return None
