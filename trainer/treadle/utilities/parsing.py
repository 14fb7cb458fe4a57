"""What reads objects, their arguments and hyper-parameters, where users of a trainer look for it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, MutableMapping
from types import FrameType
from typing import Any

from treadle.searches.attributes import Attribute, find_attribute
from treadle_fabric import AttributeDict, MisconfigurationException, is_picklable

__all__ = [
    "AttributeDict",
    "clean_namespace",
    "collect_init_args",
    "get_init_args",
    "is_picklable",
    "lightning_getattr",
    "lightning_hasattr",
    "lightning_setattr",
    "parse_class_init_keys",
    "save_hyperparameters",
    "str_to_bool",
    "str_to_bool_or_int",
    "str_to_bool_or_str",
]

_TRUE = ("y", "yes", "t", "true", "on", "1")
_FALSE = ("n", "no", "f", "false", "off", "0")


def str_to_bool(val: str) -> bool:
    """Turn "yes", "true", "on", "1" and the like into True, and "no", "false", "off", "0" into False.

    Raises:
        MisconfigurationException: The text is neither.
    """
    if not isinstance(found := str_to_bool_or_str(val), bool):
        raise MisconfigurationException(f"{val!r} is no truth value: write 'true' or 'false'.")
    return found


def str_to_bool_or_str(val: str) -> str | bool:
    """Turn a text that says yes or no into True or False; any other text stays as it is."""
    word = val.lower() if isinstance(val, str) else None
    return True if word in _TRUE else False if word in _FALSE else val


def str_to_bool_or_int(val: str) -> bool | int | str:
    """Turn a text that says yes or no into True or False, and a number into an int; other texts stay as they are."""
    found = str_to_bool_or_str(val)
    if isinstance(found, bool):
        return found
    try:
        return int(found)
    except ValueError:
        return found


def clean_namespace(hparams: MutableMapping[str, Any]) -> None:
    """Remove what cannot be pickled from a dictionary, in place."""
    for name in [name for name, value in hparams.items() if not is_picklable(value)]:
        del hparams[name]


def parse_class_init_keys(cls: type) -> tuple[str, str | None, str | None]:
    """Return the names of ``self``, ``*args`` and ``**kwargs`` in the constructor of a class."""
    parameters = [*inspect.signature(cls.__init__).parameters.values()]  # type: ignore[misc]

    def name_of(kind: Any) -> str | None:
        return next((each.name for each in parameters if each.kind is kind), None)

    return parameters[0].name, name_of(inspect.Parameter.VAR_POSITIONAL), name_of(inspect.Parameter.VAR_KEYWORD)


def get_init_args(frame: FrameType) -> dict[str, Any]:
    """Return the arguments of an ``__init__`` that is running, those of ``**kwargs`` by their own names.

    Args:
        frame: The frame of the ``__init__``, as ``inspect.currentframe()`` gives it there.

    Returns:
        Nothing for the frame of another function.
    """
    return _arguments(frame)[1]


def _arguments(frame: FrameType) -> tuple[Any, dict[str, Any]]:
    """The object that is being made, and the arguments; neither for the frame of another function."""
    if frame.f_code.co_name != "__init__":
        return None, {}
    named, _, keywords, values = inspect.getargvalues(frame)
    if not named:
        return None, {}
    return values.get(named[0]), {
        **{name: values[name] for name in named[1:] if name in values},
        **(values.get(keywords, {}) if keywords is not None else {}),
    }


def collect_init_args(
    frame: FrameType, path_args: list[dict[str, Any]], inside: bool = False, classes: tuple[type, ...] = ()
) -> list[dict[str, Any]]:
    """Return the arguments of each ``__init__`` that is running for one object, that of the base class first.

    Args:
        frame: The frame of the innermost ``__init__``.
        path_args: What was collected before.
        inside: Whether the frame is below an ``__init__`` of the object.
        classes: Only objects of these classes count.
    """
    found, current = list(path_args), frame
    while current is not None and current.f_back is not None:
        made, arguments = _arguments(current)
        if made is not None and (not classes or isinstance(made, classes)):
            found.append(arguments)
            inside = True
        elif inside:
            break
        current = current.f_back
    return found


def save_hyperparameters(
    obj: Any, *args: Any, ignore: str | Iterable[str] | None = None, frame: FrameType | None = None
) -> None:
    """Call ``obj.save_hyperparameters``.

    Args:
        obj: A module, a data module, or any object with a ``HyperparametersMixin``.
        *args: As for the method.
        ignore: As for the method.
        frame: The frame of the ``__init__`` to read. Default: the caller's.
    """
    here = inspect.currentframe()
    obj.save_hyperparameters(*args, ignore=ignore, frame=frame or (here.f_back if here is not None else None))


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
