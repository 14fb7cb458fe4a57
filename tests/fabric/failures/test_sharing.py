"""How ranks tell one another of a failure: the notes, what counts as a lost peer, and a store that a rank hosts.

Tests of ``treadle_fabric.failures.store_board``, ``treadle_fabric.failures.folder_board``,
``treadle_fabric.failures.places``, ``treadle_fabric.failures.notes``.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.processes import importing_tests, own_lines

from treadle_fabric.environments import find_free_port
from treadle_fabric.failures import notes
from treadle_fabric.failures.folder_board import FolderBoard
from treadle_fabric.failures.hosts.group import leave_group
from treadle_fabric.failures.member import Member
from treadle_fabric.failures.membership import join_launch, leave_launch
from treadle_fabric.failures.notes import Failure
from treadle_fabric.failures.places import lost_peer
from treadle_fabric.failures.store_board import StoreBoard
from treadle_fabric.launchers import SignalListener

pytestmark = pytest.mark.timeout(120)

RANK = """
import os, signal, sys, time
import torch.distributed as dist
from treadle_fabric import Fabric

how, rank = sys.argv[1], int(os.environ["RANK"])
fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
fabric.launch()
fabric.barrier()
time.sleep(1)
if how == "destroy":
    dist.destroy_process_group()
    if rank == 0:  # the store of the new group is not the old one's, which nobody may find any more
        open("destroyed", "w").close()
        time.sleep(0.5)
    while not os.path.exists("destroyed"):
        time.sleep(0.01)
    dist.init_process_group("gloo")
    dist.barrier()
    dist.destroy_process_group()
    time.sleep(3 * rank)
elif how == "ends" and rank == 0:
    sys.exit(0)
elif rank == 0:
    open("failed_at", "w").write(str(time.time()))
    if how == "raise":
        raise ValueError("the loom is broken")
    if how == "interrupt":
        signal.raise_signal(signal.SIGINT)
    os.kill(os.getpid(), signal.SIGKILL)
else:
    time.sleep(4 if how == "ends" else 60)
print("done")
"""


def run_by_hand(how: str) -> list[tuple[int, str, str]]:
    """Two ranks without a launcher, as SLURM or MPI starts them; status, stdout and stderr of each."""
    Path("rank.py").write_text(textwrap.dedent(RANK))
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "TREADLE", "TORCHELASTIC"))}
    environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(find_free_port()),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    processes = [
        subprocess.Popen(
            [sys.executable, "rank.py", how],
            env={**environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0", "GROUP_RANK": "0"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


@pytest.mark.parametrize(
    ("how", "told"),
    [("raise", "ValueError: the loom is broken"), ("kill", "died and left no traceback"), ("interrupt", "interrupted")],
)
def test_the_rank_that_hosts_the_store_fails_and_the_other_stops(how: str, told: str) -> None:
    (status0, out0, err0), (status1, out1, err1) = run_by_hand(how)
    said = f"{err0}\n----\n{err1}"
    assert time.time() - float(Path("failed_at").read_text()) < 10, said
    assert status0 not in (0, -signal.SIGABRT), said
    assert status1 == (130 if how == "interrupt" else 1), said
    assert own_lines(out0) == own_lines(out1) == [], said
    assert told in err0 + err1, said
    assert err0.count("Traceback") == (how != "kill"), said
    assert "Traceback" not in err1, said
    assert f"rank 1 stopped because rank 0 {'was interrupted' if how == 'interrupt' else 'failed'}" in err1, said


@pytest.mark.parametrize("how", ["destroy", pytest.param("ends", marks=pytest.mark.faults)])  # takes long
def test_a_healthy_end_of_the_hosting_rank_is_no_failure(how: str) -> None:
    for status, _out, err in run_by_hand(how):
        assert status == 0, err
        assert "rank" not in err, err
        assert "terminate" not in err, err


FORKED = """
import multiprocessing, os, sys, time
from treadle_fabric import Fabric, find_free_port

def work(rank, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port}
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    fabric.barrier()
    if rank == 0:
        time.sleep(4)
    elif sys.argv[1] == "raises":
        raise ValueError("the loom is broken")

if __name__ == "__main__":
    port = str(find_free_port())
    processes = [multiprocessing.get_context("fork").Process(target=work, args=(rank, port)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    print(*(process.exitcode for process in processes))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("how", ["ends", "raises"])
def test_a_forked_rank_ends_without_the_interpreters_exit_handlers(how: str) -> None:
    Path("forked.py").write_text(FORKED)
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "TREADLE", "TORCHELASTIC"))}
    environ |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "0"}
    environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "forked.py", how]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert own_lines(done.stdout) == ["0 0" if how == "ends" else "1 1"], done.stderr
    assert done.stderr.count("ValueError: the loom is broken\n") == (how == "raises"), done.stderr
    assert done.stderr.count("rank 0 stopped because rank 1 failed") == (how == "raises"), done.stderr
    assert "died" not in done.stderr, done.stderr


@pytest.fixture
def board() -> Iterator[FolderBoard]:
    board = FolderBoard.create([0, 1])
    yield board
    leave_launch()
    board.remove()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    yield dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=10))
    leave_launch()


class TestBoard:
    def test_two_threads_count_no_failure_twice(self, board: FolderBoard, monkeypatch: pytest.MonkeyPatch) -> None:
        board.claim(Failure(1, 0, "x"))
        both = threading.Barrier(2)
        ask = board.text

        def asked_at_once(name: str) -> str | None:
            found = ask(name)
            if name == notes.FirstFailure(1).name:
                both.wait()
            return found

        monkeypatch.setattr(board, "text", asked_at_once)
        threads = [threading.Thread(target=board.newest) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        monkeypatch.undo()
        assert board.newest() == 1

    def test_who_cannot_leave_a_note_prints_the_failure(self, board: FolderBoard) -> None:
        held, limits = [], resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
            with pytest.raises(OSError, match="Too many open files"):
                while True:
                    held.append(os.open(os.devnull, os.O_RDONLY))
            assert not board.claim(Failure(1, 1, "x"))
            assert board.claim_report(1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for descriptor in held:
                os.close(descriptor)
        assert board.claim_report(1)
        assert not board.claim_report(1)

    def test_too_many_open_files_are_told_to_the_others(self, board: FolderBoard) -> None:
        member = join_launch(Member(board, 1))
        held, limits = [], resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
            try:
                while True:
                    held.append(os.open(os.devnull, os.O_RDONLY))
            except OSError as exc:
                assert member.claim(exc)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for descriptor in held:
                os.close(descriptor)
        failure = board.failure(1)
        assert failure is not None
        assert "Too many open files" in failure.text

    def test_a_note_that_does_not_fit_leaves_no_draft(
        self, board: FolderBoard, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(source: str, target: Path) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "link", full)
        assert not board.claim(Failure(1, 0, "x"))
        assert [path.name for path in board.directory.iterdir()] == [notes.Launch().name]

    def test_it_goes_also_where_it_cannot_be_renamed(self, board: FolderBoard, monkeypatch: pytest.MonkeyPatch) -> None:
        Path(f"{board.directory}-over").mkdir()
        (Path(f"{board.directory}-over") / "file").touch()
        board.remove()
        assert not board.directory.exists()
        board.directory = Path(f"{board.directory}-over")  # the fixture takes it away

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_a_forked_workers_abort_is_not_the_ranks(self, board: FolderBoard) -> None:
        script = f"""
            import multiprocessing, os
            from treadle_fabric.failures.folder_board import FolderBoard
            from treadle_fabric.failures.member import Member
            from treadle_fabric.failures.membership import join_launch
            join_launch(Member(FolderBoard.open({str(board.directory)!r}), 0))
            worker = multiprocessing.get_context("fork").Process(target=os.abort)
            worker.start()
            worker.join()
            assert worker.exitcode == -6
        """
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environ, check=True, timeout=60)
        assert board.crash(0) == ""


class TestPlaces:
    @pytest.mark.parametrize(
        "exc",
        [
            ConnectionRefusedError(111, "Connection refused"),
            RuntimeError("cannot open socket of the tokenizer server"),
            BrokenPipeError(32, "Broken pipe"),
        ],
    )
    def test_an_ordinary_network_error_is_no_lost_peer(self, exc: Exception) -> None:
        with pytest.raises(type(exc)) as caught:
            raise exc
        assert not lost_peer(caught.value)

    def test_a_collectives_is(self) -> None:
        assert lost_peer(dist.DistNetworkError("x"))
        assert lost_peer(RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"))
        collective = compile("def f(error):\n    raise error\n", torch.distributed.__file__, "exec")
        names: dict[str, Any] = {}
        exec(collective, names)
        with pytest.raises(ConnectionResetError) as caught:
            names["f"](ConnectionResetError(104, "Connection reset by peer"))
        assert lost_peer(caught.value)


class TestStoreBoard:
    def test_a_failed_rank_does_not_say_that_it_ended_well(self, store: Any) -> None:
        member = join_launch(Member(StoreBoard(store, "k", 1, 2), 1))
        member.claim(ValueError("x"))
        leave_group()
        board = StoreBoard(store, "k", 0, 2)
        assert board.has(notes.Released(1))
        assert not board.has(notes.Ended(1))

    def test_one_late_answer_does_not_end_it(self, store: Any) -> None:
        board = StoreBoard(store, "k", 1, 2)

        class Late:
            def __init__(self, store: Any) -> None:
                self.clone = store.clone

            def compare_set(self, *args: str) -> bytes:
                raise dist.DistStoreError("wait timeout after 5000ms")

        board._store = Late(store)
        assert board.claim(Failure(1, 1, "x"))
        assert StoreBoard(store, "k", 0, 2).newest() == 1

    def test_a_failure_that_was_seen_outlives_the_store(self, store: Any) -> None:
        board, other = StoreBoard(store, "k", 1, 2), StoreBoard(store, "k", 0, 2)
        other.claim(Failure(1, 0, "x"))
        other.post(notes.Final(1))
        assert board.final_failure() is not None

        def closed(*question: Any) -> Any:
            raise dist.DistNetworkError("Connection was likely closed")

        board._store = type("Closed", (), {"check": closed, "compare_set": closed, "get": closed})()
        assert not board.has(notes.Place(1, 0))
        assert not board.exists()
        failure = board.final_failure()
        assert failure is not None
        assert failure.text == "x"
        assert board.newest() == 1
        assert board.claim_report(1)
        assert not board.claim_report(1)


FORKS_UNDER_A_SIGNAL = """
import os, signal, threading, time
os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGTERM))  # at once, before any other of these
from treadle_fabric.launchers import SignalListener
heard, came = [], threading.Event()
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: os._exit(7) if os.getpid() != parent else None)
parent = os.getpid()
SignalListener(lambda number: (heard.append(number), number == signal.SIGUSR1 and came.set()))
child = os.fork()
if not child:
    time.sleep(30)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7, "its handler was called"
os.kill(parent, signal.SIGUSR1)
assert came.wait(30)
assert heard == [signal.SIGUSR1], heard
assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
"""


class TestSignalListener:
    def test_a_signal_to_a_process_that_is_being_forked_is_not_heard_by_its_parent(self) -> None:
        subprocess.run([sys.executable, "-c", FORKS_UNDER_A_SIGNAL], check=True, timeout=60, env=importing_tests())

    def test_one_that_is_made_while_another_closes_is_kept(self) -> None:
        before = SignalListener._listeners
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            for _ in range(50):
                old = [SignalListener(lambda number: None) for _ in range(3)]
                thread = threading.Thread(target=lambda old=old: [one.close() for one in old])
                thread.start()
                new = [SignalListener(lambda number: None) for _ in range(3)]
                thread.join()
                assert SignalListener._listeners == (*before, *new)
                for one in new:
                    one.close()
        finally:
            sys.setswitchinterval(interval)
            SignalListener._listeners = before
            signal.set_wakeup_fd(-1)

    def test_it_hears(self) -> None:
        heard = threading.Event()
        listener = SignalListener(lambda number: heard.set() if number == signal.SIGUSR2 else None)
        handler = signal.signal(signal.SIGUSR2, lambda number, frame: None)
        try:
            signal.raise_signal(signal.SIGUSR2)
            assert heard.wait(5)
        finally:
            signal.signal(signal.SIGUSR2, handler)
            listener.close()
            signal.set_wakeup_fd(-1)
