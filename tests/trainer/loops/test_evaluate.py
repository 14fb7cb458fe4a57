"""validate and test: what they return, print, limit, and leave as it was.

Tests of ``treadle.loops.evaluate``, ``treadle.data.evaluation``, ``treadle.metrics.table``, ``treadle.module.modes``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from tests.trainer.models import Net, loader, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import treadle as L
from treadle.metrics.table import results_table
from treadle_fabric import CSVLogger


class Watching(Net):
    """Keeps (loader, batch, first sample), and logs the mean of the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int, float]] = []

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen.append((dataloader_idx, batch_idx, batch[0, 0].item()))
        self.log("mean", batch.mean())

    def test_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validation_step(batch, batch_idx, dataloader_idx)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_the_result_is_the_mean_over_all_samples(tmp_path: Path, stage: str, capsys: Any) -> None:
    model, run = Watching(), trainer(tmp_path)
    found = getattr(run, stage)(model, loader(5))
    assert found == [{"mean": 2.0}]  # batches of 2, 2 and 1
    assert isinstance(found[0]["mean"], float)
    assert model.seen == [(0, 0, 0.0), (0, 1, 2.0), (0, 2, 4.0)]
    assert run.callback_metrics["mean"] == 2.0
    assert (run.state.fn, run.state.status, run.state.stage) == (stage, "finished", None)
    shown = capsys.readouterr().out
    assert f"{stage} metric" in shown
    assert [line.split() for line in shown.splitlines() if "mean" in line] == [["mean", "2"]]


def test_verbose_false_prints_nothing(tmp_path: Path, capsys: Any) -> None:
    trainer(tmp_path).validate(Watching(), loader(5), verbose=False)
    assert capsys.readouterr().out == ""


def test_several_loaders_have_a_result_and_a_column_each(tmp_path: Path, capsys: Any) -> None:
    class Both(Watching):
        def on_validation_epoch_end(self) -> None:
            self.log("all", 7.0)

    model = Both()
    found = trainer(tmp_path).validate(model, [loader(4), loader(2)])
    assert found == [{"mean/dataloader_idx_0": 1.5, "all": 7.0}, {"mean/dataloader_idx_1": 0.5, "all": 7.0}]
    assert model.seen == [(0, 0, 0.0), (0, 1, 2.0), (1, 0, 0.0)]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert "validate metric dataloader 0 dataloader 1".split() in lines
    assert ["mean", "1.5", "0.5"] in lines and ["all", "7", "7"] in lines


def test_a_table_wider_than_the_terminal_goes_on_below() -> None:
    results = [{f"accuracy/dataloader_idx_{i}": i / 10} for i in range(9)]
    table = results_table(results, "test", width=60)
    assert max(map(len, table.splitlines())) <= 60
    assert [cell for line in table.splitlines() if "accuracy" in line for cell in line.split()[1:]] == [
        f"{i / 10:.6g}" for i in range(9)
    ]
    assert results_table([{}], "test") == ""


def test_a_step_without_dataloader_idx_takes_several_loaders(tmp_path: Path) -> None:
    class Short(Net):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("n", float(len(batch)))

    found = trainer(tmp_path).validate(Short(), [loader(4), loader(3, 3)], verbose=False)
    assert found == [{"n/dataloader_idx_0": 2.0}, {"n/dataloader_idx_1": 3.0}]


@pytest.mark.parametrize(
    ("arguments", "batches"),
    [
        ({}, [4, 2]),
        ({"limit_val_batches": 3}, [3, 2]),
        ({"limit_val_batches": 0.5}, [2, 1]),
        ({"limit_val_batches": 0}, [0, 0]),
        ({"fast_dev_run": True}, [1, 1]),
        ({"limit_test_batches": 1}, [4, 2]),
    ],
)
def test_limits_are_of_each_loader(tmp_path: Path, arguments: dict[str, Any], batches: list[int]) -> None:
    model, run = Watching(), trainer(tmp_path, **arguments)
    run.validate(model, {"a": loader(8), "b": loader(4)}, verbose=False)
    assert run.num_val_batches == batches
    assert [sum(at == i for at, *_ in model.seen) for i in (0, 1)] == batches
    assert len(run.val_dataloaders) == 2


def test_an_iterator_without_a_length_is_read_to_its_end(tmp_path: Path) -> None:
    model, run = Watching(), trainer(tmp_path)
    run.test(model, (torch.full((2, 4), float(i)) for i in range(3)), verbose=False)
    assert [first for *_, first in model.seen] == [0, 1, 2]
    assert run.num_test_batches == [float("inf")]


def test_an_empty_loader_is_reported_and_gives_nothing(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Total length .*0 samples.*loader 1 of val_dataloaders"):
        found = trainer(tmp_path).validate(Watching(), [loader(2), loader(0)], verbose=False)
    assert found == [{"mean/dataloader_idx_0": 0.5}, {}]


def test_a_combined_loader_gives_its_batches_together(tmp_path: Path) -> None:
    sizes: list[Any] = []

    class Combined(Net):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            sizes.append({name: None if part is None else len(part) for name, part in batch.items()})

    combined = L.CombinedLoader({"a": loader(4), "b": loader(1)}, "max_size")
    trainer(tmp_path).validate(Combined(), combined, verbose=False)
    assert sizes == [{"a": 2, "b": 1}, {"a": 2, "b": None}]


def test_modes_gradients_and_weights_are_left_as_they_were(tmp_path: Path) -> None:
    class Layers(Watching):
        def __init__(self) -> None:
            super().__init__()
            self.kept = nn.Dropout().eval()

        def on_validation_start(self) -> None:
            assert not any(m.training for m in self.modules())

    for training in (True, False):
        model = Layers()
        model.train(training)
        model.kept.eval()
        before = model.layer.weight.clone()
        trainer(tmp_path).validate(model, loader(4), verbose=False)
        assert (model.training, model.layer.training, model.kept.training) == (training, training, False)
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert torch.equal(model.layer.weight, before)


@pytest.mark.parametrize("stage", ["validate", "predict"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_a_scripted_layer_drops_out_again_after_it(tmp_path: Path, stage: str) -> None:
    class Scripted(Net):
        def __init__(self) -> None:
            super().__init__()
            self.drop = torch.jit.script(nn.Dropout(0.5))

    model = Scripted()
    getattr(trainer(tmp_path), stage)(model, loader(4))
    assert model.drop.training
    assert (model.drop(torch.ones(100)) == 0).any()  # which asks a flag that is no Python attribute


def test_modes_are_restored_after_an_error(tmp_path: Path) -> None:
    class Broken(Net):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            raise RuntimeError("broken")

    model, run = Broken(), trainer(tmp_path)
    with pytest.raises(RuntimeError, match="broken"):
        run.validate(model, loader(4))
    assert model.training
    assert run.state.stage is None


def test_a_module_that_sets_its_modes_itself_keeps_them(tmp_path: Path) -> None:
    calls: list[str] = []

    class Own(Net):
        def on_validation_model_eval(self) -> None:
            calls.append("eval")

        def on_validation_model_train(self) -> None:
            calls.append("train")

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            assert self.training

    trainer(tmp_path).validate(Own(), loader(2), verbose=False)
    assert calls == ["eval", "train"]


def test_metrics_go_to_the_logger_at_the_step_of_the_fit(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, version="v")
    run = trainer(tmp_path, logger=logger, log_every_n_steps=100)
    model = Net()
    run.fit(model, loader(6), loader(4))
    run.test(model, loader(4), verbose=False)
    lines = (tmp_path / "lightning_logs" / "v" / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    assert [r["step"] for r in rows if r["val_loss"]] == ["2"]
    assert [r["step"] for r in rows if r["test_loss"]] == ["3"]


def test_the_last_model_its_own_loaders_and_a_data_module_are_found(tmp_path: Path) -> None:
    class Own(Watching):
        def val_dataloader(self) -> Any:
            return loader(2)

    class Data(L.LightningDataModule):
        def val_dataloader(self) -> Any:
            return loader(4)

        def test_dataloader(self) -> Any:
            return loader(6)

    model, run = Own(), trainer(tmp_path)
    assert run.validate(model, verbose=False) == [{"mean": 0.5}]
    assert run.validate(datamodule=Data(), verbose=False) == [{"mean": 1.5}]
    assert run.test(dataloaders=Data(), verbose=False) == [{"mean": 2.5}]
    assert run.validate(dataloaders=loader(1), verbose=False) == [{"mean": 0.0}]


def test_nothing_logged_is_an_empty_result_for_each_loader(tmp_path: Path, capsys: Any) -> None:
    class Silent(Net):
        def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            pass

    assert trainer(tmp_path).test(Silent(), [loader(2), loader(2)]) == [{}, {}]
    assert capsys.readouterr().out == ""


def test_a_step_that_draws_its_batches_itself(tmp_path: Path) -> None:
    drawn: list[tuple[float, int, int]] = []

    class Drawing(Net):
        def test_step(self, dataloader_iter: Any) -> None:
            batch, batch_idx, dataloader_idx = next(dataloader_iter)
            drawn.append((batch[0, 0].item(), batch_idx, dataloader_idx))
            self.log("first", batch[0, 0])

    found = trainer(tmp_path).test(Drawing(), loader(4), verbose=False)
    assert drawn == [(0.0, 0, 0), (2.0, 1, 0)]
    assert found == [{"first": 1.0}]


class Measured(L.LightningModule):
    """Logs what a classifier is judged by, plainly and with torchmetrics, of 1,000 samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 5)
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=5)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self.layer(x)
        self.log("loss", torch.nn.functional.cross_entropy(logits, y))
        self.log("right", (logits.argmax(1) == y).float().mean())
        self.log("samples", float(len(x)), reduce_fx="sum")
        self.log("largest", logits.max(), reduce_fx="max")
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch[0]).argmax(1)


def test_three_ranks_measure_on_1000_samples_what_one_does(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    data = TensorDataset(torch.randn(1000, 8, generator=generator), torch.randint(5, (1000,), generator=generator))
    batches, model = DataLoader(data, 32), Measured()
    one = trainer(tmp_path).validate(model, batches, verbose=False)[0]
    run = trainer(tmp_path, devices=3, strategy="ddp_fork")
    three = run.validate(model, batches, verbose=False)[0]
    assert one["samples"] == three["samples"] == 1000
    assert three == pytest.approx(one, rel=1e-6)
    assert three["right"] == pytest.approx(three["accuracy"], rel=1e-6)
    whole = trainer(tmp_path).predict(model, batches)
    parts = run.predict(model, batches)
    assert [part.tolist() for part in parts] == [part.tolist() for part in whole]


class Lot(Dataset[Tensor]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return torch.rand(4)


@pytest.mark.parametrize("asked", [False, True])
def test_workers_are_seeded_where_that_was_asked_for(tmp_path: Path, asked: bool) -> None:
    L.seed_everything(3, workers=asked, verbose=False)
    run = trainer(tmp_path)
    run.validate(Watching(), DataLoader(Lot(), 4, num_workers=1))
    assert (run.val_dataloaders.worker_init_fn is not None) == asked
