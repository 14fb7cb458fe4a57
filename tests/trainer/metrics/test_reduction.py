"""One packed collective for all that was logged in an interval, and decisions that no rank disagrees on.

As a program, this file is what two ranks run; every collective that Python code asks for is counted.

Tests of ``treadle.metrics.reduction``, ``treadle_fabric.coordination.step_clock``,
``treadle_fabric.coordination.objects``.
"""

from __future__ import annotations

import csv
import functools
import itertools
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.processes import run_in_ranks
from tests.trainer.models import Net, loader, trainer
from torch import Tensor

from treadle.callbacks import EarlyStopping, ModelCheckpoint
from treadle_fabric.loggers import CSVLogger

pytestmark = pytest.mark.timeout(100)

COUNTS: Counter[str] = Counter()
COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "broadcast",
    "broadcast_object_list",
    "all_gather_object",
    "reduce",
    "barrier",
)


def count_collectives() -> None:
    for name in COLLECTIVES:
        function = getattr(dist, name)

        @functools.wraps(function)
        def counted(*args: Any, _name: str = name, _function: Any = function, **kwargs: Any) -> Any:
            COUNTS[_name] += 1
            return _function(*args, **kwargs)

        setattr(dist, name, counted)


class Logging(Net):
    """Logs ``n`` names on every step, on several of them only sometimes, and as many in validation."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n
        self.marks: list[dict[str, int]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.loss(batch)
        for i in range(self.n):
            self.log(f"train{i}", loss * i, on_step=True, on_epoch=i % 2 == 0)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
        for i in range(self.n):
            self.log(f"val{i}", batch.mean() * i)

    def mark(self) -> None:
        self.marks.append(dict(COUNTS))

    on_train_epoch_start = mark
    on_validation_start = mark
    on_validation_end = mark
    on_train_epoch_end = mark


class Unequal(Net):
    """Logs the mean of a batch, of 3 samples on rank 0 and of 1 on rank 1."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.log("filled", batch.mean())
        return self.loss(batch)


class OnlyZero(Net):
    """What is monitored is known on rank 0 alone, and gets worse."""

    def on_train_epoch_end(self) -> None:
        self.log("watched", float(self.current_epoch), rank_zero_only=True)


class Kinds(Net):
    """Rank 0 has other kinds of values than rank 1, none at all or those of single precision."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        second = self.global_rank == 1
        third = torch.tensor(1 / 3, dtype=torch.float64 if second else torch.float32)
        self.log("no samples", third, on_step=False, on_epoch=True, batch_size=int(second))
        self.log("mixed", third, on_step=True, on_epoch=True)
        self.log("called", third, on_step=False, on_epoch=True, reduce_fx=torch.median)
        self.log("single", third.float(), on_step=False, on_epoch=True, batch_size=int(second))
        self.log("count", 2**24 + self.global_rank, on_step=False, on_epoch=True, reduce_fx="sum")
        if second:
            self.log("lacking", third, on_step=True, on_epoch=True)
        return self.loss(batch)


def ranks(folder: Path) -> None:
    count_collectives()
    out: dict[str, Any] = {}
    rank = int(os.environ.get("LOCAL_RANK", 0))
    for n in (0, 1, 40):
        COUNTS.clear()
        model = Logging(n)
        run = trainer(
            folder, devices=2, strategy="ddp", logger=CSVLogger(folder), log_every_n_steps=4, num_sanity_val_steps=0
        )
        run.fit(model, loader(24, 1), loader(6, 1))
        out[str(n)] = model.marks
    stopping = EarlyStopping("watched", patience=2)
    saving = ModelCheckpoint(folder / "saved", monitor="watched", filename="{epoch}")
    run = trainer(
        folder, devices=2, max_epochs=9, strategy="ddp", callbacks=[stopping, saving], enable_checkpointing=True
    )
    run.fit(OnlyZero(), loader(8, 2))
    out["stopped"] = [run.current_epoch, stopping.stopped_epoch, os.path.basename(saving.best_model_path)]
    model = Unequal()
    run = trainer(folder, devices=2, strategy="ddp", logger=CSVLogger(folder, "unequal"), log_every_n_steps=1)
    run.fit(model, [torch.full((3 - 2 * rank, 4), float(rank))])
    if rank == 0:
        with open(Path(run.log_dir or "") / "metrics.csv") as file:
            out["unequal"] = [row["filled"] for row in csv.DictReader(file)]
    run = trainer(folder, devices=2, strategy="ddp", logger=CSVLogger(folder, "kinds"), log_every_n_steps=1)
    run.fit(Kinds(), loader(8, 4))
    ends = {name: value for name, value in run.callback_metrics.items() if not name.endswith("_step")}
    out["kinds"] = {name: [value.item(), str(value.dtype)] for name, value in ends.items()}
    out["count"] = run.metrics_on_cpu().state_dict()["logged"]["count"]
    (folder / f"rank{rank}.json").write_text(json.dumps(out))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("collectives")
    run_in_ranks(ranks, folder)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_a_packed_collective_an_interval_whatever_is_logged(found: list[dict[str, Any]]) -> None:
    for rank in found:
        spans = {n: between(rank[n]) for n in ("0", "1", "40")}
        assert spans["1"] == spans["40"], "forty names cost what one costs"
        steps, validation, end = spans["40"]
        # 12 steps, logged at every fourth; and once in the run, whether losses have weights
        assert steps == {"all_gather": 3 + 1}
        # whether a signal came, what the steps logged, and what on_validation_epoch_end did
        assert validation == {"all_reduce": 1, "all_gather": 2}
        assert end == {"all_gather": 1, "all_reduce": 1}  # and whether somebody wants to stop
        assert sum(between(rank["0"])[0].values()) == 4, "a rank cannot know that the others logged nothing"


def test_a_step_counts_each_sample_once(found: list[dict[str, Any]]) -> None:
    assert found[0]["unequal"] == ["0.25"]


def between(marks: list[dict[str, int]]) -> list[dict[str, int]]:
    """The collectives in training, in validation, and in the end of the epoch."""
    return [dict(Counter(after) - Counter(before)) for before, after in itertools.pairwise(marks)]


def test_ranks_agree_on_stops_and_saves_that_only_one_can_decide(found: list[dict[str, Any]]) -> None:
    assert found[0]["stopped"] == found[1]["stopped"] == [3, 2, "epoch=0.ckpt"]


def test_a_value_is_the_same_on_all_ranks_to_the_last_bit(found: list[dict[str, Any]]) -> None:
    assert found[0]["kinds"] == found[1]["kinds"]
    kinds = {name: dtype for name, (_, dtype) in found[0]["kinds"].items()}
    assert kinds.pop("single") == kinds.pop("count") == "torch.float32"
    assert set(kinds.values()) == {"torch.float64"}, kinds
    assert found[0]["kinds"]["no samples"][0] == found[0]["kinds"]["lacking"][0] == 1 / 3


def test_counts_of_all_ranks_are_exact(found: list[dict[str, Any]]) -> None:
    assert found[0]["count"] == found[1]["count"] == 2**25 + 1
