"""ModelCheckpoint: writes checkpoints while a model trains and keeps the best."""

from __future__ import annotations

import json
import os
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import Tensor

from treadle.callbacks.checkpoint import Checkpoint, tolerated
from treadle.callbacks.checkpoints.names import (
    absolute,
    check_template,
    default_folder,
    fill_template,
    is_local,
    link_checkpoint,
    path_exists,
    remove_link_and_empty_folders,
    yaml_number,
)
from treadle.callbacks.monitoring.monitored_metric import MonitoredMetric, from_rank_zero, validates_at_epoch_end
from treadle.step_clock import StepClock
from treadle_fabric.errors import CheckpointError, MisconfigurationException
from treadle_fabric.rank_zero import rank_zero_info, rank_zero_warn
from treadle_fabric.types import PathLike

if TYPE_CHECKING:
    from treadle.module import LightningModule
    from treadle.trainer import Trainer

__all__ = ["ModelCheckpoint"]

_RANKING: Final = (
    "best_model_path best_model_score current_score best_k_models kth_best_model_path kth_value last_model_path".split()
)


class ModelCheckpoint(Checkpoint):
    """Write checkpoints, at epochs, steps or times, and keep the last, the best ``save_top_k`` or all of them.

    An old checkpoint is removed only after the new one is on disk. When a save fails, what was saved before stands, and
    the trainer's ``on_save_error`` decides whether training goes on. A save that is triggered by a step after which
    validation runs waits for that validation, so that it sees its metrics. With several processes rank 0's value of
    the monitored metric counts for all.

    Args:
        dirpath: the folder, local or an fsspec URL. Default: ``checkpoints`` in the folder of the first logger's run,
            or in the trainer's ``default_root_dir`` without a logger.
        filename: without extension; fields are the names of logged metrics, ``epoch`` and ``step``, with an optional
            format: ``"{epoch:02d}-{val_loss:.2f}"``. Default: ``"{epoch}-{step}"``.
        monitor: the logged metric that ranks checkpoints; None keeps the newest.
        verbose: say what is saved and what is not.
        save_last: True also makes ``last.ckpt`` at each save, as a second name (hard link) of the checkpoint just
            saved, or as one of its own where none was saved or links cannot be; "link" makes it a symbolic link.
            Default: no.
        save_top_k: how many to keep; -1 all, 0 none. More than 1 needs a ``monitor``.
        save_on_exception: also save when an exception (Ctrl+C included) ends training.
        save_weights_only: leave optimizers, schedulers and progress out.
        mode: whether the "min" or the "max" of the metric is best.
        auto_insert_metric_name: write ``val_loss=0.12`` rather than ``0.12``. Set it to False for names with a slash,
            which would make a folder.
        every_n_train_steps: save whenever that many optimizer steps have been made.
        train_time_interval: save at the end of the first batch after that much time.
        every_n_epochs: save at each n-th epoch. The default is 1 where neither steps nor a time are given, else 0,
            which saves at no epoch. Only one of the three may be given.
        save_on_train_epoch_end: save at the end of the training epoch (True) or of validation (False). Default: at
            the end of the training epoch where validation runs once, at its end, or not at all.
        enable_version_counter: append ``-v1``, ``-v2``, ... to a name that is taken, rather than overwrite it.

    Raises:
        MisconfigurationException: for a combination that cannot work; and in training, when every hook that logs has
            run without logging ``monitor`` (the state is saved before, and the message says where).
    """

    CHECKPOINT_JOIN_CHAR = "-"
    CHECKPOINT_EQUALS_CHAR = "="
    CHECKPOINT_NAME_LAST = "last"
    FILE_EXTENSION = ".ckpt"
    STARTING_VERSION = 1

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
        self.monitor = monitor
        self.verbose = verbose
        self.save_last = save_last
        self.save_top_k = save_top_k
        self.save_on_exception = save_on_exception
        self.save_weights_only = save_weights_only
        self.mode = mode
        self.auto_insert_metric_name = auto_insert_metric_name
        self.filename = filename
        self.dirpath = absolute(os.fspath(dirpath)) if dirpath else None

        self._metric = MonitoredMetric(monitor or "", mode, f"ModelCheckpoint(monitor={monitor!r})")
        self._save_on_train_epoch_end = save_on_train_epoch_end
        self._enable_version_counter = enable_version_counter
        self._train_time_interval = train_time_interval
        self._every_n_train_steps = every_n_train_steps or 0
        if every_n_epochs is None:
            every_n_epochs = 1 if every_n_train_steps is None and train_time_interval is None else 0
        self._every_n_epochs = every_n_epochs
        self._check_arguments()

        self.current_score: Tensor | None = None
        self.best_k_models: dict[str, Tensor] = {}
        self.kth_best_model_path = ""
        self.kth_value = torch.tensor(self._metric.worst)
        self.best_model_score: Tensor | None = None
        self.best_model_path = ""
        self.last_model_path = ""

        self._triggers_in_epoch = self._every_n_train_steps > 0 or train_time_interval is not None
        self._next_step = 0
        self._next_time = 0.0
        self._clock: StepClock | None = None
        self._pending = False  # a save is wanted and waits for its metrics
        self._restored = False
        self._last_global_step_saved = 0
        self._last_checkpoint_saved = ""
        self._before: dict[str, Any] = {}  # the ranking before the last save
        self._announced = True  # to the loggers

    def _check_arguments(self) -> None:
        if not isinstance(self.save_top_k, int) or self.save_top_k < -1:
            raise MisconfigurationException(
                f"ModelCheckpoint(save_top_k={self.save_top_k!r}): it is -1 (keep all), 0 (keep none) or a count."
            )
        if self.save_top_k > 1 and self.monitor is None:
            raise MisconfigurationException(
                f"ModelCheckpoint(save_top_k={self.save_top_k}) has no metric to rank by: pass `monitor`, or "
                "save_top_k=1 to keep the newest, -1 to keep all."
            )
        if self.save_last not in (None, True, False, "link"):
            raise MisconfigurationException(
                f"ModelCheckpoint(save_last={self.save_last!r}): it is True, False, None or 'link'."
            )
        for name, count in (
            ("every_n_train_steps", self._every_n_train_steps),
            ("every_n_epochs", self._every_n_epochs),
        ):
            if not isinstance(count, int) or count < 0:
                raise MisconfigurationException(f"ModelCheckpoint({name}={count!r}): it is 0 (never) or a count.")
        interval = self._train_time_interval
        if interval is not None and not isinstance(interval, timedelta):
            raise MisconfigurationException(
                f"ModelCheckpoint(train_time_interval={interval!r}): it is a `datetime.timedelta`."
            )
        triggers = (self._every_n_train_steps > 0, self._every_n_epochs > 0, interval is not None)
        if sum(triggers) > 1:
            raise MisconfigurationException(
                f"ModelCheckpoint(every_n_train_steps={self._every_n_train_steps}, "
                f"every_n_epochs={self._every_n_epochs}, train_time_interval={interval}): "
                "only one of the three can be given; use a callback for each."
            )
        check_template(self.filename or "")

    @property
    def state_key(self) -> str:
        """The class and the arguments that tell two of them apart."""
        return self._generate_state_key(
            monitor=self.monitor,
            mode=self.mode,
            every_n_train_steps=self._every_n_train_steps,
            every_n_epochs=self._every_n_epochs,
            train_time_interval=self._train_time_interval,
        )

    @property
    def every_n_epochs(self) -> int:
        """Save at each n-th epoch; 0: at none."""
        return self._every_n_epochs

    # ------------------------------------------------------------------------------------------------ when to save

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settle the folder, the same on every rank."""
        if stage != "fit":
            return
        self.dirpath = from_rank_zero(trainer, lambda: self.dirpath or default_folder(trainer))
        self._metric.start()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of a folder that is in use."""
        if trainer.is_global_zero and self.save_top_k != 0 and not trainer.fast_dev_run:
            self._warn_if_not_empty(trainer)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report a metric name that looks misspelled before training begins."""
        if self.monitor is not None and self.save_top_k != 0:
            self._metric.after_sanity_check(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting steps and time."""
        if self._restored:
            self._forget_missing_files(trainer)
        else:
            self._pending, self._last_global_step_saved = False, 0
        self._plan_next_step(trainer.global_step)
        if self._train_time_interval is not None:
            self._clock = StepClock(trainer.fabric)
            self._next_time = time.monotonic() + self._train_time_interval.total_seconds()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where the steps or the time say so; a validation that follows comes first."""
        if not self._triggers_in_epoch:
            return
        if self._clock is None or self._train_time_interval is None:
            if trainer.global_step < self._next_step:
                return
            self._plan_next_step(trainer.global_step)
        else:
            if not self._clock.over(self._next_time - time.monotonic()):
                return
            self._next_time = time.monotonic() + self._train_time_interval.total_seconds()
        if self._skips(trainer):
            return
        if trainer.validation_due:
            self._pending = True
        else:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what waited for validation, and at the epochs where it decides."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._metric.validated = True
        due = self._epoch_is_due(trainer) and not self._saves_at_epoch_end(trainer)
        if self._pending or (due and not self._skips(trainer)):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the epochs where their end decides, and what still waits for a metric."""
        self._metric.epoch_ended = True
        due = self._epoch_is_due(trainer) and self._saves_at_epoch_end(trainer)
        if self._pending or (due and not self._skips(trainer)):
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what still waits, unranked where its metric never came: training may end before anything logs it."""
        if self._pending:
            self._save(trainer)
        with tolerated(trainer):
            if self._pending:
                metrics = self._candidates(trainer)
                path = self._free_path(trainer, metrics)
                self._write(trainer, path)
                rank_zero_warn(f"{self._metric.missing(metrics)} The final state was saved, unranked, as {path!r}.")
            self._settle(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save what there is, if asked to."""
        if not self.save_on_exception or self.dirpath is None or self._skips(trainer):
            return
        metrics = self._candidates(trainer)
        try:
            with tolerated(trainer, always=True):
                self._settle(trainer)
            path = self._free_path(trainer, metrics)
            self._write(trainer, path)
            if self.save_last:
                previous, self.last_model_path = self.last_model_path, self._path_of_last(trainer, metrics)
                self._save_last(trainer)
                self._remove(trainer, [previous])
        except Exception as error:  # the exception that ends the run is the one to report
            rank_zero_warn(f"ModelCheckpoint could not save on {type(exception).__name__}: {error}")
        else:
            rank_zero_info(f"{type(exception).__name__}: {exception}. The state was saved as {path!r}.")

    def _plan_next_step(self, step: int) -> None:
        if self._every_n_train_steps:
            self._next_step = (step // self._every_n_train_steps + 1) * self._every_n_train_steps

    def _skips(self, trainer: Trainer) -> bool:
        return (
            bool(trainer.fast_dev_run)
            or trainer.state.fn != "fit"
            or trainer.sanity_checking
            or self._last_global_step_saved == trainer.global_step
        )

    def _epoch_is_due(self, trainer: Trainer) -> bool:
        return self._every_n_epochs > 0 and (trainer.current_epoch + 1) % self._every_n_epochs == 0

    def _saves_at_epoch_end(self, trainer: Trainer) -> bool:
        chosen = self._save_on_train_epoch_end
        return validates_at_epoch_end(trainer) if chosen is None else chosen

    # ------------------------------------------------------------------------------------------------ what to save

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Whether ``current``, a value of the monitored metric, is among the best ``save_top_k``, on all ranks."""
        return bool(trainer.strategy.reduce_boolean_decision(current is not None and self._ranks(current)))

    def _ranks(self, current: Tensor) -> bool:
        if self.save_top_k == -1 or len(self.best_k_models) < self.save_top_k:
            return True
        return bool(self._metric.better(current, self.best_k_models[self.kth_best_model_path]))

    def _candidates(self, trainer: Trainer) -> dict[str, Any]:
        """What can be monitored and written into a name."""
        metrics: dict[str, Any] = dict(trainer.callback_metrics)
        for name, count in (("epoch", trainer.current_epoch), ("step", trainer.global_step)):
            metrics[name] = int(metrics.get(name, count))
        return metrics

    def _save(self, trainer: Trainer) -> None:
        with tolerated(trainer):
            self._settle(trainer)
        with tolerated(trainer):
            self._save_files(trainer)

    def _settle(self, trainer: Trainer) -> None:
        """See the last save end where it is written in the background; if it failed, this callback forgets of it.

        Only then can be seen which names are taken, and is the file there for the loggers.
        """
        try:
            if (io := trainer.strategy.checkpoint_io).after_saves is not None:
                from_rank_zero(trainer, io.wait)
        except (CheckpointError, OSError):
            if not self.file_exists(self._last_checkpoint_saved, trainer):
                vars(self).update(self._before, _last_checkpoint_saved="", _last_global_step_saved=0, _announced=True)
            raise
        finally:
            if not self._announced:
                self._announce(trainer)

    def _announce(self, trainer: Trainer) -> None:
        self._announced = True
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.after_save_checkpoint(self)

    def _save_files(self, trainer: Trainer) -> None:
        metrics = self._candidates(trainer)
        self._pending = False
        self._before = {name: getattr(self, name) for name in _RANKING}
        stale = [self.last_model_path] if self.save_last else []
        try:
            if self.save_last:  # first, so that every file of this save knows of it
                self.last_model_path = self._path_of_last(trainer, metrics)
            if self.save_top_k != 0:
                stale += (self._save_best if self.monitor is not None else self._save_newest)(trainer, metrics)
            if self.save_last:
                self._save_last(trainer)
        except BaseException:
            if self.save_last:
                self.last_model_path = stale[0]
            raise
        self._remove(trainer, stale)

    def _save_newest(self, trainer: Trainer, metrics: dict[str, Any]) -> list[str]:
        previous = self.best_model_path if self.save_top_k == 1 else ""
        path = self._free_path(trainer, metrics, reuse=previous)
        self._write(trainer, path, {"best_model_path": path})
        return [previous]

    def _save_best(self, trainer: Trainer, metrics: dict[str, Any]) -> list[str]:
        current = self._metric.read(trainer, metrics)
        if current is None:
            self._await_metric(trainer, metrics)
            return []
        metrics[self._metric.name] = current  # read from the device once
        if torch.isnan(current):
            rank_zero_warn(f"{self._metric.owner}: the value is nan, which ranks as {self._metric.worst}.")
            current = torch.full_like(current, self._metric.worst)
        where = f"Epoch {trainer.current_epoch}, global step {trainer.global_step}: {self.monitor!r}"
        if not self._ranks(current):
            if self.verbose:
                rank_zero_info(f"{where} was not in top {self.save_top_k}")
            return []
        full = len(self.best_k_models) == self.save_top_k
        evicted = self.kth_best_model_path if full else ""
        path = self._free_path(trainer, metrics, reuse=evicted)
        kept = {**{p: score for p, score in self.best_k_models.items() if p != evicted}, path: current}
        ranking = self._ranking(kept, current)
        if self.verbose:
            best = float(ranking["best_model_score"])
            rank_zero_info(
                f"{where} reached {float(current):0.5f} (best {best:0.5f}), saving model to {path!r} "
                f"as top {self.save_top_k}"
            )
        self._write(trainer, path, ranking)
        return [evicted]

    def _ranking(self, kept: dict[str, Tensor], current: Tensor | None) -> dict[str, Any]:
        best, worst = (min, max) if self.mode == "min" else (max, min)
        first = best(kept, key=lambda path: float(kept[path])) if kept else ""
        full = bool(kept) and (self.save_top_k == -1 or len(kept) >= self.save_top_k)
        last = worst(kept, key=lambda path: float(kept[path])) if full else ""
        return {
            "best_k_models": kept,
            "best_model_path": first,
            "best_model_score": kept.get(first),
            "current_score": current,
            "kth_best_model_path": last,
            "kth_value": kept.get(last, torch.tensor(self._metric.worst)),
        }

    def _await_metric(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Nothing has logged the metric: wait for it while it may still come, else stop, with the state saved."""
        if not self._metric.overdue(trainer):
            self._pending = True
            return
        path = self._free_path(trainer, metrics)
        self._write(trainer, path)
        raise MisconfigurationException(
            f"{self._metric.missing(metrics)} Log it with `self.log({self.monitor!r}, value)` or monitor another. The "
            f"state was saved as {path!r}; training can go on from there with `fit(..., ckpt_path=...)`."
        )

    def _path_of_last(self, trainer: Trainer, metrics: dict[str, Any]) -> str:
        return self._free_path(trainer, metrics, reuse=self.last_model_path, template=self.CHECKPOINT_NAME_LAST)

    def _save_last(self, trainer: Trainer) -> None:
        path = self.last_model_path
        just_saved = self._last_checkpoint_saved if self._last_global_step_saved == trainer.global_step else ""
        if just_saved not in ("", path):
            symbolic, after_saves = self.save_last == "link", trainer.strategy.checkpoint_io.after_saves
            if from_rank_zero(
                trainer, lambda: link_checkpoint(just_saved, path, symbolic=symbolic, after_saves=after_saves)
            ):
                return
        self._write(trainer, path)

    # ------------------------------------------------------------------------------------------------ files

    def _write(self, trainer: Trainer, path: str, ranking: dict[str, Any] | None = None) -> None:
        """Write a checkpoint that knows of itself; if that fails, this callback does not know of it either."""
        before = {name: getattr(self, name) for name in (*_RANKING, "_last_global_step_saved")}
        vars(self).update({**(ranking or {}), "_last_global_step_saved": trainer.global_step})
        try:
            trainer.save_checkpoint(path, self.save_weights_only)
        except BaseException:
            vars(self).update(before)
            raise
        self._last_checkpoint_saved = path
        self._announced = False
        if trainer.strategy.checkpoint_io.after_saves is None:
            self._announce(trainer)

    def _remove(self, trainer: Trainer, stale: list[str]) -> None:
        """Remove checkpoints of this callback that were replaced; called when all that replaces them is written."""
        if not trainer.is_global_zero:
            return
        kept = {self.best_model_path, self.last_model_path, self._last_checkpoint_saved, *self.best_k_models}
        for path in stale:
            if not path or path in kept or not self._owns(trainer, path):
                continue
            io = trainer.strategy.checkpoint_io
            try:
                if path_exists(path) and not os.path.islink(path):
                    io.remove_checkpoint(path)
                tidy = partial(remove_link_and_empty_folders, path, self.dirpath or "")
                io.after_saves(tidy) if io.after_saves is not None else tidy()
            except (OSError, CheckpointError) as error:  # a file too many is no reason to stop training
                rank_zero_warn(f"ModelCheckpoint could not remove {path!r}: {error}")

    def _owns(self, trainer: Trainer, path: str) -> bool:
        """Not the file that the run was resumed from, nor one of another folder."""
        folder, name = os.path.split(os.fspath(trainer.ckpt_path or ""))
        if name and os.path.join(absolute(folder or os.curdir), name) == path:  # a link is the link, not its target
            return False
        return path.startswith(os.path.join(self.dirpath or "", ""))

    def format_checkpoint_name(
        self, metrics: dict[str, Any], filename: str | None = None, ver: int | None = None, prefix: str | None = None
    ) -> str:
        """The path of a checkpoint.

        Args:
            metrics: values for the fields; one that is missing counts as 0.
            filename: the template; default: this callback's.
            ver: the version to append.
            prefix: what to put before the name.
        """
        join = self.CHECKPOINT_JOIN_CHAR
        template = filename or self.filename or f"{{epoch}}{join}{{step}}"
        check_template(template)
        name = fill_template(template, metrics, self.auto_insert_metric_name, self.CHECKPOINT_EQUALS_CHAR)
        name = join.join(part for part in (prefix, name, f"v{ver}" if ver is not None else None) if part)
        name += self.FILE_EXTENSION
        return os.path.join(self.dirpath, name) if self.dirpath else name

    def file_exists(self, filepath: PathLike, trainer: Trainer) -> bool:
        """Whether something lies at a path, as rank 0 sees it."""
        return from_rank_zero(trainer, lambda: path_exists(os.fspath(filepath)))

    def _free_path(
        self, trainer: Trainer, metrics: dict[str, Any], reuse: str = "", template: str | None = None
    ) -> str:
        """Rank 0's choice of a path where nothing lies, or that of the file to be replaced."""

        def choose() -> str:
            path = self.format_checkpoint_name(metrics, template)
            version = self.STARTING_VERSION
            while self._enable_version_counter and path != reuse and path_exists(path):
                path = self.format_checkpoint_name(metrics, template, ver=version)
                version += 1
            return path

        return from_rank_zero(trainer, choose)

    def _warn_if_not_empty(self, trainer: Trainer) -> None:
        folder = self.dirpath or ""
        resumed = trainer.ckpt_path
        if not is_local(folder) or not os.path.isdir(folder) or not os.listdir(folder):
            return
        if resumed and Path(folder) in Path(absolute(os.fspath(resumed))).parents:
            return  # the run goes on where it left off
        rank_zero_warn(f"The checkpoint folder {folder} is not empty: files of another run may lie there.")

    def _forget_missing_files(self, trainer: Trainer) -> None:
        """After a resume: what the checkpoint ranks may have been removed since it was written."""
        self._restored = False
        paths = [*self.best_k_models, self.best_model_path, self.last_model_path]
        gone = set(from_rank_zero(trainer, lambda: [path for path in paths if path and not path_exists(path)]))
        if not gone:
            return
        if gone & set(self.best_k_models):
            kept = {path: score for path, score in self.best_k_models.items() if path not in gone}
            vars(self).update(self._ranking(kept, self.current_score))
        elif self.best_model_path in gone:
            self.best_model_path = ""
        if self.last_model_path in gone:
            self.last_model_path = ""
        rank_zero_warn(f"ModelCheckpoint forgets checkpoints that are not there any more: {', '.join(sorted(gone))}.")

    def to_yaml(self, filepath: PathLike | None = None) -> None:
        """Write ``best_k_models``, path: score, to a YAML file (default: ``best_k_models.yaml`` in ``dirpath``)."""
        import fsspec

        lines = [f"{json.dumps(p)}: {yaml_number(float(score))}\n" for p, score in self.best_k_models.items()]
        target = os.fspath(filepath) if filepath else os.path.join(self.dirpath or "", "best_k_models.yaml")
        with fsspec.open(target, "w") as file:
            file.write("".join(lines) or "{}\n")

    # ------------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Paths and scores; the keys but the last two are Lightning's."""
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
            "last_global_step_saved": self._last_global_step_saved,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back paths and scores; of another folder only ``best_model_path``."""
        folder = state_dict.get("dirpath", self.dirpath)
        if self.dirpath in (None, folder):  # None: not settled yet
            self.best_model_score = state_dict.get("best_model_score")
            self.kth_best_model_path = state_dict.get("kth_best_model_path", self.kth_best_model_path)
            self.kth_value = state_dict.get("kth_value", self.kth_value)
            self.best_k_models = dict(state_dict.get("best_k_models", self.best_k_models))
            self.last_model_path = state_dict.get("last_model_path", self.last_model_path)
            self._pending = state_dict.get("pending", False)
            self._last_global_step_saved = state_dict.get("last_global_step_saved", 0)
            self._restored = True
        else:
            rank_zero_warn(
                f"The checkpoint was written for the folder {folder!r}, this run writes to {self.dirpath!r}: the "
                "ranking starts anew, and only `best_model_path` is taken over."
            )
        self.best_model_path = state_dict.get("best_model_path", self.best_model_path)
