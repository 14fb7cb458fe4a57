"""What profilers measure of a run and of a loop, and their reports.

Tests of ``treadle.profilers.profiler``, ``treadle.profilers.simple``, ``treadle.profilers.advanced``,
``treadle.profilers.choose``, ``treadle.profilers.passthrough``, ``treadle.profilers.report``.
"""

from __future__ import annotations

import copy
import logging
import pickle
import pstats
import re
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import run_in_ranks
from tests.trainer.models import Net, loader, trainer
from torch import Tensor

import treadle as L
from treadle.callbacks import ModelCheckpoint
from treadle.loggers import CSVLogger
from treadle.profilers import AdvancedProfiler, PassThroughProfiler, Profiler, PyTorchProfiler, SimpleProfiler
from treadle_fabric import Fabric, MisconfigurationException

MODULE, STRATEGY = "[LightningModule]Part.", "[Strategy]SingleDeviceStrategy."


class Part(Net):
    """Measures a part of its step; overrides every method that the loop calls by a hook of its own."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        with self.profile("my part"):
            return super().training_step(batch, batch_idx)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        pass

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        super().configure_gradient_clipping(*args, **kwargs)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        super().lr_scheduler_step(scheduler, metric)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        super().backward(loss, *args, **kwargs)

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1), "interval": "step"}]


class Stepping(Part):
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)


class Telling(L.Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        with trainer.profiler.profile("told"):
            pass


def calls(profiler: Any) -> dict[str, int]:
    return {name: len(durations) for name, durations in profiler.recorded_durations.items()}


@pytest.mark.parametrize("kind", [Net, Part, Stepping])
def test_actions_have_the_names_that_lightning_gives_them(tmp_path: Path, kind: Any) -> None:
    arguments = {"gradient_clip_val": 1.0, "accumulate_grad_batches": 2, "num_sanity_val_steps": 0}
    run = trainer(tmp_path, profiler="simple", callbacks=[Telling()], **arguments)
    run.fit(model := kind(), loader(12), loader(4))
    found, name = calls(run.profiler), f"[LightningModule]{kind.__name__}."
    expected = {
        "run_training_epoch": 1,
        "run_training_batch": 6,
        "[_TrainingEpochLoop].train_dataloader_next": 7,
        f"{STRATEGY}batch_to_device": 8,
        f"{STRATEGY}training_step": 6,
        f"{STRATEGY}backward": 6,
        f"{STRATEGY}validation_step": 2,
        "[_EvaluationLoop].val_next": 3,
        f"{name}optimizer_zero_grad": 3,
        f"{name}configure_gradient_clipping": 3,
        f"{name}optimizer_step": 3,
        f"{name}configure_optimizers": 1,
        "[Callback]Telling.on_train_batch_end": 6,
        "told": 6,
        "train_dataloader": 1,
    }
    if kind is not Net:
        expected |= {"my part": 6, f"{name}on_train_batch_start": 6, f"{name}lr_scheduler_step": 3}
    if kind is not Stepping:
        expected[f"{STRATEGY}optimizer_step"] = 3
    assert expected.items() <= found.items()
    fitted = run.profiler.recorded_durations  # type: ignore[attr-defined]
    assert fitted["run_training_epoch"][0] > sum(fitted["run_training_batch"])
    run.save_checkpoint(tmp_path / "x.ckpt")
    assert calls(run.profiler)["save_checkpoint"] == 1
    run.test(model, loader(4), verbose=False)
    tested = calls(run.profiler)
    assert (tested[f"{STRATEGY}test_step"], tested["[_EvaluationLoop].test_next"]) == (2, 3)
    assert "run_training_batch" not in tested  # each stage has its own report
    run.predict(model, loader(4))
    assert calls(run.profiler)["[_PredictionLoop].predict_next"] == 3


class ByHand(Net):
    automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


def test_manual_optimization_and_several_optimizers_are_measured(tmp_path: Path) -> None:
    run = trainer(tmp_path, profiler="simple")
    run.fit(ByHand(), loader())
    found = calls(run.profiler)
    assert (found[f"{STRATEGY}backward"], found[f"{STRATEGY}optimizer_step"], found["run_training_batch"]) == (4, 4, 4)

    class Two(Net):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD([p], 0.1) for p in self.layer.parameters()]

    run.fit(Two(), loader())
    found = calls(run.profiler)
    assert (found[f"{STRATEGY}optimizer_step"], found["[LightningModule]Two.optimizer_step"]) == (8, 4)


@pytest.mark.parametrize("kind", [SimpleProfiler, AdvancedProfiler, PyTorchProfiler])
def test_a_profiler_changes_nothing_of_the_run(tmp_path: Path, kind: Any) -> None:
    plain, measured = Part(), Part()
    first = trainer(tmp_path, max_epochs=2)
    first.fit(plain, loader(), loader(4))
    second = trainer(tmp_path, max_epochs=2, profiler=kind(tmp_path))
    second.fit(measured, loader(), loader(4))
    assert torch.equal(plain.layer.weight, measured.layer.weight)
    assert first.callback_metrics == second.callback_metrics


def test_without_a_profiler_nothing_is_wrapped(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Looks(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            run = trainer._runner.run
            seen.extend([run.profiler, run.timed(len, "x") is len, run.dispatch.run == run.dispatch._run])
            with trainer.profiler.profile("nothing"), pl_module.profile("nothing"):
                pass

    for given in (None, "passthrough"):
        run = trainer(tmp_path, callbacks=[Looks()], profiler=given)
        run.fit(Net(), loader(2))
        assert isinstance(run.profiler, PassThroughProfiler) and run.profiler.summary() == ""
    assert seen == [None, True, True] * 2
    with Net().profile("without a trainer"):
        pass


# ------------------------------------------------------------------------------------------------ loops and reports


def test_a_fabric_loop_measures_with_a_profiler_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    profiler, fabric = SimpleProfiler(), Fabric(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(net := Net(), torch.optim.SGD(net.parameters(), 0.1))
    for batch in loader():
        with profiler.profile("forward") as name:
            loss = model(batch).sum()
        with profiler.profile("backward"):
            fabric.backward(loss)
        with net.profile("nothing"):
            optimizer.step()
    assert name == "forward" and calls(profiler) == {"forward": 4, "backward": 4}
    with caplog.at_level(logging.INFO):
        profiler.describe()
    assert "Profiler Report of SimpleProfiler" in caplog.text and re.search(r"\nforward +0\.\d{6} +4 ", caplog.text)
    profiler = SimpleProfiler(tmp_path, "loop")
    with profiler.profile("forward"):
        pass
    profiler.describe()
    assert "forward" in (tmp_path / "loop.txt").read_text()


def test_starts_and_stops_have_to_match() -> None:
    profiler = SimpleProfiler()
    profiler.start("one")
    with pytest.raises(ValueError, match="'one' was started again before it was stopped"):
        profiler.start("one")
    with pytest.raises(ValueError, match="'two' was stopped, and has not been started"):
        profiler.stop("two")
    advanced = AdvancedProfiler()
    advanced.start("one")
    advanced.start("two")
    with pytest.raises(ValueError, match="'one' was stopped, and 'two' is the last that was started"):
        advanced.stop("one")
    advanced.finish()


def test_reports_are_one_a_stage_and_fit_100_columns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    profiler = SimpleProfiler(tmp_path / "reports", "times")
    run = trainer(tmp_path, profiler=profiler, callbacks=[ModelCheckpoint(tmp_path)], enable_checkpointing=True)
    run.fit(model := Part(), loader(), loader(4))
    run.validate(model, loader(4), verbose=False)
    assert sorted(p.name for p in (tmp_path / "reports").iterdir()) == ["fit-times.txt", "validate-times.txt"]
    text = (tmp_path / "reports" / "fit-times.txt").read_text()
    lines = text.splitlines()
    assert lines[0] == "FIT Profiler Report" and max(map(len, lines)) <= 100
    assert re.search(r"^Action +Mean \(s\) +Calls +Total \(s\) +%$", text, re.MULTILINE)
    assert re.search(r"^Total +\d+\.\d{6} +100\.00$", text, re.MULTILINE)
    assert re.search(r"^\[Callback\]ModelCheckpoint\{…\}\.on_train_epoch_end +\d", text, re.MULTILINE)
    totals = [float(line.split()[-2]) for line in lines[4:-2]]
    assert totals == sorted(totals, reverse=True)
    short = trainer(tmp_path, profiler=SimpleProfiler(extended=False))
    with caplog.at_level(logging.INFO):
        short.fit(Part(), loader())
    assert re.search(r"\nAction +Mean \(s\) +Total \(s\)\n", caplog.text) and "FIT Profiler Report" in caplog.text


def test_a_file_without_a_folder_lies_in_the_runs_folder(tmp_path: Path) -> None:
    run = trainer(tmp_path, profiler=SimpleProfiler(filename="here"), logger=CSVLogger(tmp_path))
    run.fit(Net(), loader())
    assert run.log_dir is not None and (Path(run.log_dir) / "fit-here.txt").exists()
    run = trainer(tmp_path, profiler=SimpleProfiler("memory://profiles"))
    run.fit(Net(), loader())
    import fsspec

    assert b"FIT Profiler Report" in fsspec.filesystem("memory").cat("/profiles/fit.txt")


class Failing(Net):
    def __init__(self, error: BaseException | None) -> None:
        super().__init__()
        self.error = error

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if batch_idx == 2:
            if self.error is None:
                signal.raise_signal(signal.SIGINT)
            else:
                raise self.error
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kind", [SimpleProfiler, AdvancedProfiler, PyTorchProfiler])
def test_a_run_that_ends_early_is_reported_too(tmp_path: Path, kind: Any) -> None:
    run = trainer(tmp_path, profiler=(profiler := kind(tmp_path, "x")))
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        run.fit(Failing(ZeroDivisionError("on purpose")), loader())
    assert (tmp_path / "fit-x.txt").read_text().startswith("FIT Profiler Report")
    (tmp_path / "fit-x.txt").unlink()
    with pytest.raises(SystemExit):
        run.fit(Failing(None), loader())
    assert run.interrupted and (tmp_path / "fit-x.txt").exists()
    run.fit(Net(), loader())  # what was left open by the error is forgotten
    assert "training_step" in (tmp_path / "fit-x.txt").read_text()
    if kind is PyTorchProfiler:
        assert profiler.profiler is None


def test_a_report_that_cannot_be_written_fails_no_run(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    run = trainer(tmp_path, profiler=SimpleProfiler(tmp_path / "taken" / "below"))
    with pytest.warns(UserWarning, match=r"The report of SimpleProfiler failed: .*taken"):
        run.fit(Net(), loader())
    assert run.global_step == 4


class Own(Profiler):
    """As users write them: with ``start`` and ``stop`` only."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def start(self, action_name: str) -> None:
        self.told.append(f"+{action_name}")

    def stop(self, action_name: str) -> None:
        self.told.append(f"-{action_name}")

    def teardown(self, stage: str | None) -> None:
        self.told.append(f"end of {stage}")
        super().teardown(stage)


def test_a_profiler_of_the_users_own(tmp_path: Path) -> None:
    run = trainer(tmp_path, profiler=(profiler := Own()), fast_dev_run=True)
    run.fit(Part(), loader())
    assert profiler.told.count("+my part") == profiler.told.count("-my part") == 1
    assert profiler.told[-1] == "end of fit" and profiler.local_rank == 0


def test_copies_of_a_trainer_have_a_profiler_that_measures(tmp_path: Path) -> None:
    for kind in (SimpleProfiler, AdvancedProfiler, PyTorchProfiler):
        run = trainer(tmp_path, profiler=kind(tmp_path))
        run.fit(Net(), loader(12))
        for other in (copy.deepcopy(run), pickle.loads(pickle.dumps(run.profiler))):
            profiler = getattr(other, "profiler", None) or other
            assert type(profiler) is kind
            again = trainer(tmp_path, profiler=profiler)
            again.fit(Net(), loader(12))
            assert "training_step" in (tmp_path / "fit.txt").read_text()


# ------------------------------------------------------------------------------------------------ functions


def busy(n: int) -> int:
    return sum(i * i for i in range(n))


def test_functions_of_each_action_are_told_apart(tmp_path: Path) -> None:
    profiler = AdvancedProfiler(tmp_path, "functions", dump_stats=True)
    profiler.setup("fit")
    with profiler.profile("outer"):
        busy(2000)
        with profiler.profile("inner/part {with, much}"):
            busy(3000)
        busy(2000)
    elsewhere = threading.Thread(target=lambda: [profiler.start("elsewhere"), busy(10), profiler.stop("elsewhere")])
    elsewhere.start()
    elsewhere.join()
    profiler.describe()
    profiler.teardown("fit")
    text = (tmp_path / "fit-functions.txt").read_text()
    counts = {
        table.partition("\n")[0]: re.findall(r"^ +(\d+) .*\(busy\)$", table, re.MULTILINE)
        for table in text.split("Profile stats for: ")[1:]
    }
    assert counts == {"outer": ["2"], "inner/part {…}": ["1"]}
    assert "elsewhere" not in text and max(map(len, text.splitlines())) <= 100
    files = sorted(p.name for p in tmp_path.glob("*.prof"))
    assert files == ["fit-functions-inner_part_with_much_.prof", "fit-functions-outer.prof"]
    stats = pstats.Stats(str(tmp_path / files[1]))
    assert any(function == "busy" for _, _, function in stats.stats)  # type: ignore[attr-defined]
    few = AdvancedProfiler(line_count_restriction=1)
    with few.profile("outer"):
        busy(10)
    assert few.summary().count("\n") < 10


# ------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: L.Trainer(profiler="simpel"),
            r"profiler='simpel' must be 'simple', .*Did you mean 'simple'",
        ),
        (lambda: L.Trainer(profiler=SimpleProfiler), r"profiler is the class SimpleProfiler: pass an instance"),  # type: ignore[arg-type]
        (lambda: L.Trainer(profiler=True), r"profiler is True; it must be"),  # type: ignore[arg-type]
        (lambda: L.Trainer(profiler="simple", barebones=True), r"barebones=True.*turns profiler off"),
        (lambda: SimpleProfiler(filename="a/b"), r"filename='a/b' of a profiler must be the name of a file"),
        (lambda: SimpleProfiler(3), r"dirpath=3 of a profiler must be a path"),  # type: ignore[arg-type]
        (lambda: SimpleProfiler(extended=1), r"SimpleProfiler: extended=1 must be True or False"),  # type: ignore[arg-type]
        (
            lambda: AdvancedProfiler(line_count_restriction=1.5),
            r"line_count_restriction=1\.5 must be a number",
        ),
        (lambda: AdvancedProfiler(line_count_restriction=0), r"line_count_restriction=0"),
        (lambda: AdvancedProfiler(dump_stats="x"), r"dump_stats='x'"),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments_are_refused(make: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        make()


def test_names_of_profilers(tmp_path: Path) -> None:
    kinds = {"Simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
    for name, kind in kinds.items():
        assert type(trainer(tmp_path, profiler=name).profiler) is kind


def on_each_rank(folder: Path) -> None:
    for kind in (SimpleProfiler, PyTorchProfiler):
        run = trainer(folder, devices=2, strategy="ddp", profiler=kind(folder, kind.__name__))
        run.fit(Part(), loader(20))


def test_each_rank_has_files_of_its_own(tmp_path: Path) -> None:
    run_in_ranks(on_each_rank, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == [
        "fit-PyTorchProfiler-0.txt", "fit-PyTorchProfiler-1.txt", "fit-PyTorchProfiler-step=5-0.pt.trace.json",
        "fit-PyTorchProfiler-step=5-1.pt.trace.json", "fit-SimpleProfiler-0.txt", "fit-SimpleProfiler-1.txt",
    ]  # fmt: skip
    assert "[Strategy]DDPStrategy.training_step" in (tmp_path / "fit-SimpleProfiler-1.txt").read_text()
