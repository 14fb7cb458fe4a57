"""OmegaConf's containers as plain values. OmegaConf is imported only where a program or a file has them.

An interpolation may call a resolver of the program, ``${eval:...}`` for example, and a file must not be able to do
that. So one that names another node, ``${net.dim}``, is kept as such, and of any other only its present value.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

from treadle_fabric.checkpoint.values.standard_kinds import NoPlainFormError

__all__ = ["classes_of", "make", "take"]
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


def classes_of(value: Any) -> dict[Any, type]:
    """The dataclasses that check the values of structured configs, by the paths of these in a container.

    The container itself takes the place of a dataclass that does not tell what classes the parts have.
    """
    classes = dict(_structured(value))
    if not classes:
        return {}
    try:
        name, content, more = take(value) or ("", None, None)
        again = make(name, content, more, classes)
        same = again == value and list(_classes(again)) == list(_classes(value))
    except Exception:  # what a class of the user's does is not known
        same = False
    return classes if same else {(): type(value)}


def _structured(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, type]]:
    """The outermost structured configs in a container: their paths and classes."""
    from omegaconf import OmegaConf  # need not be installed

    cls = OmegaConf.get_type(value)
    if cls not in (dict, list, None):
        yield path, cls
    else:
        for key, each in _parts(value):
            yield from _structured(each, (*path, key))


def _classes(value: Any) -> Iterator[Any]:
    """The classes of a container and of those in it."""
    from omegaconf import OmegaConf  # need not be installed

    yield OmegaConf.get_type(value)
    for _, each in _parts(value):
        yield from _classes(each)


def _parts(value: Any) -> list[tuple[Any, Any]]:
    """The containers in a container, as they are kept there: without a look at what is missing, or at resolvers."""
    from omegaconf import Container  # need not be installed

    held = value._content
    pairs = held.items() if isinstance(held, dict) else enumerate(held) if isinstance(held, list) else ()
    return [(key, each) for key, each in pairs if isinstance(each, Container)]


def make(name: str, content: Any, more: Any, classes: Mapping[Any, type] = MappingProxyType({})) -> Any:
    """The value that :func:`take` took apart; ``classes`` are those of structured configs, by path."""
    from omegaconf import DictConfig, ListConfig, OmegaConf  # need not be installed

    cls = {"omegaconf.DictConfig": DictConfig, "omegaconf.ListConfig": ListConfig}[name]
    links = more["links"]
    if any(_interpolations(content)) or not all(_names_nodes_only(text) for _, text in links):
        raise ValueError("it has an interpolation that may run code")
    made = _with_classes(content, classes)
    made = made if isinstance(made, cls) else cls(made)
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


def _with_classes(content: Any, classes: Mapping[Any, type], path: tuple[Any, ...] = ()) -> Any:
    from omegaconf import OmegaConf  # need not be installed

    if path in classes:
        return OmegaConf.merge(OmegaConf.structured(classes[path]), content)
    if classes and isinstance(content, dict):
        return {key: _with_classes(each, classes, (*path, key)) for key, each in content.items()}
    if classes and isinstance(content, list):
        return [_with_classes(each, classes, (*path, i)) for i, each in enumerate(content)]
    return content


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
