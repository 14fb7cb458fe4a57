"""How losses become the gradients of one mean: over the batches of an accumulation, or by weights (tokens, samples)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from treadle.run.loss import LossPolicy, gradients_of
from treadle.run.run import Run
from treadle_fabric import MisconfigurationException, Strategy, rank_zero_warn

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["choose_loss_policy"]

_NOTHING, _PLAIN, _WEIGHTED = range(3)
_RULE: Final = "give 'weight' with every loss of a run, on every rank, or with none"


def choose_loss_policy(run: Run, on_nonfinite: str | None, root: str) -> LossPolicy:
    """Choose what becomes of the losses of a run.

    Args:
        run: the run.
        on_nonfinite: what happens to losses and gradients that are not finite. Default: nobody looks.
        root: the folder for files of what is not finite.
    """
    strategy = run.fabric.strategy
    rule: _Rule | None = EngineLosses() if strategy.handles_gradient_accumulation else None
    losses = Losses(strategy, rule if run.module.automatic_optimization else PlainLosses())
    if on_nonfinite is None:
        return losses
    from treadle.numbers.watch import WatchedLosses  # only runs that watch load it

    return WatchedLosses(run, losses, on_nonfinite, root)


class PlainLosses:
    """Divides each loss by the number of batches of its accumulation."""

    def scale(self, loss: Tensor | None, weight: Any, window: float, first: bool, /) -> Tensor | None:
        """See :class:`treadle.run.loss.LossPolicy`."""
        if loss is None:
            return None
        if weight is not None:
            raise _mixture(f"the weight {_checked(weight)}, and others before without one")
        return loss / window if window > 1 else loss

    def prepare(self, optimizer: Optimizer | None, window: float, done: float, /) -> bool:
        """Multiply the gradients where an epoch of unknown length ended before the accumulation was complete."""
        if done != window and optimizer is not None:
            for gradient in gradients_of(optimizer):
                gradient.mul_(window / done)
        return True


class EngineLosses:
    """Leaves each loss as it is: the engine divides it by the number of batches of an accumulation."""

    def scale(self, loss: Tensor | None, weight: Any, window: float, first: bool, /) -> Tensor | None:
        """See :class:`treadle.run.loss.LossPolicy`."""
        if loss is not None and weight is not None:
            raise MisconfigurationException(
                f"`training_step` returned a loss with the weight {_checked(weight)}, but this strategy's engine"
                " averages the losses of an accumulation without weights: return the loss alone, or use another"
                " strategy."
            )
        return loss

    def prepare(self, optimizer: Optimizer | None, window: float, done: float, /) -> bool:
        """Do nothing: the gradients are the engine's."""
        return True


class WeightedLosses:
    """Makes the gradient of an optimizer step ``sum(w * g) / sum(w)`` over its micro-batches and over all ranks.

    Each loss is multiplied by its weight over a reference, and the sum of the gradients is divided by the sum of the
    weights where the optimizer steps. The reference keeps scaled losses of low precision in their usual range; the
    reference is a power of two, so that it changes no digit.

    Args:
        strategy: whose ranks share the weights of a step.
        reference: what weights are divided by.
        total: the sum of this rank's weights in the accumulation so far.
        count: the number of this rank's losses in the accumulation so far.
    """

    def __init__(self, strategy: Strategy, reference: float, total: float | Tensor = 0.0, count: int = 0) -> None:
        self._strategy, self._reference = strategy, reference
        self._total, self._count = total, count
        self._warned = False

    def scale(self, loss: Tensor | None, weight: Any, window: float, first: bool, /) -> Tensor | None:
        """See :class:`treadle.run.loss.LossPolicy`."""
        if first:
            self._total, self._count = 0.0, 0
        if loss is None:
            return None
        if weight is None:
            raise _mixture("no weight, but others before")
        weight = _checked(weight)
        self._total = self._total + weight
        self._count += 1
        if not isinstance(weight, Tensor) and weight == 0:
            return None  # its loss may well be 0 / 0
        factor = weight / self._reference
        return loss * (factor.to(loss.dtype) if isinstance(factor, Tensor) else factor)

    def prepare(self, optimizer: Optimizer | None, window: float, done: float, /) -> bool:
        """Divide the gradients by the weights of the accumulation, those of all ranks together.

        The total is read from the device only where it could be 0: with weights that are Python numbers, the host does
        not wait for the device.

        Returns:
            False where the weights are all 0.
        """
        if optimizer is None:
            return True
        strategy = self._strategy
        total: Any = self._total
        known_positive = not isinstance(total, Tensor) and total > 0
        count: float = self._count
        if strategy.world_size > 1:
            pair = torch.stack(
                [torch.as_tensor(v, dtype=torch.float64, device=strategy.root_device) for v in (total, count)]
            )
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
        gradients = gradients_of(optimizer)
        if gradients:
            torch._foreach_mul_(gradients, strategy.world_size * self._reference / total)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the reference, and the weights of the accumulation so far."""
        return {"reference": self._reference, "total": self._total, "count": self._count}


_Rule = PlainLosses | EngineLosses | WeightedLosses


class Losses:
    """The losses of a run, all with a weight or all without.

    Args:
        strategy: whose ranks agree at the first loss.
        rule: what becomes of the losses. Default: the first loss tells, with a weight :class:`WeightedLosses`, else
            :class:`PlainLosses`.
    """

    scale: Callable[[Tensor | None, Any, float, bool], Tensor | None]
    prepare: Callable[[Optimizer | None, float, float], bool]

    def __init__(self, strategy: Strategy, rule: _Rule | None) -> None:
        self._strategy = strategy
        self._weighted: WeightedLosses | None = None
        if rule is None:
            self.scale, self.prepare = self._scale_first, lambda *_: True  # without a loss there are no gradients
        else:
            self._follow(rule)

    def observe(self, training_step: Callable[..., Any], *, wants_iterator: bool) -> Callable[..., Any]:
        """Return the step as it is."""
        return training_step

    def forget(self) -> None:
        """Do nothing: an accumulation begins with its first loss."""

    def report(self) -> None:
        """Say nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint in the middle of an accumulation keeps; empty where losses have no weights."""
        return {} if self._weighted is None else self._weighted.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        if state:
            self._follow(WeightedLosses(self._strategy, state["reference"], state["total"], state["count"]))

    def _follow(self, rule: _Rule) -> None:
        self.scale, self.prepare = rule.scale, rule.prepare
        self._weighted = rule if isinstance(rule, WeightedLosses) else None

    def _scale_first(self, loss: Tensor | None, weight: Any, window: float, first: bool, /) -> Tensor | None:
        """Find out whether losses have weights. Several ranks agree, once; they ask again while no rank has a loss."""
        strategy = self._strategy
        kind = _NOTHING if loss is None else _PLAIN if weight is None else _WEIGHTED
        number = float(_checked(weight)) if kind == _WEIGHTED else 0.0
        found = [(float(kind), number)]
        if strategy.world_size > 1:
            mine = torch.tensor([kind, number], dtype=torch.float32, device=strategy.root_device)
            found = strategy.all_gather(mine).tolist()
        plain, weighted = ([rank for rank, (k, _) in enumerate(found) if k == each] for each in (_PLAIN, _WEIGHTED))
        if plain and weighted:
            raise MisconfigurationException(
                f"`training_step` returned a loss with a weight on rank {', '.join(map(str, weighted))}, and without"
                f" one on rank {', '.join(map(str, plain))}: {_RULE}."
            )
        if not plain and not weighted:
            return None
        unit = next((w for _, w in found if w > 0), 1.0)
        reference = 2.0 ** round(math.log2(unit * window))
        self._follow(WeightedLosses(strategy, reference) if weighted else PlainLosses())
        return self.scale(loss, weight, window, first)


def _mixture(given: str) -> MisconfigurationException:
    return MisconfigurationException(f"`training_step` returned a loss with {given}: {_RULE}.")


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
