"""The ways to start a program on both hosts, each with the variables that its launcher sets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.nodes.hosts import Cluster, Host, Running

__all__ = ["WAYS", "launch"]

PORT = "29411"  # free: nothing else is on the hosts


def launch(
    way: str, cluster: Cluster, program: Path, *arguments: object, devices: int = 1, own_folders: bool = False
) -> list[Running]:
    """Start a program on both hosts, whose first argument is a folder.

    Args:
        way: One of :data:`WAYS`.
        cluster: The hosts.
        program: The program.
        arguments: Its further arguments.
        devices: Its number of processes on each host.
        own_folders: Whether each host has a folder of its own, and no disk that both see.
    """
    running = []
    for node, host in enumerate(cluster):
        command = [program, host.folder if own_folders else cluster.shared, *arguments, "--devices", devices]
        running += WAYS[way](host, node, devices, command)
    return running


def _by_hand(host: Host, node: int, devices: int, command: list[object]) -> list[Running]:
    environ = {"MASTER_ADDR": "weaver-a", "MASTER_PORT": PORT, "NODE_RANK": str(node)}
    return [host.python(*command, environ=environ)]


def _by_hand_each(host: Host, node: int, devices: int, command: list[object]) -> list[Running]:
    environ = {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": PORT, "NODE_RANK": str(node)}
    return [host.python(*command, environ={**environ, "LOCAL_RANK": str(local)}) for local in range(devices)]


def _torchrun(host: Host, node: int, devices: int, command: list[object]) -> list[Running]:
    agent = ["-m", "torch.distributed.run", "--nnodes=2", f"--nproc-per-node={devices}", f"--node-rank={node}"]
    return [host.python(*agent, "--master-addr=weaver-a", f"--master-port={PORT}", *command)]


def _run(host: Host, node: int, devices: int, command: list[object]) -> list[Running]:
    run = ["-m", "treadle_fabric.cli", "run", "--num-nodes=2", f"--devices={devices}", f"--node-rank={node}"]
    return [host.python(*run, "--main-address=weaver-a", f"--main-port={PORT}", *command)]


def _srun(host: Host, node: int, devices: int, command: list[object]) -> list[Running]:
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "weave", "SLURM_NTASKS": str(2 * devices), "SLURM_NNODES": "2"}
    job |= {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(2 * devices), "SLURM_STEP_NUM_NODES": "2"}
    job |= {"SLURM_STEP_TASKS_PER_NODE": f"{devices}(x2)", "SLURM_STEP_NODELIST": "weaver-[a,b]"}
    return [
        host.python(
            *command,
            environ=job
            | {"SLURM_PROCID": str(node * devices + local), "SLURM_LOCALID": str(local), "SLURM_NODEID": str(node)},
        )
        for local in range(devices)
    ]


def _jsrun(host: Host, node: int, devices: int, command: list[object]) -> list[Running]:
    slots = ["launcher", *["weaver-a"] * devices, *["weaver-b"] * devices]
    (host.folder / "ranks").write_text("\n".join(slots) + "\n")
    job = {"LSB_JOBID": "4711", "LSB_DJOB_RANKFILE": str(host.folder / "ranks")}
    job |= {"JSM_NAMESPACE_SIZE": str(2 * devices), "JSM_NAMESPACE_LOCAL_SIZE": str(devices)}
    return [
        host.python(
            *command,
            environ=job | {"JSM_NAMESPACE_RANK": str(node * devices + local), "JSM_NAMESPACE_LOCAL_RANK": str(local)},
        )
        for local in range(devices)
    ]


def _mpirun(host: Host, node: int, devices: int, command: list[object]) -> list[Running]:
    job = {"OMPI_COMM_WORLD_SIZE": str(2 * devices), "OMPI_COMM_WORLD_LOCAL_SIZE": str(devices)}
    job |= {"MASTER_ADDR": "weaver-a", "MASTER_PORT": PORT}  # by mpirun's -x
    return [
        host.python(
            *command,
            environ=job
            | {
                "OMPI_COMM_WORLD_RANK": str(node * devices + local),
                "OMPI_COMM_WORLD_LOCAL_RANK": str(local),
                "OMPI_COMM_WORLD_NODE_RANK": str(local),
            },
        )
        for local in range(devices)
    ]


def _kubeflow(host: Host, node: int, devices: int, command: list[object]) -> list[Running]:
    assert devices == 1, "a pod has one process"
    pod = {"WORLD_SIZE": "2", "RANK": str(node), "MASTER_ADDR": "weaver-a", "MASTER_PORT": PORT}
    return [host.python(*command, "--kubeflow", environ=pod)]


WAYS: dict[str, Callable[[Host, int, int, list[object]], list[Running]]] = {
    "by hand": _by_hand,
    "by hand, each process": _by_hand_each,
    "jsrun": _jsrun,
    "kubeflow": _kubeflow,
    "mpirun": _mpirun,
    "srun": _srun,
    "torchrun": _torchrun,
    "treadle-fabric run": _run,
}
