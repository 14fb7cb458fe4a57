"""The state of one generator: PyTorch's, NumPy's or Python's."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

from treadle_fabric.containers import map_leaves

__all__ = []


def is_generator(value: Any) -> bool:
    """Whether a value is a random generator of PyTorch's, Python's or NumPy's."""
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
    """Give a generator the state that :func:`generator_state` returned."""
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
    return map_leaves(state, lambda value: value.tolist() if hasattr(value, "tolist") else value)


def _with_arrays(state: Any) -> Any:
    array = sys.modules["numpy"].array
    return map_leaves(state, lambda words: array(words, dtype="uint64"), lambda value: isinstance(value, list))
