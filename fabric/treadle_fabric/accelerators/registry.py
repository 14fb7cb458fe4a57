"""Accelerators by name."""

from __future__ import annotations

from treadle_fabric.accelerators.accelerator import Accelerator
from treadle_fabric.accelerators.cpu import CPUAccelerator
from treadle_fabric.accelerators.cuda import CUDAAccelerator
from treadle_fabric.accelerators.mps import MPSAccelerator
from treadle_fabric.accelerators.xla import XLAAccelerator
from treadle_fabric.errors import MisconfigurationException, near_names

__all__ = ["ACCELERATOR_REGISTRY", "AcceleratorRegistry"]


class AcceleratorRegistry(dict[str, type[Accelerator]]):
    """Accelerator classes by the names that users give."""

    def register(self, name: str, accelerator: type[Accelerator], override: bool = False) -> None:
        """Add an accelerator class.

        Args:
            name: What users write as ``accelerator=``.
            accelerator: The class.
            override: Replace a class that has this name already. Default: False.

        Raises:
            MisconfigurationException: The name is taken, and ``override`` is False.
        """
        if name in self and not override:
            raise MisconfigurationException(
                f"An accelerator named {name!r} is registered already. Choose another name, or pass override=True."
            )
        self[name] = accelerator

    def get(self, name: str) -> type[Accelerator]:  # type: ignore[override]
        """Return the class with this name.

        Raises:
            MisconfigurationException: There is none; the message has similar names.
        """
        if name not in self:
            raise MisconfigurationException(f"accelerator={name!r} is unknown. {near_names(name, self)}")
        return self[name]

    def remove(self, name: str) -> None:
        """Remove a name."""
        self.pop(name)

    def available_accelerators(self) -> set[str]:
        """Return all registered names, whether or not this machine has the hardware."""
        return set(self)


ACCELERATOR_REGISTRY = AcceleratorRegistry()
# In the order of preference of accelerator="auto".
for _kind in (CUDAAccelerator, MPSAccelerator, XLAAccelerator, CPUAccelerator):
    _kind.register_accelerators(ACCELERATOR_REGISTRY)
