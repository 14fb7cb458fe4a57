"""Data parallelism: every process has the whole model and a share of the batch."""

from __future__ import annotations

import inspect
import itertools
import re
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from treadle_fabric.accelerators import Accelerator
from treadle_fabric.checkpoint import CheckpointIO
from treadle_fabric.environments import ClusterEnvironment
from treadle_fabric.errors import UnknownArgumentError, UnusedParametersError, near_names
from treadle_fabric.precision import Precision
from treadle_fabric.strategies.native_step import NativeStepStrategy
from treadle_fabric.strategies.parallel import ParallelStrategy
from treadle_fabric.strategies.strategy import METHOD_KEYWORD
from treadle_fabric.strategies.unwrapping import inside, user_module, with_plain_names
from treadle_fabric.strategies.whole_state import WholeStateStrategy

__all__ = ["DDPStrategy"]

_MAX_NAMED = 10
_made = itertools.count()  # every process sets up the same modules in the same order
_ENGINE_ARGUMENTS = frozenset(inspect.signature(DistributedDataParallel).parameters) - {"module", "device_ids"}


class DDPStrategy(ParallelStrategy, WholeStateStrategy, NativeStepStrategy):
    """Gradients are averaged over the processes during the backward pass.

    Args:
        accelerator: The hardware.
        parallel_devices: The devices of this machine, one a process.
        cluster_environment: Where ranks and addresses come from.
        checkpoint_io: Writes and reads files.
        precision: Default: ``32-true``.
        process_group_backend: Default: ``"nccl"`` on CUDA, otherwise ``"gloo"``.
        timeout: How long a collective waits for the slowest process.
        start_method: ``"popen"``, ``"spawn"``, ``"fork"`` or ``"forkserver"``.
        **kwargs: For ``torch.nn.parallel.DistributedDataParallel``, such as ``find_unused_parameters``.
    """

    requires_forward_redirect = True
    fixes_parameters = True

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
        **kwargs: Any,
    ) -> None:
        super().__init__(
            accelerator,
            parallel_devices,
            cluster_environment,
            checkpoint_io,
            precision,
            process_group_backend,
            timeout,
            start_method,
        )
        for name in kwargs:
            if name not in _ENGINE_ARGUMENTS:
                known = {*inspect.signature(DDPStrategy).parameters, *_ENGINE_ARGUMENTS} - {"kwargs"}
                raise UnknownArgumentError(f"DDPStrategy({name}=...) is no argument. {near_names(name, known)}")
        self._ddp_kwargs = kwargs
        self._engines: list[weakref.ref[DistributedDataParallel]] = []
        self._unchecked: list[weakref.ref[DistributedDataParallel]] = []

    def setup_module(self, module: Module) -> Module:
        target = _MethodForward(module)
        if not any(p.requires_grad for p in module.parameters()):
            return target  # nothing to average, and DDP refuses it
        device_ids = [self.root_device.index] if self.root_device.type == "cuda" else None
        engine = DistributedDataParallel(target, device_ids=device_ids, **self._ddp_kwargs)
        self._engines = [*(known for known in self._engines if known() is not None), weakref.ref(engine)]
        if not engine.find_unused_parameters and not engine.static_graph:
            self._unchecked.append(weakref.ref(engine))
        return engine

    def module_to_device(self, module: Module) -> None:
        module.to(self.root_device)

    def no_backward_sync(self, module: Module, enabled: bool = True) -> AbstractContextManager[Any]:
        if enabled and isinstance(module, DistributedDataParallel):
            return module.no_sync()
        return nullcontext()

    def expect_backward(self, loss: Tensor) -> None:
        """DDP gets ready for a backward pass when its forward ends, and this one comes before that."""
        for engine in (reference() for reference in self._engines):
            target = engine.module if engine is not None else None
            if engine is None or not isinstance(target, _MethodForward) or not target.running:
                continue
            if target.backward_inside is None:
                engine.register_forward_hook(_put_back_sync, always_call=True)
                target.backward_inside = False
            if not target.backward_inside:
                if not engine.require_backward_grad_sync:  # no_backward_sync
                    continue
                target.backward_inside = True
                engine.require_backward_grad_sync = False  # or it would expect another one after the forward
            engine.require_forward_param_sync = True
            engine.reducer._rebuild_buckets()
            search = engine.find_unused_parameters and not engine.static_graph
            engine.reducer.prepare_for_backward([loss] if search else [])

    def join_backward(self, module: Module, label: str) -> None:
        """A loss of zero; how many processes have nothing is counted where they met, which costs these alone."""
        if not isinstance(module, DistributedDataParallel) or not module.require_backward_grad_sync:
            return
        trained = [p for p in module.parameters() if p.requires_grad]
        untouched = all(p.grad is None for p in trained)
        search = module.find_unused_parameters and not module.static_graph
        # Where the others may have unused parameters, these must not seem to be used here
        zero = torch.stack([p.reshape(-1)[:0].sum() for p in (trained[:1] if search else trained)]).sum()
        module.reducer.prepare_for_backward([zero] if search else [])  # anew: the forward may have had no output
        key, store = f"treadle/idle/{module.module.number}/{label}", dist.distributed_c10d._get_default_store()
        if untouched:
            store.add(key, 1)
        self.backward(zero, module)
        if untouched:
            trained[0].grad.sum().item()  # type: ignore[union-attr] # when it is there, every process has been counted
            if store.add(key, 0) == self.world_size:
                for p in trained:
                    p.grad = None

    def engine_state(self) -> dict[str, Any]:
        engine = self._engines[-1]() if self._engines else None
        # whether the next forward takes over the buffers of rank 0
        return {} if engine is None else {"synchronizes": engine.require_forward_param_sync}

    def load_engine_state(self, state: Mapping[str, Any]) -> None:
        engine = self._engines[-1]() if self._engines else None
        if engine is not None and "synchronizes" in state:
            engine.require_forward_param_sync = state["synchronizes"]

    def before_optimizer_step(self, optimizer: Optimizer) -> None:
        """On the first step: a parameter without gradient would leave others unreduced, without a word."""
        if not self._unchecked:
            return
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for reference in tuple(self._unchecked):
            engine = reference()
            named = [] if engine is None else _trained(engine)
            if engine is not None and not any(id(p) in stepped and p.grad is not None for _, p in named):
                continue
            self._unchecked.remove(reference)
            without = [name for name, p in named if p.grad is None]
            if without:
                raise self._unused(without)

    def explain_error(self, engine: Module, error: RuntimeError) -> Exception | None:
        """Torch gives the indices of parameters that got no gradient; users know them by name."""
        text = str(error)
        if "finished reduction in the prior iteration" not in text:
            return None
        found = re.search(r"did not receive grad for rank \d+: ([\d ,]+)", text)
        assert isinstance(engine, DistributedDataParallel)
        names = engine.module.trained
        indices = [int(i) for i in re.findall(r"\d+", found.group(1))] if found else []
        return self._unused([names[i] if i < len(names) else f"number {i}" for i in indices])

    def _unused(self, names: list[str]) -> UnusedParametersError:
        listed = ", ".join(names[:_MAX_NAMED]) + (
            f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
        )
        return UnusedParametersError(
            f"Parameters that got no gradient on rank {self.global_rank}: {listed}. DDP waits for every gradient "
            "before it averages them. Make the loss depend on these parameters, freeze them with requires_grad_(False) "
            "before setup, or use strategy='ddp_find_unused_parameters_true'."
        )

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        for name, start_method in (
            ("ddp", "popen"),
            ("ddp_spawn", "spawn"),
            ("ddp_fork", "fork"),
            ("ddp_notebook", "fork"),
        ):
            strategy_registry.register(
                name, cls, description=f"DDP, started by {start_method}", start_method=start_method
            )
            for answer in (True, False):
                strategy_registry.register(
                    f"{name}_find_unused_parameters_{str(answer).lower()}",
                    cls,
                    description=f"DDP, started by {start_method}, find_unused_parameters={answer}",
                    start_method=start_method,
                    find_unused_parameters=answer,
                )


class _MethodForward(Module):
    """Runs any method of a module as its forward, so that the engine around it sees every step."""

    def __init__(self, module: Module) -> None:
        super().__init__()
        self.module = module
        self.trained = [name for name, _ in _trained(module)]
        self.number = next(_made)
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
def _(wrapper: _MethodForward) -> Module:
    return wrapper.module


def _trained(module: Module) -> list[tuple[str, Tensor]]:
    """The parameters of the user's module that require a gradient, by the names that its user knows."""
    own = user_module(module)
    return [(name, p) for name, p in with_plain_names(own, own.named_parameters()) if p.requires_grad]


def _put_back_sync(engine: Any, inputs: Any, output: Any) -> None:
    """The forward has ended: DDP prepares for backward passes by itself again."""
    if engine.module.backward_inside:
        engine.module.backward_inside = False
        engine.require_backward_grad_sync = True
