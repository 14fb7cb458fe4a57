"""What Lightning Fabric has at a path is there at the same path, and is the same object as at home.

Tests of ``treadle_fabric.utilities``, ``treadle_fabric.wrappers`` and ``treadle_fabric.plugins``.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

import treadle_fabric
from treadle_fabric import Fabric, MisconfigurationException
from treadle_fabric.utilities import (
    apply_func,
    cloud_io,
    data,
    device_dtype_mixin,
    device_parser,
    distributed,
    init,
    load,
    logger,
    optimizer,
    testing,
)
from treadle_fabric.utilities.types import Optimizable, Steppable
from treadle_fabric.wrappers import _FabricModule, _FabricOptimizer, _unwrap_objects

HOMES = """
    loggers.csv_logs:CSVLogger = treadle_fabric:CSVLogger
    plugins.environments:SLURMEnvironment = treadle_fabric:SLURMEnvironment
    plugins.io:TorchCheckpointIO = treadle_fabric:TorchCheckpointIO
    plugins.precision:MixedPrecision = treadle_fabric:MixedPrecision
    plugins.precision:XLAPrecision = treadle_fabric.precision:XLAPrecision
    utilities.apply_func:move_data_to_device = treadle_fabric:move_data_to_device
    utilities.cloud_io:_atomic_save = treadle_fabric.checkpoint.torch_file:save_file
    utilities.cloud_io:get_filesystem = treadle_fabric.checkpoint.torch_file:get_filesystem
    utilities.data:AttributeDict = treadle_fabric:AttributeDict
    utilities.data:_set_sampler_epoch = treadle_fabric:set_epoch
    utilities.data:has_len = treadle_fabric:has_len
    utilities.distributed:_suggested_max_num_threads = treadle_fabric.launchers.launcher:threads_per_process
    utilities.distributed:is_shared_filesystem = treadle_fabric.utilities:is_shared_filesystem
    utilities.load:_NotYetLoadedTensor = treadle_fabric.checkpoint:StoredTensor
    utilities.rank_zero:WarningCache = treadle_fabric.rank_zero:WarningCache
    utilities.rank_zero:rank_zero_only = treadle_fabric:rank_zero_only
    utilities.seed:_collect_rng_states = treadle_fabric:collect_rng_states
    utilities.seed:_set_rng_states = treadle_fabric:set_rng_states
    utilities.seed:seed_everything = treadle_fabric:seed_everything
    utilities.types:LRScheduler = treadle_fabric:LRScheduler
    utilities.types:ReduceOp = torch.distributed:ReduceOp
    utilities.types:_Stateful = treadle_fabric:Stateful
    wrappers:_FabricDataLoader = treadle_fabric:FabricDataLoader
    wrappers:_FabricModule = treadle_fabric:FabricModule
    wrappers:_FabricOptimizer = treadle_fabric:FabricOptimizer
    wrappers:is_wrapped = treadle_fabric:is_wrapped
"""


def look_up(place: str) -> Any:
    module, _, name = place.strip().partition(":")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("row", HOMES.strip().splitlines())
def test_a_path_leads_to_the_same_object_as_its_home(row: str) -> None:
    path, home = row.split(" = ")
    assert look_up(f"treadle_fabric.{path.strip()}") is look_up(home)


@pytest.mark.parametrize(
    "path", "plugins.environments plugins.io plugins.precision utilities.load utilities.types wrappers".split()
)
def test_packages_are_attributes(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: Any = treadle_fabric
    for name in path.split("."):
        assert name in dir(found)
        if hasattr(found, "__getattr__"):  # as if nobody had imported the submodule yet
            monkeypatch.delitem(vars(found), name, raising=False)
        found = getattr(found, name)
    assert found is importlib.import_module(f"treadle_fabric.{path}")


def test_an_attribute_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="'treadle_fabric.utilities' has no attribute 'nothing'"):
        treadle_fabric.utilities.nothing  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("function", "given", "gives"),
    [
        (logger._convert_params, None, {}),
        (logger._flatten_dict, {"a": {"b": 1, "c": {"d": 2}}, 5: [1], "e": {}}, {"a/b": 1, "a/c/d": 2, "5": [1]}),
        (logger._sanitize_params, {"a": 1, "b": None, "c": [1], "d": "x"}, {"a": 1, "b": "None", "c": "[1]", "d": "x"}),
        (logger._convert_json_serializable, {"a": 1, "b": {2}}, {"a": 1, "b": "{2}"}),
        (
            logger._sanitize_callable_params,
            {"f": lambda: 5, "one": len, "c": nn.Linear, "n": 1},
            {"f": 5, "one": "len", "c": "Linear", "n": 1},
        ),
        (apply_func.convert_tensors_to_scalars, {"a": torch.tensor([2.5]), "b": "x"}, {"a": 2.5, "b": "x"}),
        (
            lambda value: {key: tensor.dtype for key, tensor in apply_func.convert_to_tensors(value, "cpu").items()},
            {"a": 1, "b": 1.5, "c": True},
            {"a": torch.int32, "b": torch.float32, "c": torch.uint8},
        ),
        (cloud_io._is_local_file_protocol, "s3://bucket/file", False),
        (cloud_io._is_local_file_protocol, "/a/file", True),
        (device_parser._parse_gpu_ids, "0", None),
        (device_parser._determine_root_gpu_device, [3, 1], 3),
        (distributed._sync_ddp_if_available, 2.0, 2.0),
        (distributed._get_default_process_group_backend_for_device, torch.device("cpu"), "gloo"),
    ],
)
def test_helpers_give_what_those_of_lightning_give(function: Any, given: Any, gives: Any) -> None:
    if function is device_parser._parse_gpu_ids:
        assert function(given, include_cuda=True) is gives
    else:
        assert function(torch.tensor(given) if function is distributed._sync_ddp_if_available else given) == gives


def test_prefixes_and_sizes() -> None:
    assert logger._add_prefix({"a": 1}, "p", "-") == {"p-a": 1}
    assert logger._flatten_dict({"a": {"b": 1}}, delimiter=".") == {"a.b": 1}
    with pytest.raises(ValueError, match="does not contain a single element"):
        apply_func.convert_tensors_to_scalars({"a": torch.ones(2)})


def test_loaders_of_iterable_datasets() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter([1])

    assert data.has_iterable_dataset(DataLoader(Stream()))
    assert not data.has_iterable_dataset(DataLoader(range(3)))  # type: ignore[arg-type]
    assert data._num_cpus_available() >= 1


def test_a_module_without_parameters_follows_the_one_around() -> None:
    class Inner(device_dtype_mixin._DeviceDtypeModuleMixin):
        pass

    outer = nn.Sequential(nn.Sequential(Inner()), nn.Linear(1, 1))
    inner: Any = outer[0][0]  # type: ignore[index]
    assert (inner.device, inner.dtype) == (torch.device("cpu"), torch.float32)
    outer.to(torch.float16)
    assert inner.dtype is torch.float16
    outer.to("meta", torch.float64)
    assert (inner.device, inner.dtype) == (torch.device("meta"), torch.float64)
    inner.to("cpu")  # from the meta device, which holds no numbers to move
    assert (inner.device, inner.dtype) == (torch.device("cpu"), torch.float64)
    assert list(outer.state_dict()) == ["1.weight", "1.bias"]


def test_modules_without_values() -> None:
    with init._EmptyInit(enabled=True):
        assert nn.init.constant_(torch.zeros(2), 3).tolist() == [0, 0]
    with init._EmptyInit(enabled=False):
        assert nn.init.constant_(torch.zeros(2), 3).tolist() == [3, 3]
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2))
    assert init._has_meta_device_parameters_or_buffers(model)
    assert not init._has_meta_device_parameters_or_buffers(model, recurse=False)
    assert init._has_meta_device_parameters_or_buffers(torch.optim.SGD(model.parameters(), lr=1))
    init._materialize_meta_tensors(model, "cpu")
    assert not init._has_meta_device_parameters_or_buffers(model)
    bad = nn.Module()
    bad.p = nn.Parameter(torch.empty(2, device="meta"))
    with pytest.raises(MisconfigurationException, match="reset_parameters"):
        init._materialize_meta_tensors(bad, "cpu")


def test_checkpoints_are_read_when_they_are_used(tmp_path: Any) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load._lazy_load(tmp_path / "none.pt")
    torch.save({"a": torch.arange(4.0), "n": {"l": [torch.ones(1)]}, "s": "t"}, tmp_path / "file.pt")
    found = load._lazy_load(tmp_path / "file.pt")
    assert found["s"] == "t" and found["a"].tolist() == [0, 1, 2, 3]
    assert load._materialize_tensors(found)["n"]["l"][0].tolist() == [1]
    target = nn.Linear(2, 2)
    source = {"model": nn.Linear(2, 2).state_dict(), "step": 2, "kept": 3}
    weights, destination = source["model"]["weight"], {"model": target, "step": 0}  # type: ignore[index]
    load._move_state_into(source, destination, keys={"model", "step", "absent"})
    assert source == {"kept": 3} and destination == {"model": target, "step": 2}
    assert torch.equal(target.weight, weights)
    assert cloud_io._load(tmp_path / "file.pt")["s"] == "t"
    with open(tmp_path / "file.pt", "rb") as file:
        assert cloud_io._load(file, map_location="cpu")["s"] == "t"


def test_the_state_of_an_optimizer_is_moved() -> None:
    model = nn.Linear(1, 1)
    adam = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 1)).sum().backward()
    adam.step()
    optimizer._optimizers_to_device([adam], "meta")
    states = list(adam.state.values())
    assert [{name: value.device.type for name, value in state.items()} for state in states] == [
        {"step": "cpu", "exp_avg": "meta", "exp_avg_sq": "meta"}
    ] * 2


def test_any_sampler_is_shared_out() -> None:
    batches = BatchSampler(SequentialSampler(range(7)), 2, drop_last=False)
    shares = [
        list(distributed.DistributedSamplerWrapper(batches, rank=rank, num_replicas=2, shuffle=False))
        for rank in (0, 1)
    ]
    assert shares == [[[0, 1], [4, 5]], [[2, 3], [6]]]
    with pytest.raises(TypeError, match="no length"):
        distributed._DatasetSamplerWrapper(iter([1]))  # type: ignore[arg-type]


def test_wrapped_objects_are_unwrapped() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric._validate_launched()  # one process needs no launch
    model, loader = nn.Linear(2, 2), DataLoader(range(4))  # type: ignore[arg-type]
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped_model, wrapped_sgd = fabric.setup(model, sgd)
    found = _unwrap_objects(
        {"m": wrapped_model, "l": [wrapped_sgd, fabric.setup_dataloaders(loader)], "k": 3, "plain": model}
    )
    assert found["m"] is model and found["plain"] is model and found["k"] == 3
    assert found["l"][0] is sgd and found["l"][1] is loader
    assert isinstance(wrapped_model, _FabricModule) and isinstance(wrapped_sgd, _FabricOptimizer)
    assert _FabricModule(model, fabric.strategy)(torch.ones(1, 2)).shape == (1, 2)
    assert isinstance(sgd, Optimizable) and isinstance(sgd, Steppable) and not isinstance(model, Steppable)
    with pytest.raises(MisconfigurationException, match="Call fabric.launch"):
        Fabric(accelerator="cpu", devices=2)._validate_launched()


def test_what_a_test_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_RUN_STANDALONE_TESTS", raising=False)
    assert testing._runif_reasons() == ([], {})
    assert testing._runif_reasons(min_cuda_gpus=99) == (["GPUs>=99"], {"min_cuda_gpus": True})
    assert testing._runif_reasons(standalone=True) == (["Standalone execution"], {"standalone": True})
    assert testing._runif_reasons(max_torch="2.0")[0] == [f"torch<2.0, {torch.__version__} installed"]
    assert testing._runif_reasons(min_python="3.8", min_torch="2.0", linux_only=False) == ([], {})
    for name, meant in {"sklaern": "sklearn", "min_gpus": "min_cuda_gpus"}.items():
        with pytest.raises(MisconfigurationException, match=f"{name}=.*Did you mean '{meant}'"):
            testing._runif_reasons(**{name: True})  # type: ignore[arg-type]


def exchange(fabric: Fabric) -> list[Any]:
    rank = fabric.global_rank
    own = torch.full((rank + 1, 2), float(rank), requires_grad=True)
    gathered = distributed._gather_all_tensors(own)
    assert gathered[rank] is own and distributed._distributed_is_initialized()
    with distributed._InfiniteBarrier() as barrier:
        if rank == 1:
            time.sleep(0.2)  # for which the other has to wait
            Path("here").touch()
        barrier()
        assert Path("here").exists()
    return [
        [part.tolist() for part in gathered],
        distributed._sync_ddp(torch.tensor(rank + 1)).item(),
        distributed._sync_ddp_if_available(torch.tensor(rank + 1.0), reduce_op="AVG").item(),
        distributed._all_gather_ddp_if_available(torch.tensor([rank])).tolist(),
    ]


def test_collectives_of_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp_fork")
    assert fabric.launch(exchange) == [[[[0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]], 3, 1.5, [[0], [1]]]
