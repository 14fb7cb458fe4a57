"""What an evaluation leaves behind can be trained with.

Users of Lightning reported "Inference tensors cannot be saved for backward" in the first training step of models that
keep something from a validation: a table of rotary embeddings, a positional cache, what a step returned.

Tests of ``treadle.loops.inference``, ``treadle.loops.evaluate``, ``treadle.loops.predict``.
"""

from __future__ import annotations

import functools
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.trainer.models import Net, loader, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import treadle as L
from treadle import MisconfigurationException
from treadle_fabric.strategies import SingleDeviceStrategy


@dataclass(slots=True)
class Slotted:
    table: Any = None


class Table(nn.Module):
    """Makes a table in its first forward, and keeps it at the place ``where``."""

    shared: dict[str, Tensor] = {}

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.register_buffer("buffer", None)
        self.attribute: Any = None
        self.listed: list[Any] = []
        self.nested: dict[str, Any] = {}
        self.tupled: Any = ()
        self.recent: deque[Any] = deque(maxlen=2)
        self.object = SimpleNamespace()
        self.slotted = Slotted()
        self.hidden = [Inner()]  # no submodule: not in a ModuleList

    def kept(self) -> Any:
        match self.where:
            case "buffer":
                return self.buffer
            case "attribute":
                return self.attribute
            case "list":
                return self.listed[0] if self.listed else None
            case "nested":
                return self.nested["a"][0]["b"] if self.nested else None
            case "tuple":
                return self.tupled[0] if self.tupled else None
            case "deque":
                return self.recent[0] if self.recent else None
            case "object":
                return getattr(self.object, "table", None)
            case "slots":
                return self.slotted.table
            case "class":
                return self.shared.get("table")
            case _:
                return self.hidden[0].table

    def keep(self, table: Tensor) -> None:
        match self.where:
            case "buffer":
                self.buffer = table
            case "attribute":
                self.attribute = table
            case "list":
                self.listed.append(table)
            case "nested":
                self.nested["a"] = [{"b": table}]
            case "tuple":
                self.tupled = (table, 1)
            case "deque":
                self.recent.append(table)
            case "object":
                self.object.table = table
            case "slots":
                self.slotted.table = table
            case "class":
                self.shared["table"] = table
            case _:
                self.hidden[0].table = table

    def forward(self, x: Tensor) -> Tensor:
        if self.kept() is None:
            self.keep(torch.arange(4.0).cos())
        table: Tensor = self.kept()
        return x * table


class Inner(nn.Module):
    table: Any = None


PLACES = ["buffer", "attribute", "list", "nested", "tuple", "deque", "object", "slots", "class", "module in a list"]


class Rotary(Net):
    def __init__(self, where: str = "attribute") -> None:
        super().__init__(lr=0.1)
        Table.shared.clear()
        self.rope = Table(where)

    def forward(self, x: Tensor) -> Tensor:
        return self.rope(self.layer(x.clone()) @ torch.ones(2, 4))


@pytest.mark.parametrize("where", PLACES)
def test_a_table_of_the_sanity_check_or_a_validation_is_trained_with(tmp_path: Path, where: str) -> None:
    trainer(tmp_path).fit(Rotary(where), loader(), loader(2))
    trainer(tmp_path, num_sanity_val_steps=0, val_check_interval=2).fit(Rotary(where), loader(), loader(2))


@pytest.mark.parametrize("stage", ["validate", "test", "predict", "stream"])
@pytest.mark.parametrize("where", PLACES)
def test_a_table_of_an_evaluation_before_the_fit_is_trained_with(tmp_path: Path, where: str, stage: str) -> None:
    model, run = Rotary(where), trainer(tmp_path)
    match stage:
        case "validate":
            run.validate(model, loader(), verbose=False)
        case "test":
            run.test(model, loader(), verbose=False)
        case "predict":
            run.predict(model, loader())
        case _:
            list(run.predict(model, loader(), return_predictions="stream"))  # type: ignore[arg-type]
    assert torch.equal(model.rope.kept(), torch.arange(4.0).cos())
    model(torch.ones(2, 4)).sum().backward()  # a hand-written step
    run.fit(model, loader(), loader(2))
    assert run.global_step == 4


def test_a_tensor_that_is_kept_at_two_places_stays_one(tmp_path: Path) -> None:
    class Twice(Rotary):
        def on_validation_end(self) -> None:
            self.also = self.rope.attribute
            self.pair = [self.also, self.also]

    model = Twice()
    trainer(tmp_path).validate(model, loader(), verbose=False)
    assert model.also is model.rope.attribute is model.pair[0] is model.pair[1]
    assert not model.also.is_inference()


def test_what_validation_step_keeps_is_trained_with(tmp_path: Path) -> None:
    class Keeping(Net):
        def __init__(self) -> None:
            super().__init__()
            self.kept: list[Tensor] = []

        def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.kept.append(self.layer(batch))

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return (self.layer(batch) * self.kept[0]).square().mean()

    trainer(tmp_path).fit(Keeping(), loader(), loader(2))


def test_gradients_can_be_computed_in_a_validation_of_fit(tmp_path: Path) -> None:
    class Penalty(Net):
        norms: list[float] = []

        def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
            with torch.enable_grad():
                given = batch.clone().requires_grad_()
                (gradient,) = torch.autograd.grad(self.loss(given), given)
            self.norms.append(gradient.norm().item())

    trainer(tmp_path, max_epochs=2).fit(Penalty(), loader(), loader(2))
    assert len(Penalty.norms) == 3 and all(Penalty.norms)


def test_layers_that_are_made_in_an_evaluation_are_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = Net(lr=0.1)
    model.layer = nn.LazyLinear(2)
    trainer(tmp_path).validate(model, loader(), verbose=False)
    before = model.layer.weight.detach().clone()
    trainer(tmp_path).fit(model, loader())
    assert isinstance(model.layer.weight, nn.Parameter) and model.layer.weight.requires_grad
    assert not torch.equal(model.layer.weight, before)


class Scaled(nn.Parameter):
    """A parameter of a library's own class, with something of its own, as quantized ones have scales."""

    scale = 1.0


def test_a_parameter_whose_memory_an_evaluation_replaces_stays_itself(tmp_path: Path) -> None:
    class Packing(Net):
        def test_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.layer.weight.data = self.layer.weight.data.clone()  # in another layout, say

    model: Any = Packing(lr=0.1)
    model.layer.weight = weight = Scaled(model.layer.weight.detach())
    weight.scale = 2.0
    trainer(tmp_path).test(model, loader(), verbose=False)
    assert model.layer.weight is weight and weight.scale == 2.0 and not weight.is_inference()
    before = weight.detach().clone()
    trainer(tmp_path).fit(model, loader())
    assert not torch.equal(weight, before)


class Accumulator(nn.Module):
    """A metric like those of torchmetrics: its state is a tensor that is made anew by a reset, and changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.total: Tensor = torch.zeros(())

    def update(self, value: Tensor) -> None:
        self.total += value

    def compute(self) -> Tensor:
        return self.total

    def reset(self) -> None:
        self.total = torch.zeros(())


def test_a_metric_that_was_reset_in_an_evaluation_is_updated_in_training(tmp_path: Path) -> None:
    class Measured(Net):
        def __init__(self) -> None:
            super().__init__()
            self.metric = Accumulator()

        def measure(self, batch: Tensor) -> None:
            self.metric.update(self.loss(batch).detach())
            self.log("metric", self.metric, on_step=False, on_epoch=True)

        def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.measure(batch)

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.measure(batch)
            return self.loss(batch)

    model, run = Measured(), trainer(tmp_path)
    run.validate(model, loader(), verbose=False)
    run.fit(model, loader(), loader(2))
    run.test(model, loader(), verbose=False)
    model.metric.update(torch.ones(()))


def test_what_callbacks_and_data_modules_keep_is_trained_with(tmp_path: Path) -> None:
    class Teacher(L.Callback):
        def __init__(self) -> None:
            self.outputs: list[Tensor] = []

        def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *rest: Any) -> None:
            self.outputs.append(outputs)

    class Data(L.LightningDataModule):
        scale: Any = None

        def predict_dataloader(self) -> Any:
            return loader()

        def train_dataloader(self) -> Any:
            return loader()

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            if self.scale is None:
                self.scale = torch.full((4,), 0.5)
            return batch * self.scale

    class Student(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return (self.layer(batch) * teacher.outputs[batch_idx] * data.scale[:2]).square().mean()

    teacher, data, model = Teacher(), Data(), Student()
    run = trainer(tmp_path, callbacks=teacher)
    run.predict(model, datamodule=data)
    run.fit(model, datamodule=data)
    assert run.global_step == 4


@pytest.mark.parametrize("stream", [True, False])
def test_predictions_are_trained_with(tmp_path: Path, stream: bool) -> None:
    class Structured(Net):
        def predict_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return {"features": (batch * 2, [batch + 1])}

    run, model = trainer(tmp_path), Structured()
    found = run.predict(model, loader(), return_predictions="stream" if stream else True)
    features = [one["features"] for one in found]  # type: ignore[union-attr]
    layer = nn.Linear(4, 1)
    for doubled, (more,) in features:
        (layer(doubled) * layer(more)).sum().backward()


def test_metrics_of_an_evaluation_are_trained_with(tmp_path: Path) -> None:
    run, model = trainer(tmp_path), Net()
    run.validate(model, loader(), verbose=False)
    (model(torch.ones(4)) * run.callback_metrics["val_loss"]).sum().backward()
    (model(torch.ones(4)) * run.logged_metrics["val_loss"]).sum().backward()


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_a_dataset_that_keeps_what_it_loads_in_an_evaluation_is_trained_on(tmp_path: Path, stage: str) -> None:
    class Cached(Dataset[Tensor]):
        kept: dict[int, Tensor] = {}

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Tensor:
            assert not torch.is_inference_mode_enabled() and not (evaluating and torch.is_grad_enabled())
            return self.kept.setdefault(index, torch.full((4,), float(index)) / 10)

    data, model, run = DataLoader(Cached(), batch_size=None), Net(), trainer(tmp_path)
    evaluating = True
    getattr(run, stage)(model, data, verbose=False)
    evaluating = False
    run.fit(model, data)
    assert run.global_step == 4 and len(Cached.kept) == 4


@functools.lru_cache
def table_of(size: int) -> Tensor:
    return torch.arange(float(size)).cos()


def test_a_tensor_out_of_reach_is_explained(tmp_path: Path) -> None:
    class Far(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * table_of(2)

    class Model(Net):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(Far())

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.block(self.layer(x))
            return found

    table_of.cache_clear()
    model = Model()
    trainer(tmp_path).validate(model, loader(), verbose=False)
    with pytest.raises(MisconfigurationException, match=r"Model\.block\.0 \(a Far\).*inference_mode=False"):
        trainer(tmp_path).fit(model, loader())
    table_of.cache_clear()
    run = trainer(tmp_path, inference_mode=False)
    run.validate(model, loader(), verbose=False)
    run.fit(model, loader())
    assert run.global_step == 4


def test_a_strategy_may_declare_that_it_cannot_bear_inference_mode(tmp_path: Path) -> None:
    class Sharding(SingleDeviceStrategy):
        allows_inference_mode = False

    seen: list[bool] = []

    class Watching(Net):
        def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
            seen.append(torch.is_inference_mode_enabled())
            assert not torch.is_grad_enabled()

        test_step = predict_step = validation_step  # type: ignore[assignment]

    for strategy in (Sharding(), "auto"):
        run = trainer(tmp_path, strategy=strategy)
        run.validate(Watching(), loader(2), verbose=False)
        run.test(Watching(), loader(2), verbose=False)
        run.predict(Watching(), loader(2), return_predictions=False)
        run.fit(Watching(), loader(2), loader(2))
    assert seen == [*[False] * 5, *[True] * 3, False, False], "validations of fit need no inference mode"


def test_a_tensor_out_of_reach_is_explained_in_the_sanity_check_too(tmp_path: Path) -> None:
    cache: dict[str, Tensor] = {}

    class Cached(Net):
        def forward(self, x: Tensor) -> Tensor:
            if "scale" not in cache:
                cache["scale"] = torch.ones(4)
            return super().forward(x * cache["scale"].mul_(1.0))

    run, module = trainer(tmp_path), Cached()
    run.validate(module, loader(4), verbose=False)
    with pytest.raises(MisconfigurationException, match="Cached.*inference_mode=False"):
        run.fit(module, loader(4), loader(4))


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_gradients_in_an_evaluation_name_the_argument(tmp_path: Path, stage: str) -> None:
    class Attacking(Net):
        def loss(self, batch: Tensor) -> Tensor:
            with torch.enable_grad():
                x = batch.clone().requires_grad_()
                (gradient,) = torch.autograd.grad(self.layer(x).sum(), x)
            return gradient.norm()

        def predict_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
            return self.loss(batch)

    quiet = {} if stage == "predict" else {"verbose": False}
    with pytest.raises(MisconfigurationException, match="_step` asks for gradients.*`inference_mode=False`"):
        getattr(trainer(tmp_path), stage)(Attacking(), loader(4), **quiet)
    getattr(trainer(tmp_path, inference_mode=False), stage)(Attacking(), loader(4), **quiet)
