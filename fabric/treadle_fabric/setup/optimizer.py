"""The wrapper around the user's optimizer: its step goes through strategy and precision."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import MethodType, SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from treadle_fabric.batches import map_tensors, move_data_to_device
from treadle_fabric.strategies import Strategy

__all__ = ["FabricOptimizer", "optimizer_to_device", "optimizers_to_device"]


class FabricOptimizer:
    """An optimizer whose ``step`` goes through strategy and precision; everything else is the user's optimizer.

    Instances also are of the class of the user's optimizer.

    Args:
        optimizer: The user's optimizer.
        strategy: The strategy.
        before_step: Called with the user's optimizer before each step.
        after_step: The same after it.
    """

    _prefix: ClassVar[str] = "Fabric"
    """What the class of the user's optimizer is called behind."""

    def __init__(
        self,
        optimizer: Optimizer,
        strategy: Strategy,
        before_step: Callable[[Optimizer], None] | None = None,
        after_step: Callable[[Optimizer], None] | None = None,
    ) -> None:
        fields = self.__dict__
        self.optimizer: Optimizer = optimizer
        fields["_strategy"] = strategy
        fields["_before_step"] = before_step
        fields["_after_step"] = after_step
        cls = type(optimizer)
        for name in dir(cls):
            # Bound once: a method found on the class would run with the wrapper as its self
            if name != "step" and not name.startswith("__") and callable(getattr(cls, name)):
                fields[name] = getattr(optimizer, name)
        if strategy.plain_step and before_step is None and after_step is None:
            # A method, as learning-rate schedulers require, of an object whose attributes are quick to read
            fields["step"] = MethodType(_plain_step, SimpleNamespace(optimizer=optimizer))
        self.__class__ = _also(type(self), cls)  # type: ignore[arg-type] # classes are hashable

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Step the optimizer.

        Args:
            closure: Evaluates the loss anew and returns it, for optimizers that need that.
            **kwargs: What else the optimizer's own ``step`` takes.
        """
        if closure is not None:
            kwargs["closure"] = closure
        if self._before_step is not None:
            self._before_step(self.optimizer)
        result: Any = self._strategy.optimizer_step(self.optimizer, **kwargs)
        if self._after_step is not None:
            self._after_step(self.optimizer)
        return result

    # Loading a state replaces these in the user's optimizer, so they are looked up each time

    @property
    def state(self) -> Any:
        """The user's optimizer's."""
        return self.optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.optimizer.state = value

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The user's optimizer's."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The user's optimizer's."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.optimizer.defaults = value

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # not there yet: being copied or unpickled
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __repr__(self) -> str:
        return f"{self._prefix}{self.optimizer!r}"

    def __reduce__(self) -> Any:
        wrapper = next(cls for cls in type(self).__mro__ if "_prefix" in vars(cls))
        return wrapper, (self.optimizer, self._strategy)  # those who listen to the steps belong to a run


def _plain_step(self: Any, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
    """:meth:`FabricOptimizer.step` where there is nothing but the step of ``self.optimizer``."""
    if closure is not None:
        kwargs["closure"] = closure
    return self.optimizer.step(**kwargs) if kwargs else self.optimizer.step()


@functools.cache
def _also(wrapper: type, cls: type) -> type:
    """A class that is both; ``step`` and what it needs come from the wrapper."""
    name = f"{wrapper._prefix}{cls.__name__}"  # type: ignore[attr-defined]
    return type(name, (wrapper, cls), {"__doc__": wrapper.__doc__, "__module__": wrapper.__module__})


def optimizers_to_device(optimizers: Iterable[Optimizer], device: torch.device | str | int) -> None:
    """Move the state of several optimizers to a device, in place."""
    for optimizer in optimizers:
        optimizer_to_device(optimizer, device)


def optimizer_to_device(optimizer: Optimizer, device: torch.device | str | int) -> None:
    """Move the state of an optimizer to a device, in place; counts of steps stay on the CPU, as torch has them."""

    def moved(name: str, value: Any) -> Any:
        if name == "step":
            return value
        return (
            move_data_to_device(value, device)
            if isinstance(value, Tensor)
            else map_tensors(value, lambda tensor: tensor.to(device))
        )

    for parameter, state in optimizer.state.items():
        optimizer.state[parameter] = {name: moved(name, value) for name, value in state.items()}
