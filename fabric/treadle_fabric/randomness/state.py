"""The random state of a process: Python's, NumPy's and PyTorch's generators together."""

from __future__ import annotations

import ctypes
import random
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from treadle_fabric.randomness.seeds import numpy_if_imported

__all__ = ["NumPyState", "collect_rng_states", "isolate_rng", "rng_states_of", "same_rng_states", "set_rng_states"]


def collect_rng_states(include_cuda: bool = True) -> dict[str, Any]:
    """The state of every global random generator, as tensors and plain containers.

    Args:
        include_cuda: Also the generators of CUDA or MPS devices that are in use.

    Returns:
        Keys "torch", "python", "numpy" (where installed), "cuda" (a list with one state a device) and "mps".
    """
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if (numpy := numpy_if_imported()) is not None:
        states["numpy"] = _numpy_state(numpy)
    if include_cuda:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            states["cuda"] = torch.cuda.get_rng_state_all()
        if torch.backends.mps.is_available():
            states["mps"] = torch.mps.get_rng_state()
    return states


_NUMPY_WORDS = 4 * 625  # bytes: 624 words and a position


def _numpy_address(numpy: Any) -> int:
    """The address of the words of NumPy's global generator; 0 where it is unknown."""
    get_generator = getattr(numpy.random, "get_bit_generator", None)  # NumPy 1.24
    generator: Any = get_generator() if get_generator is not None else None
    return generator.ctypes.state_address if type(generator).__name__ == "MT19937" else 0


def _numpy_words(numpy: Any) -> bytes:
    address = _numpy_address(numpy)
    return ctypes.string_at(address, _NUMPY_WORDS) if address else b""


class NumPyState:
    """NumPy's global random state at one moment; it is set again in microseconds where only its words differ."""

    __slots__ = ("_full", "_has_gauss", "_words")

    def __init__(self, words: bytes) -> None:
        self._words = words
        self._full = sys.modules["numpy"].random.get_state()
        self._has_gauss = bool(self._full[3])

    @staticmethod
    def read(known: NumPyState | None = None) -> NumPyState:
        """The state now: ``known``, the last one that was read, if it has not changed since."""
        words = _numpy_words(sys.modules["numpy"])
        unchanged = words and known is not None and known._words == words and not known._has_gauss
        return known if unchanged and known is not None else NumPyState(words)

    def replace(self, current: NumPyState) -> None:
        """Set this state; ``current`` is the one that is set now."""
        if self is current and not self._has_gauss:
            return
        numpy = sys.modules["numpy"]
        if self._words and current._words and not (self._has_gauss or current._has_gauss):
            ctypes.memmove(_numpy_address(numpy), self._words, _NUMPY_WORDS)
        else:
            numpy.random.set_state(self._full)


_last_numpy_state: tuple[bytes, tuple[Any, ...]] | None = None


def _numpy_state(numpy: Any) -> tuple[Any, ...]:
    """NumPy's state, as tensors and plain values.

    NumPy takes 60 us to give its state, which seldom changes: it is asked only where the words are not those of the
    last state. A normal variate that is kept for the next call is part of the state and changes no words when it is
    used, so a state with one is never taken for unchanged.
    """
    global _last_numpy_state
    words = _numpy_words(numpy)
    if words and _last_numpy_state is not None and _last_numpy_state[0] == words:
        return _last_numpy_state[1]
    name, keys, position, has_gauss, gauss = numpy.random.get_state()
    # weights_only=True refuses NumPy arrays, so the words are kept in a tensor
    state = (name, torch.from_numpy(keys.astype("int64")), position, has_gauss, gauss)
    _last_numpy_state = (words, state) if words and not has_gauss else None
    return state


def same_rng_states(a: Any, b: Any) -> bool:
    """Whether two states that :func:`collect_rng_states` returned are the same, in the generators that both have."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, Mapping):
        return all(same_rng_states(a[kind], b[kind]) for kind in a.keys() & b.keys())
    if isinstance(a, (list, tuple)) and any(isinstance(part, torch.Tensor) for part in a):
        return all(map(same_rng_states, a, b))
    return bool(tuple(a) == tuple(b)) if isinstance(a, (list, tuple)) else bool(a == b)


def set_rng_states(rng_state_dict: Mapping[str, Any]) -> None:
    """Set the states that :func:`collect_rng_states` returned; other generators stay as they are."""
    if "torch" in rng_state_dict:
        torch.set_rng_state(rng_state_dict["torch"])
    if "python" in rng_state_dict:
        version, words, gauss = rng_state_dict["python"]
        random.setstate((version, tuple(words), gauss))
    if "numpy" in rng_state_dict and (numpy := numpy_if_imported()) is not None:
        name, keys, *rest = rng_state_dict["numpy"]
        numpy.random.set_state((name, numpy.asarray(keys).astype("uint32"), *rest))
    if "cuda" in rng_state_dict and torch.cuda.is_available():
        for device, state in zip(range(torch.cuda.device_count()), rng_state_dict["cuda"]):
            torch.cuda.set_rng_state(state, device)
    if "mps" in rng_state_dict and torch.backends.mps.is_available():
        torch.mps.set_rng_state(rng_state_dict["mps"])


@contextmanager
def isolate_rng(include_cuda: bool = True) -> Iterator[None]:
    """On exit every global generator has the state that it had on entry.

    Args:
        include_cuda: Also the generators of CUDA or MPS devices that are in use.
    """
    states = collect_rng_states(include_cuda)
    try:
        yield
    finally:
        set_rng_states(states)


def rng_states_of(ranks: Sequence[dict[str, Any]], rank: int) -> dict[str, Any]:
    """The random states for a rank, from those that the ranks of an earlier run had.

    Args:
        ranks: What :func:`collect_rng_states` returned on each rank of that run.
        rank: The rank now. One that the earlier run did not have gets states of its own, made from those of rank 0.
    """
    if rank < len(ranks):
        return ranks[rank]
    first = ranks[0]
    with isolate_rng():
        seed = zlib.crc32(b"%d" % rank + first["torch"].numpy().tobytes())
        torch.manual_seed(seed)
        random.seed(seed)
        new = collect_rng_states()
    if "numpy" in first:
        name, words, *rest = first["numpy"]
        new["numpy"] = (name, words ^ seed, *rest)
    return new
