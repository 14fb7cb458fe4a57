"""Tests of ``treadle.module.datamodule``."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.models import Net, loader, trainer
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, TensorDataset

from treadle.module.datamodule import LightningDataModule
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.strategies import SingleDeviceStrategy


def dataset(n: int) -> TensorDataset:
    return TensorDataset(torch.arange(n))


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


class Sized(LightningDataModule):
    def __init__(self, n: int = 3, batch_size: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.epochs_seen = 0

    def setup(self, stage: str) -> None:
        self.data = dataset(self.hparams.n)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return [DataLoader(dataset(4)), DataLoader(Stream())]

    def state_dict(self) -> dict[str, Any]:
        return {"epochs_seen": self.epochs_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs_seen = state_dict["epochs_seen"]


@pytest.mark.parametrize("name", ["train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader"])
def test_loaders_that_are_not_defined_say_so(name: str) -> None:
    with pytest.raises(MisconfigurationException, match=rf"LightningDataModule does not define {name}\(\)"):
        getattr(LightningDataModule(), name)()


@pytest.mark.parametrize(("per_node", "calls"), [(True, 1), (False, 0)])
def test_data_is_prepared_once_a_node_or_once_in_all(tmp_path: Path, per_node: bool, calls: int) -> None:
    class OnSecondNode(SingleDeviceStrategy):
        global_rank = property(lambda self: 1)

    class Prepares(LightningDataModule):
        prepare_data_per_node = per_node
        prepared = 0

        def prepare_data(self) -> None:
            self.prepared += 1

        def val_dataloader(self) -> Any:
            return loader(4)

    data = Prepares()
    trainer(tmp_path, strategy=OnSecondNode(), devices="auto").validate(Net(), datamodule=data, verbose=False)
    assert data.prepared == calls


def test_hooks_do_nothing_by_default() -> None:
    datamodule = LightningDataModule()
    batch = {"x": torch.zeros(2)}
    datamodule.prepare_data()
    datamodule.setup("fit")
    datamodule.teardown("fit")
    datamodule.on_exception(KeyboardInterrupt())
    datamodule.load_state_dict(datamodule.state_dict())
    assert datamodule.trainer is None
    assert datamodule.on_before_batch_transfer(batch, 0) is batch
    assert datamodule.on_after_batch_transfer(batch, 0) is batch
    assert datamodule.transfer_batch_to_device(batch, torch.device("cpu"), 0) is batch


def test_transfer_moves_the_batch() -> None:
    moved = LightningDataModule().transfer_batch_to_device([{"x": torch.zeros(2)}], torch.device("meta"), 0)
    assert moved[0]["x"].device.type == "meta"


def test_from_datasets() -> None:
    datamodule = LightningDataModule.from_datasets(
        dataset(5), [dataset(4), dataset(3)], predict_dataset=dataset(2), batch_size=2
    )
    train = datamodule.train_dataloader()
    assert isinstance(train.sampler, RandomSampler)
    assert train.batch_size == 2
    val = datamodule.val_dataloader()
    assert [len(loader.dataset) for loader in val] == [4, 3]
    assert isinstance(val[0].sampler, SequentialSampler)
    assert torch.equal(torch.cat([x for (x,) in datamodule.predict_dataloader()]), torch.arange(2))
    with pytest.raises(MisconfigurationException, match="test_dataloader"):
        datamodule.test_dataloader()


def test_from_datasets_by_name_and_streams() -> None:
    datamodule = LightningDataModule.from_datasets({"a": dataset(5), "b": Stream()}, batch_size=3)
    train = datamodule.train_dataloader()
    assert isinstance(train["a"].sampler, RandomSampler)
    assert [batch.tolist() for batch in train["b"]] == [[0, 1, 2]]


def test_from_datasets_fills_init_arguments() -> None:
    datamodule = Sized.from_datasets(dataset(5), batch_size=4, n=7)
    assert datamodule.hparams == {"n": 7, "batch_size": 4}
    assert datamodule.train_dataloader().batch_size == 4


def test_from_datasets_can_go_to_another_process() -> None:
    datamodule = pickle.loads(pickle.dumps(LightningDataModule.from_datasets(dataset(5), batch_size=5)))
    assert sorted(next(iter(datamodule.train_dataloader()))[0].tolist()) == [0, 1, 2, 3, 4]


def test_str_lists_datasets_and_sizes() -> None:
    datamodule = Sized(n=6)
    assert str(datamodule).splitlines()[0] == "{Train dataloader: None}"
    datamodule.setup("fit")
    assert str(datamodule).splitlines() == [
        "{Train dataloader: size=6}",
        "{Validation dataloader: 1. size=4 ; 2. size=NA}",
        "{Test dataloader: None}",
        "{Predict dataloader: None}",
    ]
    named: dict[str, Dataset[Any]] = {"a": dataset(2), "b": dataset(3)}
    assert "{Train dataloader: a. size=2 ; b. size=3}" in str(LightningDataModule.from_datasets(named))


def checkpoint(path: Path, **extra: Any) -> Path:
    torch.save({"state_dict": {}, **extra}, path)
    return path


def test_load_from_checkpoint(tmp_path: Path) -> None:
    path = checkpoint(
        tmp_path / "a.ckpt",
        datamodule_hyper_parameters={"n": 8, "batch_size": 2},
        datamodule_hparams_name="kwargs",
        Sized={"epochs_seen": 5},
        hyper_parameters={"n": 1000},
    )
    datamodule = Sized.load_from_checkpoint(path, batch_size=16)
    assert datamodule.hparams == {"n": 8, "batch_size": 16}
    assert datamodule.epochs_seen == 5


def test_class_methods_refuse_an_instance(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Call it on the class"):
        Sized().load_from_checkpoint(tmp_path / "a.ckpt")
