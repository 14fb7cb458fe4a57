"""Collective operations on a group of one's own, where users of Lightning Fabric look for them.

Most programs need none of this: ``fabric.all_gather``, ``all_reduce``, ``broadcast`` and ``barrier`` work in the group
of all ranks.
"""

from __future__ import annotations

import datetime
import os
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Collective", "SingleDeviceCollective", "TorchCollective"]


class Collective(ABC):
    """A group of processes, and what they do together.

    Operations change the tensors that they are given, as those of ``torch.distributed``, and return them.
    """

    _users: ClassVar[WeakSet[Collective]] = WeakSet()  # those that were set up or have a group, until their teardown

    def __init__(self) -> None:
        self._group: Any = None

    @property
    def group(self) -> Any:
        """The group.

        Raises:
            RuntimeError: There is none yet.
        """
        if self._group is None:
            self._group = self.default_group()
        if self._group is None:
            raise RuntimeError(
                f"`{type(self).__name__}` does not own a group. HINT: try `collective.create_group().group`"
            )
        return self._group

    def setup(self, **kwargs: Any) -> Self:
        """Initialize the default group, if that is not done yet.

        Args:
            kwargs: Those of :meth:`init_group`.
        """
        if not self.is_initialized():
            self.init_group(**kwargs)
        self._users.add(self)
        return self

    def create_group(self, **kwargs: Any) -> Self:
        """Create a group for this object.

        Args:
            kwargs: Those of :meth:`new_group`.

        Raises:
            RuntimeError: It has one.
        """
        if self._group is not None:
            raise RuntimeError(f"`{type(self).__name__}` already owns a group.")
        self._group = self.new_group(**kwargs)
        self._users.add(self)
        return self

    def teardown(self) -> Self:
        """Destroy the group, and after the last one the default group, if an object of this class initialized it.

        Raises:
            RuntimeError: There is no group.
        """
        self.destroy_group(self.group)
        self._group = None
        self._users.discard(self)
        if not any(type(other) is type(self) for other in self._users):
            self.end()
        return self

    @classmethod
    def default_group(cls) -> Any:
        """Return the group of an object for which none was created. Default: None, for no such group."""
        return None

    @classmethod
    def end(cls) -> None:
        """Destroy the default group, if this class initialized it. Default: nothing."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """The number of this process in the group, from 0."""

    @property
    @abstractmethod
    def world_size(self) -> int:
        """The number of processes in the group."""

    @abstractmethod
    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        """Give all ranks the tensor of rank ``src``."""

    @abstractmethod
    def all_reduce(self, tensor: Tensor, op: Any = "sum") -> Tensor:
        """Reduce the tensors of all ranks, for all ranks."""

    @abstractmethod
    def reduce(self, tensor: Tensor, dst: int, op: Any = "sum") -> Tensor:
        """Reduce the tensors of all ranks, for rank ``dst``."""

    @abstractmethod
    def all_gather(self, tensor_list: list[Tensor], tensor: Tensor) -> list[Tensor]:
        """Give all ranks the tensors of all."""

    @abstractmethod
    def gather(self, tensor: Tensor, gather_list: list[Tensor], dst: int = 0) -> list[Tensor]:
        """Give rank ``dst`` the tensors of all."""

    @abstractmethod
    def scatter(self, tensor: Tensor, scatter_list: list[Tensor], src: int = 0) -> Tensor:
        """Give each rank one of the tensors of rank ``src``."""

    @abstractmethod
    def reduce_scatter(self, output: Tensor, input_list: list[Tensor], op: Any = "sum") -> Tensor:
        """Reduce lists of tensors, and give each rank one of the results."""

    @abstractmethod
    def all_to_all(self, output_tensor_list: list[Tensor], input_tensor_list: list[Tensor]) -> list[Tensor]:
        """Give each rank one tensor of each rank."""

    @abstractmethod
    def send(self, tensor: Tensor, dst: int, tag: int = 0) -> None:
        """Send a tensor to rank ``dst``."""

    @abstractmethod
    def recv(self, tensor: Tensor, src: int | None = None, tag: int = 0) -> Tensor:
        """Receive a tensor from rank ``src``; None: from any."""

    @abstractmethod
    def barrier(self, device_ids: list[int] | None = None) -> None:
        """Wait for all ranks."""

    @classmethod
    @abstractmethod
    def is_available(cls) -> bool:
        """Whether the operations can be used here."""

    @classmethod
    @abstractmethod
    def is_initialized(cls) -> bool:
        """Whether there is a default group."""

    @classmethod
    @abstractmethod
    def init_group(cls, **kwargs: Any) -> None:
        """Initialize the default group."""

    @classmethod
    @abstractmethod
    def new_group(cls, **kwargs: Any) -> Any:
        """Create a group."""

    @classmethod
    @abstractmethod
    def destroy_group(cls, group: Any) -> None:
        """Destroy a group."""


class TorchCollective(Collective):
    """The collective operations of ``torch.distributed``.

    Raises:
        RuntimeError: ``torch.distributed`` is not available.
    """

    manages_default_group: ClassVar[bool] = False
    """Whether :meth:`setup` of an object of this class has initialized the default group."""

    def __init__(self) -> None:
        if not dist.is_available():
            raise RuntimeError("Torch distributed is not available.")
        super().__init__()

    @classmethod
    def default_group(cls) -> Any:
        """Return the group of all ranks."""
        return dist.GroupMember.WORLD

    @property
    def rank(self) -> int:
        """The number of this process in the group, from 0."""
        return dist.get_rank(self.group)

    @property
    def world_size(self) -> int:
        """The number of processes in the group."""
        return dist.get_world_size(self.group)

    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        dist.broadcast(tensor, src, group=self.group)
        return tensor

    def all_reduce(self, tensor: Tensor, op: Any = "sum") -> Tensor:
        dist.all_reduce(tensor, op=_native(op), group=self.group)
        return tensor

    def reduce(self, tensor: Tensor, dst: int, op: Any = "sum") -> Tensor:
        dist.reduce(tensor, dst, op=_native(op), group=self.group)
        return tensor

    def all_gather(self, tensor_list: list[Tensor], tensor: Tensor) -> list[Tensor]:
        dist.all_gather(tensor_list, tensor, group=self.group)
        return tensor_list

    def gather(self, tensor: Tensor, gather_list: list[Tensor], dst: int = 0) -> list[Tensor]:
        dist.gather(tensor, gather_list, dst, group=self.group)
        return gather_list

    def scatter(self, tensor: Tensor, scatter_list: list[Tensor], src: int = 0) -> Tensor:
        dist.scatter(tensor, scatter_list, src, group=self.group)
        return tensor

    def reduce_scatter(self, output: Tensor, input_list: list[Tensor], op: Any = "sum") -> Tensor:
        dist.reduce_scatter(output, input_list, op=_native(op), group=self.group)
        return output

    def all_to_all(self, output_tensor_list: list[Tensor], input_tensor_list: list[Tensor]) -> list[Tensor]:
        dist.all_to_all(output_tensor_list, input_tensor_list, group=self.group)
        return output_tensor_list

    def send(self, tensor: Tensor, dst: int, tag: int = 0) -> None:
        dist.send(tensor, dst, tag=tag, group=self.group)

    def recv(self, tensor: Tensor, src: int | None = None, tag: int = 0) -> Tensor:
        dist.recv(tensor, src, tag=tag, group=self.group)
        return tensor

    def all_gather_object(self, object_list: list[Any], obj: Any) -> list[Any]:
        """Give all ranks the objects of all."""
        dist.all_gather_object(object_list, obj, group=self.group)
        return object_list

    def broadcast_object_list(self, object_list: list[Any], src: int, device: torch.device | None = None) -> list[Any]:
        """Give all ranks the objects of rank ``src``."""
        dist.broadcast_object_list(object_list, src, group=self.group, device=device)
        return object_list

    def gather_object(self, obj: Any, object_gather_list: list[Any], dst: int = 0) -> list[Any]:
        """Give rank ``dst`` the objects of all."""
        dist.gather_object(obj, object_gather_list, dst, group=self.group)
        return object_gather_list

    def scatter_object_list(
        self, scatter_object_output_list: list[Any], scatter_object_input_list: list[Any], src: int = 0
    ) -> list[Any]:
        """Give each rank one of the objects of rank ``src``."""
        dist.scatter_object_list(scatter_object_output_list, scatter_object_input_list, src, group=self.group)
        return scatter_object_output_list

    def barrier(self, device_ids: list[int] | None = None) -> None:
        """Wait for all ranks of the group; others go on."""
        if self.group != dist.GroupMember.NON_GROUP_MEMBER:
            dist.barrier(group=self.group, device_ids=device_ids)

    def monitored_barrier(self, timeout: datetime.timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """Wait for all ranks; after the timeout, the error names one that is missing, or all of them."""
        dist.monitored_barrier(group=self.group, timeout=timeout, wait_all_ranks=wait_all_ranks)

    @classmethod
    def is_available(cls) -> bool:
        return dist.is_available()

    @classmethod
    def is_initialized(cls) -> bool:
        return dist.is_available() and dist.is_initialized()

    @classmethod
    def init_group(cls, main_address: str | None = None, main_port: str | None = None, **kwargs: Any) -> None:
        """Initialize the default group.

        Args:
            main_address: The host of rank 0, where MASTER_ADDR is not set.
            main_port: A port there, where MASTER_PORT is not set.
            kwargs: Those of ``torch.distributed.init_process_group``.
        """
        given = {"MASTER_ADDR": main_address, "MASTER_PORT": main_port}
        added = {name: str(value) for name, value in given.items() if value is not None and name not in os.environ}
        os.environ.update(added)
        try:
            dist.init_process_group(**kwargs)
        finally:
            for name in added:
                os.environ.pop(name, None)
        TorchCollective.manages_default_group = True

    @classmethod
    def new_group(cls, **kwargs: Any) -> Any:
        return dist.new_group(**kwargs)

    @classmethod
    def destroy_group(cls, group: Any) -> None:
        """Destroy a group; ranks that are not in it do nothing."""
        if group != dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)

    @classmethod
    def end(cls) -> None:
        """Destroy the default group, if this class initialized it."""
        if TorchCollective.manages_default_group and cls.is_initialized():
            dist.destroy_process_group()
        TorchCollective.manages_default_group = False


class SingleDeviceCollective(Collective):
    """The collective operations of one process: each returns what it was given."""

    @property
    def rank(self) -> int:
        """Always 0."""
        return 0

    @property
    def world_size(self) -> int:
        """Always 1."""
        return 1

    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        return tensor

    def all_reduce(self, tensor: Tensor, op: Any = "sum") -> Tensor:
        return tensor

    def reduce(self, tensor: Tensor, dst: int, op: Any = "sum") -> Tensor:
        return tensor

    def all_gather(self, tensor_list: list[Tensor], tensor: Tensor) -> list[Tensor]:
        return [tensor]

    def gather(self, tensor: Tensor, gather_list: list[Tensor], dst: int = 0) -> list[Tensor]:
        return [tensor]

    def scatter(self, tensor: Tensor, scatter_list: list[Tensor], src: int = 0) -> Tensor:
        return scatter_list[0]

    def reduce_scatter(self, output: Tensor, input_list: list[Tensor], op: Any = "sum") -> Tensor:
        return input_list[0]

    def all_to_all(self, output_tensor_list: list[Tensor], input_tensor_list: list[Tensor]) -> list[Tensor]:
        return input_tensor_list

    def send(self, tensor: Tensor, dst: int, tag: int = 0) -> None: ...

    def recv(self, tensor: Tensor, src: int | None = None, tag: int = 0) -> Tensor:
        return tensor

    def barrier(self, device_ids: list[int] | None = None) -> None: ...

    @classmethod
    def is_available(cls) -> bool:
        return True

    @classmethod
    def is_initialized(cls) -> bool:
        return True

    @classmethod
    def init_group(cls, **kwargs: Any) -> None: ...

    @classmethod
    def new_group(cls, **kwargs: Any) -> Any:
        return object()

    @classmethod
    def destroy_group(cls, group: Any) -> None: ...


def _native(op: Any) -> Any:
    """The reduction of ``torch.distributed`` that an argument means.

    Raises:
        ValueError: There is none.
    """
    if isinstance(op, dist.ReduceOp | dist.ReduceOp.RedOpType):
        return op
    if not isinstance(op, str):
        raise ValueError(f"Unsupported op {op!r} of type {type(op).__name__}")
    if (found := getattr(dist.ReduceOp, op.upper(), None)) is None:
        raise ValueError(f"op {op.upper()!r} is not a member of `ReduceOp`")
    return found
