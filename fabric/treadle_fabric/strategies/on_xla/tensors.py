"""Move tensors to devices of XLA and to the host, and run what is recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from treadle_fabric.batches import map_tensors
from treadle_fabric.errors import MisconfigurationException

__all__ = ["copy_from_rank_zero", "move_module", "on_host", "run_recorded"]


def move_module(module: Module, device: torch.device) -> None:
    """Move a module; its parameters stay the objects that optimizers hold.

    Without swapping, ``Module.to`` makes new parameters for devices of XLA, whose tensors are of another kind inside.

    Raises:
        MisconfigurationException: A parameter cannot be swapped, because something else refers to its memory.
    """
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(device.type == "xla" or before)
    try:
        module.to(device)
    except RuntimeError as error:
        if "swap" not in str(error):
            raise
        raise MisconfigurationException(
            f"The parameters of {type(module).__name__} cannot be moved to {device} in place ({error}): set the module "
            "up before its first forward pass, and keep no weak references to its parameters."
        ) from error
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def copy_from_rank_zero(module: Module, broadcast: Callable[[Any], Any]) -> None:
    """Give parameters and buffers the values that rank 0 has; every rank calls this.

    Args:
        module: On the device.
        broadcast: Returns the object that rank 0 has.
    """
    tensors = [*module.parameters(), *module.buffers()]
    values = broadcast(on_host([tensor.detach() for tensor in tensors]))
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)
    run_recorded()


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
