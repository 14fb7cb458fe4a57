"""The exceptions that Treadle raises, as a tree.

    TreadleError
    +-- MisconfigurationException        an argument or a combination that cannot work (also a ValueError)
    |   +-- DeviceUnavailableError       a device was asked for that is not there
    |   +-- UnknownArgumentError         a constructor has no argument of that name (also a TypeError)
    +-- CheckpointError                  reading or writing a checkpoint failed
    |   +-- CheckpointNotFoundError      nothing lies at the path (also a FileNotFoundError)
    |   +-- CheckpointCorruptError       truncated, damaged, or another program's file
    |   +-- CheckpointUnsafeError        would have to unpickle arbitrary objects
    |   +-- CheckpointMismatchError      whole, but not for this state (also a KeyError)
    +-- ProcessFailedError               another process of the run ended with an error (also a RuntimeError)
    +-- UnusedParametersError            parameters got no gradient under DDP (also a RuntimeError)
    +-- NonFiniteError                   a loss or gradients are NaN or infinite (also an ArithmeticError)

Every message says the value, the rule and the remedy.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import ParamSpec

__all__ = [
    "CheckpointCorruptError",
    "CheckpointError",
    "CheckpointMismatchError",
    "CheckpointNotFoundError",
    "CheckpointUnsafeError",
    "DeviceUnavailableError",
    "MisconfigurationException",
    "NonFiniteError",
    "ProcessFailedError",
    "TreadleError",
    "UnknownArgumentError",
    "UnusedParametersError",
    "describe_error",
    "near_names",
    "suggests_arguments",
]

P = ParamSpec("P")


class TreadleError(Exception):
    """The base class of everything that Treadle raises on purpose."""


class MisconfigurationException(TreadleError, ValueError):
    """An argument, or a combination of arguments, that cannot work."""


class DeviceUnavailableError(MisconfigurationException):
    """A device was asked for that this machine does not have."""


class UnknownArgumentError(MisconfigurationException, TypeError):
    """A constructor was called with a name that none of its arguments has."""


class CheckpointError(TreadleError):
    """Reading or writing a checkpoint failed."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """Nothing lies at the path."""


class CheckpointCorruptError(CheckpointError):
    """The file is truncated, damaged, or was not written as a checkpoint."""


class CheckpointUnsafeError(CheckpointError):
    """The file can only be read by running code that it brings along."""


class CheckpointMismatchError(CheckpointError, KeyError):
    """The checkpoint is whole, but its keys are not those of the state it is loaded into."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""  # KeyError would print the repr


class ProcessFailedError(TreadleError, RuntimeError):
    """Another process of the run ended with an error."""


class UnusedParametersError(TreadleError, RuntimeError):
    """Parameters that require a gradient got none under DDP, which waits for it."""


class NonFiniteError(TreadleError, ArithmeticError):
    """A loss or gradients are NaN or infinite, and ``on_nonfinite="raise"`` ends the run."""


def describe_error(error: BaseException) -> str:
    """Return an exception's type and message, for a sentence: the type alone where there is no message."""
    text = str(error).strip().rstrip(".")
    if not text:
        return type(error).__name__
    return text if isinstance(error, TreadleError) else f"{type(error).__name__}: {text}"


def near_names(name: str, known: Iterable[str], n: int = 3) -> str:
    """Return a hint such as ``Did you mean 'val_loss'?`` for a misspelled name, or the list of known names."""
    known = sorted({str(k) for k in known})
    close = difflib.get_close_matches(name, known, n=n, cutoff=0.6)
    if close:
        return "Did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "There is: " + ", ".join(known) + "." if known else "There is none."


def suggests_arguments(init: Callable[P, None]) -> Callable[P, None]:
    """Decorate a constructor without ``**kwargs``, so that the error for a misspelled argument has similar names.

    Raises:
        UnknownArgumentError: The constructor is called with an argument that it does not have.
    """
    known = list(inspect.signature(init).parameters)[1:]

    @functools.wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        for name in kwargs:
            if name not in known:
                raise UnknownArgumentError(
                    f"{type(args[0]).__qualname__}({name}=...) is no argument. {near_names(name, known)}"
                )
        init(*args, **kwargs)

    return checked
