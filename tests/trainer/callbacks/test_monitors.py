"""DeviceStatsMonitor, ThroughputMonitor and SpikeDetection: what is logged when, and what a resumed run has of it.

Tests of ``treadle.callbacks.device_stats_monitor``, ``treadle.callbacks.throughput_monitor`` and
``treadle.callbacks.spike``.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.device_waits import CountedAccelerator, CountedDevice
from tests.trainer.models import Net, loader, trainer
from torch import Tensor

import treadle as L
from treadle.callbacks import DeviceStatsMonitor, LearningRateMonitor, SpikeDetection, ThroughputMonitor
from treadle_fabric import CPUAccelerator, MissingPackageError, TrainingSpikeException
from treadle_fabric.loggers import Logger


class Memory(Logger):
    name, version, experiment = "memory", 0, None
    log_dir = root_dir = None

    def __init__(self) -> None:
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...

    def of(self, prefix: str) -> list[tuple[int | None, dict[str, float]]]:
        found = [(s, {k: v for k, v in row.items() if k.startswith(prefix)}) for s, row in self.rows]
        return [(step, row) for step, row in found if row]


class Quiet(Net):
    """Logs nothing itself."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any: ...

    def test_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any: ...


STATS = ("cpu_percent", "cpu_swap_percent", "cpu_vm_percent")


def where(rows: list[tuple[int | None, dict[str, float]]]) -> list[tuple[str, int | None]]:
    return [
        (key.partition("/")[0].removeprefix("DeviceStatsMonitor."), step) for step, row in rows for key in [*row][:1]
    ]


def test_device_stats_are_logged_at_log_steps(tmp_path: Path) -> None:
    memory = Memory()
    run = trainer(tmp_path, logger=memory, callbacks=DeviceStatsMonitor(), log_every_n_steps=2, num_sanity_val_steps=2)
    run.fit(Quiet(), loader(10), loader(6))
    rows = memory.of("DeviceStatsMonitor")
    assert where(rows) == [
        ("on_train_batch_start", 1), ("on_train_batch_end", 1),
        ("on_train_batch_start", 3), ("on_train_batch_end", 3),
        ("on_validation_batch_start", 4), ("on_validation_batch_end", 4),
    ]  # fmt: skip
    assert all({key.partition("/")[2] for key in row} == {*STATS} for _, row in rows)
    memory.rows.clear()
    run.test(run.lightning_module, loader(4), verbose=False)
    assert where(memory.of("Dev")) == [("on_test_batch_start", 5), ("on_test_batch_end", 5)], "the step of metrics"
    memory.rows.clear()
    run = trainer(
        tmp_path, logger=memory, callbacks=DeviceStatsMonitor(), log_every_n_steps=1, accumulate_grad_batches=2
    )
    run.fit(Quiet(), loader(8))
    assert where(memory.of("Dev")) == [(f"on_train_batch_{at}", step) for step in (0, 1) for at in ("start", "end")]


@pytest.mark.parametrize(("cpu_stats", "names"), [(None, {"busy"}), (True, {"busy", *STATS}), (False, {"busy"})])
def test_stats_of_the_cpu_beside_those_of_a_device(tmp_path: Path, cpu_stats: bool | None, names: set[str]) -> None:
    class Elsewhere(CountedAccelerator):
        def get_device_stats(self, device: Any) -> dict[str, Any]:
            return {"busy": 1}

    memory = Memory()
    with CountedDevice() as device:
        arguments: Any = {"accelerator": Elsewhere(), "callbacks": DeviceStatsMonitor(cpu_stats), "logger": memory}
        trainer(tmp_path, **arguments, log_every_n_steps=2).fit(Quiet(), loader(8))
        assert device.counts().get("await", 0) == device.counts().get("read", 0) == 0
    assert {key.partition("/")[2] for key in memory.of("Dev")[0][1]} == names


def test_what_the_monitors_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(L.MisconfigurationException, match="Cannot use `DeviceStatsMonitor`"):
        trainer(tmp_path, callbacks=DeviceStatsMonitor()).fit(Quiet(), loader(2))
    with pytest.warns(UserWarning, match="ThroughputMonitor writes to loggers"):
        trainer(tmp_path, callbacks=ThroughputMonitor(len)).fit(Quiet(), loader(2))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "psutil", None)
        with pytest.raises(MissingPackageError, match=r"pip install treadle\[trainer\]"):
            trainer(tmp_path, callbacks=DeviceStatsMonitor(), logger=Memory()).fit(Quiet(), loader(2))
        trainer(tmp_path, callbacks=DeviceStatsMonitor(False), logger=Memory()).fit(Quiet(), loader(2))
    with pytest.raises(L.MisconfigurationException, match="batch_size_fn=3"):
        ThroughputMonitor(3)  # type: ignore[arg-type]
    with pytest.raises(L.MisconfigurationException, match="window_size"):
        ThroughputMonitor(len, window_size=0)
    assert importlib.util.find_spec("psutil") and CPUAccelerator().get_device_stats("cpu")


def throughput(**kwargs: Any) -> ThroughputMonitor:
    return ThroughputMonitor(len, lambda batch: batch.numel(), window_size=2, **kwargs)


def test_rates_are_logged_at_log_steps(tmp_path: Path) -> None:
    class Counted(Quiet):
        flops_per_batch = 10

    memory = Memory()
    run = trainer(tmp_path, logger=memory, callbacks=throughput(available_flops=1e9), log_every_n_steps=2, max_epochs=2)
    run.fit(Counted(), loader(8), loader(6))
    rates = ["items_per_sec", "batches_per_sec", "samples_per_sec", "flops_per_sec", "mfu"]
    rows = memory.of("train/")
    assert [(step, row["train/batches"], row["train/samples"], row["train/lengths"]) for step, row in rows] == [
        (1, 2, 4, 16), (3, 4, 8, 32), (5, 6, 12, 48), (7, 8, 16, 64)
    ]  # fmt: skip
    assert all(row[f"train/device/{rate}"] > 0 for _, row in rows for rate in rates)
    assert [(step, row["validate/batches"]) for step, row in memory.of("validate/")] == [(2, 2), (5, 2)]
    times = [row["train/time"] for _, row in rows]
    assert times == sorted(times)
    memory.rows.clear()
    run.predict(run.lightning_module, loader(4), return_predictions=False)
    assert [(step, row["predict/samples"]) for step, row in memory.of("predict/")] == [(2, 4)]


def test_accumulation_is_measured_with_its_step(tmp_path: Path) -> None:
    memory = Memory()
    arguments: Any = {"logger": memory, "callbacks": throughput(), "log_every_n_steps": 1}
    trainer(tmp_path, **arguments, accumulate_grad_batches=2).fit(Quiet(), loader(10))
    assert [(step, row["train/batches"]) for step, row in memory.of("train/")] == [(0, 2), (1, 4), (2, 5)]


def test_the_device_is_waited_for_at_log_steps_only(tmp_path: Path) -> None:
    with CountedDevice() as device:
        arguments: Any = {"accelerator": CountedAccelerator(), "callbacks": throughput(available_flops=1)}
        trainer(tmp_path, **arguments, logger=Memory(), log_every_n_steps=4).fit(Quiet(), loader(24))
        assert device.counts().get("await") == 3


def test_totals_go_on_after_a_resume(tmp_path: Path) -> None:
    def fit(max_steps: int, ckpt_path: Any = None) -> tuple[Memory, L.Trainer]:
        memory = Memory()
        run = trainer(
            tmp_path, logger=memory, callbacks=throughput(), log_every_n_steps=1, max_epochs=2, max_steps=max_steps,
            val_check_interval=2, accumulate_grad_batches=2,
        )  # fmt: skip
        run.fit(Quiet(), loader(12), loader(2), ckpt_path=ckpt_path)
        return memory, run

    def totals(memory: Memory) -> list[Any]:
        found = memory.of("train/") + memory.of("validate/")
        return [(step, {k: v for k, v in row.items() if k.count("/") == 1 and "time" not in k}) for step, row in found]

    whole, _ = fit(-1)
    first, stopped = fit(2)  # in the first epoch
    stopped.save_checkpoint(path := tmp_path / "a.ckpt")
    second, _ = fit(-1, path)
    joined = Memory()
    joined.rows = first.rows + second.rows
    assert totals(joined) == totals(whole)
    assert second.of("train/")[0][1]["train/time"] > first.of("train/")[-1][1]["train/time"]


class Jumping(Quiet):
    """A loss that jumps at a batch of an epoch."""

    def __init__(self, epoch: int, batch: int) -> None:
        super().__init__()
        self.jump = epoch, batch

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        jumps = self.jump == (self.current_epoch, batch_idx)
        return {"loss": self.layer.bias.sum() * 0 + (100.0 if jumps else 1.0 + batch_idx / 10)}


def test_a_spike_ends_the_fit(tmp_path: Path) -> None:
    callback = SpikeDetection(exclude_batches_path=tmp_path / "bad.json")
    with pytest.raises(TrainingSpikeException, match=r"spike detected in batch 2: the loss is 100, after 1.3, 1, 1.1"):
        trainer(tmp_path, callbacks=callback, max_epochs=3).fit(Jumping(1, 2), loader(8))
    assert json.loads((tmp_path / "bad.json").read_text()) == callback.bad_batches == [1, 2]
    run = trainer(tmp_path, callbacks=SpikeDetection(rtol=200.0), max_epochs=2)
    run.fit(Jumping(1, 2), loader(8))
    assert run.global_step == 8


def test_spikes_are_found_as_in_the_run_that_was_never_stopped(tmp_path: Path) -> None:
    def fit(max_steps: int, ckpt_path: Any = None) -> tuple[L.Trainer, dict[str, Any]]:
        run = trainer(tmp_path, callbacks=(spikes := SpikeDetection(window=3)), max_epochs=3, max_steps=max_steps)
        run.fit(Jumping(9, 9), loader(8), ckpt_path=ckpt_path)
        return run, spikes.state_dict()

    _, whole = fit(-1)
    run, _ = fit(5)
    run.save_checkpoint(path := tmp_path / "a.ckpt")
    assert fit(-1, path)[1] == whole
    assert len(whole["losses"]) == 3 and whole["seen"] == 12
    with pytest.raises(TrainingSpikeException):  # the first batch after a resume has a mean to be compared with
        trainer(tmp_path, callbacks=SpikeDetection(exclude_batches_path=tmp_path), max_epochs=3).fit(
            Jumping(1, 1), loader(8), ckpt_path=path
        )
    assert torch.is_grad_enabled()


def test_an_interval_of_0_logs_at_no_step_and_reads_as_0(tmp_path: Path) -> None:
    logger = Memory()
    monitors = [DeviceStatsMonitor(cpu_stats=True), LearningRateMonitor(logging_interval="step")]
    run = trainer(tmp_path, logger=logger, log_every_n_steps=0, callbacks=monitors)
    run.fit(Quiet(), loader(), loader())
    assert run.log_every_n_steps == 0 and not logger.rows
