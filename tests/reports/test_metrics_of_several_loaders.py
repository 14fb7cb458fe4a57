"""What several validation loaders log is what callbacks, loggers and results show.

Users of Lightning log one name for all loaders (``add_dataloader_idx=False``) to get the mean over all of them, and
reported values of loaders that are not there any more.

Tests of ``treadle.metrics.bus``, ``treadle.metrics.latest``, ``treadle.metrics.slot``, ``treadle.metrics.reduction``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.models import Net, loader, trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import treadle as L

VALUES = [[1.0, 2.0, 3.0], [10.0], [100.0, 200.0]]


def loaders(*which: int) -> list[DataLoader[Any]]:
    """Loaders whose samples are those of ``VALUES``, in batches of two."""
    return [DataLoader(TensorDataset(torch.tensor(VALUES[i])), batch_size=2) for i in which]


class Shared(Net):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val", batch[0].mean(), add_dataloader_idx=False, **self.options)
        self.log("own", batch[0].mean())
        self.log(f"only_{dataloader_idx}", batch[0].mean(), add_dataloader_idx=False)

    test_step = validation_step  # type: ignore[assignment]


def test_a_name_of_all_loaders_is_the_mean_over_their_samples(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    everything = [value for values in VALUES for value in values]
    for evaluate in (run.validate, run.test):
        found = evaluate(Shared(), loaders(0, 1, 2), verbose=False)
        mean = sum(everything) / len(everything)
        for idx, result in enumerate(found):
            assert set(result) == {"val", f"own/dataloader_idx_{idx}", f"only_{idx}"}
            assert result["val"] == pytest.approx(mean)
            assert result[f"own/dataloader_idx_{idx}"] == result[f"only_{idx}"]
            assert result[f"only_{idx}"] == pytest.approx(sum(VALUES[idx]) / len(VALUES[idx]))
        assert run.callback_metrics["val"].item() == pytest.approx(mean)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"reduce_fx": "sum"}, 1.5 + 3 + 10 + 150),
        ({"reduce_fx": "max"}, 150),
        ({"reduce_fx": lambda values: values.amin()}, 1.5),
        ({"batch_size": 1}, (1.5 + 3 + 10 + 150) / 4),
    ],
)
def test_other_reductions_go_over_all_loaders_too(tmp_path: Path, options: dict[str, Any], expected: float) -> None:
    found = trainer(tmp_path).validate(Shared(**options), loaders(0, 1, 2), verbose=False)
    assert [result["val"] for result in found] == pytest.approx([expected] * 3)


class Total(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sum = 0.0

    def update(self, value: Tensor) -> None:
        self.sum += value.sum().item()

    def compute(self) -> float:
        return self.sum

    def reset(self) -> None:
        self.sum = 0.0


def test_a_torchmetrics_object_for_all_loaders_sees_all_of_them_and_several_under_a_name_are_refused(
    tmp_path: Path,
) -> None:
    class Measured(Net):
        def __init__(self, metrics: int) -> None:
            super().__init__()
            self.metrics = torch.nn.ModuleList(Total() for _ in range(metrics))

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            metric: Any = self.metrics[dataloader_idx % len(self.metrics)]
            metric.update(batch[0])
            self.log("total", metric, add_dataloader_idx=False)

    run, model = trainer(tmp_path), Measured(1)
    for _ in range(2):
        assert [r["total"] for r in run.validate(model, loaders(0, 1), verbose=False)] == [16.0, 16.0]
    with pytest.raises(L.MisconfigurationException, match="'total'.*another dataloader.*own name"):
        run.validate(Measured(2), loaders(0, 1), verbose=False)


def test_checkpoints_and_stopping_go_by_the_mean_over_all_loaders(tmp_path: Path) -> None:
    saving = L.callbacks.ModelCheckpoint(tmp_path, monitor="val")
    run = trainer(tmp_path, enable_checkpointing=True, callbacks=saving, max_epochs=2)
    run.fit(Shared(), loader(), loaders(0, 1))
    assert saving.best_model_score == pytest.approx(16 / 4)


def test_the_mean_over_all_loaders_is_that_of_all_ranks(tmp_path: Path) -> None:
    class One(Net):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val", batch[0].mean(), add_dataloader_idx=False)

    run = trainer(tmp_path, devices=2, strategy="ddp_fork")
    run.fit(One(), loader(), loaders(0, 1, 2))  # the second loader has a sample for one rank only
    assert run.callback_metrics["val"].item() == pytest.approx(316 / 6)


class Changing(Net):
    """Has another list of validation loaders in each epoch."""

    def __init__(self, *epochs: list[int]) -> None:
        super().__init__()
        self.epochs = epochs
        self.seen: list[dict[str, float]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.loss(batch)

    def val_dataloader(self) -> Any:
        return loaders(*self.epochs[self.current_epoch])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val", batch[0].mean(), prog_bar=True, on_step=True, on_epoch=True)

    def on_validation_end(self) -> None:
        for metrics in (self.trainer.callback_metrics, self.trainer.logged_metrics, self.trainer.progress_bar_metrics):
            self.seen.append({name for name in metrics if "_step" not in name and "_epoch" in name})  # type: ignore[arg-type]


@pytest.mark.parametrize("epochs", [([0, 1], [0]), ([0], [0, 1]), ([0, 1, 2], [0, 1]), ([0, 1], [0, 1])])
def test_metrics_of_loaders_that_are_gone_are_gone(tmp_path: Path, epochs: Any) -> None:
    model = Changing(*epochs)
    run = trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0, reload_dataloaders_every_n_epochs=1)
    run.fit(model, loader())
    count = len(epochs[1])
    names = {f"val_epoch/dataloader_idx_{i}" for i in range(count)} if count > 1 else {"val_epoch"}
    assert model.seen[3:] == [names] * 3
    left = {name for name in run.callback_metrics if "dataloader_idx" in name}
    assert {name.rpartition("_")[2] for name in left} == ({str(i) for i in range(count)} if count > 1 else set())
