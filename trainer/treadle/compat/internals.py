"""Small parts from deep inside of Lightning that programs and libraries import all the same.

The table of names leads here where Treadle itself has no use for a name.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.profiler
from lightning_utilities.core.imports import RequirementCache
from lightning_utilities.core.rank_zero import WarningCache
from torch import Tensor

from treadle.accelerators import CPUAccelerator
from treadle.callbacks import Checkpoint, ProgressBar
from treadle.module import LightningModule
from treadle.names.table import LIGHTNING
from treadle.trainer import Trainer
from treadle_fabric import CheckpointIO, PathLike, resolve

__all__ = [
    "LIGHTNING_LOGO",
    "convert_inf",
    "get_cpu_stats",
    "get_standard_metrics",
    "merge_dicts",
    "warning_cache",
]

LIGHTNING_LOGO = f"Treadle, by the names of Lightning {LIGHTNING}"
# of annotations
_OUT_DICT = dict[str, Tensor]
_PRECISION_INPUT = str | int
_EVALUATE_OUTPUT = list[Mapping[str, float]]
_PREDICT_OUTPUT = list[Any] | list[list[Any]]
_KINETO_AVAILABLE = torch.profiler.kineto_available()
warning_cache = WarningCache()
_logger = logging.getLogger("treadle_fabric")

_PACKAGES = {
    "_BITSANDBYTES_AVAILABLE": "bitsandbytes",
    "_COMET_AVAILABLE": "comet-ml>=3.44.4",
    "_DEEPSPEED_AVAILABLE": "deepspeed",
    "_HYDRA_AVAILABLE": "hydra-core",
    "_JSONARGPARSE_SIGNATURES_AVAILABLE": "jsonargparse[signatures]>=4.27.7",
    "_MATPLOTLIB_AVAILABLE": "matplotlib>3.1",
    "_MLFLOW_AVAILABLE": "mlflow>=1.0.0",
    "_MPI4PY_AVAILABLE": "mpi4py",
    "_ONNX_AVAILABLE": "onnx",
    "_ONNXSCRIPT_AVAILABLE": "onnxscript>=0.2.2",
    "_PSUTIL_AVAILABLE": "psutil",
    "_REQUESTS_AVAILABLE": "requests",
    "_SKLEARN_AVAILABLE": "scikit-learn",
    "_TENSORBOARD_AVAILABLE": "tensorboard",
    "_TENSORBOARDX_AVAILABLE": "tensorboardX",
    "_TORCH_TRT_AVAILABLE": "torch_tensorrt",
    "_TRANSFORMER_ENGINE_AVAILABLE": "transformer_engine>=0.11.0",
    "_WANDB_AVAILABLE": "wandb>=0.12.10",
    "_XLA_AVAILABLE": "torch_xla>=1.13",
}


def __getattr__(name: str) -> RequirementCache:
    """Whether an optional package is there, by the name of Lightning's flag."""
    if name not in _PACKAGES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return RequirementCache(_PACKAGES[name])


def get_cpu_stats() -> dict[str, float]:
    """Return the use of processors, memory and swap space in percent."""
    return CPUAccelerator().get_device_stats("cpu")


def get_standard_metrics(trainer: Trainer) -> dict[str, int | str]:
    """Return what progress bars show beside logged metrics: the version of the logger, as ``v_num``."""
    shown = ProgressBar().get_metrics(trainer, trainer.lightning_module)
    return {name: value for name, value in shown.items() if name == "v_num"}


def convert_inf(x: float | None) -> float | None:
    """Return a number; None in place of one that is infinite or not a number."""
    return None if x is None or math.isinf(x) or math.isnan(x) else x


def merge_dicts(
    dicts: Sequence[Mapping[str, float]],
    agg_key_funcs: Mapping[str, Callable[[Sequence[float]], float]] | None = None,
    default_func: Callable[[Sequence[float]], float] = lambda values: sum(values) / len(values),
) -> dict[str, Any]:
    """Merge dictionaries of the same form: the values of each key become one.

    Args:
        dicts: The dictionaries. Values may be such dictionaries, too; a key need not be in all of them.
        agg_key_funcs: For keys, the function that makes one value of several; for a dictionary, functions by its keys.
        default_func: That of all other keys. Default: the mean.
    """
    functions = agg_key_funcs or {}
    merged: dict[str, Any] = {}
    for key in dict.fromkeys(key for each in dicts for key in each):
        values: list[Any] = [each[key] for each in dicts if key in each]
        function: Any = functions.get(key)
        if isinstance(values[0], Mapping):
            merged[key] = merge_dicts(values, function, default_func)
        else:
            merged[key] = (function or default_func)(values)
    return merged


def _scan_checkpoints(checkpoint_callback: Checkpoint, logged_model_time: Mapping[str, float]) -> list[Any]:
    """List a callback's checkpoints that are newer than a logger has seen them: (time, path, score, tag)."""
    seen: dict[str, tuple[Any, str]] = {}
    if path := getattr(checkpoint_callback, "last_model_path", ""):
        seen[path] = (getattr(checkpoint_callback, "current_score", None), "latest")
    if path := getattr(checkpoint_callback, "best_model_path", ""):
        seen[path] = (getattr(checkpoint_callback, "best_model_score", None), "best")
    for path, score in getattr(checkpoint_callback, "best_k_models", {}).items():
        seen[path] = (score, "best_k")
    found = [(os.path.getmtime(path), path, *what) for path, what in seen.items() if os.path.isfile(path)]
    newer = [each for each in found if logged_model_time.get(each[1], -math.inf) < each[0]]
    return sorted(newer, key=lambda each: each[0])


def _load_from_checkpoint(
    cls: type[LightningModule],
    checkpoint_path: Any,
    map_location: Any = None,
    hparams_file: Any = None,
    strict: bool | None = None,
    weights_only: bool | None = None,
    **kwargs: Any,
) -> Any:
    """What ``load_from_checkpoint`` does, for classes that override it."""
    load: Any = LightningModule.load_from_checkpoint.__func__  # type: ignore[attr-defined]
    given = {"map_location": map_location, "hparams_file": hparams_file, "strict": strict, "weights_only": weights_only}
    return load(cls, checkpoint_path, **given, **kwargs)


def _convert_fp_tensor(tensor: Tensor, dst_type: str | torch.dtype) -> Tensor:
    """Convert a tensor if it is of a floating-point type."""
    return tensor.to(dst_type) if torch.is_floating_point(tensor) else tensor


@contextmanager
def _jit_is_scripting() -> Generator[None]:
    """Attributes of a LightningModule need no protection from TorchScript here."""
    yield


class _AcceleratorConnector:
    """What would run, with these arguments: the flags that a Trainer makes of "auto".

    Args:
        devices: As the Trainer's.
        num_nodes: As the Trainer's.
        accelerator: As the Trainer's.
        strategy: As the Trainer's.
        plugins: As the Trainer's.
        precision: As the Trainer's.
    """

    def __init__(
        self,
        devices: Any = "auto",
        num_nodes: int = 1,
        accelerator: Any = "auto",
        strategy: Any = "auto",
        plugins: Any = None,
        precision: Any = None,
        **_: Any,
    ) -> None:
        self._plan = resolve(
            accelerator=accelerator,
            strategy=strategy,
            devices=devices,
            num_nodes=num_nodes,
            precision=precision,
            plugins=plugins,
        )
        self.accelerator = self._plan.accelerator

    @property
    def _accelerator_flag(self) -> str:
        return self._plan.devices[0].type

    @property
    def _devices_flag(self) -> int | list[int]:
        indices = [device.index for device in self._plan.devices]
        return len(indices) if None in indices or self._accelerator_flag == "cpu" else indices

    @property
    def is_distributed(self) -> bool:
        """Whether there are several processes."""
        return self._plan.world_size > 1

    @staticmethod
    def _choose_auto_accelerator(*_: Any) -> str:
        return resolve().devices[0].type


class _WrappingCheckpointIO(CheckpointIO):
    """Passes everything on to another checkpoint IO, for those that add something to it.

    Args:
        checkpoint_io: The other one. It may be set later.
    """

    def __init__(self, checkpoint_io: CheckpointIO | None = None) -> None:
        super().__init__()
        self._checkpoint_io = checkpoint_io

    @property
    def checkpoint_io(self) -> CheckpointIO | None:
        """The other one."""
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, checkpoint_io: CheckpointIO) -> None:
        self._checkpoint_io = checkpoint_io

    def _given(self) -> CheckpointIO:
        if self._checkpoint_io is None:
            raise RuntimeError(f"{type(self).__name__} has no checkpoint_io yet: set it first.")
        return self._checkpoint_io

    def save_checkpoint(self, checkpoint: dict[str, Any], path: PathLike, storage_options: Any | None = None) -> None:
        """Save by the other one."""
        self._given().save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, path: PathLike, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """Load by the other one."""
        return self._given().load_checkpoint(path, map_location, weights_only)

    def remove_checkpoint(self, path: PathLike) -> None:
        """Remove by the other one."""
        self._given().remove_checkpoint(path)


class _MockOptimizer(torch.optim.Optimizer):
    """An optimizer of one parameter that nobody reads, to construct schedulers with."""

    def __init__(self) -> None:
        super().__init__([torch.zeros(1)], {})
