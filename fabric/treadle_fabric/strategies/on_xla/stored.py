"""What checkpoints keep of parameters that may be parts; nothing heavy is imported for those that are whole."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from treadle_fabric.strategies.parts import is_part, whole_shape

__all__ = ["as_part", "from_part"]


def as_part(parameter: Any, value: Tensor) -> Tensor:
    """A gradient, say, of a parameter as checkpoints keep it: a DTensor on the host if this process has a part of it.

    Args:
        parameter: Of any strategy.
        value: Of the shape that the parameter has here.
    """
    if not is_part(parameter) or value.shape != parameter.shape:
        return value
    from treadle_fabric.strategies.on_xla.parts import give_part  # for the few who use XLA

    return give_part(parameter, value)


def from_part(parameter: Any, value: Tensor) -> Tensor:
    """The part of this process of what :func:`as_part` made, here or elsewhere; ``value`` if the parameter is whole."""
    if not is_part(parameter) or value.shape != whole_shape(parameter):
        return value
    from treadle_fabric.strategies.on_xla.parts import take_part  # for the few who use XLA

    return take_part(parameter, value)
