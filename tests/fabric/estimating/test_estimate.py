"""What ``estimate`` takes, refuses and leaves behind."""

from __future__ import annotations

import dataclasses
import os
import random
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.processes import run_in_ranks
from torch import nn

from treadle_fabric import (
    Fabric,
    FSDPStrategy,
    MisconfigurationException,
    ModelParallelStrategy,
    estimate,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Learner(Net):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self(batch).square().mean()
        self.log("loss", loss)
        return loss

    def log(self, *_: Any) -> None:
        raise RuntimeError("there is no trainer")

    def configure_optimizers(self) -> Any:
        return {"optimizer": torch.optim.Adam(self.parameters())}


BATCH = torch.zeros(6, 8)
NUMBERS = 8 * 16 + 16 + 16 * 4 + 4


def test_a_module_may_be_real_or_on_meta_or_made_by_a_function() -> None:
    with torch.device("meta"):
        on_meta = Net()
    given = (Net(), on_meta, Net)
    real, meta, made = (estimate(each, torch.optim.AdamW, "ddp", 16, batch=BATCH) for each in given)
    assert real == meta == made
    assert real.memory.parameters == NUMBERS * 4
    assert real.traffic["all_reduce"].payload == NUMBERS * 4
    assert "16 ranks on 2 machines" in str(real) and "all_reduce" in str(real)


def test_a_training_step_and_its_optimizers_are_the_modules_own() -> None:
    found = estimate(Learner(), None, "fsdp", 4, "bf16-true", lambda: torch.zeros(6, 8))
    assert found.precision == "bf16-true"
    assert found.memory.optimizer_state > 2 * found.memory.parameters  # with the number of steps
    assert found.traffic.keys() == {"all_gather", "reduce_scatter"}


class Index(Learner):
    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return super().training_step(batch, index)


class Drawing(Learner):
    def training_step(self, dataloader_iter: Any) -> torch.Tensor:
        batch, _, _ = next(dataloader_iter)
        return super().training_step(batch, 0)


class Later(Learner):
    """Makes its layers where they are placed."""

    def __init__(self) -> None:
        super().__init__()
        del self.layers

    def configure_model(self) -> None:
        if not hasattr(self, "layers"):
            self.layers = Net().layers


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_step_is_called_and_a_model_configured_as_by_a_trainer(strategy: str) -> None:
    expected = estimate(Learner(), None, strategy, 2, batch=BATCH)
    for other in (Index, Drawing, Later):
        module = other()
        assert estimate(module, None, strategy, 2, batch=BATCH) == expected
        assert hasattr(module, "layers") is not isinstance(module, Later)


class Rates(Net):
    """Reads the rates of its layers from a tensor, and has a large one."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = [rate.item() for rate in torch.linspace(0, 0.2, 3)]
        self.register_buffer("table", torch.zeros(2**50, dtype=torch.uint8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert [round(rate, 3) for rate in self.rates] == [0, 0.1, 0.2]
        return super().forward(x)


def test_a_constructor_may_read_a_few_numbers() -> None:
    found = estimate(Rates, torch.optim.SGD, "ddp", 2, batch=BATCH)
    assert found.memory.buffers == 2**50 and found.memory.parameters == NUMBERS * 4 and not found.notes


class Needing(Learner):
    def configure_optimizers(self) -> Any:
        raise RuntimeError("not attached to a trainer")


def test_errors_of_the_program_say_how_it_was_run() -> None:
    with pytest.raises(RuntimeError, match="not attached") as caught:
        estimate(Needing(), None, "ddp", 2, batch=BATCH)
    assert "without a trainer" in caught.value.__notes__[0] and "optimizer=" in caught.value.__notes__[0]
    assert estimate(Needing(), torch.optim.SGD, "ddp", 2, batch=BATCH).parameters == NUMBERS


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"module": [Net()]}, "give a torch module"),
        ({"module": lambda: None}, "made NoneType"),
        ({"module": nn.LazyLinear(3)}, "no shape yet.*LazyLinear"),
        ({"optimizer": "AdamW"}, r"optimizer='AdamW'.*torch.optim.AdamW"),
        ({"optimizer": torch.optim.SGD(nn.Linear(8, 3).parameters())}, r"shape \(3, 8\) that is not one of the Net"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS evaluates the loss several times"),
        ({"loss": 3}, "loss=3"),
        ({"batch": None}, "batch is missing.*what Net gets"),
    ],
)
def test_arguments_of_another_kind_are_refused(given: dict[str, Any], message: str) -> None:
    arguments = {"module": Net(), "optimizer": torch.optim.SGD, "strategy": "ddp", "world_size": 2, "batch": BATCH}
    with pytest.raises(MisconfigurationException, match=message):
        estimate(**{**arguments, **given})


def test_an_optimizer_that_is_made_already_is_taken() -> None:
    module = Net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    found = estimate(module, optimizer, "fsdp", 4, batch=BATCH)
    assert found.memory.optimizer_state == found.memory.parameters
    assert not optimizer.state and optimizer.param_groups[0]["params"][0] is module.layers[0].weight


def test_4096_ranks() -> None:
    found = estimate(Net(), torch.optim.SGD, "fsdp", 4096, batch=BATCH)
    assert (found.world_size, found.num_nodes) == (4096, 512)
    assert found.between_machines == found.wire > 0


def test_a_hybrid_mesh_keeps_its_gathers_in_a_machine() -> None:
    found = estimate(Net(), torch.optim.SGD, FSDPStrategy(sharding_strategy="HYBRID_SHARD"), 16, batch=BATCH)
    assert found.traffic["all_gather"].between_machines == 0
    assert found.traffic["all_reduce"].between_machines == found.traffic["all_reduce"].wire > 0
    assert "data_replicate=2 x data_shard=8" in found.strategy


def test_offload_is_on_the_host() -> None:
    memory = estimate(Net(), torch.optim.Adam, FSDPStrategy(cpu_offload=True), 2, batch=BATCH).memory
    assert memory.host == memory.parameters + memory.gradients + memory.optimizer_state
    assert memory.peak_parts.keys() == {"buffers", "inputs", "communication", "activations"}


@pytest.mark.parametrize(
    ("stage", "parts"),
    [(1, (224, NUMBERS, 28)), (2, (224, 128, 28)), (3, (27 + 216, 27, 27))],
    ids=["optimizer", "gradients", "parameters"],
)
def test_each_stage_of_zero_shares_out_more(stage: int, parts: tuple[int, ...]) -> None:
    """In numbers, made equal for eight ranks; stage 2 has whole gradients, 3 keeps small parameters gathered."""
    parameters, gradients, part = parts
    for precision, width in (("32-true", 4), ("bf16-mixed", 2)):
        found = estimate(Net(), torch.optim.Adam, f"deepspeed_stage_{stage}", 8, precision, BATCH)
        expected = (parameters * width, gradients * width, part * 3 * 4 + 4)
        memory = found.memory
        assert (memory.parameters, memory.gradients, memory.optimizer_state) == expected
        assert found.precision == precision and any("arithmetic" in note for note in found.notes)


def test_parameters_that_stay_whole() -> None:
    module = Net()
    first = module.layers[0]
    for ignored, bytes_of_rank in (([first], 4 * (144 + 17)), ([first.weight], 4 * (128 + 21))):
        strategy = FSDPStrategy(ignored_parameters=ignored)
        assert estimate(module, torch.optim.SGD, strategy, 4, batch=BATCH).memory.parameters == bytes_of_rank
        with pytest.raises(MisconfigurationException, match="that is not in the Net"):
            estimate(Net(), torch.optim.SGD, strategy, 4, batch=BATCH)
        assert strategy._options.ignored == tuple(ignored)


def test_more_micro_batches_exchange_gradients_once() -> None:
    one, four = (estimate(Net(), torch.optim.SGD, "ddp", 4, batch=BATCH, accumulate=n) for n in (1, 4))
    assert one.traffic["all_reduce"] == four.traffic["all_reduce"]


def test_nothing_is_left_behind() -> None:
    module, before = Net(), dict(os.environ)
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    states = random.getstate(), torch.get_rng_state()
    hook = sys.excepthook
    strategy = FSDPStrategy()
    estimate(module, torch.optim.AdamW, strategy, 8, "bf16-mixed", BATCH)
    assert not dist.is_initialized() and dict(os.environ) == before and sys.excepthook is hook
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert all(torch.equal(weights[name], value) for name, value in module.state_dict().items())
    assert all(type(p) is nn.Parameter and p.grad is None for p in module.parameters())
    assert type(torch.zeros(1)) is torch.Tensor and torch.zeros(1).item() == 0.0
    assert strategy.given.devices == ()
    again = estimate(module, torch.optim.AdamW, strategy, 8, "bf16-mixed", BATCH)
    assert again == estimate(module, torch.optim.AdamW, "fsdp", 8, "bf16-mixed", BATCH) or again.strategy != "fsdp"


def _train_after() -> None:
    strategy = ModelParallelStrategy(
        tensor_parallel_size=2, tensor_parallel_plan={"layers.0": "colwise", "layers.2": "rowwise"}
    )
    planned = estimate(Net(), torch.optim.SGD, strategy, 2, batch=BATCH)
    assert planned.traffic["all_reduce"].calls > 0
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    model = Net()
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    fabric.backward(model(torch.ones(6, 8)).sum())
    optimizer.step()
    with pytest.raises(MisconfigurationException, match="in one already"):
        estimate(Net(), torch.optim.SGD, "ddp", 2, batch=BATCH)


def test_a_run_may_follow_and_is_no_place_to_estimate() -> None:
    run_in_ranks(_train_after)


class Decides(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x[x[:, 0] > 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world_size": 5000}, "at most 4,096"),
        ({"world_size": 0}, "world_size"),
        ({"strategy": "single_device"}, "runs in one process"),
        ({"strategy": "dpp"}, "unknown"),
        ({"num_nodes": 3}, "same number of ranks"),
        ({"optimizer": None}, "configure_optimizers"),
        ({"optimizer": lambda parameters: 1}, "is no optimizer"),
        ({"strategy": ModelParallelStrategy(pipeline_parallel_size=2)}, "pipeline"),
        ({"module": Decides()}, "values"),
        ({"loss": lambda output, batch: output.detach().sum()}, "no loss in it"),
    ],
)
def test_what_cannot_be_estimated_is_refused(changes: dict[str, Any], message: str) -> None:
    given = {"module": Net(), "optimizer": torch.optim.SGD, "strategy": "ddp", "world_size": 8, "batch": BATCH}
    with pytest.raises(MisconfigurationException, match=message):
        estimate(**{**given, **changes})
    assert not dist.is_initialized()


def test_an_estimate_is_frozen() -> None:
    found = estimate(Net(), torch.optim.SGD, "ddp", 2, batch=BATCH)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.world_size = 3  # type: ignore[misc]
