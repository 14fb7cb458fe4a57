"""ModelCheckpoint: writes checkpoints while a model trains and keeps the best."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from treadle.callbacks.checkpoint import (
    Checkpoint,
    await_others_at_the_end,
    end_of_training,
    has_trained,
    tolerated,
)
from treadle.callbacks.checkpoints.links import link_checkpoint
from treadle.callbacks.checkpoints.names import check_template, fill_template, with_ending
from treadle.callbacks.checkpoints.paths import (
    absolute,
    default_folder,
    is_kept_elsewhere,
    path_exists,
    remove_replaced,
    warn_if_in_use,
)
from treadle.callbacks.checkpoints.ranking import Ranking
from treadle.callbacks.checkpoints.triggers import SaveTriggers
from treadle.callbacks.monitoring.monitored_metric import MonitoredMetric
from treadle_fabric import (
    MisconfigurationException,
    MissingMetricError,
    PathLike,
    check_integer,
    describe_error,
    on_rank_zero,
    rank_zero_info,
    rank_zero_warn,
)

if TYPE_CHECKING:
    from treadle.contracts import LightningModule, Trainer

__all__ = ["ModelCheckpoint"]

T = TypeVar("T")


def _metrics_of(trainer: Trainer) -> dict[str, Any]:
    """Return what can be monitored and written into a file name."""
    metrics: dict[str, Any] = dict(trainer.callback_metrics)
    for name, count in (("epoch", trainer.current_epoch), ("step", trainer.global_step)):
        metrics[name] = int(metrics.get(name, count))
    return metrics


def _trained(trainer: Trainer) -> tuple[int, int]:
    """Return the number of optimizer steps and, in a run that makes no steps, the number of batches."""
    step = trainer.global_step
    return step, 0 if step else trainer.fit_progress.batches


class _InRanking(Generic[T]):
    """A public attribute of :class:`ModelCheckpoint` that is a field of its ranking; to set it replaces the ranking."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, callback: ModelCheckpoint | None, owner: type) -> T:
        return self if callback is None else getattr(callback._ranking, self._name)  # type: ignore[return-value]

    def __set__(self, callback: ModelCheckpoint, value: T) -> None:
        callback._ranking = replace(callback._ranking, **{self._name: value})  # type: ignore[arg-type]


@dataclass(frozen=True)
class _LastSave:
    """The newest file that this callback wrote, or has given to a background thread to write."""

    path: str = ""
    at: tuple[int, int] | None = None
    """What had been trained, as :func:`_trained` tells; None: nothing has been saved."""
    announced: bool = True
    """Whether the loggers know of the file."""
    settled: Ranking | None = None
    """The ranking when all files were known to be on disk; a background write that fails brings it back."""


class ModelCheckpoint(Checkpoint):
    """Write checkpoints, at epochs, steps or times, and keep the last, the best ``save_top_k`` or all of them.

    An old checkpoint is removed only after the new one is on disk. When a save fails, the earlier checkpoints are
    untouched, and the trainer's ``on_save_error`` decides whether training goes on. If validation runs after the step
    that triggers a save, the save waits for that validation and sees its metrics. With several processes rank 0's value
    of the monitored metric counts for all.

    Args:
        dirpath: the folder, local or an fsspec URL. Default: ``checkpoints`` in the folder of the first logger's run,
            or in the trainer's ``default_root_dir`` without a logger.
        filename: the name without extension; fields are the names of logged metrics, ``epoch`` and ``step``, with an
            optional format: ``"{epoch:02d}-{val_loss:.2f}"``. Default: ``"{epoch}-{step}"``.
        monitor: the logged metric that ranks checkpoints. None: the newest checkpoint is kept.
        verbose: print what is saved and what is not.
        save_last: True: each save also makes ``last.ckpt``, a second name (hard link) of the checkpoint just saved, or
            a file of its own where the save wrote none, links cannot be made, or the CheckpointIO writes more than
            what lies at the path (``path_is_all``). "link": the second name is a symbolic link. Default: no
            ``last.ckpt``.
        save_top_k: the number of checkpoints to keep; -1 for all, 0 for none. More than 1 needs a ``monitor``.
        save_on_exception: also save when an exception (Ctrl+C included) ends training.
        save_weights_only: leave optimizers, schedulers and progress out.
        mode: whether the "min" or the "max" of the metric is the best.
        auto_insert_metric_name: write ``val_loss=0.12`` rather than ``0.12``. Set it to False for names with a slash,
            which would make a folder.
        every_n_train_steps: save whenever that many optimizer steps have been made.
        train_time_interval: save at the end of the first batch after that much time.
        every_n_epochs: save at each n-th epoch. Default: 1 where neither steps nor a time are given, else 0, which
            saves at no epoch. Only one of the three arguments may be given.
        save_on_train_epoch_end: save at the end of the training epoch (True) or of validation (False). Default: at
            the end of the training epoch where validation runs once, at its end, or not at all.
        enable_version_counter: append ``-v1``, ``-v2``, ... to a name that is taken, rather than overwrite the file.

    Raises:
        MisconfigurationException: the arguments cannot work together; and in training, when every hook that logs has
            run without logging ``monitor`` (the state is saved before that, and the message says where).
    """

    CHECKPOINT_JOIN_CHAR = "-"
    CHECKPOINT_EQUALS_CHAR = "="
    CHECKPOINT_NAME_LAST = "last"
    FILE_EXTENSION = ".ckpt"
    STARTING_VERSION = 1

    _default: str | None = None  # the folder that was chosen because none was given

    # documented at the fields of Ranking
    mode = _InRanking[str]()
    save_top_k = _InRanking[int]()
    best_k_models = _InRanking[dict[str, Tensor]]()
    best_model_path = _InRanking[str]()
    best_model_score = _InRanking["Tensor | None"]()
    current_score = _InRanking["Tensor | None"]()
    kth_best_model_path = _InRanking[str]()
    kth_value = _InRanking[Tensor]()
    last_model_path = _InRanking[str]()

    def __init__(
        self,
        dirpath: PathLike | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        verbose: bool = False,
        save_last: bool | Literal["link"] | None = None,
        save_top_k: int = 1,
        save_on_exception: bool = False,
        save_weights_only: bool = False,
        mode: str = "min",
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        enable_version_counter: bool = True,
    ) -> None:
        super().__init__()
        save_top_k = check_integer(
            "ModelCheckpoint: save_top_k", save_top_k, minimum=-1, meaning="-1 keeps all checkpoints, 0 keeps none"
        )
        if save_top_k > 1 and monitor is None:
            raise MisconfigurationException(
                f"ModelCheckpoint(save_top_k={save_top_k}) has no metric to rank by: pass `monitor`, or save_top_k=1 "
                "to keep the newest, -1 to keep all."
            )
        if save_last not in (None, True, False, "link"):
            raise MisconfigurationException(
                f"ModelCheckpoint(save_last={save_last!r}) must be True, False, None or 'link'."
            )
        check_template(filename or "")
        self.monitor = monitor
        self.verbose = verbose
        self.save_last = save_last
        self.save_on_exception = save_on_exception
        self.save_weights_only = save_weights_only
        self.auto_insert_metric_name = auto_insert_metric_name
        self.filename = filename
        self.dirpath = absolute(os.fspath(dirpath)) if dirpath else None

        self._metric = MonitoredMetric(monitor or "", mode, f"ModelCheckpoint(monitor={monitor!r})")
        self._triggers = SaveTriggers(every_n_train_steps, every_n_epochs, train_time_interval, save_on_train_epoch_end)
        self._enable_version_counter = enable_version_counter
        self._ranking = Ranking.empty(mode, save_top_k)
        self._last = _LastSave()
        self._pending = False  # a save is due and waits for its metric
        self._restored = False  # the ranking comes from a checkpoint, and its files have not been looked for

    @property
    def state_key(self) -> str:
        """The class and the arguments that tell two callbacks of this class apart."""
        return self._generate_state_key(
            monitor=self.monitor,
            mode=self.mode,
            every_n_train_steps=self._triggers.every_n_train_steps,
            every_n_epochs=self._triggers.every_n_epochs,
            train_time_interval=self._triggers.train_time_interval,
        )

    @property
    def every_n_epochs(self) -> int:
        """Save at each n-th epoch; 0: at no epoch."""
        return self._triggers.every_n_epochs

    # ------------------------------------------------------------------------------------------------ when to save

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settle the folder, the same on every rank."""
        if stage != "fit":
            return

        def folder() -> tuple[str, bool]:
            if self.dirpath not in (None, self._default):
                return str(self.dirpath), False
            return default_folder(trainer.loggers, trainer.default_root_dir), True  # another run has another folder

        self.dirpath, chosen = on_rank_zero(trainer.strategy, folder, "could not choose a folder for checkpoints")
        self._default = self.dirpath if chosen else self._default
        self._metric.start()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of a folder that holds files of another run."""
        # in the fit that this one continues, or in the run that the checkpoint is of
        wrote_here = os.path.dirname(self._last.path) == self.dirpath or self._restored
        if trainer.is_global_zero and self.save_top_k != 0 and not trainer.fast_dev_run and not wrote_here:
            warn_if_in_use(self.dirpath or "", os.fspath(trainer.ckpt_path or ""))

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report a metric name that looks misspelled, before training begins."""
        if self.monitor is not None and self.save_top_k != 0:
            self._metric.after_sanity_check(trainer.callback_metrics)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count steps and time."""
        if self._restored:
            self._forget_missing_files(trainer)
        else:
            self._pending, self._last = False, replace(self._last, at=None)
        self._triggers.start(trainer.fabric, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where the steps or the time say so; a validation that follows the batch comes first."""
        if not self._triggers.in_epoch or not self._triggers.fires(trainer.global_step) or self._skips(trainer):
            return
        if trainer.validation_due:
            self._pending = True
        else:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what waited for validation, and at the epochs for which validation decides."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._metric.validated = True
        self._save_if_due(trainer, at_epoch_end=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the epochs for which their end decides, and what still waits for a metric."""
        self._metric.epoch_ended = True
        if self._triggers.every_n_train_steps and self._triggers.fires(trainer.global_step):  # by a step in this hook
            self._pending |= not self._skips(trainer)
        self._save_if_due(trainer, at_epoch_end=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what still waits, unranked where the metric never came: training may end before anything logs it."""
        if self._pending:
            self._save(trainer)
        with tolerated(trainer):
            if self._pending:
                metrics = _metrics_of(trainer)
                path = self._save_unranked(trainer, metrics)
                rank_zero_warn(f"{_missing(self._metric, metrics)} The final state was saved, unranked, as {path!r}.")
            self._settle(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the state as it is, if ``save_on_exception`` asks for it."""
        trained = has_trained(trainer) and trainer.fit_progress.batches > 0
        if not self.save_on_exception or self.dirpath is None or not trained or self._skips(trainer):
            return
        metrics = _metrics_of(trainer)
        try:
            await_others_at_the_end(trainer)
            with tolerated(trainer, always=True):
                self._settle(trainer)
            path = self._save_unranked(trainer, metrics)
            if self.save_last:
                previous = self.last_model_path
                self.last_model_path = self._free_path(trainer, metrics, [previous], self.CHECKPOINT_NAME_LAST)
                self._save_last(trainer)
                self._remove(trainer, [previous])
        except Exception as error:  # the exception that ends the run is the one to report
            rank_zero_warn(f"{end_of_training(exception)} ModelCheckpoint could not save: {describe_error(error)}")
        else:
            rank_zero_info(f"{end_of_training(exception)} The state was saved as {path!r}.")

    def _skips(self, trainer: Trainer) -> bool:
        return (
            bool(trainer.fast_dev_run)
            or trainer.state.fn != "fit"
            or trainer.sanity_checking
            or self._last.at == _trained(trainer)
        )

    def _save_if_due(self, trainer: Trainer, at_epoch_end: bool) -> None:
        if self._pending or (self._triggers.epoch_is_due(trainer, at_epoch_end) and not self._skips(trainer)):
            self._save(trainer)

    # ------------------------------------------------------------------------------------------------ what to save

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Tell, alike on every rank, whether a value of the monitored metric is among the best ``save_top_k``."""
        ranks = current is not None and self._ranking.has_room_for(current)
        return bool(trainer.strategy.reduce_boolean_decision(ranks))

    def _save(self, trainer: Trainer) -> None:
        with tolerated(trainer):
            self._settle(trainer)
        with tolerated(trainer):
            self._save_files(trainer)

    def _settle(self, trainer: Trainer) -> None:
        """Wait for a write in the background; if it failed, the ranking is again what it was before that save.

        Only then it is known which names are taken, and the file is there for the loggers.
        """
        try:
            trainer.strategy.wait_for_saves()
        except Exception:
            if not self.file_exists(self._last.path, trainer):
                self._ranking, self._last = self._last.settled or self._ranking, _LastSave()
            raise
        finally:
            self._announce(trainer)
            self._last = replace(self._last, settled=self._ranking)

    def _announce(self, trainer: Trainer) -> None:
        """Tell the loggers of the newest checkpoint, if they do not know of it."""
        if self._last.announced:
            return
        self._last = replace(self._last, announced=True)
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.after_save_checkpoint(self)

    def _save_files(self, trainer: Trainer) -> None:
        metrics = _metrics_of(trainer)
        self._pending = False
        previous = self.last_model_path
        replaced = [previous] if self.save_last else []
        try:
            if self.save_last:  # first, so that every file of this save knows of it
                self.last_model_path = self._free_path(trainer, metrics, [previous], self.CHECKPOINT_NAME_LAST)
            if self.save_top_k != 0:
                replaced += (self._save_newest if self.monitor is None else self._save_best)(trainer, metrics)
            if self.save_last:
                self._save_last(trainer)
        except BaseException:
            self.last_model_path = previous
            raise
        self._remove(trainer, replaced)

    def _save_newest(self, trainer: Trainer, metrics: dict[str, Any]) -> list[str]:
        """Save without a metric, and return the paths that the new file replaces."""
        path = self._free_path(trainer, metrics, [self.best_model_path] if self.save_top_k == 1 else [])
        ranking, replaced = self._ranking.with_newest(path)
        self._write(trainer, path, ranking)
        return replaced

    def _save_best(self, trainer: Trainer, metrics: dict[str, Any]) -> list[str]:
        """Save if the metric is good enough, and return the paths that the new file replaces."""
        current = self._metric.read(trainer.strategy, metrics)
        if current is None:
            self._await_metric(trainer, metrics)
            return []
        metrics[self._metric.name] = current  # read from the device once
        if torch.isnan(current):
            rank_zero_warn(f"{self._metric.owner}: the value is nan, which ranks as the worst value.")
        where = f"Epoch {trainer.current_epoch}, global step {trainer.global_step}: {self.monitor!r}"
        if not self._ranking.has_room_for(current):
            if self.verbose:
                rank_zero_info(f"{where} was not in top {self.save_top_k}")
            return []
        path = self._free_path(trainer, metrics, self._ranking.surplus())
        ranking, replaced = self._ranking.with_candidate(current, path)
        if self.verbose:
            score, best = (float(ranking.best_k_models[each]) for each in (path, ranking.best_model_path))
            rank_zero_info(
                f"{where} reached {score:0.5f} (best {best:0.5f}), saving model to {path!r} as top {self.save_top_k}"
            )
        self._write(trainer, path, ranking)
        return replaced

    def _await_metric(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Wait for a metric that was not logged while it may still come; otherwise save the state and stop."""
        if not self._metric.overdue(trainer):
            self._pending = True
            return
        path = self._save_unranked(trainer, metrics)
        raise MissingMetricError(
            f"{_missing(self._metric, metrics)} Log it with `self.log({self.monitor!r}, value)` or monitor another."
            f" The state was saved as {path!r}; training can go on from there with `fit(..., ckpt_path=...)`."
        )

    def _save_unranked(self, trainer: Trainer, metrics: dict[str, Any]) -> str:
        path = self._free_path(trainer, metrics)
        self._write(trainer, path, self._ranking)
        return path

    def _save_last(self, trainer: Trainer) -> None:
        """Give the checkpoint just saved the name ``last_model_path``, or write one where that cannot be."""
        path, last, io = self.last_model_path, self._last, trainer.strategy.checkpoint_io

        def link() -> bool:
            return link_checkpoint(last.path, path, symbolic=self.save_last == "link", after_saves=io.after_saves)

        just_saved = last.at == _trained(trainer) and last.path not in ("", path)
        if not (just_saved and io.path_is_all and on_rank_zero(trainer.strategy, link, f"could not link {path!r}")):
            self._write(trainer, path, self._ranking)

    # ------------------------------------------------------------------------------------------------ files

    def _write(self, trainer: Trainer, path: str, ranking: Ranking) -> None:
        """Write a checkpoint that knows of itself: ``ranking`` is in it, and stays if the write succeeds."""
        before = self._ranking, self._last
        self._ranking = ranking
        self._last = replace(self._last, path=path, at=_trained(trainer), announced=False)
        try:
            trainer.save_checkpoint(path, self.save_weights_only)
        except BaseException:
            self._ranking, self._last = before
            raise
        if trainer.strategy.checkpoint_io.after_saves is None:
            self._announce(trainer)

    def _remove(self, trainer: Trainer, replaced: list[str]) -> None:
        """Remove checkpoints of this callback; called when everything that replaces them is written."""
        kept = {"", self.best_model_path, self.last_model_path, self._last.path, *self.best_k_models}
        resumed, io = os.fspath(trainer.ckpt_path or ""), trainer.strategy.checkpoint_io
        for path in replaced if trainer.is_global_zero else ():
            if path not in kept:
                remove_replaced(path, self.dirpath or "", resumed, io)

    def format_checkpoint_name(
        self, metrics: dict[str, Any], filename: str | None = None, ver: int | None = None, prefix: str | None = None
    ) -> str:
        """Return the path of a checkpoint.

        Args:
            metrics: values for the fields; one that is missing counts as 0.
            filename: the template. Default: the template of this callback.
            ver: the version to append. Default: none.
            prefix: what to put before the name. Default: nothing.
        """
        join = self.CHECKPOINT_JOIN_CHAR
        template = filename or self.filename or f"{{epoch}}{join}{{step}}"
        check_template(template)
        name = fill_template(template, metrics, self.auto_insert_metric_name, self.CHECKPOINT_EQUALS_CHAR)
        name = join.join(part for part in (prefix, name) if part)
        version = f"{join}v{ver}" if ver is not None else ""
        name = with_ending(name, version + self.FILE_EXTENSION)
        return os.path.join(self.dirpath, name) if self.dirpath else name

    def file_exists(self, filepath: PathLike, trainer: Trainer) -> bool:
        """Tell whether anything lies at a path, as rank 0 sees it."""
        path = os.fspath(filepath)
        return on_rank_zero(trainer.strategy, lambda: path_exists(path), f"could not look at {path!r}")

    def _free_path(
        self, trainer: Trainer, metrics: dict[str, Any], reuse: Collection[str] = (), template: str | None = None
    ) -> str:
        """Return rank 0's choice of a path where nothing lies, or of a file to be replaced."""

        def choose() -> str:
            path = self.format_checkpoint_name(metrics, template)
            version = self.STARTING_VERSION
            while self._enable_version_counter and path not in reuse and path_exists(path):
                path = self.format_checkpoint_name(metrics, template, ver=version)
                version += 1
            return path

        return on_rank_zero(trainer.strategy, choose, "could not choose a name for a checkpoint")

    def _forget_missing_files(self, trainer: Trainer) -> None:
        """Drop from the ranking, after a resume, what was removed since the checkpoint was written."""
        self._restored = False
        paths = sorted({*self.best_k_models, self.best_model_path, self.last_model_path} - {""})
        resumed = os.fspath(trainer.ckpt_path or "")

        def missing() -> list[str]:
            if resumed and is_kept_elsewhere(resumed):  # then so are the others
                return []
            return [path for path in paths if not path_exists(path)]

        gone = on_rank_zero(trainer.strategy, missing, "could not look for checkpoints")
        if gone:
            self._ranking = self._ranking.without_files(gone)
            rank_zero_warn(f"ModelCheckpoint forgets checkpoints that are not there any more: {', '.join(gone)}.")

    def to_yaml(self, filepath: PathLike | None = None) -> None:
        """Write ``best_k_models``, path: score, to a YAML file (default: ``best_k_models.yaml`` in ``dirpath``)."""
        import fsspec  # heavy, and only this method needs it

        target = os.fspath(filepath) if filepath else os.path.join(self.dirpath or "", "best_k_models.yaml")
        with fsspec.open(target, "w") as file:
            file.write(self._ranking.as_yaml())

    # ------------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return paths and scores; the keys but the last two are Lightning's."""
        return {
            "monitor": self.monitor,
            "best_model_score": self.best_model_score,
            "best_model_path": self.best_model_path,
            "current_score": self.current_score,
            "dirpath": self.dirpath,
            "best_k_models": dict(self.best_k_models),
            "kth_best_model_path": self.kth_best_model_path,
            "kth_value": self.kth_value,
            "last_model_path": self.last_model_path,
            "pending": self._pending,
            "last_global_step_saved": self._last.at[0] if self._last.at else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back paths and scores; from a run that wrote to another folder only ``best_model_path``."""
        folder = state_dict.get("dirpath", self.dirpath)
        if folder is None:  # the state of a callback that has not chosen its folder
            self.dirpath = None
        if self.dirpath in (None, folder):  # None: not settled yet
            self._ranking = self._ranking.restored(state_dict)
            step = state_dict.get("last_global_step_saved")
            self._last = _LastSave(at=None if step is None else (step, 0))
            self._pending, self._restored = state_dict.get("pending", False), True
            return
        rank_zero_warn(
            f"The dirpath has changed from {folder!r} to {self.dirpath!r} since the checkpoint was written: the"
            " ranking starts anew, and only `best_model_path` is taken over."
        )
        self.best_model_path = state_dict.get("best_model_path", self.best_model_path)


def _missing(metric: MonitoredMetric, metrics: Mapping[str, Any]) -> str:
    return f"{metric.owner} could not find the monitored key in the returned metrics: {metric.unlogged(metrics)}"
