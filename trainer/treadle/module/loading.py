"""Make a module or a datamodule from a checkpoint."""

from __future__ import annotations

import ast
import csv
import dataclasses
import importlib
import inspect
import json
from argparse import Namespace
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, Final, TypeVar, get_type_hints

import torch
from torch import Tensor

from treadle.formats import modernize
from treadle.module.configured import instantiate_module, is_maker, refuse_imports
from treadle.module.hparams import MAKER, with_values
from treadle_fabric import (
    AttributeDict,
    CheckpointMismatchError,
    CheckpointUnsafeError,
    MisconfigurationException,
    MissingArgumentError,
    PathLike,
    load_module_state,
    near_names,
    rank_zero_warn,
    require_package,
)
from treadle_fabric.accelerators import count_devices
from treadle_fabric.checkpoint import (
    PICKLE,
    NotLoaded,
    TorchCheckpointIO,
    absent,
    error_of,
    files_mapped,
    find_moved,
    in_memory,
    known_classes,
    tensors_on_demand,
    unpack,
)

if TYPE_CHECKING:
    from treadle.contracts import LightningDataModule, LightningModule

    class_only = classmethod
else:

    class class_only(classmethod):
        """A class method that refuses to be called on an instance, because the call would not change the instance."""

        def __get__(self, instance, owner=None):
            if instance is None:
                return super().__get__(instance, owner)
            return _refuse(f"{type(instance).__name__}.{self.__func__.__name__}")


__all__ = [
    "class_only",
    "instantiate",
    "literal",
    "load_datamodule_from_checkpoint",
    "load_module_from_checkpoint",
    "read_hparams_file",
    "saved_hyperparameters",
]

_STORED: Final = ("state_dict", "optimizer_states", "treadle")
"""The entries whose tensors are read from a folder where they are used, if they are."""

T = TypeVar("T")
M = TypeVar("M", bound="LightningModule")
D = TypeVar("D", bound="LightningDataModule")


def load_module_from_checkpoint(
    cls: type[M],
    checkpoint_path: PathLike | IO[bytes],
    map_location: Any = None,
    hparams_file: PathLike | None = None,
    strict: bool | None = None,
    weights_only: bool | None = None,
    **kwargs: Any,
) -> M:
    """Make a module with the hyperparameters in a checkpoint, and load its weights.

    Args:
        cls: The class to make.
        checkpoint_path: A path, a URL or an open file.
        map_location: Where tensors, and with them the module, go, as in :func:`torch.load`. Default: the device that
            each tensor was saved from, or the CPU if that device is not here.
        hparams_file: A ``.yaml`` or ``.csv`` file with hyperparameters, instead of those in the checkpoint.
        strict: Whether the parameter names must match exactly. Default: the module's ``strict_loading``.
        weights_only: ``False`` unpickles arbitrary objects, such as modules and functions among the hyperparameters:
            only for files you trust. Default: ``True``.
        **kwargs: Arguments of ``__init__``; they replace the saved ones.

    Raises:
        CheckpointError: The file cannot be read, or holds no ``state_dict``; or the module needs a hyperparameter that
            is kept pickled.
        MisconfigurationException: ``__init__`` needs arguments that neither the file nor ``kwargs`` has.
    """
    with files_mapped():  # what only the inner function refers to ends inside
        return _module_from(cls, checkpoint_path, map_location, hparams_file, strict, weights_only, kwargs)


def _module_from(
    cls: type[M],
    checkpoint_path: PathLike | IO[bytes],
    map_location: Any,
    hparams_file: PathLike | None,
    strict: bool | None,
    weights_only: bool | None,
    kwargs: dict[str, Any],
) -> M:
    checkpoint = _read(cls, checkpoint_path, map_location, weights_only)
    hparams, name, whole = _hparams_of(cls, checkpoint, hparams_file, "")
    if weights_only is not False:
        refuse_imports(hparams, str(checkpoint_path))
    module = instantiate(cls, hparams, name, whole, kwargs)
    module.configure_model()
    module.on_load_checkpoint(checkpoint)
    if "state_dict" not in checkpoint:
        raise CheckpointMismatchError(
            f"{checkpoint_path} has no 'state_dict', so it is not a checkpoint of a LightningModule. "
            + near_names("state_dict", checkpoint)
        )
    state = checkpoint["state_dict"]
    strict = _strictness(module, strict)
    with _lack_is_the_reason(hparams | kwargs):
        keys = load_module_state(module, state, strict=strict)
    if not strict:
        if keys.missing_keys:
            rank_zero_warn(
                f"Found keys that are in the model state dict but not in the checkpoint: {keys.missing_keys}. They keep"
                f" the values that the model was made with ({checkpoint_path})."
            )
        if keys.unexpected_keys:
            rank_zero_warn(
                f"Found keys that are not in the model state dict but in the checkpoint: {keys.unexpected_keys}. They"
                f" are not used ({checkpoint_path})."
            )
    if not state and module.state_dict():
        rank_zero_warn(f"The state dict in {str(checkpoint_path)!r} contains no parameters.")
    device = next((value.device for value in state.values() if isinstance(value, Tensor)), None)
    return module if device is None else module.to(device)


def _strictness(module: LightningModule, strict: bool | None) -> bool:
    own = module._strict_loading
    if strict is not None and own is not None and strict is not own:
        raise MisconfigurationException(
            f"load_from_checkpoint(strict={strict}), and {type(module).__name__} sets strict_loading={own}: leave out"
            " one, or give both the same value."
        )
    return module.strict_loading if strict is None else strict


def load_datamodule_from_checkpoint(
    cls: type[D],
    checkpoint_path: PathLike | IO[bytes],
    map_location: Any = None,
    hparams_file: PathLike | None = None,
    weights_only: bool | None = None,
    **kwargs: Any,
) -> D:
    """Make a datamodule with the hyperparameters in a checkpoint, and restore the state that it has there, if any.

    Arguments and errors are those of :func:`load_module_from_checkpoint`.
    """
    with files_mapped():
        return _datamodule_from(cls, checkpoint_path, map_location, hparams_file, weights_only, kwargs)


def _datamodule_from(
    cls: type[D],
    checkpoint_path: PathLike | IO[bytes],
    map_location: Any,
    hparams_file: PathLike | None,
    weights_only: bool | None,
    kwargs: dict[str, Any],
) -> D:
    checkpoint = _read(cls, checkpoint_path, map_location, weights_only)
    hparams, name, whole = _hparams_of(cls, checkpoint, hparams_file, "datamodule_")
    if weights_only is not False:
        refuse_imports(hparams, str(checkpoint_path))
    datamodule = instantiate(cls, hparams, name, whole, kwargs)
    if cls.__qualname__ in checkpoint:
        datamodule.load_state_dict(checkpoint[cls.__qualname__])
    return datamodule


def saved_hyperparameters(checkpoint_path: PathLike) -> dict[str, Any]:
    """Return the hyperparameters of the module in a checkpoint.

    Args:
        checkpoint_path: A path or a URL.

    Raises:
        CheckpointError: The file cannot be read.
    """
    with files_mapped():
        hparams, _, _ = _hparams_of(object, _read(object, checkpoint_path, "cpu", None), None, "")
    refuse_imports(hparams, str(checkpoint_path))
    return hparams


def _of_lightning(module: str, name: str) -> Any:
    """Find what a pickle calls by a name of Lightning's; one that Treadle lacks keeps nothing, and is told of."""
    if module.partition(".")[0] not in ("lightning", "lightning_fabric", "pytorch_lightning"):
        return None
    from treadle.names.table import Target, table  # for those who ask

    found = table().find(module, name)
    places = [(found.module, found.name)] if isinstance(found, Target) else []
    places += [
        (place, name) for place in ("treadle.callbacks", "treadle", "treadle_fabric")
    ]  # for paths of Lightning 1
    for place, attribute in places:
        if attribute and (value := getattr(importlib.import_module(place), attribute, None)) is not None:
            return value
    rank_zero_warn(
        f"A {module}.{name} is in the file, which Treadle does not have: an object that knows nothing takes its place."
    )
    return absent(module, name)


find_moved(_of_lightning)


def _refuse(name: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{name} makes a new object. Call it on the class, and use what it returns.")

    return refuse


def _read(cls: type[Any], path: PathLike | IO[bytes], map_location: Any, weights_only: bool | None) -> dict[str, Any]:
    location = _where_saved if map_location is None else map_location
    if isinstance(path, str) or hasattr(path, "__fspath__"):
        with tensors_on_demand():
            checkpoint: Any = TorchCheckpointIO().load_checkpoint(path, location, weights_only)
    else:
        safe = weights_only is not False
        checkpoint = torch.load(path, map_location=location, weights_only=safe, pickle_module=None if safe else PICKLE)
    if not isinstance(checkpoint, dict):
        raise CheckpointMismatchError(
            f"{path} holds a {type(checkpoint).__name__}, not the dictionary of a checkpoint."
        )
    classes = known_classes(cls)
    content = modernize(
        unpack(checkpoint, str(path), weights_only=weights_only, map_location=location, classes=classes)
    )
    return {key: value if key in _STORED else in_memory(value) for key, value in content.items()}


def _where_saved(storage: Any, location: str) -> Any:
    """Put a tensor on the device it was saved from, or on the CPU where that device is not here."""
    kind, _, index = location.partition(":")
    return storage if int(index or 0) >= count_devices(kind) else None


def _hparams_of(
    cls: type[Any], checkpoint: Mapping[str, Any], hparams_file: PathLike | None, prefix: str
) -> tuple[dict[str, Any], str | None, Any]:
    """The saved hyperparameters, the argument that held them all, and the object that was this argument."""
    name = checkpoint.get(getattr(cls, "CHECKPOINT_HYPER_PARAMS_NAME", f"{prefix}hparams_name"))
    if hparams_file is not None:
        return read_hparams_file(str(hparams_file)), name, None
    hparams = checkpoint.get(getattr(cls, "CHECKPOINT_HYPER_PARAMS_KEY", f"{prefix}hyper_parameters")) or {}
    hparams = vars(hparams).copy() if isinstance(hparams, Namespace) else dict(hparams)
    return hparams, name, in_memory(checkpoint.get("treadle", {}).get(f"{prefix}hparams_object"))


def instantiate(cls: type[T], hparams: dict[str, Any], name: str | None, whole: Any, kwargs: dict[str, Any]) -> T:
    """Make a module or a datamodule.

    Args:
        cls: The class.
        hparams: The saved hyperparameters.
        name: The argument that held them all; "kwargs" or None: each was an argument.
        whole: The object that was this argument, where it was saved.
        kwargs: Arguments that replace saved ones; those that ``__init__`` does not take are left out, with a warning.

    Raises:
        CheckpointUnsafeError: A saved argument that was not loaded is needed; the message says what to do.
        MissingArgumentError: ``__init__`` needs arguments that are not there.
    """
    if is_maker(hparams.get(MAKER)):
        with _lack_is_the_reason(hparams | kwargs):
            return instantiate_module(cls, hparams | kwargs)
    if cls.__init__ is object.__init__:
        parameters: dict[str, inspect.Parameter] = {}
    else:
        parameters = dict(list(inspect.signature(cls.__init__).parameters.items())[1:])
    any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if name != "kwargs" and name in parameters and name not in kwargs and hparams:  # one object: kwargs go into it
        into = {key: value for key, value in kwargs.items() if key not in parameters}
        arguments = {name: _as_declared(cls, name, hparams | into, whole)}
        arguments |= {key: value for key, value in kwargs.items() if key in parameters}
    else:
        unknown = [key for key in kwargs if key not in parameters and not any_name]
        if unknown:
            known = [key for key in parameters if key not in ("args", "kwargs")]
            rank_zero_warn(
                f"{cls.__name__}.__init__ takes no argument {unknown[0]!r}, and load_from_checkpoint does not use it. "
                + near_names(unknown[0], known)
            )
        given = hparams | kwargs
        arguments = {key: value for key, value in given.items() if any_name or key in parameters}
    missing = [
        key
        for key, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and key not in arguments
    ]
    if missing:
        example = ", ".join(f"{key}=..." for key in missing)
        raise MissingArgumentError(
            f"{cls.__name__}.__init__ needs {', '.join(missing)}, which the checkpoint does not hold. Pass "
            f"load_from_checkpoint(path, {example}), or call self.save_hyperparameters() in __init__ before saving."
        )
    with _lack_is_the_reason(arguments):
        return cls(**arguments)


@contextmanager
def _lack_is_the_reason(arguments: Mapping[str, Any]) -> Generator[None]:
    """An error inside is that of the first argument that was not loaded, if there is such an argument."""
    try:
        yield
    except CheckpointUnsafeError:
        raise
    except Exception as error:
        for value in arguments.values():
            if isinstance(value, NotLoaded):
                raise error_of(value) from error
        raise


def _as_declared(cls: type[Any], name: str, hparams: dict[str, Any], whole: Any) -> Any:
    """Return the saved hyperparameters as one object, of the type that was saved or that ``__init__`` declares."""
    if whole is not None and not isinstance(whole, NotLoaded) and (made := with_values(whole, hparams)) is not None:
        return made
    try:
        declared = get_type_hints(cls.__init__).get(name)
    except Exception:  # a name that only a type checker sees
        declared = None
    if declared is Namespace or (isinstance(declared, type) and dataclasses.is_dataclass(declared)):
        return declared(**hparams)
    return whole if isinstance(whole, NotLoaded) else AttributeDict(hparams)


def read_hparams_file(path: str) -> dict[str, Any]:
    """Read a ``.yaml`` or ``.csv`` file with hyper-parameters."""
    kind = path.rpartition(".")[2].lower()
    if kind not in ("yaml", "yml", "csv"):
        raise MisconfigurationException(f"hparams_file={path!r} is neither .yaml nor .csv.")
    import fsspec  # heavy

    with fsspec.open(path, "r", newline="") as file:
        text = file.read()
    if kind == "csv":
        rows = list(csv.DictReader(text.splitlines()))
        return {row["key"]: literal(row["value"]) for row in rows}
    try:  # our own files: one `key: <json>` a line. A YAML reader would take 1e-05 in them for a string.
        lines = (line.partition(":") for line in text.splitlines() if line.strip() and not line.startswith("#"))
        return {key.strip(): json.loads(value) for key, _, value in lines}
    except json.JSONDecodeError:
        pass
    require_package("yaml", f"{path}, with other YAML than the `key: <json>` lines of our loggers,", "cli")
    import yaml  # an extra

    return dict(yaml.safe_load(text) or {})


def literal(text: str) -> Any:
    """The value of a literal of Python; any other text as it is."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
