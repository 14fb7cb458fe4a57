"""One training batch in automatic optimization: zero, forward, backward, clip, step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from treadle.module import LightningModule
from treadle.module.overriding import overrides
from treadle.run.run import ReadyRun
from treadle_fabric import MisconfigurationException, warn_user
from treadle_fabric.precision import needs_closure

if TYPE_CHECKING:
    from torch.optim import Optimizer

from treadle.loops.step.arguments import step_arguments
from treadle.loops.step.clipping import Clipping

__all__ = ["AutomaticStep"]


class AutomaticStep:
    """Automatic optimization with one optimizer, or none."""

    def __init__(self, run: ReadyRun, clipping: Clipping) -> None:

        module, wrapped, listeners = run.module, run.wrapped, run.dispatch.listeners
        self._run, self._module, self._results, self._progress = run, module, run.results, run.progress
        self._dispatch = run.dispatch
        self._training_step = wrapped.method("training_step")
        self._takes, self.wants_iterator = step_arguments(module.training_step, ("batch", "batch_idx"))
        self._strategy, self._engine = run.fabric.strategy, wrapped.forward_module
        several = self._strategy.world_size > 1
        self._no_sync = partial(run.fabric.no_backward_sync, wrapped) if several else nullcontext
        self._precision = run.fabric.strategy.precision
        self._wrapped_optimizer = run.optimizers[0] if run.optimizers else None
        raw = self._wrapped_optimizer.optimizer if self._wrapped_optimizer is not None else None
        self._optimizer = raw
        self._zero_grad: Callable[[], None] | None = raw.zero_grad if raw is not None else None
        if overrides(module, "optimizer_zero_grad", LightningModule):
            self._zero_grad = self._zero_grad_hook
        self._backward_hook = module.backward if overrides(module, "backward", LightningModule) else None
        self._clipping = clipping if clipping.active and raw is not None else None
        self._before_zero_grad = listeners("on_before_zero_grad")
        self._before_backward = listeners("on_before_backward")
        self._after_backward = listeners("on_after_backward")
        self._before_step = listeners("on_before_optimizer_step")
        self._gives_outputs = bool(listeners("on_train_batch_end"))
        self._needs_loss = raw is not None and needs_closure(raw)
        own_step = raw is not None and overrides(module, "optimizer_step", LightningModule)
        self._closure_step: Any = module.optimizer_step if own_step or self._needs_loss else None
        self._outputs: Any = None
        self._last_loss: Tensor | None = None
        self._accumulate = 1
        self._weights, self._watch = run.weights, run.watch
        if run.watch is not None:
            self._training_step = run.watch.observe(self._training_step, wants_iterator=self.wants_iterator)
            self._before_backward = (*self._before_backward, run.watch.take)
        self._leaves_out = False  # this batch's step
        self._told_empty = False
        self.idle = 0
        """Batches of the epoch without anything to learn from."""

    def __call__(self, batch: Any, batch_idx: int, window: int, stepping: bool) -> Any:
        """Train on one batch; returns what ``on_train_batch_end`` gets.

        Args:
            batch: on the device.
            batch_idx: within the epoch.
            window: the batches of this accumulation, which the loss is divided by.
            stepping: whether the optimizer steps at this batch.
        """
        if not stepping:
            with self._no_sync():
                return self._gradients(batch, batch_idx, window, False)
        if self._closure_step is not None:
            return self._step_with_closure(batch, batch_idx, window)
        outputs = self._gradients(batch, batch_idx, window, True)
        if self._leaves_out:
            self._leaves_out = False
        elif self._optimizer is not None:
            self._strategy.optimizer_step(self._optimizer)
            self._progress.optimizer_steps += 1
        return outputs

    def _gradients(self, batch: Any, batch_idx: int, window: int, stepping: bool) -> Any:
        """Forward, zero, backward, and at a stepping batch the way to the step: unscale, clip."""
        results = self._results
        results.hook = "training_step"
        output = self._training_step(batch, batch_idx) if self._takes == 2 else self._training_step(batch)
        loss, weight = (output, None) if isinstance(output, Tensor) else self._loss_of(output)
        mean = loss
        if loss is not None and _is_empty(batch):
            loss = self._finite_loss(loss, batch_idx)
        optimizer, weights = self._optimizer, self._weights
        if optimizer is not None and batch_idx % self._accumulate == 0:
            if self._before_zero_grad:
                results.hook = "on_before_zero_grad"
                for listener in self._before_zero_grad:
                    listener(optimizer)
            self._zero_grad()  # type: ignore[misc]
        if weight is not None or not weights.off:
            first = batch_idx % self._accumulate == 0
            loss = weights.scale(loss, weight, window=window, first=first, strategy=self._strategy)
        elif window > 1 and loss is not None:
            loss = loss / window
        if loss is None:
            self._go_without(stepping)
        else:
            if self._before_backward:
                results.hook = "on_before_backward"
                for listener in self._before_backward:
                    listener(loss)
            self._backward(loss)
            if self._after_backward:
                results.hook = "on_after_backward"
                for listener in self._after_backward:
                    listener()
        if stepping and optimizer is not None:
            if window > 1 and weights.off:
                self._rescale(window, batch_idx % self._accumulate + 1)
            if not (weights.off or weights.normalize(optimizer, self._strategy)):
                if self._watch is not None:  # nothing to look at
                    self._watch.forget()
                self._leave_out(optimizer)
            elif self._watch is not None and not self._watch.allows(optimizer):
                self._leave_out(optimizer)
            elif self._before_step or self._clipping is not None:
                self._precision.unscale_gradients(optimizer)
                results.hook = "on_before_optimizer_step"
                for listener in self._before_step:
                    listener(optimizer)
                if self._clipping is not None:
                    self._clipping(optimizer)
        elif stepping and self._watch is not None and not self._watch.allows(None):
            self._module.zero_grad()
        if self._closure_step is not None:
            self._last_loss = loss if weights.off or loss is None or mean is None else mean / window
        if not self._gives_outputs:
            return None
        outputs = {} if output is loss or output is None or isinstance(output, Tensor) else dict(output)
        if mean is not None:
            outputs["loss"] = (loss if weights.off and loss is not None else mean / window).detach()
        return outputs

    def accumulate(self, batches: int) -> None:
        """Set the accumulation of the epoch that begins."""
        if batches > 1 and self._needs_loss:
            raise MisconfigurationException(
                f"accumulate_grad_batches={batches}, but {type(self._optimizer).__name__} evaluates the loss several"
                " times a step, of one batch only: use larger batches, or an optimizer without a closure."
            )
        self._accumulate = batches
        self.idle = 0
        if self._watch is not None:
            self._watch.forget()

    def _backward(self, loss: Tensor) -> None:
        if self._backward_hook is None:
            try:
                self._strategy.backward(loss, self._engine)
            except RuntimeError:
                _check_loss(loss)
                raise
        else:
            self._precision.pre_backward(loss, self._engine)
            self._dispatch.run("backward", self._precision.backward_by, self._backward_hook, loss)
            self._precision.post_backward(loss, self._engine)

    def _finite_loss(self, loss: Tensor, batch_idx: int) -> Tensor | None:
        """The loss of a batch of 0 samples; a mean over nothing is none."""
        if bool(loss.isfinite().all()):
            return loss
        if not self._told_empty:
            self._told_empty = True
            of_rank = f" on rank {self._strategy.global_rank}" if self._strategy.world_size > 1 else ""
            warn_user(
                f"A batch of 0 samples in the training loader{of_rank}, epoch {self._progress.epoch}, batch"
                f" {batch_idx}: its loss is {loss.mean().item()}, and it is skipped, as others like it will be."
            )
        return None

    def _go_without(self, stepping: bool) -> None:
        """There is no loss; other ranks may have one, and wait for this one in their backward pass."""
        self.idle += 1
        if stepping and self._strategy.world_size > 1:
            self._strategy.join_backward(self._engine, str(self._progress.batches))

    def _leave_out(self, optimizer: Optimizer) -> None:
        """The optimizer must not step at this batch. One that is in its step already finds no gradients."""
        self._leaves_out = True
        optimizer.zero_grad()

    def _rescale(self, window: int, done: int) -> None:
        """At the end of an epoch of unknown length the window was shorter than what the losses were divided by."""
        if done == window:
            return
        assert self._optimizer is not None
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(window / done)

    def _zero_grad_hook(self) -> None:
        self._dispatch.run(
            "optimizer_zero_grad",
            self._module.optimizer_zero_grad,
            self._progress.epoch,
            self._progress.batch,
            self._optimizer,
        )

    def _step_with_closure(self, batch: Any, batch_idx: int, window: int) -> Any:
        """The optimizer runs the forward and backward itself, perhaps several times."""

        def closure() -> Any:
            with torch.enable_grad():
                self._outputs = self._gradients(batch, batch_idx, window, True)
            if self._last_loss is None and self._needs_loss:
                raise MisconfigurationException(
                    f"`training_step` gave nothing to learn from at batch_idx {batch_idx} (None, a weight of 0, or a"
                    f" batch of 0 samples), but {type(self._optimizer).__name__} evaluates the loss several times a"
                    " step, and needs one for every batch: leave such batches out of the loader, or use an optimizer"
                    " without a closure."
                )
            return self._last_loss

        self._dispatch.run(
            "optimizer_step",
            self._closure_step,
            self._progress.epoch,
            batch_idx,
            self._wrapped_optimizer,
            closure,
        )
        if self._leaves_out:
            self._leaves_out = False
        else:
            self._progress.optimizer_steps += 1
        outputs, self._outputs = self._outputs, None
        return outputs

    def _loss_of(self, output: Any) -> tuple[Tensor | None, Any]:
        """The loss, and its weight if there is one."""
        if output is None:
            return None, None
        if isinstance(output, Mapping):
            loss = output.get("loss")
            if isinstance(loss, Tensor):
                return loss, output.get("weight")
            raise MisconfigurationException(
                f"`training_step` returned a dict with the keys {sorted(map(str, output))}; in automatic optimization"
                " it needs the key 'loss' with a tensor."
            )
        raise MisconfigurationException(
            f"`training_step` returned {type(output).__name__}; in automatic optimization it returns a scalar tensor, a"
            " dict with 'loss', or None to skip the batch."
        )


def _is_empty(batch: Any) -> bool:
    """Whether a batch has 0 samples, as far as the first tensor in it tells without a search."""
    first = batch
    if type(batch) in (tuple, list, dict) and batch:
        first = next(iter(batch.values())) if type(batch) is dict else batch[0]
    if isinstance(first, Tensor):
        return not first.numel() and first.shape[:1] == (0,)
    if first is not batch and type(first) in (tuple, list, dict):
        return _is_empty(first)
    named = batch if type(batch) is dict or isinstance(batch, Mapping) else getattr(batch, "__dict__", {})
    tensor = next((value for value in named.values() if isinstance(value, Tensor)), None)
    return tensor is not None and tensor.shape[:1] == (0,)


def _check_loss(loss: Tensor) -> None:
    """Explain why a backward pass failed, where the loss itself is the reason."""
    if loss.numel() != 1:
        raise MisconfigurationException(
            f"`training_step` returned a loss of shape {tuple(loss.shape)}; it is one number: reduce it, with `.mean()`"
            " say."
        ) from None
    if not loss.requires_grad:
        raise MisconfigurationException(
            "`training_step` returned a loss that does not depend on any parameter that requires a gradient: compute it"
            " from the model's output without `.detach()`, `.item()` or `torch.no_grad()`, and freeze not everything."
        ) from None
