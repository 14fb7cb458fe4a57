"""Adds to an error of the parser what the user probably meant."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from treadle.callbacks import Callback
from treadle.cli.configured.types import ReduceLROnPlateau
from treadle.module import LightningDataModule, LightningModule
from treadle.module.configured import class_at
from treadle_fabric import MisconfigurationException, near_names
from treadle_fabric.accelerators import Accelerator
from treadle_fabric.checkpoint import CheckpointIO
from treadle_fabric.environments import ClusterEnvironment
from treadle_fabric.loggers import Logger
from treadle_fabric.precision import Precision
from treadle_fabric.strategies import Strategy

__all__ = ["explain"]

_CHOSEN_BY_NAME: tuple[type[Any], ...] = (
    *(Accelerator, Callback, CheckpointIO, ClusterEnvironment, LRScheduler, LightningDataModule, LightningModule),
    *(Logger, Optimizer, Precision, ReduceLROnPlateau, Strategy),
)
_OPTION = re.compile(r"unrecognized arguments: .*?--([\w.]+)")
_KEY = re.compile(r"(Group|Subcommand) '([\w.]+)' does not accept option '([\w.]+)'")
_INIT_ARGUMENT = re.compile(r"class_path '([\w.]+)':\s*(?:.*\s)??Option '(\w+)' is not accepted")
_ATTRIBUTE = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")
_CLASS = re.compile(r"Expected a dot import path string: (\w+)")
_LIGHTNING = re.compile(r"\b(?:lightning\.pytorch|lightning\.fabric|pytorch_lightning|lightning_fabric)\.[\w.]*\w")
_PACKAGES = {
    "lightning.pytorch": "treadle",
    "pytorch_lightning": "treadle",
    "lightning.fabric": "treadle_fabric",
    "lightning_fabric": "treadle_fabric",
}


def explain(message: str, parser: Any) -> str:
    """Return an error's message with what the user probably meant.

    Args:
        message: The parser's message.
        parser: The parser.
    """
    return "\n".join([message, *dict.fromkeys(_hints(message, parser))])


def _hints(message: str, parser: Any) -> Iterator[str]:
    for path in dict.fromkeys(_LIGHTNING.findall(message)):
        yield _new_path(path)
    if found := _OPTION.search(message):
        yield near_names(f"--{found.group(1)}", _options(parser))
    if found := _KEY.search(message):
        kind, group, key = found.groups()
        prefix = f"--{group}." if kind == "Group" else "--"
        known = [name.removeprefix(prefix) for name in _options(parser) if name.startswith(prefix)]
        yield near_names(key, known)
    if found := _INIT_ARGUMENT.search(message):
        path, name = found.groups()
        yield f"{path}: {near_names(name, _arguments(path))}"
    if (found := _ATTRIBUTE.search(message)) and found.group(1) in sys.modules:
        yield near_names(found.group(2), dir(sys.modules[found.group(1)]))
    if found := _CLASS.search(message):
        names = {cls.__name__ for cls in _subclasses(_CHOSEN_BY_NAME) if not inspect.isabstract(cls)}
        yield near_names(found.group(1), (name for name in names if not name.startswith("_")))


def _new_path(path: str) -> str:
    """Where a class of Lightning's is here."""
    for old, new in _PACKAGES.items():
        if path.startswith(f"{old}."):
            module, _, name = f"{new}{path.removeprefix(old)}".rpartition(".")
            while module:  # a class keeps its name, and packages re-export what their modules have
                try:
                    if hasattr(importlib.import_module(module), name):
                        return f"{path} is Lightning's: write {module}.{name}; in a config, replace {old} by {new}."
                except ImportError:
                    pass
                module = module.rpartition(".")[0]
    return f"{path} is Lightning's, and there is no such name here; docs/differences.md has what is left out."


def _options(parser: Any) -> list[str]:
    """The options of a parser and of the parsers of its sub-commands."""
    commands = getattr(parser, "_subcommands_action", None)
    parsers = [parser, *(() if commands is None else commands.choices.values())]
    return [name for each in parsers for name in each._option_string_actions if name.startswith("--")]


def _arguments(path: str) -> Iterable[str]:
    try:
        takes = inspect.signature(class_at(path)).parameters.values()
        return [each.name for each in takes if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    except (MisconfigurationException, TypeError, ValueError):
        return []


def _subclasses(classes: Iterable[type[Any]]) -> Iterator[type[Any]]:
    for cls in classes:
        yield cls
        yield from _subclasses(cls.__subclasses__())
