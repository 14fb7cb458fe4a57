"""The names of strategies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from treadle_fabric.registry import Registry
from treadle_fabric.strategies.strategy import Strategy

__all__ = ["STRATEGY_REGISTRY", "StrategyRegistry"]


class StrategyRegistry(Registry[Strategy]):
    """Strategies by name. ``registry["ddp"]`` describes an entry, and ``registry.get("ddp")`` makes the strategy."""

    def __init__(self) -> None:
        super().__init__("strategy", "Strategies")

    def register(
        self,
        name: str,
        strategy: Callable[..., Strategy] | None = None,
        description: str = "",
        override: bool = False,
        **init_params: Any,
    ) -> Any:
        """Enter a name.

        Args:
            name: What users pass as ``strategy=``.
            strategy: The class. Default: the one that is decorated, ``@STRATEGY_REGISTRY.register("mine")``.
            description: A line about it.
            override: Replace an entry of that name.
            **init_params: Arguments for the class.

        Returns:
            The class, or the decorator.

        Raises:
            MisconfigurationException: The name is taken.
        """
        return self._enter(name, strategy, description, override, init_params)

    def available_strategies(self) -> list[str]:
        """All names."""
        return list(self)


STRATEGY_REGISTRY = StrategyRegistry()
