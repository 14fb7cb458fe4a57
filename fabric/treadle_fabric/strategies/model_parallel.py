"""Model parallelism: processes work together on one batch, along the named dimensions of a mesh."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.nn import Module
from torch.optim import Optimizer

from treadle_fabric.accelerators import Accelerator
from treadle_fabric.checkpoint import CheckpointIO
from treadle_fabric.checkpoint.distributed.split import is_sharded_tensor
from treadle_fabric.checks import check_flag, check_integer
from treadle_fabric.environments import ClusterEnvironment
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.precision import Precision
from treadle_fabric.rank_zero import rank_zero_warn
from treadle_fabric.strategies.parallelism.explain import explain_mixed
from treadle_fabric.strategies.parallelism.loss import loss_functions, plain_scalars
from treadle_fabric.strategies.parallelism.pipeline import Order, PipelineEngine, is_cut
from treadle_fabric.strategies.parallelism.plans import apply_tensor_parallel, check_plan, place_gradients
from treadle_fabric.strategies.parallelism.replicas import (
    align_random_state,
    check_gradients_alike,
    check_inputs_alike,
    whole_over,
)
from treadle_fabric.strategies.parallelism.sequence import (
    SequenceGroup,
    attentions_so_far,
    sequence_functions,
    share_sequences,
)
from treadle_fabric.strategies.parallelism.sizes import Size, check_sizes, resolve_sizes
from treadle_fabric.strategies.parallelism.slices import split_batches
from treadle_fabric.strategies.parallelism.substitution import Substitution
from treadle_fabric.strategies.parts import METHOD_KEYWORD
from treadle_fabric.strategies.sharding.arguments import parse_arguments
from treadle_fabric.strategies.sharding.broadcast import take_over_from_rank_zero
from treadle_fabric.strategies.sharding.engine import Engine, ShardedEngine, engine_around
from treadle_fabric.strategies.sharding.materialize import give_values
from treadle_fabric.strategies.sharding.mesh import check_mesh_size, make_mesh
from treadle_fabric.strategies.sharding.recompute import recompute
from treadle_fabric.strategies.sharding.shard import shard_module, sharded_by_hand
from treadle_fabric.strategies.sharding.sharding import ShardingStrategy
from treadle_fabric.strategies.unwrapping import user_module, with_plain_names

__all__ = ["ModelParallelStrategy"]


class ShardingArguments(TypedDict, total=False):
    """How parameters are sharded over the data dimensions: arguments of :class:`FSDPStrategy`."""

    policy: Any
    cpu_offload: Any
    mixed_precision: Any
    reshard_after_forward: bool | None
    activation_checkpointing: type[Module] | Sequence[type[Module]] | bool | None
    activation_checkpointing_policy: Collection[type[Module]] | Callable[..., bool] | None
    activation_checkpointing_saves: Collection[Any]
    ignored_parameters: Any


class ModelParallelStrategy(ShardingStrategy):
    """Processes along a mesh with the dimensions ``pipeline_parallel``, ``data_replicate``, ``data_shard``,
    ``sequence_parallel`` and ``tensor_parallel``, and ``data_parallel`` for the two data dimensions together.

    Layers are shared out by ``tensor_parallel_plan``, by ``parallelize_fn``, or in the ``configure_model`` of a
    LightningModule, which finds the mesh as ``self.device_mesh``. Along the data dimensions parameters are sharded as
    by :class:`FSDPStrategy`; those of modules to which ``parallelize_fn`` or ``configure_model`` has applied torch's
    ``fully_shard`` are as it left them.

    Args:
        parallelize_fn: Called with the model and the mesh; returns the model, in which layers are DTensors.
        data_parallel_size: Shares of a batch. Default: one a machine, or all processes that the other sizes leave.
        tensor_parallel_size: Processes that share each layer. Default: those of a machine, or that are left.
        save_distributed_checkpoint: Whether checkpoints are folders to which each process writes its part. Otherwise
            rank 0 writes a single file.
        process_group_backend: Default: torch's for the device, ``"nccl"`` on CUDA and ``"gloo"`` on the CPU.
        timeout: How long a collective waits for the slowest process.
        data_replicate_size: Copies of the model among the shares of a batch. Default: 1.
        data_shard_size: Processes that share the parameters of a copy. Default: all shares of a batch.
        sequence_parallel_size: Processes that share each sequence. Default: 1.
        pipeline_parallel_size: Parts of the model that come one after the other. Default: 1.
        tensor_parallel_plan: By the pattern of a layer's name, how the processes share that layer: see
            :func:`apply_tensor_parallel`.
        loss_parallel: ``F.cross_entropy`` of logits that a plan leaves sharded does not gather them. In a method of the
            model; elsewhere use :func:`sharded_cross_entropy`.
        sequence_dim: The dimension of the positions in the tensors of a batch, of which each process of a sequence gets
            a slice. Default: 1.
        sequence_names: The keys, indices or fields of a batch whose tensors are sliced. Default: see
            :func:`split_sequence`.
        pipeline_schedule: The order of forward and backward passes: ``"1f1b"``, ``"interleaved"`` (each process has
            several parts of the model) or ``"gpipe"``.
        pipeline_microbatches: The number of micro-batches of a batch. A batch that it does not divide runs as fewer
            micro-batches, of the same size. Default: twice ``pipeline_parallel_size``.
        pipeline_virtual_stages: Under ``"interleaved"``, the number of parts that each process has. Default: 2.
        accelerator: The hardware.
        parallel_devices: The devices of this machine, one a process.
        cluster_environment: Where ranks and addresses come from.
        checkpoint_io: Writes and reads checkpoints.
        precision: Default: ``32-true``.
        precision_plugin: The precision, under the name that strategies of a trainer have for it.
        start_method: How processes are started: ``"popen"``, ``"spawn"``, ``"fork"`` or ``"forkserver"``.
        **sharding: ``policy``, ``cpu_offload`` and others of :class:`FSDPStrategy`, for the data dimensions.
    """

    def __init__(
        self,
        parallelize_fn: Callable[[Module, Any], Module] | None = None,
        data_parallel_size: Size = "auto",
        tensor_parallel_size: Size = "auto",
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        *,
        data_replicate_size: int = 1,
        data_shard_size: Size = "auto",
        sequence_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        tensor_parallel_plan: Mapping[Any, Any] | None = None,
        loss_parallel: bool = False,
        sequence_dim: int = 1,
        sequence_names: Collection[str | int] | None = None,
        pipeline_schedule: Literal["1f1b", "interleaved", "gpipe"] = "1f1b",
        pipeline_microbatches: int | None = None,
        pipeline_virtual_stages: int | None = None,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        precision_plugin: Precision | None = None,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        **sharding: Unpack[ShardingArguments],
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
        if parallelize_fn is not None and not callable(parallelize_fn):
            raise MisconfigurationException(
                f"parallelize_fn={parallelize_fn!r}: give a function of a model and a mesh that returns the model."
            )
        if tensor_parallel_plan is not None:
            check_plan(tensor_parallel_plan)
        check_flag("loss_parallel", loss_parallel)
        if loss_parallel and pipeline_parallel_size != 1:
            raise MisconfigurationException(
                "loss_parallel=True replaces F.cross_entropy where the model runs, and a pipeline calls the model's"
                " `loss` beside its stages: call sharded_cross_entropy there, and leave loss_parallel out."
            )
        self._parallelize_fn = parallelize_fn
        self._loss_parallel = loss_parallel
        self._sequences: dict[str, Any] = {"dim": check_integer("sequence_dim", sequence_dim), "names": sequence_names}
        self._unchecked: list[weakref.ref[ShardedEngine]] = []
        self._plan = tensor_parallel_plan
        self._asked = check_sizes(
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=tensor_parallel_size,
            data_replicate_size=data_replicate_size,
            data_shard_size=data_shard_size,
            sequence_parallel_size=sequence_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
        )
        self._order = Order.checked(
            pipeline_schedule, pipeline_microbatches, pipeline_virtual_stages, pipeline_parallel_size
        )
        self._options = parse_arguments(
            state_dict_type="sharded" if save_distributed_checkpoint else "full", **sharding
        )

    @property
    def offloads(self) -> bool:  # type: ignore[override]
        return self._options.offload

    @property
    def writes_folders(self) -> bool:
        return self._options.state_dict_type == "sharded"

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the dimensions by name, the outermost first."""
        return resolve_sizes(self.world_size, self.num_nodes, **self._asked)

    @property
    def ranks_a_share(self) -> int:
        sizes = self.sizes
        return sizes["sequence_parallel"] * sizes["tensor_parallel"]

    @property
    def pipeline_stages(self) -> int:  # type: ignore[override]
        return self.sizes["pipeline_parallel"]

    @property
    def runs_whole_batch(self) -> bool:  # type: ignore[override]
        return self._order.ranks > 1

    @property
    def num_slices(self) -> int:
        return self.sizes["sequence_parallel"]

    @property
    def slice_index(self) -> int:
        sizes = self.sizes
        return self.global_rank // sizes["tensor_parallel"] % sizes["sequence_parallel"]

    @property
    def stage_groups(self) -> tuple[Any, ...]:
        return (self.device_mesh["pipeline_parallel"].get_group(),) if self.runs_whole_batch else ()

    @property
    def forward_is_collective(self) -> bool:  # type: ignore[override]
        """Ranks that have other shares of the batch wait for each other where they gather parameters."""
        return self.sizes["data_shard"] * self.sizes["data_replicate"] > 1

    def check_processes(self, number: int) -> None:
        sizes = resolve_sizes(number, self.num_nodes, **self._asked)
        check_mesh_size(sizes, number, "Give sizes whose product is the number of processes.")

    def make_device_mesh(self) -> Any:
        sizes = self.sizes
        check_mesh_size(sizes, self.world_size, "Give sizes whose product is the number of processes.")
        mesh = make_mesh(self.root_device.type, sizes)
        share_sequences(mesh["sequence_parallel"])
        mesh["data_replicate", "data_shard"]._flatten("data_parallel")
        # a dimension that was made of others is asked for by its name, as all are, which torch warns of
        warnings.filterwarnings("ignore", message="Slicing a flattened dim from root mesh")
        return mesh

    def parallelize(self, module: Module) -> Engine:
        mesh, own = self.device_mesh, user_module(module)
        align_random_state([mesh["tensor_parallel"], mesh["sequence_parallel"]])
        if not is_cut(own):  # by an earlier engine
            take_over_from_rank_zero(own, self.root_device)
            self._share_layers(own, mesh)
        if not self.runs_whole_batch:
            return self._sharded(module, mesh)
        return PipelineEngine(
            own,
            mesh["pipeline_parallel"],
            self._order,
            parallelize=lambda stage: engine_around(stage) or self._sharded(stage, mesh),
            device=self.root_device,
            precision=self.precision,
        )

    def _share_layers(self, own: Module, mesh: Any) -> None:
        if self._parallelize_fn is not None:
            changed = self._parallelize_fn(own, mesh)
            if changed is not own:
                raise MisconfigurationException(
                    "parallelize_fn returned another model than it was given: let it change the layers in the model, "
                    "and return that."
                )
        if self._plan is not None:
            apply_tensor_parallel(own, mesh["tensor_parallel"], self._plan, broadcast=False)
        self._check_shared(own)

    def _sharded(self, module: Module, mesh: Any) -> ShardedEngine:
        engine = self._engine(module, mesh)
        self._substitute(engine)
        self._unchecked.append(weakref.ref(engine))
        return engine

    def _engine(self, module: Module, mesh: Any) -> ShardedEngine:
        own, data = user_module(module), self._data_mesh(mesh)
        by_hand = sharded_by_hand(own, data)
        if data is not None and not (by_hand and by_hand.issuperset(own.parameters())):
            return shard_module(module, data, self._options, self.precision, self.root_device, self.broadcast)
        if self._options.recomputes:
            recompute(own, self._options.recompute_policy, self._options.recompute_saved)
        engine = ShardedEngine(module)
        if by_hand:
            engine.sharded()
        give_values(engine, self.precision, self.root_device, self.broadcast)
        place_gradients(own)
        return engine

    def run_batch(
        self, module: Module, batch: Any, window: float = 1, loss: Callable[[Any, Any], Any] | None = None
    ) -> dict[Any, Tensor]:
        return self._pipeline(module).run(batch, window, loss)

    def evaluate_batch(
        self, module: Module, batch: Any, loss: Callable[[Any, Any], Any] | None = None
    ) -> dict[Any, Tensor]:
        return self._pipeline(module).evaluate(batch, loss)

    def predict_batch(self, module: Module, batch: Any) -> Any:
        return self._pipeline(module).predict(batch)

    @staticmethod
    def _pipeline(module: Module) -> PipelineEngine:
        assert isinstance(module, PipelineEngine)
        return module

    def _check_shared(self, own: Module) -> None:
        size = self.sizes["tensor_parallel"]
        if size > 1 and not any(is_sharded_tensor(p) for p in own.parameters()):
            raise MisconfigurationException(
                f"tensor_parallel_size={size}, and no layer of {type(own).__name__} is shared out. Give a"
                " tensor_parallel_plan, such as {'layers.*.up': 'colwise', 'layers.*.down': 'rowwise'}, or a"
                " parallelize_fn, or shard layers in configure_model; or tensor_parallel_size=1."
            )
        if self.runs_whole_batch and any(hasattr(m, "_get_fsdp_state") for m in own.modules()):
            raise MisconfigurationException(
                f"{type(own).__name__} has layers with fully_shard, and a pipeline cuts the model first: leave"
                " fully_shard to the strategy, which applies it to each stage along the data dimensions."
            )

    def _substitute(self, engine: ShardedEngine) -> None:
        """Let functions of torch be those of shared sequences and of sharded logits where the engine runs."""
        sizes = self.sizes
        functions = sequence_functions(self.device_mesh["sequence_parallel"])
        context = Substitution({**functions, **(loss_functions() if self._loss_parallel else {})})
        if functions or self._loss_parallel:
            context.follow(engine.modules() if functions else [engine])
        if sizes["tensor_parallel"] > 1:
            self._check_first(engine)
            engine.register_forward_hook(lambda _, args, output: plain_scalars(output))

    def _check_first(self, engine: ShardedEngine) -> None:
        """Look, at the first pass with samples, whether tensor-parallel processes have the same."""

        def check(module: Module, args: Any, kwargs: dict[str, Any]) -> None:
            if args or len(kwargs) > (METHOD_KEYWORD in kwargs):
                handle.remove()
                check_inputs_alike((args, kwargs), self.device_mesh["tensor_parallel"])

        handle = engine.register_forward_pre_hook(check, with_kwargs=True)

    def process_dataloader(self, dataloader: Any) -> Any:
        """Let batches have this process's slice of each sequence."""
        return split_batches(dataloader, SequenceGroup.of(self.device_mesh["sequence_parallel"]), **self._sequences)

    def before_optimizer_step(self, optimizer: Optimizer) -> None:
        """At the first step: what tensor-parallel processes have whole must not go apart."""
        unchecked, self._unchecked = self._unchecked, []
        for engine in (alive for reference in unchecked if (alive := reference()) is not None):
            sizes, own = self.sizes, user_module(engine)
            if sizes["tensor_parallel"] > 1:
                named = dict(with_plain_names(own, own.named_parameters()))
                check_gradients_alike(whole_over(named, "tensor_parallel"), self.device_mesh["tensor_parallel"])
            if sizes["sequence_parallel"] > 1 and not attentions_so_far():
                rank_zero_warn(
                    f"sequence_parallel_size={sizes['sequence_parallel']}, and no F.scaled_dot_product_attention ran in"
                    f" {type(own).__name__}: each process saw nothing but its slice of a sequence. Attention of another"
                    " kind has to be exchanged: call F.scaled_dot_product_attention, or sequence_attention."
                )

    def explain_error(self, engine: Module | None, error: RuntimeError) -> Exception | None:
        return explain_mixed(error, engine or next(iter(self._alive()), None), self.sizes["tensor_parallel"])

    def _data_mesh(self, mesh: Any) -> Any:
        """The mesh over which parameters are sharded and gradients averaged; None where there is one process only."""
        sizes = self.sizes
        part = "data_shard"
        if sizes["sequence_parallel"] > 1:
            part = "data_shard_sequence"
            mesh["data_shard", "sequence_parallel"]._flatten(part)
        if sizes["data_replicate"] > 1:
            return mesh["data_replicate", part]
        return mesh[part] if sizes["data_shard"] * sizes["sequence_parallel"] > 1 else None
