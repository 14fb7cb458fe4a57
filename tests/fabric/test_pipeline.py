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
from treadle_fabric.precision import MixedPrecision
from treadle_fabric.strategies import ModelParallelStrategy
from treadle_fabric.strategies.parallelism.pipeline import Order
from treadle_fabric.strategies.parallelism.pipeline.microbatches import cut

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


class Inputs(nn.Module):
    """Keeps the dtypes that reach a stage."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = nn.Linear(WIDTH, WIDTH), set[torch.dtype]()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add(x.dtype)
        return self.layer(x)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Inputs(), Inputs()

    def pipeline_stages(self) -> list[nn.Module]:
        return [self.first, self.second]

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return (outputs.float() - batch[1].float()).square().mean()


def mixed(folder: Path, devices: int) -> list[Any]:
    """Train with a gradient scaler, over a batch whose loss is infinite; returns losses, scales and weights."""
    precision = MixedPrecision("16-mixed", scaler=torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100))
    strategy: Any = pipeline() if devices > 1 else "auto"
    fabric = Fabric(accelerator="cpu", devices=devices, strategy=strategy, plugins=[precision])
    fabric.launch()
    model = Scaled()
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    data, told = pairs(4, 8), []
    data[2][1][0] = float("inf")
    for batch in data:
        told.append(float(fabric.run_batch(model, batch)["loss"]))
        fabric.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=False)
        optimizer.step()
        optimizer.zero_grad()
        told.append(precision.scaler.get_scale())
    seen = model.first.seen | model.second.seen
    if devices == 1:
        torch.save([told, model.state_dict()], folder / "told.pt")
    else:
        expected, weights = torch.load(folder / "told.pt")
        assert told == pytest.approx(expected, rel=2e-2)
        for name, tensor in model.state_dict().items():
            if not tensor.is_meta:
                torch.testing.assert_close(tensor, weights[name], rtol=2e-2, atol=1e-3)
        assert seen == {torch.float16} if fabric.global_rank else {torch.float32}
    return told


def test_stages_run_in_the_precision_and_an_infinite_gradient_is_known_to_all_ranks(tmp_path: Path) -> None:
    told = mixed(tmp_path, 1)
    assert told[1::2] == [4.0, 4.0, 2.0, 2.0]
    run_in_ranks(mixed, tmp_path, 2)


def test_orders_say_what_they_can_run() -> None:
    def refused(match: str, *arguments: Any) -> None:
        with pytest.raises(MisconfigurationException, match=match):
            Order.checked(*arguments)

    refused("pipeline_schedule='1f1c' is unknown.*1f1b", "1f1c", 4, None, 2)
    refused("pipeline_microbatches=3.*at least 4, the number of ranks", "1f1b", 3, None, 4)
    refused("pipeline_microbatches=3.*'interleaved'.*at least 4", "interleaved", 3, None, 4)
    refused("pipeline_microbatches=7.*multiple of 3", "interleaved", 7, None, 2)
    refused("pipeline_microbatches.*0", "gpipe", 0, None, 2)
    refused("pipeline_virtual_stages=2 is for", "1f1b", 4, 2, 2)
    order = Order.checked("1f1b", None, None, 2)
    assert order == Order("1f1b", 4, 2, 2) and Order.checked("interleaved", 4, None, 2).parts == 4
    assert order.for_batch(12) is order
    assert order.for_batch(6) == order._replace(microbatches=3)
    assert order.for_batch(5) == order._replace(microbatches=1, schedule="gpipe")
    assert order.for_batch(1).microbatches == 1
    with pytest.raises(MisconfigurationException, match="pipeline_microbatches=1"):
        ModelParallelStrategy(pipeline_parallel_size=2, pipeline_microbatches=1)
    with pytest.raises(MisconfigurationException, match="sharded_cross_entropy"):
        ModelParallelStrategy(pipeline_parallel_size=2, loss_parallel=True)


def test_batches_are_cut_along_their_samples() -> None:
    batch = {"x": torch.arange(6), "names": list("abcdef"), "scale": torch.tensor(2.0), "kind": "even", "pair": [1, 2]}
    parts = cut(batch, 3)
    assert [part["x"].tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
    assert parts[1]["names"] == ["c", "d"] and parts[2]["pair"] == [1, 2] and parts[0]["kind"] == "even"
    assert cut(batch, 1) == [batch]
    with pytest.raises(MisconfigurationException, match=r"batch\['y'\] has 3 rows, and the batch 6 samples"):
        cut({"x": torch.zeros(6), "y": torch.zeros(3)}, 2)
    with pytest.raises(MisconfigurationException, match="no tensor that tells its size"):
        cut({"x": "text"}, 2)
    with pytest.raises(MisconfigurationException, match="0 samples"):
        cut(torch.zeros(0, 2), 2)


class Wrong(Model):
    def __init__(self, stages: Any) -> None:
        super().__init__()
        self.chosen = stages

    def pipeline_stages(self) -> Any:
        return self.chosen(self)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (lambda: nn.Linear(2, 2), "Linear has no method `pipeline_stages`"),
        (lambda: Wrong(lambda m: m.head), "returned a Linear: return a list"),
        (lambda: Wrong(lambda m: [m.head, nn.Linear(2, 2)]), "Linear that is no submodule of Wrong in place 1"),
        (lambda: Wrong(lambda m: [m.head, m]), "returned the module in place 1"),
        (lambda: Wrong(lambda m: [m.head, torch.tanh]), "no submodule of Wrong in place 1"),
        (lambda: Wrong(lambda m: [m.head, m.join, m.head]), "'head' twice, in the places 0 and 2"),
    ],
)
def test_what_is_no_list_of_stages_is_refused(model: Any, match: str) -> None:
    fabric = alone()
    with pytest.raises(MisconfigurationException, match=match):
        fabric.run_batch(fabric.setup(model()), batches(1)[0])


class Broken(Scaled):
    """Fails in what ``where`` says."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.first.forward = lambda x: self.fail() if where == "stage" else [x] if where == "list" else x  # type: ignore

    def fail(self) -> Any:
        raise ZeroDivisionError("in a stage")


def failing() -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=pipeline())
    fabric.launch()
    batch, rank = pairs(1, 8)[0], fabric.global_rank

    def refused(model: nn.Module, kind: Any, match: str) -> None:
        with pytest.raises(kind, match=match):
            fabric.run_batch(fabric.setup(model), batch)

    one = Scaled()
    one.pipeline_stages = lambda: [one.first]  # type: ignore[method-assign]
    with pytest.raises(MisconfigurationException, match="1 stages, and a pipeline of 2 ranks needs 2 or more"):
        fabric.setup(one)
    refused(Broken("stage"), MisconfigurationException if rank else ZeroDivisionError, "in a stage")
    refused(Broken("list"), MisconfigurationException, "a list: what goes to the next rank is a tensor or a tuple")
    model = Scaled()
    with pytest.raises(MisconfigurationException, match="LBFGS.step computes the loss again"):
        fabric.setup(model, torch.optim.LBFGS(model.parameters()))


def test_what_fails_in_a_stage_is_told_on_all_ranks() -> None:
    run_in_ranks(failing)
