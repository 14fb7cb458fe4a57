"""Progress bars: the base users subclass, and the common clockwork of the ones that come along.

Counting is one assignment and one look at the clock per batch. Everything that costs (metrics brought to the host,
text, terminal) happens when a redraw is due, and takes at most a tenth of the time.
"""

from __future__ import annotations

import builtins
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any

from treadle.callbacks.callback import Callback
from treadle.callbacks.progress.display import Bar, Display, Stage
from treadle_fabric.errors import MisconfigurationException

if TYPE_CHECKING:
    from treadle.contracts import LightningModule, Trainer

__all__ = ["ProgressBar", "TimedProgressBar"]

_SHORT = 1.0  # seconds: what takes less is not worth a redraw out of turn
_STALE = 1.0  # seconds after which refresh_rate no longer holds a redraw back: slow batches must not look like a hang
_LONGEST = 5.0  # seconds: the longest that an expensive redraw puts off the next


class ProgressBar(Callback):
    r"""Base of every progress bar: descriptions, totals and metrics. It draws nothing itself.

    For a bar of your own, subclass and override the hooks; :meth:`setup` disables the bar on ranks other than 0.

    Example::

        class Dots(ProgressBar):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                if self.is_enabled:
                    print(f"{batch_idx + 1}/{self.total_train_batches}", end="\r")
    """

    def __init__(self) -> None:
        self._trainer: Trainer | None = None
        self._eval_dataloader_idx: int | None = None
        self._enabled = True
        self._refresh_rate = 1
        self._display: Display | None = None

    @property
    def trainer(self) -> Trainer:
        """The trainer of the current run."""
        if self._trainer is None:
            raise MisconfigurationException(
                f"{type(self).__name__}.trainer is only there during a run: pass the bar to Trainer(callbacks=[...])."
            )
        return self._trainer

    @property
    def is_enabled(self) -> bool:
        """Whether the bar draws on this rank."""
        return self._enabled and self._refresh_rate > 0

    @property
    def refresh_rate(self) -> int:
        """Batches that lie between two redraws at least; 0 for no bar."""
        return self._refresh_rate

    @property
    def is_disabled(self) -> bool:
        """The opposite of :attr:`is_enabled`."""
        return not self.is_enabled

    @property
    def sanity_check_description(self) -> str:
        """The label of the sanity check."""
        return "Sanity Checking"

    @property
    def train_description(self) -> str:
        """The label of training, before the epoch is known."""
        return "Training"

    @property
    def validation_description(self) -> str:
        """The label of validation."""
        return "Validation"

    @property
    def test_description(self) -> str:
        """The label of testing."""
        return "Testing"

    @property
    def predict_description(self) -> str:
        """The label of prediction."""
        return "Predicting"

    @property
    def total_train_batches(self) -> int | float:
        """Batches of a training epoch; ``inf`` when the loader has no length."""
        batches: int | float = self.trainer.num_training_batches
        return batches

    @property
    def total_val_batches(self) -> int | float:
        """Batches of one validation over all its loaders; 0 in an epoch without validation, ``inf`` when unknown."""
        trainer = self.trainer
        if trainer.state.fn == "fit":
            every = trainer.check_val_every_n_epoch
            if not trainer.enable_validation or (every is not None and (trainer.current_epoch + 1) % every):
                return 0
        batches: int | float = sum(trainer.num_val_batches)
        return batches

    @property
    def total_val_batches_current_dataloader(self) -> int | float:
        """Batches of the validation (or sanity check) loader that runs now."""
        trainer = self.trainer
        return self._of_current_loader(
            trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        )

    @property
    def total_test_batches_current_dataloader(self) -> int | float:
        """Batches of the test loader that runs now."""
        return self._of_current_loader(self.trainer.num_test_batches)

    @property
    def total_predict_batches_current_dataloader(self) -> int | float:
        """Batches of the prediction loader that runs now."""
        return self._of_current_loader(self.trainer.num_predict_batches)

    def _of_current_loader(self, batches: Sequence[int | float]) -> int | float:
        idx = self._eval_dataloader_idx or 0
        return batches[idx] if idx < len(batches) else math.inf

    def has_dataloader_changed(self, dataloader_idx: int) -> bool:
        """Whether this index differs from that of the previous call."""
        old, self._eval_dataloader_idx = self._eval_dataloader_idx, dataloader_idx
        return old != dataloader_idx

    def reset_dataloader_idx_tracker(self) -> None:
        """Forget the index that :meth:`has_dataloader_changed` saw last."""
        self._eval_dataloader_idx = None

    def disable(self) -> None:
        """Stop drawing; called on every rank but 0."""
        self._enabled = False

    def enable(self) -> None:
        """Draw again after :meth:`disable`."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar; takes what the built-in ``print`` takes."""
        if self._display is None:
            builtins.print(*args, **kwargs)
        else:
            self._display.print(*args, **kwargs)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember the trainer; be silent on every rank but 0."""
        self._trainer = trainer
        if not trainer.is_global_zero:
            self.disable()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What stands beside the bar: everything logged with ``prog_bar=True``, and the logger's version as ``v_num``.

        Override it to add, change or remove entries. It is called only when the bar redraws.
        """
        version = next((v for v in (logger.version for logger in trainer.loggers) if v not in ("", None)), None)
        metrics: dict[str, Any] = dict(trainer.progress_bar_metrics)
        if version is not None:
            metrics.setdefault("v_num", _short_version(version))
        return metrics


def _short_version(version: int | str) -> int | str:
    return version if isinstance(version, int) else version.removeprefix("version_")[-8:]


class TimedProgressBar(ProgressBar, ABC):
    """A bar that redraws by time; a leaf says where it is drawn.

    Args:
        refresh_rate: redraw not more often than every that many batches (but once a second when they are slow); 0
            turns the bar off.
        leave: keep the finished bar of every training epoch; otherwise one bar serves all epochs.
    """

    def __init__(self, refresh_rate: int, leave: bool) -> None:
        super().__init__()
        if refresh_rate < 0:
            raise MisconfigurationException(
                f"refresh_rate={refresh_rate}: a number of batches, 1 or more, or 0 for no bar at all."
            )
        self._refresh_rate = refresh_rate
        self._leave = leave
        self._bars: list[Bar] = []  # the innermost last
        self._bar = Bar("train", "", None)  # the one that counts now, so that the batch hooks need not ask
        self._due = math.inf
        self._began = 0.0
        self._loader_idx = 0
        self._places: dict[str, float] = {}  # of the metrics
        self._took: dict[Stage, float] = {}  # seconds the last bar of a stage took

    @abstractmethod
    def _make_display(self) -> Display:
        """The display of a run; called on the first stage, where the output stream is known."""

    # -- the hooks ------------------------------------------------------------------------------------------------

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the terminal back."""
        self._shutdown()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the terminal back before the traceback is printed."""
        self._shutdown()

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the sanity check."""
        self._push_loaders("sanity", temporary=True)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take it away."""
        self._pop()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the epoch, where the previous one was unless that is to stay."""
        if self._bars:
            self._complete(close=self._leave)
            self._bars.pop()
        last = trainer.max_epochs - 1 if trainer.max_epochs is not None and trainer.max_epochs > 0 else None
        title = f"Epoch {trainer.current_epoch}" + ("" if last is None else f"/{last}")
        done = trainer.fit_progress.batch
        self._push(Bar("train", title, _finite(self.total_train_batches), initial=done))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count."""
        self._bar.n = batch_idx + 1
        if monotonic() >= self._due:
            self._redraw()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the full count while whatever ends the epoch takes its time."""
        self._settle()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the last epoch as it ended."""
        self._pop()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show validation, below the epoch when it is part of one."""
        if trainer.sanity_checking:
            return
        self._settle()
        self._push_loaders("validation", temporary=trainer.state.fn == "fit")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count."""
        self._count(batch_idx, dataloader_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Back to the epoch, with what validation logged."""
        if trainer.sanity_checking:
            return
        self._pop()
        self._settle(changed=True)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show testing."""
        self._push_loaders("test")

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count."""
        self._count(batch_idx, dataloader_idx)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave it as it ended."""
        self._pop()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show prediction."""
        self._push_loaders("predict")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count."""
        self._count(batch_idx, dataloader_idx)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave it as it ended."""
        self._pop()

    # -- the clockwork --------------------------------------------------------------------------------------------

    def _count(self, batch_idx: int, dataloader_idx: int) -> None:
        if dataloader_idx != self._loader_idx:
            self._next_loader(dataloader_idx)
        self._bar.n = batch_idx + 1
        if monotonic() >= self._due:
            self._redraw()

    def _push_loaders(self, stage: Stage, temporary: bool = False) -> None:
        self.reset_dataloader_idx_tracker()
        self._loader_idx = 0
        self._push(self._loader_bar(stage, temporary))

    def _next_loader(self, dataloader_idx: int) -> None:
        self._loader_idx = self._eval_dataloader_idx = dataloader_idx
        if self._bars:
            old = self._bars[-1]
            self._complete(close=False)
            self._bar = self._bars[-1] = self._loader_bar(old.stage, old.temporary)
            self._bar.skip(1)  # noticed when that batch was done

    def _loader_bar(self, stage: Stage, temporary: bool) -> Bar:
        trainer, idx = self.trainer, self._loader_idx
        match stage:
            case "sanity":
                sizes, title = trainer.num_sanity_val_batches, self.sanity_check_description
            case "validation":
                sizes, title = trainer.num_val_batches, self.validation_description
            case "test":
                sizes, title = trainer.num_test_batches, self.test_description
            case _:
                sizes, title = trainer.num_predict_batches, self.predict_description
        title += f" DataLoader {idx}" if len(sizes) > 1 else ""
        return Bar(stage, title, _finite(sizes[idx]) if idx < len(sizes) else None, temporary=temporary)

    def _push(self, bar: Bar) -> None:
        if not self.is_enabled:
            return
        if self._display is None:
            self._display = self._make_display()
            self._began, self._took = monotonic(), {}
            self._due = self._began + self._pause()
        self._bars.append(bar)
        self._bar = bar
        if self._display.records:
            return
        if self._took.get(bar.stage, math.inf) >= _SHORT:  # what is over at once need not flicker
            self._show(bar)
        elif bar.temporary:
            self._due = monotonic() + self._pause()

    def _pop(self) -> None:
        if not self._bars:
            return
        self._complete(close=True)
        self._bars.pop()
        if self._bars:
            self._bar = self._bars[-1]

    def _complete(self, close: bool) -> None:
        """The innermost bar is done."""
        bar, display = self._bars[-1], self._display
        if display is None:
            return
        self._took[bar.stage] = bar.elapsed
        if len(self._bars) > 1:
            self._bars[-2].pause(bar.elapsed)
        if not bar.temporary and (close or display.records) and (bar.n or bar.total):
            self._show(bar)
        if close:
            display.close(bar.stage, keep=not bar.temporary)

    def _settle(self, changed: bool = False) -> None:
        """Show the innermost bar as it is before something else takes over."""
        display = self._display
        if display is None or display.records or not self._bars:
            return
        bar = self._bars[-1]
        if (changed or bar.drawn_n != bar.n) and bar.elapsed >= _SHORT:
            self._show(bar)

    def _redraw(self) -> None:
        bar = self._bar
        if bar.n - bar.drawn_n >= self._refresh_rate or bar.drawn_n < 1 or monotonic() >= bar.drawn_at + _STALE:
            self._show(bar)

    def _show(self, bar: Bar, metrics: bool = True) -> None:
        display, trainer = self._display, self.trainer
        if display is None or not self.is_enabled:
            return
        inner = len(self._bars) > 1 and bar is self._bars[-1]
        if inner and bar.drawn_n < 0 and self._bars[-2].drawn_n != self._bars[-2].n:
            self._show(self._bars[-2])  # the epoch stands still from now on, so it shows its count
        began = monotonic()
        bar.measure(began)
        wanted = metrics and bar.stage == "train"
        display.draw(bar, self._ordered(self.get_metrics(trainer, trainer.lightning_module)) if wanted else None)
        now = bar.drawn_at = monotonic()
        bar.drawn_n = bar.n
        # slow terminals and busy devices get fewer redraws; within reason, the process may have been suspended
        self._due = now + max(self._pause(), min(9 * (now - began), _LONGEST))

    def _ordered(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """In the order in which they were first seen, so that none changes its place; the version last."""
        for name in metrics:
            self._places.setdefault(name, math.inf if name == "v_num" else len(self._places))
        return dict(sorted(metrics.items(), key=lambda item: self._places[item[0]]))

    def _pause(self) -> float:
        return 0.0 if self._display is None else self._display.interval(monotonic() - self._began)

    def _shutdown(self) -> None:
        """Close everything; safe at any moment, and so without metrics, which a broken device could not give."""
        if self._display is None:
            return
        while self._bars:
            bar = self._bars.pop()
            if not bar.temporary and bar.drawn_n != bar.n:
                self._show(bar, metrics=False)
            self._display.close(bar.stage, keep=not bar.temporary)
        self._display.shutdown()
        self._display, self._due = None, math.inf


def _finite(batches: int | float) -> int | None:
    return int(batches) if math.isfinite(batches) else None
