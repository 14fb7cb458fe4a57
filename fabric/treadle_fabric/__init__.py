"""Treadle's runtime: what a hand-written PyTorch loop needs to run on any device, in any number of processes."""

import gc
from typing import TYPE_CHECKING

_collects = gc.isenabled()
gc.disable()  # one full collection of what torch has made takes as long as all of these imports


from treadle_fabric.accelerators import (
    ACCELERATOR_REGISTRY,
    Accelerator,
    CPUAccelerator,
    CUDAAccelerator,
    MPSAccelerator,
    find_usable_cuda_devices,
)
from treadle_fabric.attribute_dict import AttributeDict
from treadle_fabric.batches import batch_mover, infer_batch_size, map_tensors, move_data_to_device
from treadle_fabric.checkpoint import (
    AsyncCheckpointIO,
    CheckpointIO,
    DistributedCheckpointIO,
    TorchCheckpointIO,
    newest_good,
)
from treadle_fabric.checks import (
    check_flag,
    check_integer,
    check_loss,
    is_list,
    is_number,
    is_several,
    on_demand,
    one_or_several,
    require_package,
)
from treadle_fabric.containers import leaves
from treadle_fabric.coordination import StopAgreement, all_gather_objects, gather_objects, on_rank_zero
from treadle_fabric.data.loader import FabricDataLoader
from treadle_fabric.data.resumable import ResumableDataLoader
from treadle_fabric.data.samplers import has_len, sampler_epoch, seed_workers, set_epoch, sized_len
from treadle_fabric.data.sharding import ShardedSampler, shard_dataloader
from treadle_fabric.data.streams import PrivateStream
from treadle_fabric.environments import (
    ClusterEnvironment,
    KubeflowEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
    detect_environment,
    find_free_port,
)
from treadle_fabric.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointUnsafeError,
    DeviceUnavailableError,
    LeftOutError,
    MisconfigurationException,
    MissingArgumentError,
    MissingMetricError,
    MissingPackageError,
    NoModuleError,
    NonFiniteError,
    NoSuchNameError,
    NothingThereError,
    NotLaunchedError,
    ProcessFailedError,
    RemovedHookError,
    RendezvousError,
    RequeueError,
    TrainingSpikeException,
    TreadleError,
    UnknownArgumentError,
    UnknownNameError,
    UnusableResultError,
    UnusedParametersError,
    WrongTypeError,
    describe_error,
    left_out,
    near_names,
    suggests_arguments,
    unknown_name,
)
from treadle_fabric.fabric import Fabric
from treadle_fabric.failures import claim_failure, end_run, first_failure
from treadle_fabric.launchers import ExternalLauncher, Launcher, SignalListener, SpawnLauncher, SubprocessLauncher
from treadle_fabric.loggers import CSVLogger, DummyLogger, Logger, TensorBoardLogger, rank_zero_experiment
from treadle_fabric.precision import (
    DoublePrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
    canonical_precision,
    make_precision,
)
from treadle_fabric.randomness.seeds import reset_seed, seed_everything, worker_init_function
from treadle_fabric.randomness.state import collect_rng_states, isolate_rng, set_rng_states
from treadle_fabric.rank_zero import (
    LightningDeprecationWarning,
    PossibleUserWarning,
    disable_possible_user_warnings,
    filter_warnings_as,
    rank_prefixed_message,
    rank_zero_debug,
    rank_zero_deprecation,
    rank_zero_info,
    rank_zero_only,
    rank_zero_warn,
    warn_user,
)
from treadle_fabric.resolve import Plan, resolve
from treadle_fabric.setup.metrics import compute_alone, forget_computed
from treadle_fabric.setup.module import FabricModule, engine_of, method_of
from treadle_fabric.setup.optimizer import FabricOptimizer
from treadle_fabric.setup.wrapped import is_wrapped
from treadle_fabric.strategies import (
    STRATEGY_REGISTRY,
    DDPStrategy,
    ParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    local_gradients,
)
from treadle_fabric.strategies.unwrapping import (
    load_module_state,
    module_state,
    name_in,
    names_in,
    plain_name,
    uncompiled,
    user_module,
    with_plain_names,
)
from treadle_fabric.tensor_pickle import is_picklable
from treadle_fabric.types import LRScheduler, PathLike, Stateful

if _collects:
    if not gc.get_freeze_count():
        gc.freeze()
        gc.unfreeze()  # what was made goes to the oldest generation: it stays, and no collection has to look at it now
    gc.enable()

__version__ = "0.1.0"

if TYPE_CHECKING:
    from treadle_fabric import plugins as plugins
    from treadle_fabric import utilities as utilities
    from treadle_fabric import wrappers as wrappers
    from treadle_fabric.checkpoint import ExportingCheckpointIO
    from treadle_fabric.environments import RayEnvironment
    from treadle_fabric.estimating import Estimate, estimate
    from treadle_fabric.strategies import (
        FSDPStrategy,
        ModelParallelStrategy,
        apply_tensor_parallel,
        local_attention,
        sequence_attention,
        sequence_offset,
        sharded_cross_entropy,
        split_sequence,
    )

__all__ = [
    "ACCELERATOR_REGISTRY",
    "STRATEGY_REGISTRY",
    "Accelerator",
    "AsyncCheckpointIO",
    "AttributeDict",
    "CPUAccelerator",
    "CSVLogger",
    "CUDAAccelerator",
    "CheckpointCorruptError",
    "CheckpointError",
    "CheckpointIO",
    "CheckpointMismatchError",
    "CheckpointNotFoundError",
    "CheckpointUnsafeError",
    "ClusterEnvironment",
    "DDPStrategy",
    "DeviceUnavailableError",
    "DistributedCheckpointIO",
    "DoublePrecision",
    "DummyLogger",
    "Estimate",
    "ExportingCheckpointIO",
    "ExternalLauncher",
    "FSDPStrategy",
    "Fabric",
    "FabricDataLoader",
    "FabricModule",
    "FabricOptimizer",
    "HalfPrecision",
    "KubeflowEnvironment",
    "LRScheduler",
    "LSFEnvironment",
    "Launcher",
    "LeftOutError",
    "LightningDeprecationWarning",
    "LightningEnvironment",
    "Logger",
    "MPIEnvironment",
    "MPSAccelerator",
    "MisconfigurationException",
    "MissingArgumentError",
    "MissingMetricError",
    "MissingPackageError",
    "MixedPrecision",
    "ModelParallelStrategy",
    "NoModuleError",
    "NoSuchNameError",
    "NonFiniteError",
    "NotLaunchedError",
    "NothingThereError",
    "ParallelStrategy",
    "PathLike",
    "Plan",
    "PossibleUserWarning",
    "Precision",
    "PrivateStream",
    "ProcessFailedError",
    "RayEnvironment",
    "RemovedHookError",
    "RendezvousError",
    "RequeueError",
    "ResumableDataLoader",
    "SLURMEnvironment",
    "ShardedSampler",
    "SignalListener",
    "SingleDeviceStrategy",
    "SpawnLauncher",
    "Stateful",
    "StopAgreement",
    "Strategy",
    "SubprocessLauncher",
    "TensorBoardLogger",
    "TorchCheckpointIO",
    "TorchElasticEnvironment",
    "TrainingSpikeException",
    "TreadleError",
    "UnknownArgumentError",
    "UnknownNameError",
    "UnusableResultError",
    "UnusedParametersError",
    "WrongTypeError",
    "__version__",
    "all_gather_objects",
    "apply_tensor_parallel",
    "batch_mover",
    "canonical_precision",
    "check_flag",
    "check_integer",
    "check_loss",
    "claim_failure",
    "collect_rng_states",
    "compute_alone",
    "describe_error",
    "detect_environment",
    "disable_possible_user_warnings",
    "end_run",
    "engine_of",
    "estimate",
    "filter_warnings_as",
    "find_free_port",
    "find_usable_cuda_devices",
    "first_failure",
    "forget_computed",
    "gather_objects",
    "has_len",
    "infer_batch_size",
    "is_list",
    "is_number",
    "is_picklable",
    "is_several",
    "is_wrapped",
    "isolate_rng",
    "leaves",
    "left_out",
    "load_module_state",
    "local_attention",
    "local_gradients",
    "make_precision",
    "map_tensors",
    "method_of",
    "module_state",
    "move_data_to_device",
    "name_in",
    "names_in",
    "near_names",
    "newest_good",
    "on_demand",
    "on_rank_zero",
    "one_or_several",
    "plain_name",
    "rank_prefixed_message",
    "rank_zero_debug",
    "rank_zero_deprecation",
    "rank_zero_experiment",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
    "require_package",
    "reset_seed",
    "resolve",
    "sampler_epoch",
    "seed_everything",
    "seed_workers",
    "sequence_attention",
    "sequence_offset",
    "set_epoch",
    "set_rng_states",
    "shard_dataloader",
    "sharded_cross_entropy",
    "sized_len",
    "split_sequence",
    "suggests_arguments",
    "uncompiled",
    "unknown_name",
    "user_module",
    "warn_user",
    "with_plain_names",
    "worker_init_function",
]

if not TYPE_CHECKING:
    __getattr__ = on_demand(  # most programs shard nothing
        __name__,
        {
            "ExportingCheckpointIO": "treadle_fabric.checkpoint",
            "RayEnvironment": "treadle_fabric.environments",
            **dict.fromkeys(("Estimate", "estimate"), "treadle_fabric.estimating"),
            **dict.fromkeys(
                (
                    "FSDPStrategy",
                    "ModelParallelStrategy",
                    "apply_tensor_parallel",
                    "local_attention",
                    "sequence_attention",
                    "sequence_offset",
                    "sharded_cross_entropy",
                    "split_sequence",
                ),
                "treadle_fabric.strategies",
            ),
        },
        submodules=("plugins", "utilities", "wrappers"),
    )
