"""Who is called at a hook: found out once, whatever way the hook was given.

Tests of ``treadle.run.dispatch``, ``treadle.module.overriding``.
"""

from __future__ import annotations

import logging
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
from tests.trainer.models import Net, loader, trainer

import treadle as L
from treadle.callbacks import LambdaCallback, ModelCheckpoint
from treadle.metrics.bus import Results
from treadle.run.dispatch import Dispatch

STEPS = 4
"""The batches of `loader(8)`."""


def fit(path: Path, model: Any = None, *callbacks: Any, **arguments: Any) -> L.Trainer:
    run = trainer(path, callbacks=list(callbacks), **arguments)
    run.fit(Net() if model is None else model, loader(8))
    return run


def test_a_hook_set_on_an_instance_is_called(tmp_path: Path) -> None:
    seen: list[Any] = []
    model, callback = Net(), L.Callback()
    model.on_train_batch_start = lambda batch, batch_idx: seen.append(batch_idx)

    def note(self: Any, trainer: Any, pl_module: Any) -> None:
        seen.append((self is callback, pl_module is model))

    callback.on_train_start = MethodType(note, callback)
    fit(tmp_path, model, callback)
    assert seen == [(True, True), *range(STEPS)]


def test_a_hook_of_a_base_class_a_mixin_or_a_decorator_is_called(tmp_path: Path) -> None:
    seen: list[str] = []

    class Base(Net):
        def on_train_start(self) -> None:
            seen.append("base")

    class Mixin:
        def on_train_end(self) -> None:
            seen.append("mixin")

    class Model(Mixin, Base):
        @staticmethod
        def on_fit_start() -> None:
            seen.append("static")

    fit(tmp_path, Model())
    assert seen == ["static", "base", "mixin"]


def test_a_hook_that_takes_anything_is_called(tmp_path: Path) -> None:
    seen: list[int] = []

    class Any_(L.Callback):
        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            seen.append(len(args))

        def on_train_batch_start(
            self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, extra: int = 0
        ) -> None:
            seen.append(extra)

    fit(tmp_path, None, Any_())
    assert seen == [0, 5] * STEPS


def test_functions_as_a_callback(tmp_path: Path) -> None:
    seen: list[Any] = []
    callback = LambdaCallback(
        on_train_start=lambda trainer, module: seen.append("start"),
        on_train_batch_end=lambda trainer, module, outputs, batch, batch_idx: seen.append(outputs["loss"].ndim),
        on_train_end=lambda trainer, module: seen.append(trainer.global_step),
    )
    fit(tmp_path, None, callback)
    assert seen == ["start", *[0] * STEPS, STEPS]


def test_what_nobody_overrides_is_not_called_and_not_even_listed(tmp_path: Path) -> None:
    tables: list[Any] = []

    class Looking(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            dispatch = Dispatch(trainer, pl_module, trainer.callbacks, Results(training=True, fabric=trainer.fabric))
            tables.extend((dispatch.listeners("on_train_batch_end"), len(dispatch.listeners("on_train_start"))))

    fit(tmp_path, None, Looking())
    assert tables == [(), 1]


def test_callbacks_come_in_their_order_and_before_the_module(tmp_path: Path) -> None:
    seen: list[str] = []

    class Model(Net):
        def on_train_start(self) -> None:
            seen.append("module")

    class Late(L.Callback):
        call_order = 1

    callbacks = [Late(), L.Callback(), L.Callback()]
    for name, callback in zip(("late", "first", "second"), callbacks, strict=True):
        callback.on_train_start = lambda trainer, pl_module, name=name: seen.append(name)
    fit(tmp_path, Model(), *callbacks)
    assert seen == ["first", "second", "late", "module"]


def test_a_module_may_bring_callbacks_which_replace_those_of_their_class(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Counting(L.Callback):
        starts = 0

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.starts += 1

    class Other(Counting):
        pass

    mine, others, theirs = Counting(), Other(), Counting()
    saves = ModelCheckpoint(tmp_path)

    class Model(Net):
        def configure_callbacks(self) -> Any:
            return [saves, theirs]

    with caplog.at_level(logging.INFO):
        run = fit(tmp_path, Model(), mine, others)
    assert (mine.starts, others.starts, theirs.starts) == (0, 1, 1)
    assert run.callbacks == [others, theirs, saves]
    assert "override existing callbacks passed to Trainer: Counting" in caplog.text
    assert saves.best_model_path

    class One(Net):
        def configure_callbacks(self) -> Any:
            return theirs

    fit(tmp_path, One())
    assert theirs.starts == 2


def test_minus_one_from_the_module_ends_the_epoch_and_not_from_a_callback(tmp_path: Path) -> None:
    class Model(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
            return -1 if batch_idx == 2 else None

    class Replies(L.Callback):
        def on_train_batch_start(self, *args: Any) -> Any:
            return -1

    assert fit(tmp_path, Model(), max_epochs=2).global_step == 4
    whole = fit(tmp_path, Net(), max_epochs=2).global_step
    assert fit(tmp_path, Net(), Replies(), max_epochs=2).global_step == whole > 4
    assert fit(tmp_path, Model(), Replies(), max_epochs=2).global_step == 4


def test_hooks_are_looked_up_again_in_every_run(tmp_path: Path) -> None:
    seen: list[str] = []
    model, run = Net(), trainer(tmp_path)
    run.fit(model, loader(4))
    model.on_train_start = lambda: seen.append("now")
    run.max_epochs = 2
    run.fit(model, loader(4))
    assert seen == ["now"]


def test_hooks_of_a_child_module_are_its_own_affair(tmp_path: Path) -> None:
    class Child(Net):
        def on_train_start(self) -> None:
            raise AssertionError("only the module that is fitted has hooks")

    model = Net()
    model.child = Child()
    fit(tmp_path, model)  # passes if nothing is raised


def test_a_transfer_hook_of_the_data_module_comes_before_the_modules(tmp_path: Path) -> None:
    seen: list[str] = []

    class Model(Net):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            seen.append("module")
            return batch

    class Data(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader(2)

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            seen.append("data")
            return batch + 1

    with pytest.warns(UserWarning, match="in both `LightningModule` and `LightningDataModule`"):
        trainer(tmp_path).fit(Model(), datamodule=Data())
    assert seen == ["data"]
