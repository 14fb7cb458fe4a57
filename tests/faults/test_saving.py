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
