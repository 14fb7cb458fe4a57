"""A run that is resumed with another batch size or ``accumulate_grad_batches`` sees each sample once.

That is the usual answer to a device that is out of memory. The gradients that no optimizer had stepped for when the
checkpoint was saved are part of the next step, which is the mean over all of its samples.

Tests of ``treadle.run.accumulation``, ``treadle.checkpoint.exact``, ``treadle_fabric.data.resume``,
``treadle.loops.epoch``.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.models import Net, loader, trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

import treadle as L
from treadle.callbacks import GradientAccumulationScheduler, OnExceptionCheckpoint
from treadle.run.accumulation import Accumulation, Place, decide

SAMPLES = 16
SETTINGS = [*itertools.product((1, 2, 4), (1, 2, 4))]


# ------------------------------------------------------------------------------------------------ the pure function


def steps(plan: Accumulation, first: int, total: int) -> list[list[int]]:
    """The batches of each optimizer step, from batch ``first`` on."""
    found: list[list[int]] = [[]]
    for batch in range(first, total):
        found[-1].append(batch)
        if plan.place(batch, total).ends:
            found.append([])
    return [batches for batches in found if batches]


@pytest.mark.parametrize(("every", "other"), SETTINGS)
@pytest.mark.parametrize("size", [Fraction(1, 4), Fraction(1, 2), 1, 2, 4])
def test_table(every: int, other: int, size: Any) -> None:
    """From each batch on: what was pending joins the first step, and later steps are of whole accumulations."""
    saved, total = Accumulation(every), 8
    for batch in range(total + 1):
        done = saved.place(batch, math.inf)
        there = int(batch * size) if size != 1 else batch  # any number will do
        now, factor = decide(saved, done, every=other, batch=there, size=float(size), total=math.inf)
        pending = batch % every
        if other == every and size == 1:
            assert now == saved
            assert factor == 1
            continue
        place = now.place(there, math.inf)
        assert place.done == pending * size
        if not pending:
            assert place == Place(0, other, other == 1)
            continue
        first = steps(now, there, there + 12)[0]
        assert now.place(there, math.inf).window == pending * size + len(first)
        assert len(first) == max(1, math.ceil(other - pending * size)), "only what it lacks"
        # a gradient that was divided by the old window becomes its share of all samples
        assert factor / every == pytest.approx(float(size / (pending * size + len(first))))
        assert all(len(later) == other for later in steps(now, there, there + len(first) + 3 * other)[1:])


def test_the_end_of_an_epoch() -> None:
    saved = Accumulation(4)
    now, factor = decide(saved, saved.place(6, 8), every=4, batch=3, size=0.5, total=4)  # batches of twice the size
    assert now.place(3, 4) == Place(1, 2, False)  # one batch is left: the step has two batches' worth
    assert factor == 4 * 0.5 / 2
    again, factor = decide(now, now.place(3, 4), every=4, batch=3, size=1, total=4)
    assert (again, factor) == (now, 1)
    assert Accumulation(4).place(5, 6) == Place(1, 2, False)
    # a limit that was raised: the last, shorter accumulation has become a whole one
    assert decide(saved, saved.place(5, 6), every=4, batch=5, size=1, total=12) == (saved, 0.5)


# ------------------------------------------------------------------------------------------------ real runs


class OneHot(Dataset[Tensor]):
    """Sample ``i`` is the ``i``-th unit vector: the gradient of its mean tells which samples it is of."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Tensor:
        return torch.eye(SAMPLES)[index]


class Shares(L.LightningModule):
    """Its gradient is the mean of its samples; keeps the gradient of each optimizer step."""

    def __init__(self, folder: Path | None = None, weighted: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(SAMPLES))
        self.folder, self.weighted = folder, weighted
        self.stepped: list[list[float]] = []
        self.trained = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.trained += len(batch)
        loss = (batch @ self.weight).mean()
        return {"loss": loss, "weight": len(batch)} if self.weighted else loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        assert self.weight.grad is not None
        self.stepped.append(self.weight.grad.tolist())

    def on_train_batch_end(self, *args: Any) -> None:
        if self.folder is not None:
            self.trainer.save_checkpoint(self.folder / f"{self.trained}.ckpt")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1.0)


def fit(folder: Path, module: Shares, size: int, accumulate: int, ckpt_path: Path | None = None, **kwargs: Any) -> Any:
    L.seed_everything(1, verbose=False)
    loader = kwargs.pop("loader", None) or DataLoader(OneHot(), size, shuffle=True)
    run = trainer(folder, accumulate_grad_batches=accumulate, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(module, loader, ckpt_path=ckpt_path)
    return module


def samples(stepped: list[list[float]], at: str) -> Iterator[int]:
    """The samples of some steps, each of which is the mean over its samples; the epoch's last batch may be smaller."""
    for number, gradient in enumerate(stepped, 1):
        of = [i for i, share in enumerate(gradient) if share]
        assert sum(gradient) == pytest.approx(1), at
        for i in of if number < len(stepped) else ():
            assert gradient[i] == pytest.approx(1 / len(of)), at
        yield from of


@pytest.mark.parametrize(("size", "accumulate"), SETTINGS)
def test_each_sample_once_and_no_gradient_lost(size: int, accumulate: int, tmp_path: Path) -> None:
    """Each of nine settings saves after each batch, and each of the nine goes on from there."""
    before = fit(tmp_path, Shares(tmp_path), size, accumulate)
    assert Counter(samples(before.stepped, "before")) == Counter(range(SAMPLES))
    places = sorted({size * accumulate, size * (accumulate + 1), size * (2 * accumulate - 1), SAMPLES - size})
    for done in [place for place in places if place < SAMPLES]:
        path = tmp_path / f"{done}.ckpt"
        for other, every in SETTINGS:
            at = f"{size}/{accumulate} to {other}/{every} after {done} samples"
            after = fit(tmp_path, Shares(), other, every, path)
            assert after.trained == SAMPLES - done, at
            first = before.stepped[: done // (size * accumulate)]
            assert Counter(samples(first + after.stepped, at)) == Counter(range(SAMPLES)), at


@pytest.mark.parametrize("weighted", [False, True])
def test_resumed_twice_within_one_accumulation(weighted: bool, tmp_path: Path) -> None:
    """Batches of 1 in fours, of 2 in threes, of 1 in eights: the second checkpoint is of the first step, too."""
    first = fit(tmp_path, Shares(tmp_path, weighted), 1, 4)
    second = fit(tmp_path, Shares(tmp_path, weighted), 2, 3, tmp_path / "6.ckpt")
    third = fit(tmp_path, Shares(None, weighted), 1, 8, tmp_path / "2.ckpt")
    again = fit(tmp_path, Shares(None, weighted), 2, 3, tmp_path / "2.ckpt")
    for rest in (third, again):
        taken = list(samples(first.stepped[:1] + rest.stepped, "twice"))
        assert Counter(taken) == Counter(range(SAMPLES))
    assert again.stepped == second.stepped, "with what it was saved with, to the last bit"
    assert [sum(map(bool, gradient)) for gradient in third.stepped] == [8, 4]


def test_the_warning_says_what_happens(tmp_path: Path) -> None:
    fit(tmp_path, Shares(tmp_path), 1, 4)
    run = trainer(tmp_path, accumulate_grad_batches=2)
    with pytest.warns(UserWarning, match="an accumulation of 4 batches, of which 3 were done.* of the next 1 batch"):
        run.fit(Shares(), DataLoader(OneHot(), 1, shuffle=True), ckpt_path=tmp_path / "7.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer(tmp_path, accumulate_grad_batches=2).fit(
            Shares(), DataLoader(OneHot(), 1, shuffle=True), ckpt_path=tmp_path / "8.ckpt"
        )


def test_nothing_is_left_but_the_gradients(tmp_path: Path) -> None:
    """Larger batches, whose last one would be too small: the epoch ends with the step for what was accumulated."""
    loader = DataLoader(OneHot(), 5, shuffle=True, drop_last=True)
    before = fit(tmp_path, Shares(tmp_path), 1, 4)
    after = fit(tmp_path, Shares(), 5, 4, tmp_path / "14.ckpt", loader=loader)
    taken = Counter(samples(before.stepped[:3] + after.stepped, "the end"))
    assert max(taken.values()) == 1
    assert sum(taken.values()) == 14


# ------------------------------------------------------------------------------------------------ the scheduler


class Failing(Shares):
    """Fails in epoch 1, in the middle of an accumulation."""

    fails = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if self.fails and self.current_epoch == 1 and batch_idx == 3:
            raise RuntimeError("out of memory")
        return super().training_step(batch, batch_idx)


def test_an_accumulation_that_a_callback_chose_is_kept(tmp_path: Path) -> None:
    """The scheduler gives the trainer its number back before a checkpoint of the failure is saved."""
    whole = fit(tmp_path, Failing(), 2, 1, max_epochs=2, callbacks=GradientAccumulationScheduler({0: 4, 1: 2}))
    failing = Failing()
    failing.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        callbacks = [GradientAccumulationScheduler({0: 4, 1: 2}), OnExceptionCheckpoint(tmp_path, "failed")]
        fit(tmp_path, failing, 2, 1, max_epochs=2, callbacks=callbacks, enable_checkpointing=True)
    assert failing.trainer.accumulate_grad_batches == 1
    rest = Failing()
    callbacks = [GradientAccumulationScheduler({0: 4, 1: 2})]
    fit(tmp_path, rest, 2, 1, tmp_path / "failed.ckpt", max_epochs=2, callbacks=callbacks, enable_checkpointing=True)
    assert failing.stepped + rest.stepped == whole.stepped


def test_a_checkpoint_between_two_accumulations_of_a_callback(tmp_path: Path) -> None:
    class Saving(Shares):
        def on_train_epoch_end(self) -> None:
            self.trainer.save_checkpoint(tmp_path / f"end{self.current_epoch}.ckpt")

        def on_train_epoch_start(self) -> None:
            self.trainer.save_checkpoint(tmp_path / f"start{self.current_epoch}.ckpt")

    plan = {0: 4, 1: 2, 2: 1}
    whole = fit(tmp_path, Saving(), 2, 1, max_epochs=3, callbacks=GradientAccumulationScheduler(plan))
    assert len(whole.stepped) == 2 + 4 + 8
    for name, done in (("end0", 2), ("start1", 2), ("end1", 6), ("start2", 6)):
        rest = fit(
            tmp_path, Shares(), 2, 1, tmp_path / f"{name}.ckpt", max_epochs=3,
            callbacks=GradientAccumulationScheduler(plan),
        )  # fmt: skip
        assert rest.stepped == whole.stepped[done:], name


def test_another_plan_of_the_callback_within_an_accumulation(tmp_path: Path) -> None:
    before = fit(tmp_path, Shares(tmp_path), 1, 1, callbacks=GradientAccumulationScheduler({0: 4}))
    after = fit(tmp_path, Shares(), 1, 1, tmp_path / "7.ckpt", callbacks=GradientAccumulationScheduler({0: 2}))
    assert Counter(samples(before.stepped[:1] + after.stepped, "another plan")) == Counter(range(SAMPLES))
    assert [sum(map(bool, gradient)) for gradient in after.stepped] == [4, 2, 2, 2, 2]


def test_gradients_that_a_module_accumulates_itself(tmp_path: Path) -> None:
    class ByHand(Shares):
        automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            self.trained += len(batch)
            self.manual_backward((batch @ self.weight).sum())
            if self.trained % 4 == 0:
                optimizer = self.optimizers()
                optimizer.step()
                optimizer.zero_grad()

    before = fit(tmp_path, ByHand(tmp_path), 2, 1)
    after = fit(tmp_path, ByHand(), 1, 1, tmp_path / "6.ckpt")
    taken = [i for gradient in before.stepped[:1] + after.stepped for i, share in enumerate(gradient) if share == 1]
    assert len(taken) == len(set(taken)) == 14  # the last two were not stepped for


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return (torch.full((4,), float(i)) for i in range(SAMPLES))


class Batches:
    """A batch sampler that is none of torch's."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def __len__(self) -> int:
        return SAMPLES // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        return (list(range(i, i + self.batch_size)) for i in range(0, SAMPLES, self.batch_size))


def of_size(kind: str, size: int) -> DataLoader[Tensor]:
    if kind == "stream":
        return DataLoader(Stream(), size)
    return DataLoader(loader(SAMPLES).dataset, batch_sampler=Batches(size))


class Broken(Net):
    def __init__(self, at: tuple[int, int] | None = None) -> None:
        super().__init__(lr=0.1)
        self.at, self.samples = at, list[float]()

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if self.at == (self.current_epoch, batch_idx):
            raise RuntimeError("failed")
        self.samples += batch[:, 0].tolist()
        return super().training_step(batch, batch_idx)


def fail(folder: Path, at: tuple[int, int], batches: Any, **settings: Any) -> Broken:
    saving = OnExceptionCheckpoint(folder)
    module = Broken(at)
    with pytest.raises(RuntimeError, match="failed"):
        trainer(folder, enable_checkpointing=True, callbacks=saving, **settings).fit(module, batches)
    return module


@pytest.mark.parametrize("kind", ["stream", "batch sampler"])
@pytest.mark.parametrize(("size", "other"), [(1, 2), (2, 1), (2, 2)])
def test_batches_whose_position_has_no_meaning_begin_anew(tmp_path: Path, kind: str, size: int, other: int) -> None:
    """Neither skipped nor repeated without a word."""
    before, after = fail(tmp_path, (0, 3), of_size(kind, size)), Broken()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer(tmp_path).fit(after, of_size(kind, other), ckpt_path=tmp_path / "on_exception.ckpt")
    anew = any("batch size has changed" in str(each.message) for each in told)
    assert anew is (size != other)
    assert (after.samples if anew else before.samples + after.samples) == [float(i) for i in range(SAMPLES)]


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_an_error_in_the_last_batch_of_an_epoch_loses_no_gradient(tmp_path: Path, accumulate: int) -> None:
    settings = {"max_epochs": 2, "accumulate_grad_batches": accumulate}
    whole = Broken()
    trainer(tmp_path, **settings).fit(whole, loader())
    before, after = fail(tmp_path, (0, 3), loader(), **settings), Broken()
    trainer(tmp_path, **settings).fit(after, loader(), ckpt_path=tmp_path / "on_exception.ckpt")
    assert before.samples + after.samples == whole.samples
    assert all(map(torch.equal, after.parameters(), whole.parameters()))


def test_an_error_in_the_last_batch_and_another_batch_size(tmp_path: Path) -> None:
    before, after = fail(tmp_path, (0, 3), loader(16, 4)), Broken()
    with pytest.warns(UserWarning, match="the epoch goes on at sample 12"):
        trainer(tmp_path).fit(after, loader(16, 2), ckpt_path=tmp_path / "on_exception.ckpt")
    assert before.samples + after.samples == [float(i) for i in range(16)]
