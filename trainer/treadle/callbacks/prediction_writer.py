"""BasePredictionWriter: write predictions after each batch, or at the end of the epoch."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

from treadle.callbacks.callback import Callback
from treadle.module.overriding import overrides
from treadle_fabric import MisconfigurationException

if TYPE_CHECKING:
    from treadle.contracts import LightningModule, Trainer

__all__ = ["BasePredictionWriter", "WriteInterval"]


class WriteInterval(StrEnum):
    """When :class:`BasePredictionWriter` writes."""

    BATCH = "batch"
    EPOCH = "epoch"
    BATCH_AND_EPOCH = "batch_and_epoch"

    @property
    def on_batch(self) -> bool:
        """Whether after each batch."""
        return self is not WriteInterval.EPOCH

    @property
    def on_epoch(self) -> bool:
        """Whether at the end of the epoch."""
        return self is not WriteInterval.BATCH


class BasePredictionWriter(Callback):
    """Write what ``predict_step`` returns. Override :meth:`write_on_batch_end`, :meth:`write_on_epoch_end` or both.

    Each rank writes the predictions of its own batches; the indices of the samples tell which these are.

    Args:
        write_interval: "batch" (default), "epoch" or "batch_and_epoch". With "batch", and ``return_predictions=False``
            in ``predict``, no more than one batch is in memory. With the other two, each rank keeps the predictions of
            its own batches, on the CPU, until the end of the epoch.

    Raises:
        MisconfigurationException: ``write_interval`` is anything else; and when predict begins, the method for it is
            not overridden.

    Example:
        >>> class Files(BasePredictionWriter):
        ...     def write_on_batch_end(self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, loader):
        ...         torch.save({"samples": batch_indices, "found": prediction}, f"{loader}-{batch_indices[0]}.pt")
    """

    _batch_indices: Sequence[Any] | None = None
    _epoch: tuple[Any, list[Any]] | None = None  # the predictions and indices; both set here, for subclasses

    def __init__(self, write_interval: Literal["batch", "epoch", "batch_and_epoch"] = "batch") -> None:
        if write_interval not in tuple(WriteInterval):
            raise MisconfigurationException(
                f"{type(self).__qualname__}(write_interval={write_interval!r}): it must be"
                f" {', '.join(repr(each.value) for each in WriteInterval)}."
            )
        self.interval = WriteInterval(write_interval)

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the prediction of a batch; override it.

        Args:
            trainer: The trainer.
            pl_module: The module.
            prediction: What ``predict_step`` returned, on its device.
            batch_indices: The indices, in the dataset, of the samples of the batch, in their order; None where samples
                have no indices: of a stream, any other iterable, or a ``DataLoader`` with an ``__iter__`` of its own.
            batch: The batch.
            batch_idx: The number of the batch on this rank.
            dataloader_idx: The number of the loader.
        """
        raise NotImplementedError("Override `write_on_batch_end`.")

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Write the predictions of this rank; override it.

        Args:
            trainer: The trainer.
            pl_module: The module.
            predictions: What ``predict_step`` returned for each batch, on the CPU; a list of such lists with several
                loaders.
            batch_indices: For each loader, also where there is one, a list with the ``batch_indices`` of
                :meth:`write_on_batch_end` for each batch.
        """
        raise NotImplementedError("Override `write_on_epoch_end`.")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a writer that does not write."""
        for name, wanted in (
            ("write_on_batch_end", self.interval.on_batch),
            ("write_on_epoch_end", self.interval.on_epoch),
        ):
            if wanted and stage == "predict" and not overrides(self, name, BasePredictionWriter):
                raise MisconfigurationException(
                    f"{type(self).__qualname__} has write_interval={self.interval.value!r} and no `{name}`: override"
                    " it, or choose another interval."
                )

    def take_batch(self, batch_indices: Sequence[Any] | None) -> None:
        """Take the indices of the samples of the batch that has ended; the loop calls it before the hook."""
        self._batch_indices = batch_indices

    def take_epoch(self, predictions: Sequence[Any], batch_indices: list[Any]) -> None:
        """Take the predictions and indices of the epoch that has ended; the loop calls it before the hook."""
        self._epoch = (predictions, batch_indices)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Call :meth:`write_on_batch_end`."""
        if self.interval.on_batch:
            self.write_on_batch_end(trainer, pl_module, outputs, self._batch_indices, batch, batch_idx, dataloader_idx)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Call :meth:`write_on_epoch_end`."""
        epoch, self._epoch, self._batch_indices = self._epoch, None, None
        if self.interval.on_epoch and epoch is not None:
            self.write_on_epoch_end(trainer, pl_module, *epoch)
