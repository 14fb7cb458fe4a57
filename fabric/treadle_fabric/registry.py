"""Classes by the names that users give, with the arguments that a name stands for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, Final, Generic, NamedTuple, TypeVar

from treadle_fabric.errors import MisconfigurationException, UnknownNameError, near_names

__all__ = ["Registry"]

T = TypeVar("T")
_NONE: Final[Any] = object()


class _Entry(NamedTuple):
    find: Callable[[], Any]
    description: str
    init_params: dict[str, Any]


class Registry(MutableMapping[str, dict[str, Any]], Generic[T]):
    """Classes by name; :meth:`get` makes an object of one.

    As a mapping it has a dictionary for each name, with the entries "strategy" (where that is the kind), which is the
    class, "strategy_name", "description" and "init_params".

    Args:
        kind: What is registered, such as "strategy".
        plural: The same in the plural, for the printed form.
    """

    def __init__(self, kind: str, plural: str) -> None:
        self._kind, self._plural = kind, plural
        self._entries: dict[str, _Entry] = {}

    def register_on_demand(
        self, name: str, find: Callable[[], Callable[..., T]], description: str = "", **init_params: Any
    ) -> None:
        """Enter a name whose class is imported when it is first asked for.

        Args:
            name: What users write.
            find: Imports the class and returns it.
            description: A line about it.
            **init_params: Arguments for the class.
        """
        self._entries[name] = _Entry(find, description, init_params)

    def class_of(self, name: str) -> Any:
        """Return the class of a name.

        Raises:
            UnknownNameError: There is none of that name; the message has similar ones.
        """
        return self._entry(name).find()

    def get(self, name: str, default: Any = None) -> T:  # type: ignore[override] # makes what the entry describes
        """Make an object of the class that has a name.

        Args:
            name: The name.
            default: What is returned where there is no such name. Default: None, which raises an error.

        Raises:
            UnknownNameError: There is none of that name, and no default.
        """
        if name not in self._entries and default is not None:
            return default  # type: ignore[no-any-return] # of the user's
        entry = self._entry(name)
        made: T = entry.find()(**entry.init_params)
        return made

    def remove(self, name: str) -> None:
        """Forget a name.

        Raises:
            UnknownNameError: There is none of that name.
        """
        self._entry(name)
        del self._entries[name]

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise UnknownNameError(f"{self._kind}={name!r} is unknown. {near_names(str(name), self._entries)}")
        return self._entries[name]

    def _enter(self, name: str, cls: Any, description: str, override: bool, init_params: dict[str, Any]) -> Any:
        """Enter a class under a name, and return the class; with None for the class, a decorator that does so."""
        if not isinstance(name, str):
            raise MisconfigurationException(
                f"The name of {self._article} is a string, and {name!r} is none: register(name, the class)."
            )
        if name in self._entries and not override:
            raise MisconfigurationException(
                f"The {self._kind} name {name!r} is taken. Choose another, or pass override=True."
            )
        if cls is None:
            return lambda decorated: self._enter(name, decorated, description, override, init_params)
        self._entries[name] = _Entry(lambda: cls, description, init_params)
        return cls

    @property
    def _article(self) -> str:
        return f"{'an' if self._kind[0] in 'aeiou' else 'a'} {self._kind}"

    def __getitem__(self, name: str) -> dict[str, Any]:
        find, description, init_params = self._entry(name)
        return {
            "description": description,
            "init_params": init_params,
            self._kind: find(),
            f"{self._kind}_name": name,
        }

    def __setitem__(self, name: str, entry: dict[str, Any]) -> None:
        cls = entry[self._kind]
        self._enter(name, cls, entry.get("description", ""), override=True, init_params=entry.get("init_params", {}))

    def __delitem__(self, name: str) -> None:
        self.remove(name)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Registered {self._plural}: {', '.join(self._entries)}"
