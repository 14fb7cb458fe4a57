"""What users of Lightning type in modules, data modules, callbacks and loggers works as it does there.

Tests of ``treadle.module``, ``treadle.callbacks``, ``treadle.loggers`` and ``treadle.metrics``
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from treadle import LightningDataModule, LightningModule, Trainer
from treadle.callbacks import EarlyStopping, LearningRateMonitor, Timer, TQDMProgressBar
from treadle.loggers import CSVLogger, Logger, TensorBoardLogger
from treadle.loggers.logger import DummyExperiment, DummyLogger
from treadle_fabric import Fabric


def batches(n: int = 4) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(n, 2)), batch_size=2)


class Net(LightningModule):
    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(2, width)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.layer(batch[0]).sum()
        self.log("loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(tmp_path: Path, **kwargs: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": 1, "logger": False, "enable_progress_bar": False, "enable_checkpointing": False,
        "enable_model_summary": False, "accelerator": "cpu",
    }  # fmt: skip
    return Trainer(default_root_dir=tmp_path, **(defaults | kwargs))


# ------------------------------------------------------------------------------------------------ checkpoints


def saved(tmp_path: Path, module: LightningModule, **extra: Any) -> Path:
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams), **extra}, tmp_path / "a")
    return tmp_path / "a"


def test_load_from_checkpoint_leaves_out_keywords_that_init_does_not_take(tmp_path: Path) -> None:
    path = saved(tmp_path, Net(3))
    with pytest.warns(UserWarning, match="takes no argument 'depth'"):
        assert dict(Net.load_from_checkpoint(path, depth=5).hparams) == {"width": 3}

    class Needs(Net):
        def __init__(self, other: int, width: int = 1) -> None:
            super().__init__(width)

    with pytest.raises(TypeError, match="needs other"):
        Needs.load_from_checkpoint(path)

    class Loose(Net):
        def __init__(self, width: int = 1) -> None:
            super().__init__(width)
            self.strict_loading = False

    with pytest.raises(ValueError, match=r"strict=True.*strict_loading=False"):
        Loose.load_from_checkpoint(path, strict=True)
    with pytest.raises(RuntimeError, match="size mismatch"):
        Net.load_from_checkpoint(path, width=4)


# ------------------------------------------------------------------------------------------------ hyper-parameters


class Base(LightningModule):
    def __init__(self, a: int = 1, b: int = 2, ignore: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=[*(ignore or ()), "ignore"])


class After(Base):
    def __init__(self, c: int = 3, loss: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters(ignore=["loss", "ignore"])


class Before(Base):
    def __init__(self, c: int = 3, loss: Any = None, **kwargs: Any) -> None:
        self.save_hyperparameters(ignore="c")
        super().__init__(**kwargs)


@pytest.mark.parametrize(
    ("make", "kept"),
    [
        (lambda: After(c=5, a=7), {"a": 7, "b": 2, "c": 5}),
        (lambda: After(loss=max, a=7, ignore=["b"]), {"a": 7, "c": 3}),
        (lambda: Before(c=5, loss=max, ignore=["loss"]), {"a": 1, "b": 2, "c": 5}),
        (lambda: Before(c=5, loss=4, ignore=["a", "c"]), {"b": 2, "loss": 4}),
    ],
)
def test_what_a_class_ignores_is_not_kept_by_another_class_of_the_hierarchy(
    make: Callable[[], Base], kept: dict[str, Any]
) -> None:
    module = make()
    assert dict(module.hparams) == dict(module.hparams_initial) == kept


def test_no_hyperparameters_at_all() -> None:
    class Optional(LightningModule):
        def __init__(self, hparams: Any = None) -> None:
            super().__init__()
            self.save_hyperparameters(hparams)

    assert dict(Optional({"a": 1}).hparams) == {"a": 1}
    Optional()


# ------------------------------------------------------------------------------------------------ modules


def test_a_module_without_parameters_is_where_it_was_moved() -> None:
    class Outer(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = LightningModule()

    outer = Outer()
    assert (outer.device.type, outer.dtype) == ("cpu", torch.float32)
    outer.to("meta").half()
    for module in (outer, outer.inner):
        assert (module.device.type, module.dtype) == ("meta", torch.float16)
    outer.cpu().to(torch.ones(1, dtype=torch.float64))
    assert (outer.inner.device.type, outer.inner.dtype) == ("cpu", torch.float64)


def test_reductions_have_names_in_any_case(tmp_path: Path) -> None:
    expected = {"SUM": 3.0, "Sum": 3.0, "MAX": 2.0, "Min": 1.0, "AVG": 1.5, "Mean": 1.5}

    class Logs(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            for name in expected:
                self.log(name, float(batch_idx + 1), reduce_fx=name, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    run = trainer(tmp_path)
    run.fit(Logs(), batches())
    assert {name: float(run.callback_metrics[name]) for name in expected} == expected


class Kept(Logger):
    name = "kept"
    version = 0

    def __init__(self) -> None:
        self.rows: list[Any] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((dict(metrics), step))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass


def test_a_module_in_a_fabric_loop_has_what_fabric_knows_of_a_trainer() -> None:
    kept, module = Kept(), Net()
    fabric = Fabric(accelerator="cpu", devices=1, loggers=kept)
    with pytest.raises(RuntimeError, match="not attached"):
        _ = module.trainer
    plain = torch.optim.SGD(module.parameters(), lr=0.1)
    model, optimizer = fabric.setup(module, plain)
    run = module.trainer
    assert (run.global_rank, run.local_rank, run.node_rank, run.world_size, run.is_global_zero) == (0, 0, 0, 1, True)
    assert run.logger is kept and run.loggers == [kept] and run.strategy is fabric.strategy
    for name in ("current_epoch", "max_epochs", "callback_metrics"):
        with pytest.raises(AttributeError, match=rf"self\.trainer\.{name}.*Fabric loop"):
            getattr(run, name)
    assert module.optimizers() is optimizer and module.optimizers(use_pl_optimizer=False) is plain
    assert module.lr_schedulers() is None
    module.toggle_optimizer(optimizer)
    module.manual_backward(model.training_step([torch.ones(1, 2)], 0))
    module.untoggle_optimizer(optimizer)
    module.clip_gradients(optimizer, 0.5, "value")
    assert module.layer.weight.grad is not None and float(module.layer.weight.grad.max()) == 0.5
    module.log_dict({"a": 1, "b": torch.tensor(2.0)})
    assert [set(row) for row, _ in kept.rows] == [{"loss"}, {"a", "b"}]  # one call of log_dict is one row
    with pytest.raises(ValueError, match=r"self\.log\('c'"):
        module.log("c", "text")
    assert copy.deepcopy(module)._fabric is None


# ------------------------------------------------------------------------------------------------ data modules


class Data(LightningDataModule):
    def __init__(self, size: int = 4, **kwargs: Any) -> None:
        super().__init__(size, **kwargs)
        self.size = size

    def train_dataloader(self) -> Any:
        return batches(self.size)

    def val_dataloader(self) -> Any:
        return [batches(2), iter([])]

    def test_dataloader(self) -> Any:
        return {"a": batches(3), "b": batches(2)}

    def predict_dataloader(self) -> Any:
        return self.later


def test_data_modules() -> None:
    data = Data(6, more=1)
    assert str(data).splitlines() == [
        "{Train dataloader: size=6}",
        "{Validation dataloader: 1. size=2 ; 2. size=NA}",
        "{Test dataloader: a. size=3 ; b. size=2}",
        "{Predict dataloader: None}",
    ]
    assert data.name is None and data.allow_zero_length_dataloader_with_multiple_devices is False
    made = data.from_datasets(TensorDataset(torch.ones(8, 1)), batch_size=2)
    assert isinstance(made, Data) and made is not data and len(made.train_dataloader()) == 4


# ------------------------------------------------------------------------------------------------ loggers


def test_loggers_name_their_folders_as_they_were_given(tmp_path: Path) -> None:
    root = str(tmp_path)
    for kind in (CSVLogger, TensorBoardLogger):
        logger: Any = kind(root, "n", 3)
        assert (logger.save_dir, logger.root_dir) == (root, os.path.join(root, "n"))
        assert logger.log_dir == os.path.join(root, "n", "version_3")
        logger = kind(root_dir=root, name="n", version=3)  # Fabric's users
        assert (logger.root_dir, logger.log_dir) == (root, os.path.join(root, "n", "version_3"))
    assert TensorBoardLogger(root, "n", 0, True)._log_graph  # by position


def _named(kind: type[Any], **properties: Any) -> Any:
    return type("Own", (kind,), {name: property(value) for name, value in properties.items()})


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
@pytest.mark.parametrize(
    ("properties", "folder"),
    [
        ({"name": lambda self: "nm", "version": lambda self: "ver"}, "nm/ver"),
        ({"root_dir": lambda self: os.path.join(self.save_dir, "r")}, "r/version_0"),
        ({"save_dir": lambda self: os.path.join(self._folder.root, "s")}, "s/lightning_logs/version_0"),
        ({"log_dir": lambda self: os.path.join(self.save_dir, "l")}, "l"),
    ],
)
def test_files_follow_the_properties_that_a_subclass_replaces(
    kind: type[Any], properties: dict[str, Any], folder: str, tmp_path: Path
) -> None:
    logger = _named(kind, **properties)(tmp_path)
    assert logger.log_dir == str(tmp_path / folder)
    logger.log_metrics({"a": 1.0}, 0)
    logger.finalize("success")
    assert {str(file.parent) for file in tmp_path.rglob("*") if file.is_file()} == {str(tmp_path / folder)}


def test_what_loggers_have_in_memory(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 1}, step=3)
    logger.log_metrics({"a": torch.tensor(2.0)})
    logger.log_hyperparams({"x": 1})
    writer = logger.experiment
    assert writer.metrics == [{"a": 1, "step": 3}, {"a": 2.0, "step": 4}] and writer.hparams == {"x": 1}
    assert writer.metrics_file_path == os.path.join(writer.log_dir, writer.NAME_METRICS_FILE)
    logger.save()
    assert writer.metrics == [] and writer.NAME_HPARAMS_FILE in os.listdir(logger.log_dir)
    board = TensorBoardLogger(tmp_path, default_hp_metric=False)
    board.log_hyperparams({"x": 1})
    board.save()
    assert board.hparams == {"x": 1} and board.NAME_HPARAMS_FILE in os.listdir(board.log_dir)
    dummy = DummyLogger()
    dummy.log_metrics()
    dummy.log_hyperparams()
    assert isinstance(dummy.experiment, DummyExperiment) and dummy.experiment[0].add_scalar("a", 1) is None


# ------------------------------------------------------------------------------------------------ callbacks


class Bar(TQDMProgressBar):
    """Hooks that call the hook above with the trainer alone, and bars of the user's."""

    BAR_FORMAT = "{n_fmt}"

    def init_train_tqdm(self) -> Any:
        bar = super().init_train_tqdm()
        bar.set_description("mine")
        return bar

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:  # type: ignore[override]
        super().on_train_epoch_start(trainer)
        self.counts = [self.train_progress_bar.n]

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        self.counts.append(self.train_progress_bar.n)


def test_bars_count_and_stay_also_where_they_are_not_drawn(tmp_path: Path) -> None:
    bar = Bar()
    trainer(tmp_path, callbacks=bar, enable_progress_bar=True).fit(Net(), batches())
    assert bar.counts == [0, 1, 2]
    assert (bar.train_progress_bar.n, bar.train_progress_bar.total, bar.train_progress_bar.desc[:4]) == (2, 2, "mine")
    own = bar.init_validation_tqdm()
    bar.val_progress_bar = own
    assert bar.val_progress_bar is own


def test_early_stopping_is_checked_where_a_subclass_says(tmp_path: Path) -> None:
    class AtTheEnd(EarlyStopping):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            pass

        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self._run_early_stopping_check(trainer)

    stopping = AtTheEnd("loss")
    trainer(tmp_path, callbacks=stopping, max_epochs=3).fit(Net(), batches())
    assert torch.isfinite(stopping.best_score) and stopping.wait_count == 0


def test_hooks_of_callbacks_are_called_with_the_trainer_alone(tmp_path: Path) -> None:
    heard = []

    class Rates(LearningRateMonitor):
        def on_train_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
            super().on_train_start(trainer)
            heard.append("rates")

    class Time(Timer):
        def on_fit_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
            super().on_fit_start(trainer)
            heard.append("time")

    trainer(tmp_path, callbacks=[Rates(), Time()], logger=CSVLogger(tmp_path)).fit(Net(), batches())
    assert heard == ["time", "rates"]
