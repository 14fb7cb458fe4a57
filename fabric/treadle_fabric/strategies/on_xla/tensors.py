"""Move modules to devices of XLA, and run what is recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Module

from treadle_fabric.checkpoint.host.xla_io import on_host
from treadle_fabric.errors import MisconfigurationException

__all__ = ["copy_from_rank_zero", "move_module", "run_recorded"]


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
