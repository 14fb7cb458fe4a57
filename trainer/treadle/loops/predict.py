"""Prediction over all loaders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from treadle.data import BatchIterator, EvaluationData, Lookahead
from treadle.loops.evaluate import module_modes, restore_modes
from treadle.loops.step import must_have, step_arguments
from treadle_fabric import move_data_to_device

if TYPE_CHECKING:
    from treadle.run import Run

__all__ = ["Prediction"]


class Prediction:
    """Runs ``predict_step`` over the loaders.

    Args:
        run: the run it belongs to.
        data: the loaders and how many batches of each.
        inference_mode: whether to run under ``torch.inference_mode`` rather than ``torch.no_grad``.
        keep: whether to keep what the steps return.
    """

    def __init__(self, run: Run, data: EvaluationData, *, inference_mode: bool, keep: bool) -> None:
        assert run.wrapped is not None
        self._run, self._data, self._keep = run, data, keep
        self._step = run.wrapped.method("predict_step")
        self._takes, self._wants_iterator = step_arguments(
            run.module.predict_step, ("batch", "batch_idx", "dataloader_idx")
        )
        if len(data.loaders) == 1 and not must_have(run.module.predict_step, "dataloader_idx"):
            self._takes = min(self._takes, 2)
        self._no_grad = torch.inference_mode if inference_mode else torch.no_grad
        self._on_batch_start = run.dispatch.listeners("on_predict_batch_start")
        self._on_batch_end = run.dispatch.listeners("on_predict_batch_end")

    def __call__(self) -> list[Any] | None:
        """Predict.

        Returns:
            What ``predict_step`` returned for each batch, on the CPU; a list of such lists with several loaders; None
            where they are not kept.
        """
        run, dispatch = self._run, self._run.dispatch
        modes = module_modes(run.module)
        predictions: list[list[Any]] = []
        try:
            with self._no_grad():
                dispatch.call("on_predict_model_eval")
                run.module.eval()
                dispatch.call("on_predict_start")
                dispatch.call("on_predict_epoch_start")
                for loader_idx, limit in enumerate(self._data.num_batches):
                    predictions.append(self._loader(loader_idx, limit))
                dispatch.call("on_predict_epoch_end")
                dispatch.call("on_predict_end")
        finally:
            restore_modes(modes)
        if not self._keep:
            return None
        return predictions[0] if len(predictions) == 1 else predictions

    def _loader(self, loader_idx: int, limit: float) -> list[Any]:
        run, step, takes = self._run, self._step, self._takes
        results, transfer = run.results, run.transfer
        kept: list[Any] = []
        cpu = torch.device("cpu")
        batches = Lookahead(self._data.iterate(loader_idx), 0, limit, exact=True)
        if self._wants_iterator:
            for _, drawing, _ in BatchIterator(batches, transfer, loader_idx).steps():
                output = step(drawing)
                if self._keep:
                    kept.append(move_data_to_device(output, cpu))
            return kept
        for batch_idx, batch, _ in batches:
            batch = transfer(batch, loader_idx)
            results.hook = "on_predict_batch_start"
            for listener in self._on_batch_start:
                listener(batch, batch_idx, loader_idx)
            results.hook = "predict_step"
            if takes == 3:
                output = step(batch, batch_idx, loader_idx)
            else:
                output = step(batch, batch_idx) if takes == 2 else step(batch)
            results.hook = "on_predict_batch_end"
            for listener in self._on_batch_end:
                listener(output, batch, batch_idx, loader_idx)
            if self._keep:
                kept.append(move_data_to_device(output, cpu))
        results.hook = ""
        return kept
