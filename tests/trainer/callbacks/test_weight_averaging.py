"""Averages of weights: what they are, which weights are evaluated and saved, and that no weights are lost.

Tests of ``treadle.callbacks.weight_averaging``, ``treadle.callbacks.ema_weight_averaging``,
``treadle.callbacks.averaging``.
"""

from __future__ import annotations

import os
import pickle
import signal
from functools import partial
from typing import Any

import pytest
import torch
from tests.device_waits import DEVICE, CountedDevice
from tests.trainer.callbacks.averaged import Noted, SavesAt, batches, differing, fit
from tests.trainer.callbacks.scripted import ending_with, trainer_with
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from treadle import Callback
from treadle.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from treadle.callbacks.averaging.rules import Exponential
from treadle.callbacks.averaging.weights import AveragedWeights
from treadle_fabric import MisconfigurationException

ema = partial(EMAWeightAveraging, decay=0.75)


def load(path: str) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def expected(trained: list[Tensor], decay: float = 0.75) -> Tensor:
    average = trained[0]
    for weight in trained[1:]:
        average = torch.lerp(average, weight, 1 - decay)
    return average


def test_it_evaluates_saves_and_ends_with_the_average_and_trains_as_without_it() -> None:
    plain = Noted()
    fit(plain)
    model = Noted()
    trainer = fit(model, ema(), ModelCheckpoint("c", monitor="val_loss", save_last=True, save_top_k=-1))
    assert all(torch.equal(a, b) for a, b in zip(model.trained, plain.trained, strict=True))
    for epoch, weight in enumerate(model.validated):
        assert torch.equal(weight, expected(model.trained[: 4 * (epoch + 1)]))
        assert torch.equal(weight, model.validated[epoch]) and not torch.equal(weight, model.trained[4 * epoch + 3])
    assert torch.equal(model.weight, expected(model.trained))
    best = load(trainer.checkpoint_callback.best_model_path)  # type: ignore
    step = best["global_step"]
    assert torch.equal(best["state_dict"]["head.weight"], expected(model.trained[:step]))
    assert torch.equal(best["current_model_state"]["head.weight"], model.trained[step - 1])
    loaded = Noted.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)  # type: ignore
    assert torch.equal(loaded.weight, best["state_dict"]["head.weight"])
    trainer.validate(model, batches(1), verbose=False)
    assert torch.equal(model.validated[-1], expected(model.trained))


def test_the_average_is_that_of_torch_with_counters_as_they_are() -> None:
    model = Noted()
    reference = AveragedModel(Noted(), multi_avg_fn=get_ema_multi_avg_fn(0.75), use_buffers=True)
    after_steps: list[dict[str, Any]] = []

    class Follows(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            reference.update_parameters(pl_module)
            after_steps.append({k: v.clone() for k, v in pl_module.state_dict().items()})

    fit(model, ema(), Follows(), limit_val_batches=0)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(value, reference.module.state_dict()[name]), name
        else:
            assert torch.equal(value, after_steps[-1][name]) and value == 12  # torch's would be truncated


def test_before_the_first_update_everything_has_the_current_weights() -> None:
    model = Noted()
    saves = SavesAt("on_validation_batch_end", 4, "early.ckpt")
    fit(model, ema(update_starting_at_step=6), saves, max_epochs=2)
    assert torch.equal(model.validated[0], model.trained[3])
    assert "current_model_state" not in load("early.ckpt")
    assert torch.equal(load("early.ckpt")["state_dict"]["head.weight"], model.trained[3])
    assert torch.equal(model.validated[1], expected(model.trained[6:8]))
    model = Noted()
    fit(model, ema(update_starting_at_step=99))
    assert torch.equal(model.weight, model.trained[-1])


@pytest.mark.parametrize(
    ("arguments", "steps", "epochs"),
    [
        ({}, [0, 1, 2, 3, 4, 5], []),
        ({"update_every_n_steps": 2}, [0, 2, 4], []),
        ({"update_every_n_steps": 2, "update_starting_at_step": 3}, [4], []),
        ({"update_every_n_steps": 0, "update_starting_at_epoch": 1}, [], [1, 2]),
        ({"update_starting_at_epoch": 2}, [0, 1, 2, 3, 4, 5], [2]),
    ],
)
def test_when_the_exponential_average_is_updated(arguments: Any, steps: list[int], epochs: list[int]) -> None:
    callback = EMAWeightAveraging(**arguments)
    assert [step for step in range(6) if callback.should_update(step_idx=step)] == steps
    assert [epoch for epoch in range(3) if callback.should_update(epoch_idx=epoch)] == epochs
    assert not callback.should_update()


def test_the_user_decides_when_and_how_and_steps_are_those_of_the_optimizer() -> None:
    asked: list[tuple[Any, Any]] = []

    class Mine(WeightAveraging):
        def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
            asked.append((step_idx, epoch_idx))
            return True

    model = Noted()
    fit(model, Mine(avg_fn=lambda average, weight, count: torch.maximum(average, weight)), accumulate_grad_batches=2)
    assert asked == [(0, None), (1, None), (None, 0), (2, None), (3, None), (None, 1), (4, None), (5, None), (None, 2)]
    assert torch.equal(model.weight, torch.stack(model.trained[1:]).amax(0))
    model = Noted()
    fit(model, WeightAveraging(device="cpu"), max_epochs=1)
    assert torch.allclose(model.weight, torch.stack(model.trained).mean(0))


@pytest.mark.parametrize(
    ("hook", "step", "more"),
    [
        ("on_train_batch_end", 6, {}),
        ("on_train_batch_end", 2, {"accumulate_grad_batches": 3}),
        ("on_validation_batch_end", 10, {}),
        ("on_validation_epoch_start", 10, {}),
    ],
)
def test_a_resumed_run_is_the_run_that_went_on_to_the_last_bit(hook: str, step: int, more: Any) -> None:
    whole = Noted()
    fit(whole, ema(update_every_n_steps=2), SavesAt(hook, step, "at.ckpt"), n=5, max_epochs=3, **more).save_checkpoint(
        "whole.ckpt"
    )
    other = Noted()
    with torch.no_grad():
        other.head.weight.zero_()  # what the program begins with does not matter
    trainer = fit(other, ema(update_every_n_steps=2), ckpt_path="at.ckpt", n=5, max_epochs=3, **more)
    trainer.save_checkpoint("other.ckpt")
    assert not differing(load("whole.ckpt"), load("other.ckpt"))
    saved = load("at.ckpt")
    assert not torch.equal(saved["state_dict"]["head.weight"], saved["current_model_state"]["head.weight"])
    assert all(torch.equal(a, b) for a, b in zip(other.validated[::-1], whole.validated[::-1]))


def test_a_file_saved_after_the_end_has_the_weights_of_training_too() -> None:
    whole, begun, other = Noted(), Noted(), Noted()
    fit(whole, ema())
    fit(begun, ema(), max_epochs=2).save_checkpoint("at.ckpt")
    fit(other, ema(), ckpt_path="at.ckpt")
    assert torch.equal(other.trained[0], whole.trained[8]) and torch.equal(other.weight, whole.weight)
    last = Noted()
    with pytest.warns(UserWarning, match="nothing is left to do"):
        fit(last, ema(), ckpt_path="at.ckpt", max_epochs=2)
    assert torch.equal(last.weight, begun.weight)


def test_training_goes_on_with_its_own_weights_without_the_callback_too() -> None:
    whole, other = Noted(), Noted()
    fit(whole, ema(), SavesAt("on_validation_batch_end", 4, "at.ckpt"), limit_val_batches=1)
    with pytest.warns(UserWarning, match="EMAWeightAveraging"):  # whose state is left over
        fit(other, ckpt_path="at.ckpt")
    assert torch.equal(other.weight, whole.trained[-1])
    trainer_with().validate(other, batches(1), ckpt_path="at.ckpt", verbose=False)
    assert torch.equal(other.weight, load("at.ckpt")["state_dict"]["head.weight"])


class ActsInValidation(Callback):
    """Does something in a validation, once that many steps were made."""

    def __init__(self, act: Any, hook: str = "on_validation_batch_end") -> None:
        def run(trainer: Any, *args: Any) -> None:
            if trainer.global_step == 8:
                act()

        setattr(self, hook, run)


def boom(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("hook", ["on_validation_batch_end", "on_validation_epoch_start"])
@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt()])
def test_a_failure_in_a_validation_leaves_the_weights_of_training(error: BaseException, hook: str) -> None:
    model = Noted()
    trainer = trainer_with(ema(), ActsInValidation(partial(boom, error), hook), OnExceptionCheckpoint("c"))
    with ending_with(error):
        trainer.fit(model, batches(), batches(1))
    assert torch.equal(model.weight, model.trained[-1]) and len(model.trained) == 8
    saved = load("c/on_exception.ckpt")
    assert torch.equal(saved["state_dict"]["head.weight"], expected(model.trained))
    assert torch.equal(saved["current_model_state"]["head.weight"], model.trained[-1])


def test_an_exchange_that_ends_in_the_middle_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tensors = Noted(), AveragedWeights._tensors
    exchange = AveragedWeights.exchange

    def partly(self: Any, module: nn.Module) -> Any:
        for number, found in enumerate(tensors(self, module)):
            if number == 3 and self._training:
                raise KeyboardInterrupt
            yield found

    def interrupted(self: Any, module: nn.Module) -> None:
        monkeypatch.setattr(AveragedWeights, "_tensors", partly)
        try:
            exchange(self, module)
        finally:
            monkeypatch.setattr(AveragedWeights, "_tensors", tensors)

    monkeypatch.setattr(AveragedWeights, "exchange", interrupted)
    trained: list[dict[str, Tensor]] = []

    class Keeps(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            trained.append({k: v.clone() for k, v in pl_module.state_dict().items()})

    with pytest.raises(SystemExit):
        fit(model, ema(), Keeps())
    assert len(trained) == 4
    assert not differing(dict(model.state_dict()), trained[-1])


def test_sigterm_in_a_validation_saves_both_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treadle.loops.fit._SHORT_S", -1.0)  # every validation looks for signals
    whole, model = Noted(), Noted()
    fit(whole, ema())
    kill = ActsInValidation(partial(os.kill, os.getpid(), signal.SIGTERM), "on_validation_start")
    with pytest.raises(SystemExit):
        fit(model, ema(), kill, enable_checkpointing=True)
    assert torch.equal(model.weight, model.trained[-1])
    saved = load("checkpoints/preempted.ckpt")
    assert torch.equal(saved["current_model_state"]["head.weight"], model.trained[-1])
    resumed = Noted()
    fit(resumed, ema(), ckpt_path="checkpoints/preempted.ckpt", enable_checkpointing=True)
    assert torch.equal(resumed.weight, whole.weight)
    assert torch.equal(resumed.validated[0], whole.validated[1])


def test_a_second_fit_goes_on_with_the_weights_of_training() -> None:
    model = Noted()
    trainer = fit(model, ema(), max_epochs=1)
    assert not torch.equal(model.weight, model.trained[-1])
    seen: list[Tensor] = []
    trainer.callbacks.append(
        type("Looks", (Callback,), {"on_train_start": lambda self, trainer, pl_module: seen.append(pl_module.weight)})()
    )
    trainer.max_epochs = 2
    trainer.fit(model, batches(), batches(1))
    assert torch.equal(seen[0], model.trained[3])
    assert torch.equal(model.weight, expected(model.trained))
    with torch.no_grad():
        model.head.weight.fill_(2.0)  # given by the program
    trainer.max_epochs = 3
    trainer.fit(model, batches(), batches(1))
    assert torch.equal(seen[1], torch.full_like(seen[1], 2.0))
    other = Noted()
    trainer.fit(other, batches(), batches(1))  # another module: the average begins anew
    assert torch.equal(other.weight, expected(other.trained))


def test_files_with_weights_only_have_the_averaged_ones() -> None:
    model = Noted()
    fit(model, ema(), ModelCheckpoint("c", filename="w", save_weights_only=True), max_epochs=1)
    saved = load("c/w.ckpt")
    assert "current_model_state" not in saved and "averaging_state" not in saved
    assert torch.equal(saved["state_dict"]["head.weight"], expected(model.trained))


class Late(Noted):
    """Makes its head late, and ties a weight."""

    def __init__(self) -> None:
        super().__init__()
        del self.head

    def configure_model(self) -> None:
        if not hasattr(self, "head"):
            self.head = nn.Linear(4, 1, bias=False)
            self.tied = nn.Linear(4, 1, bias=False)
            self.tied.weight = self.head.weight
        self.body[0].requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + self.tied(self.body(batch[0])).abs().mean()


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_late_layers_tied_and_frozen_weights_and_other_precisions(precision: Any) -> None:
    model = Late()
    fit(model, ema(decay=0.99), SavesAt("on_train_batch_end", 6, "at.ckpt"), precision=precision)
    state = load("at.ckpt")["state_dict"]
    assert torch.equal(state["tied.weight"], state["head.weight"])
    assert torch.equal(state["body.0.weight"], model.body[0].weight.detach().to(state["body.0.weight"]))
    assert state["head.weight"].dtype is torch.float32  # in 16 bits small changes would be lost
    average = expected([w.float() for w in model.trained], 0.99)
    assert torch.equal(model.weight, average.to(model.weight)) and model.tied.weight is model.head.weight
    other = Late()
    fit(other, ema(decay=0.99), ckpt_path="at.ckpt", precision=precision)
    assert torch.equal(other.weight, model.weight)


def test_a_compiled_part_has_plain_names() -> None:
    model = Noted(norm=False)
    model.body = torch.compile(model.body, backend="eager")  # type: ignore
    fit(model, ema(), SavesAt("on_train_batch_end", 2, "at.ckpt"), max_epochs=1)
    assert not [name for name in load("at.ckpt")["state_dict"] if "_orig_mod" in name]
    plain = Noted(norm=False)
    fit(plain, ema(), ckpt_path="at.ckpt", max_epochs=1)
    assert torch.equal(plain.weight, model.weight)


@pytest.mark.parametrize(
    "make",
    [
        partial(EMAWeightAveraging, decay=2.0),
        partial(EMAWeightAveraging, decay=-0.1),
        partial(EMAWeightAveraging, decay="0.9"),
        partial(EMAWeightAveraging, update_every_n_steps=-1),
        partial(EMAWeightAveraging, update_every_n_steps=None),
        partial(EMAWeightAveraging, update_starting_at_step=1.5),
        partial(EMAWeightAveraging, update_starting_at_epoch=-1),
        partial(EMAWeightAveraging, avg_fn=max),
        partial(EMAWeightAveraging, device="gpu9"),
        partial(WeightAveraging, avg_fun=max),
        partial(WeightAveraging, avg_fn=3),
        partial(WeightAveraging, avg_fn=max, multi_avg_fn=max),
    ],
)
def test_wrong_arguments_are_refused(make: Any) -> None:
    with pytest.raises(MisconfigurationException, match="WeightAveraging"):
        make()


def test_two_averages_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="keep one"):
        fit(Noted(), ema(), WeightAveraging())


def test_an_update_does_not_wait_for_the_device() -> None:
    weights = AveragedWeights(Exponential(0.9), None, use_buffers=True)
    with CountedDevice() as device:
        module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).to(DEVICE)
        for _ in range(3):
            weights.update(module)
            weights.exchange(module)
            weights.restore(module)
        assert device.counts() == {"send": 7}  # of the module


def test_a_kill_in_a_validation_loses_no_weights() -> None:
    whole, resumed = Noted(), Noted()
    fit(whole, ema())
    if not (pid := os.fork()):
        kill = ActsInValidation(partial(os.kill, os.getpid(), signal.SIGKILL), "on_validation_epoch_end")
        fit(Noted(), SavesAt("on_validation_batch_end", 8, "at.ckpt"), kill, ema())
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    saved = load("at.ckpt")
    assert torch.equal(saved["current_model_state"]["head.weight"], whole.trained[7])
    assert torch.equal(saved["state_dict"]["head.weight"], whole.validated[1])
    fit(resumed, ema(), ckpt_path="at.ckpt")
    assert torch.equal(resumed.weight, whole.weight)


@pytest.mark.parametrize(
    "callback",
    [EMAWeightAveraging(), WeightAveraging(), StochasticWeightAveraging(0.1), ModelPruning("l1_unstructured")],
)
def test_they_can_be_sent_to_other_processes(callback: Callback) -> None:
    assert type(pickle.loads(pickle.dumps(callback))) is type(callback)


def test_in_another_trainer_it_begins_anew() -> None:
    callback, first, second = ema(), Noted(), Noted()
    fit(first, callback)
    fit(second, callback, max_epochs=1)
    assert torch.equal(second.weight, expected(second.trained))


def test_buffers_may_be_left_as_they_are() -> None:
    plain, model = Noted(), Noted()
    fit(plain)
    fit(model, ema(use_buffers=False), SavesAt("on_validation_batch_end", 12, "at.ckpt"))
    saved = load("at.ckpt")
    for state in (saved["state_dict"], saved["current_model_state"], model.state_dict()):
        assert torch.equal(state["body.1.running_mean"], plain.body[1].running_mean)  # type: ignore
    assert torch.equal(model.weight, expected(model.trained))
