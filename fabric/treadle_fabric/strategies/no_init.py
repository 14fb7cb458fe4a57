"""Modules whose weights stay uninitialized, because a checkpoint fills them."""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode

__all__: list[str] = []


class NoInit(TorchFunctionMode):
    """Turns the functions of ``torch.nn.init`` into no-ops."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
