"""Names of files and folders: they are limited by bytes, and a letter outside ASCII takes up to four of them."""

from __future__ import annotations

import errno
import os
import uuid
from typing import Final

__all__ = ["NAME_BYTES", "check_name", "hidden_beside", "shortened"]
NAME_BYTES: Final = 255
"""What file systems allow for one name."""
_KEPT_BYTES: Final = 80
"""What a hidden name keeps of the name that it is for, so that people know the one by the other."""


def shortened(name: str, size: int) -> str:
    """The beginning of a name that takes no more than ``size`` bytes; no letter is cut in two."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= size else encoded[:size].decode("utf-8", "ignore")


def hidden_beside(path: str, ending: str) -> str:
    """A path in the same folder with a hidden name that nothing else has, for what is to take the name of ``path``."""
    parent, name = os.path.split(path)
    return os.path.join(parent, f".{shortened(name, _KEPT_BYTES)}.{uuid.uuid4().hex}.{ending}")


def check_name(path: str) -> None:
    """Make sure, before there is work to lose, that a file system will take the name at the end of a path.

    Raises:
        OSError: It is too long.
    """
    if len(os.fsencode(os.path.basename(path))) > NAME_BYTES:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), path)
