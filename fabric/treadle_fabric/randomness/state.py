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

from treadle_fabric.randomness.seeds import numpy_if_imported, running_xla

__all__ = [
    "NumPyState",
    "as_own_rng_states",
    "collect_rng_states",
    "isolate_rng",
    "own_rng_states",
    "rng_states_of",
    "same_rng_states",
    "set_rng_states",
]

_SEED_AND_OFFSET = 16  # bytes of the state of a CUDA generator: two integers


def collect_rng_states(include_cuda: bool = True) -> dict[str, Any]:
    """The state of every global random generator, as tensors and plain containers.

    Args:
        include_cuda: Also the generators of CUDA or MPS devices that are in use.

    Returns:
        Keys "torch", "python", "numpy" (where installed), "cuda" (a list with one state a visible device), "own_cuda"
        (the state of the current CUDA device, which may have another index where the state is set again), "mps" and
        "xla".
    """
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if (numpy := numpy_if_imported()) is not None:
        states["numpy"] = _numpy_state(numpy)
    if include_cuda:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            states["cuda"] = torch.cuda.get_rng_state_all()
            states["own_cuda"] = states["cuda"][torch.cuda.current_device()]
        if torch.backends.mps.is_available():
            states["mps"] = torch.mps.get_rng_state()
        states.update(_xla_state())
    return states


def _xla_state() -> dict[str, Any]:
    """The state of the device of XLA, a number, where this process has one."""
    if (xla := running_xla()) is None:
        return {}
    sys.modules["torch_xla"].sync()  # what is recorded may draw from the generator
    return {"xla": xla.get_rng_state()}


def own_rng_states() -> dict[str, Any]:
    """The state of every global generator that this rank draws from, for a rank that goes on, perhaps elsewhere.

    Returns:
        What :func:`collect_rng_states` does, but in place of "cuda" the key "other_cuda": by index, the states of
        devices other than the current one that this process computes on. Reading them makes no context on a device.
    """
    states = collect_rng_states(include_cuda=False)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["own_cuda"] = torch.cuda.get_rng_state()
        own, uses = torch.cuda.current_device(), getattr(torch._C, "_cuda_hasPrimaryContext", lambda index: False)
        others = [index for index in range(torch.cuda.device_count()) if index != own and uses(index)]
        if others:
            states["other_cuda"] = {index: torch.cuda.get_rng_state(index) for index in others}
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    states.update(_xla_state())
    return states


def as_own_rng_states(states: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """What :func:`own_rng_states` would have returned, from what it or :func:`collect_rng_states` did return.

    Checkpoints held the states of all visible devices once. A rank draws on its own device only: that is the generator
    from which most was drawn or, if that does not tell, the one with the local rank's index.

    Args:
        states: The states of a rank.
        rank: The global rank of the process that they are of.
    """
    own = {kind: state for kind, state in states.items() if kind != "cuda"}
    if states.get("cuda") and "own_cuda" not in states:
        own["own_cuda"] = states["cuda"][_drawn_from(states["cuda"], rank)]
    return own


def _drawn_from(devices: Sequence[torch.Tensor], rank: int) -> int:
    alone = [i for i, one in enumerate(devices) if sum(torch.equal(one, other) for other in devices) == 1]
    if len(alone) == 1 != len(devices):
        return alone[0]
    if all(state.numel() == _SEED_AND_OFFSET for state in devices):
        seeds, offsets = zip(*(state.contiguous().view(torch.int64).tolist() for state in devices))
        if len(set(seeds)) == 1 and offsets.count(most := max(offsets)) == 1:
            return int(offsets.index(most))
    return rank % len(devices)


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
    """Whether two states are the same in the generators that both have; one function returned both."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, Mapping):
        return all(same_rng_states(a[kind], b[kind]) for kind in a.keys() & b.keys())
    if isinstance(a, (list, tuple)) and any(isinstance(part, torch.Tensor) for part in a):
        return all(map(same_rng_states, a, b))
    return bool(tuple(a) == tuple(b)) if isinstance(a, (list, tuple)) else bool(a == b)


def set_rng_states(rng_state_dict: Mapping[str, Any]) -> None:
    """Set the states that :func:`collect_rng_states` or :func:`own_rng_states` returned.

    The current CUDA device gets the state of the device that was current then. Other generators stay as they are.
    """
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
    if "own_cuda" in rng_state_dict and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng_state_dict["own_cuda"])  # where CUDA is not used yet, as soon as it is
    if "other_cuda" in rng_state_dict and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for device, state in rng_state_dict["other_cuda"].items():
            if device < torch.cuda.device_count() and device != torch.cuda.current_device():
                torch.cuda.set_rng_state(state, device)
    if "mps" in rng_state_dict and torch.backends.mps.is_available():
        torch.mps.set_rng_state(rng_state_dict["mps"])
    if "xla" in rng_state_dict and (xla := running_xla()) is not None:
        xla.set_rng_state(rng_state_dict["xla"])


@contextmanager
def isolate_rng(include_cuda: bool = True) -> Iterator[None]:
    """On exit every global generator has the state that it had on entry.

    Args:
        include_cuda: Also the generators of CUDA or MPS devices that are in use.
    """
    states = collect_rng_states(include_cuda)
    states.pop("own_cuda", None)  # each device gets its own back, whichever is the current one then
    try:
        yield
    finally:
        set_rng_states(states)


def rng_states_of(ranks: Sequence[dict[str, Any]], rank: int) -> dict[str, Any]:
    """The random states for a rank, from those that the ranks of an earlier run had.

    Args:
        ranks: What :func:`own_rng_states` returned on each rank of that run.
        rank: The rank now. One that the earlier run did not have gets states of its own, made from those of rank 0.
    """
    if rank < len(ranks):
        return as_own_rng_states(ranks[rank], rank)
    first = ranks[0]
    with isolate_rng():
        seed = zlib.crc32(b"%d" % rank + first["torch"].numpy().tobytes())
        torch.manual_seed(seed)
        random.seed(seed)
        new = own_rng_states()
    if "numpy" in first:
        name, words, *rest = first["numpy"]
        new["numpy"] = (name, words ^ seed, *rest)
    return new
