"""Whether ranks have the same tensor, told without sending it: the buffers of a module, for example, may differ."""

from __future__ import annotations

import functools
import hashlib

import torch
from torch import Tensor

__all__ = ["fingerprint"]


def fingerprint(tensor: Tensor) -> str:
    """A hash of the dtype, the shape and the bytes of a tensor, of which little more than that leaves its device.

    It is made of sums modulo 2**64, with a random weight for each place, the same in every process. Two tensors that
    differ have the same fingerprint with a probability of 2**-33 at most, were the weights drawn for them.
    """
    values = tensor.detach().resolve_conj().resolve_neg().contiguous().flatten()
    if values.is_complex():
        values = torch.view_as_real(values).flatten()
    # no value of eight bytes: where only their highest bits differ, half of the weights would make no difference
    values = values.view({1: torch.uint8, 2: torch.int16}.get(values.element_size(), torch.int32))
    weights = _weights().to(values.device)
    width = len(weights)
    rows = 16 if values.device.type == "cpu" else 2048  # the products, eight bytes a value, fit into its cache
    sums: list[Tensor] = []
    for part in torch.split(values, width * rows):
        whole = len(part) // width * width
        sums += (part[:whole].view(-1, width) * weights).sum(1), part[whole:].to(torch.int64)
    told = f"{tensor.dtype} {tuple(tensor.shape)} {torch.cat(sums).tolist()}"
    return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()  # hash() differs from process to process


@functools.cache
def _weights() -> Tensor:
    """The same in every process."""
    return torch.randint(-(2**63), 2**63 - 1, (2048,), generator=torch.Generator().manual_seed(0), device="cpu")
