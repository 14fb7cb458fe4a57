"""EMAWeightAveraging: evaluates and saves an exponential moving average of the weights."""

from __future__ import annotations

from typing import Any

import torch

from treadle.callbacks.averaging.rules import Exponential
from treadle.callbacks.weight_averaging import WeightAveraging
from treadle_fabric import MisconfigurationException, check_integer, is_number

__all__ = ["EMAWeightAveraging"]


class EMAWeightAveraging(WeightAveraging):
    """Keep an exponential moving average of the weights, and evaluate and save it.

    After an update, the average is ``decay * average + (1 - decay) * weights``; the first update copies the weights.

    Args:
        device: Where the average is kept. Default: where the weights are.
        use_buffers: Whether buffers, such as the statistics of batch norm, are averaged too.
        decay: How much of the average an update leaves, from 0 to 1.
        update_every_n_steps: Update after the steps whose number, from 0, is a multiple of this; 0 for no step.
        update_starting_at_step: The first step, from 0, after which to update. Default: the first.
        update_starting_at_epoch: The first epoch, from 0, at whose end to update, besides the updates after steps.
            Default: no update at the ends of epochs.
        **kwargs: As in :class:`~treadle.callbacks.WeightAveraging`; the rule of the average is ``decay``'s.

    Raises:
        MisconfigurationException: An argument is anything else.
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        decay: float = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not is_number(decay) or not 0 <= decay <= 1:
            raise MisconfigurationException(
                f"EMAWeightAveraging(decay={decay!r}): it is a number from 0 to 1, such as 0.999, which leaves 99.9% of"
                " the average at each update."
            )
        numbers = {
            "update_every_n_steps": update_every_n_steps,
            "update_starting_at_step": update_starting_at_step,
            "update_starting_at_epoch": update_starting_at_epoch,
        }
        for name, value in numbers.items():
            if value is not None or name == "update_every_n_steps":
                check_integer(f"EMAWeightAveraging: {name}", value, minimum=0)
        # a command line gives None for both; jsonargparse understands no loop here
        rules = {"avg_fn": kwargs.pop("avg_fn", None), "multi_avg_fn": kwargs.pop("multi_avg_fn", None)}
        if given := [name for name, rule in rules.items() if rule is not None]:
            raise MisconfigurationException(
                f"EMAWeightAveraging got {given[0]}, and its rule is that of `decay`: for another rule use"
                f" WeightAveraging({given[0]}=...)."
            )
        super().__init__(device, use_buffers, multi_avg_fn=Exponential(decay), **kwargs)
        self.update_every_n_steps = update_every_n_steps
        self.update_starting_at_step = update_starting_at_step
        self.update_starting_at_epoch = update_starting_at_epoch

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Decide whether to update the average now; arguments as in :meth:`WeightAveraging.should_update`."""
        if step_idx is not None:
            begun = self.update_starting_at_step is None or step_idx >= self.update_starting_at_step
            if begun and self.update_every_n_steps and step_idx % self.update_every_n_steps == 0:
                return True
        begins = self.update_starting_at_epoch
        return epoch_idx is not None and begins is not None and epoch_idx >= begins
