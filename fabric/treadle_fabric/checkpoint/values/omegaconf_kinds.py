"""OmegaConf's containers as plain values. OmegaConf is imported only where a program or a file has them."""

from __future__ import annotations

from typing import Any

from treadle_fabric.checkpoint.values.standard_kinds import NoPlainFormError
from treadle_fabric.containers import leaves

__all__ = ["make", "take"]


def take(value: Any) -> tuple[str, Any, Any] | None:
    """The kind of a value, its content with interpolations resolved, and its flags; None for what is no container.

    An interpolation that came from a file could call a resolver of the program, ``${eval:...}`` for example, and so it
    is never written to one.
    """
    from omegaconf import DictConfig, ListConfig, OmegaConf  # need not be installed
    from omegaconf.errors import OmegaConfBaseException

    if type(value) not in (DictConfig, ListConfig):
        return None
    try:
        content = OmegaConf.to_container(value, resolve=True)
    except (OmegaConfBaseException, ValueError) as e:
        raise NoPlainFormError from e
    if not isinstance(content, dict | list) or _has_interpolation(content):
        raise NoPlainFormError
    flags = {"readonly": OmegaConf.is_readonly(value), "struct": OmegaConf.is_struct(value)}
    return f"omegaconf.{type(value).__name__}", content, flags


def make(name: str, content: Any, more: Any) -> Any:
    """The value that :func:`take` took apart."""
    from omegaconf import DictConfig, ListConfig, OmegaConf  # need not be installed

    cls = {"omegaconf.DictConfig": DictConfig, "omegaconf.ListConfig": ListConfig}[name]
    if _has_interpolation(content):
        raise ValueError("a text with an interpolation, which may run code")
    made = cls(content)
    if more["readonly"]:
        OmegaConf.set_readonly(made, True)
    if more["struct"]:
        OmegaConf.set_struct(made, True)
    return made


def _has_interpolation(content: Any) -> bool:
    keys = [key for each in _dicts(content) for key in each]
    return any(isinstance(text, str) and "${" in text for text in (*leaves(content), *keys))


def _dicts(content: Any) -> list[Any]:
    if isinstance(content, dict):
        return [content, *(inner for each in content.values() for inner in _dicts(each))]
    return [inner for each in content for inner in _dicts(each)] if isinstance(content, list) else []
