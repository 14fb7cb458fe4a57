"""How losses become the gradients of one mean: over the batches of an accumulation, or by weights (tokens, samples)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from treadle.numbers.host_copy import HostCopy
from treadle.run.loss import LossPolicy, gradients_of
from treadle.run.run import Run
from treadle_fabric import MisconfigurationException, Strategy, rank_zero_warn

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["choose_loss_policy"]

_NOTHING, _PLAIN, _WEIGHTED = range(3)
_RULE: Final = "give 'weight' with every loss of a run, on every rank, or with none"


def choose_loss_policy(run: Run, on_nonfinite: str | None, root: str, *, alone: bool = False) -> LossPolicy:
    """Choose what becomes of the losses of a run.

    Args:
        run: the run.
        on_nonfinite: what happens to losses and gradients that are not finite. Default: nobody looks.
        root: the folder for files of what is not finite.
        alone: whether each rank runs for itself, so that it must not wait for the losses of others.
    """
    strategy = run.fabric.strategy
    rule: _Rule | None = EngineLosses() if strategy.handles_gradient_accumulation else None
    if alone and rule is None:
        rule = LoneLosses()
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

    def prepare(self, optimizers: Sequence[Optimizer], window: float, done: float, /) -> bool:
        """Multiply the gradients where an epoch of unknown length ended before the accumulation was complete."""
        if done != window:
            _multiply(gradients_of(optimizers), window / done)
        return True


class LoneLosses:
    """Divides each loss by the number of batches, with whatever weight: other ranks may not come to this step."""

    def scale(self, loss: Tensor | None, weight: Any, window: float, first: bool, /) -> Tensor | None:
        """See :class:`treadle.run.loss.LossPolicy`."""
        return loss / window if loss is not None and window > 1 else loss

    def prepare(self, optimizers: Sequence[Optimizer], window: float, done: float, /) -> bool:
        """Leave the gradients as they are."""
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

    def prepare(self, optimizers: Sequence[Optimizer], window: float, done: float, /) -> bool:
        """Do nothing: the gradients are the engine's."""
        return True


class WeightedLosses:
    """Makes the gradient of an optimizer step ``sum(w * g) / sum(w)`` over its micro-batches and over all ranks.

    Each loss is multiplied by its weight over a reference, and the sum of the gradients is divided by the sum of the
    weights where the optimizer steps. The reference keeps scaled losses of low precision in their usual range; the
    reference is a power of two, so that it changes no digit.

    A step needs the host to know one thing: whether the weights are all 0, since such a step is left out, and momentum
    or weight decay would move the parameters even by gradients of 0. Python numbers tell it at once. The sum of weights
    on a device is copied to the host as soon as the loss is known, before the backward pass is queued: where the host
    reads the sum, the device is busy with the backward pass. Several ranks add up their weights in one collective of
    two numbers on the device; of them, only a rank whose own weights are all 0 reads the result.

    Args:
        strategy: whose ranks share the weights of a step.
        reference: what weights are divided by; on the device of the first weight until the first step.
        total: the sum of this rank's weights in the accumulation so far.
        count: the number of this rank's losses in the accumulation so far.
    """

    def __init__(
        self, strategy: Strategy, reference: float | Tensor, total: float | Tensor = 0.0, count: int = 0
    ) -> None:
        self._strategy, self._reference = strategy, reference
        self._total, self._count = total, count
        self._to_host = HostCopy()
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
        if isinstance(self._total, Tensor):
            self._send()
        factor = weight / self._reference
        scaled = loss * (factor.to(loss.dtype) if isinstance(factor, Tensor) else factor)
        # the loss of a weight of 0 may well be 0 / 0
        if isinstance(weight, Tensor):
            return torch.where(weight > 0, scaled, 0.0)
        return None if weight == 0 else scaled

    def prepare(self, optimizers: Sequence[Optimizer], window: float, done: float, /) -> bool:
        """Divide the gradients by the weights of the accumulation, those of all ranks together.

        Returns:
            False where the weights are all 0.

        Raises:
            MisconfigurationException: a weight on the device was negative, NaN or infinite.
        """
        if not optimizers:
            return True
        strategy = self._strategy
        mine = self._read()
        known_positive = mine > 0
        total: Any = mine
        count: float = self._count
        if strategy.world_size > 1:
            pair = torch.full((2,), count, dtype=torch.float64, device=strategy.root_device)  # copied from nowhere
            pair[0].fill_(mine)
            pair = strategy.all_reduce(pair, reduce_op="sum")
            total, count = (pair[0], 1) if known_positive else pair.tolist()
        if not count:  # no loss in all of the accumulation: there are no gradients
            return True
        if not known_positive and total == 0:
            if not self._warned:
                self._warned = True
                rank_zero_warn("The weights of an optimizer step are 0 in total: such steps are skipped.")
            return False
        _multiply(gradients_of(optimizers), strategy.world_size * self._reference / total)
        return True

    def _send(self) -> None:
        """Send the sum of the weights to the host, and the reference if the host does not know it yet."""
        known = [each for each in (self._total, self._reference) if isinstance(each, Tensor)]
        self._to_host.send(torch.stack(known))

    def _read(self) -> float:
        """Return this rank's sum of weights."""
        if not isinstance(self._total, Tensor):
            return self._total
        total, *reference = self._to_host.read()
        if not 0 <= total < math.inf:
            raise _refused(total)
        if reference:
            (self._reference,) = reference
        self._total = total
        return total

    def state_dict(self) -> dict[str, Any]:
        """Return the reference, and the weights of the accumulation so far."""
        return {"reference": float(self._reference), "total": float(self._total), "count": self._count}


def _multiply(gradients: list[Tensor], factor: float | Tensor) -> None:
    """Multiply gradients: all of a kind in one operation, which a factor of another kind than theirs would prevent."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        groups.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    for (device, dtype), group in groups.items():
        torch._foreach_mul_(group, factor.to(device, dtype) if isinstance(factor, Tensor) else factor)


def _power_of_two(weight: Tensor) -> Tensor:
    """The power of two that is nearest to a weight, by their logarithms; 1 for a weight of 0."""
    mantissa, _ = torch.frexp(weight)  # from 0.5 to 1
    power = weight / mantissa  # exact: the quotient is a power of two
    return torch.where(weight > 0, torch.where(mantissa < math.sqrt(0.5), power / 2, power), 1.0)


_Rule = PlainLosses | EngineLosses | LoneLosses | WeightedLosses


class Losses:
    """The losses of a run, all with a weight or all without.

    Args:
        strategy: whose ranks agree at the first loss.
        rule: what becomes of the losses. Default: the first loss tells, with a weight :class:`WeightedLosses`, else
            :class:`PlainLosses`.
    """

    scale: Callable[[Tensor | None, Any, float, bool], Tensor | None]
    prepare: Callable[[Sequence[Optimizer], float, float], bool]

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
            self._follow(WeightedLosses(self._strategy, state["reference"], float(state["total"]), state["count"]))

    def _follow(self, rule: _Rule) -> None:
        self.scale, self.prepare = rule.scale, rule.prepare
        self._weighted = rule if isinstance(rule, WeightedLosses) else None

    def _scale_first(self, loss: Tensor | None, weight: Any, window: float, first: bool, /) -> Tensor | None:
        """Find out whether losses have weights. Several ranks agree, which waits for their devices once a run; they ask
        again while no rank has a loss.
        """
        strategy = self._strategy
        kind = _NOTHING if loss is None else _PLAIN if weight is None else _WEIGHTED
        number = _checked(weight) if kind == _WEIGHTED else 0.0
        if strategy.world_size == 1 and isinstance(number, Tensor) and number.device.type != "mps":
            self._follow(WeightedLosses(strategy, _power_of_two(number * window)))
            return self.scale(loss, weight, window, first)
        found = [(float(kind), float(number))]
        if strategy.world_size > 1:
            mine = torch.tensor([kind, found[0][1]], dtype=torch.float32, device=strategy.root_device)
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
            number: Tensor = weight.detach().reshape(())
            if number.device.type != "mps":
                return number.double()
            return number if number.is_floating_point() else number.float()
    try:
        value = float(weight)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value < math.inf:
        raise _refused(weight)
    return value


def _refused(weight: Any) -> MisconfigurationException:
    return MisconfigurationException(
        f"`training_step` returned weight={weight!r:.60}; it is a finite number of at least 0: the tokens or samples"
        " that the loss is the mean of."
    )
