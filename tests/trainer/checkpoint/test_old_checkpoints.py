"""Checkpoints that version 0.1.0 wrote go on to the last bit of what that version gave.

``tests/fixtures/runs.py`` says what is trained and compared, and ``tests/fixtures/write_checkpoints.py`` wrote them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.fixtures import runs

pytestmark = [
    pytest.mark.timeout(110),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty"),
]

TRAINER = {name: run for name, run in runs.RUNS.items() if run.kind != "fabric"}


def of_ranks(ranks: int) -> list[tuple[str, str]]:
    """The names of runs and checkpoints."""
    return [(name, point) for name, run in TRAINER.items() if run.ranks == ranks for point in run.points]


@pytest.mark.parametrize("name", [name for name, run in TRAINER.items() if run.ranks == 1])
def test_training_without_a_checkpoint_gives_what_it_gave(name: str, tmp_path: Path) -> None:
    runs.live(name, tmp_path)
    runs.check(runs.records(tmp_path, 1), runs.expected(name)["whole"])


@pytest.mark.parametrize(("name", "point"), of_ranks(1))
def test_one_rank_goes_on(name: str, point: str, tmp_path: Path) -> None:
    old = runs.expected(name)
    runs.check(runs.resume(name, point, tmp_path), old["whole"], old["points"][point])


@pytest.mark.parametrize(("name", "point"), of_ranks(2))
def test_one_rank_goes_on_from_two(name: str, point: str, tmp_path: Path) -> None:
    runs.check(runs.resume(name, point, tmp_path), [runs.expected(name)["elastic"][point]])


TWO = [name for name, run in TRAINER.items() if run.ranks == 2]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.faults) for name in TWO],  # they take long
)
def test_two_ranks_go_on(name: str, tmp_path: Path) -> None:
    old = runs.expected(name)
    found = runs.with_two_ranks(name, tmp_path)
    runs.check(found.pop(""), old["whole"])
    for point, records in found.items():
        runs.check(records, old["whole"], old["points"][point])
    assert found.keys() == runs.RUNS[name].points.keys()
