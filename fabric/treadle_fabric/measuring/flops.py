"""Count the floating-point operations of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["measure_flops"]


def measure_flops(
    model: nn.Module, forward_fn: Callable[[], Any], loss_fn: Callable[[Any], Tensor] | None = None
) -> int:
    """Count the floating-point operations of a forward pass, or of forward and backward.

    Counted are the operations that torch knows a formula for: matrix products, convolutions and attention. A
    multiplication and an addition are two. On the meta device nothing is computed, so that a model of any size can be
    counted in little time and memory.

    Args:
        model: The model. (Operations are counted wherever ``forward_fn`` makes them.)
        forward_fn: Runs the forward pass, and returns what ``loss_fn`` takes.
        loss_fn: Makes the loss, which is differentiated. Default: None, only the forward pass is counted.

    Example:
        >>> with torch.device("meta"):
        ...     model, batch = torch.nn.Linear(4, 2), torch.randn(3, 4)
        >>> measure_flops(model, lambda: model(batch), torch.sum)
        96
    """
    from torch.utils.flop_counter import FlopCounterMode  # rarely needed

    counter = FlopCounterMode(display=False)
    with counter:
        found = forward_fn()
        if loss_fn is not None:
            torch.autograd.backward(loss_fn(found))
    return int(counter.get_total_flops())
