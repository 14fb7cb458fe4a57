"""Accelerators by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping

from treadle_fabric.accelerators.accelerator import Accelerator
from treadle_fabric.accelerators.cpu import CPUAccelerator
from treadle_fabric.accelerators.cuda import CUDAAccelerator
from treadle_fabric.accelerators.mps import MPSAccelerator
from treadle_fabric.errors import MisconfigurationException, near_names

__all__ = ["ACCELERATOR_REGISTRY", "AcceleratorRegistry"]


class AcceleratorRegistry(MutableMapping[str, type[Accelerator]]):
    """Accelerator classes by the names that users give."""

    def __init__(self) -> None:
        self._finders: dict[str, Callable[[], type[Accelerator]]] = {}

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

    def register_on_demand(self, name: str, find: Callable[[], type[Accelerator]]) -> None:
        """Add an accelerator class that is imported when it is first asked for.

        Args:
            name: What users write as ``accelerator=``.
            find: Imports the class and returns it.
        """
        self._finders[name] = find

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

    def __getitem__(self, name: str) -> type[Accelerator]:
        return self._finders[name]()

    def __setitem__(self, name: str, accelerator: type[Accelerator]) -> None:
        self._finders[name] = lambda: accelerator

    def __delitem__(self, name: str) -> None:
        del self._finders[name]

    def __contains__(self, name: object) -> bool:
        return name in self._finders

    def __iter__(self) -> Iterator[str]:
        return iter(self._finders)

    def __len__(self) -> int:
        return len(self._finders)

    def __repr__(self) -> str:
        return f"Accelerators: {', '.join(self)}"


def _xla() -> type[Accelerator]:
    from treadle_fabric.accelerators.xla import XLAAccelerator  # for the few who use it

    return XLAAccelerator


ACCELERATOR_REGISTRY = AcceleratorRegistry()
# In the order of preference of accelerator="auto".
for _kind in (CUDAAccelerator, MPSAccelerator):
    _kind.register_accelerators(ACCELERATOR_REGISTRY)
ACCELERATOR_REGISTRY.register_on_demand("tpu", _xla)
CPUAccelerator.register_accelerators(ACCELERATOR_REGISTRY)
