"""The Trainer under a pipeline: the losses, weights and logged values of one process, on every rank.

Tests of ``treadle.loops.step.whole``, ``treadle.loops.step.zero_grad``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.pipelining  # forks inherit it
from tests.processes import run_in_ranks
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import treadle as L
from treadle import MisconfigurationException
from treadle_fabric.strategies import ModelParallelStrategy

CLASSES = 6


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(8, 16), nn.Tanh())
        self.second = nn.Linear(16, 16)
        self.last = nn.Linear(16, CLASSES)
        self.seen: list[dict[str, float]] = []

    def pipeline_stages(self) -> list[nn.Module]:
        return [self.first, self.second, self.last]

    def loss(self, outputs: Tensor, batch: Any) -> Any:
        self.log("largest", outputs.abs().max().detach(), on_step=True, on_epoch=True)
        return {"loss": cross_entropy(outputs, batch[1]), "spread": outputs.std()}

    def configure_optimizers(self) -> Any:
        decayed = [p for p in self.parameters() if p.ndim > 1]
        groups = [{"params": decayed}, {"params": [p for p in self.parameters() if p.ndim < 2], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=0.02, weight_decay=0.1)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7), "interval": "step"}]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append({name: float(value) for name, value in outputs.items()})


class Plain(Model):
    """The same in one process, with steps."""

    def run(self, batch: Any, name: str) -> Any:
        x = batch[0]
        for stage in self.pipeline_stages():
            x = stage(x)
        loss = cross_entropy(x, batch[1])
        self.log(f"{name}_loss", loss, prog_bar=True)
        return {"loss": loss, "spread": x.std().detach()}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.run(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self.run(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        return self.run(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.last(self.second(self.first(batch[0])))


def loader(samples: int, seed: int, batch_size: int = 8) -> Any:
    random = torch.Generator().manual_seed(seed)
    data = torch.randn(samples, 8, generator=random), torch.randint(CLASSES, (samples,), generator=random)
    return DataLoader(TensorDataset(*data), batch_size=batch_size)


def trainer(folder: Path, **arguments: Any) -> Any:
    settings: dict[str, Any] = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
    }
    return L.Trainer(**{**settings, **arguments})


def pipeline(**arguments: Any) -> Any:
    sizes = {"data_parallel_size": 1, "tensor_parallel_size": 1, "pipeline_parallel_size": 2}
    return ModelParallelStrategy(**{**sizes, "pipeline_microbatches": 4, **arguments})


def in_a_pipeline(folder: Path, expected: Any) -> None:
    run, model = trainer(folder, devices=2, strategy=pipeline()), Model()
    run.fit(model, loader(40, 1), loader(24, 2))
    assert [each["loss"] for each in model.seen] == pytest.approx(expected["losses"], rel=1e-5)
    names = {"train_loss", "train_spread", "val_loss", "val_spread", "largest", "largest_step", "largest_epoch"}
    assert names <= {*run.callback_metrics}
    assert float(run.callback_metrics["val_loss"]) == pytest.approx(expected["val"], rel=1e-5)
    assert run.progress_bar_metrics["train_loss"] == pytest.approx(expected["losses"][-1], rel=1e-5)
    for name, tensor in model.state_dict().items():
        if not tensor.is_meta:
            torch.testing.assert_close(tensor, expected["weights"][name], rtol=1e-5, atol=1e-6)
    run.save_checkpoint(folder / "whole")
    assert run.validate(model, loader(24, 2), verbose=False)[0]["val_loss"] == pytest.approx(expected["val"], rel=1e-5)
    assert run.test(model, loader(24, 2), verbose=False)[0]["test_loss"] == pytest.approx(expected["val"], rel=1e-5)
    torch.testing.assert_close(torch.cat(run.predict(model, loader(24, 2))), expected["outputs"], rtol=1e-5, atol=1e-6)
    # stopped in the middle of an accumulation, and resumed
    stopped, first = trainer(folder, devices=2, strategy=pipeline(), max_steps=-1), Model()
    stopped.callbacks.append(SaveAt(folder / "middle", 2))
    stopped.fit(first, loader(40, 1))
    resumed, second = trainer(folder, devices=2, strategy=pipeline()), Model()
    resumed.fit(second, loader(40, 1), ckpt_path=folder / "middle")
    assert second.seen == first.seen[3:]
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True) if not p.is_meta)


class SaveAt(L.Callback):
    def __init__(self, path: Path, batch: int) -> None:
        self.path, self.batch = path, batch

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch and trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def test_fit_validate_test_and_predict_are_those_of_one_process_on_every_rank(tmp_path: Path) -> None:
    run, plain = trainer(tmp_path), Plain()
    run.fit(plain, loader(40, 1), loader(24, 2))
    expected = {
        "losses": [each["loss"] for each in plain.seen],
        "val": float(run.callback_metrics["val_loss"]),
        "weights": {name: tensor.detach() for name, tensor in plain.state_dict().items()},
        "outputs": torch.cat(run.predict(plain, loader(24, 2))).detach(),
    }
    run_in_ranks(in_a_pipeline, tmp_path, expected)
    crossed = Plain()
    trainer(tmp_path).validate(crossed, loader(24, 2), ckpt_path=tmp_path / "whole", verbose=False)
    for name, tensor in crossed.state_dict().items():
        torch.testing.assert_close(tensor, expected["weights"][name], rtol=1e-5, atol=1e-6)
    # an epoch of the pipeline's, gone on with in one process
    straight, continued = Plain(), Plain()
    trainer(tmp_path).fit(straight, loader(40, 1))
    trainer(tmp_path).fit(continued, loader(40, 1), ckpt_path=tmp_path / "middle")
    assert [e["loss"] for e in continued.seen] == pytest.approx([e["loss"] for e in straight.seen[3:]], rel=1e-5)


class Uneven(Model):
    """Logs what a torchmetrics object would: a mean over samples."""

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        loss = cross_entropy(outputs, batch[1])
        self.log("given", loss, on_step=False, on_epoch=True, batch_size=len(batch[1]))
        self.log_dict({"rows": float(len(batch[1]))}, on_step=False, on_epoch=True, reduce_fx="sum")
        return loss


def over_the_data(folder: Path, expected: Any) -> None:
    run = trainer(folder, devices=4, strategy=pipeline(data_parallel_size=2), accumulate_grad_batches=1, max_epochs=1)
    model = Uneven()
    run.fit(model, loader(40, 1, 4), loader(21, 2, 4))  # unequal last batches
    assert float(run.callback_metrics["val_loss"]) == pytest.approx(expected["val"], rel=1e-4)
    logged = run.validate(model, loader(21, 2, 4), verbose=False)[0]
    assert logged["given"] == logged["val_loss"] == pytest.approx(expected["val"], rel=1e-4)
    assert logged["rows"] == 21
    outputs = torch.cat(run.predict(model, loader(21, 2, 4)))
    torch.testing.assert_close(outputs, expected["outputs"], rtol=1e-3, atol=1e-4)
    trainer(folder, devices=4, strategy=pipeline(data_parallel_size=2), max_epochs=1).fit(Uneven(), loader(35, 1, 4))
    print("as one process")


def test_data_parallel_pipelines_log_and_predict_what_one_process_does(tmp_path: Path) -> None:
    run, plain = trainer(tmp_path, accumulate_grad_batches=1, max_epochs=1), Plain()
    run.fit(plain, loader(40, 1, 8), loader(21, 2, 4))
    expected = {
        "val": float(run.callback_metrics["val_loss"]),
        "outputs": torch.cat(run.predict(plain, loader(21, 2, 4))).detach(),
    }
    said = run_in_ranks(over_the_data, tmp_path, expected, devices=4)
    assert said.count("as one process") == 4 and "was not logged" not in said


class Manual(Model):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class OwnBackward(Model):
    def backward(self, loss: Tensor) -> None:
        loss.backward()


class NoLoss(L.LightningModule):
    def training_step(self, batch: Any) -> None:
        """Nothing."""

    def configure_optimizers(self) -> None:
        """Nothing."""


class Steepest(Model):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


@pytest.mark.parametrize(
    ("model", "stage", "match"),
    [
        (NoLoss, "fit", "no `pipeline_stages`, which fit needs under ModelParallelStrategy in the place of `training_"),
        (NoLoss, "test", "no `pipeline_stages`, which test needs under ModelParallelStrategy in the place of `test_st"),
        (NoLoss, "predict", "no `pipeline_stages`, which predict needs"),
        (Manual, "fit", "automatic_optimization=False"),
        (OwnBackward, "fit", "defines `backward`"),
    ],
)
def test_modules_that_no_pipeline_can_run_are_refused_before_any_work(
    tmp_path: Path, model: Any, stage: str, match: str
) -> None:
    run = trainer(tmp_path, devices=2, strategy=pipeline())
    with pytest.raises(MisconfigurationException, match=match):
        getattr(run, stage)(model(), loader(8, 1))


def steepest(folder: Path) -> None:
    with pytest.raises(MisconfigurationException, match="LBFGS.step computes the loss again"):
        trainer(folder, devices=2, strategy=pipeline()).fit(Steepest(), loader(8, 1))


def test_an_optimizer_with_a_closure_is_refused(tmp_path: Path) -> None:
    run_in_ranks(steepest, tmp_path)
