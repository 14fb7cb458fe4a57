"""Checks of arguments that several classes share, with one message for each kind of mistake."""

from __future__ import annotations

import importlib.util
import numbers
import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MappingView, Sequence, Set
from contextlib import suppress
from typing import Any

from torch import Tensor

from treadle_fabric.errors import MisconfigurationException, MissingPackageError, UnusableResultError

__all__ = [
    "check_flag",
    "check_integer",
    "check_loss",
    "is_list",
    "is_number",
    "is_several",
    "on_demand",
    "one_or_several",
    "require_package",
]


def is_several(value: Any) -> bool:
    """Whether an argument that takes one object or several holds several.

    Several are a list, a tuple or another sequence (omegaconf's ``ListConfig`` is one), a set, the keys or values of a
    mapping, a generator and any other iterator. All else is one object; so is a string.
    """
    return isinstance(value, (Sequence, Set, MappingView, Iterator)) and not isinstance(value, (str, bytes))


def one_or_several(value: Any) -> list[Any]:
    """The objects of an argument that takes one or several, as :func:`is_several` tells; none for ``None``."""
    if value is None:
        return []
    return list(value) if is_several(value) else [value]


def is_list(value: Any) -> bool:
    """Whether a value is a list, a tuple or omegaconf's ``ListConfig``.

    For arguments where one object may be iterable: of loaders, such a list holds several, and any other iterable is one
    loader.
    """
    if isinstance(value, (list, tuple)):
        return True
    omegaconf = sys.modules.get("omegaconf")  # before that module is imported there is no such object
    return omegaconf is not None and isinstance(value, omegaconf.ListConfig)


def check_integer(name: str, value: Any, *, minimum: int | None = None, meaning: str = "") -> int:
    """Return ``value`` as an int.

    An object with ``__index__`` (a NumPy or torch integer) and a float without a fraction are integers. A bool and a
    string are not, though Python would take ``True`` for 1 and ``int("3")`` for 3: both are mistakes in a call.

    Args:
        name: what the message calls the argument, such as ``"EarlyStopping: patience"``.
        value: what was given.
        minimum: the least value that is allowed. Default: none.
        meaning: what special values mean, such as ``"-1 keeps all"``, for the message.

    Raises:
        MisconfigurationException: ``value`` is not an integer, or is below ``minimum``.
    """
    if not isinstance(value, (bool, str)):
        with suppress(TypeError):
            number = int(value) if isinstance(value, float) and value.is_integer() else operator.index(value)
            if minimum is None or number >= minimum:
                return number
    least = "" if minimum is None else f" of at least {minimum}"
    note = f" ({meaning})" if meaning else ""
    raise MisconfigurationException(
        f"{name}={value!r} must be an integer{least}{note}: pass a number such as {max(1, minimum or 1)}."
    )


def is_number(value: Any) -> bool:
    """Whether a value is a real number: an int, a float or one of NumPy's. A bool and a string are not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_flag(name: str, value: Any, *, optional: bool = False) -> None:
    """Refuse what is neither True nor False; a text such as "False" would be taken for True.

    Args:
        name: what the message calls the argument.
        value: what was given.
        optional: whether None is allowed, too. Default: no.

    Raises:
        MisconfigurationException: ``value`` is anything else.
    """
    if not isinstance(value, bool) and not (value is None and optional):
        raise MisconfigurationException(f"{name}={value!r} must be True or False{', or None' if optional else ''}.")


def check_loss(loss: Tensor, what: str) -> None:
    """Explain why a backward pass failed, where the loss itself is the reason; otherwise do nothing.

    Args:
        loss: what was to be differentiated, without a ``gradient``.
        what: whose loss, for the message, such as ``"`training_step` returned"``.

    Raises:
        UnusableResultError: the loss is not one number, or depends on no parameter that requires a gradient.
    """
    if loss.numel() != 1:
        raise UnusableResultError(
            f"{what} a loss of shape {tuple(loss.shape)}; it is one number: reduce it, with `.mean()` say."
        ) from None
    if not loss.requires_grad:
        raise UnusableResultError(
            f"{what} a loss that does not depend on any parameter that requires a gradient: compute it from the model's"
            " output without `.detach()`, `.item()` or `torch.no_grad()`, and freeze not everything."
        ) from None


def require_package(package: str, wanted_by: str, extra: str, otherwise: str = "") -> None:
    """Raise an error with the command that installs it when an optional package is not there.

    Args:
        package: the name under which it is imported.
        wanted_by: what the message begins with, such as ``"TQDMProgressBar"``.
        extra: the extra of Treadle that the package belongs to.
        otherwise: what works without it, as a sentence for the end of the message.

    Raises:
        MissingPackageError: the package is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise MissingPackageError(
            f"{wanted_by} needs the package {package}, which is not installed: `pip install treadle[{extra}]`."
            + (f" {otherwise}" if otherwise else "")
        )


def on_demand(
    module: str, homes: Mapping[str, str], package: str = "", extra: str = "", submodules: Iterable[str] = ()
) -> Callable[[str], Any]:
    """Make the ``__getattr__`` of a module that imports some of its names when they are first asked for.

    Type checkers get the same names from imports under ``TYPE_CHECKING``, ``import *`` gets them from ``__all__``, and
    ``dir`` from a ``__dir__`` that the module is given here.

    Args:
        module: The module's ``__name__``.
        homes: For each name, the module that has it.
        package: An optional package that the names need. Default: none.
        extra: The extra of Treadle that the package belongs to.
        submodules: Submodules of a package that are attributes without an import of their own, as in
            ``treadle.utilities.types``.
    """
    below = frozenset(submodules)

    def find(name: str) -> Any:
        if name in below:
            return importlib.import_module(f"{module}.{name}")
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        if package:
            require_package(package, f"{module}.{name}", extra)
        value = getattr(importlib.import_module(homes[name]), name)
        vars(sys.modules[module])[name] = value  # so that the next one does not ask
        return value

    there = vars(sys.modules[module])
    there["__dir__"] = lambda: sorted({*there, *homes, *below})
    return find
