"""Tensors of a checkpoint folder that are read when they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._pytree import tree_map_only

from treadle_fabric.checkpoint.folder.source import FolderSource
from treadle_fabric.checkpoint.stored.chunks import read_chunk
from treadle_fabric.containers import holds_state, leaves, map_leaves
from treadle_fabric.errors import CheckpointError

__all__ = ["StoredTensor", "in_memory", "stored_tensors", "tensors_on_demand"]

T = TypeVar("T")
_on_demand: ContextVar[bool] = ContextVar("treadle_tensors_on_demand", default=False)


@contextmanager
def tensors_on_demand() -> Iterator[None]:
    """What is loaded inside from a folder has a :class:`StoredTensor` in the place of each large tensor on the CPU.

    Such a tensor is read when it is used, whole or a part of it, also after the block. It raises a CheckpointError
    where another checkpoint has taken the place of the folder since. A file is read, or mapped, as ever.
    """
    token = _on_demand.set(True)
    try:
        yield
    finally:
        _on_demand.reset(token)


def stored_tensors() -> bool:
    """Whether this is inside of :func:`tensors_on_demand`."""
    return _on_demand.get()


class Readable(Protocol):
    """The content of a tensor that is read when it is used."""

    entry: Mapping[str, Any]
    """Its "shape"."""
    dtype: torch.dtype
    kept: Tensor | None
    """What was read, once something refers to its memory or has written to it."""

    def fill(self, target: Tensor, offsets: Sequence[int]) -> None:
        """Copy the part that begins at ``offsets`` and has the shape of ``target``."""

    def keep(self) -> Tensor:
        """The whole content, which stays in memory."""


class Content:
    """The content of a tensor in a checkpoint folder.

    Args:
        source: The folder.
        entry: The tensor, as the manifest has it.
        dtype: Its dtype.
        opened: The identity of the folder when its files were checked.
    """

    def __init__(
        self, source: FolderSource, entry: Mapping[str, Any], dtype: torch.dtype, opened: tuple[int, ...] | None
    ) -> None:
        self.source, self.entry, self.dtype, self.opened = source, entry, dtype, opened
        self.kept: Tensor | None = None
        """What was read, once something refers to its memory or has written to it."""

    def fill(self, target: Tensor, offsets: Sequence[int]) -> None:
        """Copy the part that begins at ``offsets`` and has the shape of ``target``; only that is read.

        Raises:
            CheckpointError: It cannot be read, or the folder is not there any more. ``target`` may be changed.
        """
        if self.kept is not None:
            target.copy_(self.kept[tuple(slice(o, o + s) for o, s in zip(offsets, target.shape, strict=True))])
            return
        try:
            for chunk in self.entry["chunks"]:
                bounds = [
                    (max(o, at), min(o + s, at + size))
                    for o, s, at, size in zip(offsets, target.shape, chunk["offsets"], chunk["sizes"], strict=True)
                ]
                if any(begin >= end for begin, end in bounds):
                    continue
                box = [(begin - at, end - begin) for (begin, end), at in zip(bounds, chunk["offsets"], strict=True)]
                into = target[tuple(slice(b - o, e - o) for (b, e), o in zip(bounds, offsets, strict=True))]
                read_chunk(self.source, chunk, self.dtype, box, into)
        finally:
            if self.source.identity() != self.opened:
                raise CheckpointError(
                    f"{self.source.name!r} was removed or replaced after it was loaded. Load it again."
                )

    def keep(self) -> Tensor:
        """The whole content, which stays in memory."""
        if self.kept is None:
            found = torch.empty(self.entry["shape"], dtype=self.dtype, device="cpu")
            self.fill(found, [0] * found.dim())
            self.kept = found
        return self.kept


def _memory(*names: str) -> frozenset[Any]:
    return frozenset(getattr(Tensor, name) for name in names if hasattr(Tensor, name))


_NEED_MEMORY: Final = _memory(
    *"numpy tolist data_ptr untyped_storage storage _typed_storage storage_type share_memory_ is_shared".split(),
    *"__array__ __dlpack__ __dlpack_device__ pin_memory item __reduce_ex__ __format__".split(),
)
"""What looks at the memory of a tensor without an operation of torch."""


class StoredTensor(Tensor):
    """A tensor of a checkpoint folder that has shape and dtype, and is read when it is used.

    An operation that only reads gives what it gives of the content, which is not kept. With one that gives a view, or
    that writes, the content stays in memory, so that both sides see what is written. Copied or pickled it is a plain
    tensor. ``region`` and ``fill`` read a part of it.
    """

    _content: Readable

    @staticmethod
    def __new__(cls, content: Readable, requires_grad: bool = False) -> StoredTensor:
        device = torch.device("cpu")
        found: Any = Tensor._make_wrapper_subclass(
            cls, content.entry["shape"], dtype=content.dtype, device=device, requires_grad=requires_grad
        )
        found._content = content
        made: StoredTensor = found
        return made

    def __init__(self, content: Readable, requires_grad: bool = False) -> None:
        super().__init__()

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _NEED_MEMORY:
            return func(*_kept(args), **_kept(kwargs or {}))
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        operation = func.overloadpacket
        aten = torch.ops.aten
        first: Any = args[0] if args else None
        if operation is aten.detach or operation is aten.alias:
            return StoredTensor(first._content)
        if operation is aten.copy_ and type(first) in (Tensor, Parameter) and type(args[1]) is StoredTensor:
            if first.shape == args[1].shape:
                args[1]._content.fill(first, [0] * first.dim())
                return first
        if operation in (aten.clone, aten._to_copy) and kwargs.get("memory_format") in _IN_ORDER:
            dtype, device = kwargs.get("dtype"), kwargs.get("device")
            found = torch.empty(first.shape, dtype=dtype or first.dtype, device=device or "cpu")
            if not found.is_meta:
                first._content.fill(found, [0] * found.dim())
            return found
        aliased = {each.name for each in func._schema.arguments if each.alias_info is not None}
        named = zip(func._schema.arguments, args, strict=False)
        positional = [(_kept if each.name in aliased else _read)(value) for each, value in named]
        return func(*positional, **{key: (_kept if key in aliased else _read)(kwargs[key]) for key in kwargs})

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = _as_made(self, torch.clone(_detached(self)))
        found: Tensor = memo[id(self)]
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain: Any = in_memory(self)
        return plain.__reduce_ex__(protocol)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        try:
            return repr(in_memory(self))
        except CheckpointError as e:
            return f"<a tensor of the shape {list(self.shape)} that cannot be read: {e}>"


_IN_ORDER: Final = (None, torch.preserve_format, torch.contiguous_format)


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


def _as_made(stored: StoredTensor, plain: Tensor) -> Tensor:
    """The plain tensor with what else ``stored`` is: a parameter, or one that requires a gradient."""
    if isinstance(stored, Parameter):
        return Parameter(plain, stored.requires_grad)
    return plain.requires_grad_(stored.requires_grad)


def _kept(value: Any) -> Any:
    return tree_map_only(StoredTensor, lambda stored: stored._content.keep(), value)


def _read(value: Any) -> Any:
    def read(stored: StoredTensor) -> Tensor:
        content = stored._content
        if content.kept is not None:
            return content.kept
        found = torch.empty(stored.shape, dtype=content.dtype, device="cpu")
        content.fill(found, [0] * found.dim())
        return found

    return tree_map_only(StoredTensor, read, value)


def in_memory(value: T) -> T:
    """The value with plain tensors, read now, for stored ones in containers of any kind; itself if it has none.

    What is one tensor stays one.
    """
    if not any(isinstance(leaf, StoredTensor) for leaf in leaves(value, _is_leaf)):
        return value
    made: dict[int, Tensor] = {}

    def plain(each: Any) -> Any:
        if not isinstance(each, StoredTensor):
            return each
        if id(each) not in made:
            made[id(each)] = _as_made(each, _read(each).detach())
        return made[id(each)]

    with torch.no_grad():
        found: T = map_leaves(value, plain, _is_leaf)
    return found


def _is_leaf(value: Any) -> bool:
    return not holds_state(value)
