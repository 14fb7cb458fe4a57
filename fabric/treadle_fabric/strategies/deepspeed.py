"""ZeRO on DeepSpeed: optimizer state, gradients and parameters are shared out over the processes."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.nn import Module
from torch.optim import Optimizer

from treadle_fabric.accelerators import Accelerator
from treadle_fabric.environments import ClusterEnvironment
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.precision import Precision
from treadle_fabric.precision.deepspeed import DeepSpeedPrecision
from treadle_fabric.strategies.parallel import ParallelStrategy
from treadle_fabric.strategies.states.whole_state import WholeStateStrategy
from treadle_fabric.strategies.zero.config import (
    Steps,
    check_batch,
    check_precision,
    config_of,
    engine_config,
    read_config,
    stage_of,
)
from treadle_fabric.strategies.zero.engine import ZeroEngine, deepspeed_for, require_deepspeed, start
from treadle_fabric.types import PathLike

__all__ = ["DeepSpeedStrategy"]


class DeepSpeedStrategy(ParallelStrategy, WholeStateStrategy):
    """TODO"""

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
    ) -> None:
        given = dict(locals())
        super().__init__(
            accelerator,
            parallel_devices,
            cluster_environment,
            None,
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
        self._load_full_weights = load_full_weights
        self._exclude_frozen_parameters = exclude_frozen_parameters
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

    def _alive(self) -> list[ZeroEngine]:
        return [engine for reference in self._engines if (engine := reference()) is not None]

    def precision_for(self, precision: Precision) -> Precision:
        made = precision if isinstance(precision, DeepSpeedPrecision) else DeepSpeedPrecision(precision.precision)
        check_precision(self._config, made.precision, str(made.dtype).removeprefix("torch."))
        return made

    def check_processes(self, number: int) -> None:
        require_deepspeed()
        check_batch(self._config, number)

    # Set-up

    def module_to_device(self, module: Module) -> None:
        if not any(hasattr(p, "ds_id") for p in module.parameters()):
            module.to(self.root_device)

    def setup_module(self, module: Module) -> Module:
        raise NotImplementedError

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        raise NotImplementedError

    def setup_module_and_optimizers(
        self, module: Module, optimizers: Iterable[Optimizer], scheduler: Any | None = None
    ) -> tuple[Module, list[Optimizer], Any | None]:
        optimizers = list(optimizers)
        self._deepspeed = deepspeed_for(self.root_device, self._logging_level)
        precision = self.precision
        assert isinstance(precision, DeepSpeedPrecision)
        config = engine_config(
            self._config,
            dtype=str(precision.dtype).removeprefix("torch."),
            scaling=self._scaling,
            world_size=self.world_size,
            batch=self._batch_size,
            steps=self._steps,
        )
        engine = start(
            self._deepspeed,
            module,
            optimizers[0] if optimizers else None,
            scheduler,
            config,
            self.root_device,
            self.local_rank,
        )
        self._engines = [*(known for known in self._engines if known() is not None), weakref.ref(engine)]
        stepped = engine.deepspeed.basic_optimizer
        return engine, [] if stepped is None else [stepped], engine.deepspeed.lr_scheduler

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
        engine = next(each for each in self._alive() if each.deepspeed.basic_optimizer is optimizer)
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


def _clipped_by_engine(norm: float | None) -> MisconfigurationException:
    value = 1.0 if norm is None else norm
    return MisconfigurationException(
        "clip_gradients was called, and DeepSpeed's engine clips in its step, by the norm of all gradients: say so in"
        f" its config, DeepSpeedStrategy(config={{..., 'gradient_clipping': {value}}})."
    )


_SCALING: Final = ("loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale")
_DEFAULTS: Final = {
    name: parameter.default
    for name, parameter in inspect.signature(DeepSpeedStrategy).parameters.items()
}
