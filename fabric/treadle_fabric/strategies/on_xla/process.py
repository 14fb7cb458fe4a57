"""Make the device of a process of several ready, before XLA's runtime starts in it."""

from __future__ import annotations

import os

import torch

from treadle_fabric.errors import MisconfigurationException

__all__ = ["begin_process"]


def begin_process(local_rank: int, local_size: int) -> None:
    """Tell PJRT which device of this machine is that of this process, as ``torch_xla.launch`` does.

    Args:
        local_rank: This process among those of its machine.
        local_size: Their number.

    Raises:
        MisconfigurationException: XLA's runtime has started already, with other devices; or the process has several.
    """
    import torch_xla  # an extra
    import torch_xla.core.xla_model as xm
    import torch_xla.runtime as xr  # an extra
    from torch_xla._internal import pjrt  # an extra

    if torch_xla._XLAC._xla_runtime_is_initialized():
        if local_size > 1 and xr.local_process_count() != local_size:
            raise MisconfigurationException(
                f"XLA's runtime started in this process before it became one of {local_size}: use no XLA device before "
                "Fabric or the Trainer launches the processes; in the function of torch_xla.launch, use "
                "plugins=XLAEnvironment()."
            )
    else:
        if xr.device_type() == "CPU":  # the host plays a device for each process, and connects none
            os.environ["CPU_NUM_DEVICES"] = "1"
        pjrt.initialize_multiprocess(local_rank, local_size)
        xr._init_world_size_ordinal()
        xm.set_rng_state(torch.initial_seed() % 2**32)  # torch's seed does not reach it
    if (count := xr.addressable_device_count()) > 1:
        raise MisconfigurationException(
            f"This process has {count} devices of XLA, and Treadle runs one device in a process. TPUs before v4 have "
            "two in each: use devices=1, or newer ones."
        )
