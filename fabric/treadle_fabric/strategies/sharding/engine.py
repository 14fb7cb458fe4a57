"""The engine of sharded modules: it runs a module, or one of its methods, with its parameters gathered."""

from __future__ import annotations

import itertools
import sys
import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from treadle_fabric.checkpoint import is_sharded_tensor
from treadle_fabric.containers import leaves
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.strategies.parts import METHOD_KEYWORD
from treadle_fabric.strategies.sharding.replicated import ReplicatedGradients
from treadle_fabric.strategies.unwrapping import inside, user_module

__all__ = ["Engine", "ShardedEngine", "engine_around", "parameter_groups"]

_made = itertools.count()  # every process sets up the same modules in the same order
_engines: Final[weakref.WeakKeyDictionary[Module, weakref.ref[ShardedEngine]]] = weakref.WeakKeyDictionary()
"""The engine of each of the user's modules that is sharded: a module is sharded once, however often it is set up."""


class Engine(Module, ABC):
    """What runs a module of which a rank has a part."""

    running: bool
    """Whether a method runs through the engine."""

    @abstractmethod
    def expect_backward(self, loss: Tensor) -> None:
        """Get ready for a backward pass inside of the method that runs."""

    @abstractmethod
    def refresh(self) -> None:
        """Use no parameters that were gathered before."""

    @abstractmethod
    def keep_trainable(self) -> None:
        """Take over, while a method runs, which parameters were frozen or unfrozen in it."""

    @abstractmethod
    def join_forward(self, method: str) -> None:
        """Take part, with no batch, in the forward pass without gradients in which other ranks run a method."""

    @abstractmethod
    def finish_forward(self, method: str, grad: bool) -> None:
        """Take part in what is left of a pass of a method that ended early on this rank, and goes on on others."""


class ShardedEngine(Engine):
    """Runs a module, or one of its methods, as the forward pass of torch's ``fully_shard``.

    ``fully_shard`` is applied to this engine, so that it gathers, for every method that runs through the engine, the
    parameters that belong to none of the sharded submodules.

    Args:
        module: The user's module, or its compiled form, whose submodules are sharded.
    """

    module: Module
    synchronizes: bool
    """Whether backward passes reduce gradients over the ranks."""
    number: int
    """The same for this engine on every rank."""
    shards: bool
    """Whether parameters are DTensors."""
    _orders: dict[tuple[str, bool], list[tuple[Any, bool]]]
    """By the name of a method, and whether gradients were recorded: the sharded modules in the order in which they ran,
    and whether their backward passes end by themselves; of the pass in which most of them ran."""
    _ran: list[tuple[Any, bool]]
    """The same of the pass that runs, or ran last."""
    _trained: str
    """The method that ran last with gradients."""
    _joined: str
    """The method whose pass other ranks run."""
    _replicated: ReplicatedGradients | None
    _trainable: list[tuple[Any, bool]]
    """The engine's own parameters, and whether they required gradients when they were gathered."""
    _sharded: tuple[Any, ...] | None
    """The modules that ``fully_shard`` was applied to, from the outside; None where that is to be found out."""

    def __init__(self, module: Module) -> None:
        super().__init__()
        self.module = module
        fields = self.__dict__  # past Module.__setattr__, which is slow
        fields["running"] = False
        fields["synchronizes"] = True
        fields["_orders"], fields["_ran"] = {}, []
        fields["_trained"] = fields["_joined"] = "forward"
        fields["_replicated"] = fields["_sharded"] = None
        fields["_trainable"] = []
        fields["number"] = next(_made)
        fields["shards"] = self._has_parts()
        _engines[user_module(module)] = weakref.ref(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's ``forward``, or the method ``treadle_method`` of it."""
        run = kwargs.pop(METHOD_KEYWORD, self.module)
        fields, grad = self.__dict__, torch.is_grad_enabled()
        fields["running"] = True
        try:
            if run == self._visit:
                return run(*args, **kwargs)
            name, fields["_ran"] = getattr(run, "__name__", "forward"), []
            if grad:
                fields["_trained"] = name
                fields["_trainable"] = [(each, each.sharded_param.requires_grad) for each in self._own_parameters()]
            output = run(*args, **kwargs)
            if len(self._ran) > len(self._orders.get((name, grad), ())):
                self._orders[name, grad] = self._ran
            return output
        finally:
            fields["running"] = False
            if grad:
                self.keep_trainable()

    @contextmanager
    def no_sync(self) -> Generator[None]:
        """Leave gradients unreduced on each rank, as DDP's ``no_sync`` does."""
        before = self.synchronizes
        self.synchronize(False)
        try:
            yield
        finally:
            self.synchronize(before)

    def synchronize(self, enabled: bool) -> None:
        """Say whether the next backward passes reduce gradients over the ranks."""
        self.__dict__["synchronizes"] = enabled
        for module in self.sharded_modules():
            module.set_requires_gradient_sync(enabled, recurse=False)

    def forget_gradients(self) -> None:
        """Drop what backward passes left that did not reduce gradients, of a run that has ended: no zero_grad does."""
        for module in self.sharded_modules():
            for group in parameter_groups(module):
                for each in group.fsdp_params:
                    each.unsharded_accumulated_grad = None

    def replicate(self, parameters: Sequence[Parameter], groups: Sequence[Any]) -> None:
        """Let parameters that are not sharded have the mean of the gradients over process groups."""
        self.__dict__["_replicated"] = ReplicatedGradients(parameters, groups, lambda: self.synchronizes)

    def sharded(self) -> None:
        """Take notice that ``fully_shard`` was applied to submodules, and perhaps to this engine, the last of all."""
        self.__dict__["shards"], self.__dict__["_sharded"] = self._has_parts(), None
        self.register_forward_hook(_reshard_without_gradients, always_call=True)
        self.refuse_second_order()
        note: Any = self._note
        if "torch._dynamo" in sys.modules:  # and the module may be compiled
            note = torch.compiler.disable(note)  # type: ignore[no-untyped-call]
        for module in self.sharded_modules():
            if module is not self:
                module.register_forward_pre_hook(note, with_kwargs=True)
        self._begin_at_the_root()

    def _begin_at_the_root(self) -> None:
        """Let a submodule that runs before any step, in a method by hand, not be what torch takes for the whole."""
        handles: list[Any] = []

        def begin(*_: Any) -> None:
            for handle in handles:
                handle.remove()
            if self.root is not None:
                self.root._get_fsdp_state()._lazy_init()

        hook: Any = torch.compiler.disable(begin) if "torch._dynamo" in sys.modules else begin  # type: ignore[no-untyped-call]
        inner = [module for module in self.sharded_modules() if module is not self]
        handles += [module.register_forward_pre_hook(hook, prepend=True) for module in inner]

    def refuse_second_order(self) -> None:
        """Let no backward pass make a graph of itself, whose pass would read parameters that are freed by then."""
        for module in self.sharded_modules():
            state = module._get_fsdp_state()
            if not isinstance(state._pre_backward, _FirstOrder):
                state._pre_backward = _FirstOrder(state._pre_backward)

    def _has_parts(self) -> bool:
        return any(is_sharded_tensor(p) for p in self.module.parameters())

    @property
    def root(self) -> Any:
        """The engine, if ``fully_shard`` was applied to it; else None."""
        return self if hasattr(self, "_get_fsdp_state") else None

    @property
    def has_learned(self) -> bool:
        """Whether a forward pass with gradients has run."""
        return any(grad for _, grad in self._orders)

    def sharded_modules(self) -> tuple[Any, ...]:
        """The modules that ``fully_shard`` was applied to, from the outside."""
        if self._sharded is None:
            self.__dict__["_sharded"] = tuple(module for module in self.modules() if hasattr(module, "_get_fsdp_state"))
        return self._sharded  # type: ignore[return-value]

    def trained(self) -> list[Any]:
        """The parameters of this rank that require gradients: its parts, and those that it has whole."""
        groups = [group for m in self.sharded_modules() for group in parameter_groups(m)]
        parts = [each.sharded_param for group in groups for each in group.fsdp_params]
        whole = self._replicated.parameters if self._replicated is not None else []
        return [p for p in (*parts, *whole) if p.requires_grad]

    # Backward passes and steps inside of a method that runs

    def expect_backward(self, loss: Tensor) -> None:
        """Get the engine's own parameters ready for a backward pass inside of the forward that runs."""
        if self.root is not None and loss.requires_grad:
            loss.register_hook(self.root._get_fsdp_state()._pre_backward)  # type: ignore[no-untyped-call]

    def refresh(self) -> None:
        """Gather parameters anew at their next use, which is now for the engine's own if a method runs."""
        self.keep_trainable()
        self.free()
        if self.running and self.root is not None:
            self.root.unshard()

    def free(self) -> None:
        """Free all gathered parameters, those too that torch keeps for a backward pass."""
        for module in self.sharded_modules():
            if module is not self:
                module.reshard()
                continue
            for group in parameter_groups(module):
                with group.use_training_state(type(group._training_state).IDLE):  # while it runs, torch keeps them
                    group.reshard()

    def keep_trainable(self) -> None:
        """Let the engine's own parameters and their parts require gradients alike.

        While a method runs, the module shows gathered parameters, and the optimizer has the parts: either may have been
        frozen or unfrozen since they were gathered.
        """
        for index, (each, before) in enumerate(self._trainable):
            part, whole = each.sharded_param, each.unsharded_param
            if part.requires_grad != before:
                whole.requires_grad_(part.requires_grad)
            elif whole.requires_grad != before:
                part.requires_grad_(whole.requires_grad)
            else:
                continue
            self._trainable[index] = (each, part.requires_grad)
        if not self.running:
            self._trainable.clear()

    def _own_parameters(self) -> Iterator[Any]:
        """What torch keeps of each parameter that belongs to none of the sharded submodules."""
        return (
            (each for group in parameter_groups(self) for each in group.fsdp_params)
            if self.root is not None
            else iter(())
        )

    # Ranks that have nothing to run

    def join_forward(self, method: str) -> None:
        """Gather parameters, without gradients, in the order in which a method does."""
        self.__dict__["_joined"] = method
        with torch.no_grad():
            self(**{METHOD_KEYWORD: self._visit})

    def finish_forward(self, method: str, grad: bool) -> None:
        """Gather what the last pass of a method on this rank ended without, and other ranks gather."""
        ran, left = Counter(id(module) for module, _ in self._ran), []
        for module, ends in self._order(method, grad):
            if not ran[id(module)]:
                left.append((module, ends))
            ran[id(module)] -= ran[id(module)] > 0
        with torch.set_grad_enabled(grad):
            _pass_through(left)

    def join_backward(self) -> None:
        """Gather parameters, and reduce gradients of zero, as a backward pass of the last forward pass does."""
        device = next(self.module.parameters()).device
        _Joining.apply(torch.zeros((), device=device, requires_grad=True), self).backward()  # type: ignore[no-untyped-call]
        if self._replicated is not None and self.synchronizes:
            self._replicated.average()

    def _note(self, module: Module, args: Any, kwargs: Any) -> None:
        """A sharded module runs; its backward pass ends by itself if an input has a gradient."""
        given = leaves((args, kwargs)) if torch.is_grad_enabled() else ()
        self._ran.append((module, any(t.requires_grad for t in given if isinstance(t, Tensor))))

    def _visit(self) -> None:
        """Gather and free the parameters of the sharded modules one after the other."""
        _pass_through(self._order(self._joined, False))

    def _order(self, method: str, grad: bool) -> list[tuple[Any, bool]]:
        """In which order the sharded modules run in a method.

        Where this rank has not run the method, that of another one; without any, that of their registration.
        """
        for key in ((method, grad), (method, not grad), *self._orders):
            if key in self._orders:
                return self._orders[key]
        return [(m, i > 0) for i, m in enumerate(m for m in self.sharded_modules() if m is not self)]

    def _visit_backwards(self, gradient: Tensor) -> None:
        """Do what the backward pass of the last forward pass would, with gradients of zero."""
        self.root._get_fsdp_state()._pre_backward(gradient)
        for module, ends, begins in reversed([*_nested(self._order(self._trained, True)), (self, False, False)]):
            state = module._get_fsdp_state()
            if not begins:  # where the forward pass ends
                if module is not self:
                    state._pre_backward(gradient)
                for group in parameter_groups(module):
                    for each in group.fsdp_params:
                        whole = each.unsharded_param
                        if whole.requires_grad and whole.grad is None:
                            whole.grad = torch.zeros_like(whole)
            elif ends:
                for group in parameter_groups(module):
                    group.post_backward()


class _Joining(torch.autograd.Function):
    """A zero, whose backward pass is that of other ranks."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, engine: ShardedEngine) -> Tensor:
        ctx.engine = engine
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.engine._visit_backwards(gradients[0])
        return gradients[0], None


def _pass_through(order: Iterable[tuple[Any, bool]]) -> None:
    """Gather and free the parameters of sharded modules, as their forward passes do."""
    for module, _, begins in _nested(order):
        state = module._get_fsdp_state()
        if begins:
            state._pre_forward(module, (), {})
        else:
            state._post_forward(module, (), None)


def _nested(order: Iterable[tuple[Any, bool]]) -> Iterator[tuple[Any, bool, bool]]:
    """Where each pass of an order begins, and where it ends: after those of the modules that are inside of it."""
    around: list[tuple[Any, bool]] = []
    for module, ends in order:
        while around and not any(each is module for each in around[-1][0].modules() if each is not around[-1][0]):
            yield *around.pop(), False
        around.append((module, ends))
        yield module, ends, True
    while around:
        yield *around.pop(), False


def parameter_groups(module: Any) -> Any:
    """The groups of parameters that torch gathers together for a sharded module."""
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]  # torch 2.9 has one at most


def engine_around(module: Module) -> ShardedEngine | None:
    """The engine that was made for a module, by any strategy.

    A module that was put back as it was before, after a search for example, has whole parameters again and no engine.
    """
    own = user_module(module)
    reference = _engines.get(own)
    if reference is None:
        return None
    engine = reference()
    if engine is not None:
        engine.__dict__["_sharded"] = None  # it may be sharded no more
        engine.refresh()
    if any(is_sharded_tensor(p) for p in own.parameters()) or (engine is not None and not engine.shards):
        return engine
    from torch.distributed import _composable_state  # heavy

    del _engines[own]
    for part in own.modules():  # else torch would take the parts for sharded ones
        _composable_state._module_state_mapping.pop(part, None)
    return None


@inside.register
def _(engine: ShardedEngine) -> Module:
    return engine.module


class _FirstOrder:
    """What torch does before a backward pass through a sharded module, which makes no graph."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __call__(self, gradient: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise MisconfigurationException(
                "create_graph=True in a backward pass through a model whose parameters are sharded by fully_shard: the"
                " gathered parameters are freed after that pass, and a gradient of its gradients, such as a gradient"
                " penalty, would be computed with what is in that memory then. Keep this model whole, strategy='ddp';"
                " or leave the submodules out of the policy, FSDPStrategy(policy=lambda module: False), and compute the"
                " penalty inside of the step."
            )
        return self._inner(gradient)


def _reshard_without_gradients(engine: Any, args: Any, output: Any) -> None:
    """Free the parameters that torch keeps for a backward pass, where none comes."""
    if not torch.is_grad_enabled():
        engine.free()
