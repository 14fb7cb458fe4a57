"""WeightAveraging: evaluates and saves an average of the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from treadle.callbacks.averaging.callback import AveragingCallback, as_device
from treadle.callbacks.averaging.rules import OneByOne, equal
from treadle.callbacks.averaging.weights import AveragedWeights, MultiAverage
from treadle.callbacks.callback import epoch_is_over
from treadle_fabric import MisconfigurationException, near_names

if TYPE_CHECKING:
    from treadle.contracts import LightningModule, Trainer

__all__ = ["WeightAveraging"]

_RULES = ("avg_fn", "multi_avg_fn")


class WeightAveraging(AveragingCallback):
    """Keep a running average of the weights, and evaluate and save it.

    By default all steps weigh the same. Override :meth:`should_update` to choose the steps and epochs after which the
    average is updated. See :class:`~treadle.callbacks.averaging.AveragingCallback` for which weights are where.

    Args:
        device: Where the average is kept. Default: where the weights are.
        use_buffers: Whether buffers, such as the statistics of batch norm, are averaged too. Otherwise evaluation uses
            the present ones.
        **kwargs: The rule of the average, as in :class:`torch.optim.swa_utils.AveragedModel`. Either ``avg_fn``, a
            function of an average, a weight and the number of weights averaged so far, which returns the new average.
            Or ``multi_avg_fn``, a function of a list of averages, a list of weights and that number, which changes the
            averages in place.

    Raises:
        MisconfigurationException: An argument is anything else.
    """

    def __init__(self, device: torch.device | str | int | None = None, use_buffers: bool = True, **kwargs: Any) -> None:
        name = type(self).__qualname__
        if unknown := sorted(kwargs.keys() - {*_RULES}):
            raise MisconfigurationException(
                f"{name}({unknown[0]}=...) is unknown. {near_names(unknown[0], ['device', 'use_buffers', *_RULES])}"
            )
        if all(kwargs.get(rule) is not None for rule in _RULES):
            raise MisconfigurationException(
                f"{name} got avg_fn and multi_avg_fn, which both say how to average: pass one."
            )
        super().__init__(AveragedWeights(_rule(name, **kwargs), as_device(name, device), use_buffers))
        self._latest_update_step, self._latest_update_epoch = 0, -1

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Decide whether to update the average now. Override this to change when. Default: after every step.

        Args:
            step_idx: After an optimizer step, its number from 0; None at the end of an epoch.
            epoch_idx: At the end of an epoch, its number from 0; None after a step.
        """
        return step_idx is not None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average where an optimizer stepped."""
        step = trainer.global_step
        if step > self._latest_update_step and self.should_update(step_idx=step - 1):
            self.update_average(trainer, pl_module)
            self._latest_update_step = step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Update the average at the end of an epoch, if :meth:`should_update` says so."""
        epoch = trainer.current_epoch
        if epoch > self._latest_update_epoch and epoch_is_over(trainer) and self.should_update(epoch_idx=epoch):
            self.update_average(trainer, pl_module)
            self._latest_update_epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """Return the step and the epoch of the last update; the weights are entries of their own in a checkpoint."""
        return {"latest_update_step": self._latest_update_step, "latest_update_epoch": self._latest_update_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; of nothing, begin anew."""
        self._weights.forget()
        self._latest_update_step = state_dict.get("latest_update_step", 0)
        self._latest_update_epoch = state_dict.get("latest_update_epoch", -1)


def _rule(
    owner: str, avg_fn: Callable[..., Tensor] | None = None, multi_avg_fn: MultiAverage | None = None
) -> MultiAverage:
    for name, given in zip(_RULES, (avg_fn, multi_avg_fn)):
        if given is not None and not callable(given):
            raise MisconfigurationException(
                f"{owner}({name}={given!r}): it is a function of averages, weights and the number averaged so far."
            )
    if multi_avg_fn is not None:
        return multi_avg_fn
    return equal if avg_fn is None else OneByOne(avg_fn)
