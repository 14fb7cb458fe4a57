"""The base class of accelerators, and how a request for devices is parsed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from treadle_fabric.checks import is_several
from treadle_fabric.errors import DeviceUnavailableError

__all__ = ["Accelerator", "Devices", "count_devices", "parse_count", "parse_indices", "with_index"]

Devices = int | str | Sequence[int]
"""A request for devices: a count, a list of indices, ``"auto"``, -1 for all; also a string, ``"2"`` or ``"0,1"``."""


class Accelerator(ABC):
    """The hardware that runs the model: which devices there are, and what they need before use.

    To add a kind of hardware, implement every abstract method and register the class in ``ACCELERATOR_REGISTRY``.
    """

    is_gpu: ClassVar[bool] = False
    """Whether ``accelerator="gpu"`` may choose this hardware; its devices are numbered from 0."""
    has_process_group: ClassVar[bool] = True
    """Whether torch.distributed can connect several devices of this kind."""
    has_float64: ClassVar[bool] = True
    """Whether this hardware computes in double precision."""
    shares_batch_norm: ClassVar[bool] = False
    """Whether ``torch.nn.SyncBatchNorm`` works on this hardware."""
    device_type: ClassVar[str] = ""
    """The type of its ``torch.device``, where that differs from :meth:`name`."""
    automatic_strategies: ClassVar[tuple[str, str]] = ("single_device", "ddp")
    """The names of the strategies that ``strategy="auto"`` means on one device, and on several."""
    has_own_strategies: ClassVar[bool] = False
    """Whether only strategies that name this hardware as theirs run on it; see ``Strategy.only_on``."""

    @staticmethod
    @abstractmethod
    def name() -> str:
        """Return the name that users give, such as ``"cuda"``."""

    @staticmethod
    @abstractmethod
    def is_available() -> bool:
        """Return whether this machine has the hardware, without initializing it, so that processes can be forked."""

    @staticmethod
    def check_installed() -> None:
        """Refuse hardware that the user asked for by name, where a package for it is missing. Default: none is needed.

        Raises:
            MissingPackageError: The package is not installed; the message has the command that installs it.
        """

    @staticmethod
    def is_emulated() -> bool:
        """Return whether another kind of hardware plays this one: ``accelerator="auto"`` takes all others first."""
        return False

    @staticmethod
    @abstractmethod
    def auto_device_count() -> int:
        """Return the number of devices that ``devices="auto"`` takes."""

    @staticmethod
    @abstractmethod
    def parse_devices(devices: Any) -> Any:
        """Parse a request for devices.

        Raises:
            DeviceUnavailableError: This machine cannot satisfy the request; the message says which devices it has.
        """

    @staticmethod
    @abstractmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """Return the torch devices for the result of :meth:`parse_devices`, one for each process."""

    @abstractmethod
    def setup_device(self, device: torch.device) -> None:
        """Make the device ready in the process that uses it."""

    @abstractmethod
    def teardown(self) -> None:
        """Free what the run left on the device."""

    @abstractmethod
    def get_device_stats(self, device: torch.device | str | int) -> dict[str, Any]:
        """Return numbers about the device's memory and load, by name."""

    @classmethod
    def register_accelerators(cls, accelerator_registry: Any) -> None:
        """Register this class under its :meth:`name`."""
        accelerator_registry.register(cls.name(), cls, description=cls.__name__)


def count_devices(kind: str) -> int:
    """Return how many devices of a type of torch, such as ``"cuda"``, this process sees; none of them is initialized.

    Args:
        kind: The type of a ``torch.device``; of ``"cpu"`` and ``"meta"`` there is one.
    """
    if kind in ("cpu", "meta"):
        return 1
    count = getattr(getattr(torch, kind, None), "device_count", None)
    return 0 if count is None else int(count())


def with_index(device: torch.device) -> torch.device:
    """Return a device with the index that it stands for, as tensors name theirs: the current one, at first 0."""
    if device.index is not None or device.type in ("cpu", "meta"):
        return device
    module: Any = getattr(torch, device.type, None)
    chosen = hasattr(module, "current_device") and module.is_initialized()
    return torch.device(device.type, module.current_device() if chosen else 0)


def parse_count(devices: Any, kind: str, available: int | None = None) -> int:
    """Parse a number of devices, given as an int or a string of digits.

    Args:
        devices: The request.
        kind: The accelerator's name, for the message.
        available: The number of devices on this machine. Default: None, no limit.

    Raises:
        DeviceUnavailableError: The request is no number from 1, or more than ``available``.
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
    """Parse device indices, given in any form of :data:`Devices`.

    Raises:
        DeviceUnavailableError: The request is malformed, or names a device that is not among the ``available`` ones.
    """
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
    if not is_several(devices):
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
