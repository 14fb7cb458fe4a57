"""One of two ranks fails: all end in time, and it is named. tests/faults has it in every way and place."""

from __future__ import annotations

import pytest
from tests.trainer.failing import check, run

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def test_a_skipped_collective_ends_all_and_tells_where_each_rank_was() -> None:
    check(run("skip", "checkpoint", 1), "skip", "checkpoint", 1)


def test_a_killed_worker_ends_all_with_its_ranks_traceback() -> None:
    check(run("kill", "worker", 1), "kill", "worker", 1)


@pytest.mark.faults  # takes long
@pytest.mark.parametrize(("how", "where", "rank"), [("skip", "fit", 0), ("kill", "validation", 1)])
def test_under_torchrun_ranks_share_failures_through_the_store(how: str, where: str, rank: int) -> None:
    check(run(how, where, rank, launcher=TORCHRUN), how, where, rank)


@pytest.mark.faults  # takes long
def test_forked_processes_tell_the_one_that_waits() -> None:
    result = run("skip", "validation", 1, "fork")
    assert not result.orphans
    assert result.status == 1
    assert result.seconds < 13
    assert result.err.count("timeout of 3 s") == 1, result.err
    places = result.err[result.err.index("Where each rank was:") :]
    assert "rank 0, in a collective:" in places
    assert "in fail" in places[places.index("rank 1:") :]
    assert " stopped because" not in result.err
