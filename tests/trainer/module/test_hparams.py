"""Tests of ``treadle.module.hparams``."""

from __future__ import annotations

import functools
import threading
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from treadle.module.hparams import HyperparametersMixin
from treadle_fabric.attribute_dict import AttributeDict
from treadle_fabric.errors import MisconfigurationException


class Base(HyperparametersMixin):
    def __init__(self, x: int, y: int = 2, *args: int, z: int = 3, **kwargs: Any) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_all_arguments_with_kwargs_flattened() -> None:
    hparams = Base(1, 5, 99, z=4, extra=6).hparams
    assert hparams == {"x": 1, "y": 5, "z": 4, "extra": 6}
    assert isinstance(hparams, AttributeDict)
    assert hparams.extra == 6


def test_subclass_arguments_win() -> None:
    class Derived(Base):
        def __init__(self, width: int, x: int = 9) -> None:
            super().__init__(x + 1, z=0)

    derived = Derived(7)
    assert derived.hparams == {"width": 7, "x": 9, "y": 2, "z": 0}
    assert derived._hparams_name == "kwargs"


def test_nothing_saved() -> None:
    mixin = HyperparametersMixin()
    assert mixin.hparams == {} == mixin.hparams_initial
    assert mixin._hparams_name is None
    assert mixin._log_hyperparams is False


def test_chosen_and_ignored() -> None:
    class Chosen(HyperparametersMixin):
        def __init__(self, x: int, y: int, z: int) -> None:
            self.save_hyperparameters("x", "z", ignore="z", logger=False)

    class Ignoring(HyperparametersMixin):
        def __init__(self, x: int, y: int, z: int) -> None:
            self.save_hyperparameters(ignore=["y", "z"])

    chosen = Chosen(1, 2, 3)
    assert chosen.hparams == {"x": 1}
    assert chosen._log_hyperparams is False
    assert Ignoring(1, 2, 3).hparams == {"x": 1}
    assert Ignoring(1, 2, 3)._log_hyperparams is True


def test_it_adds_when_called_again() -> None:
    class Twice(HyperparametersMixin):
        def __init__(self, x: int, y: int) -> None:
            self.save_hyperparameters("x")
            self.save_hyperparameters({"k": y})

    assert Twice(1, 2).hparams == {"x": 1, "k": 2}


@dataclass
class Config:
    width: int = 4
    rate: float = 0.1


class One(HyperparametersMixin):
    def __init__(self, config: Any, other: int = 1) -> None:
        self.save_hyperparameters(config)


@pytest.mark.parametrize(
    "config", [{"width": 4, "rate": 0.1}, Namespace(width=4, rate=0.1), Config(), AttributeDict(width=4, rate=0.1)]
)
def test_one_object_that_holds_them(config: Any) -> None:
    one = One(config)
    assert one.hparams == {"width": 4, "rate": 0.1}
    assert isinstance(one.hparams, AttributeDict)
    assert one._hparams_name == "config"


def test_a_dataclass_with_the_mixin() -> None:
    @dataclass
    class Settings(HyperparametersMixin):
        x: int
        y: int = 2

        def __post_init__(self) -> None:
            self.save_hyperparameters(ignore=["y"])

    assert Settings(1).hparams == {"x": 1}


def test_called_from_a_helper_and_through_a_decorator() -> None:
    def traced(init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(init)
        def wrapper(*args: Any, **kwargs: Any) -> None:
            init(*args, **kwargs)

        return wrapper

    class Decorated(HyperparametersMixin):
        @traced
        def __init__(self, x: int) -> None:
            self.prepare()

        def prepare(self) -> None:
            self.save_hyperparameters()

    assert Decorated(3).hparams == {"x": 3}


def test_arguments_of_other_objects_are_not_taken() -> None:
    class Owner(HyperparametersMixin):
        def __init__(self, outer: int) -> None:
            self.inner = Base(1)

    assert "outer" not in Owner(5).inner.hparams


def test_an_explicit_frame() -> None:
    import inspect

    class Framed(HyperparametersMixin):
        def __init__(self, x: int) -> None:
            threading.Thread(target=self.save_hyperparameters, kwargs={"frame": inspect.currentframe()}).run()

    assert Framed(8).hparams == {"x": 8}


def test_the_initial_values_stay() -> None:
    base = Base([1], extra=threading.Lock())  # type: ignore[arg-type]
    base.hparams.x.append(2)
    base.hparams.y = 100
    assert base.hparams_initial["x"] == [1]
    assert base.hparams_initial["y"] == 2
    base.hparams_initial["y"] = 5
    assert base.hparams_initial["y"] == 2, "a copy is handed out"


def test_remove() -> None:
    base = Base(1)
    base.remove_ignored_hparams(["x", "unknown"])
    assert base.hparams == {"y": 2, "z": 3} == base.hparams_initial


def test_a_module_argument_is_warned_about() -> None:
    with pytest.warns(UserWarning, match=r"ignore=\['x'\]"):
        base = Base(nn.Linear(1, 1))  # type: ignore[arg-type]
    assert base.hparams_initial["x"] is base.hparams.x


def test_works_before_module_init() -> None:
    class Early(HyperparametersMixin, nn.Module):
        def __init__(self, x: int) -> None:
            self.save_hyperparameters()
            super().__init__()
            self.layer = nn.Linear(x, x)

    early = Early(2)
    assert early.hparams.x == 2
    assert torch.equal(early.layer(torch.zeros(2)), early.layer.bias)


def test_unknown_name() -> None:
    class Misspelled(HyperparametersMixin):
        def __init__(self, learning_rate: float) -> None:
            self.save_hyperparameters("learning_rat")

    with pytest.raises(MisconfigurationException, match="Did you mean 'learning_rate'"):
        Misspelled(0.1)


@pytest.mark.parametrize("value", [3, 0.5, ()])
def test_an_object_without_names(value: Any) -> None:
    with pytest.raises(MisconfigurationException, match="holds no named values"):
        One(value)


def test_two_objects() -> None:
    class Two(HyperparametersMixin):
        def __init__(self) -> None:
            self.save_hyperparameters({"a": 1}, {"b": 2})

    with pytest.raises(MisconfigurationException, match="2 objects"):
        Two()
