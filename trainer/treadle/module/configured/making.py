"""Objects made from a config: classes named by ``class_path``, their arguments by ``init_args``."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from treadle.module.hparams import CLASS_PATH, MAKER, made_from_config
from treadle_fabric import CheckpointUnsafeError, MisconfigurationException, near_names, require_package

__all__ = [
    "ModuleType",
    "class_at",
    "instantiate_class",
    "instantiate_module",
    "is_maker",
    "refuse_imports",
]

ModuleType = TypeVar("ModuleType")
"""The class of a module or a data module."""

_MAKERS = ("treadle.cli", "lightning.pytorch.cli", "pytorch_lightning.cli")


def is_maker(name: Any) -> bool:
    """Whether a hyperparameter names :func:`instantiate_module`, here or in Lightning."""
    return isinstance(name, str) and name in [f"{module}.instantiate_module" for module in _MAKERS]


def instantiate_class(args: Any | tuple[Any, ...], init: Mapping[str, Any]) -> Any:
    """Make an object of the class that a config names.

    Args:
        args: A positional argument of the constructor, or a tuple of them; a module's parameters, for example.
        init: ``{"class_path": ..., "init_args": {...}}``; the arguments may be left out.

    Returns:
        The object.

    Raises:
        MisconfigurationException: There is no such class.
    """
    values = args if isinstance(args, tuple) else (args,)
    return class_at(init["class_path"])(*values, **init.get("init_args", {}))


def instantiate_module(class_type: type[ModuleType], config: dict[str, Any]) -> ModuleType:
    """Make a module or a data module again, from the hyperparameters that the command line or a config gave it.

    Args:
        class_type: Its class, or a base class where ``config`` names the class.
        config: Its hyperparameters, with ``class_path`` and ``init_args`` in the place of objects.

    Raises:
        MissingPackageError: jsonargparse is not installed.
        MisconfigurationException: The values do not fit the class.
    """
    require_package("jsonargparse", f"Making a {class_type.__name__} from a config", "cli")
    from jsonargparse import ArgumentError, ArgumentParser  # an extra

    arguments = {name: value for name, value in config.items() if name not in (MAKER, CLASS_PATH)}
    marks = {name: config[name] for name in (MAKER, CLASS_PATH) if name in config}
    cls = _chosen_class(class_type, config.get(CLASS_PATH))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "object", fail_untyped=False)
    known = _values(parser.get_defaults(skip_validation=True).get("object"))
    others = {name: arguments.pop(name) for name in list(arguments) if name not in known}  # of its **kwargs
    takes = inspect.signature(cls.__init__).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
        for name in others.keys() - takes.keys():
            raise MisconfigurationException(
                f"{cls.__name__}.__init__ takes no argument {name!r}. {near_names(name, takes)}"
            )
    try:
        parsed = parser.parse_object({"object": arguments})
        made = _values(parser.instantiate(parsed, instantiate_groups=False).get("object"))
    except (ArgumentError, TypeError, ValueError) as error:
        raise MisconfigurationException(
            f"The hyperparameters of {cls.__qualname__} do not fit its __init__: {error}"
        ) from error
    with made_from_config(cls, {**arguments, **others}, marks):
        return cls(**made, **others)  # type: ignore[no-any-return]


def _values(arguments: Any) -> dict[str, Any]:
    """The arguments in a namespace; there is none where the class takes no arguments."""
    return {} if arguments is None else vars(arguments)


def refuse_imports(config: Mapping[str, Any], source: str) -> None:
    """Refuse hyperparameters from a config that name classes of modules which this program has not imported.

    The import of a module runs its code, and the file would choose the module.

    Args:
        config: The hyperparameters.
        source: The file, for the error.

    Raises:
        CheckpointUnsafeError: They name such a class.
    """
    for path in _class_paths(config) if is_maker(config.get(MAKER)) else ():
        module = path.rpartition(".")[0]
        if module and module not in sys.modules:
            raise CheckpointUnsafeError(
                f"{source} names the class {path}, and this program has not imported {module}: a default load imports "
                "nothing that a file names. Import the module first, or pass weights_only=False if you trust the file."
            )


def _class_paths(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key in ("class_path", CLASS_PATH) and isinstance(inner, str):
                yield inner
            yield from _class_paths(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _class_paths(inner)


def _chosen_class(base: type[Any], path: str | None) -> type[Any]:
    """The class that a path names; ``base`` itself where the file was written by a script that was ``__main__``."""
    if path is None or path.rpartition(".")[2] == base.__name__:
        return base
    found = class_at(path)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise MisconfigurationException(
            f"The hyperparameters are those of {path}, which is no {base.__name__}. Call the method on {path}."
        )
    return found


def class_at(path: str) -> Any:
    """Return the class that a dotted path names.

    Raises:
        MisconfigurationException: There is none.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (AttributeError, ImportError, ValueError) as error:
        raise MisconfigurationException(f"There is no class {path!r}: {error}.") from error
