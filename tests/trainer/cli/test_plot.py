"""The command `treadle plot`.

Tests of ``treadle.cli.plot``, ``treadle.cli.plotting``.
"""

from __future__ import annotations

import csv
import math
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.models import Net, loader, trainer
from torch.utils.tensorboard import SummaryWriter

from treadle.callbacks import LearningRateMonitor, ModelCheckpoint
from treadle.cli.main import main
from treadle.cli.plotting.panels import LEARNING_RATE, make_panels, smoothed
from treadle.cli.plotting.runs import read_runs
from treadle.cli.plotting.ticks import labels
from treadle_fabric import MisconfigurationException, MissingPackageError, TorchCheckpointIO
from treadle_fabric.loggers import CSVLogger, TensorBoardLogger


def log(folder: str, saved: tuple[int, ...] = (), **columns: dict[int, Any]) -> Path:
    """Write a run: values by step for each metric, and the names of checkpoints."""
    path = Path(folder)
    (path / "checkpoints").mkdir(parents=True)
    for step in saved:
        (path / f"checkpoints/epoch=0-step={step}.ckpt").touch()
    steps = sorted({step for values in columns.values() for step in values})
    with (path / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *columns])
        writer.writerows([step, *(values.get(step, "") for values in columns.values())] for step in steps)
    return path


def size_of(png: str) -> tuple[int, int]:
    content = Path(png).read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def fitted(logger: Any) -> None:
    saver = ModelCheckpoint(every_n_train_steps=3, save_top_k=-1)
    callbacks = [saver, LearningRateMonitor(logging_interval="step")]
    train = trainer(
        Path(), logger=logger, enable_checkpointing=True, callbacks=callbacks, max_epochs=2, log_every_n_steps=1
    )
    train.fit(Net(), loader(), loader())
    train.test(Net(), loader(), verbose=False)


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_what_a_run_logged_comes_back(kind: Any) -> None:
    fitted(kind(".", name="logs"))
    [run], notes = read_runs(["logs"])
    assert not notes and run.name == "version_0"
    assert set(run.metrics) == {"train_loss", "val_loss", "test_loss"} and run.rates == ["lr-SGD"]
    assert list(run.values["train_loss"]) == list(range(8)) and list(run.values["val_loss"]) == [3, 7]
    assert run.saved == [3, 6] and run.marks("step") == [2, 5] and run.marks("epoch") == [0, 1]
    assert [at for at, _ in run.points("val_loss", "epoch")] == [0, 1]
    mean = sum(run.values["train_loss"][step] for step in range(4)) / 4
    assert run.points("train_loss", "epoch")[0] == (0, pytest.approx(mean))
    panels = make_panels([run])
    assert [panel.title for panel in panels][-1] == LEARNING_RATE
    [curve] = next(panel for panel in panels if panel.title == "train_loss").curves
    assert curve.marks == [(2, run.values["train_loss"][2]), (5, run.values["train_loss"][5])]


def test_the_picture_of_one_run_and_of_several(capsys: pytest.CaptureFixture[str]) -> None:
    for name, rate in (("a", 0.1), ("b", 0.01)):
        steps = range(0, 2000, 100)
        log(
            f"logs/{name}/version_0",
            saved=(101, 1901),
            **{
                "epoch": {step: step // 500 for step in steps},
                "train_loss": {step: rate + 1 / (step + 1) for step in steps},
                "$weird_{name}$": {step: math.nan if step == 500 else -step for step in steps},
                "lr-Adam/pg1": dict.fromkeys(steps, rate),
                "lr-Adam/pg2": dict.fromkeys(steps, rate * 2),
            },
        )
    Path("logs/b/version_0/metrics_superseded.csv").write_text("step,old\n1,1\n")
    assert main(["plot", "logs"]) == 0
    assert capsys.readouterr().out == "metrics.png: 3 panels, 2 runs\n"
    wide = size_of("metrics.png")
    assert main(["plot", "logs/a", "--metrics", "train*", "--no-lr", "-o", "deep/one.png"]) == 0
    assert size_of("deep/one.png") < wide
    assert main(["plot", "logs", "--smooth", "0.9", "--log-y", "--x", "epoch", "-o", "all.svg"]) == 0
    drawn = set(re.findall(r"<!-- (.*?) -->", Path("all.svg").read_text()))  # text, which is drawn as outlines
    assert {"a", "b", "train_loss", "checkpoint", "not finite", "not smoothed", "learning rate", "epoch"} <= drawn
    assert {"lr-Adam/pg1", "lr-Adam/pg2", "$weird_{name}$"} <= drawn


def test_runs_have_the_names_that_tell_them_apart() -> None:
    for folder in ("x/big/version_2", "x/big/version_10", "x/small/version_2"):
        log(folder, loss={0: 1.0})
    runs, _ = read_runs(["x"])
    assert [run.name for run in runs] == ["big/version_2", "big/version_10", "small/version_2"]
    assert [run.name for run in read_runs(["x/big"])[0]] == ["version_2", "version_10"]
    assert [run.name for run in read_runs(["x/big/version_2", "x/small/"])[0]] == ["big", "small"]
    assert [run.name for run in read_runs(["x/small/version_2/metrics.csv"])[0]] == ["version_2"]


def test_cut_and_foreign_files_are_read_as_far_as_they_go(capsys: pytest.CaptureFixture[str]) -> None:
    log("x/good", loss={0: 1.0, 5: "nan", 9: "text"})
    with Path("x/good/metrics.csv").open("a") as file:
        file.write("1")  # being written
    log("x/empty")
    [run], notes = read_runs(["x"])
    assert list(run.values["loss"]) == [0, 5] and math.isnan(run.values["loss"][5])
    assert len(notes) == 1 and "x/empty: nothing was logged" in notes[0]
    assert make_panels([run])[0].curves[0].not_finite == [5]
    assert main(["plot", "x", "-o", "x.png"]) == 0
    assert "nothing was logged" in capsys.readouterr().err


def test_event_files_begin_anew_where_they_say_so() -> None:
    with SummaryWriter("run/version_0") as writer:
        for step in range(6):
            writer.add_scalar("loss", 1.0, step)
        writer.add_scalars("both", {"train": 1.0, "val": 2.0}, 0)
        writer.add_hparams({"lr": 0.1}, {"hp_metric": 1.0})
        writer.add_text("note", "text", 0)
    with SummaryWriter("run/version_0", purge_step=3, filename_suffix=".later") as writer:
        writer.add_scalar("loss", 2.0, 3)
    for file in Path("run/version_0").glob("events*"):  # the tenth writer of a process, in the second of the ninth
        file.rename(file.with_name(f"events.out.tfevents.1700000000.host.1.{10 if 'later' in file.name else 9}"))
    [run], _ = read_runs(["run"])
    assert run.values == {
        "loss": {0: 1.0, 1: 1.0, 2: 1.0, 3: 2.0},
        "both/train": {0: 1.0},
        "both/val": {0: 2.0},
    }


def test_the_step_of_a_checkpoint_without_one_in_its_name() -> None:
    folder = log("run", saved=(4,), loss={0: 1.0})
    TorchCheckpointIO().save_checkpoint({"global_step": 7, "w": torch.ones(1)}, folder / "checkpoints/last.ckpt")
    (folder / "checkpoints/damaged.ckpt").write_bytes(b"PK")
    assert read_runs(["run"])[0][0].saved == [4, 7]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "There is no folder 'nowhere'."),
        (["lgs"], "Did you mean 'logs'?"),
        (["void"], "no metrics.csv and no event file of TensorBoard in 'void'"),
        (["logs/metrics.csv.txt"], "is no folder, and neither"),
        (["s3://bucket/logs"], "Copy it here"),
        (["logs", "--metrics", "val_los"], "No metric is called 'val_los'. Did you mean 'val_loss'?"),
        (["logs", "--metrics", "val_loss", "none*"], "No metric is called 'none*'. There is: lr-SGD, val_loss."),
        (["logs", "--x", "epoch"], "none was logged in 'logs'"),
        (["logs", "-o", "x.jpg"], "one of .png, .svg, .pdf"),
        (["logs", "-o", "void/../dir.png"], "is a folder"),
        (["logs", "-o", "logs/metrics.csv.txt/x.png"], "cannot be written"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    log("logs", val_loss={0: 1.0}, **{"lr-SGD": {0: 0.1}})
    Path("logs/metrics.csv.txt").touch()
    for folder in ("void", "dir.png"):
        Path(folder).mkdir()
    assert main(["plot", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("weight", ["1", "-0.1", "much"])
def test_a_weight_outside_of_its_range(weight: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plot", ".", "--smooth", weight])
    assert "from 0 to below 1" in capsys.readouterr().err


def test_only_so_many_panels() -> None:
    log("logs", **{f"metric_{i}": {0: 1.0} for i in range(101)})
    with pytest.raises(MisconfigurationException, match=r"101 metrics .* at most 100"):
        make_panels(read_runs(["logs"])[0])


def test_missing_packages_are_named_with_their_command(monkeypatch: pytest.MonkeyPatch) -> None:
    with SummaryWriter("run") as writer:
        writer.add_scalar("loss", 1.0, 0)
    monkeypatch.setitem(__import__("sys").modules, "tensorboard", None)
    with pytest.raises(MissingPackageError, match=r"pip install treadle\[trainer\]"):
        read_runs(["run"])


def test_a_smoothed_constant_is_that_constant() -> None:
    assert smoothed([(0, 2.0), (1, 2.0)], 0.9) == [(0, pytest.approx(2.0)), (1, pytest.approx(2.0))]
    assert smoothed([(0, 0.0), (1, 1.0)], 0.5)[1] == (1, pytest.approx(2 / 3))


def test_a_long_curve_keeps_its_peaks() -> None:
    log("logs", loss={step: 100.0 if step == 54321 else step % 7 for step in range(100_000)})
    [curve] = make_panels(read_runs(["logs"])[0])[0].curves
    assert (54321, 100.0) in curve.points and len(curve.points) < 5000
    assert curve.points == sorted(curve.points)


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0, 5000, 10_000], ["0", "5k", "10k"]),
        ([0, 500_000, 1_000_000], ["0", "0.5M", "1.0M"]),
        ([200, 400, 1000], ["200", "400", "1000"]),
        ([0.0, 0.0005, 0.001], ["0", "0.5e-3", "1.0e-3"]),
        ([0.95, 1.0], ["0.95", "1.00"]),
        ([0.98333330, 0.98333331], ["0.98333330", "0.98333331"]),
        ([-2.0, 0.0, 2.0], ["-2", "0", "2"]),
        ([0.0], ["0"]),
        ([], []),
    ],
)
def test_labels_are_short_and_told_apart(values: list[float], texts: list[str]) -> None:
    assert labels(values) == texts
