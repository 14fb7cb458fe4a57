"""Modules and data modules that know the config they were made of, so that their checkpoints can make them again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from treadle.module.configured import class_at
from treadle.module.hparams import CLASS_PATH, MAKER, made_from_config

__all__ = ["RemembersConfig"]

T = TypeVar("T")


class RemembersConfig:
    """Makes the object of one key of the config.

    Args:
        config: Returns the whole config as plain values.
        key: The key of the object.
        cls: Its class, or a base class where the config names the class.
    """

    def __init__(self, config: Callable[[], Mapping[str, Any]], key: str, cls: type) -> None:
        self._config = config
        self._key = key
        self._cls = cls

    def make(self, class_type: type[T], *args: Any, **kwargs: Any) -> T:
        """Make an object of the class; the parser calls it for objects inside of other objects, too."""
        arguments = self._config().get(self._key) or {}
        marks = {MAKER: "treadle.cli.instantiate_module"}
        chosen: Any = self._cls
        if "class_path" in arguments:
            marks[CLASS_PATH] = arguments["class_path"]
            chosen = class_at(arguments["class_path"])
            arguments = {**arguments.get("init_args", {}), **arguments.get("dict_kwargs", {})}
        if class_type is not chosen:  # a part of it
            return class_type(*args, **kwargs)
        with made_from_config(class_type, arguments, marks):
            return class_type(*args, **kwargs)
