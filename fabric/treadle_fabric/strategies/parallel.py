"""Strategies with a process group: ranks, collectives, launching."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from treadle_fabric.accelerators import Accelerator, with_index
from treadle_fabric.checkpoint import CheckpointIO
from treadle_fabric.checks import one_or_several
from treadle_fabric.coordination import broadcast_object, choose_interface, host_group, meet, reached_by, waits_in_vain
from treadle_fabric.environments import ClusterEnvironment, mark_rank_as_taken
from treadle_fabric.errors import MisconfigurationException, near_names
from treadle_fabric.failures import current_member, end_process
from treadle_fabric.launchers import Launcher, make_launcher
from treadle_fabric.precision import Precision
from treadle_fabric.rank_zero import rank_zero_only
from treadle_fabric.strategies.parts import Parts
from treadle_fabric.strategies.reduction import reduction_of
from treadle_fabric.strategies.strategy import Strategy

__all__ = ["ParallelStrategy", "gather_tensor"]

_START_METHODS = ("popen", "spawn", "fork", "forkserver")


class DeviceExchange(Protocol):
    """Collectives of devices that reach one another, of all processes."""

    def takes(self, tensor: Tensor, op: Any = None) -> bool:
        """Whether the tensor is on such a device, and its dtype and the ``torch.distributed.ReduceOp`` are there."""

    def all_reduce(self, tensor: Tensor, op: Any) -> Tensor:
        """The reduced tensor, a new one."""

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, stacked; gradients flow back."""


class ParallelStrategy(Strategy):
    """Several processes, one a device, that talk through a ``torch.distributed`` process group.

    Args:
        accelerator: The hardware.
        parallel_devices: The devices of this machine, one a process.
        cluster_environment: Where ranks and addresses come from.
        checkpoint_io: Writes and reads files.
        precision: Default: ``32-true``.
        process_group_backend: Default: torch's for the device, ``"nccl"`` on CUDA and ``"gloo"`` on the CPU.
        timeout: How long a collective waits for the slowest process. What rank 0 does for all, such as a save, may
            take longer.
        start_method: How processes are started: ``"popen"`` runs the script again, ``"spawn"``, ``"fork"`` and
            ``"forkserver"`` run a function.
        precision_plugin: The precision, under the name that strategies of a trainer have for it.
    """

    uses_process_group = True

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(accelerator, checkpoint_io, precision, precision_plugin)
        if start_method not in _START_METHODS:
            raise MisconfigurationException(
                f"start_method={start_method!r} is unknown. {near_names(str(start_method), _START_METHODS)}"
            )
        self._parallel_devices = [with_index(device) for device in one_or_several(parallel_devices)] or None
        self._environment = cluster_environment
        self._backend = process_group_backend
        self._timeout = timeout
        self._start_method = start_method
        self._num_nodes = 1
        self._launcher: Launcher | None = None
        self._owns_group = False

    def __getstate__(self) -> dict[str, Any]:
        # what travels to a launched process has yet to join the group
        return {**self.__dict__, "_launcher": None, "_owns_group": False}

    @property
    def given(self) -> Parts:
        devices = tuple(self._parallel_devices or ())
        return Parts(self._accelerator, devices, self._precision, self._checkpoint_io, self._environment)

    def assign_devices(
        self, devices: list[torch.device], environment: ClusterEnvironment | None, num_nodes: int
    ) -> None:
        self._parallel_devices = self._parallel_devices or devices
        self._environment = self._environment or environment
        self._num_nodes = num_nodes
        self.check_processes(num_nodes * len(self._parallel_devices))

    def forget_devices(self) -> None:
        self._accelerator = self._parallel_devices = self._environment = None

    def check_processes(self, number: int) -> None:
        """Refuse a number of processes that the strategy was not asked for, before they are started. Default: none.

        Raises:
            MisconfigurationException: The strategy was asked for another number.
        """

    @property
    def parallel_devices(self) -> list[torch.device]:
        if not self._parallel_devices:
            raise MisconfigurationException(
                f"{type(self).__name__} has no devices yet. Pass it to Fabric or the Trainer, or give parallel_devices."
            )
        return self._parallel_devices

    @property
    def cluster_environment(self) -> ClusterEnvironment:
        if self._environment is None:
            raise MisconfigurationException(
                f"{type(self).__name__} has no cluster environment yet. Pass it to Fabric or the Trainer, or give "
                "cluster_environment."
            )
        return self._environment

    @property
    def num_nodes(self) -> int:
        return self._num_nodes

    @property
    def num_processes(self) -> int:
        """Number of processes on this machine."""
        return len(self.parallel_devices)

    @property
    def start_method(self) -> str | None:
        return self._start_method

    @property
    def process_group_backend(self) -> str:
        """What the user asked for, or torch's choice for the device: ``"nccl"`` on CUDA, ``"gloo"`` on the CPU."""
        return self._backend or dist.Backend.default_device_backend_map.get(self.root_device.type, "gloo")

    @property
    def root_device(self) -> torch.device:
        return self.parallel_devices[self.local_rank]

    @property
    def world_size(self) -> int:
        if dist.is_initialized():
            return dist.get_world_size()
        if self._environment is not None and self._environment.started_nodes() is not None:
            return self._environment.world_size()  # also where the machines have different numbers of processes
        return self._num_nodes * self.num_processes

    @property
    def global_rank(self) -> int:
        if dist.is_initialized():
            return dist.get_rank()
        if self.cluster_environment.creates_processes_externally:
            return self.cluster_environment.global_rank()
        return self.node_rank * self.num_processes + self.local_rank

    @property
    def local_rank(self) -> int:
        return self.cluster_environment.local_rank()

    @property
    def node_rank(self) -> int:
        return self.cluster_environment.node_rank()

    @property
    def launches_function(self) -> bool:  # type: ignore[override]
        return self._start_method != "popen" and not self.cluster_environment.creates_processes_externally

    @property
    def launcher(self) -> Launcher | None:
        if self._launcher is None:
            self._launcher = make_launcher(
                self.cluster_environment, self.num_processes, self._num_nodes, self._start_method
            )
        return self._launcher

    @property
    def ranks_a_share(self) -> int:
        """Number of neighbouring processes that work together on one share of a batch."""
        return 1

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any] | None:
        shares = self.world_size // (self.ranks_a_share * self.pipeline_stages)
        return {"num_replicas": shares, "rank": self.global_rank // self.ranks_a_share % shares}

    def setup_environment(self) -> None:
        environment = self.cluster_environment
        rank, world_size = self.global_rank, self.world_size
        environment.set_global_rank(rank)
        environment.set_world_size(world_size)
        rank_zero_only.rank = rank  # type: ignore[attr-defined]
        self.prepare_process()
        if self._accelerator is not None:
            self._accelerator.setup_device(self.root_device)
        self._join_group(environment, rank, world_size)
        self.process_is_ready()

    def prepare_process(self) -> None:
        """Do what comes before the device of this process is used. Default: nothing."""

    def process_is_ready(self) -> None:
        """Do what needs the device and the process group. Default: nothing."""

    def _join_group(self, environment: ClusterEnvironment, rank: int, world_size: int) -> None:
        if dist.is_initialized():
            if environment.ends_processes:  # what started the processes made the group, too
                mark_rank_as_taken()
                self._share_failures(environment)
            return
        here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        bound = self.root_device if here is not None and here.type == self.root_device.type else None
        exclusive = bound if "nccl" in self.process_group_backend else None
        store = meet(environment, rank, world_size, self._timeout, exclusive)
        if self._num_nodes > 1:
            choose_interface(store, self.node_rank, environment.main_address, environment.main_port)
        os.environ["MASTER_ADDR"] = environment.main_address
        os.environ["MASTER_PORT"] = str(environment.main_port)
        dist.init_process_group(
            self.process_group_backend,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=self._timeout,
            device_id=bound,
        )
        mark_rank_as_taken()
        self._owns_group = True
        self._share_failures(environment)
        host_group(self._timeout)
        atexit.register(_end_group, os.getpid())

    def _share_failures(self, environment: ClusterEnvironment) -> None:
        from treadle_fabric.failures import join_group  # for several processes only

        join_group(
            self._num_nodes, self.local_rank, environment.collects_output, ends_itself=not environment.ends_processes
        )

    def leave_environment(self) -> None:
        try:
            self.checkpoint_io.wait()  # what all ranks still write needs their connections
        finally:
            if self._owns_group:
                self._owns_group = False
                _destroy_group(os.getpid())
            if self._environment is not None:
                self._environment.teardown()

    def _on_device(self, tensor: Tensor, group: Any | None) -> Tensor:
        """The tensor where the group reaches it: NCCL sends only what is on a device, MPI only what is on the host."""
        if dist.get_rank(group) < 0:
            raise MisconfigurationException(
                f"Rank {self.global_rank} is not in the process group that it passed: only the ranks of a group may"
                " call its collectives."
            )
        reached = reached_by(group)
        if tensor.device.type in reached:
            return tensor
        return tensor.to(self.root_device if self.root_device.type in reached else "cpu")

    @property
    def device_exchange(self) -> DeviceExchange | None:
        """Collectives that the devices run by themselves, beside the process group. Default: none."""
        return None

    def all_reduce(self, tensor: Tensor, group: Any | None = None, reduce_op: Any = "mean") -> Tensor:
        reduction = reduction_of(reduce_op, tensor.dtype)
        exchange = self.device_exchange
        if exchange is not None and group is None and exchange.takes(tensor, reduction.op):
            size = self.world_size
            return reduction.end(exchange.all_reduce(reduction.begin(tensor.detach(), size), reduction.op), size)
        result = self._on_device(tensor.detach(), group)
        result = reduction.begin(result, dist.get_world_size(group))
        if result is tensor or result.data_ptr() == tensor.data_ptr():
            result = result.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(result, op=reduction.op, group=group)
        return reduction.end(result, dist.get_world_size(group)).to(tensor.device)

    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        exchange = self.device_exchange
        if exchange is not None and group is None and exchange.takes(tensor):
            return exchange.all_gather(tensor if sync_grads else tensor.detach())
        return gather_tensor(self._on_device(tensor, group), group, sync_grads).to(tensor.device)

    def barrier(self, name: str | None = None) -> None:
        """Wait on the host, and not behind what the devices have yet to do."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            host_group(self._timeout).barrier(f"the barrier {name!r}" if name else "a barrier")

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return broadcast_object(self, obj, src, self.root_device) if dist.is_initialized() else obj

    def begin_vote(self, decision: bool) -> Callable[[], int]:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return lambda: int(bool(decision))
        return host_group(self._timeout).vote(decision)


_SENT = frozenset(
    {torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32,
     torch.float64, torch.complex64, torch.complex128}
)  # fmt: skip
"""What every backend sends as it is; of other dtypes the bytes are sent."""


def gather_tensor(tensor: Tensor, group: Any | None, sync_grads: bool = False) -> Tensor:
    """Gather a tensor of all ranks, with a new first dimension; ``sync_grads`` takes gradients back through it."""
    source = tensor.contiguous()
    gathered: Tensor = _Gather.apply(source, group) if sync_grads else _gather(source.detach(), group)  # type: ignore[no-untyped-call]
    return gathered


def _gather(tensor: Tensor, group: Any | None) -> Tensor:
    sent = tensor if tensor.dtype in _SENT else tensor.reshape(-1).view(torch.uint8)
    parts = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, sent, group=group)
    gathered = torch.stack(parts)
    return gathered if sent is tensor else gathered.view(tensor.dtype).reshape(len(parts), *tensor.shape)


class _Gather(torch.autograd.Function):
    """A gather whose gradient is the sum of what every process did with this one's part."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any | None) -> Tensor:
        ctx.group = group
        return _gather(tensor, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient[dist.get_rank(ctx.group)], None


_END_LIMIT = 5.0  # seconds for the end of the group after a failure; all that a failed run takes has to fit into ten


def _destroy_group(pid: int) -> None:
    """End the group: with the other ranks, or without a word to them after a failure.

    NCCL's regular end waits for ranks that died or hang, until its timeout. After a failure the group is aborted.
    """
    if os.getpid() != pid:  # a forked child inherits the exit handler, not the group
        return
    member = current_member()
    failed = member is not None and (member.failed or member.board.final_failure() is not None)
    from treadle_fabric.failures import leave_group  # for several processes only

    leave_group()  # also where the user destroyed the group: the others would take this rank for dead
    if not dist.is_initialized():
        return
    if not failed:
        dist.destroy_process_group()
        return
    aborts = any(pair.endswith("nccl") for pair in dist.get_backend_config(dist.group.WORLD).split(","))
    end: Any = dist.distributed_c10d._abort_process_group if aborts else dist.destroy_process_group
    ends = threading.Thread(target=end, name="treadle-end-of-group", daemon=True)
    try:
        ends.start()
    except RuntimeError:  # newer versions of Python start no thread where the interpreter ends
        end()
        return
    ends.join(_END_LIMIT)
    if ends.is_alive():
        _unfinished.append(ends)


_unfinished: list[threading.Thread] = []
"""What still ends a group, perhaps for ever."""


def _end_group(pid: int) -> None:
    if os.getpid() != pid:
        return
    member = current_member()
    failure = None if member is None else member.board.final_failure()
    _destroy_group(pid)
    until = time.monotonic() + _END_LIMIT
    while waits_in_vain() and time.monotonic() < until:
        time.sleep(0.05)
    if waits_in_vain() or any(thread.is_alive() for thread in _unfinished):
        end_process(0 if failure is None else failure.status)  # the interpreter would wait for it
    _await_backend_threads()


def _await_backend_threads() -> None:
    """Wait until gloo's threads have let go of the last tensors, for which they need the interpreter.

    One that comes too late ends the process with "terminate called without an active exception". Their group joins them
    when it goes, but a wrapped model keeps it.
    """
    idle = 0
    for _ in range(5000):
        time.sleep(0.001)
        idle = 0 if "R" in _states_of_backend_threads() else idle + 1
        if idle == 2:  # in one look, a thread could be waiting for this one
            return


def _states_of_backend_threads() -> list[str]:
    """The states of gloo's threads; where none has a name of its own, as in torch 2.9, of all without one."""
    try:
        tasks = os.listdir("/proc/self/task")
        with open("/proc/self/comm", encoding="utf-8", errors="replace") as file:
            inherited = file.read().rstrip("\n")
    except OSError:  # not on this system
        time.sleep(0.01)
        return []
    of_python = {threading.get_native_id(), *(thread.native_id for thread in threading.enumerate())}
    named, nameless = [], []
    for task in tasks:
        with contextlib.suppress(OSError):  # it has ended
            with open(f"/proc/self/task/{task}/stat", encoding="utf-8", errors="replace") as file:
                _, name, state = file.read().replace("(", ")").split(")", 2)
            if name == "pt_gloo_runloop":
                named.append(state.split()[0])
            elif name == inherited and int(task) not in of_python:
                nameless.append(state.split()[0])
    return named or nameless
