"""Killed at random moments and started again with ``ckpt_path="last"`` or ``auto_resume``: every run ends as if nothing
had happened.

Each group is one configuration, trained once without a kill, then killed at random moments. A kill hits any Python
call, those in saving and validation among them, or comes from outside at any time, also to a data loader's worker or
to one of two ranks; some are no kills but SIGTERMs, after which nothing is trained again. ``TREADLE_FAULTS_SEED`` draws
other configurations and moments.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
from tests.faults.forkserver import ForkServer
from tests.faults.kills import Endurance, draw
from tests.faults.victim import Case

SEED = os.environ.get("TREADLE_FAULTS_SEED", "0")
GROUPS = 52
PAIRS = 4  # kill points of each configuration


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("group", range(GROUPS))
def test_killed_at_random_moments(group: int, server: ForkServer, tmp_path: Path, record_property: Any) -> None:
    rng = random.Random(f"{SEED} {group}")
    endure(draw(rng), PAIRS, rng, server, tmp_path, record_property)


QUICK = {
    "accumulation": (Case(loader="plain", accumulate=3, scheduler="step", clip=0.5, metric=True, log_every=1), 3),
    "shuffled with workers": (Case(loader="shuffled", workers=2, auto_resume=True, monitor="loss_epoch", every=0), 2),
    "in validation": (Case(validate="every 3 batches", val_shuffle=True, monitor="val", top_k=2, patience=3), 3),
    "two ranks": (Case(loader="shuffled", samples=40, devices=2, metric=True, every=1), 1),
}


@pytest.mark.parametrize("kind", QUICK)
def test_a_few_kills(kind: str, server: ForkServer, tmp_path: Path, record_property: Any) -> None:
    case, pairs = QUICK[kind]
    endure(case, pairs, random.Random(f"quick {kind}"), server, tmp_path, record_property)


def endure(case: Case, pairs: int, rng: random.Random, server: ForkServer, folder: Path, record: Any) -> None:
    group = Endurance(server, case, folder)
    for pair in range(pairs + 3):
        if pair < pairs or not group.counts["kills"]:  # one from outside may come too late
            group.pair(rng)
    assert group.counts["kills"], f"{case}: it was never killed"
    for name, count in group.counts.items():
        record(name, count)
