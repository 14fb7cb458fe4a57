"""Saves in the background: what is in the file, what is waited for, and where errors go.

Tests of ``treadle_fabric.checkpoint.asynchronous``, ``treadle_fabric.tensor_pickle``.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import importing_tests, thread_runs, wait_until

from treadle_fabric import AsyncCheckpointIO, CheckpointError, Fabric, MisconfigurationException, TorchCheckpointIO
from treadle_fabric.checkpoint import CheckpointIO


class Slow(TorchCheckpointIO):
    """Writes when it is let, and keeps a record."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.done: list[str] = []
        self.fails = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        assert self.gate.wait(30)
        if self.fails:
            raise CheckpointError(f"No space left for {path}")
        super().save_checkpoint(checkpoint, path, storage_options)
        self.done.append(f"save {os.path.basename(path)}")

    def remove_checkpoint(self, path: Any) -> None:
        super().remove_checkpoint(path)
        self.done.append(f"remove {os.path.basename(path)}")


def test_later_changes_do_not_reach_the_file(tmp_path: Path) -> None:
    slow = Slow()
    io = AsyncCheckpointIO(slow)
    weights = torch.arange(6.0)
    state: dict[str, Any] = {"weights": weights, "row": weights[2:4], "names": ["a"], "deep": {"step": 1}}
    io.save_checkpoint(state, tmp_path / "a.ckpt")
    assert os.listdir(tmp_path) == []  # it returned before anything was written
    weights += 100
    state["names"].append("b")
    state["deep"]["step"] = 2
    slow.gate.set()
    loaded = io.load_checkpoint(tmp_path / "a.ckpt")  # waits for it
    assert loaded["weights"].tolist() == [0, 1, 2, 3, 4, 5] and loaded["row"].tolist() == [2, 3]
    assert loaded["names"] == ["a"] and loaded["deep"] == {"step": 1}
    assert loaded["row"].untyped_storage().data_ptr() == loaded["weights"].untyped_storage().data_ptr()
    io.teardown()


def test_the_file_is_the_one_that_a_save_in_the_foreground_writes(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    model[0].bias = torch.nn.Parameter(model[1].bias.detach())  # shares memory
    state = {
        "model": model.state_dict(),
        "ordered": OrderedDict(a=1),
        "odd": [torch.ones(2, dtype=torch.bfloat16), torch.tensor(1j), torch.zeros(0), torch.ones(3, 4).t()],
        "sparse": torch.eye(3).to_sparse(),
        "device": torch.device("cpu"),
    }
    TorchCheckpointIO().save_checkpoint(state, tmp_path / "now")
    io = AsyncCheckpointIO()
    io.save_checkpoint(state, tmp_path / "later")
    io.teardown()
    now, later = (torch.load(tmp_path / name, weights_only=True) for name in ("now", "later"))
    assert str(now) == str(later) and now["model"]._metadata == later["model"]._metadata
    assert (tmp_path / "now").stat().st_size == (tmp_path / "later").stat().st_size


def test_one_write_at_a_time_and_removals_in_their_order(tmp_path: Path) -> None:
    slow = Slow()
    io = AsyncCheckpointIO(slow)
    weights = torch.zeros(3)
    io.save_checkpoint({"w": weights}, tmp_path / "old")
    io.remove_checkpoint(tmp_path / "older")
    done_before: list[str] = []

    def save_again() -> None:
        io.save_checkpoint({"w": weights + 1}, tmp_path / "new")
        done_before.extend(slow.done[:2])

    second = threading.Thread(target=save_again)
    second.start()
    wait_until(lambda: thread_runs("wait", second) or not second.is_alive())
    assert second.is_alive() and slow.done == []
    slow.gate.set()
    second.join(30)
    assert done_before == ["save old", "remove older"]
    io.remove_checkpoint(tmp_path / "old")
    io.teardown()
    assert slow.done == ["save old", "remove older", "save new", "remove old"]
    assert os.listdir(tmp_path) == ["new"]


@pytest.mark.parametrize("last", ["save", "load", "wait", "teardown"])
def test_an_error_is_raised_once_and_nothing_is_removed_after_it(tmp_path: Path, last: str) -> None:
    slow = Slow()
    slow.gate.set()
    io = AsyncCheckpointIO(slow)
    io.save_checkpoint({"n": 1}, tmp_path / "old")
    io.wait()
    slow.fails = True
    io.save_checkpoint({"n": 2}, tmp_path / "new")
    io.remove_checkpoint(tmp_path / "old")
    calls = {
        "save": lambda: io.save_checkpoint({"n": 3}, tmp_path / "newer"),
        "load": lambda: io.load_checkpoint(tmp_path / "old"),
        "wait": io.wait,
        "teardown": io.teardown,
    }
    with pytest.raises(CheckpointError, match="No space left for .*new"):
        calls[last]()
    slow.fails = False
    io.save_checkpoint({"n": 4}, tmp_path / "newest")  # it goes on
    io.teardown()
    assert sorted(os.listdir(tmp_path)) == ["newest", "old"]


def test_what_cannot_be_pickled_is_said_at_once(tmp_path: Path) -> None:
    io = AsyncCheckpointIO()
    with pytest.raises(CheckpointError, match=r"state\['a'\]\['f'\].*pickled"):
        io.save_checkpoint({"a": {"f": lambda: 0}}, tmp_path / "x")
    io.teardown()
    assert os.listdir(tmp_path) == []


def test_what_it_wraps_is_checked() -> None:
    with pytest.raises(MisconfigurationException, match="CheckpointIO"):
        AsyncCheckpointIO("disk")  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match="already"):
        AsyncCheckpointIO(AsyncCheckpointIO())


def test_it_can_be_copied_and_sent_while_it_writes(tmp_path: Path) -> None:
    before = threading.active_count()
    io = AsyncCheckpointIO()
    io.save_checkpoint({"n": 1}, tmp_path / "a")
    for twin in (pickle.loads(pickle.dumps(io)), copy.deepcopy(io)):
        twin.save_checkpoint({"n": 2}, tmp_path / "b")
        twin.teardown()
        assert isinstance(twin.checkpoint_io, TorchCheckpointIO)
    io.teardown()
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    assert threading.active_count() == before


def test_fabric_saves_with_it(tmp_path: Path) -> None:
    slow = Slow()
    fabric = Fabric(accelerator="cpu", devices=1, plugins=AsyncCheckpointIO(slow))
    fabric.launch()
    model = fabric.setup(torch.nn.Linear(2, 1))
    before = model.weight.detach().clone()
    fabric.save(tmp_path / "a.ckpt", {"model": model})
    with torch.no_grad():
        model.weight.fill_(7)
    slow.gate.set()
    fabric.load(tmp_path / "a.ckpt", {"model": model})
    assert torch.equal(model.weight, before)
    fabric.strategy.teardown()


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    prelude = """
    import os, sys, torch
    from tests.processes import thread_runs, wait_until
    from treadle_fabric import AsyncCheckpointIO, CheckpointError, Fabric, TorchCheckpointIO
    class Slow(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint, path, storage_options=None):
            self.hold(path)
            super().save_checkpoint(checkpoint, path)
        def hold(self, path):
            wait_until(lambda: not thread_runs("<module>"))  # the program has come to its end
    class Full(Slow):
        def save_checkpoint(self, checkpoint, path, storage_options=None):
            raise CheckpointError("No space left")
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(code)],
        cwd=folder, capture_output=True, text=True, timeout=60, env=importing_tests(),
    )  # fmt: skip


ENDS = {"": 0, "sys.exit(3)": 3, "raise RuntimeError('the run failed')": 1}


def test_the_end_of_the_process_waits(tmp_path: Path) -> None:
    code = f"""
    for number, end in enumerate({list(ENDS)}):
        if os.fork() == 0:  # goes on below, and ends as a program does
            AsyncCheckpointIO(Slow()).save_checkpoint({{"n": 5}}, f"{{number}}.ckpt")
            exec(end)
            break
        print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
    """
    result = run(code, tmp_path)
    assert result.returncode == 0 and result.stdout.split() == [str(status) for status in ENDS.values()], result.stderr
    for number in range(len(ENDS)):
        assert TorchCheckpointIO().load_checkpoint(tmp_path / f"{number}.ckpt")["n"] == 5


def test_an_error_that_nobody_asked_for_is_printed_and_is_the_exit_status(tmp_path: Path) -> None:
    result = run("AsyncCheckpointIO(Full()).save_checkpoint({'n': 5}, 'a.ckpt')\nprint('done')", tmp_path)
    assert result.returncode == 1 and result.stdout == "done\n"
    assert "No space left" in result.stderr and "in the background was not written" in result.stderr


def test_two_ranks_read_what_rank_zero_has_only_begun_to_write(tmp_path: Path) -> None:
    code = """
    class SlowRank(Slow):
        def hold(self, path):
            if str(path).endswith("a.ckpt"):
                wait_until(lambda: os.path.exists("reading0") and os.path.exists("reading1"))
            else:
                wait_until(lambda: not thread_runs("work"))
    if __name__ == "__main__":
        fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp_fork", plugins=AsyncCheckpointIO(SlowRank()))
        def work(fabric):
            fabric.save("a.ckpt", {"n": 5})
            open(f"reading{fabric.global_rank}", "w").close()
            assert fabric.load("a.ckpt")["n"] == 5
            fabric.save("b.ckpt", {"n": 6})
        fabric.launch(work)
        assert os.path.exists("b.ckpt")
    """
    result = run(code, tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.gpu
def test_the_copy_off_the_gpu_is_of_the_moment(tmp_path: Path) -> None:
    weights = torch.zeros(10_000_000, device="cuda")
    io: CheckpointIO = AsyncCheckpointIO()
    for step in range(5):
        weights += 1
        io.save_checkpoint({"w": weights, "view": weights[:5]}, tmp_path / "a")
        weights += 100
        loaded = io.load_checkpoint(tmp_path / "a")
        assert loaded["w"].device.type == "cpu" and bool((loaded["w"] == 101 * step + 1).all())
    io.teardown()
