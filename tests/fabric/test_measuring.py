"""Throughput, operations and their peak rates, spikes of the loss, and whether ranks share a folder.

Tests of ``treadle_fabric.measuring``.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tests.processes import run_in_ranks
from torch import nn

from treadle_fabric import Fabric, MisconfigurationException, TrainingSpikeException
from treadle_fabric.loggers import CSVLogger
from treadle_fabric.measuring.peak_rates import compute_dtype
from treadle_fabric.utilities import (
    Throughput,
    ThroughputMonitor,
    get_available_flops,
    is_shared_filesystem,
    measure_flops,
)
from treadle_fabric.utilities.spike import SpikeDetection


def test_rates_are_those_of_the_window() -> None:
    throughput = Throughput(available_flops=50, world_size=2, window_size=2)
    assert throughput.compute() == {}
    throughput.update(time=1.0, batches=1, samples=4, lengths=16, flops=10)
    assert throughput.compute() == {"time": 1.0, "batches": 1, "samples": 4, "lengths": 16}
    throughput.update(time=1.5, batches=2, samples=8, lengths=32, flops=10)
    throughput.update(time=2.0, batches=3, samples=12, lengths=48, flops=10)
    assert throughput.compute() == {
        "time": 2.0, "batches": 3, "samples": 12, "lengths": 48,
        "device/batches_per_sec": 2.0, "device/samples_per_sec": 8.0, "device/items_per_sec": 32.0,
        "device/flops_per_sec": 20.0, "device/mfu": 0.4,
        "batches_per_sec": 4.0, "samples_per_sec": 16.0, "items_per_sec": 64.0, "flops_per_sec": 40.0,
    }  # fmt: skip
    throughput.reset()
    assert throughput.compute() == {}
    alone = Throughput(window_size=2, separator=".")
    for n in (1, 2):
        alone.update(time=n, batches=n, samples=n)
    assert alone.compute() == {
        "time": 2, "batches": 2, "samples": 2, "device.batches_per_sec": 1.0, "device.samples_per_sec": 1.0
    }  # fmt: skip


def test_totals_must_grow() -> None:
    throughput = Throughput()
    throughput.update(time=1.0, batches=1, samples=4)
    for wrong in ({"time": 1.0}, {"batches": 1}, {"samples": 3}):
        with pytest.raises(MisconfigurationException, match=f"{[*wrong][0]}=.* has not grown"):
            throughput.update(**{"time": 2.0, "batches": 2, "samples": 8, **wrong})  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match="lengths=7 is less than samples=8"):
        throughput.update(time=2.0, batches=2, samples=8, lengths=7)
    with pytest.raises(MisconfigurationException, match="at every update, or never"):
        throughput.update(time=2.0, batches=2, samples=8, lengths=80)
    throughput.update(time=2.0, batches=2, samples=8)  # what was refused left nothing behind
    for wrong in ({"available_flops": 0}, {"world_size": 0}, {"window_size": 1}):
        with pytest.raises(MisconfigurationException, match=[*wrong][0]):
            Throughput(**wrong)  # type: ignore[arg-type]


def test_fabric_logs_rates(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, loggers=CSVLogger(tmp_path, flush_logs_every_n_steps=1))
    monitor = ThroughputMonitor(fabric, window_size=2, available_flops=100)
    for n in (1, 2):
        monitor.update(time=n, batches=n, samples=n, flops=10)
        found = monitor.compute_and_log()
    assert found["device/mfu"] == 0.1 and monitor.step == 1
    rows = (Path(fabric.logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert len(rows) == 3 and "device/mfu" in rows[0]
    assert monitor.compute_and_log(step=7) == found and monitor.step == 7


def test_operations_are_counted_without_being_made() -> None:
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(1 << 20, 1 << 20), nn.Linear(1 << 20, 8)), torch.randn(3, 1 << 20)
    forward = 2 * 3 * (1 << 20) * ((1 << 20) + 8)
    assert measure_flops(model, lambda: model(x)) == forward
    assert measure_flops(model, lambda: model(x), torch.sum) == forward * 3 - 2 * 3 * (1 << 20) * (1 << 20)


def rate(name: str, dtype: Any) -> int | None:
    with mock.patch("torch.cuda.get_device_name", lambda device: name):
        return get_available_flops(torch.device("cuda", 0), dtype)


@pytest.mark.filterwarnings("ignore:Please use the new API settings to control TF32")  # torch 2.9, built for CUDA
def test_peak_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    assert get_available_flops(torch.device("cpu"), torch.float32) is None
    expected = {
        "NVIDIA H200": 989.4, "NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H100 PCIe": 756.5, "NVIDIA H100 NVL": 835.5,
        "NVIDIA B200": 2250, "NVIDIA GB200": 2500, "NVIDIA B300 SXM6 AC": 2250, "NVIDIA A100-SXM4-80GB": 312,
        "NVIDIA A100 80GB PCIe": 312, "NVIDIA L4": 121, "NVIDIA L40": 181.05, "NVIDIA L40S": 362.05,
        "NVIDIA A10G": 70, "NVIDIA RTX A6000": 154.8, "NVIDIA GeForce RTX 4070 Ti SUPER": 88.2,
        "NVIDIA GeForce RTX 5090": 209.5, "NVIDIA GeForce RTX 3060": 25.5, "AMD Instinct MI300X": 1307.4,
    }  # fmt: skip
    assert {name: rate(name, torch.bfloat16) for name in expected} == {n: int(r * 1e12) for n, r in expected.items()}
    assert rate("Tesla T4", torch.float16) == 65e12 and rate("Tesla V100-SXM2-32GB", torch.float16) == 125e12
    assert rate("NVIDIA H200", torch.float8_e4m3fn) == rate("NVIDIA H200", "int8") == int(1978.9e12)
    assert rate("NVIDIA A100-SXM4-80GB", torch.float32) == 19.5e12
    assert rate("NVIDIA A100-SXM4-80GB", torch.float64) == 19.5e12, "of its tensor cores, which compute it"
    assert rate("NVIDIA GH200 144G HBM3e", torch.bfloat16) == int(989.4e12)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert rate("NVIDIA A100-SXM4-80GB", torch.float32) == 156e12
        assert rate("Tesla T4", torch.float32) == 8.1e12, "which has no TF32"
    finally:
        torch.set_float32_matmul_precision(precision)
    for other in ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA Z1"):
        with pytest.warns(UserWarning, match=f"{other}': its peak rate is not known.*pass `available_flops`"):
            assert rate(other, torch.bfloat16) is None
    with pytest.warns(UserWarning, match="'Tesla T4' does not support torch.bfloat16"):
        assert rate("Tesla T4", torch.bfloat16) is None
    for kind, expected_rate in (("v5litepod-8", 197), ("v3-8", 61.5), ("v6e-8", 918), ("v4-16", 275)):
        monkeypatch.setenv("TPU_ACCELERATOR_TYPE", kind)
        assert get_available_flops(torch.device("xla"), torch.bfloat16) == expected_rate * 1e12
    assert [compute_dtype(p) for p in ("32-true", "bf16-mixed", "16-true", "64-true")] == [
        torch.float32, torch.bfloat16, torch.float16, torch.float64
    ]  # fmt: skip


def spike_at(losses: list[float], **kwargs: Any) -> int | None:
    """The number of the first loss that is a spike; None if none is."""
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric._callbacks = [detection := SpikeDetection(**kwargs)]
    for i, loss in enumerate(losses):
        try:
            fabric.call("on_train_batch_end", fabric=fabric, loss=torch.tensor(loss), batch=None, batch_idx=i)
        except TrainingSpikeException as error:
            assert error.batch_idx == i and detection.bad_batches[-1] == i
            return i
    return None


def test_what_is_a_spike() -> None:
    nan, inf = math.nan, math.inf
    assert spike_at([1.0, 1.0, 1.0, 2.9, 9.0]) == 4, "at least twice the mean away from it"
    assert spike_at([5.0, 1.0, 1.0, 1.5, 1.9, 3.1, 7.0]) == 6
    assert spike_at([1.0, 9.0]) == 1 and spike_at([1.0, 9.0, 1.0], warmup=2) is None
    assert spike_at([1.0, 9.0, 8.0, 7.0, 6.0], warmup=2, window=2) is None, "each is better than the one before"
    assert spike_at([1.0, 5.0], atol=4.0, rtol=None) == 1 and spike_at([1.0, 5.0], atol=4.1, rtol=None) is None
    assert spike_at([1.0, 5.0], atol=4.1) is None, "both must be exceeded"
    assert spike_at([1.0, 1.0, -9.0], mode="max") == 2 and spike_at([1.0, 1.0, 9.0], mode="max") is None
    assert spike_at([1.0, nan]) == 1 and spike_at([1.0, inf]) == 1 and spike_at([1.0, -inf], mode="max") == 1
    assert spike_at([1.0, nan, 1.0, 9.0], finite_only=False) == 3, "NaN is not part of the mean"
    assert json.loads(Path("skip_batches.json").read_text()) == [3, 4, 5, 6, 0, 1, 2]
    with pytest.raises(MisconfigurationException, match="mode='least'"):
        SpikeDetection("least")  # type: ignore[arg-type]
    for wrong in ({"window": 0}, {"warmup": -1}, {"atol": -1.0}, {"rtol": None}):
        with pytest.raises(MisconfigurationException, match=[*wrong][0]):
            SpikeDetection(**wrong)  # type: ignore[arg-type]


def test_the_batches_to_leave_out_are_where_they_were_asked_for(tmp_path: Path) -> None:
    assert spike_at([1.0, 9.0], exclude_batches_path=tmp_path / "a" / "b") == 1
    assert json.loads((tmp_path / "a" / "b" / "skip_batches.json").read_text()) == [0, 1]
    assert spike_at([nan := math.nan, nan], exclude_batches_path="own.json", warmup=0) == 0
    assert json.loads(Path("own.json").read_text()) == [0]


def in_ranks(path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    strategy, rank = fabric.strategy, fabric.global_rank
    assert is_shared_filesystem(strategy, path) and is_shared_filesystem(strategy) and not list(path.glob(".t*"))
    assert is_shared_filesystem(strategy, "s3://somewhere")
    (path / f"of-{rank}").mkdir()
    fd = os.open(path / f"of-{rank}", os.O_RDONLY)
    os.dup2(fd, 99)  # the same path, another folder in each process
    assert not is_shared_filesystem(strategy, "/proc/self/fd/99", timeout=0)
    assert not os.listdir("/proc/self/fd/99")
    with pytest.raises(FileNotFoundError, match=r"does not exist on every rank"):
        is_shared_filesystem(strategy, path / "of-0" if rank == 0 else path / "nowhere")
    detection = SpikeDetection(exclude_batches_path=path)
    for i, loss in enumerate([1.0, 1.0, 9.0 if rank == 1 else 1.0]):  # rank 0 saw nothing
        try:
            detection.on_train_batch_end(fabric, None if i == 1 and rank == 0 else torch.tensor(loss), None, i)  # type: ignore[arg-type]
        except TrainingSpikeException:
            assert i == 2 and detection.state_dict()["losses"] == [1.0, 1.0]
            break
    else:
        raise AssertionError("no spike")
    fabric.barrier()
    assert json.loads((path / "skip_batches.json").read_text()) == [1, 2]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
@pytest.mark.timeout(110)
def test_ranks_decide_alike(tmp_path: Path) -> None:
    run_in_ranks(in_ranks, tmp_path)
