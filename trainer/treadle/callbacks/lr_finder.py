"""LearningRateFinder: sets the learning rate by a range test when fit begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from treadle.callbacks.callback import Callback
from treadle.searches import Found, LRFinder, LRSearch
from treadle.searches.learning_rate import go_on_with
from treadle_fabric import rank_zero_warn

if TYPE_CHECKING:
    from treadle.contracts import LightningModule, Trainer

__all__ = ["LearningRateFinder"]


class LearningRateFinder(Callback):
    """Run a learning-rate range test when fit begins, and set the rate that it suggests.

    The test trains a few batches with ever larger rates and puts everything back: weights, optimizer, random state,
    loaders, counters. Callbacks and loggers take no part in it. A run that is resumed from a checkpoint takes the rate
    that was found before.

    Args:
        min_lr: the smallest rate to test. Default: 1e-8.
        max_lr: the largest. Default: 1.
        num_training_steps: the number of rates to test. Default: 100.
        mode: "exponential" (default) or "linear": the spacing of the rates.
        early_stop_threshold: the test ends where the smoothed loss is this many times the smallest one so far, or where
            a loss is not finite; None: never early. Default: 4.
        update_attr: whether the module and its optimizer get the rate. Default: True.
        attr_name: the attribute or hyper-parameter with the learning rate. Default: "lr" or "learning_rate".

    Attributes:
        optimal_lr: the results of the last test, with ``suggestion()`` and ``plot()``; None before it.

    Raises:
        MisconfigurationException: an argument is wrong; and when fit begins, the module has no such attribute, or has
            several optimizers.

    Example::

        class AtMilestones(LearningRateFinder):
            def __init__(self, milestones, **kwargs):
                super().__init__(**kwargs)
                self.milestones = milestones

            def on_fit_start(self, trainer, pl_module):
                pass

            def on_train_epoch_start(self, trainer, pl_module):
                if trainer.current_epoch in self.milestones:
                    self.lr_find(trainer, pl_module)
    """

    call_order: ClassVar[int] = -1
    SUPPORTED_MODES: ClassVar[tuple[str, ...]] = ("exponential", "linear")

    def __init__(
        self,
        min_lr: float = 1e-8,
        max_lr: float = 1,
        num_training_steps: int = 100,
        mode: str = "exponential",
        early_stop_threshold: float | None = 4.0,
        update_attr: bool = True,
        attr_name: str = "",
    ) -> None:
        super().__init__()
        self._search = LRSearch(min_lr, max_lr, num_training_steps, mode, early_stop_threshold, update_attr, attr_name)
        self.optimal_lr: LRFinder | None = None
        self._found = Found()
        self._module: LightningModule | None = None  # while a stage runs: it gets a rate that a checkpoint has

    def lr_find(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the test now, in a running fit, and set the rate."""
        if trainer.fast_dev_run:
            rank_zero_warn("Skipping learning rate finder since `fast_dev_run` is enabled: the learning rate stays.")
            return
        if self._found.is_taken(trainer.current_epoch):
            return
        self._search.attribute(pl_module)
        self.optimal_lr = trainer.search(self._search.run)
        rate = self._search.apply(self.optimal_lr, pl_module)
        self._found.note(rate, trainer.current_epoch)
        if rate is not None and not trainer.renew():
            go_on_with(rate, trainer.optimizers, [config.scheduler for config in trainer.lr_scheduler_configs])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note the module, and refuse one without the attribute that is to be set."""
        self._module = pl_module
        if stage == "fit" and not trainer.fast_dev_run:
            self._search.attribute(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the test."""
        self.lr_find(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the module."""
        self._module = None

    def state_dict(self) -> dict[str, Any]:
        """Return the rate that was found, with the points of the test."""
        results = self.optimal_lr.results if self.optimal_lr is not None else {}
        return {**self._found.state_dict(), "results": {name: list(values) for name, values in results.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the rate that was found before, and give it to the module."""
        self._found.load_state_dict(state_dict)
        self.optimal_lr = None
        if state_dict["results"]:
            search = self._search
            self.optimal_lr = LRFinder(search.mode, search.min_lr, search.max_lr, search.num_training)
            self.optimal_lr.results = state_dict["results"]
        if self._found.value is not None and self._module is not None:
            if (attribute := self._search.attribute(self._module)) is not None:
                attribute.set(self._found.value)
