"""What a strategy is put together from, and names that it has in common with those who call it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.overrides import TorchFunctionMode

from treadle_fabric.accelerators import Accelerator
from treadle_fabric.checkpoint import CheckpointIO
from treadle_fabric.environments import ClusterEnvironment
from treadle_fabric.precision import Precision

__all__ = ["METHOD_KEYWORD", "NoInit", "Parts", "Plugin"]

METHOD_KEYWORD = "treadle_method"
"""Under a strategy that ``requires_forward_redirect``, the engine's forward takes this keyword: a method of the user's
module to run instead of the module's ``forward``."""


Plugin: TypeAlias = Precision | CheckpointIO | ClusterEnvironment
"""What ``plugins`` takes, one object of each."""


@dataclass(frozen=True)
class Parts:
    """What a strategy is put together from, as far as it is known."""

    accelerator: Accelerator | None = None
    devices: tuple[torch.device, ...] = ()
    precision: Precision | None = None
    checkpoint_io: CheckpointIO | None = None
    environment: ClusterEnvironment | None = None


class NoInit(TorchFunctionMode):
    """Turns the functions of ``torch.nn.init`` into no-ops."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
