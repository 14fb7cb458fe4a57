"""Killed at random moments and started again with ``ckpt_path="last"``: every run ends as if nothing had happened.

Each group is one random configuration, trained once without a kill, then killed at random moments. A kill hits any
Python call, those in saving and validation among them, or comes from outside at any time, also to a data loader's
worker or to one of two ranks. ``TREADLE_FAULTS_SEED`` draws other configurations and moments.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.faults.forkserver import ForkServer
from tests.faults.victim import LOADERS, Case, find, read

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

SEED = os.environ.get("TREADLE_FAULTS_SEED", "0")
GROUPS = 52
PAIRS = 4  # kill points of each configuration
NO_WORKERS = ("custom", "list", "stateful", "unsized stateful", "distributed")


def draw(rng: random.Random) -> Case:
    """A configuration in which everything fits together."""
    pick = rng.choice
    loader = pick(LOADERS)
    devices = pick([1, 1, 1, 1, 1, 2])
    if loader == "distributed":
        devices = 2
    optimization = pick(["automatic", "automatic", "automatic", "manual", "several", "lbfgs"])
    automatic = optimization == "automatic"
    validate = pick(["never", "epoch", "half", "every 3 batches", "every 4 across epochs"])
    unsized = loader in ("stream", "persistent stream", "custom", "unsized stateful", "sequential")
    if unsized and validate == "half":  # half of what?
        validate = "every 3 batches"
    validated = validate != "never"
    monitor = pick(["", "loss_epoch", "val"] if validated else ["", "loss_epoch"])
    every = pick([0, 1, 2, 3]) if monitor != "loss_epoch" else 0
    limit = 1.0 if unsized else pick([1.0, 1.0, 0.7])
    accumulate = pick([1, 2, 3]) if automatic else 1
    return Case(
        loader=loader,
        workers=0 if loader in NO_WORKERS else pick([0, 0, 1, 2]),
        samples=pick([20, 26]) if devices == 1 else 40,
        epochs=pick([2, 3]),
        max_steps=pick([-1, -1, -1, 7]),
        limit=limit,
        optimization=optimization,
        accumulate=accumulate,
        accumulate_later=pick([0, 0, 2]) if automatic and validate in ("never", "epoch") else 0,
        scheduler=pick(["", "step", "epoch", "cyclic", *(["plateau"] if validated else [])]) if automatic else "",
        clip=pick([None, 0.5]) if automatic else None,
        precision=pick(["32-true", "32-true", "64-true", "bf16-mixed", *(["16-mixed"] if automatic else [])]),
        validate=validate,
        val_shuffle=pick([False, True]),
        every=every,
        monitor=monitor,
        top_k=pick([1, 2, 3]),
        link=pick([False, True]),
        patience=pick([0, 0, 1, 3]) if validated else 0,
        metric=pick([False, True]),
        lr_monitor=pick([False, True]),
        log_every=pick([1, 2, 5]),
        norm=loader in ("drop last", "list") and pick([False, True]),
        reload_every=pick([0, 0, 0, 1]) if loader not in ("stateful", "unsized stateful") else 0,
        devices=devices,
        seed=rng.randrange(1000),
    )


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


class Killer:
    """Kills a victim, one of its workers or one of its ranks, after a while."""

    def __init__(self, rng: random.Random, seconds: float) -> None:
        self.delay, self.choice = rng.uniform(0, seconds), rng.random()

    def __call__(self, pid: int) -> None:
        time.sleep(self.delay)
        try:
            process = psutil.Process(pid)
            targets = [process, *process.children(recursive=True)]
            targets[int(self.choice * len(targets))].send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            pass


@pytest.mark.parametrize("group", range(GROUPS))
def test_killed_at_random_moments(group: int, server: ForkServer, tmp_path: Path, record_property: Any) -> None:
    rng = random.Random(f"{SEED} {group}")
    case = draw(rng)
    began = time.monotonic()
    assert server.run(case, tmp_path / "whole", "whole") == 0, output(tmp_path / "whole", case)
    seconds = time.monotonic() - began
    calls = int((tmp_path / "whole" / "calls").read_text())
    names = ["whole", *(["whole.rank1"] if case.devices > 1 else [])]
    whole = [read(tmp_path / "whole" / name) for name in names]
    kills = resumed = 0
    for pair in range(PAIRS):
        folder = tmp_path / str(pair)
        reached = [0] * len(whole)
        lives = rng.choice([1, 1, 2, 3])
        for life in range(lives + 1):
            saved = os.path.lexists(folder / "ckpt" / "last.ckpt")
            kill: dict[str, Any] = {}
            if life < lives and (case.devices > 1 or rng.random() < 0.3):
                kill["meanwhile"] = Killer(rng, seconds)
            elif life < lives:
                kill["die_at"] = rng.randint(1, calls)
            name = f"life{life}"
            status = server.run(case, folder, name, "last", **kill)
            assert status == 0 or life < lives, output(folder, case)
            kills += status != 0
            for rank, trace in enumerate(whole):
                found = read(folder / (name if rank == 0 else f"{name}.rank{rank}"))
                if found and found[0][0] == "start":
                    assert not saved or found[0][1] > 0, f"{case}: it began anew though there was a checkpoint"
                    resumed += rank == 0 and found[0][1] > 0
                reached[rank] = check(case, found, trace, reached[rank], ended=status == 0)
    record_property("pairs", PAIRS)
    record_property("kills", kills)
    record_property("resumed", resumed)


def check(case: Case, found: list[Any], whole: list[Any], reached: int, *, ended: bool) -> int:
    """That a trace is the part of the whole one that follows; returns how far it goes."""
    part = found[1:] if found and found[0][0] == "start" else found
    if not part:
        return reached
    try:
        at = find(part, whole)
    except AssertionError as error:
        raise AssertionError(f"{case}: {error}") from None
    beyond = {event[0] for event in whole[reached:at]}
    # a finished run that is started again has nothing to train
    assert at <= reached or beyond <= {"start", "trained"}, f"{case}: {whole[reached:at]} never happened"
    if ended:
        assert at + len(part) == len(whole), f"{case}: it ended early, before {whole[at + len(part)]}"
    return at + len(part)


def output(folder: Path, case: Case) -> str:
    """What the last victim wrote."""
    texts = sorted(folder.glob("*.txt"), key=lambda p: p.stat().st_mtime)
    return f"{case}: " + (texts[-1].read_text()[-3000:] if texts else "")
