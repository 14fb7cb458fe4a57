"""The protocol of failures on a board in memory: no processes, and a clock that the test moves.

Tests of ``treadle_fabric.failures.member``, ``treadle_fabric.failures.grace``, ``treadle_fabric.failures.notes``,
``treadle_fabric.failures.board``, ``treadle_fabric.failures.memory_board``, ``treadle_fabric.failures.report``.
"""

from __future__ import annotations

import dataclasses
import functools
import signal
from collections.abc import Callable
from typing import Any, NoReturn

import pytest

from treadle_fabric.failures import grace, notes
from treadle_fabric.failures.member import Member
from treadle_fabric.failures.memory_board import MemoryBoard
from treadle_fabric.failures.notes import Failure, Whereabouts
from treadle_fabric.failures.places import describe_hang
from treadle_fabric.failures.process import Process
from treadle_fabric.launchers.supervisor import Supervisor

LOST = "[pair.cc:547] gloo/transport: Connection closed by peer"
TIMED_OUT = "[gloo] Timed out waiting 3000ms for recv operation to complete"
TICK = grace.LOOK_INTERVAL


class Ended(BaseException):
    """In place of the end of a process."""


class World:
    """Ranks with one board, which look at it as time passes, until they end.

    Args:
        ranks: The number of ranks.
        has_launcher: Whether rank 0 is a launching process.
    """

    def __init__(self, ranks: int = 3, has_launcher: bool = True, speaks: bool = True) -> None:
        self.time = 0.0
        self.said: list[str] = []
        self.statuses: dict[int, int] = {}
        self.ended_at: dict[int, float] = {}
        self.plan: list[tuple[float, Callable[[], object]]] = []
        self.board = MemoryBoard(range(ranks), has_launcher=has_launcher)
        self.members = [
            Member(self.board, rank, launches=has_launcher and rank == 0, speaks=speaks, process=self.process(rank))
            for rank in range(ranks)
        ]
        for rank in range(ranks):
            self.board.post(notes.Joined(rank))

    def process(self, rank: int) -> Process:
        return Process(lambda: self.time, self.sleep, self.say, functools.partial(self.end, rank))

    def say(self, text: str) -> None:
        self.said += [text] if text else []

    def end(self, rank: int, status: int) -> NoReturn:
        self.statuses[rank] = status
        self.ended_at[rank] = self.time
        raise Ended

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        due = [do for when, do in self.plan if when <= self.time]
        self.plan = [(when, do) for when, do in self.plan if when > self.time]
        for do in due:
            do()

    def at(self, seconds: float, do: Callable[[], object]) -> None:
        """Do something once so many seconds have passed, whichever rank waits then."""
        self.plan.append((seconds, do))

    def run(self, seconds: float, *ranks: int) -> None:
        """Let these ranks look at the board for so many seconds."""
        until = self.time + seconds
        while self.time < until:
            self.sleep(TICK)
            for rank in ranks:
                if rank not in self.statuses:
                    self.ends(rank, self.members[rank].look)

    def ends(self, rank: int, do: Callable[[], object]) -> bool:
        """Whether the rank's process ends in doing so."""
        try:
            do()
        except Ended:
            return True
        return False

    def fail(self, rank: int, text: str = "the loom is broken") -> ValueError:
        """Have an exception leave the launched function of a rank."""
        try:
            raise ValueError(f"{text} on {rank}")
        except ValueError as error:
            self.members[rank].claim(error)
            return error

    def go_down(self, rank: int, error: BaseException) -> None:
        """Have an exception leave the script of a rank."""
        self.members[rank].go_down(error, lambda: self.say(f"Traceback of {rank}: {error}"))


@pytest.fixture
def world() -> World:
    return World()


class TestGrace:
    @pytest.mark.parametrize(
        ("rule", "seconds", "step"),
        [
            (grace.STUCK, 0.0, grace.Step.WAIT),
            (grace.STUCK, 2.0, grace.Step.WAIT),
            (grace.STUCK, 2.1, grace.Step.END),
            (grace.STUCK, 2.7, grace.Step.TERMINATE),
            (grace.STUCK, 3.9, grace.Step.KILL),
            (grace.FAILING, 6.9, grace.Step.WAIT),
            (grace.FAILING, 7.1, grace.Step.END),
            (grace.FAILING, 7.7, grace.Step.TERMINATE),
            (grace.FAILING, 8.9, grace.Step.KILL),
            (grace.STUCK_LAUNCHER, 2.9, grace.Step.WAIT),
            (grace.STUCK_LAUNCHER, 60.0, grace.Step.END),
            (grace.FAILING_LAUNCHER, 8.4, grace.Step.WAIT),
            (grace.FAILING_LAUNCHER, 60.0, grace.Step.END),
            (grace.INTERRUPTED, 0.4, grace.Step.WAIT),
            (grace.INTERRUPTED, 0.6, grace.Step.INTERRUPT),
            (grace.INTERRUPTED, 4.1, grace.Step.TERMINATE),
            (grace.INTERRUPTED, 7.1, grace.Step.KILL),
        ],
    )
    def test_the_strongest_step_that_is_due(self, rule: Any, seconds: float, step: grace.Step) -> None:
        assert grace.due(rule, seconds) is step

    def test_all_of_it_fits_into_ten_seconds(self) -> None:
        for rule in (grace.STUCK, grace.FAILING, grace.STUCK_LAUNCHER, grace.FAILING_LAUNCHER, grace.INTERRUPTED):
            assert max(rule.values()) < 9
            assert list(rule) == sorted(rule)
            assert list(rule.values()) == sorted(rule.values())

    def test_a_process_can_say_why_before_its_launcher_ends_it(self) -> None:
        for rule in (grace.STUCK, grace.FAILING):
            assert rule[grace.Step.TERMINATE] - rule[grace.Step.END] > 2 * TICK
        assert grace.STUCK_LAUNCHER[grace.Step.END] > grace.STUCK[grace.Step.END]
        assert grace.FAILING_LAUNCHER[grace.Step.END] > grace.FAILING[grace.Step.END]

    def test_a_stopwatch_measures_an_unbroken_time(self) -> None:
        times = iter([10.0, 10.0, 11.5, 20.0, 20.0])
        watch = grace.Stopwatch(lambda: next(times))
        assert [watch.seconds(holds) for holds in (False, True, True, False, True)] == [0, 0, 1.5, 0, 0]


CONTENTS = {
    notes.Launch: notes.LaunchInfo(7, [0, 1]),
    notes.Peer: notes.ProcessIdentity(7, None),
    notes.FirstFailure: Failure(2, 1, "Traceback\n  ValueError: ö\n", hangs=True, status=143),
    notes.Place: Whereabouts(True, "  line\n"),
    notes.Done: notes.Progress(3, {"0": 7}),
    notes.Held: notes.Progress(4, {"0": 8}, "  line\n"),
    notes.Crash: 'Current thread\n  File "x"',
}


def examples(base: type[notes.Note[Any]] = notes.Note) -> list[notes.Note[Any]]:
    """A note of each type."""
    found = []
    for kind in base.__subclasses__():
        found += [] if kind.__name__.startswith("_") else [kind(*range(1, 1 + len(dataclasses.fields(kind))))]
        found += examples(kind)
    return found


@pytest.mark.parametrize("note", examples(), ids=lambda note: note.name)
def test_a_note_is_read_as_it_was_written(note: notes.Note[Any]) -> None:
    content = CONTENTS.get(type(note), "")
    board = MemoryBoard([0, 1])
    assert board.read(note) is None
    assert board.post(note, content)
    assert board.read(note) == content
    assert not board.post(note, content)
    assert [other for other in examples() if board.has(other)] == [note]


class TestFailures:
    def test_the_first_to_claim_owns_the_failure(self, world: World) -> None:
        assert world.members[1].claim(ValueError("first"))
        assert not world.members[2].claim(ValueError("second"))
        failure = world.board.newest_failure()
        assert failure is not None
        assert (failure.number, failure.rank, failure.summary) == (1, 1, "ValueError: first")

    def test_an_exception_is_one_failure_however_often_it_is_claimed(self, world: World) -> None:
        error = world.fail(1)
        assert world.members[1].claim(error)
        outer = RuntimeError("a clean-up failed, too")
        outer.__context__ = error
        assert world.members[1].claim(outer)
        assert world.board.newest() == 1

    @pytest.mark.parametrize("error", [SystemExit(0), SystemExit(None), GeneratorExit()])
    def test_a_healthy_end_is_no_failure(self, world: World, error: BaseException) -> None:
        assert world.members[1].claim(error)
        assert world.board.newest() == 0

    def test_caught_on_all_ranks_it_ends_nobody_and_the_next_has_the_next_number(self, world: World) -> None:
        for rank in range(3):
            world.fail(rank)
        assert world.board.final_failure() is None
        world.run(20, 0, 1, 2)
        assert world.statuses == {}
        world.fail(2, "again")
        failure = world.board.final_failure()
        assert failure is not None
        assert (failure.number, failure.rank) == (2, 2)

    def test_a_rank_that_has_not_joined_makes_nothing_final(self) -> None:
        board = MemoryBoard([0, 1])
        board.post(notes.Joined(0))
        Member(board, 0).claim(ValueError())
        assert board.final_failure() is None
        board.post(notes.Joined(1))
        assert board.final_failure() is not None

    def test_stuck_ranks_end_and_say_so_after_the_first(self, world: World) -> None:
        world.go_down(1, world.fail(1))
        world.run(12, 1, 2)
        assert world.statuses == {2: 1}  # not rank 1, whose clean-up its launcher limits
        assert grace.STUCK[grace.Step.END] < world.ended_at[2] < grace.STUCK[grace.Step.TERMINATE]
        assert world.said == ["Traceback of 1: the loom is broken on 1", "rank 2 stopped because rank 1 failed"]

    def test_where_what_started_them_ends_all_a_stuck_rank_ends_nothing(self, world: World) -> None:
        world.members[2].ends_itself = False
        world.go_down(1, world.fail(1))
        world.run(12, 2)
        assert not world.statuses
        assert not world.members[2].claim(ValueError("what followed"))  # it knows that another one was first

    def test_a_rank_that_failed_too_has_longer_to_clean_up(self, world: World) -> None:
        error = world.fail(1)
        world.fail(2)
        world.go_down(1, error)
        world.run(12, 2)
        assert grace.FAILING[grace.Step.END] < world.ended_at[2] < grace.FAILING[grace.Step.TERMINATE]

    def test_who_goes_down_after_another_rank_says_only_that(self, world: World) -> None:
        world.go_down(1, world.fail(1))
        world.go_down(2, world.fail(2))
        assert world.said[-1] == "rank 2 stopped because rank 1 failed"
        assert not any("Traceback of 2" in text for text in world.said)

    def test_where_the_first_is_busy_with_its_clean_up_another_prints_its_traceback(self, world: World) -> None:
        world.fail(1)
        world.go_down(2, world.fail(2))
        assert world.time >= grace.REPORT_WAIT
        assert [text.splitlines()[0] for text in world.said] == [
            "rank 1 failed:",
            "rank 2 stopped because rank 1 failed",
        ]
        world.go_down(1, ValueError("the same"))

    def test_it_is_printed_once(self, world: World) -> None:
        error = world.fail(1)
        world.at(0.5, lambda: world.go_down(1, error))
        world.go_down(2, world.fail(2))
        assert sum("the loom is broken on 1" in text for text in world.said) == 1

    def test_where_no_note_can_be_left_each_prints_its_own(self, world: World) -> None:
        world.board.remove()
        world.members[1].go_down(ValueError("unheard"))
        assert "ValueError: unheard" in world.said[0]
        world.go_down(2, ValueError("of 2"))
        assert world.said[-1] == "Traceback of 2: of 2"

    def test_a_spawned_rank_leaves_the_printing_to_its_launcher(self) -> None:
        world = World(speaks=False)
        world.members[1].go_down(ValueError("x"))
        world.run(5, 1, 2)
        assert world.statuses == {2: 1}
        assert world.said == []


class TestLostPeers:
    def test_a_connection_error_waits_for_its_cause(self, world: World) -> None:
        world.at(1, lambda: world.fail(1))
        assert not world.members[2].claim(RuntimeError(LOST))
        failure = world.board.newest_failure()
        assert failure is not None
        assert failure.rank == 1

    def test_but_not_for_ever(self, world: World) -> None:
        assert world.members[2].claim(RuntimeError(LOST))
        assert grace.CAUSE_WAIT <= world.time < grace.CAUSE_WAIT + TICK

    def test_a_collective_that_timed_out_has_waited_already(self, world: World) -> None:
        assert world.members[2].claim(RuntimeError(TIMED_OUT))
        assert world.time == 0

    def test_all_say_where_they_are_when_a_collective_fails(self, world: World) -> None:
        world.members[2].claim(RuntimeError(TIMED_OUT))
        world.members[1].look()
        failure = world.board.newest_failure()
        assert failure is not None
        said = describe_hang(world.board, failure)
        assert (
            "A collective ran into the timeout of 3 s. Ranks 1, 2 did not take part in it. Rank 0 did not answer."
            in said
        )
        assert "test_all_say_where_they_are" in said

    def test_the_report_waits_for_an_answer_but_not_of_a_rank_that_has_ended(self, world: World) -> None:
        world.board.post(notes.Ended(0))
        world.at(0.4, lambda: world.members[1].look())
        world.go_down(2, RuntimeError(TIMED_OUT))
        assert 0.4 <= world.time < grace.PLACES_WAIT
        assert "rank 0 had come to its end" in world.said[-1]

    def test_a_rank_that_does_not_answer_is_named(self) -> None:
        board = MemoryBoard(range(4))
        board.post(notes.Place(1, 0), Whereabouts(waits=True, stack="  x\n"))
        board.post(notes.Failed(1, 2))
        said = describe_hang(board, Failure(1, 0, f"RuntimeError: {TIMED_OUT}\n", hangs=True))
        assert "Ranks 1, 3 did not answer." in said
        assert "All ranks" not in said
        assert "rank 2 failed, too" in said

    def test_a_rank_that_has_ended_or_crashed_is_absent_too(self) -> None:
        board = MemoryBoard(range(3))
        board.post(notes.Place(1, 0), Whereabouts(waits=True, stack="  x\n"))
        board.post(notes.Ended(1))
        board.post(notes.Crash(2), 'Current thread 0x1:\n  File "work.py", line 3 in weave\n')
        said = describe_hang(board, Failure(1, 0, f"RuntimeError: {TIMED_OUT}\n", hangs=True))
        assert "Ranks 1, 2 did not take part in it." in said
        assert "rank 1 had come to its end, without an error" in said
        assert 'File "work.py", line 3, in weave' in said


class TestInterrupts:
    def test_a_launcher_passes_it_on_and_nobody_fails(self, world: World) -> None:
        assert world.members[1].claim(KeyboardInterrupt())
        world.go_down(1, KeyboardInterrupt())
        world.go_down(0, KeyboardInterrupt())
        world.run(10, 0, 1, 2)
        assert world.board.has(notes.Interrupted(1))
        assert world.board.newest() == 0
        assert world.statuses == {}
        assert len(world.said) == 1  # by the launching process

    def test_a_connection_that_an_interrupted_rank_closed_is_no_failure(self, world: World) -> None:
        world.at(1, lambda: world.go_down(1, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            world.members[2].claim(RuntimeError(LOST))
        assert world.board.newest() == 0
        assert world.members[2].interrupted.is_set()

    def test_without_a_launcher_it_ends_the_others(self) -> None:
        world = World(has_launcher=False)
        world.go_down(1, KeyboardInterrupt())
        world.run(5, 0, 2)
        assert world.statuses == {0: 130, 2: 130}
        assert world.said[0].startswith("Traceback of 1")
        assert world.said[1:] == [f"rank {rank} stopped because rank 1 was interrupted" for rank in (0, 2)]


class TestEndRun:
    def test_several_ranks_end_it_and_the_reason_is_said_once(self) -> None:
        world = World(has_launcher=False)
        for rank in (1, 2):
            assert world.ends(rank, lambda rank=rank: world.members[rank].end_run("SIGTERM came", 143))
        world.run(5, 0)
        assert world.statuses == {0: 143, 1: 143, 2: 143}
        assert [text.splitlines()[0] for text in world.said] == [
            "rank 1: SIGTERM came",
            "rank 0 stopped because rank 1 failed",
        ]
        assert "Where each rank was:" in world.said[0]

    def test_a_rank_that_fails_because_of_it_ends_with_its_status(self) -> None:
        world = World(has_launcher=False)
        assert world.ends(1, lambda: world.members[1].end_run("SIGTERM came", 143))
        assert world.ends(2, lambda: world.go_down(2, RuntimeError(LOST)))
        assert world.statuses[2] == 143

    def test_the_main_thread_that_fails_because_of_it_lets_the_thread_that_ends_the_run_tell(self) -> None:
        """The other rank ends first, and the main thread's collective fails while its other thread still reports."""
        world = World(ranks=2)
        world.board.claim(Failure(1, 0, "rank 0: SIGTERM came\n", hangs=True, status=143))
        world.board.post(notes.Final(1))
        world.board.post(notes.Released(1))
        assert world.board.claim_report(1)
        world.at(world.time + 1, lambda: world.board.post(notes.Reported(1)))
        assert world.ends(0, lambda: world.go_down(0, RuntimeError(LOST)))
        assert world.statuses[0] == 143
        assert world.ended_at[0] >= 1

    def test_the_launching_process_ends_last_and_takes_the_board_away(self, world: World) -> None:
        world.at(world.time + 2, lambda: [world.board.post(notes.Released(rank)) for rank in (1, 2)])
        assert world.ends(0, lambda: world.members[0].end_run("SIGTERM came", 143))
        assert 2 <= world.ended_at[0] < 3
        assert world.board.removed

    @pytest.mark.parametrize(("joined", "seconds"), [(True, grace.BOARD_STAYS), (False, grace.JOIN_WAIT)])
    def test_it_waits_so_long_for_a_rank_that_does_not_release_the_board(self, joined: bool, seconds: float) -> None:
        world = World(ranks=1)
        world.board.ranks = (0, 1)
        if joined:
            world.board.post(notes.Joined(1))
        world.members[0].await_release(grace.BOARD_STAYS)
        assert seconds <= world.time < seconds + TICK


class TestDeaths:
    def test_a_peer_tells_of_a_death_once(self) -> None:
        world = World(has_launcher=False)
        for rank in (1, 2):
            world.members[rank].report_death(0)
        failure = world.board.final_failure()
        assert failure is not None
        assert failure.rank == 0
        assert world.said == ["rank 0 died and left no traceback\n"]

    def test_a_crash_leaves_a_traceback(self) -> None:
        world = World(has_launcher=False)
        world.board.post(notes.Crash(0), 'Current thread 0x1:\n  File "work.py", line 3 in weave\n')
        world.members[1].report_death(0)
        assert 'File "work.py", line 3, in weave' in world.said[0]

    def test_the_first_rank_to_miss_the_launcher_says_so_and_the_others_end_in_silence(self, world: World) -> None:
        world.at(0.2, lambda: world.ends(2, lambda: world.members[2].check_launcher(lambda: False)))
        assert world.ends(1, lambda: world.members[1].check_launcher(lambda: False))
        assert world.statuses == {1: 1, 2: 1}
        assert world.said == ["rank 0, the launching process, died without a traceback; rank 1 and the others stop\n"]
        assert world.board.removed

    def test_of_spawned_ranks_the_launching_process_is_none(self) -> None:
        world = World(speaks=False)
        assert world.ends(1, lambda: world.members[1].check_launcher(lambda: False))
        assert world.said == ["the launching process died without a traceback; rank 1 and the others stop\n"]


class TestSupervisor:
    @pytest.mark.parametrize(
        ("status", "told"),
        [
            (3, "rank 1 ended with exit status 3 and left no traceback"),
            (-signal.SIGTERM, "rank 1 was killed by SIGTERM (15)"),
            (-signal.SIGKILL, "rank 1 was killed by SIGKILL (9) (the kernel does that when memory runs out)"),
            (-40, "rank 1 was killed by signal (40)"),
        ],
    )
    def test_a_death_is_a_final_failure(self, world: World, status: int, told: str) -> None:
        failure = Supervisor(world.board, process=world.process(0)).look({1: status, 2: None})
        assert failure is not None
        assert (failure.rank, failure.text) == (1, f"{told}\n")
        assert world.said == [f"{told}\n"]

    @pytest.mark.parametrize("status", [0, 1])
    def test_a_process_that_ends_before_the_launch_is_missed_there(self, status: int) -> None:
        board = MemoryBoard([0, 1])
        failure = Supervisor(board, reports=False).look({1: status})
        assert failure is not None
        assert "before it reached the launch" in failure.text

    def test_a_healthy_end_is_noted(self, world: World) -> None:
        assert Supervisor(world.board, process=world.process(0)).look({1: 0, 2: None}) is None
        assert world.board.has(notes.Ended(1))

    def test_one_whose_failure_is_known_needs_no_explanation(self, world: World) -> None:
        for rank in range(3):
            world.fail(rank)
        supervisor = Supervisor(world.board, process=world.process(0))
        assert supervisor.look({1: None, 2: None}) is None
        failure = supervisor.look({1: None, 2: 1})
        assert failure is not None
        assert (failure.number, failure.rank) == (1, 0)
        assert world.said == []

    def test_one_that_is_killed_while_it_goes_down_with_its_failure_is_no_other(self, world: World) -> None:
        for rank in (2, 0, 1):
            world.fail(rank)
        failure = Supervisor(world.board, process=world.process(0)).look({1: None, 2: -signal.SIGKILL})
        assert failure is not None
        assert (failure.number, failure.rank) == (1, 2)

    def test_one_that_stopped_because_of_a_failure_needs_no_explanation(self, world: World) -> None:
        world.fail(0)
        failure = Supervisor(world.board, process=world.process(0)).look({1: -signal.SIGTERM, 2: 1})
        assert failure is not None
        assert (failure.number, failure.rank) == (1, 0)

    def test_one_that_is_killed_after_it_caught_a_failure_is_another_failure(self, world: World) -> None:
        for rank in range(3):
            world.fail(rank)
        failure = Supervisor(world.board, process=world.process(0)).look({1: None, 2: -signal.SIGKILL})
        assert failure is not None
        assert (failure.number, failure.rank) == (2, 2)

    def test_signals_for_processes_that_do_not_end(self, world: World) -> None:
        supervisor = Supervisor(world.board, process=world.process(0))
        world.fail(0)
        world.fail(2)
        soon = functools.partial(pytest.approx, abs=TICK + 0.01)
        sent: dict[int, dict[signal.Signals, float]] = {1: {}, 2: {}}
        while world.time < 10:
            failure = supervisor.look({1: None, 2: None})
            for rank, signum in supervisor.overdue(failure, [1, 2]).items():
                sent[rank].setdefault(signum, world.time)
            world.sleep(TICK)
        assert sent == {
            1: {signal.SIGTERM: soon(2.6), signal.SIGKILL: soon(3.8)},
            2: {signal.SIGTERM: soon(7.6), signal.SIGKILL: soon(8.8)},
        }
