"""DeepSpeed in hand-written loops, beside the rows of ``test_equality.py``.

Tests of ``treadle_fabric.strategies.deepspeed``, ``treadle_fabric.strategies.zero.engine``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD

from tests.processes import run_as_program, run_in_ranks
from treadle_fabric import Fabric, MisconfigurationException
from treadle_fabric.strategies import DeepSpeedStrategy

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(150)]


def fabric_of(strategy: Any = "auto", devices: int = 2, **arguments: Any) -> Fabric:
    fabric = Fabric(accelerator="cpu", devices=devices, strategy=strategy, **arguments)
    fabric.launch()
    return fabric


def weights(model: Any) -> dict[str, Tensor]:
    """The whole weights, on every rank."""
    module = model.module
    parameters = [p for p in module.parameters() if hasattr(p, "ds_id")]
    if not parameters:
        return {name: value.detach().clone() for name, value in module.state_dict().items()}
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        named = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
        return {name: value.detach().clone() for name, value in named.items()}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


def batches(number: int) -> list[Tensor]:
    return list(torch.randn(number, 6, 4, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_rank_without_a_batch_takes_part_with_nothing(stage: int) -> None:
    """In the last step, only rank 0 has a batch."""
    one, (*full, last) = net(), batches(3)
    optimizer = SGD(one.parameters(), lr=0.1)
    for batch, share in [*((each, 1.0) for each in full), (last, 0.5)]:
        optimizer.zero_grad()
        (one(batch).square().mean() * share).backward()
        optimizer.step()

    def uneven() -> None:
        fabric = fabric_of(DeepSpeedStrategy(stage=stage))
        module = net()
        model, optimizer = fabric.setup(module, SGD(module.parameters(), lr=0.1))
        engine = model.forward_module
        for batch in full:
            fabric.backward(model(batch.chunk(2)[fabric.global_rank]).square().mean())
            optimizer.step()
        if fabric.global_rank == 0:
            fabric.backward(model(last).square().mean())
        else:
            fabric.strategy.join_forward(engine)
            fabric.strategy.join_backward(engine, "last")
        optimizer.step()
        found = weights(model)
        for name, value in one.state_dict().items():
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=0)

    run_in_ranks(uneven)


def test_the_number_of_the_device_is_the_runs_own_whatever_the_environment_says() -> None:
    """DeepSpeed reads LOCAL_RANK for it, which the environment need not have."""

    def loop() -> None:
        fabric = fabric_of(DeepSpeedStrategy(stage=3))
        os.environ.pop("LOCAL_RANK", None)
        module = net()
        model, optimizer = fabric.setup(module, SGD(module.parameters(), lr=0.1))
        fabric.backward(model(batches(1)[0]).square().mean())
        optimizer.step()
        assert model.forward_module.local_rank == fabric.local_rank
        assert "LOCAL_RANK" not in os.environ

    run_in_ranks(loop)


@pytest.mark.parametrize("stage", [1, 3])
def test_gradients_that_are_thrown_away_and_a_step_without_any_change_nothing(stage: int) -> None:
    def loop() -> None:
        fabric = fabric_of(DeepSpeedStrategy(stage=stage))
        module = net()
        model, optimizer = fabric.setup(module, SGD(module.parameters(), lr=0.1))
        before = weights(model)
        fabric.backward(model(batches(1)[0]).square().mean())
        optimizer.zero_grad()
        optimizer.step()
        found = weights(model)
        for name in found:
            torch.testing.assert_close(found[name], before[name], atol=0, rtol=0)
        fabric.backward(model(batches(1)[0]).square().mean())
        optimizer.step()
        found = weights(model)
        assert any(not found[n].equal(before[n]) for n in found)

    run_in_ranks(loop)


def test_the_configs_own_optimizer_scheduler_and_accumulation(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(
            {
                "gradient_accumulation_steps": 2,
                "zero_optimization": {"stage": 1},
                "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
                "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0.1, "warmup_max_lr": 0.1}},
            }
        )
    )
    one, given = net(), batches(4)
    optimizer = SGD(one.parameters(), lr=0.1)
    for pair in (given[:2], given[2:]):
        optimizer.zero_grad()
        for batch in pair:
            (one(batch).square().mean() / 2).backward()
        optimizer.step()

    def loop() -> None:
        fabric = fabric_of(DeepSpeedStrategy(config=path))
        model, optimizer, scheduler = fabric.setup(net())
        for batch in given:  # as in DeepSpeed's own loops, a step after each batch
            fabric.backward(model(batch.chunk(2)[fabric.global_rank]).square().mean())
            optimizer.step()
        assert scheduler.last_batch_iteration == 1  # from -1; the engine steps it
        found = weights(model)
        for name, value in one.state_dict().items():
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=0)

    run_in_ranks(loop)


@pytest.mark.parametrize("stage", [2, 3])
def test_weights_in_16_bits_and_outputs_in_32(stage: int) -> None:
    def loop() -> None:
        fabric = fabric_of(DeepSpeedStrategy(stage=stage), precision="bf16-mixed")
        assert fabric.strategy.precision.precision == "bf16-mixed"
        with fabric.init_module():
            module = net()
        model, optimizer = fabric.setup(module, SGD(module.parameters(), lr=0.1))
        losses = []
        for batch in batches(4):
            output = model(batch.chunk(2)[fabric.global_rank])
            assert output.dtype == torch.float32 and next(module.parameters()).dtype == torch.bfloat16
            loss = output.square().mean()
            fabric.backward(loss)
            optimizer.step()
            losses.append(fabric.all_reduce(loss.detach()).item())
        assert losses[-1] < losses[0]

    run_in_ranks(loop)


def test_a_model_to_evaluate_needs_no_optimizer() -> None:
    expected = net()(batches(1)[0])

    def loop() -> None:
        for stage in (1, 3):
            fabric = fabric_of(DeepSpeedStrategy(stage=stage))
            model = fabric.setup_module(net())
            with torch.no_grad():
                torch.testing.assert_close(model(batches(1)[0]), expected)

    run_in_ranks(loop)


def test_what_deepspeed_cannot_step_is_refused() -> None:
    def refused() -> None:
        whole, part = torch.compile(net()), nn.Sequential(torch.compile(net()))
        for compiled in (whole, part):
            with pytest.raises(MisconfigurationException, match="compiled by torch.compile.*Use stage 2"):
                fabric_of("deepspeed_stage_3").setup(compiled, SGD(compiled.parameters(), lr=0.1))
        fabric = fabric_of("deepspeed_stage_1")
        first, second = net(), net()
        parts = SGD(first[0].parameters(), lr=0.1), SGD(first[2].parameters(), lr=0.1)  # type: ignore[index]
        with pytest.raises(MisconfigurationException, match="2 optimizers for one model.*parameter groups"):
            fabric.setup(first, *parts)
        with pytest.raises(MisconfigurationException, match="LBFGS.*AdamW"):
            fabric.setup(first, LBFGS(first.parameters()))
        with pytest.raises(MisconfigurationException, match=r"fabric.setup\(model, optimizer\)"):
            fabric.setup_optimizers(SGD(first.parameters(), lr=0.1))
        model, optimizer = fabric.setup(first, SGD(first.parameters(), lr=0.1))
        with pytest.raises(MisconfigurationException, match="set up already"):
            fabric.setup(model, optimizer)
        fabric.backward(model(batches(1)[0]).square().mean())
        with pytest.raises(MisconfigurationException, match="'gradient_clipping': 0.5"):
            fabric.clip_gradients(model, optimizer, max_norm=0.5)
        other, _ = fabric.setup(second, SGD(second.parameters(), lr=0.1))
        with pytest.raises(MisconfigurationException, match=r"fabric.backward\(loss, model=model\)"):
            fabric.backward(other(batches(1)[0]).square().mean())
        fabric.backward(other(batches(1)[0]).square().mean(), model=other)

    run_in_ranks(refused)


def test_a_module_that_is_set_up_again_has_one_engine() -> None:
    """The hooks of an earlier engine would reduce the gradients once more."""
    given = batches(2)
    one = net()
    optimizer = SGD(one.parameters(), lr=0.1)
    for batch in given:
        optimizer.zero_grad()
        one(batch).square().mean().backward()
        optimizer.step()

    def loop() -> None:
        fabric, module = fabric_of("deepspeed_stage_2"), net()
        for batch in given:
            model, optimizer = fabric.setup(module, SGD(module.parameters(), lr=0.1))
            fabric.backward(model(batch.chunk(2)[fabric.global_rank]).square().mean())
            optimizer.step()
        for name, value in one.state_dict().items():
            torch.testing.assert_close(weights(model)[name], value, atol=1e-6, rtol=0)

    run_in_ranks(loop)


def failing() -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="deepspeed_stage_3")
    fabric.launch()
    module = net()
    model, optimizer = fabric.setup(module, SGD(module.parameters(), lr=0.1))
    for i, batch in enumerate(batches(3)):
        if i == 2 and fabric.global_rank == 1:
            raise KeyError("the culprit")
        fabric.backward(model(batch).square().mean())
        optimizer.step()


def test_a_rank_that_fails_ends_all_and_is_named() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1.*KeyError: 'the culprit'"):
        run_as_program(__file__, timeout=120)


if __name__ == "__main__":
    failing()
