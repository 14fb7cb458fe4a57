"""The engine of sharded modules: it runs a module, or one of its methods, with its parameters gathered."""

from __future__ import annotations

import itertools
import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from treadle_fabric.containers import leaves
from treadle_fabric.strategies.sharding.replicated import ReplicatedGradients
from treadle_fabric.strategies.strategy import METHOD_KEYWORD
from treadle_fabric.strategies.unwrapping import inside, user_module

__all__ = ["Engine", "ShardedEngine", "engine_around"]

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
    def join_forward(self, method: str) -> None:
        """Take part, with no batch, in the forward pass without gradients in which other ranks run a method."""


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
    _orders: dict[tuple[str, bool], list[tuple[Any, bool]]]
    """By the name of a method, and whether gradients were recorded: the sharded modules in the order in which they ran,
    and whether their backward passes end by themselves."""
    _trained: str
    """The method that ran last with gradients."""
    _joined: str
    """The method whose pass other ranks run."""
    _replicated: ReplicatedGradients | None

    def __init__(self, module: Module) -> None:
        super().__init__()
        self.module = module
        fields = self.__dict__  # past Module.__setattr__, which is slow
        fields["running"] = False
        fields["synchronizes"] = True
        fields["_orders"] = {}
        fields["_trained"] = fields["_joined"] = "forward"
        fields["_replicated"] = None
        fields["number"] = next(_made)
        _engines[user_module(module)] = weakref.ref(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's ``forward``, or the method ``treadle_method`` of it."""
        run = kwargs.pop(METHOD_KEYWORD, self.module)
        fields, grad = self.__dict__, torch.is_grad_enabled()
        key = getattr(run, "__name__", "forward"), grad
        fields["running"] = True
        try:
            if run == self._visit:
                return run(*args, **kwargs)
            if grad:
                fields["_trained"] = key[0]
            if key in self._orders:
                return run(*args, **kwargs)
            with self._recording(key):
                return run(*args, **kwargs)
        finally:
            fields["running"] = False

    def synchronize(self, enabled: bool) -> None:
        """Say whether the next backward passes reduce gradients over the ranks."""
        self.__dict__["synchronizes"] = enabled
        for module in self.sharded_modules():
            module.set_requires_gradient_sync(enabled, recurse=False)

    def replicate(self, parameters: Sequence[Parameter], groups: Sequence[Any]) -> None:
        """Let parameters that are not sharded have the mean of the gradients over process groups."""
        self.__dict__["_replicated"] = ReplicatedGradients(parameters, groups, lambda: self.synchronizes)

    def sharded(self) -> None:
        """Take notice that ``fully_shard`` was applied to this engine, the last of all modules."""
        self.register_forward_hook(_reshard_without_gradients, always_call=True)

    @property
    def root(self) -> Any:
        """The engine, if ``fully_shard`` was applied to it; else None."""
        return self if hasattr(self, "_get_fsdp_state") else None

    @property
    def has_learned(self) -> bool:
        """Whether a forward pass with gradients has run."""
        return any(grad for _, grad in self._orders)

    def sharded_modules(self) -> Iterator[Any]:
        """Iterate over the modules that ``fully_shard`` was applied to, from the outside."""
        return (module for module in self.modules() if hasattr(module, "_get_fsdp_state"))

    def trained(self) -> list[Any]:
        """The parameters of this rank that require gradients: its parts, and those that it has whole."""
        groups = [group for m in self.sharded_modules() for group in m._get_fsdp_state()._fsdp_param_groups]
        parts = [each.sharded_param for group in groups for each in group.fsdp_params]
        whole = self._replicated.parameters if self._replicated is not None else []
        return [p for p in (*parts, *whole) if p.requires_grad]

    # Backward passes and steps inside of a method that runs

    def expect_backward(self, loss: Tensor) -> None:
        """Get the engine's own parameters ready for a backward pass inside of the forward that runs."""
        if self.root is not None and loss.requires_grad:
            loss.register_hook(self.root._get_fsdp_state()._pre_backward)  # type: ignore[no-untyped-call]

    def refresh(self) -> None:
        """Gather the engine's own parameters anew at their next use, which is now if a method runs."""
        if self.root is not None:
            self.root.reshard()
            if self.running:
                self.root.unshard()

    # Ranks that have nothing to run

    def join_forward(self, method: str) -> None:
        """Gather parameters, without gradients, in the order of a pass of a method on this rank.

        A rank that has not run the method takes the order of another one; one that has run none, that of the modules.
        """
        self.__dict__["_joined"] = method
        with torch.no_grad():
            self(**{METHOD_KEYWORD: self._visit})

    def join_backward(self) -> None:
        """Gather parameters, and reduce gradients of zero, as a backward pass of the last forward pass does."""
        device = next(self.module.parameters()).device
        _Joining.apply(torch.zeros((), device=device, requires_grad=True), self).backward()  # type: ignore[no-untyped-call]
        if self._replicated is not None and self.synchronizes:
            self._replicated.average()

    @contextmanager
    def _recording(self, key: tuple[str, bool]) -> Iterator[None]:
        """Note in which order the sharded modules run, and whether their backward passes end by themselves."""
        order: list[tuple[Any, bool]] = []

        def note(module: Module, args: Any, kwargs: Any) -> None:
            order.append((module, any(t.requires_grad for t in leaves((args, kwargs)) if isinstance(t, Tensor))))

        if "torch._dynamo" in sys.modules:  # and the module may be compiled
            note = torch.compiler.disable(note)  # type: ignore[no-untyped-call]
        hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in self.sharded_modules() if m is not self]
        try:
            yield
            self._orders[key] = order
        finally:
            for hook in hooks:
                hook.remove()

    def _visit(self) -> None:
        """Gather and free the parameters of the sharded modules one after the other."""
        known, method = self._orders, self._joined
        keys = ((method, False), (method, True), *known)
        for module, _ in next((known[key] for key in keys if key in known), self._unordered()):
            state = module._get_fsdp_state()
            state._pre_forward(module, (), {})
            state._post_forward(module, (), None)

    def _unordered(self) -> list[tuple[Any, bool]]:
        return [(module, False) for module in self.sharded_modules() if module is not self]

    def _visit_backwards(self, gradient: Tensor) -> None:
        """Do what the backward pass of the last forward pass would, with gradients of zero."""
        self.root._get_fsdp_state()._pre_backward(gradient)
        for module, ends in (*reversed(self._orders.get((self._trained, True), [])), (self, False)):
            state = module._get_fsdp_state()
            if module is not self:
                state._pre_backward(gradient)
            for group in state._fsdp_param_groups:
                for each in group.fsdp_params:
                    whole = each.unsharded_param
                    if whole.requires_grad and whole.grad is None:
                        whole.grad = torch.zeros_like(whole)
                if ends:
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


def engine_around(module: Module) -> ShardedEngine | None:
    """The engine that was made for a module, by any strategy."""
    reference = _engines.get(user_module(module))
    return None if reference is None else reference()


@inside.register
def _(engine: ShardedEngine) -> Module:
    return engine.module


def _reshard_without_gradients(engine: Any, args: Any, output: Any) -> None:
    """Free the engine's own parameters, which torch keeps for a backward pass, where none comes."""
    if not torch.is_grad_enabled():
        engine.reshard()
