"""Where the ranks of a run meet: a store at rank 0's address, at which each signs in and waits for all.

Torch's own rendezvous says nothing while it waits, and nothing of what it waited for. Here every wait says after ten
seconds, and then rarely, which ranks are missing, and which environment variables said that these exist.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from collections import Counter
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from treadle_fabric.coordination.network import address_towards, end_connections_when_silent, list_addresses
from treadle_fabric.coordination.waiting import list_ranks, messages_during, wait_with_messages
from treadle_fabric.environments import ClusterEnvironment
from treadle_fabric.errors import MisconfigurationException, RendezvousError, describe_error

__all__ = ["is_running", "meet", "new_group", "this_machine"]

_RANKS_PER_SECOND = 500  # that may ask the store; more ranks ask less often
_PROBE_TIMEOUT = 2.0  # seconds for an address to answer
_meetings: Counter[tuple[str, int, int]] = Counter()
_new_groups = itertools.count()


def meet(
    environment: ClusterEnvironment,
    rank: int,
    world_size: int,
    timeout: timedelta | None = None,
    device: torch.device | None = None,
) -> Any:
    """Return the store at which all ranks of a run have signed in, for ``torch.distributed.init_process_group``.

    Rank 0 makes the store, or torchrun's agent did. While ranks are missing, the lowest that is there says which, and a
    rank that does not reach the store says so.

    Args:
        environment: Gives address and port.
        rank: This process's rank.
        world_size: The number of ranks.
        timeout: How long to wait for all ranks. Default: torch's, 30 minutes.
        device: A CUDA device that no other rank may use. Default: None, ranks may share one.

    Raises:
        RendezvousError: Ranks did not come in time, or rank 0 cannot listen at the port.
        MisconfigurationException: The rank is not among those of the run, or another process has it; or two ranks use
            the same device.
    """
    if not 0 <= rank < world_size:
        raise MisconfigurationException(
            f"This process has rank {rank}, but the run has {world_size} (0 to {world_size - 1}). "
            f"{environment.explain_ranks(world_size)}"
        )
    meeting = _Meeting(environment, rank, world_size, timeout or default_pg_timeout)
    store = meeting.store()
    try:
        meeting.sign_in(store)
        meeting.await_all(store)
    except dist.DistNetworkError as error:
        raise meeting.lost(error) from error
    if device is not None:
        meeting.claim_device(store, device)
    _meetings[meeting.place] += 1
    return store


def new_group(**kwargs: Any) -> Any:
    """Make a process group of all ranks as ``torch.distributed.new_group`` does, once all ranks have come to this.

    Every rank calls this, as often and in the same order.

    Args:
        **kwargs: For ``torch.distributed.new_group``.

    Raises:
        RendezvousError: Ranks did not come in time.
    """
    c10d: Any = dist.distributed_c10d
    rank, world_size, name = dist.get_rank(), dist.get_world_size(), f"treadle/new-group/{next(_new_groups)}"
    store = dist.PrefixStore(name, c10d._get_default_store())  # type: ignore[attr-defined]
    _arrive(store, rank, world_size, f"{rank}")

    def describe(seconds: float) -> str:
        missing = _missing(store, rank, world_size)
        return missing and f"rank {rank} has waited {seconds:.0f} s for {missing} to make a process group together."

    timeout = (kwargs.get("timeout") or default_pg_timeout).total_seconds()
    if not wait_with_messages(lambda: bool(store.check(["all"])), describe, timeout, world_size / _RANKS_PER_SECOND):
        raise RendezvousError(f"{list_ranks(_absent(store, world_size))} did not come to make a process group in time.")
    return dist.new_group(**kwargs)


class _Meeting:
    def __init__(self, environment: ClusterEnvironment, rank: int, world_size: int, timeout: timedelta) -> None:
        self._environment = environment
        self._rank = rank
        self._world_size = world_size
        self._timeout = timeout
        self._address, self._port = environment.main_address, environment.main_port
        self._by_agent = _agent_hosts_store(self._address, self._port)
        self._hosts = rank == 0 and not self._by_agent
        self._who = f"rank {rank} (process {os.getpid()} on {socket.gethostname()})"

    @property
    def place(self) -> tuple[str, int, int]:
        return self._address, self._port, self._world_size

    def store(self) -> Any:
        """Make the store or connect to it; with keys of its own for each meeting, so that none reads an earlier's."""
        if not self._hosts:
            self._await_address()
        try:
            with messages_during(self._describe_silence) if not self._hosts else contextlib.nullcontext():
                store = dist.TCPStore(  # type: ignore[attr-defined]
                    # Rank 0 listens at all its addresses; where MASTER_ADDR is none of them, to ask there would block.
                    "127.0.0.1" if self._hosts else self._address,
                    self._port,
                    self._world_size,
                    self._hosts,
                    self._timeout,
                    wait_for_workers=False,
                    multi_tenant=True,
                )
        except dist.DistNetworkError as error:
            if not self._hosts:
                raise
            raise RendezvousError(
                f"{self._who} cannot listen at port {self._port}, where the other ranks look for it "
                f"({describe_error(error)}). If another run or a process of an earlier one has the port, end that, or "
                "set MASTER_PORT to a free port, the same for all ranks."
            ) from error
        if not self._hosts:
            end_connections_when_silent(self._port)
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if self._by_agent else "0"
        return dist.PrefixStore(f"treadle/meeting/{restart}.{_meetings[self.place]}", store)  # type: ignore[attr-defined]

    def sign_in(self, store: Any) -> None:
        """Leave word that this rank is here."""
        self._compare_sizes(store)
        mine = f"{os.getpid()}|{this_machine()}|{socket.gethostname()}"
        before = _arrive(store, self._rank, self._world_size, mine)
        if before == mine or self._by_agent:  # an agent's store may keep what was before a restart
            return
        pid, machine, host = before.split("|", 2)
        if machine == str(this_machine()) and machine != "None" and is_running(int(pid)):
            raise MisconfigurationException(
                f"{self._who} is there a second time: process {pid} on {host} has the rank already, at "
                f"{self._address}:{self._port}. Each process needs a rank of its own, and each run a port of its own. "
                f"{self._environment.explain_ranks(self._world_size)}"
            )
        store.set(f"here/{self._rank}", mine)  # it was started again

    def _compare_sizes(self, store: Any) -> None:
        """Raise an error, on all ranks, where another one takes the run for one of another size."""
        mine = f"{self._world_size}|rank {self._rank} on {socket.gethostname()}"
        size, who = store.compare_set("size", "", mine).decode().split("|", 1)
        if int(size) == self._world_size:
            return
        contradiction = (
            f"{who} says that the run has {size} processes, and rank {self._rank} on {socket.gethostname()} that it "
            f"has {self._world_size}. Use the same num_nodes and the same number of devices on each machine."
        )
        store.set("contradiction", contradiction)
        raise MisconfigurationException(f"{contradiction} {self._environment.explain_ranks(self._world_size)}".rstrip())

    def await_all(self, store: Any) -> None:
        """Wait until all ranks have signed in."""

        def describe(seconds: float) -> str:
            missing = _missing(store, self._rank, self._world_size)
            unheard = self._unanswered() if missing and self._hosts else ""
            listens = f", where it listens, but the address does not answer ({unheard})" if unheard else ""
            if missing and self._hosts and not unheard:
                self._refuse_second_rank_zero()
            return missing and self._waits_for(missing, seconds, listens)

        def all_came() -> bool:
            if store.check(["all"]):
                return True
            if store.check(["contradiction"]):
                raise MisconfigurationException(store.get("contradiction").decode())
            return False

        every = max(0.05, self._world_size / _RANKS_PER_SECOND)
        if not wait_with_messages(all_came, describe, self._timeout.total_seconds(), every):
            raise self._too_late(list_ranks(_absent(store, self._world_size)))

    def _refuse_second_rank_zero(self) -> None:
        """Raise an error where the address leads to another rank 0 than this one, for which the other ranks came."""
        if not address_towards(self._address, self._port):
            return
        try:
            there = dist.TCPStore(self._address, self._port, None, False, timedelta(seconds=5), wait_for_workers=False)  # type: ignore[attr-defined]
            key = f"treadle/meeting/0.{_meetings[self.place]}/here/0"
            owner = there.get(key).decode() if there.check([key]) else ""
        except RuntimeError:
            return
        pid, _, host = owner.split("|", 2) if owner else ("", "", "")
        if owner and (pid, host) != (str(os.getpid()), socket.gethostname()):
            raise MisconfigurationException(
                f"{self._who} is there a second time: process {pid} on {host} has the rank already, at "
                f"{self._address}:{self._port}. Only the machine that MASTER_ADDR names is node 0: give each machine a "
                f"rank of its own (NODE_RANK, --node-rank). {self._environment.explain_ranks(self._world_size)}"
            )

    def claim_device(self, store: Any, device: torch.device) -> None:
        """Refuse a GPU that another rank uses; each may call it number 0, where it sees no other."""
        uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
        if uuid is None:
            return
        owner = store.compare_set(f"device/{socket.gethostname()}/{uuid}", "", f"{self._rank}").decode()
        if owner != f"{self._rank}":
            raise MisconfigurationException(
                f"Ranks {owner} and {self._rank} use the same GPU (UUID {uuid}), and NCCL needs one for each process. "
                "Start at most as many processes on a machine as it has GPUs, and let each see its own "
                "(CUDA_VISIBLE_DEVICES, or srun's --gpus-per-task) or all see all."
            )

    def _await_address(self) -> None:
        """Wait until rank 0's address answers."""
        last = ""

        def answers() -> bool:
            nonlocal last
            last = self._unanswered()
            return not last

        def missing() -> str:
            return "torchrun's agent (TORCHELASTIC_USE_AGENT_STORE=True)" if self._by_agent else "rank 0"

        def describe(seconds: float) -> str:
            return self._waits_for(missing(), seconds, f", which does not answer ({last})")

        if not wait_with_messages(answers, describe, self._timeout.total_seconds()):
            raise self._too_late(missing(), f", which does not answer ({last})")

    def _describe_silence(self, seconds: float) -> str:
        return self._waits_for(
            "torchrun's agent" if self._by_agent else "rank 0",
            seconds,
            ", which answers, but not as a rank does: another program may listen there",
        )

    def lost(self, error: Exception) -> RendezvousError:
        """The error for a store that goes while ranks meet there."""
        return RendezvousError(
            f"{self._who} has met rank 0 at {self._address}:{self._port}, which then ended, or its machine is gone "
            f"({describe_error(error)}). See what rank 0 printed."
        )

    def _unanswered(self) -> str:
        """Why the address does not answer; empty if it does."""
        try:
            socket.create_connection((self._address, self._port), _PROBE_TIMEOUT).close()
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def _waits_for(self, missing: str, seconds: float, address: str = "") -> str:
        where = f"{self._address}:{self._port}{address}"
        explained = self._environment.explain_ranks(self._world_size)
        own = _own_addresses() if "does not answer (" in address else ""
        return f"{self._who} has waited {seconds:.0f} s for {missing} at {where}. {explained} {own}".rstrip()

    def _too_late(self, missing: str, address: str = "") -> RendezvousError:
        waited = self._waits_for(missing, self._timeout.total_seconds(), address)
        return RendezvousError(f"{waited} The timeout is over.")


def _own_addresses() -> str:
    found = list_addresses()
    return f"The addresses of this host are {found}." if found else ""


def _arrive(store: Any, rank: int, world_size: int, mine: str) -> str:
    """Sign in, and tell all when this is the last rank; returns who has signed in for this rank."""
    key = f"here/{rank}"
    fresh = not store.check([key])
    owner: str = store.compare_set(key, "", mine).decode()
    if fresh and owner == mine and store.add("arrived", 1) == world_size:
        store.set("all", "")
    return owner


def _absent(store: Any, world_size: int) -> list[int]:
    return [rank for rank in range(world_size) if not store.check([f"here/{rank}"])]


def _missing(store: Any, rank: int, world_size: int) -> str:
    """The ranks that have not signed in, for the lowest rank that has; empty for the others, which say nothing."""
    absent = _absent(store, world_size)
    lowest = next((one for one in range(world_size) if one not in absent), rank)
    return list_ranks(absent) if absent and lowest == rank else ""


def _agent_hosts_store(address: str, port: int) -> bool:
    """Whether torchrun's agent has a store at this address, which it says by variables that others may inherit."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    if (os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")) == (address, str(port)):
        return True
    del os.environ["TORCHELASTIC_USE_AGENT_STORE"]  # of another run; failures and torch follow it, too
    return False


def this_machine() -> str | None:
    """Return what is the same for processes that see one another's ids; None where that cannot be told."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    return None


def is_running(pid: int) -> bool:
    """Return whether a process of :func:`this_machine` runs; one that has ended and was not waited for does not."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    return False
