"""Nothing was printed for ever where a rank did not come: sbatch with a plain python, a left-over LOCAL_RANK.

Tests of ``treadle_fabric.coordination.rendezvous``, ``treadle_fabric.coordination.waiting``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.processes import importing_tests, run_in_ranks, wait_until

from treadle_fabric import Fabric
from treadle_fabric.coordination import WaitMessages, list_ranks, meet, new_group
from treadle_fabric.environments import (
    ClusterEnvironment,
    KubeflowEnvironment,
    LightningEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
    find_free_port,
)
from treadle_fabric.errors import MisconfigurationException, RendezvousError
from treadle_fabric.failures import notes
from treadle_fabric.failures.folder_board import FolderBoard
from treadle_fabric.failures.process import Process
from treadle_fabric.launchers.supervisor import Supervisor
from treadle_fabric.resolve import build, resolve
from treadle_fabric.strategies import DDPStrategy, ParallelStrategy

pytestmark = pytest.mark.timeout(90)


@dataclass
class Rank:
    """A fork of this process that may wait for ever."""

    pid: int
    output: Path

    def said(self) -> str:
        return self.output.read_text()

    def says(self, text: str) -> str:
        """Wait until it has printed the text."""
        wait_until(lambda: text in self.said() or self.ended() is not None, timeout=40)
        assert text in self.said(), self.said()
        return self.said()

    status: int | None = None

    def ended(self) -> int | None:
        if self.status is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if found else None
        return self.status

    def ends_well(self) -> None:
        wait_until(lambda: self.ended() is not None, timeout=40)
        assert self.status == 0, self.said()


Start = Callable[..., Rank]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts ranks, whose first message of a wait is due after a moment; those that still run are killed at the end."""
    ranks: list[Rank] = []

    def start(function: Callable[[], object], **environ: object) -> Rank:
        output = tmp_path / f"output-{len(ranks)}"
        output.touch()
        pid = os.fork()
        if pid == 0:
            _run(function, {name: str(value) for name, value in environ.items()}, output)
        ranks.append(Rank(pid, output))
        return ranks[-1]

    yield start
    for rank in ranks:
        if rank.ended() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGKILL)
            os.waitpid(rank.pid, 0)


def _run(function: Callable[[], object], environ: dict[str, str], output: Path) -> None:
    status = 1
    try:
        with output.open("a", buffering=1) as sys.stderr:
            os.environ |= {"TREADLE_WAIT_MESSAGE_AFTER": "0.2", **environ}
            try:
                function()
                status = 0
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(status)


def launch(plugins: Any = None, devices: int = 2, timeout: float = 60) -> None:
    strategy = DDPStrategy(timeout=timedelta(seconds=timeout))
    fabric = Fabric(accelerator="cpu", devices=devices, strategy=strategy, plugins=plugins)
    fabric.launch()
    assert fabric.all_reduce(torch.tensor(1.0), reduce_op="sum") == devices
    dist.destroy_process_group()


def test_a_batch_script_without_srun(start: Start) -> None:
    said = start(
        lambda: launch(plugins=SLURMEnvironment()),
        SLURM_JOB_ID=find_free_port(),
        SLURM_NTASKS=2,
        SLURM_NNODES=1,
        SLURM_PROCID=0,
        SLURM_LOCALID=0,
        SLURM_NODEID=0,
    ).says("srun python")
    assert "rank 0 (process " in said and " for rank 1 at 127.0.0.1:" in said
    assert "SLURM_NTASKS=2 says that there are 2 processes" in said
    assert "plugins=LightningEnvironment()" in said


def test_a_left_over_local_rank(start: Start) -> None:
    said = start(launch, LOCAL_RANK=0, MASTER_PORT=find_free_port()).says("unset LOCAL_RANK")
    assert "rank 0" in said and "for rank 1 at" in said and "LOCAL_RANK=0" in said


def test_a_left_over_local_rank_alone_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_PORT", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(MisconfigurationException, match=r"LOCAL_RANK=0 .*MASTER_PORT is not set.*`unset LOCAL_RANK`"):
        Fabric(accelerator="cpu", devices=2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(MisconfigurationException, match=r"LOCAL_RANK=1, but devices=1 .*unset LOCAL_RANK"):
        Fabric(accelerator="cpu", devices=1, strategy="ddp")


def test_a_script_that_only_this_process_starts_tells_of_the_other(tmp_path: Path) -> None:
    """A real script under the launcher: rank 1 waits for something else before it gets to the launch."""
    (tmp_path / "script.py").write_text(
        textwrap.dedent(
            """
            import os, time
            from treadle_fabric import Fabric
            while os.environ.get("LOCAL_RANK") == "1" and not os.path.exists("go"):
                time.sleep(0.02)
            fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
            fabric.launch()
            fabric.barrier()
            """
        )
    )
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "TREADLE"))}
    environ |= {"TREADLE_WAIT_MESSAGE_AFTER": "0.5", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "script.py"], cwd=tmp_path, env=environ, stdin=subprocess.DEVNULL, stderr=said
        )
    try:
        wait_until(lambda: "for rank 1 at 127.0.0.1:" in (tmp_path / "said").read_text(), timeout=60)
        (tmp_path / "go").touch()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    assert "Treadle started 2 of the 2 processes on this machine" in (tmp_path / "said").read_text()


def test_a_rank_whose_rank_0_does_not_answer_and_comes_late(start: Start) -> None:
    port = find_free_port()
    last = start(launch, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2, MASTER_PORT=port)
    said = last.says("waited")
    assert "rank 1 (process " in said
    assert f"for rank 0 at 127.0.0.1:{port}, which does not answer (Connection refused)" in said
    first = start(launch, LOCAL_RANK=0, LOCAL_WORLD_SIZE=2, MASTER_PORT=port)
    last.ends_well()
    first.ends_well()


def test_only_the_lowest_rank_speaks(start: Start) -> None:
    environ = {"MASTER_PORT": find_free_port(), "LOCAL_WORLD_SIZE": 4}
    second, first = (start(lambda: launch(devices=4), LOCAL_RANK=rank, **environ) for rank in (1, 0))
    first.says("for ranks 2-3 at")
    third = start(lambda: launch(devices=4), LOCAL_RANK=2, **environ)
    first.says("for rank 3 at")
    assert "for rank" not in second.said().replace("for rank 0 at", "")  # which may have come before rank 0
    start(lambda: launch(devices=4), LOCAL_RANK=3, **environ).ends_well()
    for rank in (first, second, third):
        rank.ends_well()


@pytest.mark.parametrize("rank", [0, 1])
def test_the_timeout_says_the_same(start: Start, rank: int) -> None:
    late = start(lambda: launch(timeout=0.3), LOCAL_RANK=rank, MASTER_PORT=find_free_port())
    said = late.says("The timeout is over.")
    assert f"RendezvousError: rank {rank} " in said and f" for rank {1 - rank} at" in said
    assert "unset LOCAL_RANK" in said


def test_a_rank_that_is_there_twice(start: Start) -> None:
    environ = {"MASTER_PORT": find_free_port(), "LOCAL_WORLD_SIZE": 3}
    start(lambda: launch(devices=3), LOCAL_RANK=0, **environ).says("for ranks 1-2")
    one = start(lambda: launch(devices=3), LOCAL_RANK=1, **environ)
    two = start(lambda: launch(devices=3), LOCAL_RANK=1, **environ)
    wait_until(lambda: one.ended() or two.ended())
    refused, other = (one, two) if one.ended() else (two, one)
    assert f"is there a second time: process {other.pid} on {socket.gethostname()} has the rank" in refused.said()


def test_an_address_that_is_not_that_of_rank_0(start: Start) -> None:
    environ = {"MASTER_PORT": find_free_port(), "MASTER_ADDR": "no-host.invalid", "LOCAL_WORLD_SIZE": 2}
    first, last = (start(launch, LOCAL_RANK=rank, **environ) for rank in (0, 1))
    assert "for rank 1 at no-host.invalid:" in first.says("listens, but the address does not answer")
    assert "for rank 0 at no-host.invalid:" in last.says("which does not answer")


def test_a_port_that_another_program_has(start: Start) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = start(launch, LOCAL_RANK=0, LOCAL_WORLD_SIZE=2, MASTER_PORT=port).says("set MASTER_PORT to a free port")
    assert f"cannot listen at port {port}" in said


class _Watched:
    """A stderr that makes a file when something is printed."""

    def __init__(self, name: str) -> None:
        self._file = Path(name)

    def write(self, text: str) -> None:
        self._file.touch()

    def flush(self) -> None:
        pass


def _several_groups() -> None:
    kept, rank = [], int(os.environ["LOCAL_RANK"])
    os.environ["TREADLE_WAIT_MESSAGE_AFTER"] = "0.05"
    for number in range(3):
        strategy = DDPStrategy(
            parallel_devices=[torch.device("cpu")] * 2,
            cluster_environment=LightningEnvironment(),
            timeout=timedelta(seconds=20),
        )
        if number > 0 and rank == 0:  # the last to come: an earlier group's keys are there, and its ranks are not
            wait_until(Path(f"waits-{number}").exists, timeout=20)
        sys.stderr = _Watched(f"waits-{number}")  # type: ignore[assignment]
        strategy.setup_environment()
        sys.stderr = sys.__stderr__
        kept.append(dist.distributed_c10d._get_default_store())  # so the server, with all its keys, stays
        assert strategy.all_reduce(torch.tensor(1.0), reduce_op="sum") == 2
        strategy.barrier()
        strategy.leave_environment()


def test_one_group_after_the_other_at_the_same_port() -> None:
    run_in_ranks(_several_groups)


def _a_group_more() -> None:
    strategy = DDPStrategy(parallel_devices=[torch.device("cpu")] * 2, cluster_environment=LightningEnvironment())
    strategy.setup_environment()
    os.environ["TREADLE_WAIT_MESSAGE_AFTER"] = "0.1"
    if strategy.global_rank == 1:
        wait_until(lambda: Path("said").exists())
        group = new_group(backend="gloo")
    else:
        with open("saying", "w", buffering=1) as sys.stderr:
            said = sys.stderr.write

            def write(text: str) -> int:
                Path("said").touch()
                return said(text)

            sys.stderr.write = write  # type: ignore[method-assign]
            group = new_group(backend="gloo")
        assert "rank 0 has waited 0 s for rank 1 to make a process group together" in Path("saying").read_text()
    dist.barrier(group)
    strategy.leave_environment()


def test_a_further_group_says_who_is_missing() -> None:
    run_in_ranks(_a_group_more)


def test_the_launching_process_tells_of_ranks_that_do_not_get_to_the_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TREADLE_WAIT_MESSAGE_AFTER", raising=False)
    board = FolderBoard.create(range(3))
    clock, said = [0.0], []
    supervisor = Supervisor(board, reports=False, process=Process(now=lambda: clock[0], say=said.append))
    running: dict[int, int | None] = {0: None, 1: None, 2: None}
    for clock[0] in (1, 9, 11):
        supervisor.look(running)
    assert len(said) == 1 and "waited 11 s for ranks 0-2 of 3" in said[0]
    board.post(notes.Joined(0))
    board.post(notes.Joined(1))
    clock[0] = 31
    supervisor.look(running)
    assert len(said) == 2 and "for rank 2 of 3" in said[1]
    board.post(notes.Joined(2))
    clock[0] = 1000
    supervisor.look(running)
    assert len(said) == 2
    board.remove()


def test_messages_come_after_ten_seconds_and_then_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TREADLE_WAIT_MESSAGE_AFTER", raising=False)
    clock = [0.0]
    said: list[str] = []
    messages = WaitMessages(lambda seconds: f"{seconds:g}", lambda: clock[0], said.append)
    for clock[0] in range(1000):
        messages.look()
    assert said == ["10", "30", "60", "120", "300", "600", "900"]
    monkeypatch.setenv("TREADLE_WAIT_MESSAGE_AFTER", "soon")
    assert WaitMessages(str)._first == 10  # a malformed variable is no reason to fail
    assert (list_ranks([3]), list_ranks([5, 1, 3, 4])) == ("rank 3", "ranks 1, 3-5")
    assert list_ranks(range(0, 40, 2)) == "ranks 0, 2, 4, 6, 8, 10, 12, 14 and 12 more"


@pytest.mark.parametrize(
    ("kind", "environ", "words"),
    [
        (TorchElasticEnvironment, {"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "r"}, ["WORLD_SIZE=2", "env -u"]),
        (SLURMEnvironment, {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_ID": "0"}, ["STEP_NUM_TASKS=2", "srun started 2"]),
        (MPIEnvironment, {"PMI_SIZE": "2"}, ["PMI_SIZE=2", "mpirun"]),
        (KubeflowEnvironment, {"WORLD_SIZE": "2"}, ["WORLD_SIZE=2", "2 pods"]),
        (LightningEnvironment, {"NODE_RANK": "1"}, ["NODE_RANK=1", "on each machine"]),
    ],
)
def test_each_environment_names_the_variables(
    kind: type[ClusterEnvironment], environ: dict[str, str], words: list[str]
) -> None:
    environment: Any = kind()
    environment.environ = environ
    assert all(word in environment.explain_ranks(2) for word in words), environment.explain_ranks(2)


# Processes that each see one GPU: which one, and whether it is another rank's


def test_processes_that_each_see_one_gpu_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's number is 0 in every process; ranks, counts and NCCL's device follow the environment."""
    environ = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "RANK": "13", "LOCAL_RANK": "5"}
    environ |= {"GROUP_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for devices in ("auto", 1, 8):
        plan = resolve(
            devices=devices, num_nodes=2, environ=environ, available={"cuda": 1, "cpu": 1}, interactive=False
        )
        strategy: Any = build(plan)
        gpu = torch.device("cuda", 0)
        assert strategy.root_device == gpu
        assert (strategy.num_processes, strategy.world_size, strategy.global_rank) == (8, 16, 13)
        assert strategy.distributed_sampler_kwargs == {"num_replicas": 16, "rank": 13}
        assert strategy.process_group_backend == "nccl"
    made: dict[str, Any] = {}
    met: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: made.update(current=device))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(
        "treadle_fabric.strategies.parallel.meet", lambda *args: met.append(args[1:]) or dist.HashStore()
    )
    monkeypatch.setattr("treadle_fabric.strategies.parallel.mark_rank_as_taken", lambda: None)
    monkeypatch.setattr(ParallelStrategy, "_share_failures", lambda self, environment: None)
    monkeypatch.setattr("treadle_fabric.strategies.parallel.host_group", lambda timeout: None)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **kwargs: made.update(kwargs, backend=backend))
    strategy.setup_environment()
    strategy._owns_group = False
    assert made["current"] == made["device_id"] == gpu
    assert (made["backend"], made["rank"], made["world_size"]) == ("nccl", 13, 16)
    assert met[0][:2] == (13, 16) and met[0][3] == gpu


def _meet_with_gpus(uuids: list[str]) -> None:
    environment = LightningEnvironment()
    rank = environment.local_rank()
    torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(uuid=uuids[rank])  # type: ignore[assignment]
    store = None
    try:
        store = meet(environment, rank, 2, timedelta(seconds=20), torch.device("cuda", 0))
    except MisconfigurationException as error:
        assert uuids[0] == uuids[1] and "Ranks " in str(error) and "use the same GPU (UUID g)" in str(error)
        print("refused")
    Path(f"done-{rank}").touch()
    wait_until(lambda: Path(f"done-{1 - rank}").exists())  # rank 0 holds the store
    del store


@pytest.mark.parametrize(("uuids", "refused"), [(["g", "h"], 0), (["g", "g"], 1)])
def test_ranks_that_see_the_same_gpu_are_told_so(uuids: list[str], refused: int) -> None:
    assert run_in_ranks(_meet_with_gpus, uuids).count("refused") == refused


def test_the_error_is_a_runtime_error() -> None:
    assert issubclass(RendezvousError, RuntimeError)
    with pytest.raises(MisconfigurationException, match="rank 3, but the run has 2"):
        meet(LightningEnvironment(), 3, 2)


def test_a_port_at_which_another_program_listens_is_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        environ = {"LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(other.getsockname()[1])}
        script = "from treadle_fabric import Fabric; Fabric(accelerator='cpu', devices=2, strategy='ddp').launch()"
        with subprocess.Popen(
            [sys.executable, "-c", script],
            env={**importing_tests(), **environ, "TREADLE_WAIT_MESSAGE_AFTER": "0.3"},
            stderr=subprocess.PIPE,
            text=True,
        ) as rank:
            try:
                assert rank.stderr is not None
                said = next(line for line in rank.stderr if "has waited" in line)
            finally:
                rank.kill()
    assert "for rank 0 at 127.0.0.1" in said and "which answers, but not as a rank does" in said
