"""Prediction over all loaders."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, zip_longest
from typing import Any, Final

import torch

from treadle.callbacks import BasePredictionWriter
from treadle.data.evaluation import EvaluationData
from treadle.data.lookahead import BatchIterator
from treadle.data.transfer import stay
from treadle.loops.inference import explain_missing_gradients, without_inference
from treadle.loops.lockstep import lockstep_of
from treadle.loops.step.whole import prediction_of_whole_batches
from treadle.module.modes import module_modes, restore_modes
from treadle.module.steps.arguments import EVALUATION_ARGUMENTS, bind_step
from treadle.profilers.profiler import timed_iteration
from treadle.run.run import ReadyRun
from treadle_fabric import all_gather_objects, move_data_to_device
from treadle_fabric.data import BatchMeeting, one_of_each, shares_of_ranks

__all__ = ["Prediction"]

_PASSED: Final = object()
"""In the place of an output: this rank took part in the forward pass of others."""


class Prediction:
    """Runs ``predict_step`` over the loaders.

    Args:
        run: the run that the prediction belongs to.
        data: the loaders and the number of batches of each.
        inference_mode: whether to run under ``torch.inference_mode``, where the strategy allows it, rather than under
            ``torch.no_grad``.
        keep: whether to keep what the steps return.
    """

    def __init__(self, run: ReadyRun, data: EvaluationData, *, inference_mode: bool, keep: bool) -> None:
        self._run, self._data, self._keep = run, data, keep
        if run.fabric.strategy.runs_whole_batch:
            self._step, self._wants_iterator = prediction_of_whole_batches(run), False
        else:
            step, call, several = run.module.predict_step, run.method("predict_step"), len(data.loaders) > 1
            self._step, self._wants_iterator = bind_step(step, call, EVALUATION_ARGUMENTS, several=several)
        inference_mode &= run.fabric.strategy.allows_inference_mode
        self._no_grad = torch.inference_mode if inference_mode else torch.no_grad
        self._meeting = BatchMeeting("prediction") if run.fabric.world_size > 1 else None
        self._shares = shares_of_ranks(run.fabric.strategy)
        self._lockstep = lockstep_of(run, "predict_step", self._no_grad)
        self._on_batch_start = run.dispatch.listeners("on_predict_batch_start")
        self._on_batch_end = run.dispatch.listeners("on_predict_batch_end")
        self._writers = [c for c in run.module.trainer.callbacks if isinstance(c, BasePredictionWriter)]
        self._epoch_writers = [writer for writer in self._writers if writer.interval.on_epoch]
        if self._writers:
            data.record()
        self._kept: list[list[Any]] = [[] for _ in data.num_batches]
        self._indices: list[list[Any]] = [[] for _ in data.num_batches]

    def __call__(self) -> list[Any] | None:
        """Predict over all loaders.

        Returns:
            What ``predict_step`` returned for each batch, on the CPU; a list of such lists with several loaders; None
            if outputs are not kept. Of a loader that ranks share, each rank gets the outputs of all ranks, in order.
        """
        predictions: list[list[Any]] = [[] for _ in self._data.num_batches]
        for loader_idx, output in self._outputs(meet=True):
            if self._keep:
                predictions[loader_idx].append(output)
        if not self._keep:
            return None
        return self._of_loaders([self._gathered(i, kept) for i, kept in enumerate(predictions)])

    @staticmethod
    def _of_loaders(predictions: list[list[Any]]) -> list[Any]:
        return predictions[0] if len(predictions) == 1 else predictions

    def stream(self) -> Iterator[Any]:
        """Predict one batch each time the caller asks for an output, one loader after the other.

        Where ranks share a loader, outputs are exchanged batch by batch, so every rank has to ask for the same number.
        Where they do not, a rank may stop asking when it likes: ranks do not meet, and ``predict_step`` must not talk
        to other ranks, which may have fewer batches. Where the strategy's ranks work together in each forward pass, a
        rank that stops asking, or has no batch left, waits for the others and takes part in their passes.
        """
        for _, output in self._outputs(share=True):
            yield output

    def _outputs(self, *, share: bool = False, meet: bool = False) -> Iterator[tuple[int, Any]]:
        """Yield the loader's index and the output of each batch; with ``share``, those of the other ranks too.

        With ``meet``, ranks that have fewer batches wait for the others after each loader.
        """
        run, dispatch = self._run, self._run.dispatch
        run.changes.modes_before = modes = module_modes(run.module)
        loader_idx = 0
        try:
            with self._no_grad():  # never across a yield: it would hold in the caller's code, too
                dispatch.call("on_predict_model_eval")
                run.module.eval()
                dispatch.call("on_predict_start")
                dispatch.call("on_predict_epoch_start")
            if meet and self._meeting is not None:
                self._meeting.open()
            for loader_idx, limit in enumerate(self._data.num_batches):
                outputs = self._loader(loader_idx, limit)
                if share and self._data.is_shared(loader_idx):
                    outputs = self._with_others(outputs)
                for output in outputs:
                    if output is not _PASSED:
                        yield loader_idx, output
                if meet and self._meeting is not None:
                    self._meeting.come(f"of loader {loader_idx}" if len(self._data.loaders) > 1 else "")
            for writer in self._epoch_writers:
                writer.take_epoch(self._of_loaders(self._kept), self._indices)
            self._kept, self._indices = [], []  # the writers have them, until they have written
            with self._no_grad():
                dispatch.call("on_predict_epoch_end")
                dispatch.call("on_predict_end")
        except GeneratorExit:  # the caller asks for no more
            if self._lockstep is not None:
                self._lockstep.leave(len(self._data.num_batches) - loader_idx - 1)
            raise
        except RuntimeError as error:
            if self._no_grad is torch.inference_mode:
                explain_missing_gradients(error, run.results.hook or "predict_step")
            raise
        finally:
            run.changes.modes_before = []
            restore_modes(modes)

    def _loader(self, loader_idx: int, limit: float) -> Iterator[Any]:
        run, step, data, writers = self._run, self._step, self._data, self._writers
        results, transfer = run.results, run.transfer
        batches: Any = data.iterate(loader_idx, run.progress.epoch, limit)
        batches = timed_iteration(run.profiler, "[_PredictionLoop].predict_next", batches)
        if self._wants_iterator:
            batches, transfer = BatchIterator(batches, transfer, loader_idx).steps(), stay
        if self._lockstep is not None:
            batches = self._lockstep.turns_of_all(batches)
        meeting = self._meeting
        for turn in batches:
            if turn is None:
                yield _PASSED
                continue
            batch_idx, batch, _ = turn
            if meeting is not None:
                meeting.begun = batch_idx + 1
            with self._no_grad():
                batch = transfer(batch, loader_idx)
                results.hook = "on_predict_batch_start"
                for listener in self._on_batch_start:
                    listener(batch, batch_idx, loader_idx)
                results.hook = "predict_step"
                output = step(batch, batch_idx, loader_idx)
                results.hook = "on_predict_batch_end"
                for writer in writers:
                    writer.take_batch(data.indices)
                for listener in self._on_batch_end:
                    listener(output, batch, batch_idx, loader_idx)
                results.hook = ""
            yield self._on_cpu(output, loader_idx) if self._keep or self._epoch_writers else None

    def _on_cpu(self, output: Any, loader_idx: int) -> Any:
        """Return an output as it is kept; callbacks that write at the end of the epoch get it then."""
        output = without_inference(move_data_to_device(output, torch.device("cpu")))
        if self._epoch_writers:
            self._kept[loader_idx].append(output)
            self._indices[loader_idx].append(self._data.indices)
        return output

    def _gathered(self, loader_idx: int, kept: list[Any]) -> list[Any]:
        """Return the outputs of all ranks in the order of one process: the ranks took turns with the batches."""
        if not self._data.is_shared(loader_idx):
            return kept
        fabric, absent = self._run.fabric, object()
        ranks = one_of_each(all_gather_objects(fabric, kept), self._shares)
        return [item for turn in zip_longest(*ranks, fillvalue=absent) for item in turn if item is not absent]

    def _with_others(self, outputs: Iterator[Any]) -> Iterator[Any]:
        fabric = self._run.fabric
        while True:
            mine = [each for each in islice(outputs, 1) if each is not _PASSED]
            turn = one_of_each(all_gather_objects(fabric, mine), self._shares)
            if not turn[0]:  # rank 0 has the first batch of each turn, so no rank has one
                return
            for theirs in turn:
                yield from theirs
