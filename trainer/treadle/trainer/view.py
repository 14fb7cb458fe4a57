"""``trainer.fit_loop`` and the other loops: counters and bounds under the names that programs for Lightning read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from treadle.checkpoint.content import loops_state
from treadle.data.find import defines_loader
from treadle.module import LightningDataModule, LightningModule
from treadle.run.progress import FitProgress, Phase
from treadle.stages import RunningStage
from treadle.trainer.fitting import Fitting

if TYPE_CHECKING:
    from treadle.contracts import Trainer

__all__ = ["ConnectorView", "Counts", "DataSource", "EpochLoopView", "EvaluationLoopView", "FitLoopView", "Progress"]


class Counts(NamedTuple):
    """How many batches or epochs have come how far."""

    ready: int
    started: int
    processed: int
    completed: int


class Progress(NamedTuple):
    """The counts of all epochs, and of the current one."""

    total: Counts
    current: Counts
    is_last_batch: bool = False


class _Bounds:
    """The bounds of a fit. Setting one is the same as setting it on the trainer; nothing else can be set."""

    __slots__ = ("_fitting", "_trainer")

    def __init__(self, trainer: Trainer, fitting: Fitting | None) -> None:
        self._trainer, self._fitting = trainer, fitting

    @property
    def trainer(self) -> Trainer:
        """The trainer."""
        return self._trainer

    @property
    def restarting(self) -> bool:
        """Whether the state of a checkpoint, or of a stop in mid-epoch, is still to be restored."""
        return self._fitting is not None and self._fitting.restoring

    @property
    def began(self) -> bool:
        """Whether training has begun, after the sanity check."""
        loop = self._fitting.loop if self._fitting is not None else None
        return loop is not None and loop.began

    @property
    def max_steps(self) -> int:
        """``trainer.max_steps``."""
        return self._trainer.max_steps

    @max_steps.setter
    def max_steps(self, steps: int) -> None:
        self._trainer.max_steps = steps

    @property
    def min_steps(self) -> int | None:
        """``trainer.min_steps``."""
        return self._trainer.min_steps

    @min_steps.setter
    def min_steps(self, steps: int | None) -> None:
        self._trainer.min_steps = steps

    @property
    def global_step(self) -> int:
        """``trainer.global_step``."""
        return self._trainer.global_step

    @property
    def batch_idx(self) -> int:
        """The number of the current batch in its epoch; -1 before the first."""
        return self._batches.current.ready - 1

    @property
    def total_batch_idx(self) -> int:
        """The number of the current batch in all epochs; -1 before the first."""
        return self._batches.total.ready - 1

    @property
    def _in_epoch(self) -> bool:
        return self._trainer.state.stage is RunningStage.TRAINING and self.began

    @property
    def _batches(self) -> Progress:
        p: FitProgress = self._trainer.fit_progress
        # The counters grow after the step: in the step, and before it, the current batch is not counted yet.
        within = int(self._in_epoch and p.begun and not p.epoch_ended and p.phase is Phase.BETWEEN)
        ending = int(p.phase is Phase.BATCH_END)
        total, current = (Counts(n + within, n + within, n, n - ending) for n in (p.batches, p.batch))
        return Progress(total, current, p.is_last_batch)


class EpochLoopView(_Bounds):
    """``trainer.fit_loop.epoch_loop``: the batches of a fit."""

    __slots__ = ()

    @property
    def batch_progress(self) -> Progress:
        """The batches: ready and started count the current batch, completed does not."""
        return self._batches

    @property
    def scheduler_progress(self) -> Progress:
        """The steps of the learning-rate schedulers."""
        p: FitProgress = self._trainer.fit_progress
        return _counted(p.scheduler_steps, p.scheduler_steps_in_epoch)

    @property
    def automatic_optimization(self) -> Any:
        """Has ``optim_progress``: the steps of the optimizers, and how often gradients were emptied for them."""
        p: FitProgress = self._trainer.fit_progress
        steps = _counted(p.optimizer_steps, p.step_in_epoch)
        optimizer = SimpleNamespace(step=steps, zero_grad=steps)
        return SimpleNamespace(optim_progress=SimpleNamespace(optimizer=optimizer, optimizer_steps=p.optimizer_steps))

    @property
    def manual_optimization(self) -> Any:
        """Has ``optim_step_progress``: the steps of the optimizers."""
        return SimpleNamespace(optim_step_progress=self.automatic_optimization.optim_progress.optimizer.step)

    @property
    def val_loop(self) -> EvaluationLoopView:
        """The validation within the fit."""
        return EvaluationLoopView(self._trainer, "val")

    @property
    def _batches_that_stepped(self) -> int:
        p: FitProgress = self._trainer.fit_progress
        return p.logging_step - int(p.phase is Phase.BATCH_END and p.stepping)  # counted once the hooks have run

    @_batches_that_stepped.setter
    def _batches_that_stepped(self, steps: int) -> None:
        self._trainer.fit_progress.logging_step = steps


def _counted(total: int, current: int) -> Progress:
    return Progress(Counts(total, total, total, total), Counts(current, current, current, current))


class DataSource(NamedTuple):
    """Where the loaders of a stage come from.

    Args:
        instance: The loaders that the user passed; where there are none the data module, or else the module.
        name: The name of their method.
    """

    instance: Any
    name: str

    def is_module(self) -> bool:
        """Whether a module or a data module gives the loaders."""
        return self.instance is None or isinstance(self.instance, (LightningModule, LightningDataModule))

    def is_defined(self) -> bool:
        """Whether there are loaders, or a method that gives them."""
        return not self.is_module() or (self.instance is not None and defines_loader(self.instance, self.name))

    def dataloader(self) -> Any:
        """The loaders; those of a method are made anew."""
        return getattr(self.instance, self.name)() if self.is_module() else self.instance


class ConnectorView(NamedTuple):
    """``trainer._accelerator_connector`` and ``trainer._checkpoint_connector``, as far as libraries read them."""

    trainer: Trainer

    @property
    def accelerator(self) -> Any:
        """``trainer.accelerator``."""
        return self.trainer.accelerator

    @property
    def strategy(self) -> Any:
        """``trainer.strategy``."""
        return self.trainer.strategy

    @property
    def is_distributed(self) -> bool:
        """Whether there are several processes."""
        return self.trainer.world_size > 1

    @property
    def use_distributed_sampler(self) -> bool:
        """Whether samples are shared out among the ranks."""
        return self.trainer._settings.use_distributed_sampler

    def dump_checkpoint(self, weights_only: bool = False) -> dict[str, Any]:
        """Collect what :meth:`treadle.Trainer.save_checkpoint` writes; every rank calls it."""
        found: dict[str, Any] = self.trainer._runner.dump(weights_only=weights_only)
        return found


class EvaluationLoopView:
    """``trainer.validate_loop``, ``trainer.test_loop``, ``trainer.predict_loop``: the loaders of an evaluation.

    Args:
        trainer: the trainer.
        stage: "val", "test" or "predict".
    """

    __slots__ = ("_stage", "_trainer")

    def __init__(self, trainer: Trainer, stage: str) -> None:
        self._trainer, self._stage = trainer, stage

    @property
    def trainer(self) -> Trainer:
        """The trainer."""
        return self._trainer

    @property
    def _data_source(self) -> DataSource:
        return _source(self._trainer, self._stage)

    @property
    def max_batches(self) -> list[float]:
        """The batches of each loader."""
        return self._trainer._num_batches(self._stage)

    @property
    def num_dataloaders(self) -> int:
        """The number of loaders."""
        return len(self.max_batches)

    @property
    def skip(self) -> bool:
        """Whether there is nothing to do: no loader has a batch that the limits allow."""
        return not sum(self.max_batches)

    @property
    def inference_mode(self) -> bool:
        """Whether batches run under ``torch.inference_mode``."""
        return self._trainer._settings.inference_mode


class FitLoopView(_Bounds):
    """``trainer.fit_loop``: the epochs of a fit."""

    __slots__ = ()

    @property
    def max_epochs(self) -> int | None:
        """``trainer.max_epochs``."""
        return self._trainer.max_epochs

    @max_epochs.setter
    def max_epochs(self, epochs: int | None) -> None:
        self._trainer.max_epochs = epochs

    @property
    def min_epochs(self) -> int | None:
        """``trainer.min_epochs``."""
        return self._trainer.min_epochs

    @min_epochs.setter
    def min_epochs(self, epochs: int | None) -> None:
        self._trainer.min_epochs = epochs

    @property
    def epoch_progress(self) -> Progress:
        """The epochs: ready and started count the current epoch, completed does not."""
        p: FitProgress = self._trainer.fit_progress
        ready = p.epoch + self._in_epoch
        counts = Counts(ready, ready, p.epoch + p.epoch_ended, p.epoch)
        return Progress(counts, counts)

    def forward_epoch(self) -> int:
        """Run ``training_step`` on the batches of an epoch, for what a forward pass leaves in layers like batch norm.

        Nothing learns, nothing is logged, and random states and the order of later batches stay. Every rank calls it.

        Returns:
            The number of batches; 0 where the steps cannot be run without learning, or the batches cannot be drawn
            again.
        """
        return self._fitting.forward_epoch() if self._fitting is not None else 0

    @property
    def _data_source(self) -> DataSource:
        return _source(self._trainer, "train")

    @property
    def epoch_loop(self) -> EpochLoopView:
        """The batches of the fit."""
        return EpochLoopView(self._trainer, self._fitting)

    @property
    def max_batches(self) -> float:
        """The training batches of an epoch; infinity where that is not known."""
        return self._trainer.num_training_batches

    @property
    def done(self) -> bool:
        """Whether nothing is left to train: an upper bound is reached, or a stop was asked for."""
        trainer = self._trainer
        epochs, steps = trainer.max_epochs, trainer.max_steps
        ended = epochs is not None and -1 < epochs <= trainer.current_epoch
        return ended or -1 < steps <= trainer.global_step or trainer.should_stop or not self.max_batches

    skip = done
    """Whether the fit would end at once."""

    def setup_data(self) -> None:
        """Ask for the training loader now, where that was not done yet: ``trainer.train_dataloader`` then is it."""
        if self._fitting is not None:
            self._fitting.estimated_steps()

    def state_dict(self) -> dict[str, Any]:
        """Return the counters, as a checkpoint has them under "loops"."""
        module = self._trainer.lightning_module
        automatic = module is None or module.automatic_optimization
        found: dict[str, Any] = loops_state(self._trainer.fit_progress, automatic=automatic)["fit_loop"]
        return found


def _source(trainer: Trainer, stage: str) -> DataSource:
    return DataSource(trainer._runner.source(stage), f"{stage}_dataloader")
