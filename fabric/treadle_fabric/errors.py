"""The exceptions that Treadle raises, as a tree.

    TreadleError
    +-- MisconfigurationException        an argument or a combination that cannot work (also a ValueError)
    |   +-- DeviceUnavailableError       a device was asked for that is not there
    |   +-- UnknownArgumentError         a constructor has no argument of that name (also a TypeError)
    |   +-- UnknownNameError             a registry has no entry of that name (also a KeyError)
    |   +-- WrongTypeError               a value is of a type that cannot work there (also a TypeError)
    |   +-- UnusableResultError          what the user's code gave cannot be used (also a RuntimeError)
    |   +-- NoModuleError                a trainer that has no module yet was asked to save it (also an AttributeError)
    |   +-- MissingArgumentError         a constructor needs an argument that nobody gave (also a TypeError)
    |   +-- NoSuchNameError              an object has nothing of that name (also an AttributeError)
    |   +-- NotLaunchedError             processes work together that nobody started (also a RuntimeError)
    |   +-- NothingThereError            the first of none was asked for (also an IndexError)
    |   +-- MissingPackageError          an extra is not installed (also a ModuleNotFoundError)
    |   +-- MissingMetricError           nothing logs what decides something (also a RuntimeError)
    |   +-- RemovedHookError             a hook of Lightning 1 that is gone (also a NotImplementedError)
    +-- CheckpointError                  reading or writing a checkpoint failed
    |   +-- CheckpointNotFoundError      nothing lies at the path (also a FileNotFoundError)
    |   +-- CheckpointCorruptError       truncated, damaged, or another program's file
    |   +-- CheckpointUnsafeError        would have to unpickle arbitrary objects
    |   +-- CheckpointMismatchError      whole, but not for this state (also a KeyError and a RuntimeError)
    +-- ProcessFailedError               another process of the run ended with an error (also a RuntimeError)
    +-- RendezvousError                  the processes of a run did not all meet in time (also a RuntimeError)
    +-- RequeueError                     the cluster did not queue the job again (also a RuntimeError)
    +-- UnusedParametersError            parameters got no gradient under DDP (also a RuntimeError)
    +-- NonFiniteError                   a loss or gradients are NaN or infinite (also an ArithmeticError)
    +-- TrainingSpikeException           a loss jumped, and SpikeDetection ends the run (also a RuntimeError)
    +-- LeftOutError                     Treadle leaves out a name of Lightning on purpose (also a ModuleNotFoundError)

Every message says the value, the rule and the remedy.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import opcode
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec

__all__ = [
    "CheckpointCorruptError",
    "CheckpointError",
    "CheckpointMismatchError",
    "CheckpointNotFoundError",
    "CheckpointUnsafeError",
    "DeviceUnavailableError",
    "LeftOutError",
    "MisconfigurationException",
    "MissingArgumentError",
    "MissingMetricError",
    "MissingPackageError",
    "NoModuleError",
    "NoSuchNameError",
    "NonFiniteError",
    "NotLaunchedError",
    "NothingThereError",
    "ProcessFailedError",
    "RemovedHookError",
    "RendezvousError",
    "RequeueError",
    "TrainingSpikeException",
    "TreadleError",
    "UnknownArgumentError",
    "UnknownNameError",
    "UnusableResultError",
    "UnusedParametersError",
    "WrongTypeError",
    "describe_error",
    "left_out",
    "near_names",
    "suggests_arguments",
    "unknown_name",
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


class UnknownNameError(MisconfigurationException, KeyError):
    """A registry has no entry of that name."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""  # KeyError would print the repr


class WrongTypeError(MisconfigurationException, TypeError):
    """A value is of a type that cannot work where it was given."""


class UnusableResultError(MisconfigurationException, RuntimeError):
    """What the user's code gave during a run, a loss for example, cannot be used."""


class NoModuleError(MisconfigurationException, AttributeError):
    """A trainer was asked to save a module, and has none that was set up."""


class MissingArgumentError(MisconfigurationException, TypeError):
    """A constructor needs an argument that neither the caller nor a checkpoint has."""


class NoSuchNameError(MisconfigurationException, AttributeError):
    """An object has no attribute or method of the name that was given."""


class NotLaunchedError(MisconfigurationException, RuntimeError):
    """A method in which all processes take part was called before these were started."""


class NothingThereError(MisconfigurationException, IndexError):
    """The first of several objects was asked for, and there are none."""


class MissingPackageError(MisconfigurationException, ModuleNotFoundError):
    """What was asked for needs a package that is not installed: one of an extra of Treadle."""


class RemovedHookError(MisconfigurationException, NotImplementedError):
    """A class defines a hook of Lightning 1 that is never called any more."""


class MissingMetricError(MisconfigurationException, RuntimeError):
    """A callback or a scheduler decides by a metric that nothing has logged."""


class CheckpointError(TreadleError):
    """Reading or writing a checkpoint failed."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """Nothing lies at the path."""


class CheckpointCorruptError(CheckpointError):
    """The file is truncated, damaged, or was not written as a checkpoint."""


class CheckpointUnsafeError(CheckpointError):
    """The file can only be read by running code that it brings along."""


class CheckpointMismatchError(CheckpointError, KeyError, RuntimeError):
    """The checkpoint is whole, but its keys or shapes are not those of the state it is loaded into."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""  # KeyError would print the repr


class ProcessFailedError(TreadleError, RuntimeError):
    """Another process of the run ended with an error."""


class RendezvousError(TreadleError, RuntimeError):
    """The processes of a run did not all come to where they meet, in time."""


class RequeueError(TreadleError, RuntimeError):
    """The cluster did not queue a job again whose end it had announced."""


class UnusedParametersError(TreadleError, RuntimeError):
    """Parameters that require a gradient got none under DDP, which waits for it."""


class NonFiniteError(TreadleError, ArithmeticError):
    """A loss or gradients are NaN or infinite, and ``on_nonfinite="raise"`` ends the run."""


class TrainingSpikeException(TreadleError, RuntimeError):
    """A loss is far worse than those before, and ``SpikeDetection`` ends the run.

    Args:
        batch_idx: The number of the batch.
        loss: Its loss.
        before: The losses of the batches before.
    """

    def __init__(self, batch_idx: int, loss: float | None = None, before: Iterable[float] = ()) -> None:
        super().__init__(batch_idx, loss, list(before))
        self.batch_idx = batch_idx

    def __str__(self) -> str:
        _, loss, before = self.args
        told = "" if loss is None else f": the loss is {loss:g}"
        last = ", ".join(f"{each:g}" for each in before[-3:])
        return (
            f"Training spike detected in batch {self.batch_idx}{told}{f', after {last}' if last else ''}. Go on from an"
            " earlier checkpoint without this batch and the one before; the JSON file of SpikeDetection has both."
        )


class LeftOutError(TreadleError, ModuleNotFoundError):
    """A name or a module that Lightning has and Treadle leaves out on purpose."""


def left_out(
    module: str, names: Mapping[str, str], otherwise: Callable[[str], Any] | None = None
) -> Callable[[str], Any]:
    """Make the ``__getattr__`` of a module in which some names of Lightning are left out on purpose.

    The error says so where one of them is imported. Where it is looked up as an attribute, the error is an
    AttributeError with the same message, so that ``hasattr`` gives False.

    Args:
        module: The module's ``__name__``.
        names: The names, and for each what to use instead, to follow a colon.
        otherwise: Finds any other name. Default: there is none.
    """

    def missing(name: str) -> Any:
        if name not in names:
            if otherwise is not None:
                return otherwise(name)
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        message = f"{module}.{name} is left out on purpose: {names[name]}"
        caller = sys._getframe(1)
        importing = caller.f_code.co_code[caller.f_lasti] == opcode.opmap["IMPORT_FROM"]
        raise LeftOutError(message) if importing else AttributeError(message)

    return missing


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


def unknown_name(argument: str, value: Any, known: Iterable[str]) -> MisconfigurationException:
    """Return the error for a name that an argument does not have."""
    return MisconfigurationException(f"{argument}={value!r} is unknown. {near_names(str(value), known)}")


def suggests_arguments(init: Callable[P, None], instead: Callable[[str], str] = lambda name: "") -> Callable[P, None]:
    """Decorate a constructor without ``**kwargs``, so that the error for an unknown argument says what is meant.

    Args:
        init: The constructor.
        instead: What to write instead of an argument that there was once; empty for any other. Default: empty. Without
            it, the error has similar names.

    Raises:
        UnknownArgumentError: The constructor is called with an argument that it does not have.
    """
    known = list(inspect.signature(init).parameters)[1:]

    @functools.wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        for name in kwargs:
            if name not in known:
                remedy = instead(name)
                hint = f"It was one of Lightning 1: {remedy}." if remedy else near_names(name, known)
                raise UnknownArgumentError(f"{type(args[0]).__qualname__}({name}=...) is no argument. {hint}")
        init(*args, **kwargs)

    return checked
