"""Going on from a checkpoint as if nothing had happened, to the last bit.

What the cases of `tests.faults.victim` write down is compared: losses, learning rates, all logged values, rows of the
loggers, what callbacks decided, weights, optimizers, random states. `tests/faults` does it at random.

Tests of ``treadle.checkpoint.exact``, ``treadle.checkpoint.restore``.
"""

from __future__ import annotations

import csv
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tests.faults import victim
from tests.faults.forkserver import ForkServer
from tests.faults.victim import Case, Trace, find, read
from tests.processes import wait_until
from tests.trainer.models import Net, loader, trainer
from torchmetrics import MetricCollection, SumMetric

import treadle as L
from treadle.callbacks import Checkpoint, ModelCheckpoint
from treadle_fabric.loggers import CSVLogger

Point = tuple[str, int, int]  # hook, epoch, batches of it that are done


class Saver(Checkpoint):
    """Saves at some points, together with the folder of the ModelCheckpoint, which comes before it, as it is then."""

    def __init__(self, folder: Path, trace: Trace, points: list[Point]) -> None:
        self.folder, self.trace, self.points = folder, trace, points
        self.found: dict[Point, tuple[Path, int]] = {}

    def _save(self, trainer: L.Trainer, hook: str) -> None:
        point = hook, trainer.current_epoch, trainer.fit_progress.batch
        if point not in self.points or point in self.found or trainer.sanity_checking:
            return
        folder = self.folder / f"point{len(self.found)}"
        trainer.save_checkpoint(folder / "point.ckpt")
        if (self.folder / "ckpt").exists():
            shutil.copytree(self.folder / "ckpt", folder / "ckpt", symlinks=True)
        self.found[point] = folder, len(read(self.trace.path))

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self._save(trainer, "batch")

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self._save(trainer, "validation")

    def on_validation_end(self, trainer: L.Trainer, *args: Any) -> None:
        self._save(trainer, "validated")

    def on_train_epoch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self._save(trainer, "epoch")


def run(case: Case, folder: Path, name: str, ckpt_path: Any = None, points: list[Point] | None = None) -> Saver:
    saver = Saver(folder, Trace(folder / name), points or [])
    run_with(saver, case, folder, name, ckpt_path)
    return saver


def run_with(callback: L.Callback, case: Case, folder: Path, name: str, ckpt_path: Any = None) -> None:
    build = victim.build

    def with_callback(*args: Any, **kwargs: Any) -> L.Trainer:
        made = build(*args, **kwargs)
        made.callbacks.append(callback)
        return made

    victim.build = with_callback
    try:
        victim.train(case, folder, name, ckpt_path)
    finally:
        victim.build = build


CASES = [
    (Case(loader="plain"), ["batch 0 1", "batch 1 6"]),
    (Case(every=1, monitor="loss_step", top_k=3), ["batch 0 4", "validated 0 8", "epoch 0 8"]),
    (Case(workers=1, norm=True, loader="drop last"), ["batch 0 5", "batch 1 7"]),
    (Case(accumulate=3, clip=0.5, scheduler="step"), ["batch 0 2", "batch 1 4", "batch 0 8"]),
    (Case(accumulate=2, accumulate_later=3, lr_monitor=True), ["batch 0 3", "batch 1 1", "epoch 0 8"]),
    (Case(validate="every 3 batches", val_shuffle=True), ["validation 0 3", "batch 0 4", "validated 1 6"]),
    (Case(validate="every 4 across epochs", every=3, accumulate=2), ["batch 0 6", "validation 1 8", "validated 0 4"]),
    (Case(validate="half", patience=1, every=0, monitor="val", top_k=2, epochs=4), ["validated 0 4", "batch 0 2"]),
    (Case(optimization="several", val_shuffle=True), ["batch 0 3", "epoch 0 8", "batch 1 2"]),
    (Case(optimization="manual", precision="bf16-mixed", validate="never"), ["batch 0 1", "epoch 0 8"]),
    (Case(optimization="lbfgs", precision="64-true"), ["batch 0 5", "epoch 0 8"]),
    (Case(precision="16-mixed", accumulate=2, scheduler="cyclic"), ["batch 0 3", "batch 1 5"]),
    (Case(scheduler="plateau", validate="half", lr_monitor=True, log_every=1), ["validation 0 4", "validated 1 4"]),
    (Case(metric=True, log_every=3), ["batch 0 4", "batch 0 8", "validation 0 8", "epoch 0 8"]),
    (Case(max_steps=11, epochs=-1), ["batch 1 3", "batch 0 7"]),
    (Case(patience=1, epochs=5, every=0, monitor="val"), ["epoch 1 8", "validated 1 8"]),
    (Case(loader="cycle", reload_every=1), ["batch 0 3", "epoch 0 8", "batch 1 2"]),
    (Case(loader="stream", workers=1, validate="every 3 batches"), ["batch 1 4", "validation 0 6"]),
    (Case(loader="unsized stateful", limit=5), ["batch 0 3", "batch 0 5", "epoch 0 5"]),
    (Case(limit=0.6, scheduler="epoch", link=True), ["batch 0 2", "batch 0 4", "epoch 0 4"]),
]


@pytest.mark.parametrize(("case", "points"), CASES, ids=str)
def test_to_the_last_bit(tmp_path: Path, case: Case, points: list[str]) -> None:
    wanted = [(hook, int(epoch), int(batch)) for hook, epoch, batch in map(str.split, points)]
    saved = run(case, tmp_path, "whole", points=wanted).found
    whole = read(tmp_path / "whole")
    assert list(saved) and not set(wanted) - set(saved)
    for i, (point, (folder, at)) in enumerate(saved.items()):
        shutil.rmtree(tmp_path / "ckpt", ignore_errors=True)
        if (folder / "ckpt").exists():
            shutil.copytree(folder / "ckpt", tmp_path / "ckpt", symlinks=True)
        run(case, tmp_path, str(i), folder / "point.ckpt")
        rest = [event for event in read(tmp_path / str(i)) if event[0] != "start"]
        start = find(rest, whole)
        assert start + len(rest) == len(whole), point
        if point[0] == "validation":  # it begins anew: what it has written to loggers is written again
            assert {event[0] for event in whole[start:at]} <= {"row"} and start <= at, point
        else:  # a run that is at its end has nothing to train
            assert start >= at and {event[0] for event in whole[at:start]} <= {"trained"}, point


class Preempted(L.Callback):
    """Is asked to terminate, and before that to save, at the start or in a batch."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.batches:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.batches:
            trainer.save_checkpoint("early.ckpt")

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.fit_progress.batches == self.batches:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("case", "batches"),
    [
        (Case(workers=1, loader="persistent", every=1, lr_monitor=True, accumulate=2), 3),
        (Case(loader="stateful", validate="every 3 batches", scheduler="plateau", metric=True), 10),
        (Case(max_steps=5, scheduler="epoch", metric=True), 5),
        (Case(patience=1, epochs=5, validate="half", monitor="val"), 8),
    ],
    ids=str,
)
def test_preempted_again_before_the_next_batch(tmp_path: Path, case: Case, batches: int) -> None:
    """Whoever saves before the first batch of a resumed run saves the place where that begins."""
    (tmp_path / "whole").mkdir()
    run(case, tmp_path / "whole", "whole")
    whole = read(tmp_path / "whole" / "whole")
    for name, after in (("first", batches), ("second", 0)):
        with pytest.raises(SystemExit) as ended:
            run_with(Preempted(after), case, tmp_path, name, "last")
        assert ended.value.code == 128 + signal.SIGTERM
    first, second = read(tmp_path / "first"), read(tmp_path / "second")
    assert first == whole[: len(first)]
    shutil.copytree("ckpt", "kept", symlinks=True)
    for name, ckpt_path in (("third", "last"), ("fourth", "early.ckpt")):
        shutil.rmtree("ckpt")
        shutil.copytree("kept", "ckpt", symlinks=True)
        run(case, tmp_path, name, ckpt_path)
        assert second[1:] + read(tmp_path / name)[1:] == whole[len(first) :]


class KillAfter:
    """Sends SIGKILL to a process, or a child of it, once its trace has so many events."""

    def __init__(self, trace: Path, events: int, child: int | None = None) -> None:
        self.trace, self.events, self.child = trace, events, child

    def __call__(self, pid: int) -> None:
        wait_until(lambda: len(read(self.trace)) >= self.events, every=0.001)
        targets = psutil.Process(pid).children(recursive=True)
        os.kill(pid if self.child is None else targets[self.child].pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("case", "child"),
    [
        pytest.param(Case(samples=60, accumulate=2, metric=True, lr_monitor=True), None, id="one process"),
        pytest.param(
            Case(loader="persistent", workers=2, samples=60, validate="every 3 batches"),
            0,
            id="a worker",
            marks=pytest.mark.faults,
        ),
        pytest.param(Case(samples=80, devices=2, metric=True, accumulate=2, patience=3), 0, id="rank 0"),
        pytest.param(
            Case(
                loader="drop last", samples=80, devices=2, norm=True, optimization="several", validate="every 3 batches"
            ),
            0,
            id="buffers",
        ),
        pytest.param(
            Case(loader="distributed", samples=80, devices=2, validate="every 3 batches"),
            1,
            id="rank 1",
            marks=pytest.mark.faults,
        ),
    ],
)
def test_killed_in_the_middle(tmp_path: Path, server: ForkServer, case: Case, child: int | None) -> None:
    assert server.run(case, tmp_path / "whole", "whole") == 0
    folder = tmp_path / "killed"
    assert server.run(case, folder, "first", meanwhile=KillAfter(folder / "first", 14, child)) != 0
    assert (folder / "ckpt" / "last.ckpt").exists()
    assert server.run(case, folder, "second", "last") == 0, (folder / "second.txt").read_text()
    for rank in range(case.devices):
        suffix = "" if rank == 0 else f".rank{rank}"
        whole = read(tmp_path / "whole" / f"whole{suffix}")
        before, after = (read(folder / f"{name}{suffix}") for name in ("first", "second"))
        assert before == whole[: len(before)]
        assert after[0][0] == "start" and after[0][1] > 0
        start = find(after[1:], whole)
        assert 0 < start <= len(before) < len(whole)
        assert start + len(after) - 1 == len(whole)


def rows(folder: Path) -> dict[int, dict[str, str]]:
    """Step -> row, of all files of a run that was resumed; a later file counts where both have a step."""
    found: dict[int, dict[str, str]] = {}
    for path in sorted(folder.glob("version_*/metrics.csv")):
        with path.open() as file:
            for row in csv.DictReader(file):
                found.setdefault(int(row["step"]), {}).update({k: v for k, v in row.items() if v})
    return found


def test_no_row_of_the_csv_logger_is_lost(tmp_path: Path) -> None:
    """What was logged before a checkpoint is on disk when the checkpoint is."""

    class Killed(BaseException):
        pass

    class Pulled(Net):
        """Without its plug, neither callbacks nor loggers can do anything any more."""

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.trainer.global_step == 9 and self.trainer.ckpt_path is None:
                raise Killed
            return super().training_step(batch, batch_idx)

    class Unplugged(CSVLogger):
        def finalize(self, status: str) -> None:
            if status == "success":
                super().finalize(status)

    def fit(folder: Path, model: Net, ckpt_path: Any = None) -> None:
        run = trainer(
            folder,
            max_epochs=3,
            log_every_n_steps=1,
            logger=Unplugged(folder, name=""),
            callbacks=ModelCheckpoint(folder / "ckpt", every_n_train_steps=4, save_last=True),
            enable_checkpointing=True,
        )
        run.fit(model, loader(10), loader(4), ckpt_path=ckpt_path)

    fit(tmp_path / "whole", Net())
    with pytest.raises(Killed):
        fit(tmp_path / "killed", Pulled())
    assert max(rows(tmp_path / "killed")) == 6  # the checkpoint of step 8 was saved just before the row of step index 7
    fit(tmp_path / "killed", Pulled(), "last")
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert len(rows(tmp_path / "whole")) == 15


def test_other_processes_start_from_the_random_state_of_the_first(tmp_path: Path, server: ForkServer) -> None:
    """Also Python's, which seeds itself anew in a fork: two runs of one seed are alike."""
    case = Case(loader="plain", samples=12, devices=2, epochs=1, validate="never")
    for name in ("one", "two"):
        assert server.run(case, tmp_path, name) == 0
    for suffix in ("", ".rank1"):
        assert read(tmp_path / f"one{suffix}") == read(tmp_path / f"two{suffix}")


def test_double_precision_keeps_its_digits(tmp_path: Path) -> None:
    model, again = Net(lr=1 / 3), Net()
    run = trainer(tmp_path, precision="64-true", max_epochs=2)
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "double.ckpt")
    with pytest.warns(UserWarning, match="nothing is left to do"):
        trainer(tmp_path, precision="64-true", max_epochs=2).fit(again, loader(), ckpt_path=tmp_path / "double.ckpt")
    assert model.layer.weight.dtype is torch.float64
    assert torch.equal(model.layer.weight, again.layer.weight)


class HoldsMetrics(L.Callback):
    """Counts in metrics that are no submodules: its own, and some that the module holds in containers."""

    def __init__(self) -> None:
        self.metric, self.found = SumMetric(), {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        metrics = self.metric, pl_module.held["a"][0], pl_module.held["b"]["metric"]
        for metric in metrics:
            metric.update(batch_idx + 1)
        self.found = {trainer.global_step: [float(metric.compute()) for metric in metrics]}
        if batch_idx == 1:
            trainer.save_checkpoint("middle.ckpt")


def test_metrics_that_a_callback_or_a_container_holds_go_on(tmp_path: Path) -> None:
    found = []
    for ckpt_path in (None, "middle.ckpt"):
        module = Net()
        module.held = {"a": [SumMetric()], "b": MetricCollection({"metric": SumMetric()}), "samples": [0] * 10_000}
        module.held["itself"] = module.held
        holds = HoldsMetrics()
        trainer(tmp_path, max_epochs=1, callbacks=holds).fit(module, loader(4, 1), ckpt_path=ckpt_path)
        found.append(holds.found)
    assert found == [{4: [10.0, 10.0, 10.0]}] * 2
