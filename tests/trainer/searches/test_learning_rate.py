"""The range test: which rates it tests, what it suggests, and how it is drawn.

Tests of ``treadle.searches.learning_rate``, ``treadle.searches.plot``, ``treadle.searches.attributes``.
"""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
import pytest
import torch

from treadle.searches.attributes import find_attribute
from treadle.searches.learning_rate import LRFinder, go_on_with
from treadle_fabric import AttributeDict

matplotlib.use("Agg")


def finder(losses: list[float], mode: str = "exponential", low: float = 1e-6, high: float = 1.0) -> LRFinder:
    found = LRFinder(mode, low, high, len(losses))
    found.results = {"lr": [found.rate(i) for i in range(len(losses))], "loss": losses}
    return found


def test_rates_go_from_the_first_to_the_last() -> None:
    rates = finder([0.0] * 7).results["lr"]
    assert rates == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    assert finder([0.0] * 5, "linear", 0.1, 0.5).results["lr"] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert LRFinder("linear", 0.1, 1.0, 1).rate(0) == 0.1


def test_the_suggestion_is_where_the_loss_falls_fastest_on_the_axis() -> None:
    falling = [-math.tanh(i - 30) for i in range(61)]  # steepest in the middle, at 1e-3
    found = finder(falling)
    assert found.suggestion() == pytest.approx(1e-3)
    assert finder(falling, "linear").suggestion() == pytest.approx(0.5)
    assert finder(falling).suggestion(skip_begin=40) == pytest.approx(found.results["lr"][40])
    assert finder(falling).suggestion(skip_begin=0, skip_end=0) == pytest.approx(1e-3)


def test_losses_that_are_not_finite_are_left_out_and_shift_nothing() -> None:
    falling = [-math.tanh(i - 30) for i in range(61)]
    falling[15] = falling[20] = math.nan
    falling[59] = math.inf
    assert finder(falling).suggestion() == pytest.approx(1e-3)


@pytest.mark.parametrize("count", [0, 5, 12])
def test_too_few_points_give_no_suggestion(count: int) -> None:
    assert finder([1.0] * count).suggestion() is None


def test_the_picture_marks_the_suggestion_on_a_log_axis(tmp_path: Path) -> None:
    found = finder([1 - math.tanh(i - 30) for i in range(59)] + [5.0, 1e6])
    figure = found.plot(suggest=True)
    figure.savefig(tmp_path / "test.png")
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert [each.get_text() for each in axes.get_legend().get_texts()] == ["suggestion: 0.001"]
    assert axes.get_ylim()[1] < 4  # where the loss explodes, the curve leaves the picture
    assert found.plot(ax=axes) is figure
    matplotlib.pyplot.close(figure)
    linear = finder([1.0, 1.0], "linear").plot()
    assert linear.axes[0].get_xscale() == "linear"
    matplotlib.pyplot.close(linear)


def test_a_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install treadle\[plot\]"):
        finder([1.0, 1.0]).plot()


class Owner:
    def __init__(self, own: bool, hparam: bool) -> None:
        self._hparams = AttributeDict(lr=0.1) if hparam else None
        if own:
            self.lr = 0.2


@pytest.mark.parametrize("own", [True, False])
def test_an_attribute_is_set_wherever_it_is(own: bool) -> None:
    owner, other = Owner(own, hparam=True), Owner(False, hparam=False)
    found = find_attribute(["learning_rate", "lr"], [None, other, owner], "")
    assert found.get() == (0.2 if own else 0.1)
    assert found.where == ("Owner.lr" if own else "Owner.hparams.lr")
    found.set(0.3)
    assert owner._hparams == {"lr": 0.3}
    assert vars(owner).get("lr") == (0.3 if own else None)
    assert other._hparams is None


def test_schedulers_go_on_from_a_rate_that_was_found() -> None:
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD(
        [{"params": [weight]}, {"params": [torch.zeros(1, requires_grad=True)], "lr": 1.0}], lr=0.1
    )
    first = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [first], [])
    go_on_with(0.8, [optimizer], [scheduler])
    assert [group["lr"] for group in optimizer.param_groups] == [0.8, 0.8]
    optimizer.step()
    first.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.4, 0.4]
