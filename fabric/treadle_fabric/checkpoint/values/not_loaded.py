"""What takes the place of a value that was not loaded."""

from __future__ import annotations

from typing import Any, Final, NoReturn

from treadle_fabric.errors import CheckpointUnsafeError

__all__ = ["NotLoaded", "error_of"]


class NotLoaded:
    """Takes the place of a value of a checkpoint that a load did not give; its use raises an error.

    It can be kept, passed on, copied and printed. Everything else (a call, an attribute, a comparison, ...) is use.

    Args:
        what: The value, in a few words: "checkpoint['loss'] (torch.nn.modules.loss.MSELoss)".
        error: What is raised: which value it is, why it is not there, and what to do.
    """

    __slots__ = ("_error", "_what")

    def __init__(self, what: str, error: str) -> None:
        self._what, self._error = what, error

    def __repr__(self) -> str:
        return f"<not loaded: {self._what}>"

    def __copy__(self) -> NotLoaded:
        return self

    def __deepcopy__(self, memo: Any) -> NotLoaded:
        return self

    def __getattr__(self, name: str) -> Any:
        raise error_of(self)

    __hash__ = object.__hash__


def error_of(value: NotLoaded) -> CheckpointUnsafeError:
    """What the use of a value raises: why the value is not there, and what to do."""
    return CheckpointUnsafeError(value._error)


def _raise(value: NotLoaded, *args: Any, **kwargs: Any) -> NoReturn:
    raise error_of(value)


_USES: Final = (
    "call getitem setitem delitem contains iter next len bool eq ne lt le gt ge add radd sub rsub mul rmul truediv "
    "rtruediv floordiv rfloordiv mod rmod pow rpow matmul rmatmul and rand or ror xor rxor neg pos abs invert int "
    "float complex index round enter exit fspath reduce_ex"
)
for _use in _USES.split():
    setattr(NotLoaded, f"__{_use}__", _raise)
