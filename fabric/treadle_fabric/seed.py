"""Random seeds and random state: Python's, NumPy's and PyTorch's together."""

from __future__ import annotations

import ctypes
import hashlib
import os
import random
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn

__all__ = [
    "NumPyState",
    "collect_rng_states",
    "global_seed",
    "isolate_rng",
    "reset_seed",
    "rng_states_of",
    "seed_everything",
    "set_rng_states",
    "worker_init_function",
]

_MAX_SEED = 2**32 - 1  # NumPy takes no larger one


def _numpy() -> ModuleType | None:
    """NumPy, unless it is not installed."""
    try:
        import numpy
    except ImportError:
        return None
    return numpy


def seed_everything(seed: int | None = None, workers: bool = False, verbose: bool = True) -> int:
    """Seed Python's, NumPy's and PyTorch's (every device's) global random generators.

    Launched processes get the seed through the environment variables ``PL_GLOBAL_SEED`` and ``PL_SEED_WORKERS``.

    Args:
        seed: From 0 to 4294967295. By default ``PL_GLOBAL_SEED``, or 0 with a warning where that is not set.
        workers: Also seed the worker processes of data loaders, each rank and worker differently.
        verbose: Tell about it.

    Returns:
        The seed that was set.

    Raises:
        MisconfigurationException: The seed is no integer, or out of range.
    """
    if seed is None:
        source, number = "PL_GLOBAL_SEED", global_seed()
        if verbose and "PL_GLOBAL_SEED" not in os.environ:
            rank_zero_warn("No seed was given and PL_GLOBAL_SEED is not set: the seed is 0.")
    else:
        source, number = "seed", _integer("seed", seed)
    if not 0 <= number <= _MAX_SEED:
        raise MisconfigurationException(f"{source}={number} is out of range. Give one from 0 to {_MAX_SEED}.")
    if verbose:
        rank_zero_info(f"Seed set to {number}")
    os.environ["PL_GLOBAL_SEED"] = str(number)
    os.environ["PL_SEED_WORKERS"] = str(int(workers))
    random.seed(number)
    torch.manual_seed(number)
    if (numpy := _numpy()) is not None:
        numpy.random.seed(number)
    return number


def global_seed() -> int:
    """The seed in ``PL_GLOBAL_SEED``, which :func:`seed_everything` sets; 0 where it is not set.

    Raises:
        MisconfigurationException: It is no integer.
    """
    return _integer("PL_GLOBAL_SEED", os.environ.get("PL_GLOBAL_SEED", 0))


def _integer(source: str, value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise MisconfigurationException(f"{source}={value!r} is no integer. Give one from 0 to {_MAX_SEED}.") from None


def reset_seed() -> None:
    """Set the seed of the last :func:`seed_everything` again; nothing happens if there was none."""
    if "PL_GLOBAL_SEED" in os.environ:
        seed_everything(workers=os.environ.get("PL_SEED_WORKERS", "0") not in ("", "0"), verbose=False)


def worker_init_function(worker_id: int, rank: int | None = None) -> None:
    """A data loader's ``worker_init_fn`` that gives each worker of each rank random numbers of its own.

    Ranks that start from one seed would otherwise draw the same augmentations. The streams still depend on the
    loader's base seed, and so change from epoch to epoch.

    Args:
        worker_id: The index of the worker.
        rank: The global rank; by default the one of ``rank_zero_only``.
    """
    rank = getattr(rank_zero_only, "rank", 0) if rank is None else rank
    base = torch.initial_seed() - worker_id
    digest = hashlib.blake2b(f"{base}/{rank}/{worker_id}".encode(), digest_size=32).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little"))
    random.seed(digest[8:16])
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed([int.from_bytes(digest[i : i + 4], "little") for i in range(16, 32, 4)])


def collect_rng_states(include_cuda: bool = True) -> dict[str, Any]:
    """The state of every global random generator, as tensors and plain containers.

    Args:
        include_cuda: Also those of the devices that are in use, CUDA's or MPS's.

    Returns:
        Keys "torch", "python", "numpy" (where installed), "cuda" (a list, one a device) and "mps".
    """
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if (numpy := _numpy()) is not None:
        states["numpy"] = _numpy_state(numpy)
    if include_cuda:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            states["cuda"] = torch.cuda.get_rng_state_all()
        if torch.backends.mps.is_available():
            states["mps"] = torch.mps.get_rng_state()
    return states


_NUMPY_WORDS = 4 * 625  # bytes: 624 words and a position


def _numpy_address(numpy: Any) -> int:
    """Where NumPy's global generator keeps its words; 0 where that cannot be told."""
    get_generator = getattr(numpy.random, "get_bit_generator", None)  # NumPy 1.24
    generator: Any = get_generator() if get_generator is not None else None
    return generator.ctypes.state_address if type(generator).__name__ == "MT19937" else 0


def _numpy_words(numpy: Any) -> bytes:
    address = _numpy_address(numpy)
    return ctypes.string_at(address, _NUMPY_WORDS) if address else b""


class NumPyState:
    """NumPy's global random state at one moment, to be put back in microseconds where only its words differ."""

    __slots__ = ("_full", "_has_gauss", "_words")

    def __init__(self, words: bytes) -> None:
        self._words = words
        self._full = sys.modules["numpy"].random.get_state()
        self._has_gauss = bool(self._full[3])

    @staticmethod
    def read(known: NumPyState | None = None) -> NumPyState:
        """The state now; ``known``, the last one that was there, if it has not changed since."""
        words = _numpy_words(sys.modules["numpy"])
        unchanged = words and known is not None and known._words == words and not known._has_gauss
        return known if unchanged and known is not None else NumPyState(words)

    def replace(self, current: NumPyState) -> None:
        """Put this state back in the place of the current one."""
        if self is current and not self._has_gauss:
            return
        numpy = sys.modules["numpy"]
        if self._words and current._words and not (self._has_gauss or current._has_gauss):
            ctypes.memmove(_numpy_address(numpy), self._words, _NUMPY_WORDS)
        else:
            numpy.random.set_state(self._full)


_last_numpy_state: tuple[bytes, tuple[Any, ...]] | None = None


def _numpy_state(numpy: Any) -> tuple[Any, ...]:
    """NumPy takes 60 us to tell its state, which seldom changes: it is asked only where its words have moved.

    A normal variate that is kept for the next call is part of the state and moves no words when it is used, so a state
    with one is never taken for unchanged.
    """
    global _last_numpy_state
    words = _numpy_words(numpy)
    if words and _last_numpy_state is not None and _last_numpy_state[0] == words:
        return _last_numpy_state[1]
    name, keys, position, has_gauss, gauss = numpy.random.get_state()
    # weights_only refuses NumPy arrays, so the words travel as a tensor
    state = (name, torch.from_numpy(keys.astype("int64")), position, has_gauss, gauss)
    _last_numpy_state = (words, state) if words and not has_gauss else None
    return state


def set_rng_states(rng_state_dict: Mapping[str, Any]) -> None:
    """Put back what :func:`collect_rng_states` returned; generators it does not hold stay as they are."""
    if "torch" in rng_state_dict:
        torch.set_rng_state(rng_state_dict["torch"])
    if "python" in rng_state_dict:
        version, words, gauss = rng_state_dict["python"]
        random.setstate((version, tuple(words), gauss))
    if "numpy" in rng_state_dict and (numpy := _numpy()) is not None:
        name, keys, *rest = rng_state_dict["numpy"]
        numpy.random.set_state((name, numpy.asarray(keys).astype("uint32"), *rest))
    if "cuda" in rng_state_dict and torch.cuda.is_available():
        for device, state in zip(range(torch.cuda.device_count()), rng_state_dict["cuda"]):
            torch.cuda.set_rng_state(state, device)
    if "mps" in rng_state_dict and torch.backends.mps.is_available():
        torch.mps.set_rng_state(rng_state_dict["mps"])


def is_generator(value: Any) -> bool:
    """Whether it is a random generator of PyTorch's, Python's or NumPy's."""
    if isinstance(value, (torch.Generator, random.Random)):
        return not isinstance(value, random.SystemRandom)  # which has no state
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.random.Generator, numpy.random.RandomState))


def generator_state(generator: Any) -> Any:
    """The state of a generator object, as tensors and plain containers."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if hasattr(generator, "bit_generator"):
        return _plain(generator.bit_generator.state)
    return _plain(generator.get_state(legacy=False))


def set_generator_state(generator: Any, state: Any) -> None:
    """Put back what :func:`generator_state` returned."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        version, words, gauss = state
        generator.setstate((version, tuple(words), gauss))
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = _with_arrays(state)
    else:
        generator.set_state(_with_arrays(state))


def _plain(state: Any) -> Any:
    """NumPy's states are nested dictionaries with arrays of words, which weights_only refuses."""
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    return state.tolist() if hasattr(state, "tolist") else state


def _with_arrays(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _with_arrays(value) for key, value in state.items()}
    return sys.modules["numpy"].array(state, dtype="uint64") if isinstance(state, list) else state


@contextmanager
def isolate_rng(include_cuda: bool = True) -> Iterator[None]:
    """Random numbers drawn inside leave no trace: on exit every global generator is as it was on entry."""
    states = collect_rng_states(include_cuda)
    try:
        yield
    finally:
        set_rng_states(states)


def rng_states_of(ranks: Sequence[dict[str, Any]], rank: int) -> dict[str, Any]:
    """What :func:`collect_rng_states` returned on a rank; for one that was not there, states made of the first's."""
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
