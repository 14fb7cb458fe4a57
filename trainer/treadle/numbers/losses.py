"""Weighted losses: a step that says how many tokens or samples its loss is the mean of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from treadle_fabric import MisconfigurationException, Strategy, rank_zero_warn

if TYPE_CHECKING:
    from torch.optim import Optimizer


__all__ = ["Weights"]

_NOTHING, _PLAIN, _WEIGHTED = range(3)
_RULE: Final = "give 'weight' with every loss of a run, on every rank, or with none"


class Weights:
    """Makes the gradient of an optimizer step ``sum(w * g) / sum(w)`` over its micro-batches and over all ranks.

    Each loss is multiplied by its weight over a reference, and the sum of the gradients divided by that of the weights
    where the optimizer steps. The reference keeps scaled losses of low precision in their usual range; it is a power of
    two, so that it changes no digit.
    """

    def __init__(self) -> None:
        self.off = False
        """Whether losses come without weights; found out at the first one."""
        self._reference: float | None = None
        self._total: float | Tensor = 0.0
        self._count = 0
        self._warned = False

    def scale(self, loss: Tensor | None, weight: Any, *, window: int, first: bool, strategy: Strategy) -> Tensor | None:
        """The loss to differentiate.

        Args:
            loss: the mean over a micro-batch; None where there is none.
            weight: of the micro-batch; None where none was given.
            window: the batches of the accumulation, which a loss without weight is divided by.
            first: whether the accumulation begins with it.
            strategy: whose ranks agree at the first loss.

        Returns:
            The loss scaled; None where there is nothing to learn: no loss, or a weight of 0.

        Raises:
            MisconfigurationException: the weight is no number of at least 0, or only some losses have one.
        """
        if first:
            self._total, self._count = 0.0, 0
        if loss is not None and weight is not None:
            weight = _checked(weight)
        if not self.off and self._reference is None:
            self._settle(loss, weight, window, strategy)
        if loss is None:
            return None
        if self.off is not (weight is None):
            given = (
                f"the weight {weight}, and others before without one" if self.off else "no weight, but others before"
            )
            raise MisconfigurationException(f"`training_step` returned a loss with {given}: {_RULE}.")
        if self.off:
            return loss / window if window > 1 else loss
        self._total = self._total + weight
        self._count += 1
        if not isinstance(weight, Tensor) and weight == 0:
            return None  # its loss may well be 0 / 0
        factor = weight / self._reference
        return loss * (factor.to(loss.dtype) if isinstance(factor, Tensor) else factor)

    def normalize(self, optimizer: Optimizer, strategy: Strategy) -> bool:
        """Divide the gradients by the weights of the accumulation, all ranks' together; every rank calls it.

        The total is read from the device only where it could be 0: weights that are Python numbers make nobody wait.

        Returns:
            Whether the optimizer may step: False where the weights are all 0.
        """
        total: Any = self._total
        known_positive = not isinstance(total, Tensor) and total > 0
        count: float = self._count
        if strategy.world_size > 1:
            dtype = torch.float32 if strategy.root_device.type == "mps" else torch.float64
            pair = torch.stack([torch.as_tensor(v, dtype=dtype, device=strategy.root_device) for v in (total, count)])
            pair = strategy.all_reduce(pair, reduce_op="sum")
            total, count = (pair[0], 1) if known_positive else pair.tolist()
        elif isinstance(total, Tensor):
            total = float(total)
        if not count:  # no loss in all of the accumulation: there are no gradients
            return True
        if not known_positive and total == 0:
            if not self._warned:
                self._warned = True
                rank_zero_warn("The weights of an optimizer step are 0 in total: such steps are skipped.")
            return False
        assert self._reference is not None
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, strategy.world_size * self._reference / total)
        return True

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint in the middle of an accumulation keeps; empty where losses have no weights."""
        if self._reference is None:
            return {}
        return {"reference": self._reference, "total": self._total, "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave."""
        if state:
            self._reference, self._total, self._count = state["reference"], state["total"], state["count"]

    def _settle(self, loss: Tensor | None, weight: Any, window: int, strategy: Strategy) -> None:
        """Find out whether losses have weights. Several ranks agree, once; again while none of them has a loss."""
        kind = _NOTHING if loss is None else _PLAIN if weight is None else _WEIGHTED
        number = float(weight) if kind == _WEIGHTED else 0.0
        found = [(float(kind), number)]
        if strategy.world_size > 1:
            mine = torch.tensor([kind, number], dtype=torch.float32, device=strategy.root_device)
            found = strategy.all_gather(mine).tolist()
        by_kind = {each: [rank for rank, (k, _) in enumerate(found) if k == each] for each in (_PLAIN, _WEIGHTED)}
        if by_kind[_PLAIN] and by_kind[_WEIGHTED]:
            ranks = {each: ", ".join(map(str, by_kind[each])) for each in by_kind}
            raise MisconfigurationException(
                f"`training_step` returned a loss with a weight on rank {ranks[_WEIGHTED]}, and without one on rank"
                f" {ranks[_PLAIN]}: {_RULE}."
            )
        self.off = bool(by_kind[_PLAIN])
        if by_kind[_WEIGHTED]:
            first = next((w for _, w in found if w > 0), 1.0)
            self._reference = 2.0 ** round(math.log2(first * window))


def _checked(weight: Any) -> float | Tensor:
    """A weight as a number, or as it is on a device that would have to be waited for."""
    if isinstance(weight, Tensor):
        if weight.numel() != 1:
            raise MisconfigurationException(
                f"`training_step` returned a 'weight' of shape {tuple(weight.shape)}; it is one number, the tokens or"
                " samples that the loss is the mean of: sum it up, or give it another name."
            )
        if weight.device.type != "cpu":
            return weight.detach().reshape(()).double() if weight.device.type == "cuda" else weight.detach().reshape(())
    try:
        number = float(weight)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise MisconfigurationException(
            f"`training_step` returned weight={weight!r:.60}; it is a finite number of at least 0: the tokens or"
            " samples that the loss is the mean of."
        )
    return number
