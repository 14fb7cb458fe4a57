"""Everything that ``configure_optimizers`` may return, and when its schedulers step.

Tests of ``treadle.loops.optimizers``, ``treadle.loops.schedulers``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.models import Net, loader, trainer
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader

import treadle as L


class Shaped(Net):
    def __init__(self, shape: Callable[[Any], Any], *, manual: bool = False) -> None:
        super().__init__()
        self.shape = shape
        self.automatic_optimization = not manual

    def configure_optimizers(self) -> Any:
        return self.shape(self)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        loss = self.loss(batch)
        if not self.automatic_optimization:
            found = self.optimizers()
            for optimizer in found if isinstance(found, list) else [found]:
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in found if isinstance(found, list) else [found]:
                optimizer.step()
        return loss


def sgd(m: Net) -> SGD:
    return SGD(m.parameters(), lr=0.1)


def with_scheduler(m: Net, **config: Any) -> dict[str, Any]:
    optimizer = sgd(m)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": StepLR(optimizer, 1), **config}}


def lists(m: Net) -> Any:
    optimizer = sgd(m)
    return [optimizer], [StepLR(optimizer, 1)]


def two(m: Net) -> Any:
    return SGD([m.layer.weight], lr=0.1), Adam([m.layer.bias], lr=0.1)


@pytest.mark.parametrize(
    ("shape", "manual", "optimizers", "schedulers"),
    [
        (sgd, False, 1, 0),
        (lambda m: [sgd(m)], False, 1, 0),
        (lists, False, 1, 1),
        (lambda m: (lists(m)[0], []), False, 1, 0),
        (with_scheduler, False, 1, 1),
        (lambda m: {"optimizer": sgd(m)}, False, 1, 0),
        (lambda m: [with_scheduler(m)], False, 1, 1),
        (two, False, 2, 0),
        (two, True, 2, 0),
        (lambda m: [{"optimizer": o, "lr_scheduler": StepLR(o, 1)} for o in two(m)], True, 2, 2),
    ],
)
def test_every_shape(tmp_path: Path, shape: Any, manual: bool, optimizers: int, schedulers: int) -> None:
    model = Shaped(shape, manual=manual)
    before = model.layer.weight.clone()
    run = trainer(tmp_path)
    run.fit(model, loader())
    assert (len(run.optimizers), len(run.lr_scheduler_configs)) == (optimizers, schedulers)
    assert not torch.equal(model.layer.weight, before)
    assert run.global_step == 4  # whatever the number of optimizers


def test_none_trains_nothing_and_says_so(tmp_path: Path) -> None:
    model = Shaped(lambda m: None)
    before = model.layer.weight.clone()
    with pytest.warns(UserWarning, match="returned `None`"):
        trainer(tmp_path).fit(model, loader())
    assert torch.equal(model.layer.weight, before)


class Foreign(Net):
    def configure_optimizers(self) -> Any:
        return SGD(Net().parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (lambda m: {"optimiser": sgd(m)}, "Did you mean 'optimizer'"),
        (lambda m: {"lr_scheduler": None}, "without the key 'optimizer'"),
        (lambda m: "adam", "it may return"),
        (lambda m: [sgd(m), 3], "it may return"),
        (lambda m: with_scheduler(m, interval="steps"), 'must be "step" or "epoch"'),
        (lambda m: with_scheduler(m, frequency=0), "at least 1"),
        (
            lambda m: {"optimizer": (o := sgd(m)), "lr_scheduler": ReduceLROnPlateau(o)},
            "must include a monitor",
        ),
        (lambda m: ([sgd(m)], [StepLR(sgd(m), 1)]), "is attached with an optimizer"),
        (lambda m: ([sgd(m)], ["warmup"]), "has no `state_dict`"),
        (lambda m: ([sgd(m)], [ByEpoch(m)]), "no learning-rate scheduler"),
        (lambda m: SGD(Net().parameters(), lr=0.1), "not this"),
    ],
)
def test_what_cannot_work_is_refused_before_training(tmp_path: Path, shape: Any, message: str) -> None:
    with pytest.raises(L.MisconfigurationException, match=message):
        trainer(tmp_path).fit(Shaped(shape), loader())


class ByEpoch:
    """A scheduler as timm has them: ``step`` asks for the epoch."""

    def __init__(self, module: Any) -> None:
        self.optimizer = sgd(module)

    def step(self, epoch: int, metric: Any = None) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class Counting(StepLR):
    steps = 0

    def step(self, *args: Any) -> None:
        type(self).steps += 1
        super().step(*args)


@pytest.mark.parametrize(
    ("config", "kwargs", "steps"),
    [
        ({}, {}, 3),
        ({"frequency": 2}, {}, 1),
        ({"interval": "step"}, {}, 12),
        ({"interval": "step", "frequency": 5}, {}, 2),
        ({"interval": "step"}, {"accumulate_grad_batches": 2}, 6),
        ({"interval": "step", "frequency": 2}, {"accumulate_grad_batches": 2}, 3),
    ],
)
def test_schedulers_step_by_interval_and_frequency(
    tmp_path: Path, config: dict[str, Any], kwargs: dict[str, Any], steps: int
) -> None:
    def shape(m: Net) -> Any:
        optimizer = sgd(m)
        scheduler = Counting(optimizer, 1)
        Counting.steps = 0  # making it steps once
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **config}}

    trainer(tmp_path, max_epochs=3, **kwargs).fit(Shaped(shape), loader())
    assert Counting.steps == steps


def plateau(m: Net, **config: Any) -> Any:
    optimizer = sgd(m)
    scheduler = ReduceLROnPlateau(optimizer, patience=0)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **config}}


def test_a_plateau_scheduler_follows_its_metric(tmp_path: Path) -> None:
    class Logging(Shaped):
        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            self.log("val_loss", 1.0 + self.current_epoch)

    model = Logging(lambda m: plateau(m, monitor="val_loss"))
    run = trainer(tmp_path, max_epochs=3)
    run.fit(model, loader(), loader())
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.1**2)


def test_a_metric_that_nobody_logged_is_named_with_the_near_ones(tmp_path: Path) -> None:
    class Logging(Shaped):
        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            self.log("val_loss", 1.0)

    with pytest.raises(L.MisconfigurationException, match="'val_los'.*Did you mean 'val_loss'"):
        trainer(tmp_path).fit(Logging(lambda m: plateau(m, monitor="val_los")), loader(), loader())
    with pytest.warns(RuntimeWarning, match="The step is skipped"):
        trainer(tmp_path).fit(Logging(lambda m: plateau(m, monitor="val_los", strict=False)), loader(), loader())


def test_estimated_stepping_batches_is_known_when_optimizers_are_made(tmp_path: Path) -> None:
    seen: list[float] = []

    def shape(m: Any) -> Any:
        seen.append(m.trainer.estimated_stepping_batches)
        return sgd(m)

    asked: list[int] = []

    class Own(Shaped):
        def train_dataloader(self) -> Any:
            asked.append(1)
            return loader(10)

    run = trainer(tmp_path, max_epochs=3, accumulate_grad_batches=2)
    run.fit(Own(shape))
    assert seen == [9]
    assert run.global_step == 9
    assert asked == [1]


@pytest.mark.parametrize("manual", [False, True])
def test_a_batch_of_none_is_skipped_and_told_of_once(tmp_path: Path, manual: bool) -> None:
    """A collate function that leaves broken samples out may have none left."""

    class Seen(Shaped):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert batch is not None
            got.append(batch_idx)
            return super().training_step(batch, batch_idx)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            assert batch is not None

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            ended.append((batch_idx, bool(outputs)))

    got: list[int] = []
    ended: list[tuple[int, bool]] = []
    rows = [torch.ones(2, 4), None, torch.zeros(2, 4), None]
    with pytest.warns(UserWarning, match="train_dataloader yielded None") as told:
        trainer(tmp_path).fit(Seen(sgd, manual=manual), DataLoader(rows, batch_size=None))
    assert got == [0, 2] and [i for i, _ in ended] == [0, 1, 2, 3]
    assert manual or [has for _, has in ended] == [True, False, True, False]
    assert len([w for w in told if "yielded None" in str(w.message)]) == 1
