"""The attribute that a search is about: of the module or the data module, or of their hyper-parameters."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

from treadle_fabric import MisconfigurationException, near_names

__all__ = ["Attribute", "find_attribute", "lightning_getattr", "lightning_hasattr", "lightning_setattr"]


class Attribute:
    """One attribute, wherever owners have it: as an attribute of their own, and among their hyper-parameters.

    Args:
        name: Of the attribute.
        owners: Modules and data modules that have it.
    """

    def __init__(self, name: str, owners: list[Any]) -> None:
        self.name, self._owners = name, owners

    @property
    def where(self) -> str:
        """Where the attribute is, for messages: ``Model.lr`` or ``Model.hparams.lr``."""
        owner = self._owners[0]
        return f"{type(owner).__qualname__}.{'' if hasattr(owner, self.name) else 'hparams.'}{self.name}"

    def get(self) -> Any:
        """The value, the owner's own before that of its hyper-parameters."""
        owner = self._owners[0]
        return getattr(owner, self.name) if hasattr(owner, self.name) else _hparams(owner)[self.name]

    def set(self, value: Any) -> None:
        """Set the value everywhere."""
        for owner in self._owners:
            if hasattr(owner, self.name):
                setattr(owner, self.name, value)
            hparams = _hparams(owner)
            if self.name in hparams:
                hparams[self.name] = value


def find_attribute(names: Iterable[str], owners: Iterable[Any], remedy: str) -> Attribute:
    """Find the first of several names that any owner has.

    Args:
        names: Of attributes.
        owners: Modules and data modules; None among them is left out.
        remedy: What to do where none has it, for the message.

    Raises:
        MisconfigurationException: None has it.
    """
    names, present = list(names), [owner for owner in owners if owner is not None]
    for name in names:
        found = [owner for owner in present if hasattr(owner, name) or name in _hparams(owner)]
        if found:
            return Attribute(name, found)
    kinds = " and ".join(type(owner).__qualname__ for owner in present)
    wanted = " or ".join(repr(name) for name in names)
    known = {name for owner in present for name in (*_hparams(owner), *_plain_names(owner))}
    raise MisconfigurationException(
        f"{kinds} has no attribute {wanted}, and no hyper-parameter of that name: {remedy}"
        f" {near_names(names[0], known)}"
    )


def _plain_names(owner: Any) -> list[str]:
    return [name for name, value in vars(owner).items() if not name.startswith("_") and not isinstance(value, bool)]


def _hparams(owner: Any) -> MutableMapping[str, Any]:
    found: MutableMapping[str, Any] | None = vars(owner).get("_hparams")  # to ask for `hparams` would make some
    return {} if found is None else found


def _found(model: Any, attribute: str) -> Attribute:
    """Where a module, its hyper-parameters or its data module have an attribute.

    Raises:
        AttributeError: None of them has it.
    """
    trainer = getattr(model, "_trainer", None)
    try:
        return find_attribute([attribute], [model, getattr(trainer, "datamodule", None)], "")
    except MisconfigurationException:
        raise AttributeError(
            f"{attribute} is an attribute neither of {type(model).__name__}, nor of its hparams, nor of a data module."
        ) from None


def lightning_hasattr(model: Any, attribute: str) -> bool:
    """Whether a module, its hyper-parameters or its data module have an attribute."""
    try:
        return bool(_found(model, attribute))
    except AttributeError:
        return False


def lightning_getattr(model: Any, attribute: str) -> Any:
    """Return an attribute of a module, of its hyper-parameters or of its data module.

    Raises:
        AttributeError: None of them has it.
    """
    return _found(model, attribute).get()


def lightning_setattr(model: Any, attribute: str, value: Any) -> None:
    """Set an attribute wherever a module, its hyper-parameters and its data module have it.

    Raises:
        AttributeError: None of them has it.
    """
    _found(model, attribute).set(value)
