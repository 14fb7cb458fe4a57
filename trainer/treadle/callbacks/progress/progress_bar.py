"""Progress bars: the base that users subclass, and what the bars of this package have in common.

Counting is one assignment and one look at the clock per batch. What costs more (to bring metrics to the host, to make
text, to write to the terminal) happens when a redraw is due, and takes at most a tenth of the time.
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
from treadle_fabric import MisconfigurationException, check_integer

if TYPE_CHECKING:
    from treadle.contracts import LightningModule, Trainer

__all__ = ["ProgressBar", "TimedProgressBar"]

_SHORT = 1.0  # seconds: a stage that takes less is not worth a redraw of its own
_STALE = 1.0  # seconds after which refresh_rate no longer holds a redraw back: slow batches must not look like a hang
_LONGEST = 5.0  # seconds: the longest time by which an expensive redraw delays the next


class ProgressBar(Callback):
    r"""Base of every progress bar: descriptions, totals and metrics. The base draws nothing itself.

    For a bar of your own, subclass it and override the hooks; :meth:`setup` disables the bar on ranks other than 0.

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

    def __getstate__(self) -> dict[str, Any]:
        # a copy of the bar is not a copy of its run; the place on the terminal belongs to this process
        return {**self.__dict__, "_trainer": None, "_display": None}

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
        """The least number of batches between two redraws; 0 for no bar."""
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
        """The label of training, without the number of the epoch."""
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
        """The batches of a training epoch; ``inf`` when the loader has no length."""
        batches: int | float = self.trainer.num_training_batches
        return batches

    @property
    def total_val_batches(self) -> int | float:
        """The batches of one validation, of all loaders; 0 in an epoch without validation, ``inf`` when unknown."""
        trainer = self.trainer
        if trainer.state.fn == "fit":
            every = trainer.check_val_every_n_epoch
            if not trainer.enable_validation or (every is not None and (trainer.current_epoch + 1) % every):
                return 0
        batches: int | float = sum(trainer.num_val_batches)
        return batches

    @property
    def total_val_batches_current_dataloader(self) -> int | float:
        """The batches of the validation (or sanity check) loader that runs now."""
        trainer = self.trainer
        return self._of_current_loader(
            trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        )

    @property
    def total_test_batches_current_dataloader(self) -> int | float:
        """The batches of the test loader that runs now."""
        return self._of_current_loader(self.trainer.num_test_batches)

    @property
    def total_predict_batches_current_dataloader(self) -> int | float:
        """The batches of the prediction loader that runs now."""
        return self._of_current_loader(self.trainer.num_predict_batches)

    def _of_current_loader(self, batches: Sequence[int | float]) -> int | float:
        idx = self._eval_dataloader_idx or 0
        return batches[idx] if idx < len(batches) else math.inf

    def has_dataloader_changed(self, dataloader_idx: int) -> bool:
        """Tell whether this index differs from the index of the previous call."""
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
        """Print above the bar, with the arguments of the built-in ``print``."""
        if self._display is None:
            builtins.print(*args, **kwargs)
        else:
            self._display.print(*args, **kwargs)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the trainer, and disable the bar on every rank but 0."""
        self._trainer = trainer
        if not trainer.is_global_zero:
            self.disable()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return what is shown beside the bar: the logger's version, and what was logged with ``prog_bar=True``.

        The name of the version is ``v_num``. Override this method to add, change or remove entries. It is called only
        when the bar redraws.
        """
        version = next((v for v in (logger.version for logger in trainer.loggers) if v not in ("", None)), None)
        shown = {} if version is None else {"v_num": _short_version(version)}
        return {**shown, **trainer.progress_bar_metrics}


def _short_version(version: int | str) -> int | str:
    return version if isinstance(version, int) else version.removeprefix("version_")[-8:]


class TimedProgressBar(ProgressBar, ABC):
    """A bar that redraws by time; a subclass says where the bar is drawn.

    Args:
        refresh_rate: redraw at most once in that many batches (but once a second when batches are slow); 0 turns the
            bar off.
        leave: keep the finished bar of every training epoch. Otherwise one bar serves all epochs.
    """

    def __init__(self, refresh_rate: int, leave: bool) -> None:
        super().__init__()
        self._refresh_rate = check_integer("refresh_rate", refresh_rate, minimum=0, meaning="in batches; 0 for no bar")
        self._leave = leave
        self._bars: list[Bar] = []  # the innermost last
        self._last: dict[Stage, Bar] = {}  # the last of each stage
        self._bar = Bar("train", "", None)  # the bar that counts now, so that the batch hooks need not look for it
        self._due = math.inf
        self._began = 0.0
        self._loader_idx = 0
        self._places: dict[str, float] = {}  # where each metric is shown
        self._took: dict[Stage, float] = {}  # the seconds that the last bar of a stage took

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_bars": [], "_last": {}, "_due": math.inf}

    @abstractmethod
    def _make_display(self) -> Display:
        """Return the display of a run; called at the first stage, when the output stream is known."""

    # -- the hooks ------------------------------------------------------------------------------------------------

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the terminal as it was before the run."""
        self._shutdown()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was before the run, so that the traceback can be printed."""
        self._shutdown()

    def on_sanity_check_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Show the bar of the sanity check."""
        self._push_loaders("sanity", temporary=True)

    def on_sanity_check_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Take the bar of the sanity check away."""
        self._pop()

    def on_train_epoch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Show the bar of the epoch, in place of the previous bar unless that one is to stay."""
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
        """Count the batch."""
        self._bar.n = batch_idx + 1
        if monotonic() >= self._due:
            self._redraw()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the full count while other code that ends the epoch runs."""
        self._settle()

    def on_train_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Leave the last bar as it is."""
        self._pop()

    on_test_end = on_predict_end = on_train_end

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar of validation, below the bar of the epoch while training."""
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
        """Count the batch."""
        if dataloader_idx != self._loader_idx:
            self._next_loader(dataloader_idx)
        self._bar.n = batch_idx + 1
        if monotonic() >= self._due:
            self._redraw()

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Return to the bar of the epoch, with what validation logged."""
        if trainer.sanity_checking:
            return
        self._pop()
        self._settle(changed=True)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar of testing."""
        self._push_loaders("test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar of prediction."""
        self._push_loaders("predict")

    # -- the clockwork --------------------------------------------------------------------------------------------

    def _push_loaders(self, stage: Stage, temporary: bool = False) -> None:
        self.reset_dataloader_idx_tracker()
        self._loader_idx = 0
        self._push(self._loader_bar(stage, temporary))

    def _next_loader(self, dataloader_idx: int) -> None:
        self._loader_idx = self._eval_dataloader_idx = dataloader_idx
        if self._bars:
            old = self._bars[-1]
            self._complete(close=False)
            self._bar = self._bars[-1] = self._last[old.stage] = self._loader_bar(old.stage, old.temporary)
            self._bar.skip(1)  # the first batch of this loader is done when its end is noticed

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
        self._last[bar.stage] = bar
        if self._display is None:
            self._display = self._make_display()
            self._began, self._took = monotonic(), {}
            self._due = self._began + self._pause()
        self._bars.append(bar)
        self._bar = bar
        if self._display.records:
            return
        if self._took.get(bar.stage, math.inf) >= _SHORT:  # a bar that is over at once would only flicker
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
        """Finish the innermost bar."""
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
        """Show the innermost bar as it is, before another stage begins."""
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
            self._show(self._bars[-2])  # the bar of the epoch does not move from now on, so it shows the full count
        began = monotonic()
        bar.measure(began)
        wanted = metrics and bar.stage == "train"
        display.draw(bar, self._ordered(self.get_metrics(trainer, trainer.lightning_module)) if wanted else None)
        now = bar.drawn_at = monotonic()
        bar.drawn_n = bar.n
        # slow terminals and busy devices get fewer redraws; but the process may only have been suspended, hence a limit
        self._due = now + max(self._pause(), min(9 * (now - began), _LONGEST))

    def _ordered(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Return metrics in the order in which they were first seen, so that none moves; the version comes last."""
        for name in metrics:
            self._places.setdefault(name, math.inf if name == "v_num" else len(self._places))
        return dict(sorted(metrics.items(), key=lambda item: self._places[item[0]]))

    def _pause(self) -> float:
        return 0.0 if self._display is None else self._display.interval(monotonic() - self._began)

    def _shutdown(self) -> None:
        """Close all bars. This is safe at any moment: it reads no metrics, which a broken device could not give."""
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
