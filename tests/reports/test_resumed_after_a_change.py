"""A run changes its model or its optimizer, is killed, and goes on as if nothing had happened.

Tests of ``treadle.run.changes``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import run_in_ranks
from tests.reports.two_layers import Two, weights
from tests.trainer.models import loader, trainer
from torch import Tensor, nn

import treadle as L
from treadle_fabric import CheckpointMismatchError, Fabric

pytestmark = pytest.mark.timeout(110)

EPOCHS, CHANGE = 4, 2
POINTS = {"before": (1, 8), "batch": (2, 3), "later": (3, 2)}  # the epoch, and its batches that are done


class Head(Two):
    """Only what is trainable goes into the optimizer; the layers have dropout and batch norm between them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.above(self.drop(self.norm(self.below(x / 10))))

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", self(batch).mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


class All(Head):
    """All parameters are in the optimizer from the start."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)


class Named(Head):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([(n, p) for n, p in self.named_parameters() if p.requires_grad], 0.01)


class FreezingItself(Head):
    """Freezes and chooses in `configure_optimizers`."""

    def __init__(self) -> None:
        super().__init__()
        self.below.requires_grad_(True)

    def configure_optimizers(self) -> Any:
        self.below.requires_grad_(False)
        return super().configure_optimizers()


class Manual(Head):
    automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Change(L.Callback):
    """Changes the module at the start of an epoch."""

    hook = "start"

    def __init__(self, *what: str) -> None:
        self.what = what

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == CHANGE and self.hook == "start":
            self.change(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == CHANGE - 1 and self.hook == "end":
            self.change(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (CHANGE, 1) and self.hook == "batch":
            self.change(trainer, pl_module)

    def change(self, trainer: L.Trainer, model: Any) -> None:
        optimizer = trainer.optimizers[0]
        for what in self.what:
            if what == "unfreeze":
                model.below.requires_grad_(True)
            elif what == "freeze":
                model.above.requires_grad_(False)
            elif what == "group":
                optimizer.add_param_group({"params": model.below.parameters(), "lr": 0.003})
            elif what == "named group":
                named = [(f"below.{name}", p) for name, p in model.below.named_parameters()]
                optimizer.add_param_group({"params": named, "lr": 0.003})
            elif what == "wrapped group":
                model.optimizers().add_param_group({"params": [*model.below.parameters()], "lr": 0.003})
            elif what == "into the group":
                optimizer.param_groups[0]["params"] += model.below.parameters()
            elif what == "no norm":
                group = optimizer.param_groups[0]
                group["params"] = [p for p in group["params"] if all(p is not q for q in model.norm.parameters())]
            elif what == "eval":
                model.norm.eval()
                model.drop.eval()
            elif what == "slower":
                optimizer.param_groups[0]["lr"] *= 0.5


class AtTheEnd(Change):
    hook = "end"


class InABatch(Change):
    hook = "batch"


class FreezingFirst(Change):
    """Freezes when training starts, as it does where the run goes on."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.below.requires_grad_(False)


class FreezingInFit(Change):
    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.below.requires_grad_(False)


class GroupAtTheStart(Change):
    """Adds a group when training starts, as it does where the run goes on."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        trainer.optimizers[0].add_param_group({"params": pl_module.below.parameters(), "lr": 0.003})


class Saver(L.Callback):
    """Saves at all points, in batches and at epoch's ends."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        for name, point in POINTS.items():
            if self.folder is not None and (trainer.current_epoch, trainer.fit_progress.batch) == point:
                trainer.save_checkpoint(self.folder / f"{name}.ckpt")

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.folder is not None and trainer.current_epoch == CHANGE:
            trainer.save_checkpoint(self.folder / "validated.ckpt")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.folder is not None and trainer.current_epoch == CHANGE:
            trainer.save_checkpoint(self.folder / "ended.ckpt")


CASES: dict[str, dict[str, Any]] = {
    "unfrozen": {"model": All, "callback": lambda: Change("unfreeze")},
    "unfrozen, with a group": {"callback": lambda: Change("unfreeze", "group")},
    "at an epoch's end": {"callback": lambda: AtTheEnd("unfreeze", "group")},
    "in a batch, accumulating": {"callback": lambda: InABatch("unfreeze", "group"), "accumulate_grad_batches": 3},
    "accumulating": {"callback": lambda: Change("unfreeze", "group", "slower"), "accumulate_grad_batches": 3},
    "by the wrapped optimizer": {"callback": lambda: Change("unfreeze", "wrapped group")},
    "named": {"model": Named, "callback": lambda: Change("unfreeze", "named group")},
    "into a group": {"callback": lambda: Change("unfreeze", "into the group")},
    "out of a group": {"callback": lambda: Change("no norm")},
    "frozen": {"callback": lambda: Change("freeze")},
    "frozen by configure_optimizers": {"model": FreezingItself, "callback": lambda: Change("unfreeze", "group")},
    "frozen when training starts": {"model": All, "callback": lambda: FreezingFirst("unfreeze")},
    "frozen when fit starts": {"model": All, "callback": lambda: FreezingInFit("unfreeze")},
    "a group when training starts": {"callback": lambda: GroupAtTheStart("unfreeze")},
    "evaluation mode": {"callback": lambda: Change("eval")},
    "manual": {"model": Manual, "callback": lambda: Change("unfreeze", "group")},
    "16-mixed": {"callback": lambda: Change("unfreeze", "group"), "precision": "16-mixed"},
}


def outcome(folder: Path, case: dict[str, Any], save: Path | None = None, path: Any = None, **more: Any) -> Any:
    case = {"model": Head, **case, **more}
    model, callback = case.pop("model")(), case.pop("callback")()
    torch.manual_seed(7)
    run = trainer(folder, max_epochs=EPOCHS, callbacks=[callback, Saver(save)], num_sanity_val_steps=0, **case)
    batch = 4 // run.world_size
    run.fit(model, loader(32, batch, shuffle=True), loader(4, 2), ckpt_path=path)
    optimizer = run.optimizers[0]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    held = [p for group in optimizer.param_groups for p in group["params"]]
    moments = [v.tolist() for p in held if p in optimizer.state for v in optimizer.state[p].values()]
    modes = [m.training for m in model.modules()]
    return [weights(model), repr(groups), moments, modes, [p.requires_grad for p in model.parameters()]]


@pytest.mark.parametrize("case", CASES)
def test_to_the_last_bit(tmp_path: Path, case: str) -> None:
    whole = outcome(tmp_path, CASES[case], save=tmp_path)
    saved = sorted(tmp_path.glob("*.ckpt"))
    assert len(saved) == len(POINTS) + 2
    for path in saved:
        assert outcome(tmp_path, CASES[case], path=path) == whole, path.name


def run_rank(folder: Path) -> None:
    rank = os.environ["LOCAL_RANK"]
    names = ["unfrozen", "unfrozen, with a group", "in a batch, accumulating"]
    for name in names:
        place = folder / name
        whole = outcome(folder, CASES[name], save=place, devices=2, strategy="ddp")
        (folder / f"{name}{rank}.json").write_text(json.dumps(whole[0]))
        for path in sorted(place.glob("*.ckpt")):
            assert outcome(folder, CASES[name], path=path, devices=2, strategy="ddp") == whole, path.name


def test_on_two_ranks(tmp_path: Path) -> None:
    run_in_ranks(run_rank, tmp_path, timeout=100)
    files = sorted(tmp_path.glob("*.json"))
    assert len(files) == 6
    for zero, one in zip(files[::2], files[1::2], strict=True):
        assert zero.read_text() == one.read_text()


def test_a_program_that_was_changed_keeps_its_change(tmp_path: Path) -> None:
    """The saved run began with a frozen layer, and the resumed one begins without."""

    class Unfrozen(All):
        def __init__(self) -> None:
            super().__init__()
            self.below.requires_grad_(True)

    outcome(tmp_path, {"model": All, "callback": Change}, save=tmp_path)
    found = outcome(tmp_path, {"model": Unfrozen, "callback": Change}, path=tmp_path / "batch.ckpt")
    assert all(found[-1])


class Other(Head):
    def configure_optimizers(self) -> Any:
        groups = [{"params": [*self.below.parameters()]}, {"params": [*self.above.parameters()]}]
        optimizer = torch.optim.Adam(groups, 0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


def test_groups_that_cannot_be_mended_are_an_error_that_names_them(tmp_path: Path) -> None:
    outcome(tmp_path, {"callback": lambda: Change("unfreeze", "group")}, save=tmp_path)
    message = r"made groups of \[4\] parameters when the saved run began, and now \[2, 2\]"
    with pytest.raises(CheckpointMismatchError, match=message) as error:
        outcome(tmp_path, {"model": Other, "callback": Change}, path=tmp_path / "later.ckpt")
    assert "Only the checkpoint has norm.bias, norm.weight." in str(error.value)


def test_a_file_without_names_says_where_groups_can_be_added(tmp_path: Path) -> None:
    """As Lightning writes, and Treadle did; the advice is followed."""

    class Adding(Change):
        def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            if trainer.ckpt_path is not None:
                self.change(trainer, pl_module)

    whole = outcome(tmp_path, CASES["unfrozen, with a group"], save=tmp_path)
    content = torch.load(tmp_path / "later.ckpt", weights_only=True)
    del content["treadle"]["changes"]
    torch.save(content, tmp_path / "foreign.ckpt")
    case = {"callback": lambda: Change("unfreeze", "group")}
    with pytest.raises(CheckpointMismatchError, match="`on_fit_start`, which comes before the state is restored"):
        outcome(tmp_path, case, path=tmp_path / "foreign.ckpt")
    adding = {"callback": lambda: Adding("unfreeze", "group")}
    assert outcome(tmp_path, adding, path=tmp_path / "foreign.ckpt") == whole


class Growing(Head):
    """Gets another layer, and knows it again where it goes on."""

    knows = True

    def __init__(self) -> None:
        super().__init__()
        self.extra: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.extra(super().forward(x))

    def grow(self) -> None:
        self.extra = nn.Linear(2, 2)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.knows and "extra.weight" in checkpoint["state_dict"]:
            self.grow()


class Grow(Change):
    def change(self, trainer: L.Trainer, model: Any) -> None:
        model.grow()
        trainer.optimizers[0].add_param_group({"params": model.extra.parameters(), "lr": 0.003})


class Forgetting(Growing):
    knows = False


def test_a_layer_that_came_during_the_run(tmp_path: Path) -> None:
    case: dict[str, Any] = {"model": Growing, "callback": Grow}
    whole = outcome(tmp_path, case, save=tmp_path)
    for name in ("later", "ended", "before"):
        assert outcome(tmp_path, case, path=tmp_path / f"{name}.ckpt") == whole, name
    with pytest.raises(CheckpointMismatchError, match="came during the run: extra.weight, extra.bias. Make them in"):
        outcome(tmp_path, {**case, "model": Forgetting}, path=tmp_path / "later.ckpt")


def test_a_hand_written_loop_that_adds_a_group(tmp_path: Path) -> None:
    """What is trainable and the groups are the loop's: it makes the same changes, then loads."""

    def change(model: Two, optimizer: Any) -> None:
        model.below.requires_grad_(True)
        optimizer.add_param_group({"params": model.below.parameters(), "lr": 0.003})

    def train(start: int, stop: int, *, load: bool, changes: bool = True) -> list[float]:
        fabric = Fabric(accelerator="cpu", devices=1)
        module = Two()
        model, optimizer = fabric.setup(module, torch.optim.Adam(module.above.parameters(), 0.01))
        if start > 2 and changes:
            change(module, optimizer)
        if load:
            fabric.load(tmp_path / "loop.ckpt", {"model": model, "optimizer": optimizer})
        for step in range(start, stop):
            if step == 2:
                change(module, optimizer)
            fabric.backward(model(torch.full((2, 4), step + 1.0)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            if step == 3:
                fabric.save(tmp_path / "loop.ckpt", {"model": model, "optimizer": optimizer})
        return weights(module)

    assert train(0, 6, load=False) == train(4, 6, load=True)
    message = r"groups of the sizes \[2\], and those in the file are \[2, 2\].*optimizer.add_param_group"
    with pytest.raises(CheckpointMismatchError, match=message):
        train(4, 6, load=True, changes=False)
