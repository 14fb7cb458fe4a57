"""Stochastic weight averaging: its epochs, learning rates and batch norm, and that it goes on to the last bit.

Tests of ``treadle.callbacks.stochastic_weight_averaging``, ``treadle.loops.forward_epoch``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from tests.trainer.callbacks.averaged import Noted, SavesAt, batches, differing, fit
from tests.trainer.callbacks.scripted import trainer_with
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from treadle import Callback
from treadle.callbacks import StochasticWeightAveraging
from treadle_fabric import MisconfigurationException

swa = partial(StochasticWeightAveraging, swa_lrs=0.02, swa_epoch_start=2, annealing_epochs=2)


class Rates(Callback):
    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not batch_idx:
            self.rates.append(round(trainer.optimizers[0].param_groups[0]["lr"], 6))


def mean(weights: list[Tensor]) -> Tensor:
    return torch.stack(weights).mean(0)


@pytest.mark.parametrize("start", [2, 0.4])
def test_the_last_epochs_are_averaged_evaluated_and_saved(start: Any) -> None:
    model, rates = Noted(norm=False), Rates()
    trainer = fit(
        model, callback := swa(swa_epoch_start=start), rates, SavesAt("on_train_end", 20, "end.ckpt"), max_epochs=5
    )
    assert (callback.swa_start, callback.swa_end) == (1, 4)
    ends = model.epoch_ends
    assert torch.allclose(model.weight, mean(ends[1:]))  # of four epochs, the last one included
    assert torch.equal(model.validated[0], ends[0])
    for epoch in range(1, 5):
        assert torch.allclose(model.validated[epoch], mean(ends[1 : epoch + 1]))
    assert rates.rates == [0.01, 0.01, 0.015, 0.02, 0.02]  # half a cosine from 0.01 to 0.02 in two epochs
    assert [type(c.scheduler).__name__ for c in trainer.lr_scheduler_configs] == ["SWALR"]
    assert torch.equal(torch.load("end.ckpt")["current_model_state"]["head.weight"], ends[-1])


def test_batch_norm_is_computed_anew_and_nothing_else_changes() -> None:
    class Stateful(Noted):
        calls = 0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.calls += 1
            return super().training_step(batch, batch_idx)

    model, generator = Stateful(), torch.Generator().manual_seed(5)
    samples = TensorDataset(torch.randn(12, 3, generator=torch.Generator().manual_seed(1)))
    data = DataLoader(samples, batch_size=4, shuffle=True, generator=generator)
    states: list[Any] = []

    class Looks(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            states.append((torch.get_rng_state(), generator.get_state(), pl_module.body[1].momentum))

    trainer = trainer_with(Looks(), swa(), Looks())
    trainer.callbacks = [trainer.callbacks[i] for i in (0, 1, 2)]
    trainer.fit(model, data)
    before, after = states
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1]) and before[2] == after[2] == 0.1
    assert model.calls == 9 + 3 and trainer.global_step == 9
    reference = Noted()
    reference.load_state_dict(model.state_dict())
    update_bn(DataLoader(samples, batch_size=12), reference.body)
    assert torch.allclose(model.body[1].running_mean, reference.body[1].running_mean, atol=1e-6)  # type: ignore
    assert model.body[1].num_batches_tracked == 3
    trainer.save_checkpoint("end.ckpt")
    saved = torch.load("end.ckpt")
    assert torch.equal(saved["state_dict"]["body.1.running_var"], model.body[1].running_var)
    assert saved["current_model_state"]["body.1.num_batches_tracked"] == 9


def test_batch_norm_that_cannot_be_computed_anew_has_averages(caplog: pytest.LogCaptureFixture) -> None:
    class Once(IterableDataset[Tensor]):
        def __init__(self) -> None:
            self.left = iter(torch.randn(24, 3, generator=torch.Generator().manual_seed(1)).split(2))

        def __iter__(self) -> Iterator[Any]:
            return ((batch,) for batch in self.left)

    model = Noted()
    trainer_with(swa(swa_epoch_start=1), max_epochs=1).fit(model, DataLoader(Once(), batch_size=None))
    assert model.body[1].num_batches_tracked == 12 and "cannot be drawn again" in caplog.text
    assert not torch.equal(model.body[1].running_mean, torch.zeros(4))  # type: ignore
    frozen = Noted()
    frozen.body.eval()
    fit(frozen, swa())
    assert torch.equal(frozen.body[1].running_mean, torch.zeros(4))  # type: ignore


@pytest.mark.parametrize(
    ("hook", "step", "more"),
    [
        ("on_train_batch_end", 3, {}),  # before the averaged epochs
        ("on_train_batch_end", 6, {}),  # in the first of them
        ("on_train_batch_end", 12, {"accumulate_grad_batches": 1}),  # at the last batch of one
        ("on_train_batch_end", 5, {"accumulate_grad_batches": 2}),
        ("on_validation_batch_end", 12, {}),
        ("on_train_epoch_end", 8, {}),
    ],
)
def test_a_resumed_run_is_the_run_that_went_on_to_the_last_bit(hook: str, step: int, more: Any) -> None:
    whole, other = Noted(), Noted()
    fit(whole, swa(), SavesAt(hook, step, "at.ckpt"), max_epochs=5, **more).save_checkpoint("whole.ckpt")
    rates = Rates()
    fit(other, swa(), rates, ckpt_path="at.ckpt", max_epochs=5, **more).save_checkpoint("other.ckpt")
    assert not differing(torch.load("whole.ckpt"), torch.load("other.ckpt"))


def test_a_stop_in_mid_epoch_averages_no_part_of_an_epoch() -> None:
    model = Noted(norm=False)
    trainer = fit(model, swa(swa_epoch_start=1), max_steps=6)
    assert torch.equal(model.weight, model.trained[3])
    trainer.max_steps = -1
    trainer.fit(model, batches())
    assert torch.allclose(model.weight, mean([model.trained[i] for i in (3, 7, 11)]))


def test_parts_that_users_call() -> None:
    callback, one, other = swa(), nn.Linear(2, 1), nn.Linear(2, 1)
    count = torch.tensor(1)
    middle = (one.weight + other.weight).detach() / 2
    callback.update_parameters(one, other, count, callback.avg_fn)
    assert torch.allclose(one.weight, middle) and count == 2
    callback.transfer_weights(one, other)
    assert torch.equal(other.weight, one.weight)
    norm = nn.BatchNorm1d(2, momentum=0.3)
    norm(torch.randn(4, 2))
    assert callback.pl_module_contains_batch_norm(nn.Sequential(norm))
    assert not callback.pl_module_contains_batch_norm(one)
    callback.reset_batch_norm_and_save_state(norm)
    assert norm.momentum is None and torch.equal(norm.running_mean, torch.zeros(2))  # type: ignore
    callback.reset_momenta()
    assert norm.momentum == 0.3


@pytest.mark.parametrize(
    "arguments",
    [
        {"swa_lrs": 0},
        {"swa_lrs": []},
        {"swa_lrs": [0.1, -1.0]},
        {"swa_lrs": "0.1"},
        {"swa_epoch_start": 0},
        {"swa_epoch_start": 1.5},
        {"swa_epoch_start": True},
        {"annealing_epochs": -1},
        {"annealing_strategy": "cosine"},
        {"avg_fn": 1},
        {"device": "nowhere"},
    ],
)
def test_wrong_arguments_are_refused(arguments: Any) -> None:
    with pytest.raises(MisconfigurationException, match="StochasticWeightAveraging"):
        StochasticWeightAveraging(**{"swa_lrs": 0.1, **arguments})


def test_what_cannot_work_is_refused_before_training() -> None:
    class Two(Noted):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.body, self.head)]

    for model, callback, arguments, match in (
        (Two(), swa(), {}, "2 and manual optimization"),
        (Noted(), swa(swa_lrs=[0.1, 0.2]), {}, "1 parameter group"),
        (Noted(), swa(swa_epoch_start=0.5), {"max_epochs": -1, "max_steps": 4}, "fraction of max_epochs"),
    ):
        with pytest.raises(MisconfigurationException, match=match):
            fit(model, callback, **arguments)
        assert not model.trained
    with pytest.warns(UserWarning, match="nothing will be averaged"):
        fit(Noted(), swa(swa_epoch_start=7))
