"""A program's own handlers of the signals that end a fit are called, once, after the save.

Tests of ``treadle.run.signals``, ``treadle.trainer.session``, ``treadle.trainer.outcome``,
``treadle_fabric.launchers.spawn``.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from tests.processes import importing_tests
from tests.slurm import install_scontrol, task
from tests.trainer import preempted
from tests.trainer.models import Net, loader, trainer
from torch import Tensor

import treadle as L
from treadle_fabric import AsyncCheckpointIO, SignalListener, TorchCheckpointIO, find_free_port

Handler = Callable[[int, FrameType | None], Any]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Put the handlers back that were there before the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Handles:
    """A handler that notes what it is called with, and may do something then."""

    def __init__(self, number: int = signal.SIGTERM, then: Callable[[], object] = lambda: None) -> None:
        self.calls: list[tuple[int, str, bool, bool]] = []
        self._then = then
        signal.signal(number, self)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        in_main = threading.current_thread() is threading.main_thread()
        names = []
        while frame is not None:
            names.append(frame.f_code.co_name)
            frame = frame.f_back
        self.calls.append((number, str("training_step" in names), in_main, saved().exists()))
        self._then()


def saved() -> Path:
    return Path("checkpoints", "preempted.ckpt")


class Signalled(Net):
    """Gets a signal in the second of its batches, or calls something else there."""

    def __init__(self, number: int = signal.SIGTERM, act: Callable[[], object] | None = None) -> None:
        super().__init__()
        self.act = act if act is not None else lambda: os.kill(os.getpid(), number)
        self.finished: list[int] = []
        self.exceptions: list[BaseException] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if batch_idx == 1 and self.current_epoch == 0:
            self.act()
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.finished.append(batch_idx)

    def configure_callbacks(self) -> L.Callback:
        return Listens(self.exceptions)


class Listens(L.Callback):
    def __init__(self, exceptions: list[BaseException]) -> None:
        self.exceptions = exceptions

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.exceptions.append(exception)


def fit(model: L.LightningModule, **arguments: Any) -> tuple[L.Trainer, int | str | None]:
    """Fit in this folder; return the trainer, and the exit status that a program would have."""
    run = trainer(Path.cwd(), **{"max_epochs": 2, "enable_checkpointing": True, **arguments})
    try:
        run.fit(model, loader(8))
    except SystemExit as end:
        return run, end.code
    return run, 0


def leave(status: object) -> Callable[[], None]:
    return lambda: sys.exit(status)  # type: ignore[arg-type]


@pytest.fixture
def in_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    job = task(port=find_free_port()) | {"PATH": install_scontrol(Path("slurm").absolute())}
    for name, value in job.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize(("answer", "status"), [(75, 75), (0, 0), (None, None), ("returns", 143)])
def test_it_is_called_once_after_the_save_and_its_exit_status_is_the_run_s(
    number: int, answer: object, status: object, in_slurm: None
) -> None:
    handler = Handles(number, (lambda: None) if answer == "returns" else leave(answer))
    model = Signalled(number)
    run, ended = fit(model)
    assert handler.calls == [(number, "True", True, True)]
    assert not Path("slurm/asked").exists()  # the handler decides whether the job is queued again
    assert ended == status
    assert model.finished == [0, 1]
    assert [error.code for error in model.exceptions if isinstance(error, SystemExit)] == [status]
    assert run.received_sigterm
    assert signal.getsignal(number) is handler
    assert torch.load(saved(), weights_only=True)["global_step"] == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("python_s", [signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler])
def test_those_of_python_are_not_called(number: int, python_s: Any, in_slurm: None) -> None:
    signal.signal(number, python_s)
    assert fit(Signalled(number))[1] == 143
    assert (saved() if number == signal.SIGTERM else Path("hpc_ckpt_1.ckpt")).exists()
    assert signal.getsignal(number) is python_s


def test_an_error_of_the_handler_ends_the_run() -> None:
    def fail() -> None:
        raise ValueError("cannot queue again")

    Handles(then=fail)
    model = Signalled()
    with pytest.raises(ValueError, match="cannot queue again") as raised:
        fit(model)
    assert model.exceptions == [raised.value]
    assert saved().exists()


def test_an_interrupt_by_the_handler_ends_the_run_as_ctrl_c_does() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    handler = Handles(then=interrupt)
    run, status = fit(Signalled())
    assert (status, run.interrupted, run.received_sigterm, len(handler.calls)) == (1, True, True, 1)


def test_where_nothing_is_saved_it_is_called_where_the_run_ends() -> None:
    handler = Handles(then=leave(75))
    model = Signalled()
    assert fit(model, enable_checkpointing=False)[1] == 75
    assert [call[3] for call in handler.calls] == [False]
    assert model.finished == [0, 1]


def test_it_is_called_after_a_save_that_goes_on_beside_training() -> None:
    awaited = threading.Event()

    class Slow(TorchCheckpointIO):
        def save_checkpoint(self, *arguments: Any, **kwargs: Any) -> None:
            assert awaited.wait(20)
            super().save_checkpoint(*arguments, **kwargs)

    class Awaits(AsyncCheckpointIO):
        def wait(self) -> None:
            awaited.set()
            super().wait()

    handler = Handles(then=leave(75))
    assert fit(Signalled(), plugins=[Awaits(Slow())])[1] == 75
    assert [call[3] for call in handler.calls] == [True]


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_end", "teardown"])
def test_before_the_first_batch_and_after_the_last(hook: str) -> None:
    handler = Handles(then=leave(75))
    model = Signalled(act=lambda: None)
    setattr(model, hook, lambda *stage: os.kill(os.getpid(), signal.SIGTERM))
    assert fit(model)[1] == 75
    assert len(handler.calls) == 1
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_second_signal_and_one_in_the_middle_of_a_save_are_the_same_call() -> None:
    class Model(Signalled):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    def again() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    handler = Handles(then=again)
    assert fit(Model())[1] == 143
    assert len(handler.calls) == 1


@pytest.mark.parametrize("numbers", [(signal.SIGTERM, signal.SIGUSR1), (signal.SIGUSR1, signal.SIGTERM)])
def test_two_signals_call_two_handlers_the_first_one_first(numbers: tuple[int, int], in_slurm: None) -> None:
    order: list[int] = []
    for number in numbers:
        Handles(number, partial(order.append, number))

    def both() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    assert fit(Signalled(act=both))[1] == 143
    assert order == list(numbers)


def test_a_handler_may_save_and_set_should_stop() -> None:
    def save() -> None:
        run.save_checkpoint("mine.ckpt")
        run.should_stop = True

    Handles(then=save)
    run = trainer(Path.cwd(), max_epochs=2)
    with pytest.raises(SystemExit) as ended:
        run.fit(Signalled(), loader(8))
    assert ended.value.code == 143
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    model, again = Signalled(act=lambda: None), trainer(Path.cwd(), max_epochs=2)
    again.fit(model, loader(8), ckpt_path="mine.ckpt")
    assert model.finished == [2, 3, 0, 1, 2, 3]


def test_an_error_that_ends_the_run_meanwhile_stands() -> None:
    class Fails(Signalled):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                raise ValueError("the batch was bad")

    handler = Handles(then=leave(75))
    with pytest.raises(ValueError, match="the batch was bad") as raised:
        fit(Fails())
    assert len(handler.calls) == 1
    assert raised.value.__notes__ == ["Then the handler of a signal that had come raised SystemExit(75)."]


def test_one_that_is_set_during_fit_is_called_at_once_and_stays() -> None:
    """The run saves and ends all the same, once a thread has heard of the signal."""
    before = Handles()
    found: list[Handles] = []
    heard = threading.Event()

    class Sets(Signalled):
        def on_train_start(self) -> None:
            self.listener = SignalListener(lambda number: heard.set())  # is told after the one that fit listens with
            found.append(Handles())

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            assert batch_idx != 1 or heard.wait(20)
            return loss

    model = Sets()
    assert fit(model)[1] == 143
    model.listener.close()
    assert [call[3] for call in found[0].calls] == [False], "before the save"
    assert before.calls == []
    assert model.finished == [0, 1]
    assert saved().exists()
    assert signal.getsignal(signal.SIGTERM) is found[0]


def test_one_that_is_set_during_fit_may_call_the_one_that_it_replaced() -> None:
    before = Handles()

    class Sets(Signalled):
        def on_train_start(self) -> None:
            replaced: Any = signal.getsignal(signal.SIGTERM)
            signal.signal(signal.SIGTERM, lambda number, frame: replaced(number, frame))

    assert fit(Sets())[1] == 143
    assert [call[3] for call in before.calls] == [True], "after the save"
    os.kill(os.getpid(), signal.SIGTERM)
    assert len(before.calls) == 2, "after fit it is called at once"


def test_one_that_ignores_the_signal_from_now_on_is_heeded() -> None:
    model = Signalled()
    model.on_train_start = lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN)  # type: ignore[method-assign,assignment]
    assert fit(model)[1] == 0
    assert len(model.finished) == 8


@pytest.mark.parametrize("caught", [False, True])
def test_a_fit_within_a_fit_ends_both(caught: bool) -> None:
    handler = Handles(then=leave(75))

    class Outer(Signalled):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                inner = Signalled()
                run = trainer(Path.cwd() / "inner", max_epochs=2)
                try:
                    run.fit(inner, loader(8))
                except SystemExit:
                    found.append(inner)
                    if not caught:
                        raise
            super().on_train_batch_end(outputs, batch, batch_idx)

    found: list[Signalled] = []
    model = Outer(act=lambda: None)
    assert fit(model)[1] == 75
    assert [inner.finished for inner in found] == [[0, 1]]
    assert model.finished == ([0, 1] if caught else [0])
    assert len(handler.calls) == 1


def test_outside_of_fit_it_is_called_at_once() -> None:
    handler = Handles()

    class Model(Net):
        def test_step(self, batch: Tensor, batch_idx: int) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            assert len(handler.calls) == batch_idx + 1

    trainer(Path.cwd()).test(Model(), loader(8), verbose=False)
    assert len(handler.calls) == 4


def test_a_fit_in_another_thread_leaves_it_alone() -> None:
    handler = Handles()
    model = Signalled(act=lambda: None)
    reached, go_on = threading.Event(), threading.Event()

    def act() -> None:
        reached.set()
        assert go_on.wait(20)

    model.act = act
    thread = threading.Thread(target=fit, args=(model,))
    thread.start()
    assert reached.wait(20)
    os.kill(os.getpid(), signal.SIGTERM)
    assert len(handler.calls) == 1
    go_on.set()
    thread.join(20)
    assert len(model.finished) == 8


def _wait(runs: Any) -> None:
    runs.set()
    threading.Event().wait(30)


def test_a_process_that_is_forked_during_fit_ends_as_without_fit() -> None:
    statuses: list[int | None] = []

    def act() -> None:
        context = multiprocessing.get_context("fork")
        process = context.Process(target=_wait, args=(runs := context.Event(),))
        process.start()
        assert runs.wait(20)
        process.terminate()
        process.join(20)
        statuses.append(process.exitcode)

    assert fit(Signalled(act=act))[1] == 0
    assert statuses == [-signal.SIGTERM]


def run_two(mode: str, strategy: str, answer: str, **environ: str) -> tuple[int, str, list[str]]:
    """Two ranks, one of which gets a signal; the exit status, what was said, and the calls of the handler."""
    done = subprocess.run(
        [sys.executable, preempted.__file__, mode, strategy],
        env={**importing_tests(), "ANSWER": answer, **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = Path("said").read_text().splitlines()
    Path("said").unlink()
    assert len([line for line in lines if line.startswith("exception")]) == 2, done.stderr
    assert saved().exists()
    return done.returncode, done.stderr, [line for line in lines if line.startswith("handled")]


@pytest.mark.parametrize(
    ("mode", "strategy", "called"),
    [
        pytest.param("term", "auto", "1", marks=pytest.mark.faults),  # takes long
        ("term", "ddp_fork", "1"),
        pytest.param("term of the parent", "ddp_fork", "parent", marks=pytest.mark.faults),
    ],
)
def test_of_two_ranks_the_one_that_got_the_signal_calls_it(mode: str, strategy: str, called: str) -> None:
    """Or the process that waits for the ranks; a status that it exits with is that of the run."""
    status, stderr, handled = run_two(mode, strategy, "75")
    assert handled == [f"handled {called} SIGTERM saved"], stderr
    assert status == 75, stderr
    assert "Traceback" not in stderr


@pytest.mark.faults  # takes long
def test_of_two_ranks_an_error_of_the_handler_is_shown_and_ends_both() -> None:
    status, stderr, handled = run_two("term", "auto", "error")
    assert handled == ["handled 1 SIGTERM saved"]
    assert status == 1
    assert stderr.count("ValueError: the handler failed") == 1, stderr
