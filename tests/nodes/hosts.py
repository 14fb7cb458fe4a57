"""Two hosts on this machine: network, process and host-name namespaces of their own, joined by a cable of the kernel's.

A host is a process that does nothing, in namespaces that have no names: when the process ends, be it because the tests
were killed, the kernel ends everything on the host and takes the network interface away.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import psutil
from tests.processes import ROOT, wait_until

__all__ = ["Cluster", "Host", "Running", "has_hosts", "two_hosts"]

_TOOLS = ("ip", "unshare", "nsenter", "mount", "hostname")
_NAMESPACES = ("--net", "--uts", "--mount")
# Ends with the process that holds the other end of its standard input. Busy with nothing, so that it dies of a signal.
_INIT = 'hostname "$1"; mount --bind "$2" /etc/hosts; ip link set lo up; echo ready > "$3"; read -r end'


def has_hosts() -> bool:
    """Whether this process may make hosts: as root on Linux, with the usual commands."""
    if sys.platform != "linux" or os.geteuid() != 0 or any(shutil.which(tool) is None for tool in _TOOLS):
        return False
    cable = ["ip", "link", "add", "name", "end-a", "type", "veth", "peer", "name", "end-b"]
    tried = ["unshare", *_NAMESPACES, "--pid", "--fork", *cable]
    return subprocess.run(tried, capture_output=True).returncode == 0


@dataclass
class Running:
    """A program on a host."""

    host: Host
    process: subprocess.Popen[str]
    out: Path
    err: Path

    @property
    def said(self) -> str:
        """What it has printed to stdout so far."""
        return self.out.read_text()

    @property
    def complained(self) -> str:
        """What it has printed to stderr so far."""
        return self.err.read_text()

    def wait(self, timeout: float = 90) -> int:
        """Wait for its end; returns its exit status.

        Raises:
            AssertionError: It did not end in time.
        """
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self} did not end in {timeout:g} s") from None

    def __str__(self) -> str:
        status = self.process.poll()
        return (
            f"---- host {self.host.name}: status {status}\n-- stdout\n{self.said[-6000:]}\n"
            f"-- stderr\n{self.complained[-6000:]}"
        )


@dataclass
class Host:
    """One of the two hosts."""

    name: str
    address: str
    address6: str
    folder: Path
    """For its files; a test that is to share a disk gives both hosts another folder."""
    init: psutil.Process
    """Its first process, with which all others end."""
    interface: str = "cable"
    environ: dict[str, str] = field(default_factory=dict)
    started: list[subprocess.Popen[str]] = field(default_factory=list)
    _count: int = 0

    def start(
        self,
        command: Sequence[object],
        environ: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> Running:
        """Start a program on the host.

        Args:
            command: The program and its arguments.
            environ: Its environment variables, beside those of a new shell.
            folder: Where it runs. Default: the host's own folder.
        """
        self._count += 1
        folder = folder or self.folder
        out, err = (self.folder / f"{what}{self._count}" for what in ("out", "err"))
        with open(out, "w") as stdout, open(err, "w") as stderr:
            process = self._enter([str(part) for part in command], stdout, stderr, environ or {}, folder)
        self.started.append(process)
        return Running(self, process, out, err)

    def python(
        self, *arguments: object, environ: Mapping[str, str] | None = None, folder: Path | None = None
    ) -> Running:
        """Start Python on the host with these arguments."""
        return self.start([sys.executable, *arguments], environ, folder)

    def _enter(
        self, command: list[str], stdout: TextIO, stderr: TextIO, environ: Mapping[str, str], folder: Path
    ) -> subprocess.Popen[str]:
        enter = ["nsenter", f"--target={self.init.pid}", *_NAMESPACES, "--pid", f"--wdns={folder}", *command]
        return subprocess.Popen(
            enter,
            env={**_clean_environment(), **self.environ, **environ},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str) -> str:
        """Run a command in the host's network; returns what it printed.

        Raises:
            AssertionError: The command failed.
        """
        enter = ["nsenter", f"--target={self.init.pid}", *_NAMESPACES, *command]
        done = subprocess.run(enter, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def processes(self) -> list[psutil.Process]:
        """What runs on the host."""
        space = _process_namespace(self.init.pid)
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, OSError):
                if process.pid == self.init.pid or process.status() == psutil.STATUS_ZOMBIE:
                    continue
                if space is not None and _process_namespace(process.pid) == space:
                    found.append(process)
        return found

    def kill_all(self) -> None:
        """End all programs of the host at once, without a word; the host itself stays, as after a crash of the job."""
        # In one call of the kernel's, so that none has time to notice that another one is gone.
        enter = ["nsenter", f"--target={self.init.pid}", "--pid", "--mount", "sh", "-c", "kill -9 -1"]
        subprocess.run(enter, capture_output=True, timeout=30)

    def vanish(self) -> None:
        """End the host with all that runs on it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.init.kill()


@dataclass
class Cluster:
    """Two hosts, ``a`` and ``b``, and the folder that they share."""

    a: Host
    b: Host
    shared: Path

    def __iter__(self) -> Iterator[Host]:
        return iter((self.a, self.b))

    def cut(self) -> None:
        """Cut the cable: no packet comes through, and nobody is told."""
        self.b.run("ip", "link", "set", self.b.interface, "down")

    def mend(self) -> None:
        """Join the cable again."""
        self.b.run("ip", "link", "set", self.b.interface, "up")

    def wait(self, *running: Running, timeout: float = 90) -> list[int]:
        """Wait for programs; returns their exit statuses. All that they print is in the error if one does not end."""
        until = time.monotonic() + timeout
        try:
            return [one.wait(max(0.1, until - time.monotonic())) for one in running]
        except AssertionError as error:
            raise AssertionError("\n".join([str(error), *map(str, running)])) from None

    def left(self, timeout: float = 5) -> list[str]:
        """The processes that still run on a host after so many seconds."""
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: not any(host.processes() for host in self), timeout, 0.1)
        return [" ".join(process.cmdline()) for host in self for process in host.processes()]


@contextlib.contextmanager
def two_hosts(folder: Path, names: tuple[str, str] = ("weaver-a", "weaver-b"), hosts: Any = None) -> Iterator[Cluster]:
    """Make two hosts, with the addresses 10.77.0.1 and .2, and fd77::1 and ::2.

    Args:
        folder: For the files of the hosts.
        names: Their names.
        hosts: Makes the content of /etc/hosts from the number of the host. Default: both names with the IPv4 addresses.
    """
    made: list[Host] = []
    reading, writing = os.pipe()  # closed when this process ends, in whichever way, and so the hosts end
    try:
        for index, name in enumerate(names):
            made.append(_make(folder / "ab"[index], name, index, (hosts or _both_names(names))(index), reading))
        a, b = made
        enter = ["nsenter", f"--target={a.init.pid}", "--net", "ip"]
        cable = ["link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", str(b.init.pid)]
        subprocess.run([*enter, *cable], check=True, capture_output=True, timeout=30)
        for host in made:
            host.run("ip", "addr", "add", f"{host.address}/24", "dev", "cable")
            host.run("ip", "-6", "addr", "add", f"{host.address6}/64", "dev", "cable", "nodad")
            host.run("ip", "link", "set", "cable", "up")
        shared = folder / "shared"
        shared.mkdir()
        yield Cluster(a, b, shared)
    finally:
        os.close(writing)
        os.close(reading)
        for host in made:
            host.vanish()
        for host in made:
            with contextlib.suppress(psutil.TimeoutExpired, psutil.NoSuchProcess):
                host.init.wait(10)
            for process in host.started:
                process.wait(10)


def _make(folder: Path, name: str, index: int, hosts: str, stdin: int) -> Host:
    folder.mkdir()
    (folder / "hosts").write_text(hosts)
    pid_file, ready = folder / "pid", folder / "ready"
    init = ["sh", "-c", _INIT, "host", name, str(folder / "hosts"), str(ready)]
    unshare = ["unshare", *_NAMESPACES, "--pid", "--mount-proc", "--kill-child", "--fork", *init]
    # A grandchild, so that the host is no process that the test left behind. A shell gives what it starts in the
    # background no standard input but by another number.
    start = ["setsid", "sh", "-c", 'exec 3<&0; "$@" <&3 2> "$0.err" & echo $! > "$0"', str(pid_file), *unshare]
    subprocess.run(start, stdin=stdin, stdout=subprocess.DEVNULL, check=True, timeout=30)
    wait_until(lambda: ready.exists(), 20)
    outer = psutil.Process(int(pid_file.read_text()))
    (inner,) = outer.children()
    return Host(name, f"10.77.0.{index + 1}", f"fd77::{index + 1}", folder, inner)


def _both_names(names: tuple[str, str]) -> Any:
    lines = [f"10.77.0.{index + 1} {name}" for index, name in enumerate(names)]
    return lambda index: "\n".join(["127.0.0.1 localhost", "::1 ip6-localhost", *lines, ""])


def _process_namespace(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return None


def _clean_environment() -> dict[str, str]:
    """The environment of a new shell that finds this project and its Python, and nothing of the tests'."""
    kept = ("PATH", "HOME", "LANG", "LC_ALL", "OMP_NUM_THREADS", "TMPDIR", "COVERAGE_PROCESS_START")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environ = {name: os.environ[name] for name in kept if name in os.environ}
    return {**environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}


def signal_of(status: int) -> str:
    """The name of the signal that ended a process; empty where none did."""
    return signal.Signals(-status).name if status < 0 else ""
