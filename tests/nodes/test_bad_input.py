"""What a user gets wrong on two hosts is told on both, with the remedy; and what a network may be like is no fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.nodes import meeting
from tests.nodes.hosts import Cluster, Running, two_hosts

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(180)]

PROGRAM = Path(meeting.__file__)
PORT = "29411"


def start(cluster: Cluster, a: dict[str, Any], b: dict[str, Any], timeout: float = 60) -> list[Running]:
    """Start the program by hand on each host; ``num_nodes`` is an argument, and all else variables."""
    running = []
    for node, (host, given) in enumerate(zip(cluster, (a, b), strict=True)):
        environ = {"MASTER_ADDR": "weaver-a", "MASTER_PORT": PORT, "NODE_RANK": str(node)}
        environ |= {"TREADLE_WAIT_MESSAGE_AFTER": "2"}
        environ |= {name: value for name, value in given.items() if name.isupper()}
        nodes = given.get("num_nodes", 2)
        arguments = [PROGRAM, host.folder, "--num-nodes", nodes, "--timeout", timeout]
        running.append(host.python(*arguments, environ=environ))
    return running


def tell(running: list[Running]) -> str:
    return "\n".join(map(str, running))


def check_meets(cluster: Cluster, address: str) -> None:
    running = start(cluster, {"MASTER_ADDR": address}, {"MASTER_ADDR": address})
    assert cluster.wait(*running) == [0, 0], tell(running)
    assert [one.said for one in running] == ["sum 1\n", "sum 1\n"], tell(running)


def test_ipv6_addresses(cluster: Cluster) -> None:
    check_meets(cluster, "fd77::1")


def _debian(index: int) -> str:
    # the installer's line for the host's own name, and the administrator's for the other host
    own, other = "weaver-" + "ab"[index], "weaver-" + "ba"[index]
    return f"127.0.0.1 localhost\n127.0.1.1 {own}\n10.77.0.{2 - index} {other}\n"


@pytest.mark.parametrize(
    ("hosts", "address"),
    [
        (_debian, "weaver-a"),
        pytest.param(_debian, "10.77.0.1", marks=pytest.mark.faults),
        pytest.param(lambda index: "127.0.0.1 localhost\n", "10.77.0.1", marks=pytest.mark.faults),
    ],
    ids=["debian", "debian, by address", "unknown"],
)
def test_a_host_whose_own_name_leads_to_itself(tmp_path: Path, hosts: Any, address: str) -> None:
    with two_hosts(tmp_path, hosts=hosts) as cluster:
        check_meets(cluster, address)


@pytest.mark.faults
def test_an_interface_with_several_addresses(cluster: Cluster) -> None:
    for host in cluster:
        host.run("ip", "addr", "add", f"10.78.0.{host.address[-1]}/24", "dev", "cable")
    check_meets(cluster, "10.78.0.1")


def test_two_sizes_of_a_run(cluster: Cluster) -> None:
    running = start(cluster, {}, {"num_nodes": 3})
    assert cluster.wait(*running, timeout=50) == [1, 1], tell(running)
    for one in running:
        assert "MisconfigurationException" in one.complained, tell(running)
        assert "the run has 2 processes" in one.complained or "that it has 2" in one.complained, tell(running)
        assert "that it has 3" in one.complained or "the run has 3 processes" in one.complained, tell(running)
        assert "the same num_nodes" in one.complained, tell(running)


def test_a_node_rank_that_two_hosts_have(cluster: Cluster) -> None:
    running = start(cluster, {}, {"NODE_RANK": "0"}, timeout=8)
    assert cluster.wait(*running) == [1, 1], tell(running)
    assert "rank 0 (process" in running[1].complained, tell(running)
    assert "is there a second time" in running[1].complained, tell(running)
    assert "on weaver-a has the rank already" in running[1].complained, tell(running)
    assert "NODE_RANK" in running[1].complained, tell(running)


def test_an_address_that_is_no_host(cluster: Cluster) -> None:
    address = {"MASTER_ADDR": "10.77.0.9"}
    running = start(cluster, address, address, timeout=5)
    assert cluster.wait(*running) == [1, 1], tell(running)
    for host, one in zip(cluster, running, strict=True):
        assert "does not answer" in one.complained, tell(running)
        assert f"The addresses of this host are {host.address} (cable)" in one.complained, tell(running)
        assert "MASTER_ADDR=10.77.0.9" in one.complained, tell(running)
