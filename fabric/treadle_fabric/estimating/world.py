"""A process group of any number of ranks, of which this process is one, that sends nothing."""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from typing import Any, Final
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from treadle_fabric.environments import ClusterEnvironment
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.randomness import isolate_rng

__all__ = ["PlannedEnvironment", "ghost_world"]

MAX_RANKS: Final = 4096


class PlannedEnvironment(ClusterEnvironment):
    """One rank of a run that is planned.

    Args:
        rank: This rank among all.
        world_size: The number of ranks.
        ranks_of_machine: The number of ranks of each machine.
    """

    creates_processes_externally = True
    main_address = "planned"
    main_port = 1

    def __init__(self, rank: int, world_size: int, ranks_of_machine: int) -> None:
        self._rank = rank
        self._world_size = world_size
        self._ranks_of_machine = ranks_of_machine

    @staticmethod
    def detect() -> bool:
        """Never."""
        return False

    def world_size(self) -> int:
        return self._world_size

    def set_world_size(self, size: int) -> None:
        """Do nothing: the plan says how many there are."""

    def global_rank(self) -> int:
        return self._rank

    def set_global_rank(self, rank: int) -> None:
        """Do nothing: the plan says which rank this is."""

    def local_rank(self) -> int:
        return self._rank % self._ranks_of_machine

    def node_rank(self) -> int:
        return self._rank // self._ranks_of_machine


@contextlib.contextmanager
def ghost_world(rank: int, world_size: int) -> Generator[None]:
    """Let this process be a rank of a process group of torch's backend ``fake``, and leave nothing behind.

    Raises:
        MisconfigurationException: This process is in a process group already.
    """
    if dist.is_available() and dist.is_initialized():
        raise MisconfigurationException(
            f"estimate() makes a process group of its own, and this process is rank {dist.get_rank()} of"
            f" {dist.get_world_size()} in one already. Call it before fabric.launch() or trainer.fit(), or in another"
            " process."
        )
    from torch.testing._internal.distributed.fake_pg import FakeStore  # for those who plan

    inference, dtype = torch.is_inference_mode_enabled(), torch.get_default_dtype()
    if inference:
        raise MisconfigurationException("estimate() runs a backward pass: call it outside of torch.inference_mode().")
    with contextlib.ExitStack() as stack:
        stack.enter_context(isolate_rng())
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(warnings.catch_warnings())
        stack.callback(torch.set_default_dtype, dtype)
        stack.callback(setattr, sys, "excepthook", sys.excepthook)  # torch's writes the rank before every line
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        stack.callback(_end)
        # DDP compares shapes, and orders its buckets, in C++ and by the values of small tensors
        stack.enter_context(mock.patch("torch.nn.parallel.distributed._verify_param_shape_across_processes"))
        reducer: Any = vars(dist)["Reducer"]
        stack.enter_context(mock.patch.object(reducer, "_rebuild_buckets", _rebuilder(reducer)))
        stack.enter_context(_few_chunks())
        from torch.distributed.device_mesh import DeviceMesh  # heavy

        for name in ("__init__", "__getitem__", "_flatten"):
            stack.enter_context(mock.patch.object(DeviceMesh, name, _with_values(getattr(DeviceMesh, name))))
        # ranks that share layers compare what they have, which is a matter of values, and of the first step only
        from treadle_fabric.strategies import model_parallel  # heavy

        for name in ("align_random_state", "check_inputs_alike", "check_gradients_alike"):
            stack.enter_context(mock.patch.object(model_parallel, name, _nothing))
        # whether gradients are finite is a value, too
        stack.enter_context(mock.patch.object(torch.amp.GradScaler, "_maybe_opt_step", _step_always))
        yield


def _rebuilder(reducers: Any) -> Callable[[Any], Any]:
    rebuild = reducers._rebuild_buckets

    def rebuild_buckets(reducer: Any) -> Any:
        with _Indices():  # type: ignore[no-untyped-call]
            return rebuild(reducer)

    return rebuild_buckets


class _Indices(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets small tensors of integers have memory and values, among tensors that have none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch._subclasses.fake_tensor import FakeTensor  # for those who plan

        kwargs = kwargs or {}
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        dtype = kwargs.get("dtype", torch.float32)
        if any(isinstance(each, FakeTensor) for each in tensors) or (not tensors and dtype.is_floating_point):
            return func(*args, **kwargs)
        with _disable_current_modes():
            return func(*args, **kwargs)


def _few_chunks() -> AbstractContextManager[Any]:
    """Let ``fully_shard``, which cuts a parameter into parts for all ranks, make those that it looks at."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param  # heavy

    if not hasattr(_fsdp_param, "_chunk_with_empty"):
        return contextlib.nullcontext()  # another torch, where it takes its time
    return mock.patch.object(_fsdp_param, "_chunk_with_empty", _Chunks)


class _Chunks:
    """The parts of a tensor along a dimension, as ``torch.chunk`` makes them, and empty ones after the last."""

    def __init__(self, tensor: torch.Tensor, num_chunks: int, dim: int) -> None:
        self._tensor = tensor
        self._dim = dim
        self._size = -(-tensor.shape[dim] // num_chunks)

    def __getitem__(self, index: int) -> torch.Tensor:
        start, end = self._size * index, self._tensor.shape[self._dim]
        if start >= end:
            return self._tensor.new_empty(0)
        return self._tensor.narrow(self._dim, start, min(self._size, end - start))


def _with_values(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method make tensors with values, also where others have none."""

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return method(*args, **kwargs)

    return run


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Take the place of what needs values."""


def _step_always(scaler: Any, optimizer: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
    return optimizer.step(*args, **kwargs)


def _end() -> None:
    dist.destroy_process_group()
    from torch.distributed.tensor import DTensor  # heavy

    # what torch knows of operations on sharded tensors has meshes in it, of groups that are no more
    propagator: Any = DTensor._op_dispatcher.sharding_propagator
    cached = propagator.propagate_op_sharding
    if hasattr(cached, "cache_clear"):
        cached.cache_clear()
    else:  # torch 2.9: a cache of each thread
        cached.cache.cache_clear()
    clear: Any = getattr(torch._C, "_clear_DTensor_sharding_propagator_cache", lambda: None)
    clear()
