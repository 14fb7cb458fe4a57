"""Every hook of a run, line by line: what a callback, a module and a data module see that override all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.models import Net, loader, trainer

import treadle as L
from treadle.callbacks import EarlyStopping, ModelCheckpoint
from treadle_fabric.loggers import Logger

STAGES = ("validation", "test", "predict")
POINTS = "start end epoch_start epoch_end batch_start batch_end".split()
SHARED = """setup teardown on_fit_start on_fit_end on_train_start on_train_end on_train_epoch_start on_train_epoch_end
    on_train_batch_start on_train_batch_end on_before_zero_grad on_before_backward on_after_backward
    on_before_optimizer_step on_save_checkpoint on_load_checkpoint""".split()
SHARED += [f"on_{stage}_{point}" for stage in STAGES for point in POINTS]
CALLBACK = [*SHARED, *"on_sanity_check_start on_sanity_check_end on_exception state_dict load_state_dict".split()]
LOADERS = "train_dataloader val_dataloader test_dataloader predict_dataloader".split()
TRANSFER = "on_before_batch_transfer transfer_batch_to_device on_after_batch_transfer".split()
# Overriding one of these makes the step take another way than the straight line.
STEPPING = """optimizer_step optimizer_zero_grad backward configure_gradient_clipping clip_gradients
    lr_scheduler_step""".split()
MODULE = [*SHARED, *STEPPING, *TRANSFER, *LOADERS, "prepare_data"]
MODULE += "configure_callbacks configure_model configure_optimizers".split()
MODULE += "training_step validation_step test_step predict_step on_validation_model_zero_grad".split()
MODULE += [f"on_{stage}_model_{mode}" for stage in STAGES for mode in ("eval", "train")][:-1]
DATA = [*LOADERS, *TRANSFER, *"prepare_data setup teardown state_dict load_state_dict on_exception".split()]

TRACE: list[str] = []


@pytest.fixture(autouse=True)
def _empty_trace() -> None:
    TRACE.clear()


def recording(base: type, tag: str, hooks: list[str]) -> Any:
    """A subclass of ``base`` that writes down each call of ``hooks`` and does what ``base`` does."""

    def recorded(hook: str) -> Callable[..., Any]:
        original = getattr(base, hook)

        @functools.wraps(original)  # the trainer looks at signatures
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            stage = f"[{args[-1]}]" if hook in ("setup", "teardown") else ""
            TRACE.append(f"{tag}.{hook}{stage}")
            return original(self, *args, **kwargs)

        return method

    return type(f"Recorded{base.__name__}", (base,), {hook: recorded(hook) for hook in hooks})


class SGD(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        TRACE.append("optimizer.step")
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        TRACE.append("optimizer.zero_grad")
        super().zero_grad(set_to_none)


class LBFGS(torch.optim.LBFGS):
    def step(self, closure: Any) -> Any:
        loss = super().step(closure)
        TRACE.append("optimizer.step")
        return loss


class StepLR(torch.optim.lr_scheduler.StepLR):
    made = False  # the constructor steps too

    def step(self, epoch: int | None = None) -> None:
        if self.made:
            TRACE.append("scheduler.step")
        super().step(epoch)


class Model(Net):
    """What the recording modules add their hooks to; options are plain attributes."""

    interval: str | None = "step"
    lbfgs = plateau = False
    optimizers_made = 1
    step_result: Callable[[Any, int], Any] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.layer.weight.register_hook(lambda grad: TRACE.append("gradient"))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch["a"] if isinstance(batch, dict) else batch, batch_idx)
        return loss if self.step_result is None else self.step_result(loss, batch_idx)

    def configure_optimizers(self) -> Any:
        if self.lbfgs:
            return LBFGS(self.parameters(), lr=0.1, max_iter=1)
        optimizers = [SGD(self.parameters(), lr=0.1) for _ in range(self.optimizers_made)]
        if len(optimizers) > 1 or self.interval is None:
            return optimizers
        if self.plateau:
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizers[0])
            return {"optimizer": optimizers[0], "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}
        scheduler = StepLR(optimizers[0], 1)
        scheduler.made = True
        return [optimizers[0]], [{"scheduler": scheduler, "interval": self.interval}]


class ModelWithLoaders(Model):
    """Defines the loaders itself."""

    def train_dataloader(self) -> Any:
        return loader(4)

    def val_dataloader(self) -> Any:
        return loader(2)


class Data(L.LightningDataModule):
    batches = 2
    val_loaders = 1

    def train_dataloader(self) -> Any:
        return loader(2 * self.batches)

    def val_dataloader(self) -> Any:
        return [loader(2) for _ in range(self.val_loaders)]

    def test_dataloader(self) -> Any:
        return loader(2)

    def predict_dataloader(self) -> Any:
        return loader(2)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert state_dict == {"seen": 1}


class Stateful(L.Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"seen": 2}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert state_dict == {"seen": 2}


RecordedModel = recording(Model, "module", [hook for hook in MODULE if hook not in LOADERS])
StraightModel = recording(Model, "module", [h for h in MODULE if h not in (*LOADERS, *STEPPING, *TRANSFER)])
RecordedModelWithLoaders = recording(ModelWithLoaders, "module", MODULE)
RecordedData = recording(Data, "data", DATA)
RecordedCallback = recording(Stateful, "callback", CALLBACK)
RecordedCheckpoint = recording(ModelCheckpoint, "checkpoint", CALLBACK)
RecordedStopping = recording(EarlyStopping, "stopping", CALLBACK)


def fit(tmp_path: Path, model: Any = None, data: Any = None, callbacks: Any = None, **kwargs: Any) -> L.Trainer:
    """A fit of recording objects; ``ckpt_path`` and loaders go to fit, other ``kwargs`` to the Trainer."""
    run = {name: kwargs.pop(name) for name in ("ckpt_path", "train_dataloaders") if name in kwargs}
    fitting = trainer(tmp_path, callbacks=[RecordedCallback()] if callbacks is None else callbacks, **kwargs)
    fitting.fit(model or RecordedModel(), datamodule=data, **run)
    return fitting


MONITORING = ("stopping", "checkpoint")
MAY_SAVE = ("on_train_batch_end", "on_validation_end")


@dataclass(frozen=True)
class Expected:
    """The named pieces of a trace. ``callbacks``: who else is there, in order; ``data``: whose transfer hooks run."""

    callbacks: tuple[str, ...] = ("callback",)
    data: str = "data"

    def all(self, *hooks: str) -> list[str]:
        """Each hook on every callback and then on the module; where they may save, monitoring callbacks come last."""
        return [f"{who}.{hook}" for hook in hooks for who in self.order(hook)]

    def order(self, hook: str) -> list[str]:
        monitors = [c for c in self.callbacks if c in MONITORING] if hook in MAY_SAVE else []
        return [*(c for c in self.callbacks if c not in monitors), "module", *monitors]

    def each(self, hook: str) -> list[str]:
        """A hook on the callbacks alone."""
        return [f"{who}.{hook}" for who in self.callbacks]

    @property
    def transfer(self) -> list[str]:
        return [f"{self.data}.{hook}" for hook in TRANSFER]

    def setup(self, stage: str) -> list[str]:
        owners = ["data", "module"] if self.data == "data" else ["module"]
        return [
            "module.configure_callbacks",
            *[f"{owner}.prepare_data" for owner in owners],
            *(["data.setup[" + stage + "]"] if self.data == "data" else []),
            *self.all(f"setup[{stage}]"),
            "module.configure_model",
        ]

    def teardown(self, stage: str) -> list[str]:
        return [*(["data.teardown[" + stage + "]"] if self.data == "data" else []), *self.all(f"teardown[{stage}]")]

    @property
    def zero(self) -> list[str]:
        return [*self.all("on_before_zero_grad"), "module.optimizer_zero_grad", "optimizer.zero_grad"]

    @property
    def backward(self) -> list[str]:
        return [*self.all("on_before_backward"), "module.backward", "gradient", *self.all("on_after_backward")]

    @property
    def before_step(self) -> list[str]:
        return [*self.all("on_before_optimizer_step"), "module.configure_gradient_clipping", "module.clip_gradients"]

    def step(self, inside: list[str] | None = None) -> list[str]:
        inside = [*self.zero, *self.backward] if inside is None else inside
        return ["module.optimizer_step", "module.training_step", *inside, *self.before_step, "optimizer.step"]

    def batch(self, *inside: str, scheduler: bool = True, end: list[str] | None = None) -> list[str]:
        """One training batch; ``inside``: what happens in the step, and ``end`` at its end, other than the usual."""
        return [
            *self.transfer,
            *self.all("on_train_batch_start"),
            *(inside or self.step()),
            *(["module.lr_scheduler_step", "scheduler.step"] if scheduler else []),
            *(self.all("on_train_batch_end") if end is None else end),
        ]

    def evaluation(self, name: str = "validation", batches: int = 1, end: list[str] | None = None) -> list[str]:
        batch = [
            *self.transfer,
            *self.all(f"on_{name}_batch_start"),
            f"module.{name}_step",
            *self.all(f"on_{name}_batch_end"),
        ]
        return [
            f"module.on_{name}_model_eval",
            *self.all(f"on_{name}_start", f"on_{name}_epoch_start"),
            *batch * batches,
            *self.all(f"on_{name}_epoch_end"),
            *(self.all(f"on_{name}_end") if end is None else end),
            *([f"module.on_{name}_model_train"] if name != "predict" else []),
        ]

    def validation(self, batches: int = 1, end: list[str] | None = None) -> list[str]:
        """Within fit."""
        return ["module.on_validation_model_zero_grad", *self.evaluation(batches=batches, end=end)]

    @property
    def save(self) -> list[str]:
        state = [*self.each("state_dict"), *(["data.state_dict"] if self.data == "data" else [])]
        return [*state, *self.all("on_save_checkpoint")]

    def epoch_end(self, *monitoring: str) -> list[str]:
        """The ordinary callbacks, the module, and then whoever monitors a metric."""
        ordinary = [who for who in self.callbacks if who not in monitoring]
        return [f"{who}.on_train_epoch_end" for who in (*ordinary, "module", *monitoring)]

    def fit(
        self,
        *epochs: list[str],
        load: list[str] | None = None,
        sanity: int = 1,
        validates: bool = True,
        loaders: bool = True,
    ) -> list[str]:
        """A whole fit. ``load``: what a checkpoint adds; ``sanity``: batches tried; ``loaders``: defined in a hook."""
        val, train = ([f"{self.data}.{stage}_dataloader"] if loaders else [] for stage in ("val", "train"))
        check = [
            *self.each("on_sanity_check_start"),
            *self.evaluation(batches=sanity),
            *self.each("on_sanity_check_end"),
        ]
        return [
            *self.setup("fit"),
            *(load or []),
            "module.configure_optimizers",
            *self.all("on_fit_start"),
            *(val if validates else []),  # before the check starts, where progress bars ask how long it is
            *(check if sanity else []),
            *train,
            *self.all("on_train_start"),
            *[line for epoch in epochs for line in [*self.all("on_train_epoch_start"), *epoch]],
            *self.all("on_train_end", "on_fit_end"),
            *self.teardown("fit"),
        ]


E = Expected()
EPOCH = [*E.batch() * 2, *E.validation(), *E.epoch_end()]


def check(expected: list[str]) -> None:
    assert "\n".join(TRACE) == "\n".join(expected)


def straight(expected: list[str]) -> list[str]:
    """What a module sees of it that overrides nothing of the step."""
    hidden = {f"module.{hook}" for hook in (*STEPPING, *TRANSFER)}
    return [line for line in expected if line not in hidden]


# ------------------------------------------------------------------------------------------------ a fit


@pytest.mark.parametrize("epochs", [1, 2])
def test_fit(tmp_path: Path, epochs: int) -> None:
    fit(tmp_path, data=RecordedData(), max_epochs=epochs)
    check(E.fit(*[EPOCH] * epochs))


def test_a_module_with_its_own_loaders_has_the_transfer_hooks(tmp_path: Path) -> None:
    fit(tmp_path, RecordedModelWithLoaders())
    e = Expected(data="module")
    check(e.fit([*e.batch() * 2, *e.validation(), *e.epoch_end()]))


def test_without_validation_there_is_no_sanity_check(tmp_path: Path) -> None:
    fit(tmp_path, train_dataloaders=loader(4))
    e = Expected(data="module")
    check(e.fit([*e.batch() * 2, *e.epoch_end()], sanity=0, validates=False, loaders=False))


def test_the_sanity_check_can_be_left_out(tmp_path: Path) -> None:
    fit(tmp_path, data=RecordedData(), num_sanity_val_steps=0)
    check(E.fit(EPOCH, sanity=0))


@pytest.mark.parametrize("straight_line", [False, True])
def test_accumulation(tmp_path: Path, straight_line: bool) -> None:
    data = RecordedData()
    data.batches = 5
    fit(tmp_path, (StraightModel if straight_line else RecordedModel)(), data, accumulate_grad_batches=2)
    first = E.batch("module.training_step", *E.zero, *E.backward, scheduler=False)
    second = E.batch(*E.step(E.backward))
    expected = E.fit([*first, *second, *first, *second, *E.batch(), *E.validation(), *E.epoch_end()])
    check(straight(expected) if straight_line else expected)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_the_straight_line_has_the_same_order(tmp_path: Path, clip: float | None) -> None:
    fit(tmp_path, StraightModel(), RecordedData(), gradient_clip_val=clip)
    check(straight(E.fit(EPOCH)))


@pytest.mark.parametrize("optimizers", [1, 2])
def test_manual_optimization(tmp_path: Path, optimizers: int) -> None:
    class Manual(Model):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            found = self.optimizers()
            for optimizer in [found] if optimizers == 1 else found:
                loss = self.loss(batch)
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

    model = recording(Manual, "module", [hook for hook in MODULE if hook not in LOADERS])()
    model.optimizers_made = optimizers
    fit(tmp_path, model, RecordedData())
    step = ["optimizer.zero_grad", *E.backward, *E.all("on_before_optimizer_step"), "optimizer.step"]
    batch = E.batch("module.training_step", *step * optimizers, scheduler=False)
    check(E.fit([*batch * 2, *E.validation(), *E.epoch_end()]))


def test_several_loaders(tmp_path: Path) -> None:
    data = RecordedData()
    data.val_loaders = 2
    fit(tmp_path, data=data)
    check(E.fit([*E.batch() * 2, *E.validation(2), *E.epoch_end()], sanity=2))


def test_several_training_loaders_make_one_batch(tmp_path: Path) -> None:
    fit(tmp_path, train_dataloaders={"a": loader(4), "b": loader(2)})
    e = Expected(data="module")
    check(e.fit([*e.batch() * 2, *e.epoch_end()], sanity=0, validates=False, loaders=False))


def test_validation_in_mid_epoch(tmp_path: Path) -> None:
    data = RecordedData()
    data.batches = 4
    fit(tmp_path, data=data, val_check_interval=0.5)
    half = [*E.batch() * 2, *E.validation()]
    check(E.fit([*half, *half, *E.epoch_end()]))


def test_epoch_scheduler_steps_at_the_last_batch_before_its_end(tmp_path: Path) -> None:
    model = RecordedModel()
    model.interval = "epoch"
    fit(tmp_path, model, RecordedData(), max_epochs=2)
    check(E.fit(*[[*E.batch(scheduler=False), *E.batch(), *E.validation(), *E.epoch_end()]] * 2))


def test_plateau_scheduler_steps_after_the_module_and_before_a_checkpoint(tmp_path: Path) -> None:
    model = RecordedModel()
    model.plateau = True
    checkpoint = RecordedCheckpoint(tmp_path, save_on_train_epoch_end=True)
    fit(tmp_path, model, RecordedData(), [checkpoint, RecordedCallback()], enable_checkpointing=True)
    e = Expected(("callback", "checkpoint"))
    *hooks, last = e.epoch_end("checkpoint")
    end = [*hooks, "module.lr_scheduler_step", last, *e.save]
    check(e.fit([*e.batch(scheduler=False) * 2, *e.validation(), *end]))


@pytest.mark.parametrize("straight_line", [False, True])
def test_an_optimizer_with_a_closure_repeats_the_step(tmp_path: Path, straight_line: bool) -> None:
    model = (StraightModel if straight_line else RecordedModel)()
    model.lbfgs = True
    fit(tmp_path, model, train_dataloaders=loader(2), callbacks=[RecordedCallback()])
    zero = [*E.all("on_before_zero_grad"), "module.optimizer_zero_grad"]
    evaluate = ["module.training_step", *zero, *E.backward, *E.before_step]
    step = TRACE.count("module.training_step") * evaluate
    assert TRACE.count("module.training_step") >= 1
    e = Expected(data="module")
    batch = e.batch("module.optimizer_step", *step, "optimizer.step", scheduler=False)
    expected = e.fit([*batch, *e.epoch_end()], sanity=0, validates=False, loaders=False)
    check(straight(expected) if straight_line else expected)


# ------------------------------------------------------------------------------------------------ ways to end


def test_stopped_in_mid_epoch_validates_at_once(tmp_path: Path) -> None:
    model, data = RecordedModel(), RecordedData()
    data.batches = 4
    model.step_result = lambda loss, batch_idx: setattr(model.trainer, "should_stop", True) or loss
    fit(tmp_path, model, data, max_epochs=3)
    check(E.fit([*E.batch(), *E.validation(), *E.epoch_end()]))


def test_stopped_in_the_last_batch(tmp_path: Path) -> None:
    model = RecordedModel()
    model.step_result = lambda loss, batch_idx: setattr(model.trainer, "should_stop", batch_idx == 1) or loss
    fit(tmp_path, model, RecordedData(), max_epochs=3)
    check(E.fit(EPOCH))


def test_min_epochs_outlasts_a_stop(tmp_path: Path) -> None:
    model = RecordedModel()
    model.step_result = lambda loss, batch_idx: setattr(model.trainer, "should_stop", True) or loss
    fit(tmp_path, model, RecordedData(), max_epochs=3, min_epochs=2)
    check(E.fit(EPOCH, [*E.batch() * 2, *E.validation(), *E.epoch_end()]))


def test_max_steps_in_mid_epoch_does_not_validate(tmp_path: Path) -> None:
    fit(tmp_path, data=RecordedData(), max_epochs=-1, max_steps=3)
    check(E.fit(EPOCH, [*E.batch(), *E.epoch_end()]))


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_minus_one_skips_the_rest_of_the_epoch(tmp_path: Path, interval: str) -> None:
    class Skips(Model):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 1 else None

    data = RecordedData()
    data.batches = 3
    model = recording(Skips, "module", [hook for hook in MODULE if hook not in LOADERS])()
    model.interval = interval
    fit(tmp_path, model, data, max_epochs=2)
    skipped = [*E.transfer, *E.all("on_train_batch_start")]
    if interval == "epoch":  # it is over, however it ended
        skipped += ["module.lr_scheduler_step", "scheduler.step"]
    check(E.fit(*[[*E.batch(scheduler=interval == "step"), *skipped, *E.epoch_end()]] * 2))


@pytest.mark.parametrize("straight_line", [False, True])
def test_a_step_without_loss_has_no_backward(tmp_path: Path, straight_line: bool) -> None:
    model = (StraightModel if straight_line else RecordedModel)()
    model.step_result = lambda loss, batch_idx: None
    with pytest.warns(UserWarning, match="no loss for any of the 2 batches"):
        fit(tmp_path, model, RecordedData())
    expected = E.fit([*E.batch(*E.step(E.zero)) * 2, *E.validation(), *E.epoch_end()])
    check(straight(expected) if straight_line else expected)


def test_a_failure_tears_nothing_down(tmp_path: Path) -> None:
    model = RecordedModel()

    def fails(loss: Any, batch_idx: int) -> Any:
        if batch_idx == 1:
            raise ZeroDivisionError("in the step")
        return loss

    model.step_result = fails
    with pytest.raises(ZeroDivisionError, match="in the step"):
        fit(tmp_path, model, RecordedData())
    expected = E.fit(E.batch())
    del expected[expected.index("callback.on_train_end") :]
    failing = [*E.transfer, *E.all("on_train_batch_start"), "module.optimizer_step", "module.training_step"]
    check([*expected, *failing, "callback.on_exception", "data.on_exception"])


# ------------------------------------------------------------------------------------------------ with checkpoints


def test_checkpoints_and_early_stopping_come_after_the_module(tmp_path: Path) -> None:
    checkpoint = RecordedCheckpoint(tmp_path, monitor="val_loss", save_on_train_epoch_end=True)
    callbacks = [checkpoint, RecordedStopping("val_loss"), RecordedCallback()]
    fit(tmp_path, data=RecordedData(), callbacks=callbacks, enable_checkpointing=True)
    e = Expected(("stopping", "callback", "checkpoint"))
    check(e.fit([*e.batch() * 2, *e.validation(), *e.epoch_end("stopping", "checkpoint"), *e.save]))


def test_checkpoints_without_a_monitor_are_saved_at_the_end_of_the_epoch(tmp_path: Path) -> None:
    callbacks = [RecordedCheckpoint(tmp_path), RecordedCallback()]
    fit(tmp_path, data=RecordedData(), callbacks=callbacks, enable_checkpointing=True, limit_val_batches=0)
    e = Expected(("callback", "checkpoint"))
    check(e.fit([*e.batch() * 2, *e.epoch_end("checkpoint"), *e.save], sanity=0, validates=False))


def test_step_checkpoints_wait_for_the_validation_they_belong_to(tmp_path: Path) -> None:
    callbacks = [RecordedCheckpoint(tmp_path, every_n_train_steps=1), RecordedCallback()]
    fit(tmp_path, data=RecordedData(), callbacks=callbacks, enable_checkpointing=True)
    e = Expected(("callback", "checkpoint"))
    first = e.batch(end=[*e.all("on_train_batch_end"), *e.save])
    validation = e.validation(end=[*e.all("on_validation_end"), *e.save])
    check(e.fit([*first, *e.batch(), *validation, *e.epoch_end("checkpoint")]))


def test_saving_by_hand(tmp_path: Path) -> None:
    fitted = fit(tmp_path, data=RecordedData())
    TRACE.clear()
    fitted.save_checkpoint(tmp_path / "whole.ckpt")
    check(E.save)
    TRACE.clear()
    fitted.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    check(["module.on_save_checkpoint"])


LOAD = [
    "module.on_load_checkpoint",
    "data.load_state_dict",
    "callback.on_load_checkpoint",
    "callback.load_state_dict",
]


def test_resumed_after_an_epoch(tmp_path: Path) -> None:
    path = tmp_path / "one.ckpt"
    fit(tmp_path, data=RecordedData()).save_checkpoint(path)
    TRACE.clear()
    fit(tmp_path, data=RecordedData(), ckpt_path=path, max_epochs=2)
    check(E.fit(EPOCH, load=LOAD))


def test_resumed_in_mid_epoch(tmp_path: Path) -> None:
    saving = [ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1), RecordedCallback()]
    fit(tmp_path, data=RecordedData(), callbacks=saving, enable_checkpointing=True)
    TRACE.clear()
    with pytest.warns(UserWarning, match="states of callbacks"):
        fit(tmp_path, data=RecordedData(), ckpt_path=tmp_path / "step=1.ckpt")
    check(E.fit([*E.batch(), *E.validation(), *E.epoch_end()], load=LOAD))


def test_nothing_left_to_train(tmp_path: Path) -> None:
    path = tmp_path / "one.ckpt"
    fit(tmp_path, data=RecordedData()).save_checkpoint(path)
    TRACE.clear()
    fit(tmp_path, data=RecordedData(), ckpt_path=path)
    assert not [line for line in TRACE if "on_train" in line]
    assert TRACE[-5:] == [*E.all("on_fit_end"), *E.teardown("fit")]


# ------------------------------------------------------------------------------------------------ other stages


@pytest.mark.parametrize(("stage", "name"), [("validate", "validation"), ("test", "test"), ("predict", "predict")])
def test_other_stages(tmp_path: Path, stage: str, name: str) -> None:
    running = trainer(tmp_path, callbacks=RecordedCallback())
    getattr(running, stage)(RecordedModel(), datamodule=RecordedData())
    asked = f"data.{'val' if stage == 'validate' else stage}_dataloader"
    check([*E.setup(stage), asked, *E.evaluation(name), *E.teardown(stage)])


def test_validate_with_several_loaders(tmp_path: Path) -> None:
    data = RecordedData()
    data.val_loaders = 2
    trainer(tmp_path, callbacks=RecordedCallback()).validate(RecordedModel(), datamodule=data)
    check([*E.setup("validate"), "data.val_dataloader", *E.evaluation(batches=2), *E.teardown("validate")])


def test_validate_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "one.ckpt"
    fit(tmp_path, data=RecordedData()).save_checkpoint(path)
    TRACE.clear()
    running = trainer(tmp_path, callbacks=RecordedCallback())
    running.validate(RecordedModel(), datamodule=RecordedData(), ckpt_path=path)
    load = ["module.on_load_checkpoint", "callback.on_load_checkpoint"]
    check([*E.setup("validate"), *load, "data.val_dataloader", *E.evaluation(), *E.teardown("validate")])


# ------------------------------------------------------------------------------------------------ loggers


class RecordedLogger(Logger):
    name, version, experiment = "recorded", 0, None
    log_dir = root_dir = None

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        TRACE.append(f"logger.log_metrics {' '.join(m for m in metrics if m != 'epoch')}")

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        TRACE.append("logger.log_hyperparams")

    def finalize(self, status: str) -> None:
        TRACE.append(f"logger.finalize {status}")


class Logs(Model):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()

    def on_train_epoch_end(self) -> None:
        self.log("at_the_end", 1.0)


def test_when_loggers_are_written_to(tmp_path: Path) -> None:
    hooks = """on_fit_start on_train_batch_end on_validation_epoch_end on_validation_end on_train_epoch_end
        teardown""".split()
    fit(tmp_path, recording(Logs, "module", hooks)(), Data(), [], logger=RecordedLogger(), log_every_n_steps=1)
    TRACE[:] = [line for line in TRACE if line.startswith(("module", "logger"))]
    check(
        [
            "module.on_fit_start",
            "logger.log_hyperparams",
            *["module.on_validation_epoch_end", "module.on_validation_end"],  # the sanity check
            *["module.on_train_batch_end", "logger.log_metrics train_loss"] * 2,
            *["module.on_validation_epoch_end", "logger.log_metrics val_loss", "module.on_validation_end"],
            *["module.on_train_epoch_end", "logger.log_metrics at_the_end"],
            "module.teardown[fit]",
            "logger.finalize success",
        ]
    )


def test_a_failure_closes_the_loggers(tmp_path: Path) -> None:
    model = RecordedModel()

    def fails(loss: Any, batch_idx: int) -> Any:
        raise ZeroDivisionError

    model.step_result = fails
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, model, RecordedData(), logger=RecordedLogger())
    assert TRACE[-3:] == ["callback.on_exception", "data.on_exception", "logger.finalize failed"]
