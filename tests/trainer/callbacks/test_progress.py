"""What a person sees while a real Trainer runs: in a terminal (a pty and what it would show), and in a log file.

Tests of ``treadle.callbacks.progress.progress_bar``, ``treadle.callbacks.progress.display``,
``treadle.callbacks.progress.plain_progress``, ``treadle.callbacks.progress.rich_progress``,
``treadle.callbacks.progress.tqdm_progress``.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.callbacks.terminal import COLUMNS, Terminal, in_terminal
from torch.utils.data import DataLoader, IterableDataset

import treadle as tr
from treadle.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from treadle.callbacks.progress import PlainProgressBar, RichProgressBarTheme, default_progress_bar
from treadle.callbacks.progress.display import Bar


class Model(tr.LightningModule):
    def __init__(self, seconds: float = 0.0, at_step: Callable[[Model, str, int], None] | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.seconds, self.at_step = seconds, at_step

    def step(self, stage: str, batch: Any, batch_idx: int) -> torch.Tensor:
        time.sleep(self.seconds)
        if self.at_step is not None:
            self.at_step(self, stage, batch_idx)
        return self.layer(batch).pow(2).mean()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.step("train", batch, batch_idx)
        self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        self.log("idx", float(batch_idx), prog_bar=True)
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.step("test", batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.step("predict", batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


class Validating(Model):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val", self.step("validation", batch, batch_idx), prog_bar=True, add_dataloader_idx=True)


class Endless(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.ones(9, 4))


def loader(batches: int = 10) -> DataLoader[Any]:
    return DataLoader(torch.randn(batches, 4), batch_size=1)  # type: ignore[arg-type]


def trainer(bar: ProgressBar | None = None, **arguments: Any) -> tr.Trainer:
    arguments = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, **arguments}
    callbacks = [bar] if bar else None
    return tr.Trainer(accelerator="cpu", devices=1, callbacks=callbacks, enable_model_summary=False, **arguments)


BARS = [TQDMProgressBar, RichProgressBar]
both = pytest.mark.parametrize("make", BARS)


def matching(lines: list[str], pattern: str) -> list[str]:
    return [line for line in lines if re.search(pattern, line)]


# ---------------------------------------------------------------------------------------------------- in a terminal


@both
@in_terminal
def test_a_fit_leaves_one_bar(make: Any, terminal: Terminal) -> None:
    trainer(make()).fit(Validating(0.01), loader(), loader())
    bars = matching(terminal.lines(), "Epoch|Valid|Sanity")
    assert len(bars) == 1
    assert re.search(r"Epoch 1/1.*10/10.*it/s.*loss_(step|epoch)=", bars[0])  # the one that was drawn first
    assert all(len(line) <= COLUMNS for line in terminal.lines())
    assert terminal.text().endswith(("\n", "\x1b[?25h"))
    assert not terminal.cursor_hidden()


@both
@in_terminal
def test_validation_is_below_the_epoch_while_it_runs(make: Any, terminal: Terminal) -> None:
    seen: list[list[str]] = []

    def look(model: Model, stage: str, batch_idx: int) -> None:
        if stage == "validation" and batch_idx == 15 and not model.trainer.sanity_checking:
            seen.append(terminal.lines())

    fitting = trainer(make(refresh_rate=1), max_epochs=1, val_check_interval=5)
    fitting.fit(Validating(0.02, look), loader(), [loader(20), loader(20)])
    assert len(seen) == 4
    for lines, done, title in zip(seen, (5, 5, 10, 10), (0, 1, 0, 1)):
        shown = matching(lines, "Epoch|Validation")
        assert len(shown) == 2
        assert re.search(rf"Epoch 0/0.*\b{done}/10", shown[0])
        assert re.search(rf"Validation DataLoader {title}.*\b[1-9]\d?/20", shown[1])
    assert not matching(terminal.lines(), "Validation")


@both
@in_terminal
def test_the_speed_is_that_of_training(make: Any, terminal: Terminal) -> None:
    def slow(model: Model, stage: str, batch_idx: int) -> None:
        time.sleep(0.2 if stage == "validation" else 0.0)

    trainer(make(refresh_rate=1), max_epochs=1, val_check_interval=5, num_sanity_val_steps=0).fit(
        Validating(0.02, slow), loader(20), loader(2)
    )
    (line,) = matching(terminal.lines(), "Epoch")
    speed = re.search(r"([\d.]+)it/s", line)
    assert speed is not None and float(speed[1]) > 15  # with validation counted in it would be 9


@both
@in_terminal
def test_leave_keeps_every_epoch(make: Any, terminal: Terminal) -> None:
    trainer(make(leave=True), max_epochs=3).fit(Validating(0.001), loader(), loader())
    shown = matching(terminal.lines(), "Epoch")
    assert [line[: len("Epoch 0/2")] for line in shown] == ["Epoch 0/2", "Epoch 1/2", "Epoch 2/2"]
    assert all("10/10" in line for line in shown)


@both
@in_terminal
def test_unknown_length(make: Any, terminal: Terminal) -> None:
    trainer(make(), max_epochs=1).fit(Validating(0.01), DataLoader(Endless()), DataLoader(Endless()))
    (line,) = matching(terminal.lines(), "Epoch")
    assert re.search(r"Epoch 0/0:? .*\b9(it|/--) ", line)


@both
@in_terminal
def test_evaluation_and_prediction_leave_a_full_bar(make: Any, terminal: Terminal) -> None:
    model, testing = Validating(), trainer(make())
    testing.validate(model, loader(7), verbose=False)
    testing.test(model, loader(8), verbose=False)
    testing.predict(model, loader(9))
    lines = terminal.lines()
    for title, batches in (("Validation", 7), ("Testing", 8), ("Predicting", 9)):
        (line,) = matching(lines, title)
        assert f"{batches}/{batches}" in line


@both
@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
@in_terminal
def test_an_error_gives_the_terminal_back(make: Any, error: BaseException, terminal: Terminal) -> None:
    stdout = sys.stdout

    def fail(model: Model, stage: str, batch_idx: int) -> None:
        if stage == "validation" and batch_idx == 8 and not model.trainer.sanity_checking:
            raise error

    with pytest.raises((RuntimeError, SystemExit)):
        trainer(make(refresh_rate=1)).fit(Validating(0.02, fail), loader(), loader())
    print("after")
    lines = terminal.lines()
    assert sys.stdout is stdout
    assert not terminal.cursor_hidden()
    assert len(matching(lines, "Epoch")) == 1
    assert not matching(lines, "Validation")
    assert lines[-1] == "after"


@both
@in_terminal
def test_whatever_is_printed_stands_above_the_bar(make: Any, terminal: Terminal) -> None:
    def talk(model: Model, stage: str, batch_idx: int) -> None:
        if stage == "train" and batch_idx == 3:
            model.print("from self.print", "[b]kept[/b]", sep="-")
            print("from print")
            print("to stderr", file=sys.stderr)
            sys.stdout.write("in two ")
        if stage == "train" and batch_idx == 6:
            sys.stdout.write("pieces\n")

    trainer(make(refresh_rate=1), max_epochs=1).fit(Model(0.03, talk), loader())
    lines = [line for line in terminal.lines() if line]
    printed = [
        line for line in lines if line in ("from self.print-[b]kept[/b]", "from print", "to stderr", "in two pieces")
    ]
    assert len(printed) == 4
    (bar,) = matching(lines, "Epoch")
    assert lines.index(bar) > max(map(lines.index, printed))


@in_terminal
def test_a_bar_of_the_users_own_is_left_alone(terminal: Terminal) -> None:
    from tqdm import tqdm

    def count(model: Model, stage: str, batch_idx: int) -> None:
        if stage == "train" and batch_idx == 5:
            for _ in tqdm(range(3), desc="own", file=terminal.stream, leave=False, mininterval=0):
                pass

    trainer(TQDMProgressBar(), max_epochs=1).fit(Model(0.02, count), loader())
    assert "own" in terminal.text()
    assert len(matching(terminal.lines(), "Epoch|own")) == 1


@in_terminal
def test_numbers_are_whole_where_room_is_scarce(terminal: Terminal) -> None:
    class Many(TQDMProgressBar):
        def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
            return {"first": 0.25, "second_metric": 1.5, "third_metric": 2.5, "fourth": 3.5}

    trainer(Many(), max_epochs=1).fit(Model(0.01), loader())
    (line,) = matching(terminal.lines(), "Epoch")
    assert line.endswith(("first=0.250, …]", "first=0.250, second_metric=1.50, …]"))


@in_terminal
def test_tqdm_bars_can_be_replaced(terminal: Terminal) -> None:
    class Mine(TQDMProgressBar):
        def init_train_tqdm(self) -> Any:
            bar = super().init_train_tqdm()
            bar.bar_format = "mine {n_fmt} of {total_fmt} {postfix}"
            return bar

        def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
            items = super().get_metrics(trainer, pl_module)
            assert next(iter(items)) == "v_num", "bars of others show them in this order"
            items.pop("v_num", None)
            return {**items, "extra": "yes"}

    trainer(Mine(), max_epochs=1, logger=True).fit(Model(0.01), loader())
    (line,) = matching(terminal.lines(), "mine")
    assert line.startswith("mine 10 of 10")
    assert "extra=yes" in line and "v_num" not in line


@in_terminal
def test_process_position_leaves_lines_free(terminal: Terminal) -> None:
    seen: list[list[str]] = []

    def look(model: Model, stage: str, batch_idx: int) -> None:
        if batch_idx == 9:
            seen.append(terminal.lines())

    trainer(TQDMProgressBar(process_position=1), max_epochs=1).fit(Model(0.03, look), loader())
    (line,) = matching(seen[0], "Epoch")
    assert seen[0].index(line) == 2


@in_terminal
def test_rich_theme_and_columns(terminal: Terminal) -> None:
    class Mine(RichProgressBar):
        def configure_columns(self, trainer: Any) -> list[Any]:
            from rich.progress import TextColumn

            return [TextColumn("mine"), *super().configure_columns(trainer)]

    theme = RichProgressBarTheme(metrics_text_delimiter=" ; ", metrics_format=".1e")
    trainer(Mine(theme=theme), max_epochs=1).fit(Model(0.01), loader())
    (line,) = matching(terminal.lines(), "Epoch")
    assert line.startswith("mine Epoch 0/0")
    text = " ".join(terminal.lines())
    assert "idx=9.0e+00" in text and text.count(" ;") == 2  # which is the last depends on when the bar was drawn


# ---------------------------------------------------------------------------------------------------- in a log file


@pytest.mark.parametrize("make", [*BARS, PlainProgressBar])
def test_a_log_file_gets_one_plain_line_an_epoch(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model, fitting = Validating(), trainer(make(), max_epochs=3, logger=True)
    fitting.fit(model, loader(), loader())
    loss = float(fitting.callback_metrics["loss_epoch"])
    fitting.test(model, [loader(), loader(5)], verbose=False)
    out = capsys.readouterr().out
    assert "\r" not in out and "\x1b" not in out
    lines = matching(out.splitlines(), r"\d/\d+ \[")
    assert [line.split(":")[0] for line in lines] == [
        *(f"Epoch {e}/2" for e in range(3)), "Testing DataLoader 0", "Testing DataLoader 1",
    ]  # fmt: skip
    values = dict(re.findall(r"(\w+)=([^,\]]+)", lines[2]))
    assert float(values["loss_epoch"]) == pytest.approx(loss, rel=0.01)
    assert {"loss_step", "idx", "val", "v_num"} <= set(values)
    assert "100% 10/10 [" in lines[0] and "100% 5/5 [" in lines[-1]


def test_a_long_epoch_gets_lines_in_between(capsys: pytest.CaptureFixture[str]) -> None:
    trainer(PlainProgressBar(), max_epochs=1).fit(Model(0.25), loader(10))
    lines = matching(capsys.readouterr().out.splitlines(), "Epoch")
    assert len(lines) == 2
    assert re.match(r"Epoch 0/0:  \d0% \d/10 \[00:0\d<00:0\d, \d\.\d\dit/s, loss_step=", lines[0])


def test_an_error_shows_how_far_it_came(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(model: Model, stage: str, batch_idx: int) -> None:
        if batch_idx == 6:
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        trainer(PlainProgressBar(), max_epochs=1).fit(Model(0.0, fail), loader())
    assert "Epoch 0/0:  60% 6/10 [" in capsys.readouterr().out


def test_resuming_within_an_epoch_counts_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def save(model: Model, stage: str, batch_idx: int) -> None:
        if batch_idx == 6:
            model.trainer.save_checkpoint(tmp_path / "middle.ckpt")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        trainer(PlainProgressBar(), max_epochs=1).fit(Model(0.0, save), loader())
    starts: list[int] = []

    class Looking(PlainProgressBar):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_epoch_start(trainer, pl_module)
            starts.append(self._bar.n)

    capsys.readouterr()
    trainer(Looking(), max_epochs=1).fit(Model(), loader(), ckpt_path=tmp_path / "middle.ckpt")
    assert starts == [6]
    assert "100% 10/10 [" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- how often


@both
@in_terminal
def test_metrics_are_fetched_only_for_a_redraw(make: Any, terminal: Terminal) -> None:
    fetched: list[float] = []

    class Counting(make):  # type: ignore[misc]
        def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
            fetched.append(time.monotonic())
            return dict(super().get_metrics(trainer, pl_module))

    trainer(Counting(refresh_rate=1), max_epochs=1).fit(Model(0.002), loader(300))
    seconds = fetched[-1] - fetched[0]
    assert 3 <= len(fetched) <= seconds / 0.1 + 4
    assert min(b - a for a, b in pairwise(fetched[:-2])) > 0.09


@in_terminal
def test_refresh_rate_spaces_redraws(terminal: Terminal) -> None:
    drawn: list[int] = []

    class Counting(TQDMProgressBar):
        def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
            drawn.append(self.train_progress_bar.n)
            return {}

    trainer(Counting(refresh_rate=25), max_epochs=1).fit(Model(0.006), loader(100))
    # noted before each redraw: the count that was on display until then
    assert all(b - a >= 25 for a, b in pairwise(drawn[2:-1]))
    assert len(drawn) <= 7


@both
@in_terminal
def test_slow_batches_do_not_look_like_a_hang(make: Any, terminal: Terminal) -> None:
    seen: list[str] = []

    def look(model: Model, stage: str, batch_idx: int) -> None:
        if batch_idx == 5:
            seen.extend(matching(terminal.lines(), "Epoch"))

    trainer(make(refresh_rate=100), max_epochs=1).fit(Model(0.3, look), loader(6))
    assert re.search(r"\b[345]/6", seen[0])


@pytest.mark.alone
@pytest.mark.parametrize("make", [*BARS, PlainProgressBar])
@in_terminal
def test_a_batch_costs_a_microsecond(make: Any, terminal: Terminal) -> None:
    costs: list[float] = []

    class Timing(tr.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            hook = trainer.progress_bar_callback.on_train_batch_end
            for _ in range(5):
                begin = time.perf_counter()
                for _ in range(20_000):
                    hook(trainer, pl_module, None, None, 0)
                costs.append((time.perf_counter() - begin) / 20_000)

    fitting = trainer(make(), max_epochs=1)
    fitting.callbacks.append(Timing())
    fitting.fit(Model(), loader(1))
    assert min(costs) < 1e-6


# ---------------------------------------------------------------------------------------------------- who draws


def test_the_default_bar() -> None:
    assert isinstance(trainer().progress_bar_callback, TQDMProgressBar)
    assert isinstance(default_progress_bar(), TQDMProgressBar)
    assert trainer(enable_progress_bar=False).progress_bar_callback is None


@both
@in_terminal
def test_a_bar_that_is_off(make: Any, terminal: Terminal) -> None:
    bar = make(refresh_rate=0)
    assert bar.is_disabled and not bar.is_enabled and bar.refresh_rate == 0
    trainer(bar, max_epochs=1).fit(Validating(), loader(), loader())
    assert not matching(terminal.lines(), "Epoch|Sanity|Validation")


@pytest.mark.parametrize("make", [*BARS, PlainProgressBar])
def test_a_negative_refresh_rate_is_refused(make: Any) -> None:
    with pytest.raises(tr.MisconfigurationException, match="refresh_rate=-1"):
        make(refresh_rate=-1)


def test_a_bar_of_the_users_own_class(capsys: pytest.CaptureFixture[str]) -> None:
    class Dots(ProgressBar):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            print(f"{batch_idx + 1}/{self.total_train_batches} of {self.total_val_batches}")

        def on_validation_batch_start(
            self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
        ) -> None:
            if self.has_dataloader_changed(dataloader_idx):
                print("loader", dataloader_idx, "of", self.total_val_batches_current_dataloader)

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            self.reset_dataloader_idx_tracker()

    bar = Dots()
    with pytest.raises(tr.MisconfigurationException, match="only there during a run"):
        bar.total_train_batches
    arguments = {"check_val_every_n_epoch": 2, "num_sanity_val_steps": 1}
    trainer(bar, **arguments).fit(Validating(), loader(2), [loader(3), loader(4)])
    assert capsys.readouterr().out.splitlines() == [
        "loader 0 of 1", "loader 1 of 1", "1/2 of 0", "2/2 of 0", "1/2 of 7", "2/2 of 7",
        "loader 0 of 3", "loader 1 of 4",
    ]  # fmt: skip


def test_without_tqdm_and_rich(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import sys\n"
        "sys.modules['tqdm'] = sys.modules['rich'] = None\n"
        "import treadle as tr\n"
        "from treadle.callbacks import TQDMProgressBar, RichProgressBar, RichModelSummary\n"
        "from treadle.callbacks.progress import default_progress_bar\n"
        "for make in (TQDMProgressBar, RichProgressBar, RichModelSummary):\n"
        "    try:\n"
        "        make()\n"
        "    except tr.MisconfigurationException as error:\n"
        "        print(error)\n"
        "print(type(default_progress_bar()).__name__, type(default_progress_bar()).__name__)\n"
    )
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    *refusals, kinds = done.stdout.splitlines()
    assert [r.split(":")[0] for r in refusals] == [
        f"{name} needs the package {package}, which is not installed"
        for name, package in (("TQDMProgressBar", "tqdm"), ("RichProgressBar", "rich"), ("RichModelSummary", "rich"))
    ]
    assert kinds == "PlainProgressBar PlainProgressBar"
    assert done.stderr.count("pip install treadle[trainer]") == 1


RANKS = """
import torch, treadle as tr
from torch.utils.data import DataLoader

class Model(tr.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
    def training_step(self, batch, batch_idx):
        return self.layer(batch).mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)

trainer = tr.Trainer(
    accelerator="cpu", devices=2, strategy="ddp_fork", max_epochs=1, logger=False, enable_checkpointing=False
)
trainer.fit(Model(), DataLoader(torch.randn(8, 4)))
"""


def test_only_one_rank_draws(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(RANKS)
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, cwd=tmp_path, timeout=100)
    assert done.returncode == 0, done.stderr
    assert len(matching(done.stdout.splitlines(), "Epoch 0/0: 100% 4/4 ")) == 1
    assert done.stderr.count("Trainable params") == 1


# ---------------------------------------------------------------------------------------------------- the arithmetic


def test_speed_and_time_to_go() -> None:
    bar = Bar("train", "Epoch 0", total=100, started=0.0)
    assert bar.rate is None and bar.remaining is None
    bar.n = 20
    bar.measure(2.0)
    assert bar.rate == pytest.approx(10)
    bar.pause(50.0)  # validation
    bar.n = 40
    bar.measure(54.0)
    assert bar.rate == pytest.approx(10) and bar.remaining == pytest.approx(6)
    bar.n = 60
    bar.measure(94.0)  # it slows down, and the speed follows
    assert bar.rate is not None and 0.5 < bar.rate < 0.7
    bar.n = 101
    assert bar.known_total is None and bar.remaining is None
    assert Bar("train", "", total=None).remaining is None and math.isinf(Bar("train", "", None).drawn_at)
