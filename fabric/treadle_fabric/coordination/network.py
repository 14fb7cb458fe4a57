"""What the runtime asks of the network between machines.

Connections end when nothing comes from the other machine: it lost its power, or the network its cable. Without this a
process waits for an answer for a quarter of an hour, or for ever. And gloo listens where the other machines are.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import struct
from datetime import timedelta
from typing import Any, Final

__all__ = [
    "address_towards",
    "choose_interface",
    "end_connections_when_silent",
    "end_when_silent",
    "list_addresses",
    "silence",
]

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
                is_tcp = (
                    connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM
                )
                if is_tcp and connection.getpeername()[1] == port:
                    end_when_silent(connection)
            finally:
                connection.detach()  # the descriptor is its owner's


def _descriptors() -> list[int]:
    for folder in ("/proc/self/fd", "/dev/fd"):
        with contextlib.suppress(OSError):
            return [int(name) for name in os.listdir(folder)]
    return []


def address_towards(address: str, port: int) -> str:
    """The address of this machine on the way to another one; empty where that is this machine, or has no address."""
    with contextlib.suppress(OSError):
        family, kind, _, _, there = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(there)  # sends nothing
            here: str = probe.getsockname()[0]
            return "" if here == there[0] else here
    return ""


_PATIENCE: Final = timedelta(seconds=10)
"""How long machine 0 waits for the address of another one, once all ranks have met."""


def choose_interface(store: Any, node_rank: int, address: str, port: int) -> None:
    """Have gloo listen where the other machines are, if this machine's name leads to itself only.

    Gloo listens at the address of the machine's name, and in Debian's /etc/hosts that is 127.0.1.1: the other machines
    then call themselves. The interface is that on the way to the other machines; GLOO_SOCKET_IFNAME, if it is set,
    wins. Every rank of a run on several machines calls this, before it makes a process group.

    Args:
        store: Where the ranks have met.
        node_rank: This machine's number, which an environment of the program's own may not know.
        address: Where the ranks have met, on machine 0.
        port: Its port.
    """
    mine = address_towards(address, port)
    if mine or node_rank != 0:
        store.set("address-of-another-node", mine)
    if "GLOO_SOCKET_IFNAME" in os.environ or not _name_leads_to_itself():
        return
    if not mine:  # machine 0
        with contextlib.suppress(RuntimeError):  # no rank is on another machine, whatever num_nodes says
            store.wait(["address-of-another-node"], _PATIENCE)
            mine = address_towards(store.get("address-of-another-node").decode() or "localhost", port)
    if mine and (name := _interface_with(mine)):
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _name_leads_to_itself() -> bool:
    """Whether the name of this machine has no address that other machines reach."""
    try:
        first = socket.getaddrinfo(socket.gethostname(), None)[0][4][0]
        return ipaddress.ip_address(str(first)).is_loopback
    except (OSError, ValueError):
        return True


_SIOCGIFADDR = 0x8915


def _interface_with(address: str) -> str:
    """The name of the network interface that has an address; empty where that cannot be told."""
    with contextlib.suppress(ValueError):
        wanted = ipaddress.ip_address(address.partition("%")[0])
        return next((name for name, found in _addresses() if found == wanted), "")
    return ""


def list_addresses() -> str:
    """The addresses of this machine that others may reach, for a sentence; empty where that cannot be told."""
    reached = [(name, one) for name, one in _addresses() if not (one.is_loopback or one.is_link_local)]
    return ", ".join(f"{one} ({name})" for name, one in reached)


def _addresses() -> list[tuple[str, ipaddress.IPv4Address | ipaddress.IPv6Address]]:
    """The network interfaces, each with an address; on Linux."""
    found: list[tuple[str, ipaddress.IPv4Address | ipaddress.IPv6Address]] = []
    with contextlib.suppress(OSError, ImportError):
        import fcntl  # not on Windows

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            for _, name in socket.if_nameindex():
                with contextlib.suppress(OSError):  # one without an address
                    told = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                    found.append((name, ipaddress.IPv4Address(told[20:24])))
    with contextlib.suppress(OSError), open("/proc/net/if_inet6", encoding="ascii") as file:
        found += [(line.split()[-1], ipaddress.IPv6Address(bytes.fromhex(line.split()[0]))) for line in file]
    return found
