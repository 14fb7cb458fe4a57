"""torchrun's elastic agent: a host that is lost comes back, or does not, and training goes on from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.nodes import elastic
from tests.nodes.elastic import ALONE_WAITS_AT, WAITS_AT
from tests.nodes.hosts import Cluster, Host, Running
from tests.nodes.test_training import alone
from tests.nodes.training import BATCHES, EPOCHS
from tests.processes import wait_until

__all__ = ["alone"]

pytestmark = [pytest.mark.nodes, pytest.mark.faults, pytest.mark.timeout(300)]

PROGRAM = Path(elastic.__file__)
# An agent that is started anew reads where rank 0 is from the store of this rendezvous; torch 2.13 writes that there
# once in the life of an agent, unless it is told not to share the store with the workers.
ENVIRON = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "TREADLE_SIGTERM_GRACE": "3"}
# An agent that is gone is missed after 6 s, so that the tests need not wait for 15.
RENDEZVOUS = "join_timeout=120,last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=6"


def agent(cluster: Cluster, host: Host, strategy: str, nodes: str) -> Running:
    """Start torchrun on a host."""
    options = ["--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-endpoint=weaver-a:29400"]
    options += ["--rdzv-id=weave", f"--rdzv-conf={RENDEZVOUS}", f"--nnodes={nodes}"]
    program = [PROGRAM, cluster.shared, "--strategy", strategy, "--num-nodes", "auto"]
    return host.python("-m", "torch.distributed.run", *options, *program, environ=ENVIRON)


def workers(host: Host) -> list[str]:
    """The training processes of a host, without its agent."""
    commands = [" ".join(process.cmdline()) for process in host.processes()]
    return [command for command in commands if str(PROGRAM) in command and "torch.distributed.run" not in command]


def check(cluster: Cluster, alone: dict[str, list[float]], sizes: dict[int, int], told: str) -> None:
    """Check losses, and the number of processes from each of some steps on, up to the next one."""
    lines = [line.split() for line in (cluster.shared / "losses").read_text().splitlines()]
    last = {int(step): (float(loss), int(size)) for step, loss, size in lines}
    assert sorted(last) == list(range(EPOCHS * BATCHES)), told
    assert [loss for _, (loss, _) in sorted(last.items())] == pytest.approx(alone["trainer-auto"], rel=1e-4), told
    for first, world in sizes.items():
        until = min((step for step in sizes if step > first), default=EPOCHS * BATCHES)
        assert {last[step][1] for step in range(first, until)} == {world}, told
    steps = [int(step) for step, _, _ in lines]
    assert steps.count(0) == 1, told  # it went on, and did not begin anew
    assert "host weaver-b with rank" in told, told


@pytest.mark.parametrize(("strategy", "how"), [("ddp", "kill"), ("fsdp", "cut")])
def test_a_host_comes_back(cluster: Cluster, alone: dict[str, list[float]], strategy: str, how: str) -> None:
    first, second = (agent(cluster, host, strategy, "2") for host in cluster)
    wait_until(lambda: len(list(cluster.shared.glob("waits-2-*"))) == 2, 120)
    if how == "cut":
        cluster.cut()
    else:
        cluster.b.kill_all()
    (cluster.shared / "go").touch()
    wait_until(lambda: not workers(cluster.a), 60)
    if how == "cut":
        cluster.b.kill_all()  # the machine is started again
        cluster.mend()
    third = agent(cluster, cluster.b, strategy, "2")
    statuses = cluster.wait(first, third, timeout=120)
    told = "\n".join(map(str, (first, second, third)))
    assert statuses == [0, 0], told
    check(cluster, alone, {WAITS_AT: 2}, told)
    assert not cluster.left(), told


def test_training_goes_on_without_a_host_and_with_it_again(cluster: Cluster, alone: dict[str, list[float]]) -> None:
    first, second = (agent(cluster, host, "ddp", "1:2") for host in cluster)
    wait_until(lambda: len(list(cluster.shared.glob("waits-2-*"))) == 2, 120)
    (cluster.shared / "comes-back").touch()
    cluster.b.kill_all()
    (cluster.shared / "go").touch()
    wait_until(lambda: (cluster.shared / "waits-1-0").exists(), 120)
    third = agent(cluster, cluster.b, "ddp", "1:2")
    statuses = cluster.wait(first, third, timeout=120)
    told = "\n".join(map(str, (first, second, third)))
    assert statuses == [0, 0], told
    # the last checkpoint of the one host is that before the step at which it waits
    check(cluster, alone, {WAITS_AT: 1, ALONE_WAITS_AT - 1: 2}, told)
