"""How DDP exchanges gradients: communication hooks, their state, and what a checkpoint keeps of it.

A hook is what the user gave (:class:`Communication`), or none. Each module that is set up has an :class:`Exchange` of
its own: hooks such as PowerSGD remember something of each bucket of gradients, and two modules have other buckets.
"""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from treadle_fabric.rank_zero import rank_zero_warn
from treadle_fabric.strategies.data_parallel.hook_checks import (
    check_arguments,
    check_module,
    is_local_sgd,
    is_power_sgd,
)

__all__ = ["Communication", "Exchange", "communicate"]

_GROUPS = ("process_group", "subgroup")  # the attributes of torch's states that belong to one process
_COUNTERS = ("iter", "total_numel_before_compression", "total_numel_after_compression", "next_stats_report")
_MEMORIES = ("error_dict", "p_memory_dict", "q_memory_dict")

Hook = Callable[[Any, Any], Any]


class Communication:
    """What the user of a DDP strategy gave to exchange gradients with.

    Args:
        state: The hook's first argument.
        hook: A communication hook of DDP: a function of a state and a bucket, which returns a future.
        wrapper: Makes another hook of the hook.
        averages: Whether models are averaged.
        static_graph: Whether DDP gets that argument.

    Raises:
        MisconfigurationException: The arguments do not fit together.
    """

    def __init__(
        self,
        state: Any = None,
        hook: Any = None,
        wrapper: Any = None,
        averages: bool = False,
        static_graph: bool = False,
    ) -> None:
        check_arguments(state, hook, wrapper, averages, static_graph)
        self._state, self._hook, self._wrapper = state, hook, wrapper
        self._copies = is_power_sgd(state) or is_local_sgd(state)
        self._initial = _fields(state) if self._copies else {}
        self.exchanges: WeakKeyDictionary[Module, Exchange] = WeakKeyDictionary()
        """How the gradients of each module are exchanged; the module that was set up last is at the end."""

    def __getstate__(self) -> dict[str, Any]:
        """What travels to another process, which has groups of its own."""
        state: Any = self._state
        if self._copies:
            own = [name for name in _GROUPS if self._initial.get(name) is not None]
            if own:
                rank_zero_warn(
                    f"{type(state).__name__}({own[0]}=...) is copied without that process group, which belongs to this"
                    " process. Leave it out, or make the groups where the processes run."
                )
            state = type(state), {**self._initial, **{name: None for name in _GROUPS if name in self._initial}}
        return {**self.__dict__, "_state": state, "_initial": {}, "exchanges": None}

    def __setstate__(self, fields: dict[str, Any]) -> None:
        self.__dict__.update(fields)
        self.exchanges = WeakKeyDictionary()
        if self._copies:
            kind, self._initial = self._state
            self._state = _built(kind, self._initial)

    def exchange_of(self, module: Module, device: torch.device, scales: bool, ranks_of_machine: int) -> Exchange:
        """How the gradients of a module are exchanged; every process calls this.

        Args:
            module: The user's module. One that was set up before goes on with what its hook remembers.
            device: This process's.
            scales: Whether the precision scales losses.
            ranks_of_machine: Their number, for hooks that tell machines apart.

        Raises:
            MisconfigurationException: The hook cannot exchange the gradients of this module.
        """
        check_module(self._state, self._hook, self._wrapper, module, device, scales)
        known = self.exchanges.pop(module, None)
        self.exchanges[module] = known = known or self._new(ranks_of_machine)
        return known

    def _new(self, ranks_of_machine: int) -> Exchange:
        hook, state, wrapper = self._hook, self._state, self._wrapper
        if hook is None:
            return Exchange()
        if self._copies and any(isinstance(e, HookExchange) and e.state is state for e in self.exchanges.values()):
            groups = {name: getattr(state, name) for name in _GROUPS if name in self._initial}
            state = _built(type(state), {**self._initial, **groups})
        if is_power_sgd(state):
            return PowerSGDExchange(state, hook, wrapper)
        if is_local_sgd(state):
            return LocalSGDExchange(state, hook, wrapper, ranks_of_machine)
        return StatefulExchange(state, hook, wrapper)


class Exchange:
    """How the gradients of one module are exchanged: here by DDP's own all-reduce, which remembers nothing."""

    remembers_buckets: ClassVar[bool] = False
    """Something is kept for each bucket: a resumed run needs the same buckets."""
    local = False
    """Whether the last backward pass left gradients that are not the same on all ranks."""
    parts_ranks: bool = False
    """Whether the parameters may differ between ranks by now."""

    def attach(self, ddp: DistributedDataParallel, names: dict[int, str]) -> None:
        """Exchange the gradients of ``ddp``, which was just made.

        Args:
            ddp: Where the hook goes.
            names: The names of the parameters, by identity.
        """

    def regroup(self) -> None:
        """Take notice that gradients come in other buckets from now on."""

    def shared_by(self) -> tuple[int, int] | None:
        """The first of the ranks that share the gradients of the next backward pass, and their number. None: all."""
        return None

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """While entered, gradients are exchanged by an all-reduce of which no hook learns."""
        yield

    def state_dict(self) -> dict[str, Any]:
        """What this rank's hook remembers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device, same_ranks: bool) -> None:
        """Take back what :meth:`state_dict` returned; with nothing, begin anew.

        Args:
            state: Of this rank, or of one of another number of ranks.
            device: Where tensors belong.
            same_ranks: Whether there was the same number of ranks.
        """


def communicate(state, bucket):  # type: ignore[no-untyped-def] # torch wants its own annotations, or none
    """The communication hook that DDP gets, whose state is the :class:`Exchange`."""
    return state.run(bucket)


class HookExchange(Exchange, ABC):
    """Gradients are exchanged by a hook.

    Args:
        state: The hook's first argument.
        hook: The user's.
        wrapper: Makes another hook of it. Default: none.
    """

    def __init__(self, state: Any, hook: Hook, wrapper: Callable[[Hook], Hook] | None) -> None:
        self.state, self._hook = state, hook
        self._names: dict[int, str] = {}
        self._silent = False
        inner = functools.wraps(hook, ("__name__", "__qualname__", "__doc__"), ())(functools.partial(self._exchange))
        self._run: Hook = inner if wrapper is None else wrapper(inner)

    @abstractmethod
    def _exchange(self, state: Any, bucket: Any) -> Any:
        """Have the hook exchange a bucket."""

    @abstractmethod
    def _prepare(self) -> None:
        """Make ready for a first exchange; every rank calls this."""

    def run(self, bucket: Any) -> Any:
        """Exchange a bucket of gradients: give the future of their mean."""
        return _all_reduce(None, bucket) if self._silent else self._run(self.state, bucket)

    def attach(self, ddp: DistributedDataParallel, names: dict[int, str]) -> None:
        self._names = names
        self._prepare()
        ddp.register_comm_hook(self, communicate)

    @contextmanager
    def silenced(self) -> Iterator[None]:
        self._silent = True
        try:
            yield
        finally:
            self._silent = False


class StatefulExchange(HookExchange):
    """By a hook of which only its state knows what it keeps, if that has a ``state_dict``."""

    def _exchange(self, state: Any, bucket: Any) -> Any:
        return self._hook(state, bucket)

    def _prepare(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        save = getattr(self.state, "state_dict", None)
        return {"state": save()} if callable(save) else {}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device, same_ranks: bool) -> None:
        load = getattr(self.state, "load_state_dict", None)
        if callable(load) and same_ranks and "state" in state:
            load(state["state"])


class PowerSGDExchange(HookExchange):
    """By PowerSGD, which keeps an error and two factors for each bucket.

    While DDP still arranges its buckets, gradients are exchanged whole. Errors of buckets that there are no more are
    added to the gradients that are exchanged next, so that nothing of what was learned is lost.
    """

    remembers_buckets = True

    def __init__(self, state: Any, hook: Hook, wrapper: Callable[[Hook], Hook] | None) -> None:
        super().__init__(state, hook, wrapper)
        self._initial = _fields(state)
        self._settling = self._waits = False
        self._members: dict[int, list[tuple[str, int]]] = {}  # of each bucket: the names and the numbers of elements
        self._left: dict[str, Tensor] = {}

    def _prepare(self) -> None:
        # The hook issues further collectives when one is done. Gloo has them done by its few threads, which then wait
        # for each other, and issue those of two buckets in another order on another rank.
        self._waits = "nccl" not in dist.get_backend(self.state.process_group)

    def _exchange(self, state: Any, bucket: Any) -> Any:
        if not self._settling:
            if bucket.index() not in self._members:
                parameters = bucket.parameters()
                self._members[bucket.index()] = [(self._names[id(p)], p.numel()) for p in parameters]
            future = self._hook(state, bucket)
            if self._waits:
                future.wait()
            return future
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            error = self._left.pop(self._names[id(parameter)], None)
            if error is not None:  # in the order of the elements in memory
                gradient.add_(error.as_strided(gradient.shape, gradient.stride()))
        if bucket.is_last():
            self._settling = False
            self._left.clear()  # of what is no longer trained
        state.maybe_increase_iter(bucket)
        return _all_reduce(state.process_group, bucket)

    def regroup(self) -> None:
        state = self.state
        for index, error in state.error_dict.items():
            begin = 0
            for name, size in self._members.get(index, ()):
                self._left[name] = error[begin : begin + size]
                begin += size
        for memory in (self._members, *(getattr(state, name) for name in _MEMORIES)):
            memory.clear()
        self._settling = bool(state.use_error_feedback or state.warm_start)

    def state_dict(self) -> dict[str, Any]:
        state = self.state
        _, keys, position, has_gauss, gauss = state.rng.get_state()
        return {
            "counters": {name: getattr(state, name) for name in _COUNTERS},
            "memories": {m: {str(i): t.detach().clone() for i, t in getattr(state, m).items()} for m in _MEMORIES},
            "rng": {"keys": torch.tensor(keys.tolist()), "position": position, "gauss": gauss if has_gauss else None},
            "settling": self._settling,
            "members": {str(i): [list(pair) for pair in each] for i, each in self._members.items()},
            "left": dict(self._left),
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device, same_ranks: bool) -> None:
        mine = self.state
        if not state:
            _fill(mine, {**self._initial, **{name: getattr(mine, name) for name in _GROUPS if name in self._initial}})
            self._members.clear()
            self._left.clear()
            self.regroup()
            return
        for name, value in state["counters"].items():
            setattr(mine, name, value)
        rng, gauss = state["rng"], state["rng"]["gauss"]
        keys = rng["keys"].numpy().astype("uint32")
        mine.rng.set_state(("MT19937", keys, rng["position"], int(gauss is not None), gauss or 0.0))
        self._members.clear()  # the errors of now are given up
        self._left.clear()
        self.regroup()
        if same_ranks:
            for memory, tensors in state["memories"].items():
                getattr(mine, memory).update({int(i): t.to(device, copy=True) for i, t in tensors.items()})
            self._settling = state["settling"]
            self._members = {int(i): [(name, size) for name, size in each] for i, each in state["members"].items()}
            self._left = {name: error.to(device) for name, error in state["left"].items()}


class LocalSGDExchange(HookExchange):
    """By post-local SGD: after a number of steps, gradients are averaged on each machine alone.

    Args:
        state: The hook's first argument.
        hook: The user's.
        wrapper: Makes another hook of it. Default: none.
        ranks_of_machine: The number of ranks that average gradients, where the state has no group.
    """

    def __init__(self, state: Any, hook: Hook, wrapper: Callable[[Hook], Hook] | None, ranks_of_machine: int) -> None:
        super().__init__(state, hook, wrapper)
        self._ranks = ranks_of_machine
        self._began = state.iter

    def _prepare(self) -> None:
        state = self.state
        if state.subgroup is None and state.post_local_gradient_allreduce:  # torch counts GPUs, in the backward pass
            groups: Any = dist.new_subgroups(self._ranks, group=state.process_group)  # type: ignore[no-untyped-call]
            state.subgroup = groups[0]

    def _exchange(self, state: Any, bucket: Any) -> Any:
        self.local = state.iter >= state.start_localSGD_iter
        return self._hook(state, bucket)

    @property
    def parts_ranks(self) -> bool:  # type: ignore[override]
        return bool(self.state.iter >= self.state.start_localSGD_iter)

    def shared_by(self) -> tuple[int, int] | None:
        if not self.parts_ranks:
            return None
        if not self.state.post_local_gradient_allreduce:
            return dist.get_rank(), 1
        return dist.get_global_rank(self.state.subgroup, 0), dist.get_world_size(self.state.subgroup)

    def state_dict(self) -> dict[str, Any]:
        return {"iter": self.state.iter, "local": self.local}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device, same_ranks: bool) -> None:
        self.state.iter = state.get("iter", self._began)
        self.local = state.get("local", False)


def _all_reduce(group: Any, bucket: Any) -> Any:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook  # only where there are hooks

    return allreduce_hook(group, bucket)


def _fields(state: Any) -> dict[str, Any]:
    """The attributes of one of torch's states, copies but for process groups."""
    slots = (name for cls in type(state).__mro__ for name in cls.__dict__.get("__slots__", ()))
    names = [name for name in (*slots, *getattr(state, "__dict__", ())) if hasattr(state, name)]
    return {name: value if name in _GROUPS else copy.deepcopy(value) for name, value in _values(state, names)}


def _values(state: Any, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    return ((name, getattr(state, name)) for name in names)


def _fill(state: Any, fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        setattr(state, name, value if name in _GROUPS else copy.deepcopy(value))


def _built(kind: Any, fields: Mapping[str, Any]) -> Any:
    state = kind.__new__(kind)
    _fill(state, fields)
    return state
