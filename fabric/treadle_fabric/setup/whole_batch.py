"""Whole batches: run by the strategy, or here through all stages one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.setup.module import FabricModule, through_engine
from treadle_fabric.strategies import Strategy

__all__: list[str] = []


def _whole_loss(module: FabricModule) -> Callable[[Any], Any]:
    from treadle_fabric.strategies.parallelism.pipeline import whole_loss  # most programs cut nothing

    return whole_loss(module.module)


def _whole_outputs(module: FabricModule) -> Callable[[Any], Any]:
    from treadle_fabric.strategies.parallelism.pipeline import whole_outputs  # most programs cut nothing

    return whole_outputs(module.module)


def run_batch(
    strategy: Strategy, module: FabricModule, engine: Module, batch: Any, window: float, backward: Callable[..., None]
) -> dict[Any, Tensor]:
    """Run forward and backward of a batch; see :meth:`treadle_fabric.Fabric.run_batch`."""
    if not window > 0:
        raise MisconfigurationException(f"run_batch(window={window!r}): must be a number of batches, more than 0.")
    if strategy.runs_whole_batch:
        return strategy.run_batch(engine, batch, window)
    values = _named(through_engine(module, _whole_loss(module))(batch))
    loss = values["loss"]
    backward(loss / window if window != 1 else loss, model=module)
    return _detached(values)


def evaluate_batch(strategy: Strategy, module: FabricModule, engine: Module, batch: Any) -> dict[Any, Tensor]:
    """Run a batch forward; see :meth:`treadle_fabric.Fabric.evaluate_batch`."""
    if strategy.runs_whole_batch:
        return strategy.evaluate_batch(engine, batch)
    with torch.no_grad():
        return _detached(_named(through_engine(module, _whole_loss(module))(batch)))


def predict_batch(strategy: Strategy, module: FabricModule, engine: Module, batch: Any) -> Any:
    """Run a batch forward; see :meth:`treadle_fabric.Fabric.predict_batch`."""
    if strategy.runs_whole_batch:
        return strategy.predict_batch(engine, batch)
    with torch.no_grad():
        return through_engine(module, _whole_outputs(module))(batch)


def _named(returned: Any) -> Mapping[Any, Any]:
    values: Mapping[Any, Any] = returned if isinstance(returned, Mapping) else {"loss": returned}
    if not isinstance(values.get("loss"), Tensor):
        raise MisconfigurationException(
            f"`loss(outputs, batch)` returned {type(returned).__name__}: give a tensor or a dict with 'loss'."
        )
    return values


def _detached(values: Mapping[Any, Any]) -> dict[Any, Tensor]:
    return {name: torch.as_tensor(value).detach() for name, value in values.items()}
