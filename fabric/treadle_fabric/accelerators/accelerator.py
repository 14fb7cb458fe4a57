"""What an accelerator is, and how a request for devices is read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from treadle_fabric.errors import DeviceUnavailableError

__all__ = ["Accelerator", "Devices", "parse_count", "parse_indices"]

Devices = int | str | Sequence[int]
"""How devices are asked for: a count, indices, ``"auto"``, or -1 for all; ``"2"`` and ``"0,1"`` as strings."""


class Accelerator(ABC):
    """The hardware that runs the model: which devices there are, and what they need before use.

    To add one, implement everything that is abstract here and register it in ``ACCELERATOR_REGISTRY``.
    """

    is_gpu: ClassVar[bool] = False
    """``accelerator="gpu"`` may mean it; its devices are numbered from 0."""
    has_process_group: ClassVar[bool] = True
    """torch.distributed can connect several of its devices."""
    has_float64: ClassVar[bool] = True
    """It computes in double precision."""
    shares_batch_norm: ClassVar[bool] = False
    """``torch.nn.SyncBatchNorm`` works on it."""

    @staticmethod
    @abstractmethod
    def name() -> str:
        """The name users give, such as ``"cuda"``."""

    @staticmethod
    @abstractmethod
    def is_available() -> bool:
        """Whether this machine has it. Must not initialize it, so that processes can still be forked."""

    @staticmethod
    @abstractmethod
    def auto_device_count() -> int:
        """How many devices ``devices="auto"`` takes."""

    @staticmethod
    @abstractmethod
    def parse_devices(devices: Any) -> Any:
        """Read a request for devices.

        Raises:
            DeviceUnavailableError: for one that this machine cannot satisfy; it says what there is.
        """

    @staticmethod
    @abstractmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """The torch devices for what :meth:`parse_devices` returned, one for each process."""

    @abstractmethod
    def setup_device(self, device: torch.device) -> None:
        """Make the device ready in the process that uses it."""

    @abstractmethod
    def teardown(self) -> None:
        """Free what the run left on the device."""

    @abstractmethod
    def get_device_stats(self, device: torch.device | str | int) -> dict[str, Any]:
        """Numbers about the device's memory and load, by name."""

    @classmethod
    def register_accelerators(cls, accelerator_registry: Any) -> None:
        """Register under :meth:`name`."""
        accelerator_registry.register(cls.name(), cls)


def parse_count(devices: Any, kind: str, available: int | None = None) -> int:
    """A number of devices from an int or a string of digits.

    Args:
        devices: The request.
        kind: The accelerator's name, for the message.
        available: How many there are; ``None`` for no limit.
    """
    count = int(devices) if isinstance(devices, str) and devices.strip().isdecimal() else devices
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise DeviceUnavailableError(
            f"devices={devices!r} does not name devices of accelerator={kind!r}. Give a number from 1, or 'auto'."
        )
    if available is not None and count > available:
        raise DeviceUnavailableError(f"devices={devices!r}, but this machine has {_there_is(kind, available)}.")
    return count


def parse_indices(devices: Any, kind: str, available: int) -> list[int]:
    """Device indices from any of :data:`Devices`."""
    if isinstance(devices, str):
        text = devices.strip()
        if text == "auto":
            devices = -1
        elif "," in text:
            devices = [part.strip() for part in text.split(",") if part.strip()]
        elif text.removeprefix("-").isdecimal():
            devices = int(text)
    if devices == -1 and not isinstance(devices, bool):
        if available == 0:
            raise DeviceUnavailableError(f"devices=-1, but this machine has {_there_is(kind, 0)}.")
        return list(range(available))
    if not isinstance(devices, (list, tuple, range)):
        return list(range(parse_count(devices, kind, available)))
    try:
        indices = [_index(entry) for entry in devices]
    except ValueError:
        indices = []
    if not indices or len(set(indices)) < len(indices):
        raise DeviceUnavailableError(
            f"devices={devices!r} is not a list of different device indices, and accelerator={kind!r} needs one such "
            f"as [0, 1]. This machine has {_there_is(kind, available)}."
        )
    missing = [index for index in indices if not 0 <= index < available]
    if missing:
        raise DeviceUnavailableError(
            f"devices={devices!r} asks for {', '.join(map(str, missing))}, but this machine has "
            f"{_there_is(kind, available)}."
        )
    return indices


def _index(entry: Any) -> int:
    if isinstance(entry, bool) or not isinstance(entry, (int, str)):
        raise ValueError(entry)
    return int(entry)


def _there_is(kind: str, available: int) -> str:
    if available == 0:
        return f"no {kind} device"
    indices = "0" if available == 1 else f"0 to {available - 1}"
    return f"{available} {kind} device{'' if available == 1 else 's'} (index {indices})"
