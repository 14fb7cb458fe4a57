"""Arguments and results that are one object or several: lists, tuples, omegaconf's ListConfig, sets, generators.

Of loaders, a list, a tuple or a ListConfig is several, and any other iterable is one.

Tests of ``treadle_fabric.checks``, ``treadle_fabric.data.several``, ``treadle.loops.optimizers``,
``treadle.trainer.settings``.
"""

from __future__ import annotations

from collections import UserList
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.models import Net, loader, trainer
from torch import Tensor, nn

import treadle as L
from treadle.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelSummary, Timer
from treadle_fabric import DDPStrategy, Fabric, MixedPrecision, TorchCheckpointIO, resolve
from treadle_fabric.data import CombinedLoader
from treadle_fabric.loggers import CSVLogger


def list_config(items: Any) -> Any:
    omegaconf = pytest.importorskip("omegaconf")
    return omegaconf.ListConfig(list(items), flags={"allow_objects": True})


def dict_config(items: dict[str, Any]) -> Any:
    omegaconf = pytest.importorskip("omegaconf")
    return omegaconf.DictConfig(items, flags={"allow_objects": True})


LISTS: dict[str, Callable[[Any], Any]] = {"list": list, "tuple": tuple, "ListConfig": list_config}
ANY: dict[str, Callable[[Any], Any]] = {
    **LISTS,
    "generator": lambda items: (item for item in items),
    "set": set,
    "frozenset": frozenset,
    "values": lambda items: dict(enumerate(items)).values(),
    "UserList": UserList,
    "map": lambda items: map(items.__getitem__, range(len(items))),
}
any_kind = pytest.mark.parametrize("several", ANY.values(), ids=list(ANY))
any_list = pytest.mark.parametrize("several", LISTS.values(), ids=list(LISTS))


@any_kind
def test_callbacks_and_loggers(several: Callable[[Any], Any], tmp_path: Path) -> None:
    given = [Timer(), EarlyStopping("val_loss")]
    writes = [CSVLogger(tmp_path, "one"), CSVLogger(tmp_path, "two")]
    run = trainer(tmp_path, callbacks=several(given), logger=several(writes))
    assert {*map(id, run.callbacks)} == {*map(id, given)}
    assert {*map(id, run.loggers)} == {*map(id, run.fabric.loggers)} == {*map(id, writes)}
    hooked = [nn.Identity(), nn.Identity()]
    fabric = Fabric(accelerator="cpu", callbacks=several(hooked), loggers=several(writes))
    assert {*map(id, fabric.callbacks)} == {*map(id, hooked)}
    assert {*map(id, fabric.loggers)} == {*map(id, writes)}


def test_one_object_that_can_be_iterated_is_one() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert Fabric(accelerator="cpu", callbacks=model).callbacks == [model]


@any_kind
def test_plugins_and_devices(several: Callable[[Any], Any]) -> None:
    plan = resolve(accelerator="cpu", plugins=several([MixedPrecision("bf16-mixed"), TorchCheckpointIO()]))
    assert plan.precision.precision == "bf16-mixed"  # type: ignore[union-attr]
    assert isinstance(plan.checkpoint_io, TorchCheckpointIO)
    plan = resolve(accelerator="cuda", devices=several([0, 1]), strategy="ddp", available={"cuda": 4, "cpu": 1})
    assert sorted(str(device) for device in plan.devices) == ["cuda:0", "cuda:1"]
    strategy = DDPStrategy(parallel_devices=several([torch.device("cpu"), torch.device("cpu", 0)]))
    assert len(strategy.parallel_devices) == 2


class Given(Net):
    """Returns from ``configure_optimizers`` what it is given a function for."""

    def __init__(self, make: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.make = make
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        for optimizer in self.trainer.wrapped_optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.SGD([p], 0.1) for p in self.parameters()]
        return self.make(optimizers, [torch.optim.lr_scheduler.StepLR(each, 1) for each in optimizers])


@any_kind
@pytest.mark.parametrize("form", ["optimizers", "two lists", "dicts", "schedulers of a dict"])
def test_optimizers_and_schedulers(several: Callable[[Any], Any], form: str, tmp_path: Path) -> None:
    if several in (set, frozenset) and form == "dicts":
        pytest.skip("dictionaries have no hash")
    forms: dict[str, Callable[[Any, Any], Any]] = {
        "optimizers": lambda o, s: several(o),
        "two lists": lambda o, s: (several(o), several(s)),
        "dicts": lambda o, s: several([{"optimizer": a, "lr_scheduler": b} for a, b in zip(o, s)]),
        "schedulers of a dict": lambda o, s: {"optimizer": o[0], "lr_scheduler": several(s[:1])},
    }
    run = trainer(tmp_path, limit_train_batches=1)
    run.fit(Given(forms[form]), loader())
    assert len(run.optimizers) == (1 if form == "schedulers of a dict" else 2)
    assert len(run.lr_scheduler_configs) == (0 if form == "optimizers" else len(run.optimizers))


def test_configure_optimizers_and_callbacks_may_yield(tmp_path: Path) -> None:
    class Yields(Given):
        def configure_optimizers(self) -> Any:
            yield torch.optim.SGD([self.layer.weight], 0.1)
            yield torch.optim.SGD([self.layer.bias], 0.1)

        def configure_callbacks(self) -> Any:
            yield Timer()
            yield ModelSummary()

    run = trainer(tmp_path, limit_train_batches=1)
    run.fit(Yields(print), loader())
    assert len(run.optimizers) == 2
    assert [type(each) for each in run.callbacks] == [Timer, ModelSummary]


def test_configure_callbacks_may_return_none_and_is_checked(tmp_path: Path) -> None:
    class Returns(Net):
        callbacks: Any = None

        def configure_callbacks(self) -> Any:
            return self.callbacks

    model = Returns()
    trainer(tmp_path, limit_train_batches=1).fit(model, loader())
    model.callbacks = [Timer]
    with pytest.raises(L.MisconfigurationException, match="pass an instance, not the class"):
        trainer(tmp_path).fit(model, loader())


# ------------------------------------------------------------------------------------------------ loaders


class Counts(L.Callback):
    def __init__(self) -> None:
        self.trained: list[Any] = []
        self.validated: list[int] = []

    def on_train_batch_end(self, run: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.trained.append(batch)

    def on_validation_batch_end(
        self, run: Any, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.validated.append(dataloader_idx)


class TakesAll(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer.weight.sum()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        pass


def counted(tmp_path: Path, train: Any, val: Any = None) -> Counts:
    counts = Counts()
    trainer(tmp_path, callbacks=counts, num_sanity_val_steps=0).fit(TakesAll(), train, val)
    return counts


@any_list
def test_a_list_of_loaders_is_several(several: Callable[[Any], Any], tmp_path: Path) -> None:
    counts = counted(tmp_path, several([loader(4), loader(8)]), several([loader(4), loader(8)]))
    assert [type(batch) for batch in counts.trained] == [tuple if several is tuple else list] * 4
    assert counts.validated == [0, 0, 1, 1, 1, 1]

    class Hooks(TakesAll):
        def train_dataloader(self) -> Any:
            return several([loader(4), loader(8)])

        val_dataloader = train_dataloader

    counts = Counts()
    trainer(tmp_path, callbacks=counts, num_sanity_val_steps=0).fit(Hooks())
    assert len(counts.trained) == 4
    assert counts.validated == [0, 0, 1, 1, 1, 1]


def test_mappings_of_loaders_are_several(tmp_path: Path) -> None:
    nested = {"a": loader(4), "b": [loader(4), loader(8)]}
    counts = counted(tmp_path, nested, nested["b"])
    assert [list(batch) for batch in counts.trained] == [["a", "b"]] * 4
    counts = counted(tmp_path, dict_config({"a": loader(4), "b": list_config(nested["b"])}))
    assert [type(batch) for batch in counts.trained] == [dict] * 4
    assert type(counts.trained[0]["b"]) is list


class Batches:
    """An iterable of batches, and nothing else."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter([torch.ones(2, 4)] * 3)


class Sequenced(Sequence[Tensor]):
    """Batches with a length and an index; it is a ``Sequence``, and no list."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: Any) -> Any:
        return ([torch.ones(2, 4)] * 3)[index]


@dataclass
class Batch:
    x: Tensor


BATCHES: dict[str, Callable[[], Any]] = {
    "tensors": lambda: [torch.ones(2, 4)] * 3,
    "a tuple of tuples": lambda: ((torch.ones(2, 4), torch.ones(2)),) * 3,
    "dictionaries": lambda: [{"x": torch.ones(2, 4)}] * 3,
    "dataclasses": lambda: [Batch(torch.ones(2, 4))] * 3,
    "numbers": lambda: [1, 2, 3],
    "packed": lambda: [nn.utils.rnn.pack_sequence([torch.ones(2, 4)])] * 3,
}
ONE = {"an iterable": Batches, "a generator": lambda: (b for b in Batches()), "a sequence": Sequenced, **BATCHES}


@pytest.mark.parametrize("make", ONE.values(), ids=list(ONE))
def test_any_other_iterable_and_a_list_of_batches_is_one(make: Callable[[], Any], tmp_path: Path) -> None:
    counts = counted(tmp_path, make(), make())
    assert len(counts.trained) == 3
    assert counts.validated == [0] * 3
    batches = list(Fabric(accelerator="cpu").setup_dataloaders(make()))
    assert len(batches) == 3
    assert type(batches[0]) is type(counts.trained[0])


@any_list
def test_lists_go_into_and_come_out_of_fabric(several: Callable[[Any], Any]) -> None:
    fabric = Fabric(accelerator="cpu")
    found = fabric.setup_dataloaders(several([loader(4), loader(8)]))
    assert [len(each) for each in found] == [2, 4]
    one, two = fabric.setup_dataloaders(loader(4), several([loader(4), loader(8)]))
    assert len(one) == 2
    assert [len(each) for each in two] == [2, 4]

    model = nn.Linear(2, 2)
    optimizers = [torch.optim.SGD([p], 0.1) for p in model.parameters()]
    wrapped, stepped = fabric.setup(model, several(optimizers))
    assert [each.optimizer for each in stepped] == optimizers
    model = nn.Linear(2, 2)
    optimizers = [torch.optim.SGD([p], 0.1) for p in model.parameters()]
    fabric.setup_module(model)
    stepped = fabric.setup_optimizers(several(optimizers))
    assert [each.optimizer for each in stepped] == optimizers
    first, rest = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), 0.1), several(optimizers[1:]))
    assert [each.optimizer for each in rest] == optimizers[1:]


def test_configurations_in_the_place_of_dictionaries(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_time=dict_config({"minutes": 3}), val_check_interval=dict_config({"seconds": 20}))
    assert any(isinstance(each, Timer) for each in run.callbacks)
    scheduler = GradientAccumulationScheduler(pytest.importorskip("omegaconf").DictConfig({0: 2, 3: 4}))
    assert scheduler.get_accumulate_grad_batches(3) == 4
    combined = CombinedLoader(dict_config({"a": loader(4), "b": list_config([loader(8)])}), "max_size")
    assert [list(batch) for batch, _, _ in combined] == [["a", "b"]] * 4
