"""Tests of ``treadle_fabric.strategies.sharding.shard`` and ``.engine`` with layers that the user applied torch's
``fully_shard`` to, and with groups one inside of another: the numbers of one process, and no rank waits in vain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.tensor.parallel  # heavy, as the next one; the forks inherit them
from tests.processes import run_in_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from treadle import LightningModule, Trainer
from treadle_fabric import Fabric, FSDPStrategy, MisconfigurationException, ModelParallelStrategy

BATCHES = torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(3))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.runs = nn.Linear(8, 8), 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        out: Tensor = x + self.linear(x).tanh()
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = Layer(), Layer(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.second(self.first(x)))
        return out


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks, self.head, self.scale = (
            nn.ModuleList(Block() for _ in range(2)),
            nn.Linear(8, 2),
            nn.Parameter(torch.ones(())),
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x) * self.scale
        return out


def whole(module: Any) -> dict[str, Tensor]:
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in module.state_dict().items()}


def only_blocks(net: Net, mesh: Any) -> Net:
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    return net


def blocks_and_model(net: Net, mesh: Any) -> Net:
    net.scale = nn.Parameter(net.scale[None])  # torch cuts nothing without dimensions
    fully_shard(only_blocks(net, mesh), mesh=mesh)
    return net


def strategies() -> dict[str, Any]:
    def parallelize(change: Callable[[Net, Any], Net]) -> Callable[[nn.Module, Any], nn.Module]:
        return lambda net, mesh: change(net, mesh["data_parallel"])  # type: ignore[arg-type]

    sizes: dict[str, Any] = {"data_parallel_size": 2, "tensor_parallel_size": 1}
    return {
        "model parallel, only blocks": ModelParallelStrategy(parallelize(only_blocks), **sizes),
        "model parallel, all": ModelParallelStrategy(parallelize(blocks_and_model), **sizes),
        "fsdp, only blocks": FSDPStrategy(),
    }


def what_is_left(expected: Any) -> None:
    """What the user left whole trains as on one process, with accumulation and clipping."""
    for name, strategy in strategies().items():
        fabric, net = Fabric(accelerator="cpu", devices=2, strategy=strategy), Net()
        fabric.launch()
        model = fabric.setup(only_blocks(net, strategy.device_mesh) if name.startswith("fsdp") else net)
        optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), 0.1))
        for index, x in enumerate(BATCHES):
            with fabric.no_backward_sync(model, enabled=index % 2 == 0):
                fabric.backward(model(x[fabric.global_rank :: 2]).square().mean() / 2)
            if index % 2:
                fabric.clip_gradients(model, optimizer, max_norm=0.5)
                optimizer.step()
                optimizer.zero_grad()
        for key, tensor in whole(net).items():
            torch.testing.assert_close(
                tensor.view_as(expected[key]), expected[key], msg=lambda m, n=name, k=key: f"{n}, {k}: {m}"
            )


def test_what_the_user_leaves_whole_is_sharded_too() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for index, x in enumerate(BATCHES):
        (net(x).square().mean() / 2).backward()
        if index % 2:
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    run_in_ranks(what_is_left, net.state_dict())


def arguments() -> None:
    copies = ModelParallelStrategy(
        lambda net, mesh: only_blocks(net, mesh["data_shard"]),  # type: ignore[arg-type]
        data_parallel_size=2,
        data_replicate_size=2,
        tensor_parallel_size=1,
    )
    fabric = Fabric(accelerator="cpu", devices=2, strategy=copies)
    fabric.launch()
    with pytest.raises(MisconfigurationException, match=r"'blocks.0' with a mesh that leaves out the ranks \[\d\]"):
        fabric.setup(Net())
    plan = {"blocks.*.linear": "colwise_gathered"}
    tensor = ModelParallelStrategy(
        data_parallel_size=1, tensor_parallel_size=2, tensor_parallel_plan=plan, activation_checkpointing=Layer
    )
    fabric = Fabric(accelerator="cpu", devices=2, strategy=tensor)
    fabric.launch()
    model = fabric.setup(net := Net())
    fabric.backward(model(BATCHES[0]).sum())
    assert net.blocks[0].first.runs == 2  # also without data dimensions


def test_smaller_meshes_and_recomputation() -> None:
    run_in_ranks(arguments)


class Lit(LightningModule):
    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.by_hand, self.net = by_hand, Net()

    def configure_model(self) -> None:
        if self.by_hand:
            blocks_and_model(self.net, self.device_mesh["data_parallel"])

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor | None:
        if not self.by_hand and self.global_rank == 1 and batch_idx == 1:
            return None
        return self.net(x).square().mean()

    def validation_step(self, x: Tensor) -> None:
        self.log("loss", self.net(x).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def train(strategy: Any) -> None:
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Lit(isinstance(strategy, ModelParallelStrategy))
    samples = BATCHES.flatten(0, 1)
    trainer.fit(module, DataLoader(samples, batch_size=2), DataLoader(samples[:5], batch_size=1))
    net = Net()
    net.load_state_dict({name: tensor.view_as(net.state_dict()[name]) for name, tensor in whole(module.net).items()})
    torch.testing.assert_close(trainer.callback_metrics["loss"], net(samples[:5]).detach().square().mean())


def test_ranks_with_unequal_batches_and_groups_in_groups() -> None:
    """One rank has a batch more to validate, and the other, in groups of the strategy's, a step without a loss."""
    run_in_ranks(train, ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1))
    run_in_ranks(train, FSDPStrategy(policy={Block, Layer}))
