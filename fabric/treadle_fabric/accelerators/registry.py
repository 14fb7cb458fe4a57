"""Accelerators by name."""

from __future__ import annotations

from typing import Any

from treadle_fabric.accelerators.accelerator import Accelerator
from treadle_fabric.accelerators.cpu import CPUAccelerator
from treadle_fabric.accelerators.cuda import CUDAAccelerator
from treadle_fabric.accelerators.mps import MPSAccelerator
from treadle_fabric.registry import Registry

__all__ = ["ACCELERATOR_REGISTRY", "AcceleratorRegistry"]


class AcceleratorRegistry(Registry[Accelerator]):
    """Accelerators by name. ``registry["cpu"]`` describes an entry, ``registry.get("cpu")`` makes the accelerator."""

    def __init__(self) -> None:
        super().__init__("accelerator", "Accelerators")

    def register(
        self,
        name: str,
        accelerator: type[Accelerator] | None = None,
        description: str = "",
        override: bool = False,
        **init_params: Any,
    ) -> Any:
        """Enter a name.

        Args:
            name: What users pass as ``accelerator=``.
            accelerator: The class. Default: the one that is decorated, ``@ACCELERATOR_REGISTRY.register("mine")``.
            description: A line about it.
            override: Replace an entry of that name.
            **init_params: Arguments for the class.

        Returns:
            The class, or the decorator.

        Raises:
            MisconfigurationException: The name is taken.
        """
        return self._enter(name, accelerator, description, override, init_params)

    def available_accelerators(self) -> set[str]:
        """Return all registered names, whether or not this machine has the hardware."""
        return set(self)


def _xla() -> type[Accelerator]:
    from treadle_fabric.accelerators.xla import XLAAccelerator  # for the few who use it

    return XLAAccelerator


ACCELERATOR_REGISTRY = AcceleratorRegistry()
# In the order of preference of accelerator="auto".
for _kind in (CUDAAccelerator, MPSAccelerator):
    _kind.register_accelerators(ACCELERATOR_REGISTRY)
ACCELERATOR_REGISTRY.register_on_demand("tpu", _xla, "XLAAccelerator")
CPUAccelerator.register_accelerators(ACCELERATOR_REGISTRY)
