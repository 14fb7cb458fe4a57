"""What programs for Lightning type, because it has always worked: table by table, each with the smallest run.

Tests of ``treadle.trainer.settings``, ``treadle.trainer.view``, ``treadle.stages``, ``treadle.module.overriding``,
``treadle.metrics.latest``.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tests.trainer.models import Net, loader, trainer
from torch import Tensor
from torch.optim import SGD

import treadle as L
from treadle.callbacks import EarlyStopping, ModelCheckpoint, Timer
from treadle.stages import RunningStage, TrainerFn, TrainerState, TrainerStatus
from treadle_fabric import Fabric, MisconfigurationException
from treadle_fabric.loggers import CSVLogger
from treadle_fabric.precision import needs_closure, takes_closure


class Stepping(Net):
    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test", self.loss(batch))


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def data(**methods: Any) -> L.LightningDataModule:
    made: L.LightningDataModule = type(
        "Data", (L.LightningDataModule,), {"train_dataloader": lambda self: loader(4), **methods}
    )()
    return made


# ------------------------------------------------------------------------------------- methods that are not there


NOT_THERE = """
    on_train_start on_train_batch_start on_train_epoch_end on_validation_epoch_end setup teardown prepare_data
    configure_model configure_callbacks on_save_checkpoint lr_scheduler_step on_after_backward on_fit_end
""".split()


def test_hooks_that_are_none_are_not_there(tmp_path: Path) -> None:
    module = Stepping()
    for name in NOT_THERE:
        setattr(module, name, None)
    callback = L.Callback()
    callback.on_train_batch_end = callback.setup = callback.state_dict = None  # type: ignore[assignment]
    run = trainer(tmp_path, callbacks=callback)
    run.fit(module, datamodule=data(setup=None, teardown=None, prepare_data=None, val_dataloader=None))
    run.save_checkpoint(tmp_path / "last.ckpt")
    run.validate(module, loader(4), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert run.state.finished


@pytest.mark.parametrize("on_class", [False, True])
def test_a_step_that_is_none_is_not_there(tmp_path: Path, on_class: bool) -> None:
    module = type("Without", (Stepping,), {"validation_step": None})() if on_class else Stepping()
    module.validation_step = None
    run = trainer(tmp_path)
    with pytest.warns(UserWarning, match="no `validation_step`"):
        run.fit(module, loader(4), loader(4))
    assert run.state.finished and not run.enable_validation
    with pytest.raises(MisconfigurationException, match="validation_step"):
        run.validate(module, loader(4))
    module.predict_step = None
    with pytest.raises(MisconfigurationException, match="forward.*predict_step"):
        run.predict(module, loader(4))


MOCKED: list[tuple[str, Any, int]] = [  # the hook, what it returns, how often it is called
    ("on_train_batch_end", None, 2),
    ("on_validation_epoch_end", None, 2),
    ("optimizer_zero_grad", None, 2),
    ("on_before_optimizer_step", None, 2),
    ("configure_gradient_clipping", None, 2),
]


@pytest.mark.parametrize(("name", "returned", "calls"), MOCKED, ids=[name for name, *_ in MOCKED])
def test_a_hook_may_be_a_mock(tmp_path: Path, name: str, returned: Any, calls: int) -> None:
    module = Stepping()
    setattr(module, name, Mock(return_value=returned))
    trainer(tmp_path, gradient_clip_val=0.5).fit(module, loader(4), loader(2))
    hook = getattr(module, name)
    assert hook.call_count == calls
    if name == "configure_gradient_clipping":
        assert hook.call_args.kwargs == {"gradient_clip_val": 0.5, "gradient_clip_algorithm": None}


def test_a_callback_and_a_data_module_may_be_mocked(tmp_path: Path) -> None:
    callback, module = Mock(spec=L.Callback), Stepping()
    module.setup = Mock()
    given = data()
    given.setup = Mock()
    trainer(tmp_path, callbacks=callback).fit(module, datamodule=given)
    assert callback.on_train_batch_end.call_count == 2
    module.setup.assert_called_once_with(stage="fit")
    given.setup.assert_called_once_with(stage="fit")


def test_hooks_of_evaluations_may_leave_out_the_loader(tmp_path: Path) -> None:
    seen: list[int] = []

    class Short(L.Callback):
        def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch_idx)

        def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, idx: int) -> None:
            seen.append(idx)

    class Module(Stepping):
        def setup(self, *, stage: str) -> None:
            seen.append(-1)

        def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch_idx)

    trainer(tmp_path, callbacks=Short()).validate(Module(), loader(4), verbose=False)
    assert seen == [-1, 0, 0, 0, 1, 1, 1]


# ------------------------------------------------------------------------------------- the state


def test_the_state_tells_how_a_run_goes(tmp_path: Path) -> None:
    assert TrainerState() == TrainerState(TrainerStatus.INITIALIZING, None, None)
    assert [status.stopped for status in TrainerStatus] == [False, False, True, True]
    assert [stage.evaluating for stage in RunningStage] == [False, True, True, True, False]
    assert [stage.dataloader_prefix for stage in RunningStage] == ["train", "val", "val", "test", "predict"]
    stages: dict[str, Any] = {}

    class Watching(Stepping):
        def setup(self, stage: str) -> None:
            stages[stage] = (self.trainer.state.stage, self.trainer.state.stopped)

    run, module = trainer(tmp_path), Watching()
    assert not run.state.finished and not run.state.stopped
    run.fit(module, loader(4))
    assert (run.state.finished, run.state.stopped, run.state.fn, run.state.stage) == (True, True, "fit", None)
    run.test(module, loader(4), verbose=False)
    assert stages == {"fit": (RunningStage.TRAINING, False), "test": (RunningStage.TESTING, False)}
    module.training_step = Mock(side_effect=ValueError("no"))  # type: ignore[method-assign]
    run.max_epochs = 2
    with pytest.raises(ValueError, match="no"):
        run.fit(module, loader(4))
    assert (run.state.finished, run.state.stopped, run.interrupted) == (False, True, True)
    run.validating = True
    assert run.evaluating and run.state.stage is RunningStage.VALIDATING


# ------------------------------------------------------------------------------------- attributes that are set


SET: list[tuple[str, Any, Callable[[L.Trainer], Any], Any]] = [  # the attribute, its value, what is read after a fit
    ("limit_train_batches", 1, lambda run: run.global_step, 1),
    ("limit_val_batches", 1, lambda run: run.num_val_batches, [1]),
    ("val_check_interval", 1, lambda run: run.val_check_batch, 1),
    ("num_sanity_val_steps", -1, lambda run: run.num_sanity_val_batches, [2]),
    ("accumulate_grad_batches", 2, lambda run: run.global_step, 1),
    ("max_steps", 1, lambda run: run.global_step, 1),
    ("overfit_batches", 1, lambda run: run.overfit_batches, 1),
    ("check_val_every_n_epoch", 2, lambda run: run.callback_metrics.get("val_loss"), None),
    ("reload_dataloaders_every_n_epochs", 1, lambda run: run.reload_dataloaders_every_n_epochs, 1),
]


@pytest.mark.parametrize(("name", "value", "read", "expected"), SET, ids=[name for name, *_ in SET])
def test_a_setting_may_be_set(tmp_path: Path, name: str, value: Any, read: Any, expected: Any) -> None:
    run = trainer(tmp_path)
    setattr(run, name, value)
    run.fit(Stepping(), loader(4), loader(4))
    assert read(run) == expected


def test_a_setting_is_checked_and_taken_over_before_the_next_epoch(tmp_path: Path) -> None:
    limits: list[Any] = []

    class Annealing(Stepping):
        def on_train_epoch_start(self) -> None:
            self.trainer.gradient_clip_val = 0.5 / (self.current_epoch + 1)

        def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, **_: Any) -> None:
            limits.append(gradient_clip_val)

    run = trainer(tmp_path, max_epochs=2)
    run.fit(Annealing(), loader(2))
    assert limits == [0.5, 0.25]
    for name, wrong in (("limit_val_batches", 1.5), ("val_check_interval", -1), ("gradient_clip_algorithm", "x")):
        with pytest.raises(MisconfigurationException, match=name):
            setattr(run, name, wrong)


def test_loggers_may_be_set(tmp_path: Path) -> None:
    run, first, second = trainer(tmp_path), CSVLogger(tmp_path, "one"), CSVLogger(tmp_path, "two")
    run.logger = first
    assert (run.logger, run.loggers) == (first, [first])
    run.loggers = [second, first]
    assert run.logger is second
    run.fit(module := Stepping(), loader(4), loader(4))
    assert module.logger is second and (Path(second.log_dir) / "metrics.csv").is_file()
    run.logger = None
    assert run.loggers == []
    with pytest.raises(MisconfigurationException, match="pass a Logger"):
        run.loggers = ["csv"]  # type: ignore[list-item]


def test_metrics_that_a_program_adds_are_there_for_callbacks(tmp_path: Path) -> None:
    class Adding(Net):
        def on_validation_epoch_end(self) -> None:
            self.trainer.callback_metrics["mine"] = torch.tensor(2.0)
            self.trainer.callback_metrics.update(other=torch.tensor(3.0))

    saves = ModelCheckpoint(tmp_path, monitor="mine")
    run = trainer(tmp_path, callbacks=[saves, EarlyStopping("other")], enable_checkpointing=True)
    run.fit(Adding(), loader(2), loader(2))
    assert saves.best_model_score == 2


def test_the_metrics_for_callbacks_are_a_plain_dictionary_that_a_program_may_change_and_save(tmp_path: Path) -> None:
    class Changing(Net):
        def on_train_epoch_end(self) -> None:
            metrics = self.trainer.callback_metrics
            metrics.setdefault("mine", torch.tensor(2.0))
            metrics |= {"other": torch.tensor(3.0), "third": torch.tensor(4.0)}
            del self.trainer.callback_metrics["third"]
            self.trainer.callback_metrics.pop("val_loss")

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["metrics"] = self.trainer.callback_metrics

    run = trainer(tmp_path)
    run.fit(Changing(), loader(2), loader(2))
    metrics = run.callback_metrics
    assert metrics.keys() == {"train_loss", "mine", "other"} and type(metrics) is dict
    run.save_checkpoint(tmp_path / "run.ckpt")
    torch.save(metrics, tmp_path / "metrics.pt")
    Fabric(accelerator="cpu").save(tmp_path / "fabric.ckpt", {"metrics": metrics})
    kept = [torch.load(tmp_path / "run.ckpt", weights_only=True)["metrics"]]
    kept += [torch.load(tmp_path / "metrics.pt", weights_only=True), Fabric().load(tmp_path / "fabric.ckpt")["metrics"]]
    kept += [copy.deepcopy(metrics), pickle.loads(pickle.dumps(metrics))]
    assert all(type(each) is dict and each == metrics for each in kept)


def test_the_loops_have_their_counters(tmp_path: Path) -> None:
    run, module = trainer(tmp_path, max_epochs=2), Stepping()
    assert run.lightning_module is None and run.model is None
    run.fit(module, loader(4), loader(4))
    loop = run.fit_loop
    optimizer = loop.epoch_loop.automatic_optimization.optim_progress.optimizer
    assert (loop.max_batches, loop.done, loop.skip, loop.trainer) == (2, True, True, run)
    assert (optimizer.step.total.completed, loop.epoch_loop._batches_that_stepped) == (4, 4)
    assert loop.state_dict()["epoch_progress"]["current"]["completed"] == 2
    assert (loop.epoch_loop.val_loop.max_batches, run.validate_loop.num_dataloaders) == ([2], 1)
    assert run.predict_loop.skip and run.test_loop.inference_mode
    assert run.model is module


def test_what_libraries_read_of_the_inside(tmp_path: Path) -> None:
    class Asking(Net):
        def configure_optimizers(self) -> Any:  # before the loaders are asked for
            loop = self.trainer.fit_loop
            self.sources = loop._data_source, loop.epoch_loop.val_loop._data_source
            return super().configure_optimizers()

        def val_dataloader(self) -> Any:
            return loader(2)

        def on_train_batch_end(self, *_: Any) -> None:
            self.dumped = self.trainer._checkpoint_connector.dump_checkpoint(weights_only=True)
            self.trainer.strategy.save_checkpoint(self.dumped, tmp_path / "dumped.ckpt")

    module, batches, run = Asking(), loader(4), trainer(tmp_path)
    run.fit(module, batches)
    train, val = module.sources
    assert (train.instance, train.is_module(), train.is_defined(), train.dataloader()) == (
        batches,
        False,
        True,
        batches,
    )
    assert (val.instance, val.is_module(), val.is_defined(), len(val.dataloader())) == (module, True, True, 1)
    plain = Asking()
    trainer(tmp_path).fit(plain, datamodule=data(train_dataloader=lambda self: batches))
    assert [source.is_defined() for source in plain.sources] == [True, False]
    assert not run._accelerator_connector.is_distributed and run._accelerator_connector.use_distributed_sampler
    assert module.dumped["global_step"] == 2 and "optimizer_states" not in module.dumped
    assert same(Asking.load_from_checkpoint(tmp_path / "dumped.ckpt"), module)
    assert not run.test_loop._data_source.is_defined()


def test_several_loaders_are_shown_as_they_were_given(tmp_path: Path) -> None:
    class Pairs(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch["a"])

    run = trainer(tmp_path)
    run.fit(Pairs(), {"a": loader(4), "b": loader(8)})
    assert sorted(run.train_dataloader) == ["a", "b"]


# ------------------------------------------------------------------------------------- PL_TRAINER_ variables


VARIABLES: list[tuple[str, str, dict[str, Any], Any]] = [  # the argument, the text, arguments passed, the value
    ("max_epochs", "7", {}, 7),
    ("max_epochs", "7", {"max_epochs": 2}, 2),
    ("max_epochs", "7", {"max_epochs": None, "max_steps": 4}, -1),
    ("limit_train_batches", "0.5", {}, 0.5),
    ("limit_train_batches", "5", {}, 5),
    ("precision", "bf16-mixed", {}, "bf16-mixed"),
    ("precision", "64", {}, "64-true"),
    ("gradient_clip_val", "None", {}, None),
    ("enable_checkpointing", "0", {}, False),
    ("logger", "False", {}, False),
    ("max_time", "{'hours': 1}", {}, timedelta(hours=1)),
    ("max_steps", "", {}, -1),
]


@pytest.mark.parametrize(("name", "text", "given", "value"), VARIABLES)
def test_a_variable_is_the_default_of_an_argument(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, given: dict[str, Any], value: Any
) -> None:
    monkeypatch.setenv(f"PL_TRAINER_{name.upper()}", text)
    monkeypatch.setenv("PL_TRAINER_NO_ARGUMENT", "1")
    plain = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False}
    run = L.Trainer(**{**plain, **given})
    if name == "enable_checkpointing":
        assert bool(run.checkpoint_callbacks) is value
    elif name == "logger":
        assert bool(run.loggers) is value
    elif name == "max_time":
        assert [c.time_remaining() for c in run.callbacks if isinstance(c, Timer)] == [value.total_seconds()]
    else:
        assert getattr(run, name) == value


# ------------------------------------------------------------------------------------- errors that programs catch


ERRORS: list[tuple[str, Callable[[L.Trainer], Any], type[Exception]]] = [
    ("a plain module", lambda run: run.fit(torch.nn.Linear(2, 2), loader(2)), TypeError),  # type: ignore[arg-type]
    ("no module", lambda run: run.test(), TypeError),
    ("a number as the loader", lambda run: run.fit(Net(), 1), TypeError),
    ("no batches", lambda run: run.validate(Net()), MisconfigurationException),
    ("nothing to save", lambda run: run.save_checkpoint("a.ckpt"), AttributeError),
    ("the best of none", lambda run: run.test(Stepping(), loader(2), ckpt_path="best"), ValueError),
    ("a missing file", lambda run: run.fit(Net(), loader(2), ckpt_path="none.ckpt"), FileNotFoundError),
    ("loaders beside a data module", lambda run: run.fit(Net(), None, loader(2), data()), MisconfigurationException),
    ("clipping by text", lambda run: setattr(run, "gradient_clip_val", "a"), TypeError),
    ("a hook of Lightning 1", lambda run: run.fit(type("A", (Net,), {"test_epoch_end": print})()), NotImplementedError),
    ("losses", lambda run: run.fit(type("A", (Net,), {"training_step": lambda s, b, i: s(b)})(), loader(2)),
     RuntimeError),
    ("no metric", lambda run: (run.callbacks.append(EarlyStopping("none")), run.fit(Net(), loader(2))), RuntimeError),
    ("two alike", lambda run: L.Trainer(accelerator="cpu", callbacks=[EarlyStopping("a"), EarlyStopping("a")]),
     RuntimeError),
]  # fmt: skip


@pytest.mark.parametrize(("do", "error"), [pytest.param(*row[1:], id=row[0]) for row in ERRORS])
def test_an_error_is_of_the_type_that_programs_catch(tmp_path: Path, do: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        do(trainer(tmp_path))


# ------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("duration", [timedelta(0), "00:00:00:00", {"seconds": 0}, timedelta(seconds=-1)])
def test_no_time_trains_nothing(tmp_path: Path, duration: Any) -> None:
    run = trainer(tmp_path, callbacks=Timer(duration))
    run.fit(Net(), loader(4))
    assert run.should_stop and run.global_step == 0
    run = trainer(tmp_path, max_time=duration)
    run.fit(Net(), loader(4))
    assert run.global_step == 0


def test_an_evaluation_without_a_model_takes_the_best_weights(tmp_path: Path) -> None:
    class Worse(Stepping):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("val", float(self.current_epoch))

    module, best = Worse(), Worse()
    run = trainer(tmp_path, max_epochs=3, callbacks=ModelCheckpoint(tmp_path, monitor="val"), enable_checkpointing=True)
    run.fit(module, loader(4), loader(2))
    last = run.test(module, loader(4), verbose=False)
    assert run.ckpt_path is None
    with pytest.warns(UserWarning, match="best checkpoint"):
        assert run.test(dataloaders=loader(4), verbose=False) != last
    assert run.ckpt_path == run.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    trainer(tmp_path).fit(best, loader(4))  # the first epoch is the best
    assert same(module, best)


def test_a_data_module_gives_all_loaders(tmp_path: Path) -> None:
    module = type("Own", (Net,), {"val_dataloader": lambda self: loader(2)})()
    run = trainer(tmp_path)
    run.fit(module, datamodule=data())
    assert run.num_val_batches == [] and not run.enable_validation


def test_an_optimizer_that_uses_a_closure_gets_one(tmp_path: Path) -> None:
    class Twice(SGD):
        def step(self, closure: Any = None) -> Any:
            loss = closure()
            closure()
            super().step()
            return loss

    class Never(SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure) if len(self.state) else None

    class Ignoring(SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step()

    module, plain = Stepping(), Stepping()
    kinds = [SGD, Twice, Never, Ignoring, torch.optim.LBFGS]
    made = [kind(module.parameters(), lr=0.1) for kind in kinds]
    assert [takes_closure(each) for each in made] == [False, True, True, False, False]
    assert [needs_closure(each) for each in made] == [False, False, False, False, True]
    module.configure_optimizers = lambda: Twice(module.parameters(), lr=0.1)  # type: ignore[method-assign]
    plain.configure_optimizers = lambda: SGD(plain.parameters(), lr=0.1)  # type: ignore[method-assign]
    trainer(tmp_path).fit(module, loader(4))
    trainer(tmp_path).fit(plain, loader(4))
    assert same(module, plain)
    module.configure_optimizers = lambda: Never(module.parameters(), lr=0.1)  # type: ignore[method-assign]
    with pytest.raises(MisconfigurationException, match="did not call it"):
        trainer(tmp_path).fit(module, loader(4))
    module.configure_optimizers = lambda: Twice(module.parameters(), lr=0.1)  # type: ignore[method-assign]
    with pytest.raises(MisconfigurationException, match="without a default value"):
        trainer(tmp_path, accumulate_grad_batches=2).fit(module, loader(4))


def test_optimizers_may_be_set_in_a_fit(tmp_path: Path) -> None:
    class Setting(Net):
        def on_fit_start(self) -> None:
            self.trainer.optimizers = [SGD(self.parameters(), lr=0.5)]

        def on_train_epoch_start(self) -> None:
            if self.current_epoch:
                self.trainer.optimizers = SGD(self.parameters(), lr=0.0)

        def on_train_epoch_end(self) -> None:
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            weights.append(self.layer.weight.detach().clone())

    rates: list[float] = []
    weights: list[Tensor] = []
    run, plain = trainer(tmp_path, max_epochs=2), trainer(tmp_path)
    run.fit(Setting(), loader(4))
    plain.fit(once := Net(lr=0.5), loader(4))
    assert rates == [0.5, 0.0] and run.global_step == 4
    assert torch.equal(weights[0], once.layer.weight) and torch.equal(*weights)
    run.save_checkpoint(tmp_path / "set.ckpt")
    with pytest.raises(MisconfigurationException, match="can be set in a fit"):
        trainer(tmp_path).optimizers = []


def test_an_optimizer_toggles_its_part_of_the_model(tmp_path: Path) -> None:
    required: list[bool] = []

    class Two(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.other = torch.nn.Linear(4, 1)

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            first: Any = self.optimizers()[0]  # type: ignore[index]
            with first.toggle_model(sync_grad=False):
                required.append(self.other.weight.requires_grad)
            required.append(self.other.weight.requires_grad)
            self.manual_backward(self.loss(batch))
            first.step()

        def configure_optimizers(self) -> Any:
            return SGD(self.layer.parameters(), lr=0.1), SGD(self.other.parameters(), lr=0.1)

    trainer(tmp_path, limit_train_batches=1).fit(Two(), loader(4))
    assert required == [False, True]


def test_barebones_and_summaries_leave_the_callbacks_of_the_program(tmp_path: Path) -> None:
    seen = Mock(spec=L.Callback)
    run = L.Trainer(barebones=True, accelerator="cpu", devices=1, max_epochs=1, callbacks=seen)
    run.fit(Net(), loader(2))
    assert seen.on_train_start.call_count == 1 and run.barebones
    summary = L.callbacks.ModelSummary()
    assert summary in trainer(tmp_path, callbacks=summary, enable_model_summary=False).callbacks


def test_the_stage_of_a_method() -> None:
    assert [fn.stage.value for fn in TrainerFn] == ["train", "validate", "test", "predict"]
