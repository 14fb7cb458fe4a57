"""Helpers at the paths where users of Lightning look for them, in both packages.

Tests of ``treadle_fabric.utilities``, ``treadle.utilities``, ``treadle_fabric.accelerators.memory`` and
``treadle.module.steps.returned``.
"""

from __future__ import annotations

import importlib
import random
import warnings
from typing import Any, get_type_hints

import pytest
import torch
from tests.processes import run_in_ranks
from torch import nn

import treadle as L
from treadle.utilities import GradClipAlgorithmType, is_picklable, isolate_rng
from treadle.utilities.memory import garbage_collection_cuda, is_oom_error, recursive_detach
from treadle.utilities.model_helpers import is_overridden
from treadle.utilities.types import STEP_OUTPUT, LRSchedulerTypeTuple, OptimizerLRScheduler
from treadle_fabric import DDPStrategy, Fabric, HalfPrecision, MisconfigurationException, SingleDeviceStrategy
from treadle_fabric.utilities import (
    LightningEnum,
    disable_possible_user_warnings,
    rank_zero_warn,
    suggested_max_num_workers,
)
from treadle_fabric.utilities.cloud_io import get_filesystem
from treadle_fabric.utilities.seed import pl_worker_init_function, reset_seed, seed_everything
from treadle_fabric.utilities.warnings import PossibleUserWarning

PATHS = {
    "treadle_fabric.utilities": """apply_func.apply_to_collection apply_func.move_data_to_device cloud_io.get_filesystem
        data.AttributeDict
        data.has_len data.sized_len data.suggested_max_num_workers distributed.is_shared_filesystem enums.LightningEnum
        exceptions.MisconfigurationException rank_zero.rank_zero_only rank_zero.rank_zero_info seed.seed_everything
        spike.SpikeDetection spike.TrainingSpikeException throughput.Throughput throughput.ThroughputMonitor
        throughput.get_available_flops throughput.measure_flops types.LRScheduler types.PathLike
        warnings.PossibleUserWarning warnings.disable_possible_user_warnings""",
    "treadle.utilities": """combined_loader.CombinedLoader data.extract_batch_size enums.GradClipAlgorithmType
        exceptions.MisconfigurationException exceptions.SIGTERMException grads.grad_norm
        memory.garbage_collection_cuda model_helpers.is_overridden model_summary.ModelSummary
        parameter_tying.find_shared_parameters parsing.AttributeDict parsing.is_picklable rank_zero.rank_zero_warn
        seed.isolate_rng types.EVAL_DATALOADERS
        types.LRSchedulerConfig types.LRSchedulerPLType types.LRSchedulerTypeUnion types.OptimizerLRSchedulerConfig
        types.TRAIN_DATALOADERS warnings.PossibleUserWarning""",
}


def test_names_are_where_users_look_for_them() -> None:
    for package, names in PATHS.items():
        for name in names.split():
            module, _, attribute = name.rpartition(".")
            home = importlib.import_module(f"{package}.{module}")
            assert getattr(home, attribute) is not None and attribute in home.__all__


def test_random_numbers_are_isolated_and_seeds_set_again() -> None:
    seed_everything(3, verbose=False)
    first = random.random(), torch.rand(1)
    reset_seed()
    with isolate_rng():
        random.random(), torch.rand(9)
    assert (random.random(), torch.rand(1)) == first
    pl_worker_init_function(0, rank=1)


def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert [suggested_max_num_workers(n) for n in (1, 4, 8, 32)] == [15, 3, 1, 1]
    with pytest.raises(MisconfigurationException, match="local_world_size"):
        suggested_max_num_workers(0)


def test_what_pickle_takes() -> None:
    assert is_picklable([nn.Linear(2, 2), "a", MisconfigurationException])
    assert not is_picklable(lambda: 0) and not is_picklable({"a": (i for i in ())})


def test_what_is_overridden() -> None:
    class Module(L.LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> None: ...

    assert is_overridden("training_step", Module()) and not is_overridden("validation_step", Module())
    assert not is_overridden("training_step") and is_overridden("forward", nn.Linear(1, 1), nn.Module)
    with pytest.raises(MisconfigurationException, match="has no such method"):
        is_overridden("training_steps", Module())
    with pytest.raises(MisconfigurationException, match="no LightningModule"):
        is_overridden("forward", nn.Linear(1, 1))


def test_file_systems() -> None:
    assert get_filesystem("here").exists(".") and get_filesystem("memory://a").protocol == "memory"


def test_memory() -> None:
    def oom() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    with pytest.raises(RuntimeError) as raised:
        oom()
    assert is_oom_error(raised.value) and is_oom_error(MemoryError())
    assert is_oom_error(RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear"))
    assert is_oom_error(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not is_oom_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_oom_error(ValueError("CUDA out of memory"))
    garbage_collection_cuda()
    found = recursive_detach({"a": [(torch.ones(1, requires_grad=True) * 2)], "b": 1}, to_cpu=True)
    assert not found["a"][0].requires_grad and found["b"] == 1


def test_enumerations() -> None:
    class Kind(LightningEnum):
        A = "a"

    assert Kind.A == "a" and Kind.from_str("A") is Kind.A
    assert GradClipAlgorithmType.supported_types() == ["value", "norm"]
    assert GradClipAlgorithmType.supported_type("norm") and not GradClipAlgorithmType.supported_type("Norm")
    run = L.Trainer(gradient_clip_algorithm=GradClipAlgorithmType.VALUE, logger=False)
    assert run.gradient_clip_algorithm == "value"


def test_type_names_annotate_a_module() -> None:
    class Module(L.LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT: ...

        def configure_optimizers(self) -> OptimizerLRScheduler: ...

    assert get_type_hints(Module.training_step)["return"] == STEP_OUTPUT
    assert get_type_hints(Module.configure_optimizers)["return"] == OptimizerLRScheduler
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1))
    assert isinstance(scheduler, LRSchedulerTypeTuple)


def test_possible_warnings_can_be_turned_off() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        disable_possible_user_warnings()
        rank_zero_warn("maybe", category=PossibleUserWarning)
        rank_zero_warn("surely")
    assert [str(each.message) for each in caught] == ["surely"]


def started_without_them() -> None:
    rank_zero = importlib.reload(importlib.import_module("treadle_fabric.rank_zero"))
    rank_zero.rank_zero_warn("maybe", category=rank_zero.PossibleUserWarning)
    rank_zero.rank_zero_warn("surely")


def test_possible_warnings_can_be_turned_off_for_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSSIBLE_USER_WARNINGS", "off")
    said = run_in_ranks(started_without_them, devices=1)
    assert "UserWarning: surely" in said and "maybe" not in said


def test_both_names_of_a_strategys_precision() -> None:
    for make in (SingleDeviceStrategy, DDPStrategy):
        half = HalfPrecision("bf16-true")
        strategy = make(precision_plugin=half)
        assert strategy.precision is strategy.precision_plugin is half
        with pytest.raises(MisconfigurationException, match="two names of one argument"):
            make(precision=half, precision_plugin=half)
    fabric = Fabric(accelerator="cpu", strategy=SingleDeviceStrategy(precision_plugin=half))
    assert fabric.strategy.precision is half


def test_what_is_left_out_says_what_to_use() -> None:
    with pytest.raises(ImportError, match="DataParallelStrategy is left out on purpose: use strategy='ddp'"):
        from treadle_fabric.strategies import DataParallelStrategy  # noqa: F401
