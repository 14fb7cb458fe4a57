"""File names of checkpoints, made from templates such as ``{epoch:02d}-{val_loss:.2f}``."""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from treadle_fabric import MisconfigurationException, near_names, rank_zero_warn
from treadle_fabric.checkpoint import NAME_BYTES, shortened

__all__ = ["check_length", "check_template", "fill_template", "pattern_of", "with_ending"]

_EXTENSION = ".ckpt"
_FIELD = re.compile(r"\{([^{}:]+)(?::([^{}]*))?\}")  # names may hold anything else: "val/loss", "acc@1", "top 5"


def check_template(template: str) -> None:
    """Refuse a file name template that could only fail when the first checkpoint is written.

    Raises:
        MisconfigurationException: the template has an empty field, an unbalanced brace, a format that no number has, or
            more text than fits into a file name.
    """
    if "{" in (rest := _FIELD.sub("", template)) or "}" in rest:
        raise MisconfigurationException(
            f"The checkpoint file name {template!r} has an empty field or an unbalanced brace: write the name of a "
            "metric between braces, as in '{epoch:02d}-{val_loss:.2f}'."
        )
    for name, spec in _FIELD.findall(template):
        if not any(_formats(number, spec) for number in (1, 1.0)):
            raise MisconfigurationException(
                f"The checkpoint file name {template!r} asks for {name!r} in the format {spec!r}, which no number has: "
                "use one such as '.2f' for a metric or '02d' for a count."
            )
    check_length(_FIELD.sub("", template), f"The checkpoint file name {template!r}")


def check_length(name: str, shown: str) -> None:
    """Refuse a file name without ending, or a path, that is too long for a file system; ``shown`` begins the message.

    Raises:
        MisconfigurationException: a part of it is too long.
    """
    for part in name.split("/"):
        if (size := len(os.fsencode(part))) > NAME_BYTES - len(_EXTENSION):
            raise MisconfigurationException(
                f"{shown} takes {size} bytes, and with the ending {_EXTENSION!r} a file name may take {NAME_BYTES}: "
                "shorten the name. In UTF-8 a letter outside ASCII takes 2 to 4 bytes."
            )


def with_ending(name: str, ending: str) -> str:
    """Return the name with an ending; where both are too long for a file name, with the end of ``name`` cut off."""
    folder, _, last = name.rpartition("/")
    last = shortened(last, NAME_BYTES - len(os.fsencode(ending))) + ending
    return f"{folder}/{last}" if folder else last


def _formats(number: float, spec: str) -> bool:
    try:
        format(number, spec)
    except ValueError:
        return False
    return True


def fill_template(template: str, metrics: Mapping[str, Any], insert_names: bool, equals: str = "=") -> str:
    """Return the template with the values of ``metrics`` in its fields.

    Args:
        template: the file name with its fields.
        metrics: numbers and scalar tensors. A name that is not in ``metrics`` counts as 0, with a warning.
        insert_names: write ``name=value`` rather than ``value``.
        equals: the text between the name and the value.
    """

    def fill(match: re.Match[str]) -> str:
        name, spec = match[1], match[2] or ""
        if name not in metrics:
            rank_zero_warn(
                f"The checkpoint file name {template!r} asks for {name!r}, which was not logged: it says 0. "
                f"{near_names(name, metrics)}"
            )
        value = metrics.get(name, 0)
        text = _format(value.item() if isinstance(value, Tensor) else value, spec)
        return f"{name}{equals}{text}" if insert_names else text

    return _FIELD.sub(fill, template)


def pattern_of(template: str) -> str:
    """Return the shell pattern of the file names that a template gives, without their ending."""
    texts = _FIELD.split(template)[:: _FIELD.groups + 1]
    return f"{'*'.join(map(glob.escape, texts))}*"  # a version may follow


def _format(value: Any, spec: str) -> str:
    try:
        return format(value, spec)
    except ValueError:  # "d" asked of a float: no reason to lose a checkpoint
        return format(round(value), spec) if math.isfinite(value) else str(value)
