"""Hyperparameters: the arguments of ``__init__``, collected, logged and kept in checkpoints."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import sys
from argparse import Namespace
from collections.abc import Generator, Iterable, Iterator, Mapping, MutableMapping
from contextvars import ContextVar
from types import FrameType
from typing import Any, NamedTuple

from torch import nn

from treadle_fabric import AttributeDict, MisconfigurationException, is_picklable, near_names, rank_zero_warn

__all__ = [
    "CLASS_PATH",
    "MAKER",
    "HyperparametersMixin",
    "clean_namespace",
    "collect_init_args",
    "get_init_args",
    "made_from_config",
    "parse_class_init_keys",
    "save_hyperparameters",
]

MAKER = "_instantiator"
"""The hyperparameter that names the function which makes an object of the others."""
CLASS_PATH = "_class_path"
"""The hyperparameter that names the object's class, where a config chose the class."""


class _Config(NamedTuple):
    """Arguments of a class as a config has them: with ``class_path`` and ``init_args`` in the place of objects."""

    cls: type
    arguments: Mapping[str, Any]
    marks: Mapping[str, Any]


_config: ContextVar[_Config | None] = ContextVar("treadle_config", default=None)


@contextlib.contextmanager
def made_from_config(cls: type, arguments: Mapping[str, Any], marks: Mapping[str, Any]) -> Generator[None]:
    """Within the context, ``save_hyperparameters`` of this class keeps what the config has in the place of arguments.

    Args:
        cls: The class that is made of a config; its subclasses are not meant.
        arguments: Its arguments as plain values.
        marks: Further hyperparameters, which say how to make the object again.
    """
    token = _config.set(_Config(cls, arguments, marks))
    try:
        yield
    finally:
        _config.reset(token)


class HyperparametersMixin:
    """Gives :meth:`save_hyperparameters` and :attr:`hparams` to modules and datamodules."""

    # Class attributes, so that they exist before super().__init__() is called, and in a dataclass.
    _hparams: AttributeDict | None = None
    _hparams_initial: AttributeDict | None = None
    _hparams_name: str | None = None
    _hparams_whole: Any = None
    _log_hyperparams: bool = False

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: str | Iterable[str] | None = None,
        frame: FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """Keep arguments of ``__init__`` in :attr:`hparams`, in checkpoints and with the loggers.

        Without ``args`` it keeps all arguments, ``**kwargs`` included, of every ``__init__`` of the class hierarchy
        that is running; of two values for a name, that of the most derived class. A second call adds to the first.

        Args:
            *args: Names of arguments; or one object (mapping, namespace or dataclass) that holds
                them all; None is none.
            ignore: Names to leave out, those that another class of the hierarchy has kept among them.
            frame: The frame of the ``__init__`` to read. Default: the caller's.
            logger: Whether the loggers get the hyperparameters too. Default: True.

        Raises:
            MisconfigurationException: A name is not an argument, or the object holds no named values.
        """
        if frame is None:
            current = inspect.currentframe()
            frame = current.f_back if current is not None else None
        given = _init_arguments(self, frame)
        ignored = _names(ignore)
        objects = [arg for arg in args if not isinstance(arg, str) and arg is not None]
        if len(objects) > 1:
            raise MisconfigurationException(
                f"save_hyperparameters got {len(objects)} objects. Give names of arguments, or one mapping, namespace "
                "or dataclass."
            )
        if objects:
            found = _as_mapping(objects[0])
            self._hparams_name = _name_of(objects[0], given)
            self._hparams_whole = None if self._hparams_name is None else given[self._hparams_name]
        else:
            names = [name for name in args if name is not None]
            for name in names:
                if name not in given:
                    raise MisconfigurationException(
                        f"save_hyperparameters({name!r}): {type(self).__name__}.__init__ has no argument of that name. "
                        + near_names(name, given)
                    )
            found = {name: given[name] for name in names} if args else given
            self._hparams_name, self._hparams_whole = "kwargs" if found else None, None
        found = {name: value for name, value in found.items() if name not in ignored}
        config = _config.get()
        if config is not None and config.cls is type(self) and not objects:
            found |= {name: value for name, value in config.arguments.items() if name in found} | dict(config.marks)
        for name, value in found.items():
            if isinstance(value, nn.Module):
                rank_zero_warn(
                    f"Attribute {name!r} is an instance of `nn.Module` and is already saved during"
                    f" checkpointing, in the state_dict. Leave it out with"
                    f" self.save_hyperparameters(ignore=[{name!r}])."
                )
        self.hparams.update(found)
        self.remove_ignored_hparams(ignored)  # another class of the hierarchy may have kept them
        self._hparams_initial = _copied(self.hparams)
        self._log_hyperparams = logger

    @property
    def hparams(self) -> AttributeDict:
        """The hyperparameters, as a dictionary whose keys are attributes too. Changes reach the next checkpoint."""
        if self._hparams is None:
            self._hparams = AttributeDict()
        return self._hparams

    @property
    def hparams_object(self) -> Any:
        """The one object that was given to :meth:`save_hyperparameters`, with the present values; else None."""
        return None if self._hparams_whole is None else with_values(self._hparams_whole, self.hparams)

    @property
    def hparams_initial(self) -> AttributeDict:
        """A copy of the hyperparameters as they were after the last :meth:`save_hyperparameters`."""
        return AttributeDict() if self._hparams_initial is None else _copied(self._hparams_initial)

    def remove_ignored_hparams(self, ignore_list: Iterable[str]) -> None:
        """Drop the named hyperparameters."""
        for name in ignore_list:
            for hparams in (self._hparams, self._hparams_initial):
                if hparams is not None:
                    hparams.pop(name, None)


def _init_arguments(obj: object, frame: FrameType | None) -> dict[str, Any]:
    """Collect the arguments of every running ``__init__`` of ``obj``, from ``frame`` outwards; the last one wins."""
    found: dict[str, Any] = {}
    for running in _frames(frame):
        code = running.f_code
        if code.co_name == "__init__" and code.co_varnames and running.f_locals.get(code.co_varnames[0]) is obj:
            arguments = inspect.getargvalues(running)
            values = arguments.locals
            found.update({name: values[name] for name in arguments.args[1:] if name in values})
            if arguments.keywords is not None:
                found.update(values.get(arguments.keywords, {}))
    if dataclasses.is_dataclass(obj):  # its ``__init__`` is over, or holds placeholders of defaults
        takes = inspect.signature(type(obj).__init__).parameters
        found.update({name: value for name, value in _fields(obj).items() if name in takes})
    return found


def _name_of(whole: Any, given: Mapping[str, Any]) -> str | None:
    """The argument that is an object; else the one that equals it, such as the config that ``to_container`` copied."""
    for name, value in given.items():
        if value is whole:
            return name
    for name, value in given.items():
        with contextlib.suppress(Exception):  # arrays and the like are neither equal nor not
            if isinstance(value, Mapping) and value and value == whole:
                return name
    return None


def _fields(obj: Any) -> dict[str, Any]:
    """The fields of a dataclass that are set; those that ``__init__`` does not take may not be."""
    names = [field.name for field in dataclasses.fields(obj)]
    return {name: getattr(obj, name) for name in names if hasattr(obj, name)}


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _as_mapping(obj: Any) -> dict[str, Any]:
    if isinstance(obj, Mapping):  # not those that are missing, "???", which OmegaConf does not count as held
        return {key: obj[key] for key in obj if key in obj}
    if isinstance(obj, Namespace):
        return vars(obj).copy()
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return _fields(obj)
    raise MisconfigurationException(
        f"save_hyperparameters got a {type(obj).__name__}, which holds no named values. Give a mapping, a namespace, a "
        "dataclass, or names of arguments as strings."
    )


def with_values(whole: Any, values: Mapping[str, Any]) -> Any:
    """A copy of an object that holds named values, with other values; None where it cannot hold them."""
    try:
        changed = copy.copy(whole)
        if isinstance(whole, Namespace):
            vars(changed).clear()
            vars(changed).update(values)
        elif dataclasses.is_dataclass(whole):
            for name, value in values.items():
                object.__setattr__(changed, name, value)  # frozen dataclasses, too
        elif _is_config(whole):
            _update_config(changed, values)
        else:
            changed = type(whole)(dict(values))
    except Exception:  # a class of the user's
        return None
    return changed


def _is_config(value: Any) -> bool:
    omegaconf = sys.modules.get("omegaconf")  # before that module is imported there is no such object
    return omegaconf is not None and isinstance(value, omegaconf.DictConfig)


def _update_config(config: Any, values: Mapping[str, Any]) -> None:
    """Set what differs in a config; its class, its interpolations and what is missing in it stay."""
    from omegaconf import flag_override  # need not be installed

    gone = [name for name in config if name in config and name not in values]
    new = {name: value for name, value in values.items() if name not in config or config[name] != value}
    with flag_override(config, ["readonly", "struct"], [False, False]):
        for name in gone:
            del config[name]
        for name, value in new.items():
            config[name] = value


def _names(ignore: str | Iterable[str] | None) -> set[str]:
    return set() if ignore is None else {ignore} if isinstance(ignore, str) else set(ignore)


def _copied(hparams: AttributeDict) -> AttributeDict:
    copied = AttributeDict()
    for name, value in hparams.items():
        try:
            copied[name] = value if isinstance(value, nn.Module) else copy.deepcopy(value)
        except Exception:  # open files, locks and the like cannot be copied
            copied[name] = value
    return copied


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
