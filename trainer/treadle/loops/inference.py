"""Keep what an evaluation under ``torch.inference_mode`` makes from getting into training.

Autograd refuses the tensors that are made in inference mode, for ever. A model that builds a table in its first forward
(of rotary embeddings, for example) would keep such a tensor, so the tensors that are found after an evaluation are
replaced by ordinary ones.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from treadle_fabric import MisconfigurationException, map_tensors, with_plain_names

__all__ = [
    "explain_inference_tensor",
    "explain_missing_gradients",
    "outside_inference_mode",
    "replace_inference_tensors",
    "without_inference",
]

_PLAIN: Final = frozenset({int, float, str, bool, bytes, complex, type(None)})
_NOT_OPENED: Final = (type, types.ModuleType, types.FunctionType, Dataset, DataLoader, Sampler, torch.Generator)
_LIBRARIES: Final = frozenset({"builtins", "torch", "treadle", "treadle_fabric"})
_DEPTH: Final = 4  # of plain objects inside each other
_MOST: Final = 200_000  # values looked at: about 50 ms


def without_inference(data: Any) -> Any:
    """Return ``data`` with an ordinary copy in the place of each tensor made in inference mode; parameters become
    ordinary ones themselves.
    """
    return map_tensors(data, lambda tensor: _copy(tensor) if tensor.is_inference() else tensor)


def _copy(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        copied = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):  # stays itself, of its class and with its attributes, such as scales
        tensor.data = copied
        return tensor
    return copied.requires_grad_(tensor.requires_grad)


def outside_inference_mode(make: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """Iterate as in training, without inference mode: a dataset may keep tensors that it loads, for its next users.

    Args:
        make: makes the iterator.
    """
    with torch.inference_mode(False), torch.no_grad():
        items = make()
    while True:
        try:
            with torch.inference_mode(False), torch.no_grad():
                item = next(items)
        except StopIteration:
            return
        yield item


def replace_inference_tensors(owners: Iterable[Any]) -> None:
    """Replace the tensors that were made in inference mode in modules, callbacks and the like.

    Found are parameters and their gradients, buffers, and attributes: of submodules and other objects, of their
    classes, and in lists, tuples, sets, deques and dicts. A tensor that is found at several places stays one tensor.

    Args:
        owners: the objects whose attributes are searched.
    """
    if not torch.is_inference_mode_enabled():
        search = _Search()
        for owner in owners:
            search.open(owner, 0)


class _Search:
    """One search. It goes past ``__setattr__`` and ``__setitem__``, so that no code of the user runs."""

    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}
        self._copies: dict[int, Tensor] = {}

    def of(self, value: Any, depth: int) -> Any:
        """Return what takes the place of ``value``: itself, unless it is or holds a tensor made in inference mode."""
        kind = type(value)
        if kind in _PLAIN:
            return value
        if isinstance(value, Tensor):
            return self._tensor(value)
        if id(value) in self._seen or len(self._seen) >= _MOST:
            return value
        self._seen[id(value)] = value  # kept, so that no other object gets its id
        if isinstance(value, dict):
            for key, old in list(value.items()):
                if (new := self.of(old, depth)) is not old:
                    dict.__setitem__(value, key, new)
        elif isinstance(value, (list, deque)):
            store: Any = list.__setitem__ if isinstance(value, list) else deque.__setitem__
            for i, old in enumerate(list(value)):
                if (new := self.of(old, depth)) is not old:
                    store(value, i, new)
        elif kind in (tuple, set, frozenset) or hasattr(kind, "_fields"):
            items = [self.of(item, depth) for item in value]
            if any(new is not old for new, old in zip(items, value, strict=True)):
                return kind(*items) if hasattr(kind, "_fields") else kind(items)
        elif isinstance(value, nn.Module) or self._is_opened(value, kind, depth):
            self.open(value, 0 if isinstance(value, nn.Module) else depth + 1)
        return value

    def open(self, owner: Any, depth: int) -> None:
        """Search the attributes of an object, and of the classes of a module."""
        self._seen[id(owner)] = owner
        attributes = getattr(owner, "__dict__", {})
        for name, old in list(attributes.items()):
            if (new := self.of(old, depth)) is not old:
                attributes[name] = new
        for cls in type(owner).__mro__:
            if _library(cls) in _LIBRARIES:
                continue
            for name, old in list(vars(cls).items()):
                if isinstance(old, types.MemberDescriptorType):  # of __slots__
                    self._slot(owner, old, depth)
                elif isinstance(old, (Tensor, dict, list)) and (new := self.of(old, depth)) is not old:
                    type.__setattr__(cls, name, new)

    def _slot(self, owner: Any, slot: types.MemberDescriptorType, depth: int) -> None:
        try:
            old = slot.__get__(owner)
        except AttributeError:
            return
        if (new := self.of(old, depth)) is not old:
            slot.__set__(owner, new)

    def _is_opened(self, value: Any, kind: type, depth: int) -> bool:
        return depth < _DEPTH and not isinstance(value, _NOT_OPENED) and _library(kind) not in _LIBRARIES

    def _tensor(self, tensor: Tensor) -> Tensor:
        gradient = tensor.grad if tensor.is_leaf else None
        if not tensor.is_inference():
            if gradient is not None and gradient.is_inference():
                tensor.grad = _copy(gradient)
            return tensor
        if id(tensor) not in self._copies:
            self._seen[id(tensor)] = tensor
            self._copies[id(tensor)] = _copy(tensor)
        return self._copies[id(tensor)]


def _library(cls: type) -> str:
    return str(cls.__module__).partition(".")[0]


def explain_missing_gradients(error: RuntimeError, hook: str) -> None:
    """Raise a clearer error where an evaluation under ``torch.inference_mode`` asks for gradients.

    Args:
        error: What the evaluation raised.
        hook: The hook that ran, such as "test_step".

    Raises:
        MisconfigurationException: The message names the argument.
    """
    if "does not require grad" in str(error) or _is_about_inference(error):
        raise MisconfigurationException(
            f"`{hook}` asks for gradients, and this evaluation runs under `torch.inference_mode`, where not even"
            " `torch.enable_grad()` records them. Pass `inference_mode=False` to the Trainer. (Validation inside fit"
            f" runs under `torch.no_grad`.) torch's error: {error}"
        ) from error


def _is_about_inference(error: RuntimeError) -> bool:
    return "nference tensor" in str(error) or "inference mode" in str(error)


def explain_inference_tensor(error: RuntimeError, module: nn.Module) -> MisconfigurationException | None:
    """Return a clearer error where torch refused to train with a tensor made in inference mode; None for other errors.

    Args:
        error: what training raised.
        module: the module that is trained.
    """
    if not _is_about_inference(error):
        return None
    parts = dict(with_plain_names(module, module.named_modules()))  # of a compiled module, the module inside
    names = {id(part): name for name, part in parts.items()}
    where, traceback = "", error.__traceback__
    while traceback is not None:  # the innermost submodule whose method ran
        running = names.get(id(traceback.tb_frame.f_locals.get("self")))
        where = where if running is None else running
        traceback = traceback.tb_next
    name = f"{type(module).__qualname__}.{where}" if where else type(module).__qualname__
    kind = type(parts[where]).__name__
    return MisconfigurationException(
        f"{name} (a {kind}) trains with a tensor that was made under `torch.inference_mode`, perhaps in an earlier"
        " validate, test or predict, and kept where Treadle does not find it, in a cache of a function for example. Set"
        " `inference_mode=False` in the Trainer of that evaluation, or make the tensor in `__init__`, or keep a"
        " `.clone()` that is made outside of inference mode."
    )
