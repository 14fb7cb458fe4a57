"""Bring tensors from devices of XLA to the host."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from treadle_fabric.batches import map_tensors

__all__ = ["on_host", "run_recorded"]


def run_recorded() -> None:
    """Run what was recorded for the device since the last time; this does not wait for the results."""
    import torch_xla  # an extra

    torch_xla.sync()


def on_host(data: Any) -> Any:
    """Return the same containers, with copies on the CPU of what is on devices of XLA, in one transfer.

    A file with such copies is read by any process, with torch-xla or without.
    """
    import torch_xla  # an extra

    found: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.device.type == "xla":
            found[id(tensor)] = tensor
        return tensor

    map_tensors(data, note)
    if not found:
        return data
    torch_xla._XLAC._xla_sync_multi(list(found.values()), devices=[], wait=True, sync_xla_data=True)
    copies = dict(zip(found, torch_xla._XLAC._xla_get_cpu_tensors([t.detach() for t in found.values()]), strict=True))
    return map_tensors(data, lambda tensor: copies.get(id(tensor), tensor))
