"""The data module of handwritten digits. The dataset is torchvision's, which need not be installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sized
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, random_split

from treadle.module import LightningDataModule
from treadle_fabric import MissingPackageError

__all__ = ["MNIST", "MNISTDataModule"]

Samples = Dataset[tuple[Tensor, int]]


def MNIST(*args: Any, **kwargs: Any) -> Samples:
    """Make torchvision's dataset of handwritten digits, which downloads the files where ``download=True``.

    Args:
        *args: As for ``torchvision.datasets.MNIST``.
        **kwargs: As for ``torchvision.datasets.MNIST``.

    Raises:
        MissingPackageError: torchvision is not installed.
    """
    if importlib.util.find_spec("torchvision") is None:
        raise MissingPackageError("MNIST is read by torchvision, which is not installed: `pip install torchvision`.")
    from torchvision import datasets  # an optional package

    return cast("Samples", datasets.MNIST(*args, **kwargs))


class MNISTDataModule(LightningDataModule):
    """Handwritten digits of 28 x 28 pixels, for training, validation and test.

    Args:
        data_dir: The folder of the files.
        val_split: The number of training samples that validation gets.
        num_workers: The number of worker processes of each loader.
        normalize: Whether pixels are scaled to mean 0 and standard deviation 1.
        seed: Draws the samples of validation.
        batch_size: The number of samples of a batch.
    """

    name = "mnist"

    def __init__(
        self,
        data_dir: str = "./data",
        val_split: int = 5000,
        num_workers: int = 16,
        normalize: bool = False,
        seed: int = 42,
        batch_size: int = 32,
    ) -> None:
        super().__init__()
        self.data_dir = data_dir
        self.val_split = val_split
        self.num_workers = num_workers
        self.normalize = normalize
        self.seed = seed
        self.batch_size = batch_size
        self.dataset_train: Samples | None = None
        self.dataset_val: Samples | None = None
        self.test_transforms = self.default_transforms

    @property
    def num_classes(self) -> int:
        """The number of digits."""
        return 10

    def prepare_data(self) -> None:
        """Let torchvision download the files that are not there."""
        MNIST(self.data_dir, train=True, download=True)
        MNIST(self.data_dir, train=False, download=True)

    def setup(self, stage: str) -> None:
        """Split the training samples into those of training and of validation."""
        samples = MNIST(self.data_dir, train=True, download=False, transform=self.default_transforms)
        training = len(cast("Sized", samples)) - self.val_split
        generator = torch.Generator().manual_seed(self.seed)
        self.dataset_train, self.dataset_val = random_split(samples, [training, self.val_split], generator)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Return shuffled batches, without what is left for a smaller last batch."""
        return self._loader(self.dataset_train, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Return batches in order."""
        return self._loader(self.dataset_val, shuffle=False)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Return batches in order."""
        return self._loader(
            MNIST(self.data_dir, train=False, download=False, transform=self.test_transforms), shuffle=False
        )

    def _loader(self, samples: Samples | None, shuffle: bool) -> DataLoader[tuple[Tensor, int]]:
        return DataLoader(
            cast("Samples", samples),
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            drop_last=True,
            pin_memory=True,
        )

    @property
    def default_transforms(self) -> Callable[[Any], Tensor] | None:
        """What makes a tensor of an image; None where torchvision is not installed."""
        if importlib.util.find_spec("torchvision") is None:
            return None
        from torchvision import transforms  # an optional package

        steps = [transforms.ToTensor()]
        if self.normalize:
            steps.append(transforms.Normalize(mean=(0.5,), std=(0.5,)))
        return cast("Callable[[Any], Tensor]", transforms.Compose(steps))
