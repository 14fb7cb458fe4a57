"""Ranges of a trace named after the layers of a model."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.autograd.profiler import record_function

__all__ = ["LayerNames"]


class LayerNames:
    """Records the forward pass of each layer under its name, while asked to.

    Args:
        enabled: Whether it ever does.
    """

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self.module: nn.Module | None = None
        """The model."""
        self._handles: list[Any] = []
        self._running: dict[str, list[Any]] = {}

    def record(self, on: bool) -> None:
        """Begin to record, or end it; a call that changes nothing is free."""
        if on and self._enabled and self.module is not None and not self._handles:
            for name, layer in self.module.named_modules():
                if name:
                    self._hook(f"[pl][module]{type(layer).__module__}.{type(layer).__name__}: {name}", layer)
        elif not on and self._handles:
            for handle in self._handles:
                handle.remove()
            self._handles = []
            for records in self._running.values():
                while records:  # of a forward pass that an error ended, or that still runs
                    records.pop().__exit__(None, None, None)

    def _hook(self, name: str, layer: nn.Module) -> None:
        records = self._running.setdefault(name, [])

        def before(*_: Any) -> None:
            records.append(record := record_function(name))
            record.__enter__()  # type: ignore[no-untyped-call]

        def after(*_: Any) -> None:
            if records:
                records.pop().__exit__(None, None, None)

        self._handles.append(layer.register_forward_pre_hook(before))
        self._handles.append(layer.register_forward_hook(after, always_call=True))
