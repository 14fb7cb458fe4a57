"""BatchSizeFinder: sets the largest batch size that memory has room for when a stage begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from treadle.callbacks.callback import Callback
from treadle.searches import BatchSizeSearch, Found
from treadle.stages import TrainerFn
from treadle_fabric import rank_zero_warn

if TYPE_CHECKING:
    from treadle.contracts import LightningModule, Trainer

__all__ = ["BatchSizeFinder"]


class BatchSizeFinder(Callback):
    """Find the largest batch size when fit, validate, test or predict begins, and set it.

    Each trial runs a few batches and puts everything back: weights, optimizer, random state, loaders, counters.
    Callbacks and loggers take no part. The loaders of the run are made anew with the size that was found. A fit that is
    resumed from a checkpoint takes the size that was found before. Several ranks get the same size: one that fits on
    each of them.

    Args:
        mode: "power" (default) doubles the size until memory is full; "binsearch" then halves the interval between the
            largest that fits and the smallest that does not.
        steps_per_trial: the number of batches to run with each size. Default: 3.
        init_val: the size to begin with. Default: 2.
        max_trials: the largest number of sizes to try. Default: 25.
        batch_arg_name: the attribute or hyper-parameter of module or data module with the size. Default: "batch_size".
        margin: what "binsearch" takes off the size that it found, as a fraction. Default: 0.05.
        max_val: the largest size to try. Default: 8192.

    Attributes:
        optimal_batch_size: the size that was found last; before that ``init_val``.

    Raises:
        MisconfigurationException: an argument is wrong; and when the stage begins, neither module nor data module has
            the attribute, or the loaders were passed, or not even the smallest size fits.
    """

    call_order: ClassVar[int] = -1
    SUPPORTED_MODES: ClassVar[tuple[str, ...]] = ("power", "binsearch")

    def __init__(
        self,
        mode: str = "power",
        steps_per_trial: int = 3,
        init_val: int = 2,
        max_trials: int = 25,
        batch_arg_name: str = "batch_size",
        margin: float = 0.05,
        max_val: int = 8192,
    ) -> None:
        super().__init__()
        self._search = BatchSizeSearch(mode, steps_per_trial, init_val, max_trials, batch_arg_name, margin, max_val)
        self.optimal_batch_size: int | None = init_val
        self._found = Found()
        self._run: tuple[Trainer, LightningModule] | None = None  # while a stage runs, for a size that a checkpoint has

    def scale_batch_size(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search now, in a running stage, and set the size."""
        if trainer.fast_dev_run:
            rank_zero_warn("Skipping batch size scaler since `fast_dev_run` is enabled: the batch size stays.")
            return
        if self._found.is_taken(trainer.current_epoch):
            return
        self._search.attribute(pl_module, trainer.datamodule)
        self.optimal_batch_size = size = trainer.search(self._search.run)
        self._search.apply(size, pl_module, trainer.datamodule)
        if trainer.state.fn is TrainerFn.FITTING:
            self._found.note(size, trainer.current_epoch)
        trainer.renew(loaders=True)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str | None = None) -> None:
        """Note the run, and refuse one without the attribute that is to be set."""
        self._run = trainer, pl_module
        if not trainer.fast_dev_run:
            self._search.attribute(pl_module, trainer.datamodule)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search for fit."""
        self.scale_batch_size(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search for ``trainer.validate``; a validation inside fit has the size that was found for fit."""
        if trainer.state.fn is TrainerFn.VALIDATING:
            self.scale_batch_size(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search for ``trainer.test``."""
        self.scale_batch_size(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search for ``trainer.predict``."""
        self.scale_batch_size(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the run."""
        self._run = None

    def state_dict(self) -> dict[str, Any]:
        """Return the size that was found for fit."""
        return self._found.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the size that was found before, and give it to module and data module, before loaders are made."""
        self._found.load_state_dict(state_dict)
        if self._found.value is not None:
            self.optimal_batch_size = self._found.value
            if self._run is not None:
                trainer, module = self._run
                self._search.attribute(module, trainer.datamodule).set(self._found.value)
