"""A dictionary whose string keys are attributes too."""

from __future__ import annotations

from typing import Any

__all__ = ["AttributeDict"]


class AttributeDict(dict[str, Any]):
    """A dictionary whose keys can be read, set and deleted as attributes.

    Example:
        >>> state = AttributeDict(step=0)
        >>> state.step += 1
        >>> state["step"]
        1
    """

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError as e:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {key!r}") from e

    def __setattr__(self, key: str, value: Any) -> None:
        self[key] = value

    def __delattr__(self, key: str) -> None:
        try:
            del self[key]
        except KeyError as e:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {key!r}") from e

    def __repr__(self) -> str:
        if not self:
            return ""
        names = [f'"{key}":' for key in self]
        width = max(map(len, names))
        return "\n".join(f"{name:<{width}} {value}" for name, value in zip(names, self.values()))
