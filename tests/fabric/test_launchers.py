"""Launchers with real processes, real signals and a real gloo group.

Tests of ``treadle_fabric.launchers.subprocess``, ``treadle_fabric.launchers.spawn``,
``treadle_fabric.launchers.external``, ``treadle_fabric.launchers.supervisor``,
``treadle_fabric.launchers.under_pytest``, ``treadle_fabric.launchers.listener``,
``treadle_fabric.launchers.launcher``, ``treadle_fabric.failures.membership``, ``treadle_fabric.failures.process``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import own_text

from treadle_fabric.environments import LightningEnvironment
from treadle_fabric.errors import MisconfigurationException, ProcessFailedError
from treadle_fabric.failures import claim_failure, first_failure
from treadle_fabric.launchers import (
    ExternalLauncher,
    SpawnLauncher,
    SubprocessLauncher,
    make_launcher,
)

pytestmark = pytest.mark.timeout(120)

PREAMBLE = """
import atexit, os, signal, sys, time
import torch
import torch.distributed as dist
from treadle_fabric.environments import LightningEnvironment
from treadle_fabric.launchers import make_launcher

env = LightningEnvironment()
launcher = make_launcher(env, int(os.environ["N"]), 1, os.environ.get("START", "popen"))

def join():
    open(f"pid_{env.global_rank()}.new", "w").write(str(os.getpid()))
    os.rename(f"pid_{env.global_rank()}.new", f"pid_{env.global_rank()}")
    address = f"tcp://{env.main_address}:{env.main_port}"
    dist.init_process_group("gloo", init_method=address, rank=env.global_rank(), world_size=env.world_size())
    atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    dist.barrier()
    return env.global_rank()
"""


class Script:
    """A script run in a folder of its own, and the processes it made."""

    def __init__(self, folder: Path, source: str, *, n: int = 2, start: str = "popen", name: str = "script.py") -> None:
        self.folder = folder
        self.path = folder / name
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(textwrap.dedent(PREAMBLE) + textwrap.dedent(source))
        self.environ = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "PYTHONUNB", "TREADLE"))}
        roots = [str(Path(__file__).parents[2] / "fabric"), str(folder), self.environ.get("PYTHONPATH", "")]
        self.environ |= {"N": str(n), "START": start, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(roots)}
        self.environ["TMPDIR"] = str(folder / "tmp")
        (folder / "tmp").mkdir()
        self.process: subprocess.Popen[str] | None = None

    def start(self, *arguments: str, command: list[str] | None = None) -> subprocess.Popen[str]:
        self.process = subprocess.Popen(
            [sys.executable, *(command or [str(self.path)]), *arguments],
            cwd=self.folder,
            env=self.environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        return self.process

    def end(self, timeout: float = 60) -> tuple[int, str, str]:
        """Status, stdout and stderr; fails if a process of the script outlives it by more than a moment."""
        assert self.process is not None
        try:
            out, err = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            pytest.fail("the script hangs after\n" + "\n".join(self.process.communicate()))
        deadline = time.monotonic() + 5
        while (left := self.pids()) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert not left, f"orphans: {left}\n{out}\n{err}"
        return self.process.returncode, own_text(out), err

    def run(self, *arguments: str, **kwargs: Any) -> tuple[int, str, str]:
        self.start(*arguments, **kwargs)
        return self.end()

    def pids(self) -> list[int]:
        assert self.process is not None
        group = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                if int(fields[3]) == self.process.pid and fields[0] != "Z":  # the session
                    group.append(int(entry.name))
        return group

    def pid(self, rank: int) -> int:
        self.wait_for(f"pid_{rank}")
        return int((self.folder / f"pid_{rank}").read_text())

    def wait_for(self, name: str) -> None:
        assert self.process is not None
        deadline = time.monotonic() + 60
        while not (self.folder / name).exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                os.killpg(self.process.pid, signal.SIGKILL) if self.process.returncode is None else None
                pytest.fail(f"no {name} after\n" + "\n".join(self.process.communicate()))
            time.sleep(0.02)


ALL_REDUCE = """
def train(a, b=0):
    rank = join()
    total = torch.tensor([float(rank + 1)])
    dist.all_reduce(total)
    print(f"rank {rank} of {env.world_size()} has {total.item()} {a} {b}", flush=True)
    return rank

if __name__ == "__main__":
    print("returned", launcher.launch(train, "x", b=3), env.global_rank(), flush=True)
"""


class TestSubprocess:
    def test_runs_everywhere(self, tmp_path: Path) -> None:
        status, out, err = Script(tmp_path, ALL_REDUCE, n=2).run()
        assert status == 0, err
        lines = out.splitlines()
        assert sorted(lines) == [
            "rank 0 of 2 has 3.0 x 3",
            "rank 1 of 2 has 3.0 x 3",
            "returned 0 0",
            "returned 1 1",
        ]
        assert list((tmp_path / "tmp").iterdir()) == []

    def test_module_flags_arguments_and_folder(self, tmp_path: Path) -> None:
        source = """
        def train():
            rank = join()
            flags = sys.flags.optimize, __spec__.name, os.getcwd(), sys.stdin.read()
            print("RUN", rank, sys.argv[1:], *flags, flush=True)

        os.makedirs("elsewhere", exist_ok=True)
        if __name__ == "__main__":
            os.chdir("elsewhere")
            launcher.launch(train)
        """
        script = Script(tmp_path, source, name="pack/tool.py")
        (tmp_path / "pack" / "__init__.py").touch()
        status, out, err = script.run("--a", "b c", command=["-O", "-m", "pack.tool"])
        assert status == 0, err
        assert sorted(out.splitlines()) == [
            f"RUN {rank} ['--a', 'b c'] 1 pack.tool {tmp_path / 'elsewhere'} " for rank in (0, 1)
        ]

    def test_second_launch_only_calls(self, tmp_path: Path) -> None:
        source = """
        def first(): return join()
        def second():
            total = torch.tensor([1.0])
            dist.all_reduce(total)
            print("second", total.item(), len(os.listdir(os.environ["TMPDIR"])), flush=True)

        if __name__ == "__main__":
            launcher.launch(first)
            make_launcher(LightningEnvironment(), 2, 1, "popen").launch(second)
            if env.global_rank() == 0:
                try:
                    make_launcher(env, 3).launch(second)
                except ValueError as exc:
                    print(exc, flush=True)
        """
        status, out, err = Script(tmp_path, source).run()
        assert status == 0, err
        assert out.count("second 2.0") == 2
        assert "devices=3" in out

    def test_no_relaunch_in_the_middle_of_a_script(self, tmp_path: Path) -> None:
        source = """
        if __name__ == "__main__":
            launcher.launch(join)
            if env.global_rank() == 0:
                dist.destroy_process_group()
                while os.path.exists(f"/proc/{open('pid_1').read()}"):
                    time.sleep(0.02)
                print("again", flush=True)
                make_launcher(LightningEnvironment(), 2).launch(join)
        """
        status, out, err = Script(tmp_path, source).run()
        assert status == 1
        assert out == "again\n"
        assert "it cannot launch again" in err

    def test_refused_without_a_script(self, tmp_path: Path) -> None:
        script = Script(tmp_path, ALL_REDUCE)
        process = subprocess.run(
            [sys.executable, "-"],
            input=script.path.read_text(),
            env=script.environ,
            capture_output=True,
            text=True,
        )
        assert process.returncode == 1
        assert "ddp_notebook" in process.stderr

    def test_in_pytest_only_this_test_is_run_again(self, tmp_path: Path) -> None:
        source = """
        def train():
            rank = join()
            total = torch.tensor([1.0])
            dist.all_reduce(total)
            dist.destroy_process_group()
            return float(total)

        def note(name):
            open(name, "a").write(".")

        def test_other(): note("other")
        def check():
            env = LightningEnvironment()
            assert make_launcher(env, 2).launch(train) == 2.0
            note("launched")
        def test_one(): check()
        def test_two():
            from treadle_fabric.launchers import settle
            settle()
            check()
        """
        script = Script(tmp_path, source, name="test_it.py")
        (tmp_path / "pytest.ini").write_text("[pytest]\n")
        status, out, err = script.run(command=["-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"])
        assert status == 0, out + err
        assert (tmp_path / "other").read_text() == "."
        assert (tmp_path / "launched").read_text() == "...."

    def test_already_bound_port_of_the_user_is_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MASTER_PORT", "12345")
        assert LightningEnvironment().main_port == 12345


FAILING = """
mode, failing = sys.argv[1], int(sys.argv[2])

def train():
    rank = join()
    if rank == failing:
        time.sleep(0.3)  # until the others wait
        if mode == "raise":
            raise ValueError("the loom is broken")
        if mode == "exit":
            os._exit(3)
        if mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if mode == "sysexit":
            sys.exit(4)
    if rank == 2 and mode == "kill":
        time.sleep(60)  # in Python, where no socket tells it
    dist.all_reduce(torch.ones(1))

if __name__ == "__main__":
    try:
        launcher.launch(train)
    except Exception as exc:
        print(f"caught on {env.global_rank()}: {type(exc).__name__}: {exc}", flush=True)
        raise
    print("passed", flush=True)
"""


class TestFailure:
    @pytest.mark.parametrize(
        ("mode", "failing"),
        [("raise", 0), ("raise", 1), ("sysexit", 0), ("sysexit", 1), ("exit", 1), ("kill", 0), ("kill", 1)],
    )
    def test_all_stop_and_say_why_once(self, tmp_path: Path, mode: str, failing: int) -> None:
        n = 3 if mode in ("raise", "kill") else 2
        script = Script(tmp_path, FAILING, n=n)
        script.start(mode, str(failing))
        script.pid(n - 1)
        start = time.monotonic()
        status, out, err = script.end()
        assert time.monotonic() - start < 10
        assert status != 0
        assert "passed" not in out
        assert err.count("Traceback") == (1 if mode == "raise" else 0), err
        assert list((tmp_path / "tmp").iterdir()) == []
        if mode == "raise":
            assert err.count("ValueError: the loom is broken") == 1
            assert f"caught on {failing}: ValueError: the loom is broken" in out
            for rank in {0, 1, 2} - {failing}:
                assert err.count(f"rank {rank} stopped because rank {failing} failed") == 1
            if failing == 1:
                assert "caught on 0: ProcessFailedError: rank 1 failed first: ValueError: the loom is broken" in out
        elif failing == 1:
            said = {"exit": "rank 1 ended with exit status 3", "kill": "rank 1 was killed by SIGKILL"}
            assert err.count(said.get(mode, "rank 1 called sys.exit(4)")) == 1
        elif mode == "kill":
            assert err.count("rank 0, the launching process, died") == 1

    @pytest.mark.faults
    def test_busy_processes_are_ended(self, tmp_path: Path) -> None:
        source = """
        import multiprocessing

        def train():
            rank = join()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if rank == 1:
                raise ValueError("boom")
            multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,)).start()  # ended with its rank
            time.sleep(60)

        if __name__ == "__main__":
            try:
                launcher.launch(train)
            except ValueError:
                time.sleep(60)  # a clean-up that waits for others
        """
        script = Script(tmp_path, source, n=3)
        script.start()
        script.pid(2)
        start = time.monotonic()
        status, _, err = script.end()
        assert time.monotonic() - start < 12
        assert status == 1
        assert err.count("ValueError: boom") == 1
        assert "rank 0 stopped because rank 1 failed" in err
        assert "rank 2 stopped because rank 1 failed" in err

    def test_after_the_parents_own_code_has_ended(self, tmp_path: Path) -> None:
        source = """
        if __name__ == "__main__":
            launcher.launch(join)
            if env.global_rank() == 1:
                time.sleep(1)
                raise ValueError("late")
        """
        status, _, err = Script(tmp_path, source).run()
        assert status == 1
        assert err.count("ValueError: late") == 1

    def test_outside_of_the_launched_function(self, tmp_path: Path) -> None:
        source = """
        if __name__ == "__main__":
            launcher.launch(join)
            if env.global_rank() == 1:
                raise ValueError("in the script")
            dist.all_reduce(torch.ones(1))
        """
        status, _, err = Script(tmp_path, source).run()
        assert status == 1
        assert err.count("Traceback") == err.count("ValueError: in the script") == 1
        assert "rank 0 stopped because rank 1 failed" in err

    def test_rank_0_has_come_to_its_end(self, tmp_path: Path) -> None:
        source = """
        if __name__ == "__main__":
            launcher.launch(join)
            if env.global_rank() == 1:
                dist.barrier()
        """
        status, _, err = Script(tmp_path, source).run()
        assert status == 1
        assert "rank 0 had come to its end, without an error" in err

    def test_before_the_launch(self, tmp_path: Path) -> None:
        source = """
        if __name__ == "__main__":
            if env.local_rank() == 1:
                raise ValueError('early')
            launcher.launch(join)
        """
        status, _, err = Script(tmp_path, source).run()
        assert status == 1
        assert err.count("ValueError: early") == 1
        assert "before it reached the launch" in err

    def test_caught_on_all_ranks_goes_on(self, tmp_path: Path) -> None:
        source = """
        def train(bad):
            if bad:
                raise ValueError("too large")
            rank = join()
            if rank == 1:
                raise ValueError("second")
            dist.all_reduce(torch.ones(1))

        if __name__ == "__main__":
            try:
                launcher.launch(train, True)
            except ValueError:
                print("caught", flush=True)
            launcher.launch(train, False)
        """
        status, out, err = Script(tmp_path, source).run()
        assert status == 1
        assert out.count("caught") == 2
        assert "too large" not in err
        assert err.count("ValueError: second") == 1

    @pytest.mark.parametrize("to", ["parent", "child", "all"])
    def test_interrupt(self, tmp_path: Path, to: str) -> None:
        source = """
        def train():
            rank = join()
            try:
                if rank == 1:
                    open("ready", "w").close()
                    time.sleep(60)
                dist.all_reduce(torch.ones(1))
            finally:
                print("cleaned", rank, flush=True)

        if __name__ == "__main__":
            launcher.launch(train)
        """
        script = Script(tmp_path, source)
        process = script.start()
        script.wait_for("ready")
        time.sleep(0.3)
        if to == "all":
            os.killpg(process.pid, signal.SIGINT)
        else:
            os.kill(script.pid(0 if to == "parent" else 1), signal.SIGINT)
        start = time.monotonic()
        status, out, err = script.end()
        assert time.monotonic() - start < 10
        assert status != 0
        assert sorted(out.split("\n")) == ["", "cleaned 0", "cleaned 1"]
        assert err.count("KeyboardInterrupt\n") <= 1
        assert " failed" not in err

    @pytest.mark.faults  # takes long
    def test_interrupt_of_one_that_needs_long_to_end(self, tmp_path: Path) -> None:
        source = """
        if env.local_rank() == 1:
            atexit.register(time.sleep, 3)  # after the group has gone, which the others see at once

        if __name__ == "__main__":
            rank = launcher.launch(join)
            try:
                if rank == 1:
                    signal.raise_signal(signal.SIGINT)
                dist.all_reduce(torch.ones(1))
            finally:
                print("cleaned", rank, flush=True)
        """
        status, out, err = Script(tmp_path, source, n=3).run()
        assert status != 0
        assert sorted(out.split("\n")) == ["", "cleaned 0", "cleaned 1", "cleaned 2"]
        assert err.count("KeyboardInterrupt\n") == err.count("Traceback") == 1, err
        assert "rank" not in err, err
        assert "Error" not in err, err


def _double(x: int, tensor: torch.Tensor) -> dict[str, Any]:
    env = LightningEnvironment()
    tensor += env.global_rank() + 1
    return {"x": 2 * x, "tensor": tensor, "rank": env.global_rank(), "world": os.environ["WORLD_SIZE"]}


def _fail(rank: int, how: str) -> None:
    if LightningEnvironment().global_rank() != rank:
        time.sleep(60)
    if how == "raise":
        raise ValueError("spawned and broken")
    os.kill(os.getpid(), signal.SIGKILL)


def _return_a_lambda() -> Any:
    return lambda: None


class TestSpawn:
    @pytest.mark.parametrize("start", ["fork", "spawn"])
    def test_returns_what_rank_zero_returns(self, start: Any) -> None:
        before = dict(os.environ)
        tensor = torch.zeros(3)
        result = SpawnLauncher(LightningEnvironment(), 2, start).launch(_double, 4, tensor=tensor)
        assert result["x"] == 8
        assert result["rank"] == 0
        assert result["world"] == "2"
        assert torch.equal(result["tensor"], torch.ones(3))  # not 3: the ranks do not share memory
        assert torch.equal(tensor, torch.zeros(3))
        assert dict(os.environ) == before

    @pytest.mark.parametrize("how", ["raise", "kill"])
    def test_failure(self, how: str, capfd: pytest.CaptureFixture[str]) -> None:
        start = time.monotonic()
        with pytest.raises(ProcessFailedError) as info:
            SpawnLauncher(LightningEnvironment(), 2, "fork").launch(_fail, 1, how)
        assert time.monotonic() - start < 10
        assert ("ValueError: spawned and broken" if how == "raise" else "killed by SIGKILL") in str(info.value)
        assert "Traceback" not in capfd.readouterr().err

    def test_what_cannot_be_pickled(self) -> None:
        launcher = SpawnLauncher(LightningEnvironment(), 2, "spawn")
        with pytest.raises(MisconfigurationException, match="top level of a module"):
            launcher.launch(lambda: None)
        with pytest.raises(ProcessFailedError, match="plain containers"):
            SpawnLauncher(LightningEnvironment(), 2, "fork").launch(_return_a_lambda)

    def test_script_without_a_guard(self, tmp_path: Path) -> None:
        status, _, err = Script(tmp_path, "launcher.launch(time.time)", start="spawn").run()
        assert status == 1
        assert "if __name__ == '__main__':" in err
        assert "bootstrapping" not in err

    def test_fork_after_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        with pytest.raises(MisconfigurationException, match="CUDA was used in this process already"):
            SpawnLauncher(LightningEnvironment(), 2, "fork").launch(_double, 1, torch.zeros(1))

    def test_fork_after_threads(self, tmp_path: Path) -> None:
        source = """
        def train():
            return float(torch.ones(1_000_000).exp().sum())

        if __name__ == "__main__":
            torch.set_num_threads(2)
            train()
            print(launcher.launch(train) > 0, flush=True)
        """
        script = Script(tmp_path, source, start="fork")
        script.environ["OMP_NUM_THREADS"] = "2"
        script.start()
        status, out, err = script.end(timeout=30)
        assert (status, out) == (0, "True\n"), err

    def test_parent_killed(self, tmp_path: Path) -> None:
        source = """
        def train():
            join()
            open("ready", "w").close()
            time.sleep(60)

        if __name__ == "__main__":
            launcher.launch(train)
        """
        script = Script(tmp_path, source, start="fork")
        process = script.start()
        script.wait_for("ready")
        process.kill()
        _, _, err = script.end(timeout=10)
        assert err.count("the launching process died") == 1

    def test_interrupt(self, tmp_path: Path) -> None:
        source = """
        def train():
            rank = join()
            open(f"ready{rank}", "w").close()
            time.sleep(60)

        if __name__ == "__main__":
            launcher.launch(train)
        """
        script = Script(tmp_path, source, start="fork")
        process = script.start()
        script.wait_for("ready0")
        script.wait_for("ready1")
        process.send_signal(signal.SIGINT)
        status, _, err = script.end(timeout=10)
        assert status != 0
        assert err.count("Traceback") == 1
        assert list((tmp_path / "tmp").iterdir()) == []


class TestExternal:
    def test_calls(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LOCAL_RANK", "1")
        launcher = make_launcher(LightningEnvironment(), 2)
        assert isinstance(launcher, ExternalLauncher)
        assert launcher.is_interactive_compatible
        assert launcher.launch(lambda a, b: a + b, 1, b=2) == 3
        launcher.kill(signal.SIGTERM)

    def test_a_failure_without_a_launch_is_ones_own(self) -> None:
        assert claim_failure(ValueError())
        assert first_failure() is None

    def test_torchrun(self, tmp_path: Path) -> None:
        source = """
        from treadle_fabric.environments import detect_environment

        def train():
            env = detect_environment()
            dist.init_process_group("gloo", rank=env.global_rank(), world_size=env.world_size(), init_method="env://")
            total = torch.tensor([1.0])
            dist.all_reduce(total)
            dist.destroy_process_group()
            print(f"{type(env).__name__} {env.local_rank()} {total.item()}\\n", end="", flush=True)

        make_launcher(detect_environment(), 2).launch(train)
        """
        script = Script(tmp_path, source)
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script.path)]
        status, out, err = script.run(command=command)
        assert status == 0, err
        assert sorted(out.splitlines()) == [f"TorchElasticEnvironment {rank} 2.0" for rank in (0, 1)]


def test_make_launcher() -> None:
    env = LightningEnvironment()
    assert isinstance(make_launcher(env, 2), SubprocessLauncher)
    assert not make_launcher(env, 2).is_interactive_compatible
    assert make_launcher(env, 2, start_method="fork").is_interactive_compatible
    assert not make_launcher(env, 2, start_method="spawn").is_interactive_compatible
