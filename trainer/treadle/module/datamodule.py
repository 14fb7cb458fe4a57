"""The datamodule: where the data of a run comes from."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping
from functools import partial
from typing import IO, TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from treadle.module.hooks import DataHooks
from treadle.module.hparams import HyperparametersMixin
from treadle.module.loading import class_only, load_datamodule_from_checkpoint
from treadle_fabric import MisconfigurationException, PathLike, is_list
from treadle_fabric.data import sized_len

if TYPE_CHECKING:
    from treadle.contracts import Trainer

__all__ = ["LightningDataModule"]

D = TypeVar("D", bound="LightningDataModule")
_TITLES = ("Train", "Validation", "Test", "Predict")
_LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader")


class LightningDataModule(HyperparametersMixin, DataHooks):
    """Everything about the data of a run in one place: fetching, splitting, loading and transfer.

    Example:
        >>> class Digits(LightningDataModule):
        ...     def setup(self, stage):
        ...         self.train, self.val = load_and_split()
        ...     def train_dataloader(self):
        ...         return DataLoader(self.train, batch_size=32, shuffle=True)
        ...     def val_dataloader(self):
        ...         return DataLoader(self.val, batch_size=64)
    """

    CHECKPOINT_HYPER_PARAMS_KEY: ClassVar[str] = "datamodule_hyper_parameters"
    CHECKPOINT_HYPER_PARAMS_NAME: ClassVar[str] = "datamodule_hparams_name"
    CHECKPOINT_HYPER_PARAMS_TYPE: ClassVar[str] = "datamodule_hparams_type"
    """The entries of a checkpoint with hyper-parameters. ``"datamodule_hparams_type"`` is Lightning's only."""
    trainer: Trainer | None = None
    """The trainer of the current run; ``None`` before the first."""
    name: str | None = None
    """A name of the data, for the user's own purposes."""
    allow_zero_length_dataloader_with_multiple_devices: bool = False
    """Not needed: on several ranks, a rank without a batch is all right. Lightning refuses it unless this is True."""
    prepare_data_per_node: bool = True
    """Whether :meth:`prepare_data` runs once on every node; False: once in all, for nodes that share a file system."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()  # further classes of a data module; the arguments are those of subclasses that pass them on

    def __getstate__(self) -> dict[str, Any]:
        # workers that are spawned get a copy where `collate_fn` is a method, and a copy is not a copy of the run
        return {**self.__dict__, "trainer": None}

    def train_dataloader(self) -> Any:
        """Return the training data: a loader, or a list or dictionary of loaders."""
        raise _missing(self, "train_dataloader")

    def val_dataloader(self) -> Any:
        """Return the validation data: a loader or a list of loaders."""
        raise _missing(self, "val_dataloader")

    def test_dataloader(self) -> Any:
        """Return the test data: a loader or a list of loaders."""
        raise _missing(self, "test_dataloader")

    def predict_dataloader(self) -> Any:
        """Return the data to predict on: a loader or a list of loaders."""
        raise _missing(self, "predict_dataloader")

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it, best without objects that need a pickle. Default: nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""

    def on_exception(self, exception: BaseException) -> None:
        """Called when the run ends with an exception, KeyboardInterrupt included."""

    @classmethod
    def from_datasets(
        cls: type[D],
        train_dataset: Dataset[Any] | Iterable[Dataset[Any]] | Mapping[str, Dataset[Any]] | None = None,
        val_dataset: Dataset[Any] | Iterable[Dataset[Any]] | None = None,
        test_dataset: Dataset[Any] | Iterable[Dataset[Any]] | None = None,
        predict_dataset: Dataset[Any] | Iterable[Dataset[Any]] | None = None,
        batch_size: int = 1,
        num_workers: int = 0,
        **datamodule_kwargs: Any,
    ) -> D:
        """Make a datamodule from datasets. Only the training data is shuffled.

        Args:
            train_dataset: A dataset, or a list or dictionary of datasets that are iterated side by side.
            val_dataset: A dataset or a list of datasets.
            test_dataset: A dataset or a list of datasets.
            predict_dataset: A dataset or a list of datasets.
            batch_size: Samples per batch, passed to ``__init__`` too if that takes the argument. Default: 1.
            num_workers: Loading processes per loader, passed to ``__init__`` likewise. Default: 0.
            **datamodule_kwargs: Arguments of ``__init__``.
        """
        takes = {} if cls.__init__ is LightningDataModule.__init__ else inspect.signature(cls.__init__).parameters
        any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
        sizes = {"batch_size": batch_size, "num_workers": num_workers}
        datamodule = cls(**{name: n for name, n in sizes.items() if any_name or name in takes}, **datamodule_kwargs)
        given = zip(_LOADERS, (train_dataset, val_dataset, test_dataset, predict_dataset), strict=True)
        for name, datasets in given:
            if datasets is not None:
                shuffle = name == "train_dataloader"
                setattr(datamodule, name, partial(_make_loaders, datasets, shuffle=shuffle, **sizes))
        return datamodule

    @class_only
    def load_from_checkpoint(
        cls: type[D],
        checkpoint_path: PathLike | IO[bytes],
        map_location: Any = None,
        hparams_file: PathLike | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> D:
        """Make a datamodule with the hyperparameters in a checkpoint, and restore its state.

        Args:
            checkpoint_path: A path, a URL or an open file.
            map_location: Where tensors go, as in :func:`torch.load`. Default: the device that each tensor was saved
                from, or the CPU if that device is not here.
            hparams_file: A ``.yaml`` or ``.csv`` file with hyperparameters, instead of those in the checkpoint.
            weights_only: ``False`` unpickles arbitrary objects: only for files you trust. Default: ``True``.
            **kwargs: Arguments of ``__init__``; they replace the saved ones.

        Raises:
            CheckpointError: The file cannot be read.
            MisconfigurationException: ``__init__`` needs arguments that neither the file nor ``kwargs`` has.
        """
        return load_datamodule_from_checkpoint(
            cls, checkpoint_path, map_location, hparams_file, weights_only=weights_only, **kwargs
        )

    def __str__(self) -> str:
        lines = (f"{{{title} dataloader: {_describe(getattr(self, name))}}}" for title, name in zip(_TITLES, _LOADERS))
        return os.linesep.join(lines)


def _missing(datamodule: LightningDataModule, name: str) -> MisconfigurationException:
    return MisconfigurationException(
        f"{type(datamodule).__name__} does not define {name}(). Define it, or pass the loaders to the Trainer's method."
    )


def _make_loaders(datasets: Any, *, shuffle: bool, batch_size: int, num_workers: int) -> Any:
    def make(dataset: Any) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=batch_size,
            shuffle=shuffle and not isinstance(dataset, IterableDataset),
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    if isinstance(datasets, Mapping):
        return {name: make(dataset) for name, dataset in datasets.items()}
    if isinstance(datasets, Iterable) and not isinstance(datasets, Dataset):
        return [make(dataset) for dataset in datasets]
    return make(datasets)


def _describe(make_loaders: Any) -> str:
    """The sizes of the datasets: ``size=64``, or ``1. size=64 ; 2. size=NA``; None where there is none."""
    try:
        loaders = make_loaders()
    except Exception:  # str() must not fail because setup() has not run yet
        return "None"
    if isinstance(loaders, Mapping):
        named: Iterable[tuple[Any, Any]] = loaders.items()
    elif is_list(loaders):
        named = enumerate(loaders, start=1)
    else:
        return "None" if loaders is None else _size(loaders)
    return " ; ".join(f"{name}. {_size(loader)}" for name, loader in named) or "None"


def _size(loader: Any) -> str:
    if isinstance(loader, Mapping) or is_list(loader):
        inner = loader.values() if isinstance(loader, Mapping) else loader
        return f"({', '.join(map(_size, inner))})"
    size = sized_len(getattr(loader, "dataset", loader))
    return f"size={'NA' if size is None else size}"
