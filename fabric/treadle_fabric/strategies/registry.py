"""The names of strategies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from treadle_fabric.errors import MisconfigurationException, near_names
from treadle_fabric.strategies.strategy import Strategy

__all__ = ["STRATEGY_REGISTRY", "StrategyRegistry"]


class _Entry(NamedTuple):
    strategy: Callable[..., Strategy]
    description: str
    init_params: dict[str, Any]


class StrategyRegistry:
    """Strategies by name."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def register(
        self,
        name: str,
        strategy: Callable[..., Strategy],
        description: str = "",
        override: bool = False,
        **init_params: Any,
    ) -> None:
        """Enter a name.

        Args:
            name: What users pass as ``strategy=``.
            strategy: The class.
            description: A line about it.
            override: Replace an entry of that name.
            **init_params: Arguments for the class.

        Raises:
            MisconfigurationException: The name is taken.
        """
        if name in self._entries and not override:
            raise MisconfigurationException(
                f"The strategy name {name!r} is taken. Choose another, or pass override=True."
            )
        self._entries[name] = _Entry(strategy, description, init_params)

    def get(self, name: str) -> Strategy:
        """A new strategy.

        Raises:
            MisconfigurationException: There is none of that name.
        """
        if name not in self._entries:
            raise MisconfigurationException(f"strategy={name!r} is unknown. {near_names(name, self._entries)}")
        entry = self._entries[name]
        return entry.strategy(**entry.init_params)

    def remove(self, name: str) -> None:
        """Forget a name."""
        self._entries.pop(name, None)

    def available_strategies(self) -> list[str]:
        """All names."""
        return list(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __repr__(self) -> str:
        return f"Strategies: {', '.join(self._entries)}"


STRATEGY_REGISTRY = StrategyRegistry()
