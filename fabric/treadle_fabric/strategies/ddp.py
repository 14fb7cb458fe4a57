"""Data parallelism: every process has the whole model and a share of the batch."""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from itertools import chain, repeat
from typing import Any, Literal, TypedDict, TypeVar, Unpack

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from treadle_fabric.accelerators import Accelerator
from treadle_fabric.checkpoint import CheckpointIO
from treadle_fabric.environments import ClusterEnvironment
from treadle_fabric.errors import MisconfigurationException, UnknownArgumentError, UnusedParametersError, near_names
from treadle_fabric.precision import Precision
from treadle_fabric.strategies.data_parallel.averaging import ModelAveraging
from treadle_fabric.strategies.data_parallel.communication import Communication, Exchange
from treadle_fabric.strategies.data_parallel.ddp_engine import DDPEngine, listed
from treadle_fabric.strategies.data_parallel.hook_checks import sparse_tables
from treadle_fabric.strategies.native_step import NativeStepStrategy
from treadle_fabric.strategies.parallel import ParallelStrategy
from treadle_fabric.strategies.states.whole_state import WholeStateStrategy
from treadle_fabric.strategies.unwrapping import name_in, user_module, with_plain_names

__all__ = ["DDPStrategy"]

T = TypeVar("T")


class DDPArguments(TypedDict, total=False):
    """What ``torch.nn.parallel.DistributedDataParallel`` takes; an older torch lacks the last four."""

    output_device: Any
    dim: int
    broadcast_buffers: bool | None
    init_sync: bool
    process_group: Any
    bucket_cap_mb: float | None
    find_unused_parameters: bool
    check_reduction: bool
    gradient_as_bucket_view: bool
    static_graph: bool
    delay_all_reduce_named_params: Any
    param_to_hook_all_reduce: Any
    mixed_precision: Any
    device_mesh: Any
    skip_all_reduce_unused_params: bool
    bucket_cap_mb_list: list[float] | None
    batched_grad_copy: bool
    forward_sync_buffers: bool | None


_ENGINE_ARGUMENTS = frozenset(inspect.signature(DistributedDataParallel).parameters) - {"module", "device_ids"}


class DDPStrategy(ParallelStrategy, WholeStateStrategy, NativeStepStrategy):
    """Gradients are averaged over the processes during the backward pass.

    Args:
        accelerator: The hardware.
        parallel_devices: The devices of this machine, one a process.
        cluster_environment: Where ranks and addresses come from.
        checkpoint_io: Writes and reads files.
        precision: Default: ``32-true``.
        process_group_backend: Default: torch's for the device, ``"nccl"`` on CUDA and ``"gloo"`` on the CPU.
        timeout: How long a collective waits for the slowest process.
        start_method: ``"popen"``, ``"spawn"``, ``"fork"`` or ``"forkserver"``.
        precision_plugin: The precision, under the name that strategies of a trainer have for it.
        ddp_comm_state: The first argument of ``ddp_comm_hook``, such as a ``PowerSGDState`` or a ``PostLocalSGDState``
            (without groups, if processes are yet to be started). Default: None.
        ddp_comm_hook: Exchanges a bucket of gradients, on every accelerator: one of those in
            ``torch.distributed.algorithms.ddp_comm_hooks``, or another function of a state and a bucket. Default: DDP's
            all-reduce.
        ddp_comm_wrapper: Makes another hook of the hook, such as ``fp16_compress_wrapper``. Default: none.
        model_averaging_period: Under post-local SGD, the number of steps of an optimizer from one average of the
            parameters to the next; or a dict of such numbers, each with the number of ranks that average then.
        **kwargs: For ``torch.nn.parallel.DistributedDataParallel``, such as ``find_unused_parameters``.

    Raises:
        MisconfigurationException: Arguments do not fit together.
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
        precision_plugin: Precision | None = None,
        ddp_comm_state: Any = None,
        ddp_comm_hook: Callable[[Any, Any], Any] | None = None,
        ddp_comm_wrapper: Callable[[Any], Any] | None = None,
        model_averaging_period: int | Mapping[int, int] | None = None,
        **kwargs: Unpack[DDPArguments],
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
            precision_plugin,
        )
        for name in kwargs:
            if name not in _ENGINE_ARGUMENTS:
                known = {*inspect.signature(DDPStrategy).parameters, *_ENGINE_ARGUMENTS} - {"kwargs"}
                raise UnknownArgumentError(f"DDPStrategy({name}=...) is no argument. {near_names(name, known)}")
        if ddp_comm_hook is not None and kwargs.get("mixed_precision") is not None:
            raise MisconfigurationException(
                "ddp_comm_hook with mixed_precision=...: DDP's own mixed precision exchanges gradients by a hook of its"
                " own. Leave one of them out; for mixed precision, use the argument precision of Fabric or the Trainer."
            )
        self._ddp_kwargs = kwargs
        self._averaging = None if model_averaging_period is None else ModelAveraging(model_averaging_period)
        self._communication = Communication(
            ddp_comm_state,
            ddp_comm_hook,
            ddp_comm_wrapper,
            averages=self._averaging is not None,
            static_graph=bool(kwargs.get("static_graph")),
        )
        self._optimizers: list[weakref.ref[Optimizer]] = []
        self._engines: list[weakref.ref[DDPEngine]] = []
        self._unchecked: list[weakref.ref[DDPEngine]] = []

    def __getstate__(self) -> dict[str, Any]:
        own: dict[str, Any] = {"_engines": [], "_unchecked": [], "_optimizers": []}  # of this process's group
        return {**super().__getstate__(), **own}

    def setup_module(self, module: Module) -> Module:
        _refuse_lazy(module)
        # Without `device_ids`: with some, DDP would move the inputs, which are on the device, and make their containers
        # anew, subclasses of dict, list and tuple by calling the class with all entries
        engine = DDPEngine(module, self._timeout, self._check_later, self._exchange_of, dict(self._ddp_kwargs))
        self._engines = [*(known for known in self._engines if known() is not None), weakref.ref(engine)]
        return engine

    def _exchange_of(self, module: Module) -> Exchange:
        if self._averaging is not None:
            self._averaging.prepare()
        scales = self.precision.requires_fabric_backward
        return self._communication.exchange_of(module, self.root_device, scales, self.num_processes)

    def note_optimizer(self, optimizer: Optimizer) -> None:
        known = [each for each in self._optimizers if each() not in (None, optimizer)]
        self._optimizers = [*known, weakref.ref(optimizer)]

    def _check_later(self, engine: DDPEngine) -> None:
        """Look for unused parameters at the engine's next step: the first one since DDP wrapped the module."""
        ddp = engine.ddp
        if ddp is not None and not ddp.find_unused_parameters and not ddp.static_graph:
            self._unchecked.append(weakref.ref(engine))

    def module_to_device(self, module: Module) -> None:
        module.to(self.root_device)

    def no_backward_sync(self, module: Module, enabled: bool = True) -> AbstractContextManager[Any]:
        if enabled and isinstance(module, DDPEngine):
            return module.no_sync()
        return nullcontext()

    def expect_backward(self, loss: Tensor) -> None:
        """DDP gets ready for a backward pass when its forward ends, and this one comes before that."""
        for engine in (reference() for reference in self._engines):
            if engine is not None and engine.target.running:
                engine.expect_backward(loss)

    def after_inner_backward(self) -> None:
        for engine in (reference() for reference in self._engines):
            if engine is not None and engine.target.running:
                engine.after_backward()

    def join_backward(self, module: Module, label: str) -> None:
        """A loss of zero; how many processes have nothing is counted where they met, which costs these alone."""
        ddp = module.ddp if isinstance(module, DDPEngine) else None
        if ddp is None or not ddp.require_backward_grad_sync:
            return
        if ddp.static_graph:
            raise MisconfigurationException(
                f"There is no loss on rank {self.global_rank} in this step, and with static_graph=True every rank runs"
                " the same graph in every step. Leave static_graph out, or return a loss for every batch."
            )
        named: dict[str, Tensor] = module.trained  # type: ignore[assignment] # of an engine
        trained = [p for p in named.values() if p.requires_grad]
        untouched = all(p.grad is None for p in trained)
        search = ddp.find_unused_parameters and not ddp.static_graph
        # Where the others may have unused parameters, these must not seem to be used here
        zero = torch.stack([p.reshape(-1)[:0].sum() for p in (trained[:1] if search else trained)]).sum()
        ddp.reducer.prepare_for_backward([zero] if search else [])  # anew: the forward may have had no output
        exchange: Any = module.exchange
        first, sharing = exchange.shared_by() or (0, self.world_size)
        key, store = f"treadle/idle/{module.number}/{label}/{first}", dist.distributed_c10d._get_default_store()
        if untouched:
            store.add(key, 1)
        self.backward(zero, module)
        if untouched:
            trained[0].grad.sum().item()  # type: ignore[union-attr] # when it is there, every process has been counted
            if store.add(key, 0) == sharing:
                for p in trained:
                    p.grad = None

    def engine_state(self) -> dict[str, Any]:
        """What each rank goes on with; every rank calls this, and the result is of this rank.

        Under post-local SGD that includes the parameters and the optimizers' states of the ranks but the first, whose
        own are in the checkpoint.
        """
        engine = self._engines[-1]() if self._engines else None
        state: dict[str, Any] = {"ranks": self.world_size}
        if engine is not None and engine.ddp is not None:
            # whether the next forward takes over the buffers of rank 0
            state["synchronizes"] = engine.ddp.require_forward_param_sync
        exchanges, engines, optimizers = self._communication.exchanges, self._engines_by_module(), self._living()
        state["modules"] = [
            {"hook": exchange.state_dict(), "buckets": self._buckets(engines.get(module), exchange)}
            for module, exchange in exchanges.items()
        ]
        if self._averaging is not None:
            state["averaging"] = [self._averaging.state_of(each) for each in optimizers]
            if self.global_rank > 0 and any(exchange.parts_ranks for exchange in exchanges.values()):
                apart = self._averaging.are_apart(optimizers)
                for module, entry in zip(exchanges, state["modules"], strict=True):
                    named = with_plain_names(module, module.named_parameters())
                    entry["parameters"] = {n: p.detach() for n, p in named if p.requires_grad or id(p) in apart}
                state["optimizers"] = [self.get_optimizer_state(each) for each in optimizers]
                state["precision"] = self.precision.state_dict()
        return state

    def load_engine_state(self, state: Mapping[str, Any]) -> None:
        """Of modules and optimizers, the last ones of now go on with the last ones of then."""
        engine, same_ranks = self._engines[-1]() if self._engines else None, state.get("ranks") == self.world_size
        if engine is not None and engine.ddp is not None and "synchronizes" in state:
            engine.ddp.require_forward_param_sync = state["synchronizes"]
        engines = self._engines_by_module()
        modules, optimizers = reversed([*self._communication.exchanges.items()]), [*reversed(self._living())]
        for (module, exchange), entry in _pairs(modules, state.get("modules", [])):
            exchange.load_state_dict(entry.get("hook", {}), self.root_device, same_ranks)
            engine = engines.get(module)
            if engine is not None and same_ranks and not engine.arrange(entry.get("buckets")):
                exchange.regroup()
            parameters = dict(module.named_parameters()) if entry.get("parameters") and same_ranks else {}
            with torch.no_grad():
                for name, value in entry["parameters"].items() if parameters else ():
                    parameters[name_in(module, name)].copy_(value)
        for optimizer, entry in _pairs(optimizers, state.get("averaging", []) if same_ranks else []):
            if self._averaging is not None:
                self._averaging.load_state_of(optimizer, entry)
        for optimizer, entry in _pairs(optimizers, state.get("optimizers", []) if same_ranks else []):
            if entry:
                self.load_optimizer_state(optimizer, dict(entry))
        if same_ranks and "precision" in state:
            self.precision.load_state_dict(state["precision"])

    def _engines_by_module(self) -> dict[Module, DDPEngine]:
        living = (reference() for reference in self._engines)
        return {user_module(engine.module): engine for engine in living if engine is not None}

    def _living(self) -> list[Optimizer]:
        return [optimizer for reference in self._optimizers if (optimizer := reference()) is not None]

    def _buckets(self, engine: DDPEngine | None, exchange: Exchange) -> list[list[str]] | None:
        """The buckets that a resumed run needs: a sum of two numbers rounds alike in any."""
        needed = exchange.remembers_buckets or self.world_size > 2
        return engine.buckets() if engine is not None and needed else None

    def before_optimizer_step(self, optimizer: Optimizer) -> None:
        """On the first step: a parameter without gradient would leave others unreduced, without a word."""
        if not self._unchecked:
            return
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for reference in tuple(self._unchecked):
            engine = reference()
            trained = {} if engine is None else {n: p for n, p in engine.trained.items() if p.requires_grad}
            if engine is not None and not any(id(p) in stepped and p.grad is not None for p in trained.values()):
                continue
            self._unchecked.remove(reference)
            without = [name for name, p in trained.items() if p.grad is None]
            if without:
                raise self._unused(without)

    def after_optimizer_step(self, optimizer: Optimizer) -> None:
        if self._averaging is not None:
            self._averaging.after_step(optimizer, any(e.local for e in self._communication.exchanges.values()))

    def explain_error(self, engine: Module | None, error: RuntimeError) -> Exception | None:
        """Torch gives the indices of parameters, or none; users know them by name."""
        text = str(error)
        if "sparse gradient to be defined" in text:
            return self._unused([])
        if "finished reduction in the prior iteration" not in text:
            return None
        found = re.search(r"did not receive grad for rank \d+: ([\d ,]+)", text)
        assert isinstance(engine, DDPEngine)  # DDP says so at the begin of a forward pass
        names = [*engine.trained]
        indices = [int(i) for i in re.findall(r"\d+", found.group(1))] if found else []
        return self._unused([names[i] if i < len(names) else f"number {i}" for i in indices])

    def _unused(self, names: Sequence[str]) -> UnusedParametersError:
        tables = [table for engine in self._engines if (alive := engine()) is not None for table in _tables(alive)]
        if any(name in tables for name in names) or not names:
            return UnusedParametersError(
                f"Sparse parameters that got no gradient on rank {self.global_rank}: {listed(tables)}. DDP waits for"
                " it, and find_unused_parameters does not help. Make the loss depend on these parameters at every step,"
                " freeze them with requires_grad_(False), or make the embedding with sparse=False."
            )
        return UnusedParametersError(
            f"Parameters that got no gradient on rank {self.global_rank}: {listed(names)}. DDP waits for every "
            "gradient before it averages them. Make the loss depend on these parameters, freeze them with "
            "requires_grad_(False), or use strategy='ddp_find_unused_parameters_true'."
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


def _refuse_lazy(module: Module) -> None:
    own = user_module(module)
    lazy = [name for name, p in with_plain_names(own, own.named_parameters()) if is_lazy(p)]
    if lazy:
        raise MisconfigurationException(
            f"DDP cannot wrap parameters that have no shape yet: {listed(lazy)}. A lazy layer gets its shape from its"
            " first batch: run a batch through the model first, alike on every rank (in `configure_model` under the"
            " Trainer, before `setup` under Fabric), or give the layer its number of inputs."
        )


def _tables(engine: DDPEngine) -> list[str]:
    """The parameters of an engine's module that have sparse gradients, and have none now."""
    return [name for name, weight in sparse_tables(engine.module) if weight.grad is None]


def _pairs(living: Iterable[T], saved: Sequence[Mapping[str, Any]]) -> Iterable[tuple[T, Mapping[str, Any]]]:
    """Pair what is there with what was saved, both from the end; what was not saved gets nothing."""
    return zip(living, chain(reversed(saved), repeat({})), strict=False)
