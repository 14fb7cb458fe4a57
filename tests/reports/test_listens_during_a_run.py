"""Callbacks that come during a run, and hooks and steps that are assigned to a module, are called.

Tests of ``treadle.run.dispatch``, ``treadle.loops.fit``.
"""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from tests.trainer.models import Net, loader, trainer
from torch import Tensor, nn

import treadle as L
from treadle.callbacks import ModelCheckpoint
from treadle_fabric import MisconfigurationException

HOOKS = "setup on_train_epoch_start on_train_batch_end on_validation_batch_end on_train_epoch_end on_train_end"


class Listening(L.Callback):
    def __init__(self) -> None:
        self.heard: list[tuple[str, int]] = []


def _hear(name: str) -> Any:
    def hook(self: Listening, trainer: L.Trainer, *args: Any) -> None:
        self.heard.append((name, trainer.current_epoch))

    return hook


for _name in [*HOOKS.split(), "on_before_optimizer_step", "on_before_zero_grad", "on_after_backward", "on_fit_end"]:
    setattr(Listening, _name, _hear(_name))


class Adding(L.Callback):
    """Adds a callback in a hook of the second epoch, or the only one."""

    def __init__(self, hook: str, added: L.Callback) -> None:
        self.hook, self.added = hook, added
        setattr(self, hook, self.add)

    def add(self, trainer: L.Trainer, *args: Any) -> None:
        once = self.hook in ("setup", "on_fit_start", "on_train_start")
        if self.added not in trainer.callbacks and (once or trainer.current_epoch == 1):
            trainer.callbacks.append(self.added)


@pytest.mark.parametrize(
    ("hook", "hears"),
    [
        ("setup", [0, 1, 2]),
        ("on_fit_start", [0, 1, 2]),
        ("on_train_start", [0, 1, 2]),
        ("on_train_epoch_start", [1, 2]),
        ("on_train_batch_end", [2]),
        ("on_validation_end", [2]),
        ("on_train_epoch_end", [2]),
    ],
)
def test_a_callback_that_comes_during_a_run(tmp_path: Path, hook: str, hears: list[int]) -> None:
    late = Listening()
    run = trainer(tmp_path, callbacks=Adding(hook, late), max_epochs=3)
    run.fit(Net(), loader(8, 2), loader(4, 2))
    assert [name for name, _ in late.heard].count("setup") == 1
    for name in ("on_train_batch_end", "on_before_optimizer_step", "on_before_zero_grad", "on_after_backward"):
        assert [epoch for found, epoch in late.heard if found == name] == [e for e in hears for _ in range(4)], name
    validated = {epoch for name, epoch in late.heard if name == "on_validation_batch_end"}
    assert validated == {*hears}
    assert [name for name, _ in late.heard][-2:] == ["on_train_end", "on_fit_end"]


def test_a_callback_that_goes_hears_nothing_more(tmp_path: Path) -> None:
    going = Listening()

    class Removing(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            trainer.callbacks = [c for c in trainer.callbacks if c is not going]

    trainer(tmp_path, callbacks=[going, Removing()], max_epochs=2).fit(Net(), loader(8, 2), loader(4, 2))
    assert {epoch for name, epoch in going.heard if name == "on_train_batch_end"} == {0}


def test_a_checkpoint_callback_that_comes_late_saves(tmp_path: Path) -> None:
    class Bringing(Net):
        def setup(self, stage: str) -> None:
            self.trainer.callbacks.insert(0, ModelCheckpoint(tmp_path, filename="late-{step}"))

    trainer(tmp_path).fit(Bringing(), loader(8, 2))
    assert (tmp_path / "late-step=4.ckpt").exists()


def test_what_is_no_callback_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="a callback derives from"):
        trainer(tmp_path, callbacks=Adding("on_train_start", object())).fit(Net(), loader())  # type: ignore[arg-type]


class Assigning(L.Callback):
    """Assigns methods to the module in a hook."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self.assign)
        self.called: list[tuple[str, int]] = []

    def assign(self, trainer: L.Trainer, model: Any, *args: Any) -> None:
        if trainer.current_epoch != (0 if trainer.max_epochs == 1 else 1):
            return
        called = self.called

        def training_step(self: Any, batch: Tensor, batch_idx: int) -> Tensor:
            called.append(("training_step", self.current_epoch))
            return self.loss(batch)

        def on_train_batch_end(outputs: Any, batch: Any, batch_idx: int) -> None:
            called.append(("on_train_batch_end", trainer.current_epoch))

        def validation_step(batch: Tensor, batch_idx: int) -> None:
            called.append(("validation_step", trainer.current_epoch))

        def optimizer_step(epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
            called.append(("optimizer_step", epoch))
            optimizer.step(closure)

        def configure_gradient_clipping(optimizer: Any, *args: Any) -> None:
            called.append(("configure_gradient_clipping", trainer.current_epoch))

        model.training_step = MethodType(training_step, model)
        model.on_train_batch_end = on_train_batch_end
        model.validation_step = validation_step
        model.optimizer_step = optimizer_step
        model.configure_gradient_clipping = configure_gradient_clipping


@pytest.mark.parametrize(
    ("hook", "epochs", "heard"),
    [
        ("setup", 1, {0}),
        ("on_fit_start", 1, {0}),
        ("on_train_start", 1, {0}),
        ("on_train_epoch_start", 2, {1}),
        ("on_train_batch_start", 3, {2}),
    ],
)
def test_methods_that_are_assigned_during_a_run(tmp_path: Path, hook: str, epochs: int, heard: set[int]) -> None:
    callback = Assigning(hook)
    run = trainer(tmp_path, callbacks=callback, max_epochs=epochs, num_sanity_val_steps=0)
    run.fit(Net(), loader(8, 2), loader(4, 2))
    names = "training_step on_train_batch_end validation_step optimizer_step configure_gradient_clipping".split()
    for name in names:
        assert {epoch for found, epoch in callback.called if found == name} == heard, name


def test_a_part_that_is_made_in_a_hook_logs(tmp_path: Path) -> None:
    class Part(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.log("from the part", 3.0)
            return self.layer(x)

    class Whole(Net):
        def configure_model(self) -> None:
            self.part = Part()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.part(batch).square().mean()

    run = trainer(tmp_path)
    run.fit(Whole(), loader())
    assert run.callback_metrics["from the part"] == 3


@pytest.mark.parametrize("name", ["precision", "strategy"])
def test_what_cannot_be_replaced_says_so(tmp_path: Path, name: str) -> None:
    class Replacing(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            setattr(trainer, name, [torch.optim.SGD(pl_module.parameters(), 0.1)])

    with pytest.raises((MisconfigurationException, AttributeError), match=name):
        trainer(tmp_path, callbacks=Replacing()).fit(Net(), loader())


def test_a_late_callback_has_its_state_where_the_run_goes_on(tmp_path: Path) -> None:
    class Counting(L.Callback):
        def __init__(self) -> None:
            self.batches = 0

        def on_train_batch_end(self, *args: Any) -> None:
            self.batches += 1

        def state_dict(self) -> dict[str, Any]:
            return {"batches": self.batches}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.batches = state["batches"]

    counts = []
    for epochs, path in ((1, None), (3, tmp_path / "one.ckpt")):
        late = Counting()
        run = trainer(tmp_path, callbacks=Adding("on_train_start", late), max_epochs=epochs)
        run.fit(Net(), loader(8, 2), ckpt_path=path)
        run.save_checkpoint(tmp_path / "one.ckpt")
        counts.append(late.batches)
    assert counts == [4, 12]
    with pytest.warns(UserWarning, match="please add the following callbacks"):
        trainer(tmp_path, max_epochs=4).fit(Net(), loader(8, 2), ckpt_path=tmp_path / "one.ckpt")


def test_another_kind_of_optimization_is_refused(tmp_path: Path) -> None:
    class Manual(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            pl_module.automatic_optimization = trainer.current_epoch == 0

    with pytest.raises(MisconfigurationException, match="automatic_optimization became False during the run"):
        trainer(tmp_path, callbacks=Manual(), max_epochs=2).fit(Net(), loader())


@pytest.mark.parametrize(("first", "then", "steps"), [(-1, 3, 3), (3, 6, 6), (3, -1, 16)])
def test_max_steps_that_is_set_within_an_epoch_ends_it(tmp_path: Path, first: int, then: int, steps: int) -> None:
    class Bounding(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 2:
                trainer.max_steps = then

    run = trainer(tmp_path, max_epochs=2, max_steps=first, callbacks=Bounding())
    run.fit(Net(), loader(16))
    assert run.global_step == steps


def test_accumulation_that_is_set_within_an_epoch_holds_from_the_next_one_which_is_told(tmp_path: Path) -> None:
    class Accumulating(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            trainer.accumulate_grad_batches = 4

    run = trainer(tmp_path, max_epochs=2, callbacks=Accumulating())
    with pytest.warns(UserWarning, match="set to 4 while epoch 0 ran with 1, and holds from the next epoch on"):
        run.fit(Net(), loader(16))
    assert run.global_step == 8 + 2
