"""ZeRO on DeepSpeed: optimizer state, gradients and parameters are shared out over the processes."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.nn import Module
from torch.optim import Optimizer

from treadle_fabric.accelerators import Accelerator
from treadle_fabric.checkpoint import CheckpointIO
from treadle_fabric.environments import ClusterEnvironment
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.precision import Precision, needs_closure
from treadle_fabric.precision.deepspeed import DeepSpeedPrecision
from treadle_fabric.strategies.parallel import ParallelStrategy
from treadle_fabric.strategies.parts import note_groups
from treadle_fabric.strategies.unwrapping import user_module
from treadle_fabric.strategies.zero.config import (
    Steps,
    check_batch,
    check_precision,
    check_steps,
    config_of,
    engine_config,
    read_config,
    stage_of,
)
from treadle_fabric.strategies.zero.engine import ZeroEngine, deepspeed_for, require_deepspeed, start, trained
from treadle_fabric.strategies.zero.state import ZeroStateStrategy
from treadle_fabric.types import PathLike

__all__ = ["DeepSpeedStrategy"]


class DeepSpeedStrategy(ParallelStrategy, ZeroStateStrategy):
    """Optimizer state, gradients and parameters are shared out over the processes, by DeepSpeed's ZeRO.

    DeepSpeed's engine runs the backward pass and the step. A model is set up together with its optimizer, or with none
    where the config has one. Gradients accumulate until the optimizer steps, as under every other strategy; only a
    config with ``gradient_accumulation_steps`` lets the engine count, in a hand-written loop, and then the loop steps
    after every batch. The engine clips, by ``gradient_clipping`` of the config, or the Trainer's ``gradient_clip_val``.

    Args:
        accelerator: The hardware.
        zero_optimization: Use ZeRO. Default: True.
        stage: 1 shares out the optimizer state, 2 the gradients too, 3 the parameters too. Default: 2.
        remote_device: Where parameters are made in stage 3: ``"cpu"`` or ``"nvme"``. Default: on the device.
        offload_optimizer: Keep the optimizer state on ``offload_optimizer_device``.
        offload_parameters: Keep parameters on ``offload_params_device``, in stage 3.
        offload_params_device: ``"cpu"`` or ``"nvme"``.
        nvme_path: The folder of a disk, for offloads to ``"nvme"``.
        params_buffer_count: Buffers of the offload of parameters to a disk.
        params_buffer_size: Numbers in each of them.
        max_in_cpu: The numbers of parameters that stay on the host in an offload to a disk.
        offload_optimizer_device: ``"cpu"`` or ``"nvme"``.
        optimizer_buffer_count: Buffers of the offload of optimizer state to a disk.
        block_size: Bytes of an access to a disk.
        queue_depth: Accesses to a disk at a time.
        single_submit: Submit the accesses to a disk one by one.
        overlap_events: Submit accesses to a disk before earlier ones have ended.
        thread_count: Threads for a disk.
        pin_memory: Offload into page-locked memory.
        sub_group_size: Numbers that stage 3 steps at a time.
        contiguous_gradients: Copy gradients into one buffer as they come.
        overlap_comm: Reduce gradients during the backward pass, in the stages 2 and 3.
        allgather_partitions: Gather the parameters after a step by an all-gather.
        reduce_scatter: Reduce gradients by a reduce-scatter.
        allgather_bucket_size: Numbers that are gathered at a time.
        reduce_bucket_size: Numbers that are reduced at a time.
        zero_allow_untested_optimizer: Take any optimizer.
        logging_batch_size_per_gpu: Samples of a process's batch, for DeepSpeed's reports. None and ``"auto"``, the
            default: as in the first loader that is set up.
        config: DeepSpeed's config, a dict or the path of a JSON file, in the place of the arguments above; those that
            differ from their defaults are added. Default: the file that PL_DEEPSPEED_CONFIG_PATH names, if it is set.
        logging_level: From which level on DeepSpeed logs. Default: warnings.
        parallel_devices: The devices of this machine, one a process.
        cluster_environment: Where ranks and addresses come from.
        loss_scale: In float16; 0 (default): it is found during the run.
        initial_scale_power: The power of 2 that the scale begins with.
        loss_scale_window: The number of steps after which the scale grows.
        hysteresis: The number of overflows after which it shrinks.
        min_loss_scale: The smallest scale.
        partition_activations: Share out the activations of DeepSpeed's checkpointed layers.
        cpu_checkpointing: Keep these on the host.
        contiguous_memory_optimization: Keep these in one piece of memory.
        synchronize_checkpoint_boundary: Wait for the device at the boundary of each such layer.
        load_full_weights: Has no effect: checkpoints of whole weights are loaded with and without it.
        precision: Default: ``32-true``.
        process_group_backend: Default: torch's for the device.
        timeout: How long a collective waits for the slowest process.
        exclude_frozen_parameters: Leave frozen parameters out of checkpoints; those of the module are kept when one is
            loaded.
        precision_plugin: The precision, under the name that strategies of a trainer have for it.
        checkpoint_io: Writes and reads checkpoints. Default: folders, to which every process writes its part.

    Raises:
        MisconfigurationException: Arguments and config contradict one another, or cannot work.
    """

    requires_forward_redirect = True
    fixes_parameters = True
    sets_up_jointly = True
    restores_after_setup = True
    handles_gradient_clipping = True
    owns_optimizer_step = True
    allows_inference_mode = False  # gathered parameters keep their memory for later passes

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        zero_optimization: bool = True,
        stage: int = 2,
        remote_device: str | None = None,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        offload_params_device: str = "cpu",
        nvme_path: str = "/local_nvme",
        params_buffer_count: int = 5,
        params_buffer_size: int = 100_000_000,
        max_in_cpu: int = 1_000_000_000,
        offload_optimizer_device: str = "cpu",
        optimizer_buffer_count: int = 4,
        block_size: int = 1048576,
        queue_depth: int = 8,
        single_submit: bool = False,
        overlap_events: bool = True,
        thread_count: int = 1,
        pin_memory: bool = False,
        sub_group_size: int = 1_000_000_000_000,
        contiguous_gradients: bool = True,
        overlap_comm: bool = True,
        allgather_partitions: bool = True,
        reduce_scatter: bool = True,
        allgather_bucket_size: int = 200_000_000,
        reduce_bucket_size: int = 200_000_000,
        zero_allow_untested_optimizer: bool = True,
        logging_batch_size_per_gpu: int | str | None = "auto",
        config: PathLike | dict[str, Any] | None = None,
        logging_level: int = 30,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        loss_scale: float = 0,
        initial_scale_power: int = 16,
        loss_scale_window: int = 1000,
        hysteresis: int = 2,
        min_loss_scale: int = 1,
        partition_activations: bool = False,
        cpu_checkpointing: bool = False,
        contiguous_memory_optimization: bool = False,
        synchronize_checkpoint_boundary: bool = False,
        load_full_weights: bool = False,
        precision: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        exclude_frozen_parameters: bool = False,
        *,
        precision_plugin: Precision | None = None,
        checkpoint_io: CheckpointIO | None = None,
    ) -> None:
        given = dict(locals())
        super().__init__(
            accelerator,
            parallel_devices,
            cluster_environment,
            checkpoint_io,
            precision,
            process_group_backend,
            timeout,
            precision_plugin=precision_plugin,
        )
        arguments = {name: given[name] for name in _DEFAULTS}
        self._config = config_of(read_config(config), arguments, _DEFAULTS)
        self._scaling = {name: given[name] for name in _SCALING}
        self._remote_device = remote_device
        self._logging_level = logging_level
        self._leaves_frozen_out = exclude_frozen_parameters
        self._steps: Steps | None = None
        self._batch_size: int | None = None
        self._deepspeed: Any = None
        self._engines: list[weakref.ref[ZeroEngine]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_engines": [], "_deepspeed": None}  # of this process

    @property
    def config(self) -> dict[str, Any]:
        """DeepSpeed's config, without what a run decides."""
        return self._config

    @property
    def zero_stage_3(self) -> bool:
        """Whether parameters are shared out, too."""
        return stage_of(self._config) == 3

    @property
    def forward_is_collective(self) -> bool:  # type: ignore[override]
        return self.zero_stage_3

    @property
    def engine(self) -> Any:
        """DeepSpeed's engine that was set up last, or None."""
        engines = self._alive()
        return engines[-1].deepspeed if engines else None

    @property
    def model(self) -> Any:
        """The same as :attr:`engine`."""
        return self.engine

    @property
    def leaves_frozen_out(self) -> bool:
        return self._leaves_frozen_out

    @property
    def averages_weights(self) -> bool:  # type: ignore[override]
        return not self.zero_stage_3

    @property
    def steps_copies(self) -> bool:  # type: ignore[override]
        return stage_of(self._config) > 0 or self.precision.precision != "32-true"

    @property
    def brings_optimizer(self) -> bool:  # type: ignore[override]
        return "optimizer" in self._config

    def _alive(self) -> list[ZeroEngine]:
        return [engine for reference in self._engines if (engine := reference()) is not None]

    def precision_for(self, precision: Precision) -> Precision:
        made = precision if isinstance(precision, DeepSpeedPrecision) else DeepSpeedPrecision(precision.precision)
        check_precision(self._config, made.precision, _dtype_name(made))
        return made

    def check_processes(self, number: int) -> None:
        require_deepspeed()
        check_batch(self._config, number)

    # Set-up

    def module_to_device(self, module: Module) -> None:
        if not any(hasattr(p, "ds_id") for p in module.parameters()):
            module.to(self.root_device)

    def setup_module(self, module: Module) -> Module:
        """For evaluation: DeepSpeed trains a module with the optimizer that it is set up with."""
        stage = 3 if self.zero_stage_3 else 0
        config = {name: value for name, value in self._config.items() if name not in ("optimizer", "scheduler")}
        if stage == 0:
            config.pop("zero_optimization", None)
        return self._start(module, None, None, config)

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        raise MisconfigurationException(
            "DeepSpeedStrategy sets up a module and its optimizer together: model, optimizer = fabric.setup(model,"
            " optimizer)."
        )

    def setup_module_and_optimizers(
        self, module: Module, optimizers: Iterable[Optimizer], scheduler: Any | None = None
    ) -> tuple[Module, list[Optimizer], Any | None]:
        optimizers = list(optimizers)
        self._check_set_up(optimizers, scheduler)
        if not optimizers and "optimizer" not in self._config:
            return self.setup_module(module), [], scheduler
        given = [list(group["params"]) for group in optimizers[0].param_groups] if optimizers else []
        engine = self._start(module, optimizers[0] if optimizers else None, scheduler, self._config)
        stepped = engine.stepped
        stepped.zero_grad = functools.partial(_discard, weakref.ref(engine))
        if engine.steps_copies:
            note_groups(stepped, given or [list(trained(user_module(module)))])
        made = engine.deepspeed.lr_scheduler
        if self._steps is not None:
            engine.deepspeed.lr_scheduler = None  # a trainer steps it, as any other
        return engine, [stepped], made

    def _check_set_up(self, optimizers: list[Optimizer], scheduler: Any | None) -> None:
        """Refuse optimizers that DeepSpeed cannot step."""
        if len(optimizers) > 1:
            raise MisconfigurationException(
                f"{len(optimizers)} optimizers for one model, and an engine of DeepSpeed steps one. Make one optimizer"
                " with several parameter groups, or set up each part of the model with its optimizer as a model of its"
                " own."
            )
        for optimizer in optimizers:
            if needs_closure(optimizer):
                raise MisconfigurationException(
                    f"{type(optimizer).__name__} evaluates its closure several times in one step, and DeepSpeed's"
                    " engine steps once a batch. Use another optimizer, such as AdamW."
                )
        for name, own in (("optimizer", optimizers), ("scheduler", scheduler)):
            if own and name in self._config:
                kind = type(optimizers[0] if name == "optimizer" else scheduler).__name__
                raise MisconfigurationException(
                    f"The DeepSpeed config has {name}={self._config[name].get('type')!r}, and {kind} was set up. Leave"
                    " one of them out."
                )

    def _start(
        self, module: Module, optimizer: Optimizer | None, scheduler: Any | None, config: dict[str, Any]
    ) -> ZeroEngine:
        own = user_module(module)
        if self.zero_stage_3 and any(hasattr(each, "_orig_mod") for each in module.modules()):
            raise MisconfigurationException(
                f"{type(own).__name__} was compiled by torch.compile, or a part of it, and in stage 3 DeepSpeed gathers"
                " parameters between layers, which torch does not trace. Use stage 2, or leave torch.compile out."
            )
        for known in self._alive():
            if user_module(known) is own:
                known.end()  # its hooks would reduce the gradients, too
                self._engines = [each for each in self._engines if each() is not known]
        self._deepspeed = deepspeed_for(self.root_device, self.local_rank, self._logging_level)
        made = self._whole_config(config)
        if (
            made.get("fp16", {}).get("enabled")
            and not self._deepspeed.accelerator.get_accelerator().is_fp16_supported()
        ):
            raise MisconfigurationException(
                f"precision={self.precision.precision!r}, and DeepSpeed does not train in float16 on this"
                f" {self.root_device.type!r} device. Use precision='bf16-mixed' or '32-true'."
            )
        engine = start(self._deepspeed, module, optimizer, scheduler, made)
        self._engines = [*(known for known in self._engines if known() is not None), weakref.ref(engine)]
        return engine

    def _whole_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """The config for an engine, of what is known now."""
        return engine_config(
            config,
            dtype=_dtype_name(self.precision),
            scaling=self._scaling,
            world_size=self.world_size,
            batch=self._batch_size,
            steps=self._steps,
        )

    def engine_init_context(self) -> AbstractContextManager[Any]:
        """In stage 3, share the parameters out as soon as each layer is made."""
        if not self.zero_stage_3:
            return nullcontext()
        deepspeed = deepspeed_for(self.root_device, self.local_rank, self._logging_level)
        remote = None if self._remote_device == "none" else self._remote_device
        context: AbstractContextManager[Any] = deepspeed.zero.Init(
            remote_device=remote, config_dict_or_path=self._whole_config(self._config), enabled=True
        )
        return context

    def module_sharded_context(self) -> AbstractContextManager[Any]:
        """The same as :meth:`engine_init_context`."""
        return self.engine_init_context()

    def process_dataloader(self, dataloader: Any) -> Any:
        """Note the number of samples of a batch, which DeepSpeed's reports of the throughput need."""
        sources = dataloader, getattr(dataloader, "batch_sampler", None)
        sizes = [size for size in (getattr(source, "batch_size", None) for source in sources) if isinstance(size, int)]
        if sizes and self._batch_size is None:
            self._batch_size = sizes[0]
            for engine in self._alive():  # a trainer sets the module up first
                config = self._whole_config(self._config)
                engine.deepspeed.set_train_micro_batch_size(config["train_micro_batch_size_per_gpu"])
                engine.deepspeed.tput_timer.batch_size = config["train_batch_size"]
        return dataloader

    def configure_steps(self, accumulate: int, clip_norm: float | None, clip_value: float) -> None:
        if clip_value:
            raise MisconfigurationException(
                f"gradient_clip_val={clip_value} with gradient_clip_algorithm='value', and DeepSpeed's engine clips by"
                " the norm of all gradients: use gradient_clip_algorithm='norm'."
            )
        steps = Steps(accumulate, clip_norm)
        check_steps(self._config, steps)
        self._steps = steps

    # The step

    def _engine_of(self, module: Module | None) -> ZeroEngine:
        if isinstance(module, ZeroEngine):
            return module
        engines = self._alive()
        if len(engines) == 1:
            return engines[0]
        raise MisconfigurationException(
            f"{len(engines)} models are set up, each with an engine of DeepSpeed, which runs the backward pass: say"
            " whose loss it is, fabric.backward(loss, model=model)."
        )

    def backward(self, tensor: Tensor, module: Module | None, *args: Any, **kwargs: Any) -> None:
        self._engine_of(module).backward(tensor, *args, **kwargs)

    def optimizer_step(self, optimizer: Optimizer, **kwargs: Any) -> Any:
        engine = next((each for each in self._alive() if each.stepped is optimizer), None)
        if engine is None:
            raise MisconfigurationException(
                f"{type(optimizer).__name__} is not the optimizer of a model that is set up: use what fabric.setup"
                " returned last."
            )
        closure = kwargs.pop("closure", None)
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        engine.step()
        return result

    def clip_gradients_norm(
        self,
        module: Module | None,
        optimizer: Optimizer,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        raise _clipped_by_engine(max_norm)

    def clip_gradients_value(self, module: Module | None, optimizer: Optimizer, clip_val: float) -> None:
        raise _clipped_by_engine(None)

    def no_backward_sync(self, module: Module, enabled: bool = True) -> AbstractContextManager[Any]:
        """Do nothing: in the stages 0 and 1 no backward pass reduces, and in 2 and 3 each one has to."""
        return nullcontext()

    def join_forward(self, module: Module, method: str = "forward") -> None:
        if self.forward_is_collective:
            self._engine_of(module).join_forward(method)

    def finish_forward(self, module: Module, method: str) -> None:
        if self.forward_is_collective and self._engine_of(module).ended_early:
            self.join_forward(module, method)

    def join_backward(self, module: Module, label: str) -> None:
        """A backward pass with gradients of zero; how many processes have nothing is counted where they met."""
        engine = self._engine_of(module)
        untouched = not engine.deepspeed._unmanaged_backward_count and engine.meets_in_backward
        key, store = f"treadle/idle/zero/{label}", dist.distributed_c10d._get_default_store()
        if untouched:
            store.add(key, 1)
        engine.join_backward()
        if untouched:
            self._deepspeed.accelerator.get_accelerator().synchronize()
            if store.add(key, 0) == self.world_size:  # the gradients are reduced: every rank was counted
                engine.discard()


def _discard(reference: weakref.ref[ZeroEngine], set_to_none: bool = True) -> None:
    """Do what an optimizer's ``zero_grad`` does: its engine has the gradients."""
    if (engine := reference()) is not None:
        engine.discard()


def _dtype_name(precision: Precision) -> str:
    assert isinstance(precision, DeepSpeedPrecision)
    return str(precision.dtype).removeprefix("torch.")


def _clipped_by_engine(norm: float | None) -> MisconfigurationException:
    value = 1.0 if norm is None else norm
    return MisconfigurationException(
        "clip_gradients was called, and DeepSpeed's engine clips in its step, by the norm of all gradients: say so in"
        f" its config, DeepSpeedStrategy(config={{..., 'gradient_clipping': {value}}})."
    )


_SCALING: Final = ("loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale")
_DEFAULTS: Final = {
    name: parameter.default for name, parameter in inspect.signature(DeepSpeedStrategy).parameters.items()
}
