"""Compare what ranks are about to exchange: gloo ends the process, without a traceback, where shapes differ."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import time
import weakref
from collections import defaultdict
from collections.abc import Callable
from types import CodeType
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from treadle_fabric.containers import leaves_by_path
from treadle_fabric.coordination.waiting import list_ranks
from treadle_fabric.errors import MisconfigurationException

__all__ = ["check_alike"]

_LIBRARIES: Final = ("treadle", "treadle_fabric")
_PATIENCE: Final = 10.0  # seconds that a rank waits for the others before it goes on
_SHORTEST_LOOK: Final = 0.0002  # seconds between two looks at the store; each one is longer than the one before
_LONGEST_LOOK: Final = 0.02
_MOST_PLACES: Final = 1024


def check_alike(
    data: Any,
    group: Any | None,
    method: str,
    dtype_of: Callable[[torch.dtype], torch.dtype] = lambda dtype: dtype,
    *,
    call_at_times: Callable[[Any, Callable[[Any], object]], bool] = lambda owner, function: False,
) -> None:
    """Raise, on every rank, if ranks are about to exchange tensors of different shapes.

    Ranks compare at the first call of each place, which is the line of the user's code together with the structure of
    the data, and at every call under ``torch.autograd.detect_anomaly`` (``detect_anomaly`` of the Trainer).

    The rule cannot deadlock, although ranks may call from different lines, so that a call is the first of its place on
    some ranks only. The n-th call of a group is the n-th on every rank, or the exchange itself would never end. A rank
    that does not compare only counts, and another thread of it leaves word in the store of how far it has come. A rank
    that compares leaves its shapes there, and waits until each other rank has left one or the other. Rank 0 of the
    group gives the verdict. Where ranks come more than 10 s apart, the first ones go on, and the last one finds their
    shapes.

    Args:
        data: Tensors in containers, and other values.
        group: The process group. Default: all ranks.
        method: What is called, for an error.
        dtype_of: The dtype in which tensors of a dtype are exchanged.
        call_at_times: Has a function called a few times a second by another thread, with the first argument as long as
            that lives; returns whether there is such a thread. Default: there is none, and every call leaves word.

    Raises:
        MisconfigurationException: Shapes, dtypes or structures differ; the error says which each rank has.
    """
    if torch.compiler.is_compiling():
        return
    default = dist.group.WORLD if group is None else group
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    if size < 2 or rank < 0:
        return
    calls = _calls.get(default)
    if calls is None:
        calls = _calls[default] = _Calls(default, rank, size)
        calls.told_by_thread = call_at_times(calls, _tell)
    calls.next(data, method, dtype_of)


class _Calls:
    """The calls of a group so far, and the places that they came from."""

    def __init__(self, group: Any, rank: int, size: int) -> None:
        name = group.group_name
        self._rank, self._size = rank, size
        self._key = f"treadle/alike/{name}/{next(_numbers[name])}"
        store: Any = dist.distributed_c10d._get_default_store()
        self._store = store.clone()  # a connection of its own: one that waits in it keeps no other thread waiting
        self._count = 0
        self._passed = self._told = 0  # the last call that was not compared, and of which word was left
        self.told_by_thread = False
        self._used: list[str] = []  # keys of the last comparison, which other ranks may still read
        self._places: set[Any] = set()
        self._store.set(f"{self._key}/at/{rank}", "0")

    def next(self, data: Any, method: str, dtype_of: Callable[[torch.dtype], torch.dtype]) -> None:
        self._count += 1
        leaves = list(leaves_by_path(data, lambda value: isinstance(value, Tensor)))
        code, line = _line_of_user()
        place = (method, code, line, tuple((path, _kind(leaf)) for path, leaf in leaves))
        if place in self._places:
            if not torch.is_anomaly_enabled():
                self._passed = self._count
                if not self.told_by_thread:
                    self.tell()
                return
        elif len(self._places) < _MOST_PLACES:
            self._places.add(place)
        mine = json.dumps([[path, _shape(leaf), _dtype(leaf, dtype_of)] for path, leaf in leaves])
        try:
            verdict = self._lead(mine) if self._rank == 0 else self._follow(mine)
        except dist.DistNetworkError:  # the store went with its process: the exchange itself will tell of that
            return
        if verdict:
            file = "?" if code is None else code.co_filename
            raise MisconfigurationException(_explained(json.loads(verdict), f"{method} ({file}:{line})"))

    def tell(self) -> None:
        """Leave word of how far this rank has come without comparing."""
        passed = self._passed
        if passed != self._told:
            self._store.set(f"{self._key}/at/{self._rank}", str(passed))
            self._told = passed

    def _lead(self, mine: str) -> str:
        """Compare the shapes of all ranks that compare; give and return the verdict, empty if they are alike."""
        key, store = f"{self._key}/{self._count}", self._store
        store.set(f"{key}/0", mine)
        others = [f"{key}/{rank}" for rank in range(1, self._size)]
        self._await(others, [f"{self._key}/at/{rank}" for rank in range(1, self._size)])
        there = others if store.check(others) else [other for other in others if store.check([other])]
        found = {0: mine}
        if there:
            texts = store.multi_get(there)
            found |= {int(k.rpartition("/")[2]): text.decode() for k, text in zip(there, texts, strict=True)}
        verdict = json.dumps(found) if len(set(found.values())) > 1 else ""
        store.set(f"{key}/verdict", verdict)
        if len(found) == self._size:  # all have come through the comparison before this one
            for used in (*others, *self._used):
                store.delete_key(used)
            self._used = [f"{key}/0", f"{key}/verdict"]
        return verdict

    def _follow(self, mine: str) -> str:
        """Take the verdict of rank 0; where rank 0 has gone on before it could give any, compare with rank 0."""
        key, store = f"{self._key}/{self._count}", self._store
        store.set(f"{key}/{self._rank}", mine)
        self._await([f"{key}/verdict"], [f"{self._key}/at/0"])
        verdict = store.get(f"{key}/verdict").decode() if store.check([f"{key}/verdict"]) else ""
        if not verdict and store.check([f"{key}/0"]):
            theirs = store.get(f"{key}/0").decode()
            verdict = json.dumps({0: theirs, self._rank: mine}) if theirs != mine else ""
        return str(verdict)

    def _await(self, keys: list[str], counts: list[str]) -> None:
        """Wait for keys, but only as long as the ranks that are to set them have not passed by, as ``counts`` say."""
        until, pause = time.monotonic() + _PATIENCE, _SHORTEST_LOOK
        while not self._store.check(keys) and time.monotonic() < until:  # wait(keys) writes to stderr when it is over
            missing = [i for i, key in enumerate(keys) if not self._store.check([key])]
            if all(self._store.check([counts[i]]) and int(self._store.get(counts[i])) >= self._count for i in missing):
                return
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_LOOK)


def _tell(calls: _Calls) -> None:
    with contextlib.suppress(RuntimeError):  # the store went with its process
        calls.tell()


_numbers: defaultdict[str, itertools.count[int]] = defaultdict(itertools.count)
_calls: weakref.WeakKeyDictionary[Any, _Calls] = weakref.WeakKeyDictionary()


def _line_of_user() -> tuple[CodeType | None, int]:
    """The innermost frame that is not of the library."""
    frame: Any = sys._getframe(3)
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _LIBRARIES:
        frame = frame.f_back
    return (None, 0) if frame is None else (frame.f_code, frame.f_lineno)


def _kind(leaf: Any) -> Any:
    return (leaf.dim(), leaf.dtype) if isinstance(leaf, Tensor) else leaf is None


def _shape(leaf: Any) -> list[int] | str:
    return list(leaf.shape) if isinstance(leaf, Tensor) else "" if leaf is None else "another value"


def _dtype(leaf: Any, dtype_of: Callable[[torch.dtype], torch.dtype]) -> str:
    return str(dtype_of(leaf.dtype)).removeprefix("torch.") if isinstance(leaf, Tensor) else ""


def _explained(headers: dict[str, str], call: str) -> str:
    """The message: the first leaf that differs, and which ranks have what there."""
    ranks = {int(rank): json.loads(header) for rank, header in headers.items()}
    longest = max(map(len, ranks.values()))

    def have(number: int, part: int) -> dict[str, list[int]]:
        groups: dict[str, list[int]] = defaultdict(list)
        for rank, leaves in ranks.items():
            groups[json.dumps(leaves[number][part]) if number < len(leaves) else "nothing"].append(rank)
        return groups

    for number in range(longest):
        paths = have(number, 0)
        if len(paths) > 1:
            told = {("nothing" if p == "nothing" else f"data{json.loads(p)}"): r for p, r in paths.items()}
            return _message(call, "structures differ", "its next value", told)
        path = f"data{json.loads(next(iter(paths)))}"
        if len(shapes := have(number, 1)) > 1:
            return _message(call, "shapes differ", path, {_shown(json.loads(s)): r for s, r in shapes.items()})
        if len(dtypes := have(number, 2)) > 1:
            return _message(call, "dtypes differ", path, {json.loads(d): r for d, r in dtypes.items()})
    raise AssertionError("the headers are alike")


def _shown(shape: list[int] | str) -> str:
    return f"shape {tuple(shape)}" if isinstance(shape, list) else shape or "None"


def _message(call: str, what: str, path: str, told: dict[str, list[int]]) -> str:
    lists = "; ".join(f"{value} on {list_ranks(ranks)}" for value, ranks in told.items())
    return (
        f"{call}: {what} between the ranks. {path} is {lists}. Tensors that ranks exchange have one shape"
        " and dtype on all of them: pad them to it, or exchange values of any size with"
        " treadle_fabric.all_gather_objects(fabric, value)."
    )
