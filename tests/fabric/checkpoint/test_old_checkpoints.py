"""Checkpoints that hand-written loops saved with version 0.1.0 go on to the last bit of what that version gave.

``tests/fixtures/runs.py`` says what is trained and compared, and ``tests/fixtures/write_checkpoints.py`` wrote them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.fixtures import runs

pytestmark = pytest.mark.timeout(110)

ONE, TWO = "fabric_1rank_mid_epoch", "fabric_2ranks_mid_epoch"


def test_one_rank(tmp_path: Path) -> None:
    old = runs.expected("fabric_1rank")
    runs.live("fabric_1rank", tmp_path)
    runs.check(runs.records(tmp_path, 1), old["whole"])
    runs.check(runs.resume("fabric_1rank", ONE, tmp_path), old["whole"], old["points"][ONE])


@pytest.mark.faults  # half a minute; the Trainer's file of two ranks is read in every run of the tests
def test_two_ranks(tmp_path: Path) -> None:
    old = runs.expected("fabric_2ranks")
    found = runs.with_two_ranks("fabric_2ranks", tmp_path)
    runs.check(found[""], old["whole"])
    runs.check(found[TWO], old["whole"], old["points"][TWO])


def test_one_rank_goes_on_from_two(tmp_path: Path) -> None:
    runs.check(runs.resume("fabric_2ranks", TWO, tmp_path), [runs.expected("fabric_2ranks")["elastic"][TWO]])
