"""A loader, a sampler or a dataset in the state of ``fabric.save``: its state is saved, or is left out with a word.

Tests of ``treadle_fabric.setup.stateless``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.trainer.models import Samples, loader
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, Sampler

from treadle_fabric import CheckpointMismatchError, Fabric


class Counting(Sampler[int]):
    """A sampler with a state: where it begins."""

    def __init__(self, begin: int = 0) -> None:
        self.begin = begin

    def __iter__(self) -> Any:
        return iter(range(self.begin, 4))

    def __len__(self) -> int:
        return 4 - self.begin

    def state_dict(self) -> dict[str, Any]:
        return {"begin": self.begin}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begin = state["begin"]


class Growing(Samples):
    """A dataset with a state."""

    def state_dict(self) -> dict[str, Any]:
        return {"n": self.n}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n = state["n"]


class Keeps(DataLoader[Any]):
    """A loader with a state of its own."""

    position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


STATELESS: dict[str, Callable[[Fabric], Any]] = {
    "a plain loader": lambda f: loader(),
    "a wrapped loader": lambda f: f.setup_dataloaders(loader()),
    "a wrapped iterable": lambda f: f.setup_dataloaders([torch.ones(1)]),
    "a sampler": lambda f: RandomSampler(range(3)),
    "a dataset": lambda f: Samples(3),
}


@pytest.mark.parametrize("make", STATELESS.values(), ids=list(STATELESS))
def test_what_has_no_state_is_left_out_with_one_word_and_stays_as_it_is(make: Callable[[Fabric], Any]) -> None:
    run = fabric()
    model = run.setup(nn.Linear(1, 1))
    thing, inner, listed = make(run), make(run), make(run)
    state = {"model": model, "thing": thing, "step": 3, "more": {"inner": inner, "n": 1}, "list": [listed, 5, model]}
    with pytest.warns(UserWarning, match="is left out of 'a.ckpt'") as told:
        run.save("a.ckpt", state)
    assert [str(each.message).split(" (")[0] for each in told] == [
        "state['thing']",
        "state['more']['inner']",
        "state['list'][0]",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.save("b.ckpt", {**state, "step": 4})  # told once

    state |= {"step": 0, "more": {"inner": inner, "n": 0}, "list": [listed, 0, model]}
    assert run.load("b.ckpt", state) == {}
    assert state["step"] == 4
    assert state["thing"] is thing
    assert state["more"] == {"inner": inner, "n": 1}
    assert state["list"] == [listed, 5, model]
    assert sorted(run.load("b.ckpt")) == ["list", "model", "more", "step"]
    assert sorted(run.load("b.ckpt", {"thing": thing})) == ["list", "model", "more", "step"]


def test_a_file_without_it_is_whole() -> None:
    run = fabric()
    run.save("a.ckpt", {"step": 3})
    state = {"step": 0, "loader": loader()}
    assert run.load("a.ckpt", state) == {}
    assert state["step"] == 3
    with pytest.raises(CheckpointMismatchError, match="has no 'sampler'"):
        run.load("a.ckpt", {"sampler": Counting()})
    assert run.load("a.ckpt", {}) == {"step": 3}  # as without a state


@pytest.mark.parametrize("wrap", [False, True], ids=["plain", "wrapped"])
def test_what_a_loader_has_is_saved(wrap: bool) -> None:
    def made(*loaders: Any) -> list[Any]:
        return run.setup_dataloaders(list(loaders)) if wrap else list(loaders)

    run = fabric()
    own = Keeps(Samples(4))
    own.position = 7
    parts = DataLoader(Growing(9), 2, sampler=Counting(2))
    batched = DataLoader(Samples(4), batch_sampler=torch.utils.data.BatchSampler(Counting(3), 2, False))
    run.save("a.ckpt", dict(zip(("own", "parts", "batched"), made(own, parts, batched))))

    own = Keeps(Samples(4))
    parts = DataLoader(Growing(1), 2, sampler=Counting())
    batched = DataLoader(Samples(4), batch_sampler=torch.utils.data.BatchSampler(Counting(), 2, False))
    state = dict(zip(("own", "parts", "batched"), made(own, parts, batched)))
    before = {**state}
    assert run.load("a.ckpt", state) == {}
    assert all(state[key] is value for key, value in before.items())
    assert own.position == 7
    assert (parts.dataset.n, parts.sampler.begin) == (9, 2)  # type: ignore[attr-defined]
    assert batched.batch_sampler.sampler.begin == 3  # type: ignore[attr-defined, union-attr]


def test_a_resumable_loader_keeps_its_position_as_before() -> None:
    run = fabric()
    prepared = run.setup_dataloaders(loader(), resumable=True)
    next(iter(prepared))
    run.save("a.ckpt", {"loader": prepared})
    other = fabric()
    again = other.setup_dataloaders(loader(), resumable=True)
    other.load("a.ckpt", {"loader": again})
    assert [float(batch[0, 0]) for batch in again] == [2, 4, 6]
