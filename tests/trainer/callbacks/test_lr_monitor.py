from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from tests.trainer.callbacks.scripted import TrainOnly, loader, trainer_with
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import StepLR

from treadle.callbacks import LearningRateMonitor, ModelCheckpoint
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.loggers import Logger

Configure = Callable[[Any], Any]


class Records(Logger):
    """Keeps the learning rates it is given."""

    name = "records"
    version = 0

    def __init__(self) -> None:
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if found := {k: v for k, v in metrics.items() if k.startswith(("lr-", "named"))}:
            self.rows.append((step, found))

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...


class Automatic(TrainOnly):
    def __init__(self, configure: Configure) -> None:
        super().__init__()
        self.configure = configure

    def configure_optimizers(self) -> Any:
        return self.configure(self)


class Manual(Automatic):
    def __init__(self, configure: Configure) -> None:
        super().__init__(configure)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.layer(batch[0]).sum())
            optimizer.step()


def run(model: Automatic, every: int = 2, **arguments: Any) -> tuple[LearningRateMonitor, list[Any]]:
    monitor, logger = LearningRateMonitor(**arguments), Records()
    trainer = trainer_with(monitor, logger=logger, max_epochs=2, log_every_n_steps=every)
    trainer.fit(model, loader())
    return monitor, logger.rows


def halving(optimizer: Optimizer, **options: Any) -> Any:
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": StepLR(optimizer, 1, 0.5), **options}}


def test_an_epoch_scheduler_is_logged_at_epochs() -> None:
    monitor, rows = run(Automatic(lambda m: halving(SGD(m.parameters(), 0.8))))
    assert rows == [(0, {"lr-SGD": 0.8}), (4, {"lr-SGD": 0.4})]
    assert monitor.lrs == {"lr-SGD": [0.8, 0.4]}
    assert monitor.lr_sch_names == ["lr-SGD"]


def test_a_step_scheduler_is_logged_at_the_steps_where_loggers_write() -> None:
    _, rows = run(Automatic(lambda m: halving(SGD(m.parameters(), 0.8), interval="step")))
    assert rows == [(1, {"lr-SGD": 0.4}), (3, {"lr-SGD": 0.1}), (5, {"lr-SGD": 0.025}), (7, {"lr-SGD": 0.00625})]


@pytest.mark.parametrize(("interval", "steps"), [("epoch", [0, 4]), ("step", [1, 3, 5, 7]), (None, [0, 1, 3, 4, 5, 7])])
def test_an_optimizer_without_a_scheduler(interval: Any, steps: list[int]) -> None:
    _, rows = run(Automatic(lambda m: SGD(m.parameters(), 0.1)), logging_interval=interval)
    assert rows == [(step, {"lr-SGD": 0.1}) for step in steps]


def test_an_accumulation_is_logged_once() -> None:
    monitor, logger = LearningRateMonitor("step"), Records()
    trainer = trainer_with(monitor, logger=logger, max_epochs=2, log_every_n_steps=1, accumulate_grad_batches=2)
    trainer.fit(Automatic(lambda m: SGD(m.parameters(), 0.1)), loader())
    assert [step for step, _ in logger.rows] == [0, 1, 2, 3]


def test_momentum_and_weight_decay() -> None:
    both = {"log_momentum": True, "log_weight_decay": True, "logging_interval": "epoch"}
    monitor, rows = run(Automatic(lambda m: SGD(m.parameters(), 0.1, momentum=0.9, weight_decay=0.01)), **both)
    assert rows[0][1] == {"lr-SGD": 0.1, "lr-SGD-momentum": 0.9, "lr-SGD-weight_decay": 0.01}
    assert monitor.last_momentum_values == {"lr-SGD-momentum": 0.9}
    assert monitor.last_weight_decay_values == {"lr-SGD-weight_decay": 0.01}
    _, rows = run(Automatic(lambda m: halving(Adam(m.parameters(), 0.1), name="named")), **both)
    assert rows[0][1] == {"named": 0.1, "named-momentum": 0.9, "named-weight_decay": 0.0}


def test_parameter_groups() -> None:
    def groups(*names: str | None) -> Configure:
        def configure(model: Any) -> Optimizer:
            parts: list[dict[str, Any]] = [{"params": [model.layer.weight]}, {"params": [model.layer.bias], "lr": 0.5}]
            for part, name in zip(parts, names):
                if name:
                    part["name"] = name
            return SGD(parts, 0.1)

        return configure

    _, rows = run(Automatic(groups()), logging_interval="epoch")
    assert rows[0][1] == {"lr-SGD/pg1": 0.1, "lr-SGD/pg2": 0.5}
    _, rows = run(Automatic(groups("slow", "fast")), logging_interval="epoch")
    assert rows[0][1] == {"lr-SGD/slow": 0.1, "lr-SGD/fast": 0.5}
    with pytest.raises(MisconfigurationException, match="two parameter groups are called 'lr-SGD/same'"):
        run(Automatic(groups("same", "same")))


def test_a_group_that_is_added_on_the_way() -> None:
    class Unfreezes(Automatic):
        def on_train_epoch_end(self) -> None:
            optimizer = self.optimizers()
            if len(optimizer.param_groups) == 1:
                optimizer.add_param_group({"params": [self.layer.bias], "lr": 0.5})

    model = Unfreezes(lambda m: SGD([m.layer.weight], 0.1))
    both = {"log_momentum": True, "log_weight_decay": True}
    monitor, rows = run(model, logging_interval="epoch", **both)
    assert monitor.lrs == {"lr-SGD/pg1": [0.1, 0.1], "lr-SGD/pg2": [0.5]}
    assert [sorted(k for k in row if "-m" not in k and "-w" not in k) for _, row in rows] == [
        ["lr-SGD"],
        ["lr-SGD/pg1", "lr-SGD/pg2"],
    ]


def test_several_optimizers() -> None:
    def two(model: Any) -> Any:
        return [SGD([model.layer.weight], 0.1), SGD([model.layer.bias], 0.2)], []

    def one_scheduled(model: Any) -> Any:
        (first, second), _ = two(model)
        return [first, second], [StepLR(first, 1)]

    _, rows = run(Manual(two), logging_interval="epoch")
    assert rows[0][1] == {"lr-SGD": 0.1, "lr-SGD-1": 0.2}
    _, rows = run(Manual(one_scheduled))
    assert rows[:2] == [(0, {"lr-SGD": 0.1, "lr-SGD-1": 0.2}), (1, {"lr-SGD-1": 0.2})]


def test_two_schedulers_of_one_name_are_refused() -> None:
    def same(model: Any) -> Any:
        return [halving(SGD([p], 0.1), name="named") for p in (model.layer.weight, model.layer.bias)]

    with pytest.raises(MisconfigurationException, match="two schedulers are called 'named'"):
        run(Manual(same))


def test_it_needs_a_logger() -> None:
    trainer = trainer_with(LearningRateMonitor())
    with pytest.raises(MisconfigurationException, match="has no logger"):
        trainer.fit(TrainOnly(), loader())
    assert trainer.global_step == 0


def test_an_unknown_interval_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="'batch'"):
        LearningRateMonitor("batch")  # type: ignore[arg-type]


@pytest.mark.parametrize("interval", ["step", "epoch", None])
def test_rates_can_be_monitored(interval: Any) -> None:
    best = ModelCheckpoint("c", "{epoch}-{lr-SGD:.2f}", "lr-SGD")
    trainer = trainer_with(LearningRateMonitor(interval), best, logger=Records(), log_every_n_steps=2)
    trainer.fit(Automatic(lambda m: halving(SGD(m.parameters(), 0.8))), loader())
    assert os.path.basename(best.best_model_path) == "epoch=2-lr-SGD=0.20.ckpt"
