"""The smallest modules, data modules and datasets that run every stage: what bug reports are written with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, StepLR
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from treadle.module import LightningDataModule, LightningModule
from treadle.module.steps.returned import STEP_OUTPUT

__all__ = [
    "BoringDataModule",
    "BoringDataModuleNoLen",
    "BoringModel",
    "DemoModel",
    "IterableBoringDataModule",
    "ManualOptimBoringModel",
    "Net",
    "RandomDataset",
    "RandomDictDataset",
    "RandomIterableDataset",
    "RandomIterableDatasetWithLen",
]

_FEATURES: Final = 32
_SAMPLES: Final = 64


class RandomDictDataset(Dataset[dict[str, Tensor]]):
    """Samples with two entries: "a", drawn from a normal distribution, and "b", which is "a" + 2.

    Args:
        size: The number of features.
        length: The number of samples.
    """

    def __init__(self, size: int, length: int) -> None:
        self.len = length
        self.data = torch.randn(length, size)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        a = self.data[index]
        return {"a": a, "b": a + 2}

    def __len__(self) -> int:
        return self.len


class RandomDataset(Dataset[Tensor]):
    """Samples drawn from a normal distribution.

    Args:
        size: The number of features.
        length: The number of samples.
    """

    def __init__(self, size: int, length: int) -> None:
        self.len = length
        self.data = torch.randn(length, size)

    def __getitem__(self, index: int) -> Tensor:
        return self.data[index]

    def __len__(self) -> int:
        return self.len


class RandomIterableDataset(IterableDataset[Tensor]):
    """Samples that are drawn while they are iterated, and whose number is not known before.

    Args:
        size: The number of features.
        count: The number of samples.
    """

    def __init__(self, size: int, count: int) -> None:
        self.count = count
        self.size = size

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(self.count):
            yield torch.randn(self.size)


class RandomIterableDatasetWithLen(IterableDataset[Tensor]):
    """Samples that are drawn while they are iterated, and whose number is known.

    Args:
        size: The number of features.
        count: The number of samples.
    """

    def __init__(self, size: int, count: int) -> None:
        self.count = count
        self.size = size

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(self.count):
            yield torch.randn(self.size)

    def __len__(self) -> int:
        return self.count


class BoringModel(LightningModule):
    """One linear layer, random data, and a mean squared error: the skeleton of a bug report.

    Override what the report is about. The steps return dictionaries: {"loss": ...} in training, {"x": ...} in
    validation, {"y": ...} in test.

    Example::

        class BugReport(BoringModel):
            def training_step(self, batch, batch_idx):
                self.log("loss", loss := self.step(batch))
                return loss
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(_FEATURES, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer makes of a batch of shape (..., 32): shape (..., 2)."""
        predicted: Tensor = self.layer(x)
        return predicted

    def loss(self, preds: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the mean squared error.

        Args:
            preds: The predictions.
            labels: The targets, of the same shape. Default: ones.
        """
        return functional.mse_loss(preds, torch.ones_like(preds) if labels is None else labels)

    def step(self, batch: Any) -> Tensor:
        """Return the loss of a batch."""
        return self.loss(self(batch))

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        """Return {"loss": the loss}."""
        return {"loss": self.step(batch)}

    def validation_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        """Return {"x": the loss}."""
        return {"x": self.step(batch)}

    def test_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        """Return {"y": the loss}."""
        return {"y": self.step(batch)}

    def configure_optimizers(self) -> tuple[list[Optimizer], list[LRScheduler]]:
        """Return SGD with learning rate 0.1, which a scheduler divides by 10 after each epoch."""
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [StepLR(optimizer, step_size=1)]

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Return 64 batches of one sample."""
        return DataLoader(RandomDataset(_FEATURES, _SAMPLES))

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Return 64 batches of one sample."""
        return DataLoader(RandomDataset(_FEATURES, _SAMPLES))

    def test_dataloader(self) -> DataLoader[Tensor]:
        """Return 64 batches of one sample."""
        return DataLoader(RandomDataset(_FEATURES, _SAMPLES))

    def predict_dataloader(self) -> DataLoader[Tensor]:
        """Return 64 batches of one sample."""
        return DataLoader(RandomDataset(_FEATURES, _SAMPLES))


class BoringDataModule(LightningDataModule):
    """Random samples for :class:`BoringModel`: 64 of one dataset for each stage."""

    def __init__(self) -> None:
        super().__init__()
        self.random_full = RandomDataset(_FEATURES, 4 * _SAMPLES)

    def setup(self, stage: str) -> None:
        """Take the stage's quarter of the dataset."""
        if stage == "fit":
            self.random_train = self._quarter(0)
        if stage in ("fit", "validate"):
            self.random_val = self._quarter(1)
        if stage == "test":
            self.random_test = self._quarter(2)
        if stage == "predict":
            self.random_predict = self._quarter(3)

    def _quarter(self, number: int) -> Subset[Tensor]:
        return Subset(self.random_full, range(number * _SAMPLES, (number + 1) * _SAMPLES))

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Return 64 batches of one sample."""
        return DataLoader(self.random_train)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Return 64 batches of one sample."""
        return DataLoader(self.random_val)

    def test_dataloader(self) -> DataLoader[Tensor]:
        """Return 64 batches of one sample."""
        return DataLoader(self.random_test)

    def predict_dataloader(self) -> DataLoader[Tensor]:
        """Return 64 batches of one sample."""
        return DataLoader(self.random_predict)


class BoringDataModuleNoLen(LightningDataModule):
    """Random samples for :class:`BoringModel`, whose numbers are not known before they are iterated."""

    def setup(self, stage: str) -> None:
        """Make the stage's dataset: 512 samples to train, 128 to validate, 256 to test, 64 to predict."""
        if stage == "fit":
            self.random_train = RandomIterableDataset(_FEATURES, 512)
        if stage in ("fit", "validate"):
            self.random_val = RandomIterableDataset(_FEATURES, 128)
        if stage == "test":
            self.random_test = RandomIterableDataset(_FEATURES, 256)
        if stage == "predict":
            self.random_predict = RandomIterableDataset(_FEATURES, 64)

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Return batches of one sample."""
        return DataLoader(self.random_train)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Return batches of one sample."""
        return DataLoader(self.random_val)

    def test_dataloader(self) -> DataLoader[Tensor]:
        """Return batches of one sample."""
        return DataLoader(self.random_test)

    def predict_dataloader(self) -> DataLoader[Tensor]:
        """Return batches of one sample."""
        return DataLoader(self.random_predict)


class IterableBoringDataModule(LightningDataModule):
    """Two loaders for each stage: one of a dataset, one of samples that are drawn while they are iterated."""

    def setup(self, stage: str) -> None:
        """Make the stage's two datasets, with samples of 4 features."""
        if stage == "fit":
            self.train_datasets = _pair(16)
        if stage in ("fit", "validate"):
            self.val_datasets = _pair(32)
        if stage == "test":
            self.test_datasets = _pair(64)
        if stage == "predict":
            self.predict_datasets = _pair(128)

    def train_dataloader(self) -> Iterable[DataLoader[Tensor]]:
        """Return two loaders with 16 batches of one sample."""
        return [DataLoader(dataset) for dataset in self.train_datasets]

    def val_dataloader(self) -> Iterable[DataLoader[Tensor]]:
        """Return two loaders with 32 batches of one sample."""
        return [DataLoader(dataset) for dataset in self.val_datasets]

    def test_dataloader(self) -> Iterable[DataLoader[Tensor]]:
        """Return two loaders with 64 batches of one sample."""
        return [DataLoader(dataset) for dataset in self.test_datasets]

    def predict_dataloader(self) -> Iterable[DataLoader[Tensor]]:
        """Return two loaders with 128 batches of one sample."""
        return [DataLoader(dataset) for dataset in self.predict_datasets]


def _pair(samples: int) -> list[Dataset[Tensor]]:
    return [RandomDataset(4, samples), RandomIterableDataset(4, samples)]


class ManualOptimBoringModel(BoringModel):
    """A :class:`BoringModel` whose ``training_step`` does backward and optimizer step itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        """Do one optimizer step, and return the loss."""
        optimizer = self.optimizers()
        loss = self.step(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss


class DemoModel(LightningModule):
    """A linear classifier with 32 inputs.

    Args:
        out_dim: The number of classes.
        learning_rate: Adam's.
    """

    def __init__(self, out_dim: int = 10, learning_rate: float = 0.02) -> None:
        super().__init__()
        self.l1 = nn.Linear(_FEATURES, out_dim)
        self.learning_rate = learning_rate

    def forward(self, x: Tensor) -> Tensor:
        """Return the rectified output of the layer for a batch, whose samples are flattened."""
        return torch.relu(self.l1(x.view(x.size(0), -1)))

    def training_step(self, batch: Any, batch_nb: int) -> STEP_OUTPUT:
        """Return the sum of the outputs as the loss."""
        return {"loss": self(batch).sum()}

    def configure_optimizers(self) -> Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


class Net(nn.Module):
    """A small convolutional network for images of one channel and 28 x 28 pixels: log-probabilities of 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 1)
        self.conv2 = nn.Conv2d(32, 64, 3, 1)
        self.dropout1 = nn.Dropout(0.25)
        self.dropout2 = nn.Dropout(0.5)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return log-probabilities of shape (N, 10) for images of shape (N, 1, 28, 28)."""
        x = functional.relu(self.conv2(functional.relu(self.conv1(x))))
        x = torch.flatten(self.dropout1(functional.max_pool2d(x, 2)), 1)
        x = self.fc2(self.dropout2(functional.relu(self.fc1(x))))
        return functional.log_softmax(x, dim=1)
