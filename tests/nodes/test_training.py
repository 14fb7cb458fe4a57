"""Two hosts train as one process does, in every way in which a run on several machines is started."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.nodes import training
from tests.nodes.hosts import Cluster, Running
from tests.nodes.launching import launch
from tests.processes import importing_tests

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(180)]

PROGRAM = Path(training.__file__)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The losses of one process."""
    folder = tmp_path_factory.mktemp("alone")
    command = [sys.executable, str(PROGRAM), str(folder), "--num-nodes=1"]
    environ = {name: value for name, value in importing_tests().items() if not name.startswith("PYTEST")}
    subprocess.run(command, env=environ, check=True, timeout=90, capture_output=True)
    losses: dict[str, list[float]] = json.loads((folder / "losses.json").read_text())
    assert len(losses["trainer-auto"]) == training.EPOCHS * training.BATCHES
    return losses


def check_losses(folder: Path, ways: str, alone: dict[str, list[float]], told: str) -> None:
    losses = json.loads((folder / "losses.json").read_text())
    assert list(losses) == ways.split(","), told
    for way, found in losses.items():
        assert found == pytest.approx(alone[f"{way.partition('-')[0]}-auto"][: len(found)], rel=1e-4), (way, told)


def tell(running: list[Running]) -> str:
    return "\n".join(map(str, running))


@pytest.mark.parametrize(
    ("way", "devices", "ways"),
    [
        ("torchrun", 1, "fabric-ddp,fabric-fsdp,trainer-ddp,trainer-fsdp"),
        ("by hand", 2, "fabric-fsdp,trainer-ddp"),
        ("srun", 1, "trainer-ddp"),
        ("kubeflow", 1, "fabric-ddp"),
        pytest.param("by hand", 1, "fabric-ddp,trainer-ddp", marks=pytest.mark.faults),
        pytest.param("by hand", 2, "fabric-ddp,trainer-fsdp", marks=pytest.mark.faults),
        pytest.param("by hand, each process", 2, "trainer-ddp", marks=pytest.mark.faults),
        pytest.param("treadle-fabric run", 2, "trainer-ddp", marks=pytest.mark.faults),
        pytest.param("srun", 2, "fabric-fsdp", marks=pytest.mark.faults),
        pytest.param("mpirun", 2, "trainer-ddp", marks=pytest.mark.faults),
        pytest.param("jsrun", 2, "fabric-fsdp", marks=pytest.mark.faults),
    ],
)
def test_two_hosts_train_save_and_resume_as_one_process(
    cluster: Cluster, alone: Any, way: str, devices: int, ways: str
) -> None:
    running = launch(way, cluster, PROGRAM, "--ways", ways, devices=devices)
    statuses = cluster.wait(*running, timeout=150)
    told = tell(running)
    assert statuses == [0] * len(running), told
    check_losses(cluster.shared, ways, alone, told)
    for name in ways.split(","):
        folder = cluster.shared / name
        if name.startswith("trainer"):
            hosts = (folder / "prepared").read_text().split()
            assert sorted(hosts) == sorted(["weaver-a", "weaver-b"] * training.EPOCHS), told
            (log,) = folder.glob("log/*/metrics.csv")
            assert len(log.read_text().splitlines()) == 1 + training.EPOCHS * training.BATCHES, told
            assert (folder / "checkpoints" / "last.ckpt").exists(), told
    assert "Restoring" not in "".join(one.complained for one in running[len(running) // 2 :]), told
    assert not cluster.left(), told


def test_without_a_shared_disk_ddp_saves_on_one_host(cluster: Cluster, alone: Any) -> None:
    ways = "trainer-ddp"
    running = launch("by hand", cluster, PROGRAM, "--ways", ways, "--epochs", 1, own_folders=True)
    assert cluster.wait(*running) == [0, 0], tell(running)
    check_losses(cluster.a.folder, ways, alone, tell(running))
    for host in cluster:  # each prepares its own disk, once
        assert (host.folder / "trainer-ddp" / "prepared").read_text().split() == [host.name], tell(running)
    assert (cluster.a.folder / "trainer-ddp" / "checkpoints" / "last.ckpt").is_file()
    written = {path.name for path in cluster.b.folder.rglob("*") if path.is_file()}
    assert not [name for name in written if name.endswith((".ckpt", ".csv", ".json"))], written


def test_a_checkpoint_on_one_hosts_disk_is_refused_by_name(cluster: Cluster) -> None:
    running = launch("by hand", cluster, PROGRAM, "--ways", "fabric-ddp", own_folders=True)
    assert cluster.wait(*running) == [1, 1], tell(running)
    for one in running:
        assert "middle.ckpt" in one.complained, tell(running)
        assert "host weaver-b" in one.complained, tell(running)
        assert "that all machines share" in one.complained, tell(running)
    assert not cluster.left()
