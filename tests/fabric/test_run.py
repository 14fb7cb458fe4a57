"""``treadle-fabric run``: real processes and signals; Fabric and the Trainer in a script learn of the options.

Tests of ``treadle_fabric.cli.run``, ``treadle_fabric.launchers.script``.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.processes import importing_tests, wait_until

from treadle import Trainer
from treadle_fabric import Fabric, MisconfigurationException
from treadle_fabric.cli import main
from treadle_fabric.environments import LightningEnvironment, mark_rank_as_taken
from treadle_fabric.failures.folder_board import FolderBoard
from treadle_fabric.failures.member import Member
from treadle_fabric.failures.process import THIS_PROCESS
from treadle_fabric.launchers import run_script
from treadle_fabric.precision import DoublePrecision
from treadle_fabric.resolve import launched_by_run, resolve, run_variables

LAUNCHED = run_variables({"devices": "2", "strategy": "ddp"}, launched=True) | {
    "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2", "NODE_RANK": "0", "MASTER_PORT": "1234",
}  # fmt: skip


def plan(environ: dict[str, str], **arguments: Any) -> Any:
    return resolve(environ=environ, available={"cpu": 1}, interactive=False, **arguments)


# What a script gets


def test_what_the_script_leaves_open_is_as_the_options_say() -> None:
    options = {"accelerator": "cpu", "strategy": "ddp", "devices": "3", "num_nodes": 1, "precision": "bf16-mixed"}
    found = plan(run_variables(options))
    assert (found.num_processes, found.strategy, found.precision, found.notes) == (3, "ddp", "bf16-mixed", ())
    found = plan(LAUNCHED)
    assert (found.world_size, found.strategy, found.launcher) == (2, "ddp", "external")


def test_what_the_script_says_it_keeps_with_a_word() -> None:
    options = {"precision": "bf16-mixed", "strategy": "ddp"}
    found = plan(run_variables(options), precision="64-true", strategy="ddp_spawn")
    assert (found.precision, found.strategy) == ("64-true", "ddp_spawn")
    strategy, precision = found.notes
    assert "strategy='ddp_spawn', and `treadle-fabric run --strategy ddp` does not change that" in strategy
    assert "precision='64-true', and `treadle-fabric run --precision bf16-mixed`" in precision
    found = plan(run_variables({"precision": "bf16-mixed"}), plugins=DoublePrecision())
    assert found.precision.precision == "64-true" and "--precision bf16-mixed" in found.notes[0]
    assert plan(run_variables({"precision": "64-true"}), plugins=DoublePrecision()).notes == ()
    assert plan(run_variables({"devices": "2"}), devices=2).notes == ()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"devices": 3}, "devices=3, and it runs under `treadle-fabric run --devices 2`"),
        ({"devices": 1}, "devices=1, and it runs under"),
        ({"strategy": "single_device"}, "for one process, and `treadle-fabric run` started several"),
    ],
)
def test_a_script_that_contradicts(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(MisconfigurationException, match=told):
        plan(LAUNCHED, **arguments)


def test_fabric_and_trainer_read_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in run_variables({"precision": "64-true", "accelerator": "cpu"}).items():
        monkeypatch.setenv(name, value)
    assert Fabric().strategy.precision.precision == "64-true"
    assert Trainer(logger=False).strategy.precision.precision == "64-true"
    assert Trainer(logger=False, precision="32-true").strategy.precision.precision == "32-true"
    assert not launched_by_run()


def test_a_process_that_a_rank_starts_gets_no_options(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = dict(LAUNCHED)
    mark_rank_as_taken(environ, pid=1)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert Fabric(accelerator="cpu").world_size == 1
    assert not launched_by_run()


# What the command refuses


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--devices", "2", "nothing.py"], "there is no file 'nothing.py' to run"),
        (["--strategy", "dpd", "train.py"], "strategy='dpd' is unknown. Did you mean 'ddp'"),
        (["--precision", "17", "train.py"], "precision='17' is unknown"),
        (["--accelerator", "cpuu", "train.py"], "Did you mean 'cpu'?"),
        (["--devices", "0", "train.py"], "devices"),
        (["--num-nodes", "2", "--devices", "1", "train.py"], "--main-address, --main-port and --node-rank"),
        (["--node-rank", "1", "train.py"], "--node-rank=1, but machines are numbered from 0"),
        (["--main-port", "70000", "train.py"], "--main-port=70000 must be a port number"),
        (["--strategy", "single_device", "--devices", "2", "train.py"], "uses one device"),
    ],
)
def test_wrong_options(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("train.py").write_text("raise SystemExit('it ran')")
    assert main(["run", *words]) == 2
    assert told in capsys.readouterr().err


# Processes


def run(source: str, *words: str, num_processes: int = 2) -> int:
    """Run a script that imports nothing of ours, in processes that this one looks after."""
    Path("train.py").write_text(f"import os, signal, sys, time\nrank = int(os.environ['LOCAL_RANK'])\n{source}")
    return run_script([sys.executable, "train.py", *words], LightningEnvironment(), num_processes)


def test_every_process_gets_rank_options_and_arguments(capfd: pytest.CaptureFixture[str]) -> None:
    Path("train.py").write_text(
        "import os, sys\n"
        "names = 'LOCAL_RANK WORLD_SIZE NODE_RANK MASTER_ADDR TREADLE_RUN_DEVICES OMP_NUM_THREADS'.split()\n"
        "sys.stdout.write(' '.join([*map(os.environ.get, names), *sys.argv[1:]]) + '\\n')\n"
    )
    variables = run_variables({"devices": "2"}, launched=True)
    command = [sys.executable, "train.py", "--lr", "3"]
    assert run_script(command, LightningEnvironment(), 2, variables=variables) == 0
    said = sorted(capfd.readouterr().out.splitlines())
    assert said == [f"{rank} 2 0 127.0.0.1 2 1 --lr 3" for rank in (0, 1)]


def test_a_failure_ends_all_and_names_the_rank(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("if rank == 1: sys.exit(7)\ntime.sleep(60)") == 7
    assert "rank 1 ended with exit status 7" in capfd.readouterr().err
    assert run("if rank == 0: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)") == 128 + signal.SIGKILL
    assert "rank 0 was killed by SIGKILL (9)" in capfd.readouterr().err


def send_when_up(*numbers: int) -> threading.Thread:
    """Send signals to this process, which looks after a script, each when both ranks have left a file."""

    def send() -> None:
        for number in numbers:
            wait_until(lambda: all(Path(f"up_{rank}").exists() for rank in (0, 1)))
            for rank in (0, 1):
                Path(f"up_{rank}").unlink()
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


UP = "open(f'up_{rank}', 'w').close()\n"


def test_sigterm_is_passed_on(capfd: pytest.CaptureFixture[str]) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    thread = send_when_up(signal.SIGTERM)
    handle = "signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b'asked %d\\n' % rank), sys.exit(143)))"
    status = run(f"{handle}\n{UP}time.sleep(60)")
    thread.join()
    assert status == 143 and signal.getsignal(signal.SIGTERM) is handler
    assert sorted(capfd.readouterr().out.splitlines()) == ["asked 0", "asked 1"]


def test_ctrl_c_is_passed_on_once() -> None:
    thread = send_when_up(signal.SIGINT)
    assert run(f"{UP}time.sleep(60)") == 128 + signal.SIGINT
    thread.join()
    thread = send_when_up(signal.SIGINT, signal.SIGINT)  # a script that handles the first may take its time
    assert run(f"try:\n    {UP}    time.sleep(60)\nexcept KeyboardInterrupt:\n    {UP}    time.sleep(60)") == 130
    thread.join()


SCRIPT = """
import os, sys
import torch
from treadle_fabric import Fabric

fabric = Fabric(accelerator="cpu")
model = fabric.setup(torch.nn.Linear(2, 2))  # without launch()
total = fabric.all_reduce(torch.tensor(fabric.global_rank + 1.0), reduce_op="sum")
precision = fabric.strategy.precision.precision
sys.stdout.write(f"rank {fabric.global_rank} of {fabric.world_size}: {total.item()} {precision} {sys.argv[1:]}\\n")
sys.stdout.flush()
fabric.barrier()
if fabric.global_rank == 1:
    raise ValueError("the loom is broken")
fabric.barrier()
"""


@pytest.mark.timeout(120)
def test_a_script_with_fabric(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    Path("train.py").write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", importing_tests()["PYTHONPATH"])
    assert main(["run", "--devices", "2", "--precision", "bf16-mixed", "train.py", "--lr", "3"]) == 1
    said = capfd.readouterr()
    assert sorted(line for line in said.out.splitlines() if line.startswith("rank")) == [
        f"rank {rank} of 2: 3.0 bf16-mixed ['--lr', '3']" for rank in (0, 1)
    ]
    assert said.err.count("ValueError: the loom is broken") == 1
    assert "rank 0 stopped because rank 1 failed" in said.err


@pytest.mark.timeout(120)
def test_where_the_processes_are_there_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun, each process becomes the script, with the options."""
    Path("train.py").write_text("")
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**torchrun, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    found: list[Any] = []

    def become(program: str, command: list[str], environ: dict[str, str]) -> None:
        found[:] = [command, environ]
        raise SystemExit

    monkeypatch.setattr(os, "execve", become)
    with pytest.raises(SystemExit):
        main(["run", "--accelerator", "cpu", "--precision", "64-true", "train.py", "-x"])
    command, environ = found
    assert command == [sys.executable, "train.py", "-x"] and launched_by_run(environ)
    assert plan(environ).precision == "64-true" and plan(environ).world_size == 2
    assert main(["run", "--accelerator", "cpu", "--devices", "3", "train.py"]) == 2


def test_one_process_is_the_script_itself() -> None:
    Path("one.py").write_text("import os, sys\nprint(os.getpid(), os.environ['TREADLE_RUN_PRECISION'], sys.argv[1:])\n")
    command = [sys.executable, "-m", "treadle_fabric.cli", "run", "--precision", "64-true"]
    command += ["--devices", "1", "--accelerator", "cpu", "one.py", "-x"]
    process = subprocess.Popen(command, env=importing_tests(), stdout=subprocess.PIPE, text=True)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and out == f"{process.pid} 64-true ['-x']\n"


def test_the_launching_process_is_no_rank() -> None:
    """So its death is not told as that of rank 0."""
    board = FolderBoard.create([0, 1], is_rank=False)
    said: list[str] = []
    process = dataclasses.replace(THIS_PROCESS, say=said.append, sleep=lambda seconds: None, end=sys.exit)
    member = Member(FolderBoard.open(board.directory), 1, process=process)
    with pytest.raises(SystemExit):
        member.check_launcher(lambda: False)
    assert said == ["the launching process died without a traceback; rank 1 and the others stop\n"]
