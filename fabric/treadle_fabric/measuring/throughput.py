"""Batches, samples and floating-point operations a second, and their share of what the hardware can do."""

from __future__ import annotations

from collections import deque
from typing import Any

from treadle_fabric.checks import check_integer, is_number
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.fabric import Fabric
from treadle_fabric.measuring.peak_rates import compute_dtype, get_available_flops

__all__ = ["Throughput", "ThroughputMonitor"]


class Throughput:
    """Compute rates over the last ``window_size`` updates.

    The names and values of :meth:`compute`:

    - ``time`` (seconds), ``batches``, ``samples``, ``lengths``: the totals of this device, as given last.
    - ``device/batches_per_sec``, ``device/samples_per_sec``, ``device/items_per_sec`` (of the lengths): the rates of
      this device, as soon as the window is full.
    - ``device/flops_per_sec``, and ``device/mfu``: the share of ``available_flops`` (model FLOPs utilization, as
      https://arxiv.org/abs/2204.02311 defines it).
    - ``batches_per_sec``, ``samples_per_sec``, ``items_per_sec``, ``flops_per_sec``: the rates of all devices, where
      there are several. They are taken to be equally fast.

    Args:
        available_flops: Floating-point operations a second that the device can do at most: see
            :func:`get_available_flops`. Default: None, no ``mfu``.
        world_size: The number of devices.
        shares: The number of shares that a batch has: fewer than devices where several work together on one, and see
            the same samples. Default: one a device.
        window_size: The number of updates from the first to the last of which rates are computed, at least 2.
        separator: Between ``device`` and the name.

    Raises:
        MisconfigurationException: An argument is out of range.

    Example:
        >>> throughput, began = Throughput(window_size=2), time.perf_counter()
        >>> for n, batch in enumerate(loader, 1):
        ...     train_on(batch)
        ...     throughput.update(time=time.perf_counter() - began, batches=n, samples=n * len(batch))
        >>> throughput.compute()["device/samples_per_sec"]
    """

    def __init__(
        self,
        available_flops: float | None = None,
        world_size: int = 1,
        window_size: int = 100,
        separator: str = "/",
        *,
        shares: int | None = None,
    ) -> None:
        if available_flops is not None and not (is_number(available_flops) and available_flops > 0):
            raise MisconfigurationException(
                f"Throughput(available_flops={available_flops!r}): it must be a number above 0, or None."
            )
        self.available_flops = available_flops
        self.separator = separator
        self.world_size = check_integer("Throughput: world_size", world_size, minimum=1)
        self.shares = self.world_size if shares is None else check_integer("Throughput: shares", shares, minimum=1)
        self.window_size = check_integer("Throughput: window_size", window_size, minimum=2)
        self.reset()

    def reset(self) -> None:
        """Forget all updates."""
        self._totals: deque[dict[str, float]] = deque(maxlen=self.window_size)
        self._flops: deque[float] = deque(maxlen=self.window_size)

    def update(
        self, *, time: float, batches: int, samples: int, lengths: int | None = None, flops: float | None = None
    ) -> None:
        """Take the totals since the first batch, of this device. Each must have grown since the last update.

        Args:
            time: Seconds. Wait for the device before taking it, or it tells when batches were queued.
            batches: Batches.
            samples: Samples.
            lengths: Items in all samples, such as tokens; in all updates or in none.
            flops: Floating-point operations since the last update, of this device: see :func:`measure_flops`.

        Raises:
            MisconfigurationException: A total has not grown, there are fewer items than samples, or ``lengths`` is
                given at times.
        """
        new: dict[str, float] = {"time": time, "batches": batches, "samples": samples}
        if lengths is not None:
            new["lengths"] = lengths
            if lengths < samples:
                raise MisconfigurationException(
                    f"Throughput: lengths={lengths} is less than samples={samples}. It is the total of the items in"
                    " all samples, since the first batch."
                )
        if self._totals:
            last = self._totals[-1]
            if last.keys() != new.keys():
                raise MisconfigurationException("Throughput: give `lengths` at every update, or never.")
            for name, value in new.items():
                if not value > last[name]:
                    raise MisconfigurationException(
                        f"Throughput: {name}={value} has not grown since the last update, which had {last[name]}. Give"
                        " the total since the first batch."
                    )
        self._totals.append(new)
        if flops is not None:
            self._flops.append(flops)

    def compute(self) -> dict[str, float]:
        """Return the metrics by name; empty before the first update."""
        if not self._totals:
            return {}
        first, last = self._totals[0], self._totals[-1]
        found, full = dict(last), len(self._totals) == self.window_size
        seconds = last["time"] - first["time"]
        rates: dict[str, float] = {}
        if full:
            for name, total in (("batches", "batches"), ("samples", "samples"), ("items", "lengths")):
                if total in last:
                    rates[f"{name}_per_sec"] = (last[total] - first[total]) / seconds
        if full and len(self._flops) == self.window_size:
            rates["flops_per_sec"] = (sum(self._flops) - self._flops[0]) / seconds
        for name, rate in rates.items():
            found[f"device{self.separator}{name}"] = rate
            if self.world_size > 1:
                found[name] = rate * (self.world_size if name == "flops_per_sec" else self.shares)
        if self.available_flops and "flops_per_sec" in rates:
            found[f"device{self.separator}mfu"] = rates["flops_per_sec"] / self.available_flops
        return found


class ThroughputMonitor(Throughput):
    """Compute rates, and log them with Fabric's loggers. Device, precision and number of devices are Fabric's.

    Args:
        fabric: The Fabric object.
        **kwargs: ``window_size`` and ``separator`` of :class:`Throughput`; ``available_flops`` where the chip is not
            known.

    Example:
        >>> monitor = ThroughputMonitor(fabric, window_size=50)
        >>> monitor.update(time=seconds, batches=step, samples=step * 32)
        >>> monitor.compute_and_log(step)
    """

    def __init__(self, fabric: Fabric, **kwargs: Any) -> None:
        dtype = compute_dtype(str(fabric.strategy.precision.precision))
        kwargs = {"available_flops": get_available_flops(fabric.device, dtype), **kwargs}
        super().__init__(world_size=fabric.world_size, shares=fabric.strategy.data_parallel_size, **kwargs)
        self._fabric = fabric
        self.step = -1
        """The step at which the metrics were logged last."""

    def compute_and_log(self, step: int | None = None, **kwargs: Any) -> dict[str, float]:
        """Compute the metrics, log them and return them.

        Args:
            step: The step for the loggers. Default: one after the last one.
            **kwargs: Passed to :meth:`compute`.
        """
        self.step = self.step + 1 if step is None else step
        metrics = self.compute(**kwargs)
        self._fabric.log_dict(metrics, step=self.step)
        return metrics
