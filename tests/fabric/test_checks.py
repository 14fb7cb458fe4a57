"""Tests of ``treadle_fabric.checks``."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from treadle_fabric import MisconfigurationException, MissingPackageError
from treadle_fabric.checks import check_integer, on_demand


class Index:
    def __index__(self) -> int:
        return 7


@pytest.mark.parametrize(
    ("value", "expected"),
    [(3, 3), (-1, -1), (3.0, 3), (1e5, 100_000), (Index(), 7), (torch.tensor(4), 4), (10**20, 10**20)],
)
def test_integers(value: Any, expected: int) -> None:
    found = check_integer("n", value)
    assert found == expected
    assert type(found) is int


@pytest.mark.parametrize(
    "value",
    [True, False, "3", 1.5, float("nan"), float("inf"), None, [3], b"3", torch.tensor([1, 2]), torch.tensor(1.5)],
)
def test_what_is_no_integer_is_refused(value: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"^Thing: n=.* must be an integer: pass a number such as 1\.$"):
        check_integer("Thing: n", value)


@pytest.mark.parametrize(("minimum", "value", "ok"), [(0, 0, True), (0, -1, False), (-1, -1, True), (2, 1, False)])
def test_the_minimum(minimum: int, value: int, ok: bool) -> None:
    if ok:
        assert check_integer("n", value, minimum=minimum) == value
        return
    with pytest.raises(MisconfigurationException, match=rf"n={value} must be an integer of at least {minimum}: "):
        check_integer("n", value, minimum=minimum)


def test_the_message_says_what_special_values_mean_and_a_value_that_is_right() -> None:
    with pytest.raises(MisconfigurationException, match=r"of at least -1 \(-1 keeps all\): pass a number such as 1\."):
        check_integer("n", "x", minimum=-1, meaning="-1 keeps all")
    with pytest.raises(MisconfigurationException, match=r"such as 5\."):
        check_integer("n", 4, minimum=5)


def test_names_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("lazy")
    monkeypatch.setitem(sys.modules, "lazy", module)
    vars(module)["__getattr__"] = on_demand("lazy", {"Fraction": "fractions"})
    assert "Fraction" in dir(module) and "Fraction" not in vars(module)
    assert module.Fraction is __import__("fractions").Fraction and "Fraction" in vars(module)
    with pytest.raises(AttributeError, match="module 'lazy' has no attribute 'Decimal'"):
        _ = module.Decimal
    monkeypatch.setitem(sys.modules, "absent", None)
    vars(module)["__getattr__"] = on_demand("lazy", {"Thing": "lazy.things"}, "absent", "cli")
    with pytest.raises(MissingPackageError, match=r"lazy\.Thing needs the package absent.*treadle\[cli\]"):
        _ = module.Thing
