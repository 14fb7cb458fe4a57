"""What is trainable changes after set-up, and the ranks of DDP still train one model.

Tests of ``treadle_fabric.strategies.data_parallel.ddp_engine``.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import run_in_ranks
from tests.reports.two_layers import Two, weights
from tests.trainer.models import loader, trainer
from torch import Tensor, nn

import treadle as L
from treadle_fabric import DDPStrategy, Fabric, MisconfigurationException
from treadle_fabric.loggers import CSVLogger

pytestmark = pytest.mark.timeout(110)

WORLD = 2
FINDING = "ddp_find_unused_parameters_true"


class AllFrozen(Two):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        return super().training_step(batch, batch_idx) if self.above.weight.requires_grad else None


class Growing(Two):
    """Gets another layer, which each rank initializes for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.extra: nn.Module = nn.Identity()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.extra(self(batch)).square().mean()

    def grow(self) -> None:
        torch.manual_seed(5 * self.global_rank)
        self.extra = nn.Linear(2, 2)
        self.trainer.optimizers[0].add_param_group({"params": self.extra.parameters()})


class Cast(Two):
    """Trains in the dtype that its weights have, which changes."""

    def __init__(self) -> None:
        super().__init__("")

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.below.weight.dtype))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class At(L.Callback):
    """Does something to the module before a batch of an epoch, or at the epoch's start."""

    def __init__(self, epoch: int, do: Any, batch: int | None = None) -> None:
        self.epoch, self.do, self.batch = epoch, do, batch

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch and self.batch is None:
            self.do(pl_module)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == self.epoch and self.batch == batch_idx:
            self.do(pl_module)


class Alternating(L.Callback):
    """Freezes and unfreezes a layer at every batch."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.below.requires_grad_(batch_idx % 2 == 0)


def unfreeze(model: Two) -> None:
    model.below.requires_grad_(True)


def freeze(model: Two) -> None:
    model.below.requires_grad_(False)


def unfreeze_all(model: Two) -> None:
    model.requires_grad_(True)


CASES: dict[str, dict[str, Any]] = {
    "unfrozen": {"callbacks": At(1, unfreeze)},
    "unfrozen, unused allowed": {"callbacks": At(1, unfreeze), "strategy": FINDING},
    "unfrozen in an accumulation": {"callbacks": At(0, unfreeze, 3), "accumulate_grad_batches": 4},
    "frozen": {"model": lambda: Two(""), "callbacks": At(1, freeze)},
    "frozen, unused allowed": {"model": lambda: Two(""), "callbacks": At(1, freeze), "strategy": FINDING},
    "frozen in an accumulation": {
        "model": lambda: Two(""),
        "callbacks": At(0, freeze, 2),
        "accumulate_grad_batches": 4,
    },
    "all frozen at the start": {"model": AllFrozen, "callbacks": At(1, unfreeze_all)},
    "alternating": {"callbacks": Alternating()},
    "alternating, unused allowed": {"callbacks": Alternating(), "strategy": FINDING},
    "another dtype": {"model": Cast, "callbacks": At(1, nn.Module.double)},
    "a new layer": {"model": Growing, "callbacks": At(1, lambda model: model.grow())},
}


def trained(folder: Path, world: int, **arguments: Any) -> list[float]:
    arguments = {"model": Two, **arguments, **({"strategy": "auto"} if world == 1 else {})}
    model = arguments.pop("model")()
    trainer(folder, devices=world, max_epochs=3, **arguments).fit(model, loader(32, 4 // world))
    return weights(model)


def by_hand(folder: Path, world: int, strategy: str = "auto") -> list[float]:
    """A hand-written loop that unfreezes a layer after its second batch."""
    fabric = Fabric(accelerator="cpu", devices=world, strategy="auto" if world == 1 else strategy)
    fabric.launch()
    model, optimizer = fabric.setup((module := Two()), module.configure_optimizers())
    for i, batch in enumerate(fabric.setup_dataloaders(loader(32, 4 // world))):
        if i == 2:
            module.below.requires_grad_(True)
        with fabric.no_backward_sync(model, enabled=i % 2 == 0):
            fabric.backward(model(batch).square().mean())
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()
    return weights(module)


def by_hooks(folder: Path, world: int) -> int:
    """The number of calls of a communication hook that was registered before a layer was unfrozen."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    calls = 0

    def hook(state, bucket):  # type: ignore[no-untyped-def] # torch wants its types or none
        nonlocal calls
        calls += bucket.is_last()
        return allreduce_hook(state, bucket)

    fabric = Fabric(accelerator="cpu", devices=world, strategy="ddp")
    fabric.launch()
    model = fabric.setup(module := Two())
    model.forward_module.register_comm_hook(None, hook)
    for i in range(4):
        module.below.requires_grad_(i >= 2)
        fabric.backward(model(torch.ones(2, 4)).square().mean())
    return calls


def run_rank(folder: Path) -> None:
    out: dict[str, Any] = {}
    for name, arguments in CASES.items():
        out[name] = trained(folder, WORLD, **arguments)
    for strategy in ("ddp", FINDING):
        out[f"by hand, {strategy}"] = by_hand(folder, WORLD, strategy)
    out["hook"] = by_hooks(folder, WORLD)
    (folder / f"{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(out))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    folder = tmp_path_factory.mktemp("ranks")
    said = run_in_ranks(run_rank, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)], said


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("case", CASES)
def test_the_ranks_train_what_one_process_trains(ranks: Any, tmp_path: Path, case: str) -> None:
    zero, one = (found[case] for found in ranks[0])
    assert zero == one
    assert zero == pytest.approx(trained(tmp_path, 1, **CASES[case]), rel=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", FINDING])
def test_a_hand_written_loop_too(ranks: Any, tmp_path: Path, strategy: str) -> None:
    zero, one = (found[f"by hand, {strategy}"] for found in ranks[0])
    assert zero == one
    assert zero == pytest.approx(by_hand(tmp_path, 1), rel=1e-5)


def test_a_communication_hook_stays(ranks: Any) -> None:
    assert ranks[0][0]["hook"] == 4


def test_it_is_told_once_for_a_model(ranks: Any) -> None:
    assert "trainable now: below.weight, below.bias" in ranks[1]
    assert "not any more: below.weight, below.bias" in ranks[1]
    assert ranks[1].count("What is trainable changed after set-up") < 2 * len(CASES)


def run_one_sided(folder: Path) -> None:
    """Only rank 1 unfreezes; rank 0 waits in its backward pass."""
    rank = int(os.environ["LOCAL_RANK"])
    began = time.monotonic()
    callback = At(0, unfreeze if rank else lambda model: None, 2)
    try:
        trainer(folder, devices=WORLD, callbacks=callback).fit(Two(), loader(16, 2))
    except Exception as error:
        (folder / f"{rank}.txt").write_text(f"{type(error).__name__} {time.monotonic() - began:.0f} {error}")
        raise


def test_one_rank_alone_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        run_in_ranks(run_one_sided, tmp_path)
    kind, seconds, message = (tmp_path / "1.txt").read_text().split(" ", 2)
    assert kind == MisconfigurationException.__name__
    assert int(seconds) < 30
    assert "trainable changed on rank 1 (trainable now: below.weight, below.bias), and rank 0 went on" in message


def run_unlike(folder: Path) -> None:
    rank = int(os.environ["LOCAL_RANK"])

    def some(model: Two) -> None:
        (model.below.weight if rank else model.below.bias).requires_grad_(True)

    strategy = DDPStrategy(timeout=timedelta(seconds=20))
    try:
        trainer(folder, devices=WORLD, strategy=strategy, callbacks=At(0, some, 2)).fit(Two(), loader(16, 2))
    except MisconfigurationException as error:
        (folder / f"{rank}.txt").write_text(str(error))
        raise


def test_other_layers_on_each_rank_are_an_error_that_names_them(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        run_in_ranks(run_unlike, tmp_path)
    assert "not the same on rank 1 as on rank 0: below.bias, below.weight" in (tmp_path / "1.txt").read_text()


@pytest.mark.parametrize("schedule", ["LambdaLR", "OneCycleLR", "StepLR"])
def test_a_scheduler_and_a_group_that_was_added(tmp_path: Path, schedule: str) -> None:
    class Scheduled(Two):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.above.parameters(), 0.1, momentum=0.9)
            arguments = {"LambdaLR": [lambda epoch: 0.9], "OneCycleLR": [0.1, 9], "StepLR": [1]}[schedule]
            return [optimizer], [getattr(torch.optim.lr_scheduler, schedule)(optimizer, *arguments)]

    def add(model: Two) -> None:
        model.below.requires_grad_(True)
        model.optimizers().add_param_group({"params": model.below.parameters()})

    run, model = trainer(tmp_path, max_epochs=3, callbacks=At(1, add)), Scheduled()
    if schedule == "StepLR":
        run.fit(model, loader())
        return
    with pytest.raises(MisconfigurationException, match=f"{schedule} was made for 1 parameter groups, and.* has 2"):
        run.fit(model, loader())


def test_a_layer_without_an_optimizer_is_told_of(tmp_path: Path) -> None:
    class Above(Two):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.above.parameters(), 0.1)

    with pytest.warns(UserWarning, match=r"below.weight, below.bias can be trained now, but no optimizer has them"):
        trainer(tmp_path, max_epochs=3, callbacks=At(1, unfreeze)).fit(Above(), loader())


@pytest.mark.parametrize("hook", ["__init__", "setup", "on_fit_start", "on_train_epoch_start"])
def test_submodules_stay_in_evaluation_mode(tmp_path: Path, hook: str) -> None:
    seen: set[tuple[bool, bool]] = set()

    class Partly(Two):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            seen.add((self.training, self.below.training))
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            assert not self.training and not self.above.training

    def evaluate(self: Any, *args: Any) -> None:
        if hook == "__init__":
            Two.__init__(self, "")
        self.below.eval()

    setattr(Partly, hook, evaluate)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer(tmp_path, max_epochs=2).fit(Partly(""), loader(), loader())
    assert seen == {(True, False)}
    found = [each for each in told if "Found 1 module(s) in eval mode at the start of training" in str(each.message)]
    assert len(found) == (hook != "on_train_epoch_start")


def test_a_model_in_evaluation_mode_is_told_of(tmp_path: Path) -> None:
    model = Two("")
    with pytest.warns(UserWarning, match=r"Found 3 module\(s\) in eval mode at the start of training.*: Two, "):
        trainer(tmp_path).fit(model.eval(), loader())
    assert not model.training


def test_learning_rates_of_added_groups_are_logged(tmp_path: Path) -> None:
    class Above(Two):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.above.parameters(), 0.1)

    def add(model: Two) -> None:
        model.below.requires_grad_(True)
        model.optimizers().add_param_group({"params": model.below.parameters(), "lr": 0.05})

    monitor = L.callbacks.LearningRateMonitor("epoch")
    run = trainer(tmp_path, max_epochs=3, callbacks=[At(1, add), monitor], logger=CSVLogger(tmp_path))
    run.fit(Above(), loader())
    assert monitor.lrs == {"lr-SGD/pg1": [0.1, 0.1, 0.1], "lr-SGD/pg2": [0.05, 0.05]}
