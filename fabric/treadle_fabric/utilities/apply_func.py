"""What moves batches and changes their leaves, where users of Lightning Fabric look for it."""

from __future__ import annotations

from abc import ABCMeta
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from treadle_fabric.batches import map_tensors, move_data_to_device
from treadle_fabric.errors import MisconfigurationException

__all__ = [
    "_TransferableDataType",
    "apply_to_collection",
    "convert_tensors_to_scalars",
    "convert_to_tensors",
    "move_data_to_device",
]


class _TransferableDataType(metaclass=ABCMeta):  # noqa: B024 its subclasses have the method
    """What can be moved to a device: every class with a method ``to``."""

    @classmethod
    def __subclasshook__(cls, subclass: Any) -> Any:
        return callable(getattr(subclass, "to", None)) if cls is _TransferableDataType else NotImplemented


def convert_to_tensors(data: Any, device: torch.device | str | int) -> Any:
    """Make tensors of the numbers and arrays in nested containers, and move all tensors to a device.

    Args:
        data: Numbers, truth values, NumPy arrays and tensors, in containers. Anything else is left as it is.
        device: The device of the tensors.
    """
    dtypes = ((bool, torch.uint8), (int, torch.int), (float, torch.float))
    for kind, dtype in dtypes:  # bool first, which is an int

        def made(value: Any, kind: type = kind, dtype: torch.dtype = dtype) -> Any:
            return torch.tensor(value, dtype=dtype, device=device) if type(value) is kind else value

        data = apply_to_collection(data, kind, made)
    arrays = apply_to_collection(data, _arrays(), torch.from_numpy)
    return move_data_to_device(arrays, device)


def _arrays() -> Any:
    from numpy import ndarray  # torch has not imported NumPy

    return ndarray


def convert_tensors_to_scalars(data: Any) -> Any:
    """Make Python numbers of the tensors with one element in nested containers.

    Raises:
        MisconfigurationException: A tensor has another number of elements.
    """

    def number(tensor: Tensor) -> Any:
        if tensor.numel() != 1:
            raise MisconfigurationException(
                f"A tensor of shape {tuple(tensor.shape)} does not contain a single element, so it is no number: reduce"
                " the tensor, with `.mean()` say."
            )
        return tensor.item()

    return map_tensors(data, number)
