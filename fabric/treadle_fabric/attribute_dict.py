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
        if key not in self:
            raise _NoSuchAttribute(f"{type(self).__name__!r} object has no attribute {key!r}")
        del self[key]

    def __repr__(self) -> str:
        if not self:
            return ""
        names = {f'"{key}":': value for key, value in self.items()}
        width = max(map(len, names))
        return "\n".join(f"{name:<{width}} {names[name]}" for name in sorted(names))


class _NoSuchAttribute(AttributeError, KeyError):
    """An attribute that is to be deleted is not there: an error of attributes, and of a dictionary's keys."""

    __str__ = Exception.__str__  # KeyError would print the repr
