"""Ranks that work together on one share of the samples: what they log, predict and save counts once.

Tests of ``treadle.metrics.reduction``, ``treadle.checkpoint.exact``, ``treadle_fabric.data.sharding``,
``treadle_fabric.data.resumable``.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp  # heavy; forked ranks have it
from tests.processes import run_in_ranks
from tests.trainer.models import Samples
from torch import Tensor, nn
from torch.utils.data import DataLoader

import treadle as L
from treadle.checkpoint.exact import keep_own_part
from treadle_fabric import Fabric
from treadle_fabric.checkpoint import PerRank
from treadle_fabric.data import one_of_each
from treadle_fabric.measuring import Throughput
from treadle_fabric.strategies import FSDPStrategy


class InPairs(FSDPStrategy):
    """Two neighbouring ranks have the same share of the samples, as those of a tensor group."""

    ranks_a_share = 2


class Counts(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.seen: list[list[float]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append(batch[:, 0].tolist())
        self.log("samples", float(len(batch)), on_step=False, on_epoch=True, reduce_fx="sum", sync_dist=True)
        return self.layer(batch / 10).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("largest", batch.max(), reduce_fx="max")
        self.log("total", batch[:, 0].sum(), reduce_fx="sum")
        self.log("all", batch[:, 0].sum(), reduce_fx=lambda values: float(len(values)))

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return batch[:, 0]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == 2 and not os.path.exists("two.ckpt"):
            self.trainer.save_checkpoint("two.ckpt")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def loader(**kwargs: Any) -> DataLoader[Any]:
    return DataLoader(Samples(24), batch_size=3, **{"shuffle": True, **kwargs})


def trainer(**arguments: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "max_epochs": 1, "num_sanity_val_steps": 0}
    return L.Trainer(accelerator="cpu", devices=4, **quiet | arguments)


def _trains(folder: str) -> None:
    os.chdir(folder)
    L.seed_everything(5, verbose=False)
    pairs, module = trainer(strategy=InPairs()), Counts()
    assert (pairs.strategy.data_parallel_size, pairs.strategy.data_parallel_rank) == (2, pairs.global_rank // 2)
    pairs.fit(module, loader(), loader(shuffle=False))
    assert pairs.callback_metrics["samples"] == 24.0 and pairs.callback_metrics["largest"] == 23.0
    assert pairs.callback_metrics["total"] == sum(range(24)) and pairs.callback_metrics["all"] == 8.0
    assert len(module.seen) == 4
    predicted = pairs.predict(module, loader(shuffle=False))
    assert [batch.tolist() for batch in predicted] == [[3.0 * i, 3.0 * i + 1, 3.0 * i + 2] for i in range(8)]
    # the same layout goes on with the same batches, one in which each rank has a share of its own with the others
    again = Counts()
    trainer(strategy=InPairs()).fit(again, loader(), ckpt_path="two.ckpt")
    assert again.seen == module.seen[2:]
    alone = Counts()
    L.seed_everything(6, verbose=False)
    fitted = trainer(strategy=FSDPStrategy())
    fitted.fit(alone, loader(), ckpt_path="two.ckpt")
    counted = fitted.callback_metrics["samples"]
    everyone = [s for seen in fitted.strategy.all_gather(torch.tensor(alone.seen)).flatten().tolist() for s in [seen]]
    before = fitted.strategy.all_gather(torch.tensor(module.seen[:2])).flatten().tolist()
    assert sorted({*everyone, *before}) == [float(i) for i in range(24)]
    assert len(everyone) == 12 and counted == 24.0


def test_a_share_counts_once(tmp_path: Any) -> None:
    run_in_ranks(_trains, str(tmp_path), devices=4)


def _loads() -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=InPairs())
    fabric.launch()
    fabric.seed_everything(3, verbose=False)
    batches = fabric.setup_dataloaders(loader(), resumable=True)
    before = [batch.tolist() for batch in batches]
    for i, _ in enumerate(batches):
        if i == 2:
            break
    state = batches.state_dict()
    assert len(before) == 8 and len(state["ranks"]) == 2 and state["shares"] == [0, 0]
    rest = fabric.setup_dataloaders(loader(), resumable=True)
    rest.load_state_dict(state)
    assert rest.position == 3 and len([*rest]) == 5
    fabric.strategy.teardown()


def test_a_loader_whose_position_is_saved() -> None:
    run_in_ranks(_loads)


def strategy(rank: int, shares: int, ranks: int) -> Any:
    own = rank * shares // ranks
    return SimpleNamespace(
        global_rank=rank, world_size=ranks, data_parallel_size=shares, data_parallel_rank=own,
        pipeline_stages=1, num_slices=1, slice_index=0,
    )  # fmt: skip


PARTS = [{"name": i, "gradients": {"w": i}, "metric_objects": {}} for i in range(4)]


@pytest.mark.parametrize(
    ("saved", "rank", "shares", "kept"),
    [
        (None, 2, 4, 2),  # as it was: a share a rank
        ([0, 0, 1, 1], 3, 4, [1, 3]),  # two shares, and now four
        ([0, 1, 0, 1], 1, 2, [2, 3]),
    ],
)
def test_what_a_rank_keeps_of_the_states_of_all(saved: Any, rank: int, shares: int, kept: Any) -> None:
    state = {"ranks": PARTS, "other": 1, **({} if saved is None else {"shares": saved})}
    found = keep_own_part(state, strategy(rank, shares, shares))
    assert found["other"] == 1 and "shares" not in found
    if isinstance(kept, int):
        assert isinstance(found["ranks"], PerRank) and found["ranks"].value["name"] == kept
    elif shares == 2:
        assert found["ranks"].value["name"] == kept[rank]
    else:
        assert [part["name"] for part in found["ranks"]] == kept
        assert all(part["gradients"] == {} for part in found["ranks"])  # which one rank takes over


def test_one_state_for_each_share() -> None:
    assert one_of_each("abcd") == ["a", "b", "c", "d"]
    assert one_of_each("abcd", [0, 0, 1, 1]) == ["b", "d"]
    assert one_of_each("abcd", [1, 0, 1, 0]) == ["d", "c"]


def test_rates_of_devices_that_see_the_same_samples() -> None:
    throughput = Throughput(world_size=4, window_size=2, shares=2)
    for second in (1, 2):
        throughput.update(time=second, batches=second, samples=3 * second, flops=10.0)
    found = throughput.compute()
    assert (found["samples_per_sec"], found["flops_per_sec"]) == (6.0, 40.0)
