"""Random configurations, killed at random moments and started again, compared with runs that were left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from tests.faults.forkserver import ForkServer
from tests.faults.victim import LOADERS, Case, find, read
from tests.processes import wait_until

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
        workers=0 if loader in NO_WORKERS else pick([0, 0, 1, 2, 4]),
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
        auto_resume=pick([False, False, True]),
        seed=rng.randrange(1000),
    )


class Sender:
    """Sends a signal to a victim after a while: SIGKILL to it or one of its workers or ranks, SIGTERM to it or a rank.

    Args:
        rng: when, and to whom.
        by: the signal.
        ranks: whether it has any.
        trace: which is there when training begins.
        seconds: that training may take; None: it ends before.
    """

    def __init__(self, rng: random.Random, by: int, ranks: bool, trace: Path, seconds: float | None) -> None:
        self.by, self.ranks, self.trace, self.training = by, ranks, trace, seconds is not None
        self.delay, self.choice = rng.uniform(0, seconds or 1), rng.random()

    def __call__(self, pid: int) -> None:
        try:
            process = psutil.Process(pid)
            wait_for(self.trace, process if self.training else None)
            time.sleep(self.delay)  # until a random moment: that is what is tested
            several = self.ranks or self.by == signal.SIGKILL
            targets = [process, *(process.children(recursive=self.by == signal.SIGKILL) if several else [])]
            targets[int(self.choice * len(targets))].send_signal(self.by)
        except psutil.NoSuchProcess:
            pass


class Stopwatch:
    """Sees how long a victim trains."""

    def __init__(self, trace: Path) -> None:
        self.trace, self.began = trace, 0.0

    def __call__(self, pid: int) -> None:
        wait_for(self.trace, psutil.Process(pid))
        self.began = time.monotonic()


def wait_for(trace: Path, process: psutil.Process | None) -> None:
    """Until a trace is there, as long as its process is."""
    if process is not None:
        wait_until(lambda: trace.exists() or process.status() == psutil.STATUS_ZOMBIE, timeout=180, every=0.002)


class Endurance:
    """One configuration: trained once without a kill, then again and again with some.

    Args:
        server: runs it.
        case: the configuration.
        folder: for all its runs.
    """

    def __init__(self, server: ForkServer, case: Case, folder: Path) -> None:
        self.server, self.case, self.folder = server, case, folder
        self.counts: Counter[str] = Counter(pairs=0, kills=0, preempted=0, resumed=0)
        watch = Stopwatch(folder / "whole" / "whole")
        assert server.run(case, folder / "whole", "whole", meanwhile=watch) == 0, self.output(folder / "whole")
        self.seconds = time.monotonic() - watch.began
        self.calls, self.calls_before = json.loads((folder / "whole" / "calls").read_text())
        self.names = ["", *(f".rank{rank}" for rank in range(1, case.devices))]
        self.whole = [read(folder / "whole" / f"whole{suffix}") for suffix in self.names]

    def pair(self, rng: random.Random) -> None:
        """Die once or more, and end as if nothing had happened."""
        folder = self.folder / str(self.counts["pairs"])
        reached = [0] * len(self.whole)
        exact = False
        lives = rng.choice([1, 1, 2, 3])
        for life in range(lives + 1):
            saved = any(os.path.lexists(folder / "ckpt" / f"{name}.ckpt") for name in ("last", "preempted"))
            preempted = written(folder / "ckpt" / "preempted.ckpt")
            death = self.death(rng, folder / f"life{life}") if life < lives else {}
            status = self.live(folder, f"life{life}", death)
            assert status == 0 or life < lives, f"{self.case}: {self.output(folder)}"
            reached = self.compare(folder, f"life{life}", reached, saved=saved, exact=exact, ended=status == 0)
            trained = all(len(read(folder / f"life{life}{suffix}")) > 1 for suffix in self.names)
            exact = trained and written(folder / "ckpt" / "preempted.ckpt") != preempted
            self.counts["kills"] += status != 0
            self.counts["preempted"] += written(folder / "ckpt" / "preempted.ckpt") != preempted
        assert metrics(folder) == metrics(self.folder / "whole"), f"{self.case}: another metrics.csv"
        self.counts["pairs"] += 1

    def death(self, rng: random.Random, trace: Path) -> dict[str, Any]:
        """When and by what the next life ends: mostly while it trains."""
        by = rng.choice([signal.SIGKILL] * 3 + [signal.SIGTERM])
        training = rng.random() < 0.85
        if self.case.devices > 1 or rng.random() < 0.3:
            return {"meanwhile": Sender(rng, by, self.case.devices > 1, trace, self.seconds if training else None)}
        return {"die_at": rng.randint(self.calls_before if training else 1, self.calls), "die_by": by}

    def live(self, folder: Path, name: str, death: dict[str, Any]) -> int:
        """Start, or go on."""
        return self.server.run(self.case, folder, name, None if self.case.auto_resume else "last", **death)

    def compare(
        self, folder: Path, name: str, reached: list[int], *, saved: bool, exact: bool, ended: bool
    ) -> list[int]:
        """That each rank's trace is the part of the whole one that follows; returns how far they go.

        Args:
            folder: where the run was.
            name: of its trace.
            reached: how far the runs before have come.
            saved: there was a checkpoint.
            exact: it is one of where the run before has ended: nothing is trained again.
            ended: training is over.
        """
        found = []
        for suffix, whole, before in zip(self.names, self.whole, reached, strict=True):
            trace = read(folder / f"{name}{suffix}")
            if trace and trace[0][0] == "start":
                assert not saved or trace[0][1] > 0, f"{self.case}: it began anew though there was a checkpoint"
                self.counts["resumed"] += not suffix and trace[0][1] > 0
            found.append(self.follows(trace, whole, before, exact=exact, ended=ended))
        return found

    def follows(self, found: list[Any], whole: list[Any], reached: int, *, exact: bool, ended: bool) -> int:
        """That ``found`` goes on from where one came before; returns how far."""
        part = found[1:] if found and found[0][0] == "start" else found
        if not part:
            return reached
        try:
            at = find(part, whole)
        except AssertionError as error:
            raise AssertionError(f"{self.case}: {error}") from None
        beyond = {event[0] for event in whole[reached:at]}
        # a finished run that is started again has nothing to train
        assert at <= reached or beyond <= {"start", "trained"}, f"{self.case}: {whole[reached:at]} never happened"
        again = [event for event in whole[at:reached] if not _of_validation(event)]  # which begins anew
        assert not exact or not again, f"{self.case}: {again} happened again after a preemption"
        if ended:
            assert at + len(part) == len(whole), f"{self.case}: it ended early, before {whole[at + len(part)]}"
        return at + len(part)

    def output(self, folder: Path) -> str:
        """What the last victim wrote."""
        texts = sorted(folder.glob("*.txt"), key=lambda p: p.stat().st_mtime)
        return texts[-1].read_text()[-3000:] if texts else ""


def metrics(folder: Path) -> str:
    """The rows of the newest version: one that was killed before its first checkpoint began anew."""
    versions = sorted((folder / "csv").iterdir(), key=lambda version: int(version.name.removeprefix("version_")))
    return (versions[-1] / "metrics.csv").read_text()


def written(file: Path) -> int:
    """When a file was; 0 if it is not there."""
    return file.stat().st_mtime_ns if file.exists() else 0


def _of_validation(event: list[Any]) -> bool:
    return event[0] == "row" and set(event[2]) == {"val_each"}
