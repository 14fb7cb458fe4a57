"""Steps under a strategy that runs whole batches, as pipelines do: the module's ``loss`` is called, not its steps.

The loss of a batch arrives on every rank, and is logged there: as ``train_loss``, ``val_loss`` or ``test_loss``,
and so are the other numbers that ``loss`` returned. What ``loss`` logs itself is known where the last stage is only; it
arrives on the other ranks together with the loss, as the mean over the micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor

from treadle.loops.step.zero_grad import make_zero_grad
from treadle.metrics.bus import Results
from treadle.metrics.options import GivenOptions, LogOptions
from treadle.metrics.reduction import reduction_named
from treadle.metrics.values import flatten_metrics
from treadle.run.run import ReadyRun
from treadle_fabric import infer_batch_size

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from treadle.contracts import LightningModule

__all__ = ["WholeBatchGradients", "evaluation_of_whole_batches", "prediction_of_whole_batches"]

_SHOWN: Final[GivenOptions] = LogOptions(prog_bar=True)
_PLAIN: Final[GivenOptions] = LogOptions()
_PREFIXES: Final = {"training": "train", "validation": "val", "test": "test"}


class WholeBatchGradients:
    """Has a strategy run forward and backward of all micro-batches; ``training_step`` is not called.

    Args:
        run: the run, whose strategy ``runs_whole_batch``.
        optimizers: as for :class:`treadle.loops.step.gradients.Gradients`.
    """

    wants_iterator = False
    idle = 0  # a rank without the last stage of a pipeline never has a loss

    def __init__(self, run: ReadyRun, optimizers: Sequence[Optimizer]) -> None:
        self._run_batch, self._engine = run.fabric.strategy.run_batch, run.engine
        self._results, self._loss = run.results, run.loss
        self._log, self._progress = _WholeBatchLog(run, run.results, "training"), run.progress
        self._zero_grad = make_zero_grad(run, optimizers)
        self._after_backward = run.dispatch.listeners("on_after_backward")
        self._gives_outputs = bool(run.dispatch.listeners("on_train_batch_end"))

    def of(self, batch: Any, batch_idx: int, window: float, done: float) -> tuple[Any, Tensor | None]:
        """Add the gradients of a batch; see :meth:`treadle.loops.step.gradients.Gradients.of`."""
        first = not done
        if first:
            self._zero_grad()
        self._results.hook = "training_step"
        self._progress.differentiated = self._progress.batches + 1
        found = self._run_batch(self._engine, batch, window, self._log.watching(batch))
        outputs = self._log.take(found)
        mean = outputs["loss"]
        loss = self._loss.scale(mean, None, window, first)
        if self._after_backward:
            self._results.hook = "on_after_backward"
            for listener in self._after_backward:
                listener()
        if not self._gives_outputs:
            return None, mean
        return {**outputs, "loss": mean if loss is None else loss.detach()}, mean


def evaluation_of_whole_batches(run: ReadyRun, results: Results, name: str) -> Callable[..., dict[str, Tensor]]:
    """Return what evaluates a batch in the place of ``validation_step`` or ``test_step``.

    Args:
        run: the run, whose strategy ``runs_whole_batch``.
        results: where values are logged.
        name: "validation" or "test".
    """
    evaluate, engine, log = run.fabric.strategy.evaluate_batch, run.engine, _WholeBatchLog(run, results, name)

    def step(batch: Any, batch_idx: int, dataloader_idx: int) -> dict[str, Tensor]:
        return log.take(evaluate(engine, batch, log.watching(batch)))

    return step


def prediction_of_whole_batches(run: ReadyRun) -> Callable[..., Any]:
    """Return what predicts a batch in the place of ``predict_step``.

    Args:
        run: the run, whose strategy ``runs_whole_batch``.
    """
    predict, engine = run.fabric.strategy.predict_batch, run.engine

    def step(batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        return predict(engine, batch)

    return step


class _WholeBatchLog:
    """Logs, on every rank, the numbers of a whole batch.

    Args:
        run: the run.
        results: where values are logged.
        name: of the stage.
    """

    def __init__(self, run: ReadyRun, results: Results, name: str) -> None:
        self._module, self._results, self._prefix = run.module, results, _PREFIXES[name]
        self._modules = run.modules
        self._loss: Any = run.module.loss

    def watching(self, batch: Any) -> Callable[[Any, Any], Any]:
        """Return the module's ``loss``, which gives what it logs along with what it returns."""
        size = infer_batch_size(batch) or 1

        def loss(outputs: Any, part: Any) -> Any:
            logged = _Logged(self._results, size // (infer_batch_size(part) or size))
            for module in self._modules:
                module.attach_metrics(logged)
            try:
                returned = self._loss(outputs, part)
            finally:
                for module in self._modules:
                    module.attach_metrics(self._results)
            if not logged.values:
                return returned
            return {**(returned if isinstance(returned, Mapping) else {"loss": returned}), **logged.values}

        return loss

    def take(self, found: Mapping[Any, Tensor]) -> dict[str, Tensor]:
        """Log what came of a batch, and return the numbers that ``loss`` returned."""
        logged = [key for key in found if isinstance(key, tuple)]
        names = {name for kind, name, _ in logged if kind == "value"}
        outputs: dict[str, Tensor] = {str(key): value for key, value in found.items() if not isinstance(key, tuple)}
        for key, value in outputs.items():
            if (name := f"{self._prefix}_{key}") not in names:
                self._results.log(self._module, name, value, _SHOWN if key == "loss" else _PLAIN, None)
        for kind, name, options in logged:
            if kind == "value":
                size = found.get(("samples", name, options))
                samples = None if size is None else round(float(size))
                self._results.log(self._module, name, found[kind, name, options], options, samples)
        return outputs


class _Logged:
    """What ``loss`` logs for a micro-batch.

    Args:
        results: gets what is no number, or is reduced in another way than by mean and sum: torchmetrics objects, for
            example, which exchange their states by themselves.
        parts: the number of micro-batches.
    """

    def __init__(self, results: Results, parts: int) -> None:
        self._results, self._parts = results, parts
        self.values: dict[tuple[str, str, GivenOptions], Any] = {}

    def log(
        self, module: LightningModule, name: str, value: Any, options: GivenOptions, batch_size: int | None
    ) -> None:
        """See :meth:`treadle.metrics.bus.Results.log`."""
        if isinstance(value, Mapping) or hasattr(value, "compute_groups"):
            for key, item in flatten_metrics(value, f"{name}/"):
                self.log(module, key, item, options, batch_size)
            return
        reduction = reduction_named(options[4])
        number = isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
        if not number or reduction not in ("mean", "sum"):
            self._results.log(module, name, value, options, batch_size)
            return
        options = (*options[:4], reduction, False, *options[6:])
        self.values["value", name, options] = value * self._parts if reduction == "sum" else value
        if batch_size is not None:
            self.values["samples", name, options] = float(batch_size * self._parts)
