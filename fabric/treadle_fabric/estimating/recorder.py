"""What a training step allocates, frees and sends: recorded operation by operation, and read afterwards."""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Final, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from treadle_fabric.estimating.collectives import Call, call_of, is_collective, make_work, returned_by

__all__ = ["LABELS", "Peak", "Recorder"]

LABELS: Final = (
    "parameters",
    "buffers",
    "gradients",
    "optimizer_state",
    "inputs",
    "communication",
    "activations",
)
"""What memory is for. A storage that has several of these purposes counts as the first of them."""


_ONES: Final = {torch.bool: False, torch.complex64: 1 + 0j, torch.complex128: 1 + 0j}
"""Values that are read from tensors without values, by dtype: a condition is not met, and nothing is divided by 0."""


class _Event(NamedTuple):
    storage: int
    size: int
    """The bytes that it has from now on."""


@dataclass(frozen=True)
class Peak:
    """When most memory was allocated at once."""

    total: int
    """Bytes."""
    parts: dict[str, int]
    """The bytes of each label then."""
    phase: str
    """What ran then."""


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storages that are alive, and counts collectives.

    A storage is what tensors have in common that are views of one another. It is alive from the operation that made
    it until the last of these tensors is gone. Labels may be given at any time: they are looked at when the peak is
    asked for.

    Args:
        fake: Do not run collectives of ``torch.distributed``, and take each value that is read from a tensor for one
            (``False``).
    """

    def __init__(self, fake: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fake = fake
        self._numbers: Any = WeakIdKeyDictionary()
        self._sizes: dict[int, int] = {}  # of those that are alive
        self._labels: dict[int, str] = {}
        self._events: list[_Event] = []
        self._phases: list[tuple[int, str]] = [(0, "forward")]  # from which event on
        self._known = 0  # the number of storages when the events began
        self._made = 0
        self._patches = ExitStack()
        self._works: list[Any] = []  # torch keeps a handle that was made in Python, but not what Python knows of it
        self.calls: list[tuple[str, Call]] = []
        """The phase and the collective, in order."""
        self.values_read = 0
        """How many values of tensors the forward pass asked for."""

    def __enter__(self) -> Recorder:
        resize = torch.UntypedStorage.resize_

        def resized(storage: Any, size: int) -> Any:
            result = resize(storage, size)
            self._note(storage, "communication" if size else None)
            return result

        self._patches.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", resized))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._patches.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(_unfolds(each) for each in types):
            return NotImplemented  # it runs operations on the tensors that it consists of
        if self._fake and func is torch.ops.aten._local_scalar_dense.default:
            self.values_read += self.phase == "forward"  # later, torch asks for numbers of steps, for example
            return _ONES.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        if not is_collective(func):
            result = func(*args, **kwargs)
            if not func.is_view:
                for each in tree_leaves(result):
                    if isinstance(each, Tensor):
                        self._note(each.untyped_storage())
            return result
        return self._collective(func, args, kwargs)

    def _collective(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if self._fake and func.namespace == "c10d":
            result = returned_by(func, args, self._done)
        else:
            result = func(*args, **kwargs)
        call, buffers = call_of(func, args, kwargs, result)
        if call is not None:
            self.calls.append((self.phase, call))
        for buffer in buffers:
            self._note(buffer.untyped_storage(), "communication")
        return result

    @property
    def phase(self) -> str:
        """What runs now."""
        return self._phases[-1][1]

    def enter(self, phase: str) -> None:
        """Say what runs from now on."""
        self._phases.append((len(self._events), phase))

    def restart(self, phase: str) -> None:
        """Forget what happened before; what is alive stays known."""
        self._events = [_Event(number, size) for number, size in self._sizes.items()]
        self._known = len(self._events) - 1
        self._phases = [(0, phase)]
        self.calls.clear()
        self._works.clear()

    def label(self, tensors: Iterable[Any], label: str) -> int:
        """Say what tensors are for; returns their bytes, each storage once."""
        seen: dict[int, int] = {}
        for tensor in tensors:
            for storage in _storages(tensor):
                number = self._note(storage, label)
                seen[number] = storage.nbytes()
        return sum(seen.values())

    def peak(self, without: Collection[str] = ()) -> Peak:
        """When the storages, without those of some labels, had most bytes."""
        best, at, parts = -1, 0, dict[str, int]()
        for index, sums in self._sums():
            total = sum(size for label, size in sums.items() if label not in without)
            if total > best:
                best, at, parts = total, index, {label: sums[label] for label in LABELS if label not in without}
        return Peak(max(best, 0), parts, self._phase_of(at))

    def most(self, label: str, phases: Collection[str] = ()) -> int:
        """The most bytes that the storages of a label had in some phases. Default: in all."""
        return max((sums[label] for i, sums in self._sums() if not phases or self._phase_of(i) in phases), default=0)

    def _sums(self) -> Iterator[tuple[int, Counter[str]]]:
        """After each event, the bytes of each label; the same object each time."""
        alive: dict[int, int] = {}
        sums = Counter[str]()
        for index, (number, size) in enumerate(self._events):
            sums[self._labels.get(number, "activations")] += size - alive.get(number, 0)
            alive[number] = size
            if index >= self._known:  # what was there before came all at once
                yield index, sums

    def _phase_of(self, event: int) -> str:
        return self._phases[bisect_right(self._phases, event, key=itemgetter(0)) - 1][1]

    def _note(self, storage: Any, label: str | None = None) -> int:
        number: int | None = self._numbers.get(storage)
        size = storage.nbytes()
        if number is None:
            number = self._made = self._made + 1
            self._numbers[storage] = number
            weakref.finalize(storage, self._free, number).atexit = False
        if label is not None:
            known = self._labels.get(number)
            if known is None or LABELS.index(label) < LABELS.index(known):
                self._labels[number] = label
        if self._sizes.get(number) != size:
            self._sizes[number] = size
            self._events.append(_Event(number, size))
        return number

    def _done(self, tensors: list[Tensor]) -> Any:
        work = make_work(tensors)
        self._works.append(work)
        return work.boxed()

    def _free(self, number: int) -> None:
        if self._sizes.pop(number, 0):
            self._events.append(_Event(number, 0))


def _unfolds(kind: type) -> bool:
    return hasattr(kind, "__tensor_flatten__")


def _storages(tensor: Any) -> Iterable[Any]:
    if _unfolds(type(tensor)):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _storages(getattr(tensor, name))
    elif isinstance(tensor, Tensor):
        yield tensor.untyped_storage()
