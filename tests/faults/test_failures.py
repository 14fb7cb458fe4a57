"""One of two ranks fails in every way at every place: all processes end in time, and the failing one is named."""

from __future__ import annotations

from typing import Any

import pytest
from tests.trainer.failing import ALLOWED_S, HOWS, PLACES, TIMEOUT_S, check, run

pytestmark = [pytest.mark.faults, pytest.mark.timeout(180)]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("how", HOWS)
def test_all_end_in_time_and_say_who_failed(how: str, where: str, rank: int, record_property: Any) -> None:
    result = run(how, where, rank)
    check(result, how, where, rank)
    record_property("failures", 1)
    record_property(f"ended after {how}", 1)
    print(f"{how} in {where} on rank {rank}: {result.seconds:.1f} s, status {result.status}")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", ["go on", "end"])
def test_a_rank_that_skips_a_collective_and_does_something_else(how: str, rank: int, record_property: Any) -> None:
    result = run(how, "fit", rank)
    told = str(result).replace("\\n", "\n")
    assert not result.orphans, told
    assert result.status != 0, told
    assert result.seconds < ALLOWED_S + TIMEOUT_S, told
    places = result.err[result.err.index("Where each rank was:") :]
    assert "fabric.barrier()" in places, told
    assert (f"rank {rank}, in a collective" if how == "go on" else f"rank {rank} had come to its end") in places, told
    record_property("failures", 1)
    print(f"{how} on rank {rank}: {result.seconds:.1f} s, status {result.status}")
