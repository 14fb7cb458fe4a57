"""The engine of DDP: it wraps the module again where other parameters are trainable than when it was wrapped."""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from datetime import timedelta
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.nn import Module, Parameter
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parallel import DistributedDataParallel

from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.failures import call_at_looks, current_member, notes
from treadle_fabric.rank_zero import rank_zero_info
from treadle_fabric.strategies.data_parallel.communication import Exchange, communicate
from treadle_fabric.strategies.data_parallel.hook_checks import sparse_tables
from treadle_fabric.strategies.parts import METHOD_KEYWORD
from treadle_fabric.strategies.unwrapping import inside, name_in, plain_name, user_module

__all__ = ["DDPEngine", "listed"]

_MAX_NAMED = 10
_made = itertools.count()  # every process sets up the same modules in the same order
_is_trainable = attrgetter("requires_grad")
_LEFT_ALONE = "_ddp_params_and_buffers_to_ignore"
"""The attribute of a module with the names of what DDP leaves to each rank."""


class DDPEngine(Module):
    """Runs a module, or one of its methods, under DDP, and keeps DDP in step with what is trainable.

    DDP averages the gradients of the parameters that were trainable when it wrapped the module, and waits for each of
    them. Before a forward pass the engine looks whether these are the parameters that are trainable now; if not, all
    ranks wrap the module again. A module without trainable parameters runs without DDP, which would refuse it. What the
    user's module names in ``_ddp_params_and_buffers_to_ignore`` is each rank's own, as DDP has it.

    Every attribute of :attr:`ddp` is one of the engine too.

    Args:
        module: The user's module, alike on every rank.
        timeout: How long a rank that has to wrap again waits for the others.
        wrapped: Called each time DDP has wrapped the module.
        exchange_of: Gives how the gradients of the user's module are exchanged.
        arguments: For ``DistributedDataParallel``.
        number: The same for this engine on every rank. Default: the next one.
    """

    ddp: DistributedDataParallel | None
    """The module under DDP; None while nothing is trainable."""
    exchange: Exchange
    """How gradients are exchanged."""

    def __init__(
        self,
        module: Module,
        timeout: timedelta | None,
        wrapped: Callable[[DDPEngine], None],
        exchange_of: Callable[[Module], Exchange],
        arguments: dict[str, Any],
        number: str = "",
    ) -> None:
        super().__init__()
        _count_registrations()
        self.target = MethodForward(module)
        self.number = number or str(next(_made))
        fields = self.__dict__  # past Module.__setattr__, which is slow, and would register DDP as a submodule
        fields["_wrapped"], fields["_exchange_of"], fields["_arguments"] = wrapped, exchange_of, arguments
        fields["exchange"] = exchange_of(user_module(module))
        fields["_arrangement"] = None  # the buckets that DDP is to fill from the next forward pass on
        fields["_spoiled"] = False  # DDP has not seen its static graph, and cannot see it any more
        fields["_timeout"] = timeout or default_pg_timeout
        fields["_generation"] = 0  # how often the module was wrapped again
        fields["_copies"] = itertools.count()
        fields["_forwards"] = itertools.count()
        fields["_begun"] = -1  # the number of the last forward pass that synchronizes
        fields["_inside"] = -1  # the number of the last one that had a backward pass in it
        fields["_synchronizes"] = True
        fields["_tolerant"] = arguments.get("find_unused_parameters", False) and not arguments.get("static_graph")
        self._note_parameters()
        self.exchange.regroup()
        self._run_under(DistributedDataParallel(self.target, **arguments) if self._trained else None)
        call_at_looks(self, DDPEngine._answer)

    @property
    def module(self) -> Module:
        """The user's module."""
        return self.target.module

    @property
    def trained(self) -> dict[str, Parameter]:
        """The parameters that DDP averages the gradients of, by name."""
        return dict(zip(self._names, self._trained, strict=True))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's ``forward``, or the method ``treadle_method`` of it."""
        if self._is_outdated():
            self._wrap_again()
        if self._synchronizes:
            self.__dict__["_begun"] = next(self._forwards)
        return self._run(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Generator[None]:
        """Leave gradients as they are on each rank, as DDP's ``no_sync`` does; DDP may wrap the module again inside."""
        before = self._synchronizes
        self._synchronize(False)
        try:
            yield
        finally:
            self._synchronize(before)

    def _synchronize(self, enabled: bool) -> None:
        self.__dict__["_synchronizes"] = enabled
        if self.ddp is not None:
            self.ddp.require_backward_grad_sync = enabled
            self._spare_static_graph(self.ddp)

    def _spare_static_graph(self, ddp: DistributedDataParallel) -> None:
        """Let a backward pass without synchronization not be the one that shows DDP the graph.

        Torch takes any first backward pass for that. DDP wraps the module anew before the first that synchronizes.
        """
        if ddp.static_graph and not self._synchronizes and not ddp._static_graph_delay_allreduce_enqueued:
            ddp._static_graph_delay_allreduce_enqueued = True
            self.__dict__.update(_spoiled=True, _run=self._run_anew)

    def _run_anew(self, *args: Any, **kwargs: Any) -> Any:
        if self._synchronizes and torch.is_grad_enabled():
            self._run_under(self._wrapped_like(self.ddp))
        assert self.ddp is not None
        return self.ddp(*args, **kwargs)

    def expect_backward(self, loss: Tensor) -> None:
        """Get DDP ready for a backward pass inside the forward that runs."""
        ddp, target = self.ddp, self.target
        if ddp is None:
            return
        if target.backward_inside is None:
            ddp.register_forward_hook(_put_back_sync, always_call=True)
            target.backward_inside = False
        if not self._synchronizes:
            return
        if not target.backward_inside:
            if not ddp.require_backward_grad_sync:  # no_sync of DDP's own
                return
            target.backward_inside = True
            ddp.require_backward_grad_sync = False  # or it would expect another one after the forward
        elif ddp.static_graph and self._inside == self._begun:  # torch calls no hook at the end of the first forward
            raise _not_static("a second backward pass in one step")
        if self._spoiled:
            raise _not_static("a first backward pass without synchronization, in a step that synchronizes another one")
        self.__dict__["_inside"] = self._begun
        ddp.require_forward_param_sync = True
        self._rebuild_buckets(ddp)
        search = ddp.find_unused_parameters and not ddp.static_graph
        ddp.reducer.prepare_for_backward([loss] if search else [])

    def after_backward(self) -> None:
        """Reduce the gradients of a backward pass inside the forward that runs, where DDP does not by itself."""
        ddp = self.ddp
        if ddp is not None and self._synchronizes and self.target.backward_inside and ddp.static_graph:
            if not ddp._static_graph_delay_allreduce_enqueued:  # the first step, which shows DDP the graph
                ddp._static_graph_delay_allreduce_enqueued = True
                ddp.reducer._delay_all_reduce()  # type: ignore[attr-defined] # not in torch's stubs

    # Buckets

    def buckets(self) -> list[list[str]] | None:
        """The names of the parameters in each bucket of gradients; every rank calls this.

        Returns:
            An empty list while DDP has yet to arrange its buckets, which it does after a first step. None where a
            resumed run gets the same buckets without being told, or cannot get them.
        """
        ddp = self.ddp
        if ddp is None or self._tolerant or ddp.static_graph or any(sparse_tables(self.module)):
            return None
        if self._arrangement is not None:
            return list(self._arrangement)
        try:
            self._rebuild_buckets(ddp)  # as the next forward pass would
            return self._buckets(ddp)
        except RuntimeError:  # a backward pass has failed; or there is no memory for the buckets that torch returns
            return None

    def arrange(self, buckets: Sequence[Sequence[str]] | None) -> bool:
        """Let DDP fill these buckets, with the names that :meth:`buckets` gave, from the next forward pass on.

        How floating-point numbers round in a sum over three and more ranks depends on their places in a bucket.

        Returns:
            False where other parameters are trained now, which come in other buckets.
        """
        fields, names = self.__dict__, [name for bucket in buckets or () for name in bucket]
        if names and sorted(names) != sorted(self._names):
            return False
        if self.ddp is not None and buckets is not None:
            fields["_arrangement"] = [list(bucket) for bucket in buckets]
            fields["_run"] = self._run_arranged
        return True

    def _run_arranged(self, *args: Any, **kwargs: Any) -> Any:
        """Arrange the buckets as told, and run the module; without gradients, other ranks may not run it now."""
        assert self.ddp is not None
        if torch.is_grad_enabled():
            self._arrange(self.ddp)
        return self.ddp(*args, **kwargs)

    def _arrange(self, ddp: DistributedDataParallel) -> None:
        fields = self.__dict__
        wanted, fields["_arrangement"], fields["_run"] = fields["_arrangement"], None, ddp
        if self._buckets(ddp) == wanted:
            return
        if ddp._has_rebuilt_buckets:
            ddp._remove_autograd_hooks()  # type: ignore[no-untyped-call]
            self._run_under(ddp := self._wrapped_like(ddp))
        order = [name for bucket in wanted for name in bucket]
        if order:  # DDP arranges by the order in which the gradients of a first backward pass come
            parameters = self.trained
            with self.exchange.silenced(), _without_traces(parameters.values()):
                ddp.reducer.prepare_for_backward([])
                for name in order:
                    parameters[name].reshape(-1)[:0].sum().backward()  # type: ignore[no-untyped-call]
                self._rebuild_buckets(ddp)

    def _rebuild_buckets(self, ddp: DistributedDataParallel) -> None:
        if ddp.reducer._rebuild_buckets():
            ddp._has_rebuilt_buckets = True

    def _buckets(self, ddp: DistributedDataParallel) -> list[list[str]]:
        if not ddp._has_rebuilt_buckets:
            return []
        names = self._names_by_id()
        return [[names[id(p)] for p in bucket.parameters()] for bucket in ddp.reducer._get_zeros_like_grad_buckets()]

    def _names_by_id(self) -> dict[int, str]:
        return {id(p): name for name, p in zip(self._names, self._trained, strict=True)}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            ddp = self.__dict__.get("ddp")
            if ddp is None:
                raise
            return getattr(ddp, name)

    def __reduce__(self) -> Any:
        # a copy has weights that are alike already, and other ranks need not copy
        arguments, number = {**self._arguments, "init_sync": False}, f"{self.number}.{next(self._copies)}"
        return DDPEngine, (self.module, self._timeout, self._wrapped, self._exchange_of, arguments, number)

    # What is trainable

    def _note_parameters(self) -> None:
        """Note what is trainable now, and what is left to each rank, which DDP is about to be told."""
        own, target = user_module(self.module), self.target
        alone = {name_in(own, name) for name in getattr(own, _LEFT_ALONE, ())}
        path = next(path for path, each in target.named_modules() if each is own)
        target.__dict__[_LEFT_ALONE] = {f"{path}.{name}" for name in alone}  # DDP looks in the module that it wraps
        found = list(own.named_parameters())
        named = [(plain_name(own, name), p) for name, p in found if name not in alone]
        fields = self.__dict__
        fields["_names"] = [name for name, p in named if p.requires_grad]
        fields["_trained"] = [p for _, p in named if p.requires_grad]
        fields["_frozen"] = [p for _, p in named if not p.requires_grad]
        fields["_alone"] = [p for name, p in found if name in alone]
        fields["_dtype"] = self._trained[0].dtype if self._trained else None
        fields["_registered"] = _registrations.count

    def _known(self) -> set[int]:
        return {*map(id, self._trained), *map(id, self._frozen), *map(id, self._alone)}

    def _is_outdated(self) -> bool:
        """Whether DDP would miss a gradient, or wait for one that does not come."""
        if self._registered != _registrations.count:  # a module somewhere got a parameter or a submodule
            self.__dict__["_registered"] = _registrations.count
            if {*map(id, self.module.parameters())} != self._known():
                return True
        if any(map(_is_trainable, self._frozen)):
            return True
        trained = self._trained
        if trained and trained[0].dtype is not self._dtype:  # a cast takes DDP's hooks off the parameters
            return True
        if self._tolerant or all(map(_is_trainable, trained)):
            return False
        # Where all is frozen, as that of a critic while a generator learns through it, no gradient comes, and DDP
        # does not wait for the first one
        return any(map(_is_trainable, trained))

    def _wrap_again(self) -> None:
        """Let DDP average the gradients of what is trainable now; every rank calls this before the same forward."""
        before, known = self.trained, self._known()
        self._note_parameters()
        fields, ddp, rank = self.__dict__, self.ddp, dist.get_rank()
        self._meet(json.dumps(self._names), _difference(before, self.trained), rank)
        group = self._arguments.get("process_group")
        for tensor in self.module.parameters():
            if id(tensor) not in known | {*map(id, self._alone)}:  # made by each rank for itself
                dist.broadcast(tensor.detach(), group=group, group_src=0)
        for parameter in before.values():
            if not parameter.requires_grad:
                _average_gradient(parameter, group)
        if ddp is not None:
            ddp._remove_autograd_hooks()  # type: ignore[no-untyped-call]
        self.exchange.regroup()
        self._run_under(self._wrapped_like(ddp) if self._trained else None)
        if fields["_generation"] == 0:
            rank_zero_info(
                f"What is trainable changed after set-up ({_difference(before, self.trained)}): the module is wrapped"
                " in DDP again, so that all ranks average these gradients. Each such change costs some milliseconds."
            )
        fields["_generation"] += 1

    def _wrapped_like(self, before: DistributedDataParallel | None) -> DistributedDataParallel:
        """Wrap the module; buffers and the state of a gradient accumulation stay as they are."""
        ddp = DistributedDataParallel(self.target, **{**self._arguments, "init_sync": False})
        ddp.require_backward_grad_sync = self._synchronizes
        self.target.backward_inside = None
        if before is not None:
            ddp.require_forward_param_sync = before.require_forward_param_sync
            for hook, state in before._comm_hooks:
                if hook is not communicate:  # registered by hand
                    ddp.register_comm_hook(state, hook)
        return ddp

    def _run_under(self, ddp: DistributedDataParallel | None) -> None:
        self.__dict__.update(ddp=ddp, _run=ddp or self.target, _arrangement=None, _spoiled=False)
        if ddp is not None:
            self._spare_static_graph(ddp)
            self.exchange.attach(ddp, self._names_by_id())
        self._wrapped(self)

    def _meet(self, names: str, difference: str, rank: int) -> None:
        """Wait until every rank wraps again, and see that all have the same in mind.

        Raises:
            MisconfigurationException: What is trainable changed on some ranks only.
        """
        store: Any = dist.distributed_c10d._get_default_store()
        key, member = f"treadle/wrap/{self.number}/{self._generation}", current_member()
        if rank == 0:
            store.set(f"{key}/names", names)
        if store.add(f"{key}/met", 1) == dist.get_world_size():
            store.set(f"{key}/all", "")
        changed, unchanged = (
            notes.Changed(self.number, self._generation),
            notes.Unchanged(self.number, self._generation),
        )
        until, pause = time.monotonic() + self._timeout.total_seconds(), 0.001
        while not store.check([f"{key}/all"]):
            time.sleep(pause := min(2 * pause, 0.05))
            if member is None and time.monotonic() < until:
                continue
            if member is not None:
                member.board.post(changed, str(self._begun + 1))
            other = member.board.read(unchanged) if member is not None else None
            if other is not None or time.monotonic() > until:
                who = "the other ranks" if other is None else f"rank {other}"
                raise MisconfigurationException(
                    f"What is trainable changed on rank {rank} ({difference}), and {who} went on without that change:"
                    " the gradients could not be averaged. Change requires_grad, and add parameters, on all ranks at"
                    " the same step."
                )
        theirs = store.get(f"{key}/names").decode()
        if theirs != names:
            parted = sorted({*json.loads(theirs)} ^ {*json.loads(names)})
            raise MisconfigurationException(
                f"What is trainable is not the same on rank {rank} as on rank 0: {listed(parted)}. Change"
                " requires_grad, and add parameters, on all ranks alike."
            )

    def _answer(self) -> None:
        """Tell a rank that waits for this one to wrap again if this one does not; another thread calls this."""
        member, this = current_member(), (self.number, self._generation)
        asked = None if member is None else member.board.read(notes.Changed(*this))
        if member is not None and asked is not None and self._begun >= int(asked):
            member.board.post(notes.Unchanged(*this), str(dist.get_rank()))


class MethodForward(Module):
    """Runs any method of a module as its forward, so that the engine around it sees every step."""

    module: Module

    def __init__(self, module: Module) -> None:
        super().__init__()
        self.module = module
        self.running = False
        self.backward_inside: bool | None = None
        """Whether the forward that runs had a backward pass in it; None where none ever had."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        method = kwargs.pop(METHOD_KEYWORD, None)
        if method is None:
            return self.module(*args, **kwargs)
        self.__dict__["running"] = True  # past Module.__setattr__, which is slow
        try:
            return method(*args, **kwargs)
        finally:
            self.__dict__["running"] = False


@inside.register
def _(wrapper: DDPEngine | MethodForward) -> Module:
    return wrapper.module


def _put_back_sync(ddp: Any, inputs: Any, output: Any) -> None:
    """The forward has ended: DDP prepares for backward passes by itself again."""
    if ddp.module.backward_inside:
        ddp.module.backward_inside = False
        ddp.require_backward_grad_sync = True


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def _difference(before: dict[str, Parameter], after: dict[str, Parameter]) -> str:
    added = [name for name in after if name not in before]
    removed = [name for name in before if name not in after]
    parts = [f"trainable now: {listed(added)}"] if added else []
    parts += [f"not any more: {listed(removed)}"] if removed else []
    return "; ".join(parts) or "other parameters or another dtype under the same names"


def _not_static(what: str) -> MisconfigurationException:
    return MisconfigurationException(
        f"static_graph=True, and {what}: DDP then expects the same graph in every backward pass. Leave static_graph"
        " out, or add up the losses and differentiate them once."
    )


def _average_gradient(parameter: Parameter, group: Any) -> None:
    """Average what a parameter that is frozen now had accumulated on each rank, since an optimizer may step with it."""
    gradient = parameter.grad
    there = torch.tensor(float(gradient is not None), device=parameter.device)
    dist.all_reduce(there, group=group)
    if there:
        gradient = torch.zeros_like(parameter) if gradient is None else gradient.detach()
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        dist.all_reduce(gradient, group=group)
        parameter.grad = gradient / dist.get_world_size(group)


@contextmanager
def _without_traces(parameters: Iterable[Parameter]) -> Generator[None]:
    """While entered, backward passes leave no gradient in the parameters, and call none of their hooks."""
    kept = [(p, p.grad) for p in parameters]
    of_each = [(p._backward_hooks, getattr(p, "_post_accumulate_grad_hooks", None)) for p, _ in kept]
    hooks = [(held, dict(held)) for pair in of_each for held in pair if held]
    try:
        for held, _ in hooks:
            held.clear()
        for p, _ in kept:
            p.grad = None
        with torch.enable_grad():
            yield
    finally:
        for p, gradient in kept:
            p.grad = gradient
        for held, before in hooks:
            held.update(before)


class _Registrations:
    count = 0


_registrations = _Registrations()


@functools.cache
def _count_registrations() -> None:
    """Count, from now on, the parameters and submodules that any module gets: so seldom that nobody pays for it."""

    def count(module: Module, name: str, value: Any) -> None:
        _registrations.count += 1

    register_module_parameter_registration_hook(count)
    register_module_module_registration_hook(count)
