"""Strategies whose ranks hold parts of the parameters, on torch's ``fully_shard`` and DTensors."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torch.optim import Adafactor, Optimizer

from treadle_fabric.checkpoint import is_sharded_tensor, own_part, placed_like
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.rank_zero import rank_zero_warn
from treadle_fabric.strategies.native_step import OTHER_OPTIMIZERS, NativeStepStrategy
from treadle_fabric.strategies.parallel import ParallelStrategy
from treadle_fabric.strategies.sharding.engine import Engine, ShardedEngine, engine_around, parameter_groups
from treadle_fabric.strategies.sharding.wrapping import refuse_lazy
from treadle_fabric.strategies.states.sharded_state import ShardedStateStrategy
from treadle_fabric.strategies.unwrapping import user_module, with_plain_names

__all__ = ["ShardingStrategy"]


class ShardingStrategy(ParallelStrategy, ShardedStateStrategy, NativeStepStrategy):
    """Processes along the dimensions of a mesh, which hold parts of the parameters."""

    requires_forward_redirect = True
    fixes_parameters = True
    restores_after_setup = True
    initializes_on_meta = True
    allows_inference_mode = False  # gathered parameters keep their memory for later passes

    _engines: tuple[weakref.ref[Engine], ...] = ()
    _mesh: Any = None
    _seen_step: int = 0
    """How many engines there were at the step at which they were looked at."""

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_engines": (), "_mesh": None}  # of this process's group

    @abstractmethod
    def make_device_mesh(self) -> Any:
        """Make the mesh of all processes, which have met."""

    @abstractmethod
    def parallelize(self, module: Module) -> Engine:
        """Shard a module that is on any device, or on the meta device, and return the engine that runs it."""

    @property
    def device_mesh(self) -> Any:
        """The named dimensions along which the processes work together.

        Raises:
            MisconfigurationException: The processes have not met yet.
        """
        if self._mesh is None:
            if not dist.is_initialized():
                raise MisconfigurationException(
                    f"The mesh of {type(self).__name__} is there once the processes have met: after fabric.launch(), "
                    "or in hooks of the Trainer such as configure_model."
                )
            self._mesh = self.make_device_mesh()
        return self._mesh

    def setup_module(self, module: Module) -> Module:
        known_engine = engine_around(module)
        if known_engine is not None:
            known_engine.forget_gradients()
        else:
            refuse_lazy(module)
        own = user_module(module)
        before = dict(own.named_parameters())
        engine: Engine = known_engine or self.parallelize(module)
        _carry_hooks(before, dict(own.named_parameters()))
        if known_engine is None:
            for each in own.modules():
                each.register_load_state_dict_pre_hook(_take_own_parts)  # type: ignore[no-untyped-call]
        known = {id(alive): reference for reference in self._engines if (alive := reference()) is not None}
        self._engines = tuple({**known, id(engine): weakref.ref(engine)}.values())
        return engine

    def note_optimizer(self, optimizer: Optimizer) -> None:
        """Refuse what torch 2.9 steps with other numbers, without a word; later ones raise at the first step."""
        if isinstance(optimizer, Adafactor) and any(
            is_sharded_tensor(p) for group in optimizer.param_groups for p in group["params"]
        ):
            raise MisconfigurationException(
                "Adafactor cannot step sharded parameters: it takes sums over whole rows and columns, and a rank has a"
                f" part of them. {OTHER_OPTIMIZERS}"
            )

    def module_to_device(self, module: Module) -> None:
        """Do nothing: each part of a module goes to the device by itself when it is sharded."""

    def no_backward_sync(self, module: Module, enabled: bool = True) -> AbstractContextManager[Any]:
        if enabled and isinstance(module, ShardedEngine):
            return module.no_sync()
        return nullcontext()

    def expect_backward(self, loss: Tensor) -> None:
        for engine in self._alive():
            if engine.running:
                engine.expect_backward(loss)

    def after_inner_backward(self) -> None:
        for engine in self._alive():
            if engine.running:
                engine.refresh()

    def after_trainable_change(self) -> None:
        for engine in self._alive():
            if engine.running:
                engine.keep_trainable()

    def after_optimizer_step(self, optimizer: Optimizer) -> None:
        """Let no engine use gathered parameters that were gathered before the step."""
        for engine in self._alive():
            engine.refresh()
        if len(self._engines) != self._seen_step:
            self._seen_step = len(self._engines)
            for engine in self._alive():
                _tell_of_silent_hooks(engine)

    def release_gathered(self) -> None:
        for engine in self._alive():
            engine.refresh()

    def join_forward(self, module: Module, method: str = "forward") -> None:
        assert isinstance(module, Engine)
        module.join_forward(method)

    def finish_forward(self, module: Module, method: str) -> None:
        assert isinstance(module, Engine)
        module.finish_forward(method, torch.is_grad_enabled())

    def join_backward(self, module: Module, label: str) -> None:
        """A backward pass with gradients of zero; how many processes have nothing is counted where they met."""
        assert isinstance(module, ShardedEngine)
        if module.root is None:
            raise MisconfigurationException(
                f"A step had no loss on rank {self.global_rank}, and other ranks may have one. Return a loss of zero "
                "that depends on the model's outputs, such as 0 * output.sum()."
            )
        trained = module.trained()
        untouched = module.synchronizes and all(p.grad is None for p in trained)
        key, store = f"treadle/idle/sharded/{module.number}/{label}", dist.distributed_c10d._get_default_store()
        if untouched:
            store.add(key, 1)
        module.join_backward()
        if untouched:
            for p in trained:
                if p.grad is not None:  # when they are there, every rank has been counted
                    own_part(p.grad).sum().item()
            if store.add(key, 0) == self.world_size:
                for p in trained:
                    p.grad = None

    def settle_gradients(self, module: Module) -> None:
        if isinstance(module, ShardedEngine) and module.root is not None and module.has_learned:
            module.join_backward()

    def _alive(self) -> list[Engine]:
        return [engine for reference in self._engines if (engine := reference()) is not None]


def _take_own_parts(module: Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let ``load_state_dict`` take whole tensors, of which each rank loads its part."""
    for name, target in module._parameters.items():
        source = state.get(prefix + name)
        if target is None or not isinstance(source, Tensor) or source.shape != target.shape:
            continue
        if is_sharded_tensor(target) and not is_sharded_tensor(source):
            state[prefix + name] = placed_like(source, target)


_NOT_CALLED: Final = (
    "The parts of a sharded parameter get their gradients from the ranks, and not from a backward pass through them, so"
    " Tensor.register_hook has no effect there. Use register_post_accumulate_grad_hook, whose function is given the"
    " parameter with its gradient in `grad`, or change the gradients between backward and step."
)


def _carry_hooks(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """Give the parameters that took the place of others the hooks of those.

    Raises:
        MisconfigurationException: A hook cannot be kept.
    """
    for name, old in before.items():
        new: Any = after.get(name, old)
        if new is old:
            continue
        if old._backward_hooks:
            raise MisconfigurationException(f"{name!r} has a hook on its gradient. {_NOT_CALLED}")
        for hook in (getattr(old, "_post_accumulate_grad_hooks", None) or {}).values():
            new.register_post_accumulate_grad_hook(hook)


def _tell_of_silent_hooks(engine: Engine) -> None:
    own = user_module(engine)
    sharded = [m for m in engine.modules() if hasattr(m, "_get_fsdp_state")]
    parts = {id(p.sharded_param) for module in sharded for group in parameter_groups(module) for p in group.fsdp_params}
    named = with_plain_names(own, own.named_parameters())
    silent = [name for name, p in named if id(p) in parts and p._backward_hooks]
    if silent:
        rank_zero_warn(
            f"{', '.join(map(repr, silent[:4]))} had a hook on the gradient, which was not called. {_NOT_CALLED}"
        )
