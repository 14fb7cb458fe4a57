"""A failure on one of two hosts ends the run on both, in time, and is named on both."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.nodes import failing
from tests.nodes.hosts import Cluster, Running
from tests.nodes.launching import launch
from tests.processes import wait_until

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(180)]

PROGRAM = Path(failing.__file__)
ALLOWED_S = 10.0
SILENCE_S = 10.0  # until a machine that is gone without a word counts as lost


def start(way: str, cluster: Cluster, how: str, rank: int = -1, devices: int = 2) -> list[Running]:
    """Start the program; returns when all ranks train."""
    running = launch(way, cluster, PROGRAM, how, "--rank", rank, devices=devices)

    def train() -> bool:
        ended = [one for one in running if one.process.poll() is not None]
        found = len(list(cluster.shared.glob("trains*")))
        assert found == 2 * devices or not ended or rank >= 0, "\n".join(map(str, running))
        return found == 2 * devices

    wait_until(train, 90)
    return running


def end(cluster: Cluster, running: Sequence[Running], seconds: float = ALLOWED_S) -> str:
    """Wait until all have ended, within the time that is promised; returns what all said."""
    began = time.monotonic()
    statuses = cluster.wait(*running, timeout=seconds + 30)
    took = time.monotonic() - began
    told = "\n".join(map(str, running))
    assert 0 not in statuses, told
    assert took < seconds, f"{took:.1f} s: {told}"
    assert not cluster.left(), told
    return told


@pytest.mark.parametrize(
    ("way", "rank", "devices"),
    [
        ("by hand", 3, 2),
        ("by hand", 0, 1),
        pytest.param("by hand", 1, 2, marks=pytest.mark.faults),
        pytest.param("treadle-fabric run", 2, 2, marks=pytest.mark.faults),
        pytest.param("torchrun", 1, 1, marks=pytest.mark.faults),
        pytest.param("kubeflow", 0, 1, marks=pytest.mark.faults),
    ],
)
def test_an_exception_is_told_once_on_each_host(cluster: Cluster, way: str, rank: int, devices: int) -> None:
    running = start(way, cluster, "raise", rank, devices)
    told = end(cluster, running)
    there = rank // devices
    for index, one in enumerate(running):
        said = one.complained
        assert said.count("ValueError: the loom is broken\n") >= 1, told
        assert said.count('raise ValueError("the loom is broken")') == 1, told
        if index != there:
            assert f"rank {rank} on host {running[there].host.name} failed:\n" in said, told
            assert f"because rank {rank} on host {running[there].host.name} failed: ValueError" in said, told


def test_srun_shows_an_exception_once(cluster: Cluster) -> None:
    running = start("srun", cluster, "raise", 1, 1)
    told = end(cluster, running)
    assert told.count('raise ValueError("the loom is broken")') == 1, told
    assert "rank 0 stopped because rank 1 on host weaver-b failed: ValueError: the loom is broken" in told


@pytest.mark.parametrize(
    ("way", "rank", "sentence"),
    [
        ("by hand", 3, "rank 3 was killed by SIGKILL"),
        pytest.param("by hand", 2, "rank 2, the launching process, died", marks=pytest.mark.faults),
        pytest.param("treadle-fabric run", 2, "rank 2 was killed by SIGKILL", marks=pytest.mark.faults),
        pytest.param("srun", 3, "rank 3 died and left no traceback", marks=pytest.mark.faults),
    ],
)
def test_a_rank_that_is_killed_is_named_on_both_hosts(cluster: Cluster, way: str, rank: int, sentence: str) -> None:
    running = start(way, cluster, "kill", rank)
    told = end(cluster, running)
    first = [one for one in running if one.host is cluster.a]
    assert f"rank {rank} on host weaver-b failed" in first[0].complained, told
    assert sentence in "".join(one.complained for one in running if one.host is cluster.b), told
    if way != "srun":
        assert sentence in first[0].complained, told


@pytest.mark.faults
def test_an_interrupt_on_one_host_ends_both(cluster: Cluster) -> None:
    running = start("by hand", cluster, "interrupt", 0)
    told = end(cluster, running)
    assert [one.process.returncode for one in running] == [130, 130], told
    assert "on host weaver-a: rank 0 was interrupted\n" in running[1].complained, told
    assert "KeyboardInterrupt" not in running[1].complained, told


@pytest.mark.parametrize(
    ("way", "devices", "lost"),
    [
        ("by hand", 2, "b"),
        ("srun", 1, "a"),
        pytest.param("by hand", 2, "a", marks=pytest.mark.faults),
        pytest.param("srun", 1, "b", marks=pytest.mark.faults),
        pytest.param("torchrun", 1, "a", marks=pytest.mark.faults),
        pytest.param("torchrun", 2, "b", marks=pytest.mark.faults),
        pytest.param("treadle-fabric run", 2, "b", marks=pytest.mark.faults),
        pytest.param("kubeflow", 1, "b", marks=pytest.mark.faults),
    ],
)
def test_a_host_whose_processes_are_all_killed_is_named(cluster: Cluster, way: str, devices: int, lost: str) -> None:
    running = start(way, cluster, "never", devices=devices)
    host, other = (cluster.a, cluster.b) if lost == "a" else (cluster.b, cluster.a)
    host.kill_all()
    told = end(cluster, running)
    ranks = {("a", 1): "rank 0", ("b", 1): "rank 1", ("a", 2): "ranks 0-1", ("b", 2): "ranks 2-3"}[lost, devices]
    said = "".join(one.complained for one in running if one.host is other)
    assert f"host {host.name} with {ranks} is lost" in said, told


@pytest.mark.faults
@pytest.mark.parametrize(("way", "devices"), [("by hand", 2), ("srun", 1), ("torchrun", 1)])
def test_a_cable_that_is_cut_ends_both_hosts(cluster: Cluster, way: str, devices: int) -> None:
    running = start(way, cluster, "never", devices=devices)
    cluster.cut()
    told = end(cluster, running, SILENCE_S + ALLOWED_S)
    a, b = ("".join(one.complained for one in running if one.host is host) for host in cluster)
    assert "host weaver-b with rank" in a, told
    assert "host weaver-a with rank" in b, told
    assert "10 s" in a, told
    assert "10 s" in b, told


@pytest.mark.faults
def test_a_cable_that_is_mended_in_time_does_no_harm(cluster: Cluster) -> None:
    running = start("by hand", cluster, "never", devices=1)
    cluster.cut()
    time.sleep(4)  # the time itself is what is tested
    cluster.mend()
    for path in cluster.shared.glob("trains*"):
        path.unlink()
    wait_until(lambda: len(list(cluster.shared.glob("trains*"))) == 2, 30)
    assert [one.process.poll() for one in running] == [None, None], "\n".join(map(str, running))
