"""Killed at 200 random moments while checkpoints are saved: what "last" names always loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.trainer.killed_saves import kill_at_random_moments

pytestmark = pytest.mark.faults


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("ways", [("file", "background"), ("folder",)], ids=["file", "folder"])
def test_killed_at_200_random_moments_during_saving(
    ways: tuple[str, ...], tmp_path: Path, record_property: Any
) -> None:
    assert kill_at_random_moments(tmp_path, kills=200, seed=2026, ways=ways)
    record_property("kills while saving", 200)


@pytest.mark.timeout(1200)
def test_killed_at_100_random_moments_while_two_ranks_save_in_the_background(
    tmp_path: Path, record_property: Any
) -> None:
    assert kill_at_random_moments(tmp_path, kills=100, seed=2026, ways=("shared",))
    record_property("kills while saving", 100)
