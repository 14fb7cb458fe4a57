from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import pytest
from tests.trainer.callbacks.scripted import Raises, Scripted, loader, trainer_with

from treadle.callbacks import Callback, LambdaCallback
from treadle.callbacks.callback import CALLBACK_HOOKS

HOOKS = list(inspect.signature(LambdaCallback).parameters)


def test_every_hook_of_a_callback_can_be_given() -> None:
    assert set(HOOKS) == set(CALLBACK_HOOKS)


def test_the_functions_run_at_their_hooks() -> None:
    called: dict[str, int] = {}

    def note(name: str, *args: Any) -> None:
        assert len(args) == 2 + len(CALLBACK_HOOKS[name])
        called[name] = called.get(name, 0) + 1

    callback = LambdaCallback(**{name: partial(note, name) for name in HOOKS})  # type: ignore[arg-type]
    trainer = trainer_with(callback, Raises(8), max_epochs=1)
    model = Scripted([1])
    trainer.fit(model, loader(), loader(1))
    trainer.save_checkpoint("c.ckpt")
    with pytest.raises(RuntimeError, match="boom"):
        trainer_with(callback, Raises(8), max_epochs=3).fit(model, loader(), loader(1), ckpt_path="c.ckpt")
    unused = {name for name in HOOKS if name.startswith(("on_test_", "on_predict_"))}
    assert set(called) == set(HOOKS) - unused
    assert called["on_train_epoch_end"] == 1
    assert called["on_exception"] == 1


def test_hooks_that_were_not_given_stay_those_of_the_base() -> None:
    callback = LambdaCallback(on_fit_end=lambda *_: None)
    for name in set(HOOKS) - {"on_fit_end"}:
        assert getattr(callback, name).__func__ is getattr(Callback, name)
    with pytest.raises(TypeError):
        LambdaCallback(on_epoch=lambda *_: None)  # type: ignore[call-arg]
