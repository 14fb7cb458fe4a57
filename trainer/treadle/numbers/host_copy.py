"""Numbers on their way from a device to the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["HostCopy"]


class HostCopy:
    """Copies numbers to the host behind the work that makes them, while the device goes on to what is queued next.

    A read waits for that point of the queue only, not for all that was queued since: what is queued between
    :meth:`send` and :meth:`read` runs while the host reads, and the device has work all the time.
    """

    def __init__(self) -> None:
        self._source: Tensor | None = None  # what is copied, until it is read
        self._target: Tensor | None = None
        self._event: Any = None

    def send(self, numbers: Tensor) -> None:
        """Begin to copy a vector of floating-point numbers, instead of what was sent before."""
        self._source = numbers
        if numbers.device.type == "mps":
            return  # such a copy would say too early that it is done
        known = self._target
        if known is None or self._event is None or (known.shape, known.dtype) != (numbers.shape, numbers.dtype):
            pinned = numbers.device.type == "cuda" and torch.cuda.is_available()
            self._target = torch.full(numbers.shape, float("nan"), dtype=numbers.dtype, device="cpu", pin_memory=pinned)
            self._event = _event(numbers.device)
        assert self._target is not None
        self._target.copy_(numbers, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def read(self) -> list[float]:
        """Return the numbers that were sent last."""
        source, self._source = self._source, None
        assert source is not None
        if self._target is None:
            found: list[float] = source.tolist()
            return found
        if self._event is not None:
            self._event.synchronize()
        found = self._target.tolist()
        # Without an event, a copy that has not come yet shows by its NaN
        return source.tolist() if self._event is None and any(n != n for n in found) else found


def _event(device: torch.device) -> Any:
    try:
        event = torch.Event(device)
        event.record()
        return event
    except RuntimeError:  # this kind of device has none
        return None
