"""What ``fabric.setup`` returned is saved and restored in whatever container it lies in the state.

In a dataclass, a named tuple, a Namespace or a deque it was pickled, or left as it was by ``fabric.load``.

Tests of ``treadle_fabric.setup.wrapped``, ``treadle_fabric.containers``.
"""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections import OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from tests.trainer.models import loader
from torch import nn

from treadle_fabric import AttributeDict, DistributedCheckpointIO, Fabric


class Named(NamedTuple):
    model: Any
    optimizer: Any
    step: int


@dataclass
class Record:
    model: Any
    optimizer: Any
    step: int


@dataclass(frozen=True, slots=True)
class Frozen:
    model: Any
    optimizer: Any
    step: int


def by_name(kind: Any) -> Callable[..., Any]:
    return lambda model, optimizer, step: kind(model=model, optimizer=optimizer, step=step)


HOLDERS: dict[str, Callable[..., Any]] = {
    **{kind.__name__: by_name(kind) for kind in (Named, Record, Frozen, Namespace, SimpleNamespace)},
    **{kind.__name__: by_name(kind) for kind in (dict, OrderedDict, AttributeDict, UserDict)},
    **{kind.__name__: lambda *held, kind=kind: kind(held) for kind in (list, tuple, deque, UserList)},
    "defaultdict": lambda *held: defaultdict(list, enumerate(held)),
    "nested": lambda model, optimizer, step: Named({"net": model}, [Record(None, optimizer, 0)], step),
}


def made(fabric: Fabric, seed: int) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    model, optimizer = fabric.setup(net := nn.Linear(2, 2), torch.optim.AdamW(net.parameters()))
    fabric.backward(model(torch.ones(1, 2)).sum())
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("holder", HOLDERS)
def test_it_is_restored_and_stays_wrapped(holder: str, folder: bool, wrapped: bool) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, plugins=DistributedCheckpointIO() if folder else None)
    first, second = made(fabric, 0), made(fabric, 1)
    held, into = (pair if wrapped else (pair[0].module, pair[1].optimizer) for pair in (first, second))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is kept pickled
        fabric.save("a.ckpt", {"all": HOLDERS[holder](*held, 3)})
        state = {"all": (given := HOLDERS[holder](*into, 0))}
        fabric.load("a.ckpt", state)
    assert torch.equal(first[0].weight, second[0].weight)
    (moments,), (restored,) = (
        [s["exp_avg"] for s in o.state.values() if s["exp_avg"].dim() == 2] for _, o in (first, second)
    )
    assert torch.equal(moments, restored)
    assert type(state["all"]) is type(given)
    if not isinstance(given, tuple | Frozen):
        assert state["all"] is given, "the user's own container is filled"
    assert repr(state["all"]) == repr(HOLDERS[holder](*into, 3)), "with the wrappers, and with the step of the file"


def test_an_object_with_a_state_is_asked_for_it_though_it_is_a_dataclass() -> None:
    @dataclass
    class Progress:
        model: Any
        step: int = 0

        def state_dict(self) -> dict[str, Any]:
            return {"step": self.step}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.step = state["step"]

    fabric = Fabric(accelerator="cpu", devices=1)
    model = fabric.setup(nn.Linear(1, 1))
    fabric.save("a.ckpt", {"progress": Progress(model, 5)})
    assert fabric.load("a.ckpt") == {"progress": {"step": 5}}
    fabric.load("a.ckpt", {"progress": (fresh := Progress(model))})
    assert fresh.step == 5


def test_a_loader_in_a_record_is_left_out() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    with pytest.warns(UserWarning, match=r"state\['run'\]\['data'\]"):
        fabric.save("a.ckpt", {"run": Namespace(data=loader(), step=3)})
    state = {"run": Namespace(data=(data := loader()), step=0)}
    fabric.load("a.ckpt", state)
    assert state["run"] == Namespace(data=data, step=3)


@dataclass
class Node:
    name: str
    parent: Node | None = field(default=None, repr=False, compare=False)
    below: list[Node] = field(default_factory=list)


def test_what_holds_itself_is_pickled_and_said() -> None:
    root = Node("root")
    root.below.append(Node("leaf", root))
    circle: list[Any] = [1]
    circle.append(circle)
    fabric = Fabric(accelerator="cpu", devices=1)
    for name, value in {"tree": root, "circle": circle}.items():
        with pytest.warns(UserWarning, match=rf"state\['{name}'\].*weights_only=False"):
            fabric.save("a.ckpt", {name: value, "model": nn.Linear(1, 1)})
        state = {name: value, "model": nn.Linear(1, 1)}
        fabric.load("a.ckpt", state, weights_only=False)
        loaded: Any = state[name]
        assert (loaded.below[0].parent if name == "tree" else loaded[1]) is loaded
