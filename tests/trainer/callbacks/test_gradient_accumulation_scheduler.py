from __future__ import annotations

from typing import Any

import pytest
from tests.trainer.callbacks.scripted import TrainOnly, fit, loader, trainer_with

from treadle import Callback
from treadle.callbacks import GradientAccumulationScheduler
from treadle_fabric.errors import MisconfigurationException


def test_the_number_of_batches_follows_the_epoch() -> None:
    seen: list[tuple[int, int]] = []

    class Looks(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append((trainer.accumulate_grad_batches, trainer.global_step))

    scheduler = GradientAccumulationScheduler({1: 2, 2: 4})
    trainer = trainer_with(scheduler, Looks(), max_epochs=4)
    trainer.fit(TrainOnly(), loader())
    assert seen == [(1, 4), (2, 6), (4, 7), (4, 8)]
    trainer.fit(TrainOnly(), loader())  # not refused: the trainer is as it was


def test_the_trainer_is_given_back_after_an_error_too() -> None:
    class Fails(TrainOnly):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            raise ValueError("stop here")

    trainer = trainer_with(GradientAccumulationScheduler({0: 2}))
    with pytest.raises(ValueError, match="stop here"):
        trainer.fit(Fails(), loader())
    assert trainer.accumulate_grad_batches == 1


def test_a_number_that_the_user_gave_is_left_alone() -> None:
    trainer = trainer_with(GradientAccumulationScheduler({0: 2}), accumulate_grad_batches=3)
    with pytest.raises(MisconfigurationException, match="both set"):
        trainer.fit(TrainOnly(), loader())
    assert trainer.accumulate_grad_batches == 3


def test_questions() -> None:
    scheduler = GradientAccumulationScheduler({4: 2, 2: 4})
    assert [scheduler.get_accumulate_grad_batches(epoch) for epoch in range(6)] == [1, 1, 4, 4, 2, 2]
    assert scheduler.epochs == [0, 2, 4]
    assert scheduler.going_to_accumulate_grad_batches()
    assert not GradientAccumulationScheduler({0: 1}).going_to_accumulate_grad_batches()


@pytest.mark.parametrize("scheduling", [{}, None, [1], {-1: 2}, {0: 0}, {0: "a"}, {"0": 1}, {0: 1.5}, {True: 2}])
def test_what_is_no_schedule_is_refused(scheduling: Any) -> None:
    with pytest.raises(MisconfigurationException, match="GradientAccumulationScheduler"):
        GradientAccumulationScheduler(scheduling)


def test_it_does_not_go_with_the_argument_or_with_manual_optimization() -> None:
    with pytest.raises(MisconfigurationException, match="accumulate_grad_batches=2"):
        fit(GradientAccumulationScheduler({0: 2}), accumulate_grad_batches=2)
    model = TrainOnly()
    model.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="automatic optimization"):
        fit(GradientAccumulationScheduler({0: 2}), model=model, validate=False)
