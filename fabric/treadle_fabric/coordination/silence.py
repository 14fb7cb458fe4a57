"""Connections that end when nothing comes from the other machine: it lost its power, or the network its cable.

Without this a process waits for an answer for a quarter of an hour, or for ever.
"""

from __future__ import annotations

import contextlib
import os
import socket

__all__ = ["end_connections_when_silent", "end_when_silent", "silence"]

_VARIABLE = "TREADLE_SILENCE_TIMEOUT"
_DEFAULT, _SHORTEST = 10.0, 2.0
_PROBES = 3


def silence() -> float:
    """Seconds without a packet after which the kernel ends a connection: 10, or what TREADLE_SILENCE_TIMEOUT says.

    The kernel answers for a process that is busy, and also for one that is stopped.
    """
    try:
        return max(_SHORTEST, float(os.environ.get(_VARIABLE, _DEFAULT)))
    except ValueError:
        return _DEFAULT


def end_when_silent(connection: socket.socket) -> None:
    """Have the kernel end a TCP connection when nothing has come for :func:`silence` seconds, as far as it can."""
    seconds = round(silence())
    between = max(1, seconds // 5)
    options = {
        "TCP_KEEPIDLE": max(1, seconds - _PROBES * between),
        "TCP_KEEPALIVE": max(1, seconds - _PROBES * between),  # its name on macOS
        "TCP_KEEPINTVL": between,
        "TCP_KEEPCNT": _PROBES,
        "TCP_USER_TIMEOUT": seconds * 1000,  # where an answer to data is what does not come
    }
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in options.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def end_connections_when_silent(port: int) -> None:
    """Do the same with all connections of this process to a port, among them those of a library.

    Args:
        port: The port at the other end.
    """
    for descriptor in _descriptors():
        with contextlib.suppress(OSError):
            connection = socket.socket(fileno=descriptor)
            try:
                if connection.type == socket.SOCK_STREAM and connection.getpeername()[1] == port:
                    end_when_silent(connection)
            finally:
                connection.detach()  # the descriptor is its owner's


def _descriptors() -> list[int]:
    for folder in ("/proc/self/fd", "/dev/fd"):
        with contextlib.suppress(OSError):
            return [int(name) for name in os.listdir(folder)]
    return []
