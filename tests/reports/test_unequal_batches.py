"""Ranks with unequal numbers of batches get the values of one process, and no rank waits for ever.

Users of Lightning and torchmetrics reported evaluations that hang, or that gloo ends, where the state of a metric is a
list, where a rank has no sample at all, and where a step talks to other ranks.

Tests of ``treadle_fabric.setup.metrics``, ``treadle_fabric.data.meeting``, ``treadle.metrics.bus``,
``treadle.loops.fit``.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.processes import run_in_ranks
from tests.trainer.models import Net, loader, trainer
from torch import Tensor
from torchmetrics import (
    AUROC,
    CatMetric,
    MaxMetric,
    MeanAbsoluteError,
    MeanMetric,
    MeanSquaredError,
    Metric,
    MetricCollection,
    MinMaxMetric,
    SumMetric,
)
from torchmetrics.classification import BinaryAccuracy, BinaryAveragePrecision
from torchmetrics.retrieval import RetrievalMRR
from torchmetrics.text import BLEUScore, ROUGEScore
from torchmetrics.wrappers import MetricTracker, Running

import treadle as L
from treadle_fabric import Fabric, MisconfigurationException, compute_alone

pytestmark = [pytest.mark.timeout(110), pytest.mark.filterwarnings("ignore::UserWarning:torchmetrics")]

SIZES = range(21)


class Boxes(Metric):
    """Keeps lists that nobody may put into one tensor, as detection metrics do: tensors of any shape, and words."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("boxes", [], dist_reduce_fx=None)
        self.add_state("words", [], dist_reduce_fx=None)
        self.add_state("images", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, value: Tensor) -> None:
        self.boxes.append(value.expand(int(value * 10), 4))
        self.words.append(f"{value.item():.3f}")
        self.images += 1

    def compute(self) -> list[Any]:
        return [int(self.images), sum(float(box.sum()) for box in self.boxes), sorted(self.words)]


class Average(Metric):
    """The mean of its updates, with a state that is a mean itself."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("mean", torch.tensor(0.0), dist_reduce_fx="mean")

    def update(self, value: Tensor) -> None:
        self.mean += (value.squeeze() - self.mean) / self._update_count

    def compute(self) -> Tensor:
        return self.mean


class Metrics(torch.nn.Module):
    """Metrics of every kind, each of which gets sample ``i``."""

    def __init__(self) -> None:
        super().__init__()
        self.mrr, self.auroc, self.cat, self.boxes = RetrievalMRR(), AUROC("binary"), CatMetric(), Boxes()
        self.several = MetricCollection([BinaryAccuracy(), BinaryAveragePrecision(), AUROC("binary")])
        self.mean, self.largest, self.average = MeanMetric(), MaxMetric(), Average()
        self.bleu, self.rouge = BLEUScore(n_gram=1), ROUGEScore(rouge_keys="rouge1")
        self.running, self.extremes = Running(SumMetric(), window=21), MinMaxMetric(MeanSquaredError())
        self.total = MeanSquaredError() + MeanAbsoluteError()

    def update(self, i: int) -> None:
        value, target = torch.tensor([(i * 7 % 11) / 11]), torch.tensor([i % 2])
        self.mrr.update(value, target, indexes=torch.tensor([i // 3]))
        for metric in (self.auroc, self.several, self.extremes, self.total):
            metric.update(value, target)
        for metric in (self.cat, self.mean, self.largest, self.boxes, self.average, self.running):
            metric.update(value)
        self.rouge.update(f"a b{i % 3}", f"a b{i % 2}")
        self.bleu.update([f"a b{i % 3}"], [[f"a b{i % 2}"]])

    def compute(self) -> dict[str, Any]:
        return {name: _plain(metric) for name, metric in self.named_children()}


def _plain(metric: Any) -> Any:
    try:
        value = metric.compute()
    except (ValueError, RuntimeError) as error:  # some have no value of no samples
        return type(error).__name__
    if isinstance(metric, CatMetric):
        return sorted(torch.as_tensor(value).flatten().tolist())
    return _numbers(value)


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _numbers(each) for name, each in value.items()}
    return value.tolist() if isinstance(value, Tensor) else value


def of_one_process(n: int) -> dict[str, Any]:
    metrics = Metrics()
    for i in range(n):
        metrics.update(i)
    return metrics.compute()


def assert_alike(found: Any, expected: Any, what: Any) -> None:
    """Compare nested results; NaN equals NaN."""
    if isinstance(expected, dict):
        for name, each in expected.items():
            assert_alike(found[name], each, (what, name))
    elif isinstance(expected, list):
        assert len(found) == len(expected), what
        for one, other in zip(found, expected, strict=True):
            assert_alike(one, other, what)
    elif isinstance(expected, str):
        assert found == expected, what
    else:
        assert found == pytest.approx(expected, rel=1e-5, nan_ok=True), what


# ------------------------------------------------------------------------------------------------ values


class Evaluated(Net):
    """Computes and logs metrics that a module holds: as submodules, in a dictionary, and in a callback."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics = Metrics()
        self.logged, self.auroc, self.held = MeanMetric(), AUROC("binary"), {"a": [CatMetric()]}
        self.kept = SumMetric()  # never reset
        self.computed: dict[str, Any] = {}

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        for i in batch[:, 0].int().tolist():
            self.metrics.update(i)
        values = batch[:, 0]
        self.logged(values)
        self.kept.update(values)
        self.held["a"][0].update(values)
        self.auroc(values / 99, values.int() % 2)
        self.log("number", values.mean())
        self.log("mean", self.logged, on_step=True, on_epoch=True)
        self.log("auroc", self.auroc)

    def on_validation_epoch_end(self) -> None:
        self.computed = self.metrics.compute()
        self.computed |= {"held": _plain(self.held["a"][0]), "kept": _plain(self.kept)}
        for metric in (*self.metrics.children(), self.held["a"][0]):
            metric.reset()  # type: ignore[operator]


class Counting(L.Callback):
    def __init__(self) -> None:
        self.metric = SumMetric()

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.metric.update(len(batch))
        pl_module.log("samples", self.metric)


def evaluate(folder: Path, devices: int) -> list[Any]:
    found = {}
    model, run = Evaluated(), trainer(folder, devices=devices, callbacks=Counting())
    for n in (0, *reversed(SIZES[1:])):  # so that ranks have no samples after they had some
        logged = run.validate(model, loader(n, 1), verbose=False) if n or devices > 1 else [{}]
        found[n] = [model.computed if n or devices > 1 else None, logged[0]]
    return [found[n] for n in SIZES]


def loop(fabric: Fabric, n: int) -> dict[str, Any]:
    """A loop of the user's own, whose metrics belong to no module that is set up."""
    metrics = Metrics().to(fabric.device)
    for i in range(fabric.global_rank, n, fabric.world_size):
        metrics.update(i)
    kind = n % 3
    if kind == 1:
        metrics = copy.deepcopy(metrics)
    elif kind == 2:
        metrics = pickle.loads(pickle.dumps(metrics))
    return metrics.compute()


class Own(SumMetric):
    """Gathers in a way of its own."""

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        self.sum_value = torch.tensor(-1.0)


def run_rank(folder: Path, devices: int) -> None:
    fabric = Fabric(accelerator="cpu", devices=devices, strategy="ddp")
    fabric.launch()
    fabric.setup_dataloaders([0])
    out: dict[str, Any] = {"loop": [loop(fabric, n) for n in SIZES]}
    rank = fabric.global_rank

    sums = SumMetric(), SumMetric(dist_sync_fn=lambda x, group: [x, x, x]), Own()
    pair = dist.new_group([0, 1])
    sums += (SumMetric(process_group=pair),) if rank < 2 else ()
    for metric in sums:
        metric.update(rank + 1)
    out["sums"] = [compute_alone(sums[0]), *(metric.compute() for metric in sums)]
    out["sums"] = [float(value) for value in out["sums"]]

    tracker = MetricTracker(SumMetric(), maximize=True)
    for _ in range(2):
        tracker.increment()
        if rank == 0:
            tracker.update(2.0)
    out["tracked"] = [float(each.compute()) for each in list(tracker)[1:]]

    together = SumMetric()
    together.update(1.0)
    together.sync()
    out["by hand"] = [float(together.sum_value)]
    together.unsync()
    out["by hand"].append(float(together.sum_value))
    out["state"] = [sorted(together.state_dict()), "_sync_dist" in vars(together)]

    out["trainer"] = evaluate(folder, devices)
    (folder / f"out{rank}.json").write_text(json.dumps(out))


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found out; whatever warns on a rank without samples is printed."""
    folder = tmp_path_factory.mktemp("ranks")
    said = run_in_ranks(run_rank, folder, request.param, devices=request.param)
    assert "was called before the ``update``" not in said
    assert "was not logged on rank" not in said
    return [json.loads((folder / f"out{rank}.json").read_text()) for rank in range(request.param)]


def test_metrics_of_every_size_are_those_of_one_process_in_a_loop(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        for n in SIZES:
            assert_alike(found["loop"][n], of_one_process(n), n)


def test_metrics_of_every_size_are_those_of_one_process_in_a_trainer(
    ranks: list[dict[str, Any]], tmp_path: Path
) -> None:
    expected = evaluate(tmp_path, 1)
    for found in ranks:
        for n in SIZES:
            computed, logged = found["trainer"][n]
            assert logged == pytest.approx(expected[n][1], rel=1e-5), n
            assert_alike(computed, expected[n][0] or of_one_process(0), n)


def test_what_users_set_about_the_gathering_is_heeded(ranks: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(ranks):
        everyone, two = sum(range(len(ranks) + 1)), [3] if rank < 2 else []
        assert found["sums"] == [rank + 1, everyone, 3 * (rank + 1), -1, *two]


def test_copies_gather_and_nothing_is_left_in_the_object(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["tracked"] == [2, 2]
        assert found["by hand"] == [len(ranks), 1]
        assert found["state"] == [[], False]


# ------------------------------------------------------------------------------------------------ collectives in steps


class Talking(Net):
    """Talks to the other ranks in a step that not all of them have."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.metric = how, SumMetric(dist_sync_on_step=how == "metric")

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        if self.how == "metric":
            self.metric(batch.sum())  # the line of metric
        elif self.how == "asynchronous":
            dist.all_reduce(batch.clone(), async_op=True)
        elif self.how == "all_gather":
            self.all_gather(batch.sum())  # the line of all_gather
        elif dataloader_idx == 1:
            dist.barrier()  # the line of barrier

    def predict_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
        dist.all_reduce(batch)  # the line of prediction
        return batch


def talk(folder: Path, how: str, n: int, devices: int, strategy: str = "ddp") -> None:
    run = trainer(folder, devices=devices, strategy=strategy)
    loaders: Any = loader(n, 1) if how != "barrier" else [loader(n, 1), loader(n, 1)]
    try:
        if how == "prediction":
            run.predict(Talking(how), loaders)
        else:
            run.validate(Talking(how), loaders, verbose=False)
    except MisconfigurationException as error:
        (folder / "said").write_text(str(error))
        raise


@pytest.mark.parametrize(
    ("how", "n", "devices", "told"),
    [
        ("metric", 3, 2, "in the validation: rank 1 had 1 and has none left, and a collective waits for that rank in"),
        pytest.param(
            "all_gather",
            1,
            3,
            "ranks 1-2 had 0 and have none left, and a collective waits for them in the step of",
            marks=pytest.mark.faults,  # takes long
        ),
        ("barrier", 5, 3, "of loader 1 in the validation: rank 2 had 1 and has none left"),
        ("prediction", 3, 2, "in the prediction: rank 1 had 1 and has none left"),
    ],
)
def test_a_collective_in_a_step_that_some_ranks_lack_is_an_error(
    how: str, n: int, devices: int, told: str, tmp_path: Path
) -> None:
    began = time.monotonic()
    with pytest.raises(AssertionError, match=re.escape(str([1] * devices))):
        run_in_ranks(talk, tmp_path, how, n, devices, devices=devices)
    said = (tmp_path / "said").read_text()
    assert told in said
    assert f"the step of rank{'s 0-1' if how == 'barrier' else ' 0'} in batch {1 if how == 'all_gather' else 2}" in said
    assert f"# the line of {how}" in said
    assert time.monotonic() - began < 60  # the collective's timeout is half an hour


def talk_in_the_second_loader(folder: Path) -> None:
    run = trainer(folder, devices=2, strategy="ddp")
    with pytest.raises(MisconfigurationException) as info:
        run.validate(Talking("barrier"), [loader(4, 1), loader(1, 1)], verbose=False)
    (folder / f"said {run.global_rank}").write_text(str(info.value))


def test_batches_of_the_loader_before_do_not_count(tmp_path: Path) -> None:
    with contextlib.suppress(AssertionError):  # the rank in the collective is ended, or sees its peer go
        run_in_ranks(talk_in_the_second_loader, tmp_path)
    assert "of loader 1 in the validation: rank 1 had 0 and has none left" in (tmp_path / "said 1").read_text()


@pytest.mark.parametrize("devices", [2, 3])
def test_a_collective_that_nothing_waits_for_is_an_error_too(devices: int, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=re.escape(str([1] * devices))):
        run_in_ranks(talk, tmp_path, "asynchronous", 2 * devices - 1, devices, devices=devices)
    said = (tmp_path / "said").read_text()
    assert (
        "in the validation, and its steps begin collectives that nothing waits for (rank 0: 2 batches, 2 coll" in said
    )
    assert f"rank {devices - 1}: 1 batches, 1 collectives). " in said


def test_the_error_reaches_the_process_that_launched(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exception, match="rank 1 had 1 and has none left"):
        talk(tmp_path, "all_gather", 3, 2, "ddp_fork")


def check_sanity(folder: Path) -> None:
    run = trainer(folder, devices=2, strategy="ddp", num_sanity_val_steps=2, max_steps=1)
    run.fit(Net(), loader(), loader(1, 1))
    assert run.global_step == 1


def test_a_rank_without_a_batch_takes_part_in_the_sanity_check(tmp_path: Path) -> None:
    run_in_ranks(check_sanity, tmp_path, timeout=60)


class Patient(Net):
    """Rank 2 has no second batch; of the others, one is late in a collective of the two, and in its step."""

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        if batch_idx == 0:
            self.two = dist.new_group([0, 1]) if not hasattr(self, "two") else self.two
        else:
            time.sleep(2.5 * self.global_rank)
            dist.all_reduce(batch, group=self.two)
        self.log("x", batch.mean())


def wait_patiently(folder: Path) -> None:
    assert trainer(folder, devices=3).validate(Patient(), loader(5, 1), verbose=False)[0]["x"] > 0
    (folder / f"done{os.environ['LOCAL_RANK']}").touch()


@pytest.mark.alone
def test_long_steps_and_collectives_of_those_that_have_batches_are_no_errors(tmp_path: Path) -> None:
    run_in_ranks(wait_patiently, tmp_path, devices=3)
    assert len(list(tmp_path.glob("done*"))) == 3
