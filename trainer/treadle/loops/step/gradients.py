"""The gradients of one micro-batch: forward, zero, scale, backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor

from treadle.loops.step.backward import automatic_backward
from treadle.loops.step.zero_grad import make_zero_grad
from treadle.module.steps.arguments import TRAINING_ARGUMENTS, bind_step
from treadle.run.run import ReadyRun
from treadle_fabric import MisconfigurationException, infer_batch_size, rank_zero_warn, warn_user

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["Gradients", "without_batch"]

_FIRST_ITEMS: Final = 8  # a batch may be a list of many numbers


class Gradients:
    """Runs ``training_step`` on a micro-batch, and differentiates its loss.

    Args:
        run: the run.
        optimizers: whose gradients are emptied where an accumulation begins; none in a fit without optimizers.
    """

    def __init__(self, run: ReadyRun, optimizers: Sequence[Optimizer]) -> None:
        step, call = run.module.training_step, run.method("training_step")
        step, self.wants_iterator = bind_step(step, call, TRAINING_ARGUMENTS)
        self._training_step = run.loss.observe(step, wants_iterator=self.wants_iterator)
        self._run, self._results, self._loss = run, run.results, run.loss
        self._zero_grad = make_zero_grad(run, optimizers)
        self._backward = automatic_backward(run)
        self._gives_outputs = bool(run.dispatch.listeners("on_train_batch_end"))
        self.idle = 0
        """The number of batches of this epoch without anything to learn from."""

    def of(self, batch: Any, batch_idx: int, window: float, done: float) -> tuple[Any, Tensor | None]:
        """Add the gradients of a micro-batch to those of its accumulation.

        Args:
            batch: on the device.
            batch_idx: the number of the batch in its epoch.
            window: the number of batches of the accumulation.
            done: the number of its batches before this one.

        Returns:
            What ``on_train_batch_end`` gets; and the mean loss, None where there was nothing to learn from.
        """
        self._results.hook = "training_step"
        output = self._training_step(batch, batch_idx) if batch is not None else without_batch(self._run)
        mean, weight = (output, None) if isinstance(output, Tensor) else _loss_of(output)
        if mean is None:
            self._run.fabric.strategy.finish_forward(self._run.engine, "training_step")
        loss = mean
        if mean is not None and _is_empty(batch) and not self._is_finite(mean, batch_idx):
            loss = None  # a mean over no samples
        first = not done
        if first:
            self._zero_grad()
        loss = self._loss.scale(loss, weight, window, first)
        if loss is None:
            self._go_without()
        else:
            self._backward(loss)
        learned = None if loss is None else mean
        if not self._gives_outputs:
            return None, learned
        outputs = {} if output is None or isinstance(output, Tensor) else dict(output)
        if mean is not None:
            divided = loss if loss is not None and weight is None else mean / window
            outputs["loss"] = divided.detach()
        return outputs, learned

    def _is_finite(self, mean: Tensor, batch_idx: int) -> bool:
        """Whether the loss of a batch of 0 samples is finite; the first one that is not is told of."""
        if bool(mean.isfinite().all()):
            return True
        if self._run.first_time("empty batch"):
            strategy, epoch = self._run.fabric.strategy, self._run.progress.epoch
            of_rank = f" on rank {strategy.global_rank}" if strategy.world_size > 1 else ""
            warn_user(
                f"A batch of 0 samples in the training loader{of_rank}, epoch {epoch}, batch {batch_idx}: its loss is"
                f" {mean.mean().item()}, and it is skipped, as others like it will be."
            )
        return False

    def _go_without(self) -> None:
        """There is no loss; other ranks may have one, and wait for this rank in their backward pass."""
        self.idle += 1
        self._run.fabric.strategy.join_backward(self._run.engine, str(self._run.progress.batches))


def without_batch(run: ReadyRun) -> Any:
    """Return what stands for the output of ``training_step`` where the batch is None, and warn of it once."""
    if run.first_time("none batch"):
        rank_zero_warn(
            "The train_dataloader yielded None. Batches of None are skipped: neither `on_train_batch_start` nor"
            " `training_step` gets them. If this was on purpose, ignore this warning."
        )
    return None


def _loss_of(output: Any) -> tuple[Tensor | None, Any]:
    """The loss in what ``training_step`` returned, if that is no tensor, and its weight if there is one."""
    if output is None:
        return None, None
    if isinstance(output, Mapping):
        loss = output.get("loss")
        if isinstance(loss, Tensor):
            return loss, output.get("weight")
        raise MisconfigurationException(
            f"`training_step` returned a dict with the keys {sorted(map(str, output))}; in automatic optimization it"
            " needs the key 'loss' with a tensor."
        )
    raise MisconfigurationException(
        f"`training_step` returned {type(output).__name__}; in automatic optimization it returns a scalar tensor, a"
        " dict with 'loss', or None to skip the batch."
    )


def _is_empty(batch: Any) -> bool:
    """Whether a batch has 0 samples, as far as the first tensor in it tells without a search."""
    kind, first = type(batch), batch
    if (kind is tuple or kind is list) and batch:
        first = batch[0]
    elif kind is dict and batch:
        first = next(iter(batch.values()))
    if isinstance(first, Tensor):
        return not first.numel() and infer_batch_size(first) == 0
    if kind not in (tuple, list, dict):
        held = batch if isinstance(batch, Mapping) else getattr(batch, "__dict__", {})
        first = next((value for value in held.values() if isinstance(value, Tensor)), batch)
        return infer_batch_size(first) == 0
    items = islice(batch.values() if kind is dict else batch, _FIRST_ITEMS)
    first = next((item for item in items if isinstance(item, Tensor)), first)
    return first is not batch and _is_empty(first)
