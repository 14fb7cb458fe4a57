"""The newest value of every logged name, from the slots of all stages of a run (:mod:`treadle.metrics.bus`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from treadle.metrics.bus import Results
from treadle.metrics.values import to_floats

__all__ = ["Metrics"]


class Metrics:
    """What was logged in a run, as callbacks, loggers and the progress bar see it.

    Epoch values, and the last step values of stages that are over, are kept here. Step values of the active stage are
    looked up in its slots when a metric is read.
    """

    def __init__(self) -> None:
        self._callback: dict[str, Any] = {}
        self._logged: dict[str, Any] = {}
        self._bar: dict[str, Any] = {}
        self.active: Results | None = None
        """The stage that is running; its step values are looked up when a metric is read, not before."""

    @property
    def callback(self) -> dict[str, Tensor]:
        """Name -> scalar tensor, the newest value of everything logged.

        It is one dictionary for the whole run: callbacks then see what a program adds to it or takes out of it, until a
        run logs the name.
        """
        if self.active:
            newest = self.active.latest("callback")
            self._callback.update(newest)
            self.active.published.update(newest)
        self._callback.update(_tensors(self._callback))
        return self._callback

    @property
    def logged(self) -> dict[str, Tensor]:
        """Name -> scalar tensor, the newest value of what goes to the loggers."""
        return _tensors({**self._logged, **self.active.latest("logged")} if self.active else self._logged)

    @property
    def bar(self) -> dict[str, float]:
        """Name -> number, what the progress bar shows; reading it brings the values to the host."""
        return to_floats({**self._bar, **self.active.latest("bar")} if self.active else self._bar)

    def detached(self) -> Metrics:
        """Return a copy on the CPU, which other processes can read."""
        copy = Metrics()
        copy.load_state_dict(self.state_dict())
        if self.active is not None:
            copy.keep(self.active)
        for values in (copy._callback, copy._logged, copy._bar):
            values.update({k: v.detach().cpu() for k, v in values.items() if isinstance(v, Tensor)})
        return copy

    def state_dict(self) -> dict[str, Any]:
        """Return everything known so far, as tensors and numbers."""
        return {"callback": dict(self._callback), "logged": dict(self._logged), "bar": dict(self._bar)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.clear()
        self._callback.update(state["callback"])
        self._logged.update(state["logged"])
        self._bar.update(state["bar"])

    def clear(self) -> None:
        """Forget everything, as after a sanity check."""
        self._callback.clear()
        self._logged.clear()
        self._bar.clear()

    def keep(self, results: Results) -> None:
        """Keep the last step values of a stage that ends or is paused."""
        if not results.slots:
            return
        views: tuple[tuple[dict[str, Any], Literal["callback", "logged", "bar"]], ...]
        views = (self._callback, "callback"), (self._logged, "logged"), (self._bar, "bar")
        for kept, view in views:
            newest = results.latest(view)
            kept.update(newest)
            results.published.update(newest)

    def forget(self, results: Results) -> None:
        """Forget what a stage has logged, because nothing will be logged under these names any more."""
        for kept in (self._callback, self._logged, self._bar):
            for name in results.published & kept.keys():
                del kept[name]

    def close_epoch(
        self, results: Results, *, local: bool = False, loaders: int = 1
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Take the epoch values of a stage: of every slot with ``on_epoch`` and a value that was not taken before.

        A slot counts as taken once this method has reduced it, until the next epoch empties it; so a second call
        returns only names that were first logged in between. Without ``local`` this is a collective: every rank calls
        it, even without values.

        Args:
            results: the slots of the stage.
            local: take this rank's own values, without a collective. Default: False.
            loaders: the number of loaders of the evaluation. Default: 1, as in training.

        Returns:
            The names and values for the loggers, and those of every dataloader. A name has the suffix ``_epoch`` where
            step values are logged under it too.
        """
        if local or not results.training:  # step values are read from the slots until now
            self.keep(results)
        if not results.open and (local or results.alone):
            return {}, [{} for _ in range(loaders)]
        logged: dict[str, Any] = {}
        shared: dict[str, Any] = {}
        per_loader: dict[int, dict[str, Any]] = {}
        for slot, value in results.epoch_metrics(local=local):
            for (name, scalar), (forked, _) in zip(slot.entries(value), slot.entries(value, "_epoch"), strict=True):
                if slot.logger:
                    logged[forked] = scalar
                if slot.prog_bar:
                    self._bar[forked] = scalar
                self._callback[name] = self._callback[forked] = scalar
                results.published |= {name, forked}
                (shared if slot.loader is None else per_loader.setdefault(slot.loader, {}))[forked] = scalar
        self._logged.update(logged)
        return logged, [{**per_loader.get(i, {}), **shared} for i in range(loaders)]


def _tensors(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the values as tensors, of torch's default dtype where they are of 16 bits or whole numbers."""
    wide, default = (torch.float32, torch.float64), torch.get_default_dtype()
    return {
        name: (value if value.dtype in wide else value.to(default))
        if isinstance(value, Tensor)
        else torch.tensor(float(value), device="cpu")
        for name, value in values.items()
    }
