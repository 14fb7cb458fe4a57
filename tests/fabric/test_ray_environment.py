"""Tests of ``treadle_fabric.environments.ray``: what must hold without Ray, with a stand-in for a worker's context.

Workers that Ray has started are in ``tests/ray``.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tests.fabric.test_environments import SLURM, TORCHRUN

from treadle_fabric import MisconfigurationException, Plan, resolve
from treadle_fabric.environments import (
    LightningEnvironment,
    RayEnvironment,
    TorchElasticEnvironment,
    detect,
    detect_environment,
)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A worker of Ray Train: the numbers of its place, and the device that Ray gave it."""
    place = SimpleNamespace(
        world_size=8, world_rank=5, local_world_size=4, local_rank=1, node_rank=1, ids={"GPU": ["1"]}, device="cuda:1"
    )

    def module(name: str, **contents: Any) -> None:
        made = ModuleType(name)
        made.__spec__, made.__path__ = ModuleSpec(name, None, is_package=True), []
        vars(made).update(contents)
        monkeypatch.setitem(sys.modules, name, made)
        if "." in name:
            setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], made)

    names = ("world_size", "world_rank", "local_world_size", "local_rank", "node_rank")
    context = SimpleNamespace(**{f"get_{name}": lambda name=name: getattr(place, name) for name in names})
    runtime = SimpleNamespace(get_accelerator_ids=lambda: place.ids)
    module("ray", get_runtime_context=lambda: runtime)
    module("ray.train", get_context=lambda: context, WorkerGroupError=RuntimeError)
    module("ray.train.torch", get_device=lambda: torch.device(place.device))
    return place


def plan(environ: dict[str, str] | None = None, **arguments: Any) -> Plan:
    available = {"cuda": 4, "cpu": 1}
    return resolve(**arguments, environ=environ or {}, available=available, interactive=False)


def test_a_worker_is_detected_in_whatever_started_ray(worker: SimpleNamespace) -> None:
    for environ in ({}, SLURM, TORCHRUN):
        environment = detect_environment(environ)
        assert type(environment) is RayEnvironment
    assert detect({}).reason == "Ray Train started this process as rank 5 of 8."
    ranks = (environment.world_size(), environment.global_rank(), environment.local_rank(), environment.node_rank())
    assert ranks == (8, 5, 1, 1)


def test_a_program_that_only_imported_ray_is_no_worker(worker: SimpleNamespace) -> None:
    def none() -> None:
        raise RuntimeError("`get_context` cannot be used outside of a Ray Train training function.")

    sys.modules["ray.train"].get_context = none  # type: ignore[attr-defined]
    assert type(detect_environment(TORCHRUN)) is TorchElasticEnvironment
    with pytest.raises(MisconfigurationException, match="no worker of Ray Train"):
        RayEnvironment().world_size()


def test_devices_and_machines_come_from_ray(worker: SimpleNamespace) -> None:
    chosen = plan()
    assert (chosen.strategy, chosen.num_nodes, chosen.launcher) == ("ddp", 2, "external")
    assert chosen.devices[worker.local_rank] == torch.device("cuda:1") and chosen.num_processes == 4
    assert plan(devices=4, num_nodes=2).devices == plan(devices=-1).devices == chosen.devices
    for wrong in ({"devices": 2}, {"devices": 4, "num_nodes": 3}):
        with pytest.raises(MisconfigurationException, match="Ray started 4 of 8 workers"):
            plan(**wrong)
    worker.ids = {}  # no GPU, though torch sees four
    assert set(plan().devices) == {torch.device("cpu")}


def test_machines_with_different_numbers_of_workers(worker: SimpleNamespace) -> None:
    worker.local_world_size, worker.local_rank, worker.ids = 3, 2, {}
    chosen = plan(strategy="ddp")
    assert chosen.num_processes == 3
    chosen.environment.validate_settings(3, 1)


def test_a_program_without_ray_does_not_import_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ray.train", raising=False)
    monkeypatch.setitem(sys.modules, "treadle_fabric.environments.ray", None)  # an error for an import
    assert type(detect_environment({})) is LightningEnvironment
