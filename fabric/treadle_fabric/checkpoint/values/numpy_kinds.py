"""NumPy's arrays, scalars, dtypes and generators of random numbers as plain values.

NumPy is imported only where a program or a file has them.
"""

from __future__ import annotations

from typing import Any, Final

import torch

from treadle_fabric.checkpoint.values.standard_kinds import NoPlainFormError

__all__ = ["make", "take"]
_NUMBERS: Final = "biufc"
_BITS: Final = ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")
"""The sources of random bits that NumPy has."""


def take(value: Any) -> tuple[str, Any, Any] | None:
    """The kind of a value, its content and its dtype; None for what is not of NumPy."""
    np = _numpy()
    if isinstance(value, np.generic):
        if type(value) is not value.dtype.type:  # a class that someone derived
            return None
        if value.dtype.kind == "U":
            return "numpy.scalar", str(value), value.dtype.str
        number = value.item() if value.dtype.kind in _NUMBERS else None
        if type(number) in (bool, int, float, complex):
            return "numpy.scalar", number, value.dtype.str
        content, more = _bytes_of(np.asarray(value))
        return "numpy.raw_scalar", content, more
    if type(value) is np.ndarray:
        tensor = _tensor_of(value)
        return ("numpy.raw", *_bytes_of(value)) if tensor is None else ("numpy.array", tensor, value.dtype.str)
    if isinstance(value, np.dtype):
        return "numpy.dtype", _described(value), None
    if type(value) is np.random.Generator:
        return "numpy.Generator", value.bit_generator.state, _seeds_of(value.bit_generator)
    if type(value) is np.random.RandomState:
        state = value.get_state(legacy=False)
        if state["bit_generator"] not in _BITS:
            raise NoPlainFormError
        return "numpy.RandomState", state, None
    return None


def make(name: str, content: Any, more: Any) -> Any:
    """The value that :func:`take` took apart."""
    np = _numpy()
    if name == "numpy.array":
        return content.cpu().numpy().astype(_dtype(more), copy=False)
    if name == "numpy.scalar":
        return _dtype(more).type(content)
    if name == "numpy.dtype":
        return _dtype(content)
    if name in ("numpy.Generator", "numpy.RandomState"):
        return _random(name, content, more)
    if name not in ("numpy.raw", "numpy.raw_scalar"):
        raise LookupError(name)
    dtype, shape = more
    array = np.frombuffer(content.cpu().numpy().tobytes(), dtype=_dtype(dtype)).reshape(shape).copy()
    return array if name == "numpy.raw" else array[()]


def _numpy() -> Any:
    import numpy  # need not be installed

    return numpy


def _seeds_of(bits: Any) -> Any:
    """What a source of random bits needs beside its state, to make more sources (``generator.spawn``)."""
    np = _numpy()
    seeds = bits.seed_seq
    if type(bits).__name__ not in _BITS or type(seeds) is not np.random.SeedSequence:
        raise NoPlainFormError
    return seeds.state


def _random(name: str, state: Any, seeds: Any) -> Any:
    random = _numpy().random
    if state["bit_generator"] not in _BITS:
        raise LookupError(state["bit_generator"])
    bits = getattr(random, state["bit_generator"])
    if name == "numpy.RandomState":
        made = random.RandomState(bits())
        made.set_state(state)
    else:
        made = random.Generator(bits(random.SeedSequence(**seeds)))
        made.bit_generator.state = state
    return made


def _tensor_of(array: Any) -> torch.Tensor | None:
    """The array as a tensor, which shares its memory where it can; None where torch has no such dtype."""
    np = _numpy()
    if array.dtype.kind not in _NUMBERS or not array.dtype.isnative:
        return None
    whole = array.flags.c_contiguous and array.flags.writeable
    try:
        return torch.from_numpy(array if whole else np.array(array, order="C"))
    except TypeError:
        return None


def _bytes_of(array: Any) -> tuple[Any, Any]:
    """The bytes of an array as a tensor, and its dtype and shape."""
    described = _described(array.dtype)
    return torch.frombuffer(bytearray(array.tobytes()) or bytearray(1), dtype=torch.uint8)[: array.nbytes], (
        described,
        list(array.shape),
    )


def _described(dtype: Any) -> Any:
    described = dtype.str if dtype.fields is None else dtype.descr
    if dtype.hasobject or _dtype(described) != dtype:
        raise NoPlainFormError
    return described


def _dtype(described: Any) -> Any:
    np = _numpy()
    dtype: Any = np.dtype(described)
    if dtype.hasobject:
        raise ValueError(f"the dtype {dtype} is of Python objects")
    return dtype
