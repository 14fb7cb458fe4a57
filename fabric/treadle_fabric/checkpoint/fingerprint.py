"""Whether ranks have the same tensor, told without sending it: the buffers of a module, for example, may differ."""

from __future__ import annotations

import ctypes
import functools
import hashlib
from typing import Final

import torch
from torch import Tensor

__all__ = ["fingerprint"]

_SUMS: Final = 2**17
"""So many sums, 1 MB, are on the device at a time. They stand for 2**28 values."""


def fingerprint(tensor: Tensor) -> str:
    """A hash of the dtype, the shape and the bytes of a tensor, of which little more than that leaves its device.

    It is made of sums modulo 2**64, with a random weight for each place, the same in every process. Two tensors that
    differ have the same fingerprint with a probability of 2**-33 at most, were the weights drawn for them. Compare
    fingerprints of one release, on machines of one byte order: they are not for files.
    """
    values = tensor.detach().resolve_conj().resolve_neg().contiguous().flatten()
    if values.is_complex():
        values = torch.view_as_real(values).flatten()
    # no value of eight bytes: where only their highest bits differ, half of the weights would make no difference
    values = values.view({1: torch.uint8, 2: torch.int16}.get(values.element_size(), torch.int32))
    weights = _weights().to(values.device)
    width = len(weights)
    rows = 16 if values.device.type == "cpu" else 2048  # the products, eight bytes a value, fit into its cache
    whole = len(values) // width * width
    hashed = hashlib.blake2b(
        f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16
    )  # hash() is each process's own
    sums = torch.empty(min(_SUMS, whole // width), dtype=torch.int64, device=values.device)
    for many in torch.split(values[:whole].view(-1, width), _SUMS):
        for part, into in zip(torch.split(many, rows), torch.split(sums[: len(many)], rows), strict=True):
            torch.sum(part * weights, 1, out=into)
        _update(hashed, sums[: len(many)])
    _update(hashed, values[whole:])
    return hashed.hexdigest()


def _update(hashed: hashlib.blake2b, values: Tensor) -> None:
    """Enter the bytes of a contiguous tensor."""
    if values.numel():
        on_host = values.cpu()
        hashed.update((ctypes.c_char * on_host.nbytes).from_address(on_host.data_ptr()))


@functools.cache
def _weights() -> Tensor:
    """The same in every process."""
    return torch.randint(-(2**63), 2**63 - 1, (2048,), generator=torch.Generator().manual_seed(0), device="cpu")
