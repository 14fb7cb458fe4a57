"""OmegaConf's containers as plain values. OmegaConf is imported only where a program or a file has them.

An interpolation may call a resolver of the program, ``${eval:...}`` for example, and a file must not be able to do
that. So one that names another node, ``${net.dim}``, is kept as such, and of any other only its present value.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

from treadle_fabric.checkpoint.values.standard_kinds import NoPlainFormError

__all__ = ["make", "take"]
_OF_NODES: Final = re.compile(r"\$\{[\w.\[\]-]+\}")


def take(value: Any) -> tuple[str, Any, Any] | None:
    """The kind of a value, its content with interpolations resolved, its flags and its interpolations that are kept.

    Returns None for what is no container of OmegaConf.
    """
    from omegaconf import DictConfig, ListConfig, OmegaConf  # need not be installed
    from omegaconf.errors import OmegaConfBaseException

    if type(value) not in (DictConfig, ListConfig):
        return None
    try:
        content = OmegaConf.to_container(value, resolve=True)
    except (OmegaConfBaseException, ValueError) as e:
        raise NoPlainFormError from e
    if not isinstance(content, dict | list) or any(_interpolations(content)):
        raise NoPlainFormError
    links = [] if value._get_parent() is not None else list(_interpolations(OmegaConf.to_container(value)))
    more = {
        "readonly": OmegaConf.is_readonly(value),
        "struct": OmegaConf.is_struct(value),
        "links": [(path, text) for path, text in links if path and _names_nodes_only(text)],
    }
    return f"omegaconf.{type(value).__name__}", content, more


def make(name: str, content: Any, more: Any) -> Any:
    """The value that :func:`take` took apart."""
    from omegaconf import DictConfig, ListConfig, OmegaConf  # need not be installed

    cls = {"omegaconf.DictConfig": DictConfig, "omegaconf.ListConfig": ListConfig}[name]
    links = more["links"]
    if any(_interpolations(content)) or not all(_names_nodes_only(text) for _, text in links):
        raise ValueError("it has an interpolation that may run code")
    made = cls(content)
    for path, text in links:
        holder = made
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = text
    if more["readonly"]:
        OmegaConf.set_readonly(made, True)
    if more["struct"]:
        OmegaConf.set_struct(made, True)
    return made


def _names_nodes_only(text: str) -> bool:
    return "${" not in _OF_NODES.sub("", text)


def _interpolations(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], str]]:
    """The texts in a container that OmegaConf takes for interpolations, and their places."""
    if isinstance(content, str):
        if "${" in content:
            yield path, content
    elif isinstance(content, dict):
        for key, each in content.items():
            yield from _interpolations(key, path)
            yield from _interpolations(each, (*path, key))
    elif isinstance(content, list):
        for place, each in enumerate(content):
            yield from _interpolations(each, (*path, place))
