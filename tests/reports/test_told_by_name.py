"""Where torch fails with an error of its own, Treadle makes it work, or names the layer and the remedy.

Tests of ``treadle_fabric.strategies.native_step``, ``treadle_fabric.strategies.ddp``, ``treadle.loops.optimizers``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import run_in_ranks
from tests.reports.two_layers import weights
from tests.trainer.models import Net, loader, trainer
from torch import Tensor, nn

import treadle as L
from treadle.numbers.grad_norm import grad_norm
from treadle_fabric import Fabric, MisconfigurationException, UnusedParametersError

pytestmark = pytest.mark.timeout(110)

SGD, WORLD = torch.optim.SGD, 2


class Table(L.LightningModule):
    """An embedding, sparse or not, under a layer; some rows come twice in a batch."""

    def __init__(self, sparse: bool = True, optimizer: Any = SGD, used: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.layer = nn.Embedding(20, 4, sparse=sparse), nn.Linear(4, 2)
        self.optimizer, self.used = optimizer, used

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x = self.table((batch[:, 0] // 2).long()) if self.used else batch
        return self.layer(x).square().mean() * 10

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters(), lr=0.1)


class Lazy(Net):
    def __init__(self, optimizer: Any = SGD) -> None:
        super().__init__()
        self.layer = nn.LazyLinear(2)  # type: ignore[assignment]
        self.optimizer = optimizer

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters(), lr=0.1)


class DryRun(Lazy):
    """Follows the advice."""

    def configure_model(self) -> None:
        with torch.no_grad():
            self(torch.zeros(1, 4))


CLIPPING: list[dict[str, Any]] = [
    {"gradient_clip_val": 0.5},
    {"gradient_clip_val": 0.2, "gradient_clip_algorithm": "value"},
    {"gradient_clip_val": 0.5, "accumulate_grad_batches": 3},
    {"gradient_clip_val": 0.5, "precision": "16-mixed"},
]


def clipped(folder: Path, sparse: bool, world: int, **arguments: Any) -> list[float]:
    model = Table(sparse)
    strategy = "ddp" if world > 1 else "auto"
    run = trainer(folder, devices=world, strategy=strategy, max_epochs=2, **arguments)
    run.fit(model, loader(16, 4 // world))
    return weights(model)


@pytest.mark.parametrize("arguments", CLIPPING, ids=str)
def test_sparse_gradients_are_clipped_as_dense_ones(tmp_path: Path, arguments: dict[str, Any]) -> None:
    dense = clipped(tmp_path, False, 1, **arguments)
    assert clipped(tmp_path, True, 1, **arguments) == pytest.approx(dense, rel=1e-4)
    assert dense != pytest.approx(clipped(tmp_path, False, 1), rel=1e-2)


@pytest.mark.parametrize("limit", [{"max_norm": 0.1}, {"max_norm": 0.1, "norm_type": float("inf")}, {"clip_val": 0.05}])
def test_by_hand_too(limit: dict[str, float]) -> None:
    found = []
    for sparse in (True, False):
        fabric = Fabric(accelerator="cpu", devices=1)
        model, optimizer = fabric.setup(module := Table(sparse), SGD(module.parameters(), 0.1))
        fabric.backward(model.training_step(torch.arange(8.0).repeat(4, 1).T, 0))
        assert grad_norm(module, 2)["grad_2.0_norm_total"] > 0.1
        found.append([fabric.clip_gradients(model, optimizer, **limit), *(p.grad for p in module.parameters())])
    for one, other in zip(*found, strict=True):
        if one is not None:
            torch.testing.assert_close(one.to_dense(), other)


def test_sparse_gradients_of_an_accumulation_are_saved(tmp_path: Path) -> None:
    class Saver(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.fit_progress.batches == 2:
                trainer.save_checkpoint(tmp_path / "two.ckpt")

    found = []
    for arguments in ({"callbacks": Saver()}, {}):
        model = Table()
        run = trainer(tmp_path, accumulate_grad_batches=3, **arguments)
        run.fit(model, loader(16, 4), ckpt_path=None if arguments else tmp_path / "two.ckpt")
        found.append(weights(model))
    assert found[0] == found[1]


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, lambda p, lr: SGD(p, lr, weight_decay=0.1)])
def test_an_optimizer_without_sparse_gradients_names_the_table(tmp_path: Path, optimizer: Any) -> None:
    with pytest.raises(MisconfigurationException, match="sparse gradients: table. Make them with sparse=False"):
        trainer(tmp_path).fit(Table(optimizer=optimizer), loader())


class Sharp(torch.optim.SGD):
    """Evaluates the loss at another place before its step."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        closure = torch.enable_grad()(closure)
        closure()
        return super().step()


class Declared(Sharp):
    def step(self, closure: Any) -> Any:  # type: ignore[override]
        return super().step(closure)


@pytest.mark.parametrize("kind", [Sharp, Declared])
def test_an_optimizer_that_calls_a_closure_gets_one(tmp_path: Path, kind: Any) -> None:
    class Sharpened(Net):
        def configure_optimizers(self) -> Any:
            return kind(self.parameters(), 0.1)

    run = trainer(tmp_path)
    run.fit(Sharpened(), loader())
    assert run.global_step == 4


def test_a_lazy_layer_trains_or_is_named(tmp_path: Path) -> None:
    model = Lazy()
    with pytest.warns(UserWarning, match="the model contains 2 `UninitializedParameter`s"):
        trainer(tmp_path, enable_model_summary=True).fit(model, loader())
    assert model.layer.weight.shape == (2, 4)
    with pytest.raises(MisconfigurationException, match=r"shape of layer.weight, layer.bias.*`configure_model`"):
        trainer(tmp_path).fit(Lazy(torch.optim.Adagrad), loader())
    trainer(tmp_path).fit(DryRun(torch.optim.Adagrad), loader())


def test_an_optimizer_without_parameters(tmp_path: Path) -> None:
    class Frozen(Net):
        def configure_optimizers(self) -> Any:
            self.requires_grad_(False)
            return SGD(filter(lambda p: p.requires_grad, self.parameters()), 0.1)

    with pytest.raises(MisconfigurationException, match="Frozen has 2 parameters, of which 0 require gradients"):
        trainer(tmp_path).fit(Frozen(), loader())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda loss: loss, r"a loss of shape \(2, 2\); it is one number"),
        (lambda loss: loss.mean().detach(), "a loss that does not depend on any parameter that requires a gradient"),
    ],
)
def test_a_loss_that_cannot_be_differentiated(tmp_path: Path, make: Any, message: str) -> None:
    class Manual(Net):
        automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            self.manual_backward(make(self(batch)))

    with pytest.raises(MisconfigurationException, match=f"`manual_backward` got {message}"):
        trainer(tmp_path).fit(Manual(), loader())
    fabric = Fabric(accelerator="cpu", devices=1)
    model = fabric.setup(nn.Linear(4, 2))
    with pytest.raises(MisconfigurationException, match=f"backward got {message}"):
        fabric.backward(make(model(torch.ones(2, 4))))
    fabric.backward(model(torch.ones(2, 4)), gradient=torch.ones(2, 2))


def run_rank(folder: Path) -> None:
    out: dict[str, Any] = {"clipped": [clipped(folder, True, WORLD, **arguments) for arguments in CLIPPING]}
    found = {"lazy": (Lazy(), "ddp")}
    found |= {strategy: (Table(used=False), strategy) for strategy in ("ddp", "ddp_find_unused_parameters_true")}
    for name, (model, strategy) in found.items():
        try:
            trainer(folder, devices=WORLD, strategy=strategy).fit(model, loader(8, 2))
        except (MisconfigurationException, UnusedParametersError) as error:
            out[name] = str(error)
    model = DryRun()
    trainer(folder, devices=WORLD, strategy="ddp").fit(model, loader(8, 2))
    out["dry run"] = weights(model)
    (folder / f"{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(out))


def test_on_two_ranks(tmp_path: Path) -> None:
    run_in_ranks(run_rank, tmp_path)
    zero, one = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(WORLD))
    for found, arguments in zip(zero["clipped"], CLIPPING, strict=True):
        assert found == pytest.approx(clipped(tmp_path, True, 1, **arguments), rel=1e-4)
    assert zero["clipped"] == one["clipped"] and zero["dry run"] == one["dry run"]
    assert "no shape yet: layer.weight, layer.bias" in zero["lazy"]
    for strategy in ("ddp", "ddp_find_unused_parameters_true"):
        assert "on rank 1: table.weight" in one[strategy] and "sparse=False" in one[strategy]
        assert "find_unused_parameters does not help" in one[strategy]
