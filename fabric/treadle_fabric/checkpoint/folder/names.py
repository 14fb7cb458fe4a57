"""Names of files and folders: they are limited by bytes, and a letter outside ASCII takes up to four of them."""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import uuid
from typing import Final

__all__ = ["NAME_BYTES", "check_name", "hidden_beside", "is_of_this_kernel", "shortened"]
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
    unique = _kernel() + uuid.uuid4().hex[len(_kernel()) :]
    return os.path.join(parent, f".{shortened(name, _KEPT_BYTES)}.{unique}.{ending}")


def is_of_this_kernel(unique: str) -> bool:
    """Whether a process made a hidden name, of which this is the unique part, that sees all locks of this process."""
    return unique.startswith(_kernel())


@functools.cache
def _kernel() -> str:
    """Eight digits for the running kernel, also in containers; where it has no name, for this process alone."""
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            return hashlib.blake2b(file.read(), digest_size=4).hexdigest()
    except OSError:
        return uuid.uuid4().hex[:8]


def check_name(path: str) -> None:
    """Make sure, before there is work to lose, that a file system will take the name at the end of a path.

    Raises:
        OSError: It is too long.
    """
    if len(os.fsencode(os.path.basename(path))) > NAME_BYTES:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), path)
