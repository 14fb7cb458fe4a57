"""The state of one generator: PyTorch's, NumPy's or Python's."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

from treadle_fabric.randomness.state import plain_state, state_with_arrays

__all__ = []


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
        return plain_state(generator.bit_generator.state)
    return plain_state(generator.get_state(legacy=False))


def set_generator_state(generator: Any, state: Any) -> None:
    """Put back what :func:`generator_state` returned."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        version, words, gauss = state
        generator.setstate((version, tuple(words), gauss))
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state_with_arrays(state)
    else:
        generator.set_state(state_with_arrays(state))
