"""The tuner: searches for a learning rate and a batch size before training."""

from __future__ import annotations

from typing import Any, Final, Literal

from treadle.callbacks import BatchSizeFinder, LearningRateFinder
from treadle.module import LightningDataModule, LightningModule
from treadle.searches import BatchSizeSearch, LRFinder, LRSearch
from treadle.stages import TrainerFn
from treadle.trainer import Trainer
from treadle.trainer.preflight import check_model, split_datamodule
from treadle_fabric import MisconfigurationException, near_names, rank_zero_warn

__all__ = ["Tuner"]

_METHODS: Final = {
    "fit": TrainerFn.FITTING,
    "validate": TrainerFn.VALIDATING,
    "test": TrainerFn.TESTING,
    "predict": TrainerFn.PREDICTING,
}


class Tuner:
    """Searches for a learning rate and a batch size.

    A search runs a few batches, and afterwards module, data module, loaders, random state and trainer are as they were,
    to the last bit, also where Ctrl-C, an error or full memory ends it: a later fit is the fit of a trainer that has
    never searched, but for the attribute that was set. Hooks of the module run; callbacks and loggers take no part, and
    no file is written. Meanwhile host memory has one more copy of the weights.

    Args:
        trainer: The trainer; its settings and devices are used.

    Example::

        tuner = Tuner(trainer)
        tuner.scale_batch_size(model)
        tuner.lr_find(model).plot(suggest=True, show=True)
        trainer.fit(model)
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def lr_find(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        method: Literal["fit", "validate", "test", "predict"] = "fit",
        min_lr: float = 1e-8,
        max_lr: float = 1,
        num_training: int = 100,
        mode: str = "exponential",
        early_stop_threshold: float | None = 4.0,
        update_attr: bool = True,
        attr_name: str = "",
    ) -> LRFinder | None:
        """Run a learning-rate range test, and set the rate that it suggests.

        Each optimizer step has a larger rate than the one before, in all parameter groups, and the smoothed loss is
        noted. Schedulers do not step. Where the training loader ends, it begins again.

        Args:
            model: The module.
            train_dataloaders: As for ``fit``.
            val_dataloaders: Not used; accepted as for ``fit``.
            dataloaders: Must be None.
            datamodule: Gives the loaders instead.
            method: Must be "fit".
            min_lr: The smallest rate to test.
            max_lr: The largest.
            num_training: The number of rates to test.
            mode: "exponential" or "linear": the spacing of the rates.
            early_stop_threshold: The test ends where the smoothed loss is this many times the smallest one so far, or
                where a loss is not finite. None: it never ends early.
            update_attr: Whether the module gets the suggested rate.
            attr_name: The attribute or hyper-parameter with the learning rate. Default: "lr" or "learning_rate".

        Returns:
            The results, with ``suggestion()`` and ``plot()``; None with ``fast_dev_run``.

        Raises:
            MisconfigurationException: an argument is wrong, the module has no such attribute, or there is not exactly
                one optimizer.
        """
        search = LRSearch(min_lr, max_lr, num_training, mode, early_stop_threshold, update_attr, attr_name)
        if _method(method) is not TrainerFn.FITTING:
            raise MisconfigurationException(
                f"lr_find trains, so method={method!r} is wrong: leave it out, or pass 'fit'."
            )
        given = _loaders(method, train_dataloaders, val_dataloaders, dataloaders)
        self._refuse_callback(LearningRateFinder)
        if self._trainer.fast_dev_run:
            rank_zero_warn("Skipping learning rate finder since `fast_dev_run` is enabled: the learning rate stays.")
            return None
        module = check_model(model, "fit")
        search.attribute(module)
        finder: LRFinder = self._trainer.search(search.run, TrainerFn.FITTING, model, given, datamodule)
        search.apply(finder, module)
        return finder

    def scale_batch_size(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        method: Literal["fit", "validate", "test", "predict"] = "fit",
        mode: str = "power",
        steps_per_trial: int = 3,
        init_val: int = 2,
        max_trials: int = 25,
        batch_arg_name: str = "batch_size",
        margin: float = 0.05,
        max_val: int = 8192,
    ) -> int | None:
        """Find the largest batch size that memory has room for, and set it.

        The loaders must be made by the module or a data module, with the attribute ``batch_arg_name`` as batch size. No
        batch is larger than the dataset. Several ranks get the same size: one that fits on each of them.

        Args:
            model: The module.
            train_dataloaders: A data module, or None: loaders that are made already have a batch size.
            val_dataloaders: Must be None.
            dataloaders: The same as ``train_dataloaders`` for the other methods.
            datamodule: Makes the loaders.
            method: The stage to search for: "fit", "validate", "test" or "predict".
            mode: "power" doubles the size until memory is full; "binsearch" then halves the interval between the
                largest that fits and the smallest that does not.
            steps_per_trial: The number of batches to run with each size.
            init_val: The size to begin with.
            max_trials: The largest number of sizes to try.
            batch_arg_name: The attribute or hyper-parameter of module or data module with the size.
            margin: What "binsearch" takes off the size that it found, as a fraction.
            max_val: The largest size to try.

        Returns:
            The size; None with ``fast_dev_run``.

        Raises:
            MisconfigurationException: an argument is wrong, neither module nor data module has the attribute, loaders
                were passed or do not depend on it, or not even the smallest size fits.
        """
        search = BatchSizeSearch(mode, steps_per_trial, init_val, max_trials, batch_arg_name, margin, max_val)
        fn, given = _method(method), _loaders(method, train_dataloaders, val_dataloaders, dataloaders)
        self._refuse_callback(BatchSizeFinder)
        if self._trainer.fast_dev_run:
            rank_zero_warn("Skipping batch size scaler since `fast_dev_run` is enabled: the batch size stays.")
            return None
        given, datamodule = split_datamodule(given, datamodule)
        search.check_loaders(given if val_dataloaders is None else val_dataloaders)
        module = check_model(model, fn.value)
        search.attribute(module, datamodule)
        size: int = self._trainer.search(search.run, fn, model, None, datamodule)
        search.apply(size, module, datamodule)
        return size

    def _refuse_callback(self, kind: type) -> None:
        if any(isinstance(callback, kind) for callback in self._trainer.callbacks):
            raise MisconfigurationException(
                f"The Trainer has a {kind.__name__}, which searches when the run begins: remove that callback, or do"
                " not call the Tuner."
            )


def _method(method: str) -> TrainerFn:
    if method not in _METHODS:
        raise MisconfigurationException(
            f"method={method!r} must be 'fit', 'validate', 'test' or 'predict'. {near_names(str(method), _METHODS)}"
        )
    return _METHODS[method]


def _loaders(method: str, train: Any, val: Any, other: Any) -> Any:
    """The loaders of the stage.

    Raises:
        MisconfigurationException: Those of another stage were passed.
    """
    if method == "fit" and other is not None:
        raise MisconfigurationException("With method='fit', pass `train_dataloaders`, and not `dataloaders`.")
    if method != "fit" and (train is not None or val is not None):
        raise MisconfigurationException(
            f"With method={method!r}, pass `dataloaders`, and neither `train_dataloaders` nor `val_dataloaders`."
        )
    return train if method == "fit" else other
