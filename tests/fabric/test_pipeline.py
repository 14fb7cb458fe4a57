"""Pipelines: the losses and weights of a single process, states that fit into any layout, and what is refused.

Tests of ``treadle_fabric.strategies.parallelism.pipeline.engine``,
``treadle_fabric.strategies.parallelism.pipeline.stages``, ``treadle_fabric.strategies.parallelism.pipeline.schedule``,
``treadle_fabric.strategies.parallelism.pipeline.microbatches``,
``treadle_fabric.strategies.parallelism.pipeline.sharing``, ``treadle_fabric.strategies.states.elsewhere``,
``treadle_fabric.setup.whole_batch``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.pipelining  # forks inherit it
from tests.processes import run_in_ranks
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from treadle_fabric import Fabric, MisconfigurationException
from treadle_fabric.strategies import ModelParallelStrategy

WORDS, WIDTH = 24, 16


class Frozen(nn.Module):
    """A stage without trainable parameters, with a buffer that each forward pass changes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        self.passes += len(x)
        return torch.tanh(self.layer(x)), kept


class Split(nn.Module):
    """Gives the next stage two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.layer(x)), x


class Join(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        return self.layer(x) + kept


class Model(nn.Module):
    """Tied weights, frozen parameters, a buffer, several tensors between stages, and a parameter of the loss."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.split, self.frozen, self.join = Split(), Frozen(), Join()
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def pipeline_stages(self) -> list[nn.Module]:
        return [self.embedding, self.split, self.frozen, self.join, self.head]

    def loss(self, outputs: Tensor, batch: Any) -> Any:
        correct = (outputs.argmax(1) == batch["targets"]).float().mean()
        return {"loss": cross_entropy(outputs * self.temperature, batch["targets"]), "accuracy": correct}

    def pipeline_inputs(self, batch: Any) -> Tensor:
        words: Tensor = batch["words"]
        return words


def batches(count: int, sizes: tuple[int, ...] = (8,)) -> list[dict[str, Any]]:
    random = torch.Generator().manual_seed(1)
    return [
        {
            "words": torch.randint(WORDS, (size,), generator=random),
            "targets": torch.randint(WORDS, (size,), generator=random),
            "names": [f"sample {i}" for i in range(size)],
        }
        for size in (sizes[i % len(sizes)] for i in range(count))
    ]


def train(fabric: Any, data: list[Any], path: Path | None = None, resume: Path | None = None, **model: Any) -> Any:
    """Two parameter groups, accumulation, clipping, a scheduler; returns losses, norms and the model."""
    model = Model(**model)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "lr": 0.05}, {"params": [p for p in model.parameters() if p.ndim < 2], "lr": 0.01}]
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.8)
    model, optimizer = fabric.setup(model, optimizer)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    if resume is not None:
        fabric.load(resume, state)
    told = []
    for i, batch in enumerate(data):
        found = fabric.run_batch(model, fabric.to_device(batch), window=2)
        told += [float(found["loss"]), float(found["accuracy"])]
        if i % 2:
            told.append(float(fabric.clip_gradients(model, optimizer, max_norm=0.3)))
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    if path is not None:
        fabric.save(path, state)
    return told, model


def pipeline(schedule: Any = "1f1b", ranks: int = 2, **arguments: Any) -> ModelParallelStrategy:
    sizes = {"data_parallel_size": 1, "tensor_parallel_size": 1, "pipeline_parallel_size": ranks, **arguments}
    return ModelParallelStrategy(pipeline_schedule=schedule, pipeline_microbatches=4, **sizes)


def alone() -> Any:
    return Fabric(accelerator="cpu", devices=1)


def compare(model: Any, expected: Any) -> int:
    """Compare the weights that this rank has; return their number."""
    found = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor, expected.state_dict()[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: n + m
        )
    return len(found)


def in_a_pipeline(folder: Path, schedule: str, expected: Any, evaluated: Any) -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=pipeline(schedule))
    fabric.launch()
    data = batches(6)
    told, model = train(fabric, data, folder / schedule)
    assert told == pytest.approx(expected, rel=1e-5)
    reference = Model()
    reference.load_state_dict(torch.load(folder / "weights.pt"))
    number = compare(model, reference)
    assert 2 < number < len(reference.state_dict())
    # exact resume, and the single process's file
    train(fabric, data[:4], folder / f"{schedule} half")
    again, resumed = train(fabric, data[4:], resume=folder / f"{schedule} half")
    assert again == told[-len(again) :]
    assert all(map(torch.equal, here(resumed), here(model)))
    crossed, _ = train(fabric, data[4:], resume=folder / "half")
    assert crossed == pytest.approx(expected[-len(crossed) :], rel=1e-5)
    model.eval()
    assert float(fabric.evaluate_batch(model, data[0])["loss"]) == pytest.approx(evaluated[0], rel=1e-5)
    torch.testing.assert_close(fabric.predict_batch(model, data[0]), evaluated[1], rtol=1e-5, atol=1e-6)
    with pytest.raises(MisconfigurationException, match="no rank has all of it"):
        model(data[0]["words"])


def here(model: Any) -> list[Tensor]:
    return [tensor for tensor in model.state_dict().values() if not tensor.is_meta]


def test_a_pipeline_has_the_losses_and_weights_of_one_process_and_its_folders_load_anywhere(tmp_path: Path) -> None:
    data = batches(6)
    expected, model = train(alone(), data)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    train(alone(), data[:4], tmp_path / "half")
    model.eval()
    evaluated = float(alone().evaluate_batch(model, data[0])["loss"]), alone().predict_batch(model, data[0])
    for schedule in ("1f1b", "interleaved", "gpipe"):
        run_in_ranks(in_a_pipeline, tmp_path, schedule, expected, evaluated)
        for name in (f"{schedule} half",):
            crossed, _ = train(alone(), data[4:], resume=tmp_path / name)
            assert crossed == pytest.approx(expected[-len(crossed) :], rel=1e-5)


class Layers(nn.Module):
    """Stages that the processes share: along the tensor dimension, or along the data dimensions."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 32), nn.Tanh(), nn.Linear(32, WIDTH)) for _ in range(3)
        )
        if tied:
            self.layers[2][2].weight = self.layers[0][2].weight

    def pipeline_stages(self) -> Any:
        return self.layers

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return (outputs - batch[1]).square().mean()


def pairs(count: int, rows: int) -> list[Any]:
    random = torch.Generator().manual_seed(2)
    return [tuple(torch.randn(2, rows, WIDTH, generator=random)) for _ in range(count)]


def learn(fabric: Any, data: list[Any], path: Any = None, resume: Any = None, tied: bool = False) -> Any:
    model: Any = Layers(tied)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    model, optimizer = fabric.setup(model, optimizer)
    state = {"model": model, "optimizer": optimizer}
    if resume is not None:
        fabric.load(resume, state)
    told = []
    for batch in data:
        loss = fabric.all_reduce(fabric.run_batch(model, batch)["loss"])
        told += [float(loss), float(fabric.clip_gradients(model, optimizer, max_norm=0.05))]
        optimizer.step()
        optimizer.zero_grad()
    if path is not None:
        fabric.save(path, state)
    return told, model


def on_a_mesh(folder: Path, expected: Any, tied: bool, arguments: dict[str, Any]) -> None:
    name = "-".join(map(str, arguments.values()))
    strategy = pipeline(**{"save_distributed_checkpoint": False, **arguments})
    fabric = Fabric(accelerator="cpu", devices=4, strategy=strategy)
    fabric.launch()
    size, rank = strategy.data_parallel_size, strategy.data_parallel_rank
    data = [tuple(t.chunk(size)[rank] for t in pair) for pair in pairs(3, 8)]
    told, model = learn(fabric, data, folder / name, tied=tied)
    assert told == pytest.approx(expected, rel=1e-4), (told, expected)
    learn(fabric, data[:2], folder / f"{name} half", tied=tied)
    again, resumed = learn(fabric, data[2:], None, folder / f"{name} half", tied=tied)
    assert again == told[-len(again) :]
    if size == 2:  # ranks with unequal numbers of batches, in step
        for batch in data[: 1 + rank]:
            strategy.begin_vote(True)()
            fabric.evaluate_batch(model, batch)
        while strategy.begin_vote(False)():
            strategy.join_forward(model.forward_module)


@pytest.mark.parametrize(
    ("tied", "arguments"),
    [
        (False, {"data_parallel_size": 2, "save_distributed_checkpoint": True}),
        (True, {"data_parallel_size": 2}),
        (
            False,
            {"tensor_parallel_size": 2, "tensor_parallel_plan": {"layers.*.0": "colwise", "layers.*.2": "rowwise"}},
        ),
    ],
)
def test_stages_are_sharded_over_the_other_dimensions(tmp_path: Path, tied: bool, arguments: dict[str, Any]) -> None:
    expected, model = learn(alone(), pairs(3, 8), tied=tied)
    run_in_ranks(on_a_mesh, tmp_path, expected, tied, arguments, devices=4)
    for path in tmp_path.iterdir():
        found = alone().load(path)["model"]
        if "half" not in path.name:
            for name, tensor in model.state_dict().items():
                torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
