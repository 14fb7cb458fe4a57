"""Which optimizers need a closure, by what is written in their ``step``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from treadle_fabric.precision import needs_closure, takes_closure


class Guarded(SGD):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """As nearly all optimizers outside of torch."""
        loss: Any = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"])
        return loss


class Copied(Guarded):
    def step(self, closure: Any = None) -> Any:
        self._cuda_graph_capture_health_check()  # as torch's own, in some versions
        return super().step(closure)


class Short(SGD):
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = closure() if closure else None
        super().step()
        return loss


class WithElse(SGD):
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        if not self.param_groups:
            raise RuntimeError("no parameters")
        if closure is not None:
            loss = closure()
        else:
            loss = None
        super().step()
        return loss


class Projecting(Guarded):
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.data.clamp_(-1, 1)
        return loss


class OfTorch(SGD):
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return super().step(closure=closure)


class Ignoring(SGD):
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return super().step()


class Unguarded(SGD):
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = closure()
        super().step()
        return loss


class OfUnguarded(Unguarded):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Refusing(SGD):
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        if closure is None:
            raise RuntimeError("needs a closure")
        return super().step(closure)


class Twice(SGD):
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            loss = closure()
        super().step()
        if closure is not None:
            closure()
        return loss


class Later(SGD):
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data.mul_(0.9)
        loss = None
        if closure is not None:
            loss = closure()
        super().step()
        return loss


class DecayedBefore(SGD):
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        self.param_groups[0]["params"][0].data.mul_(0.9)
        return super().step(closure)


class ByLoss(SGD):
    """The size of a step depends on the loss."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            loss = closure()
        self.param_groups[0]["lr"] = 0.1 if loss is None else float(loss)
        super().step()
        return loss


SOURCE = """
def step(self, closure=None):
    loss = None
    if closure is not None:
        loss = closure()
    return loss
"""
made: dict[str, Any] = {}
exec(SOURCE, made)  # a function without a file
NoSource = type("NoSource", (SGD,), {"step": made["step"], "__module__": __name__})
made["step"].__module__ = __name__

GUARDED = [SGD, torch.optim.Adam, torch.optim.LBFGS, Guarded, Short, WithElse, Projecting, OfTorch, Ignoring, Copied]
NEED = [Unguarded, OfUnguarded, Refusing, Twice, Later, DecayedBefore, ByLoss, NoSource]


@pytest.mark.parametrize(("kind", "takes"), [*((each, False) for each in GUARDED), *((each, True) for each in NEED)])
def test_what_is_the_same_after_a_closure_does_not_get_one(kind: Any, takes: bool) -> None:
    optimizer = kind(nn.Linear(1, 1).parameters(), lr=0.1)
    assert takes_closure(optimizer) is takes
    assert needs_closure(optimizer) is (kind is torch.optim.LBFGS)


@pytest.mark.parametrize("kind", [SGD, Guarded, Short, WithElse, Projecting, OfTorch])
def test_the_numbers_are_the_same_with_a_closure(kind: Any) -> None:
    found = []
    for by_closure in (True, False):
        weight = nn.Parameter(torch.tensor([2.0, -0.5]))
        optimizer = kind([weight], lr=0.1)

        def closure(weight: nn.Parameter = weight, optimizer: Any = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = weight.square().sum()
            loss.backward()
            return loss

        for _ in range(3):
            if by_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        found.append(weight.tolist())
    assert found[0] == found[1] != [2.0, -0.5]
