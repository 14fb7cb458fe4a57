"""Objects and decisions of ranks travel through host memory, whatever the default group reaches.

Tests of ``treadle_fabric.coordination.objects``, ``treadle_fabric.coordination.hosts``,
``treadle_fabric.tensor_pickle``, ``treadle_fabric.strategies.parallel``.
"""

from __future__ import annotations

import os
import resource
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.processes import run_in_ranks

import treadle as L
from treadle_fabric import (
    DDPStrategy,
    Fabric,
    MisconfigurationException,
    all_gather_objects,
    gather_objects,
    on_rank_zero,
)
from treadle_fabric.coordination import StepClock, host_group, objects, reached_by
from treadle_fabric.data.resumable import ResumableDataLoader
from treadle_fabric.failures import current_member
from treadle_fabric.strategies import parallel
from treadle_fabric.tensor_pickle import dump_to_send, load


class Elsewhere(torch.Tensor):
    """A tensor on the CPU that says that it is on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 1)

    def cpu(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


class Wrapped(torch.Tensor):
    """A wrapper without memory of its own, as if on a GPU, around a tensor on the CPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapped:
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=torch.device("cuda", 1))
        made.inner = inner
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
            return args[0].inner
        raise NotImplementedError(func)


@pytest.mark.parametrize("kind", [Elsewhere, Wrapped])
def test_nothing_is_pickled_with_its_device(kind: Any) -> None:
    tensor = torch.arange(3.0).as_subclass(kind) if kind is Elsewhere else kind(torch.arange(3.0))
    assert tensor.device.type == "cuda"
    stream, storages, buffers = dump_to_send({"state": [tensor]})
    assert b"cuda" not in stream
    (found,) = load(stream, storages, buffers)["state"]
    assert type(found) is torch.Tensor and found.device.type == "cpu" and found.tolist() == [0, 1, 2]


def make_gloo(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    return dist.ProcessGroupGloo(store, rank, size, timeout)


def with_a_group_of_devices(folder: str) -> None:
    """The default group reaches GPUs only: nothing of the host may be sent through it."""
    dist.Backend.register_backend("gpusonly", make_gloo, devices=["cuda"])
    fabric = Fabric(accelerator="cpu", devices=2, strategy=DDPStrategy(process_group_backend="gpusonly"))
    fabric.launch()
    rank, strategy = fabric.global_rank, fabric.strategy
    assert reached_by(None) == ["cuda"] and dist.get_backend(host_group().group) == "gloo"
    assert host_group().group is host_group().group
    with pytest.raises(RuntimeError, match="No backend type associated with device type cpu"):
        dist.all_reduce(torch.ones(1))
    fabric.barrier()
    mine = {"t": torch.full((40000,), rank), "a": np.full(40000, rank), "view": torch.arange(4).as_subclass(Elsewhere)}
    for src in (0, 1):
        found = fabric.broadcast(mine, src)
        assert found["t"].unique().item() == found["a"][0] == src and found["view"].tolist() == [0, 1, 2, 3]
        assert src == rank or type(found["view"]) is torch.Tensor
    assert [found["t"][0].item() for found in all_gather_objects(fabric, mine)] == [0, 1]
    gathered = gather_objects(fabric, mine)
    assert rank or [int(found["a"][0]) for found in gathered or []] == [0, 1]
    assert on_rank_zero(fabric, lambda: rank, "did nothing") == 0
    assert [strategy.reduce_boolean_decision(rank == 0, all=each) for each in (True, False)] == [False, True]
    clock = StepClock(fabric)
    assert not clock.over(100.0 if rank == 0 else 0.0)
    with fabric.rank_zero_first():
        pass
    fabric.save(f"{folder}/a.ckpt", {"a": torch.ones(1)})
    loader = fabric.setup_dataloaders(torch.utils.data.DataLoader(torch.arange(4)), resumable=True)
    assert isinstance(loader, ResumableDataLoader) and len(loader.state_dict()["ranks"]) == 2
    # the group that is given is asked what it reaches, and not the default group
    beside = dist.new_group(backend="gloo")
    assert fabric.all_gather(rank, group=beside).tolist() == [0, 1]
    assert fabric.all_reduce(torch.tensor([rank]), group=beside, reduce_op="sum").tolist() == [1]


def test_nothing_of_the_host_goes_through_a_group_of_devices(tmp_path: Path) -> None:
    run_in_ranks(with_a_group_of_devices, str(tmp_path))


def with_a_subgroup_of_devices() -> None:
    """The default group reaches the CPU, and the given one GPUs only."""
    dist.Backend.register_backend("gpusonly", make_gloo, devices=["cuda"])
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    group = dist.new_group(backend="gpusonly")
    assert reached_by(group) == ["cuda"] and "cpu" in reached_by(None)
    asked: list[str] = []

    class OnHost(torch.Tensor):
        def to(self, device: Any, *args: Any, **kwargs: Any) -> Any:
            asked.append(str(device))
            return self.as_subclass(torch.Tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DDPStrategy, "root_device", torch.device("cuda", 3))
        strategy: Any = fabric.strategy
        strategy._on_device(torch.ones(1).as_subclass(OnHost), group)
        strategy._on_device(torch.ones(1).as_subclass(OnHost), None)
    assert asked == ["cuda:3"]
    fabric.barrier()  # rank 0 hosts the store, through which rank 1 may still be connecting


def test_a_tensor_goes_where_the_given_group_reaches_it() -> None:
    run_in_ranks(with_a_subgroup_of_devices)


def counting(call: Any, sizes: list[int]) -> Any:
    def counted(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.nbytes)
        return call(tensor, *args, **kwargs)

    return counted


def sends_large() -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    rank, size = fabric.global_rank, 96 * 2**20
    objects._CHUNK = 16 * 2**20
    sizes: list[int] = []
    for name in ("broadcast", "send", "irecv"):
        setattr(dist, name, counting(getattr(dist, name), sizes))
    for kind in (torch.ones, np.ones):
        for send in (fabric.broadcast, lambda mine: (gather_objects(fabric, mine, 1) or [None])[0]):
            mine = kind(size // 8, dtype=torch.float64 if kind is torch.ones else np.float64) if rank == 0 else None
            fabric.barrier()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            found = send(mine)
            if rank == 1:
                assert found.nbytes == size and found[-1] == 1
                found[0] = 2  # its own memory
                growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
                assert growth < 1.4 * size, growth / size
            del mine, found
    assert sum(sizes) >= 3 * size and max(sizes) <= 16 * 2**20


def test_large_objects_come_in_pieces_into_the_memory_where_they_stay() -> None:
    run_in_ranks(sends_large)


# --- decisions at every batch ---


class Stream(torch.utils.data.IterableDataset[torch.Tensor]):
    def __iter__(self) -> Any:
        return iter(torch.ones(3 + int(os.environ["LOCAL_RANK"]), 1))


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def streams() -> None:
    asked: list[str] = []

    class Watched(DDPStrategy):
        def all_reduce(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            asked.append("all_reduce")
            return super().all_reduce(tensor, *args, **kwargs)

        def all_gather(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            asked.append("all_gather")
            return super().all_gather(tensor, *args, **kwargs)

    trainer = L.Trainer(accelerator="cpu", devices=2, strategy=Watched(), max_epochs=2, logger=False,
                        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    begins: list[int] = []
    module = Module()
    module.on_train_batch_start = lambda batch, batch_idx: begins.append(len(asked))  # type: ignore[method-assign]
    trainer.fit(module, torch.utils.data.DataLoader(Stream(), batch_size=1))
    assert trainer.global_step == 6  # the rank with the fewest batches ends each epoch
    # at the first batch, whether losses have weights; and at the end of an epoch what was logged
    assert begins[1] == begins[2] and begins[3] == begins[4] == begins[5], begins


def test_no_vote_at_a_batch_waits_for_the_device() -> None:
    run_in_ranks(streams)


# --- the end of a group ---


def ends(how: str) -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    rank, member = fabric.global_rank, current_member()
    assert member is not None
    calls: list[str] = []
    hangs = threading.Event()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_backend_config", lambda group=None: "cuda:nccl")
        patch.setattr(dist, "destroy_process_group", lambda: calls.append("destroy"))
        patch.setattr(
            dist.distributed_c10d,
            "_abort_process_group",
            lambda: (calls.append("abort"), how == "hangs" and hangs.wait()),
        )
        patch.setattr(parallel, "end_process", lambda status: calls.append(f"end {status}"))
        patch.setattr(parallel, "_END_LIMIT", 0.2)
        patch.setattr(parallel, "_await_backend_threads", lambda: None)
        if how in ("fails", "hangs") and rank == 0:
            member.claim(ValueError("the loom is broken"))
        fabric.barrier()
        parallel._end_group(os.getpid())
    wanted = {"ends": ["destroy"], "fails": ["abort"], "hangs": ["abort", "end 1"]}[how]
    assert calls == wanted, (rank, calls)
    hangs.set()


@pytest.mark.parametrize("how", ["ends", "fails", "hangs"])
def test_the_group_is_aborted_after_a_failure_on_every_rank(how: str) -> None:
    begin = time.monotonic()
    run_in_ranks(ends, how)
    assert time.monotonic() - begin < 20


def is_outside() -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    group = dist.new_group([0])
    if fabric.global_rank == 0:
        assert fabric.strategy.all_gather(torch.ones(1), group=group).shape == (1, 1)
    else:
        for call in (fabric.strategy.all_gather, fabric.strategy.all_reduce):
            with pytest.raises(MisconfigurationException, match="Rank 1 is not in the process group"):
                call(torch.ones(1), group=group)


def test_a_rank_that_is_not_in_a_group_gets_no_made_up_values() -> None:
    run_in_ranks(is_outside)
