"""Pickle, ``torch.save`` and ``copy.deepcopy`` of everything public, before, in and after a run.

A copy leaves out what belongs to a running process or to a run: locks, threads, open files, the place on the terminal,
process groups, and the trainer that a module, a data module or a bar belongs to. With all else it goes on.

Tests of ``treadle.trainer.outcome``, ``treadle.module.datamodule``, ``treadle.trainer.session``.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import run_in_ranks
from tests.trainer.models import Net, Samples, loader, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import treadle as L
import treadle_fabric
from treadle import callbacks
from treadle_fabric import Fabric, data, loggers

Copy = Callable[[Any], Any]


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def saved(value: Any) -> Any:
    torch.save(value, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Copy] = {"pickle": pickled, "torch.save": saved, "deepcopy": copy.deepcopy}


class Manual(Net):
    """Steps by itself, and keeps the wrapped optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.optimizer = self.optimizers()
        self.optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.optimizer.step()
        self.log("train_loss", 1.0)


class Scheduled(Net):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), 0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class Data(L.LightningDataModule):
    def __init__(self, scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__()
        self.scale, self.kwargs = scale, kwargs

    def collate(self, samples: list[Tensor]) -> Tensor:
        return torch.stack(samples) * self.scale

    def train_dataloader(self) -> Any:
        return DataLoader(Samples(8), 2, collate_fn=self.collate, **self.kwargs)

    val_dataloader = train_dataloader


class CopiesAll(L.Callback):
    """Copies, at every hook, the trainer and everything that it gives."""

    def __init__(self) -> None:
        self.hooks: set[str] = set()

    def copy_all(self, hook: str, run: L.Trainer) -> None:
        if hook in self.hooks:  # once a hook is enough
            return
        self.hooks.add(hook)
        parts = [run, run.lightning_module, run.datamodule, run.model, run.fabric, run.strategy, run.accelerator]
        parts += [run.precision_plugin, run.strategy.checkpoint_io, run.state, run.fit_progress, *run.loggers]
        parts += [*run.callbacks, *run.optimizers, *run.wrapped_optimizers, *run.lr_scheduler_configs]
        parts += [run.train_dataloader, run.val_dataloaders, run.callback_metrics]
        for part in parts:
            for make in COPIES.values():
                assert type(make(part)) is type(part), (hook, part)


def _copying(hook: str) -> Callable[..., None]:
    return lambda self, run, module, *_, **__: self.copy_all(hook, run)


HOOKS = """setup on_fit_start on_sanity_check_end on_train_start on_train_batch_start on_after_backward
on_before_optimizer_step on_train_batch_end on_validation_start on_validation_batch_end on_validation_end
on_train_epoch_end on_train_end on_fit_end teardown""".split()
for name in HOOKS:
    setattr(CopiesAll, name, _copying(name))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


BARS: dict[str, tuple[Callable[[], Any], type[Net], str]] = {
    "tqdm": (callbacks.TQDMProgressBar, Scheduled, "32-true"),
    "rich": (callbacks.RichProgressBar, Manual, "bf16-true"),
    "plain": (callbacks.PlainProgressBar, Scheduled, "16-mixed"),
}


@pytest.mark.parametrize("bar", BARS)
def test_everything_of_a_run_is_copied_at_every_hook(bar: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    make, kind, precision = BARS[bar]
    copies = CopiesAll()
    more = [make(), callbacks.Timer(), callbacks.LearningRateMonitor(), callbacks.EarlyStopping("val_loss")]
    more += [callbacks.OnExceptionCheckpoint(tmp_path), callbacks.ModelSummary()]
    writes = [loggers.CSVLogger(tmp_path), loggers.TensorBoardLogger(tmp_path)]
    run = trainer(
        tmp_path, callbacks=[copies, *more], logger=writes, precision=precision, enable_checkpointing=True,
        enable_progress_bar=True, enable_model_summary=True, log_every_n_steps=1, max_epochs=2,
    )  # fmt: skip
    for make_copy in COPIES.values():
        make_copy(run)
    run.fit(kind(), datamodule=Data())
    assert copies.hooks >= {*HOOKS}
    copies.copy_all("after", run)
    for make_copy in COPIES.values():
        again = make_copy(run)
        assert not again.state.stage
        assert again.global_step == run.global_step == 8
        assert {k: float(v) for k, v in again.callback_metrics.items()} == {
            k: float(v) for k, v in run.callback_metrics.items()
        }
        again.loggers.clear()  # those of the original write into the folder
        assert again.validate(datamodule=Data(), verbose=False) == run.validate(datamodule=Data(), verbose=False)


class TakesCopies(L.Callback):
    def on_train_batch_end(self, run: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.taken = {name: (make(run), make(module)) for name, make in COPIES.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {}


def test_copies_taken_in_a_run_train_again(tmp_path: Path) -> None:
    takes = TakesCopies()
    run = trainer(tmp_path, callbacks=[takes, callbacks.TQDMProgressBar()], enable_progress_bar=True)
    run.fit(Net(), loader())
    for name, (other, module) in takes.taken.items():
        assert module._trainer is None
        assert other.interrupted, "it does not run, and so it can"
        assert other.global_step == 2
        other.fit(module, loader())
        weights = {**module.state_dict()}
        other.max_epochs = 2
        other.fit(other.lightning_module, datamodule=Data())
        assert other.global_step == 8, name
        assert all(v.isfinite().all() for v in weights.values())
    assert run.global_step == 4


class SavesItself(Net):
    def on_train_epoch_end(self) -> None:
        torch.save(self, "model.pt")
        self.twin = copy.deepcopy(self)


def test_a_model_that_saves_itself_in_a_hook_loads_and_trains(tmp_path: Path) -> None:
    model = SavesItself()
    trainer(tmp_path, logger=[loggers.CSVLogger(tmp_path)]).fit(model, loader())
    for again in (torch.load("model.pt", weights_only=False), model.twin):
        for name, value in model.layer.state_dict().items():
            assert torch.equal(again.layer.state_dict()[name], value)
        before = again.layer.weight.detach().clone()
        trainer(tmp_path).fit(again, loader())
        assert not torch.equal(again.layer.weight, before)


class Collates(Net):
    def collate(self, samples: list[Tensor]) -> Tensor:
        assert self._trainer is None
        return torch.stack(samples) * 2

    def train_dataloader(self) -> Any:
        return DataLoader(Samples(4), 2, collate_fn=self.collate, num_workers=1, multiprocessing_context="spawn")


class Scales(Data):
    def worker_init(self, worker: int) -> None:
        self.scale = 3.0

    def train_dataloader(self) -> Any:
        return DataLoader(
            Samples(4), 2, collate_fn=self.collate, worker_init_fn=self.worker_init, num_workers=1,
            multiprocessing_context="spawn",
        )  # fmt: skip


class Seen(L.Callback):
    def __init__(self) -> None:
        self.sums: list[float] = []

    def on_train_batch_end(self, run: Any, module: Any, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        self.sums.append(float(batch.sum()))


@pytest.mark.parametrize(("module", "datamodule", "sums"), [(Collates, None, [8.0, 40.0]), (Net, Scales, [12.0, 60.0])])
def test_workers_started_by_spawn_call_methods_of_module_and_data_module(
    module: type[Net], datamodule: Any, sums: list[float], tmp_path: Path
) -> None:
    seen = Seen()
    run = trainer(tmp_path, callbacks=[seen], limit_val_batches=0)
    run.fit(module(), datamodule=None if datamodule is None else datamodule())
    assert seen.sums == sums


# ------------------------------------------------------------------------------------------------ every public class

GIVEN: dict[str, Callable[[], Any]] = {
    "Estimate": lambda: treadle_fabric.estimate(nn.Linear(4, 1), torch.optim.SGD, "auto", 1, batch=torch.ones(2, 4)),
    # the trainer's
    "Trainer": lambda: L.Trainer(accelerator="cpu", logger=False),
    "LightningModule": Net,
    "LightningDataModule": Data,
    "CombinedLoader": lambda: begun(L.CombinedLoader([loader(), loader()])),
    "GradientAccumulationScheduler": lambda: callbacks.GradientAccumulationScheduler({0: 2}),
    "EarlyStopping": lambda: callbacks.EarlyStopping("loss"),
    "OnExceptionCheckpoint": lambda: callbacks.OnExceptionCheckpoint("."),
    "LambdaCallback": lambda: callbacks.LambdaCallback(on_train_start=print),
    "ModelPruning": lambda: callbacks.ModelPruning("l1_unstructured", amount=0.5),
    "OptunaPruning": lambda: callbacks.OptunaPruning(trial(), "loss"),
    "StochasticWeightAveraging": lambda: callbacks.StochasticWeightAveraging(swa_lrs=0.1),
    # the runtime's
    "Fabric": lambda: set_up()[0],
    "FabricModule": lambda: set_up()[1],
    "FabricOptimizer": lambda: set_up()[2],
    "FabricDataLoader": lambda: begun(set_up()[0].setup_dataloaders(loader())),
    "PrivateStream": lambda: data.PrivateStream(range(3)),
    "ResumableDataLoader": lambda: begun(set_up()[0].setup_dataloaders(loader(), resumable=True)),
    "ShardedSampler": lambda: data.ShardedSampler(range(4), num_replicas=2, rank=0),
    "CSVLogger": lambda: wrote(loggers.CSVLogger(".")),
    "TensorBoardLogger": lambda: wrote(loggers.TensorBoardLogger(".")),
    "MixedPrecision": lambda: treadle_fabric.MixedPrecision("16-mixed"),
    "SingleDeviceStrategy": lambda: set_up()[0].strategy,
    "Plan": lambda: treadle_fabric.resolve(accelerator="cpu"),
    "AsyncCheckpointIO": lambda: wrote_checkpoint(treadle_fabric.AsyncCheckpointIO()),
    "ThroughputMonitor": lambda: callbacks.ThroughputMonitor(len),
    "StopAgreement": lambda: None,
    "SignalListener": lambda: None,
}
ABSTRACT = """Accelerator CheckpointIO ClusterEnvironment LRScheduler Launcher Logger ParallelStrategy Stateful Strategy
Checkpoint""".split()
OF_THE_PROCESS = """StopAgreement SignalListener ExternalLauncher SpawnLauncher SubprocessLauncher""".split()
"""They are the threads, pipes and children of a process, no state; what holds them leaves them out."""
ELSEWHERE = """CUDAAccelerator MPSAccelerator KubeflowEnvironment LSFEnvironment MPIEnvironment RayEnvironment
RayTrainReportCallback RayTuneReport SLURMEnvironment TorchElasticEnvironment""".split()
"""They need hardware, a cluster's variables or Ray."""


def trial() -> Any:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study().ask()


def begun(loader: Any) -> Any:
    for _ in loader:
        break
    return loader


def set_up() -> tuple[Fabric, Any, Any]:
    fabric = Fabric(accelerator="cpu", precision="16-mixed", loggers=[loggers.CSVLogger(".")])
    net = nn.Linear(4, 1)
    model, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters()))
    fabric.backward(model(torch.ones(2, 4)).sum())
    optimizer.step()
    return fabric, model, optimizer


def wrote(logger: Any) -> Any:
    logger.log_metrics({"a": 1.0}, 0)
    logger.save()
    return logger


def wrote_checkpoint(store: Any) -> Any:
    store.save_checkpoint({"a": 1}, "a.ckpt")
    return store


def public_classes() -> Iterator[tuple[str, type]]:
    for package, names in (
        (L, L.__all__),
        (callbacks, vars(callbacks)),
        (treadle_fabric, treadle_fabric.__all__),
    ):
        for name in names:
            found = getattr(package, name)
            if inspect.isclass(found) and not issubclass(found, BaseException):
                yield name, found


@pytest.mark.parametrize("name", sorted({name for name, _ in public_classes()}))
def test_an_object_of_each_public_class_is_copied(name: str) -> None:
    if name in ABSTRACT or name in OF_THE_PROCESS or name in ELSEWHERE:
        return
    kind = dict(public_classes())[name]
    value = GIVEN.get(name, kind)()
    for make in COPIES.values():
        assert isinstance(make(value), kind)
    if name == "AsyncCheckpointIO":
        value.teardown()


# ------------------------------------------------------------------------------------------------ what copies do


def test_copies_of_a_wrapped_model_and_optimizer_train() -> None:
    _, model, optimizer = set_up()
    for make in (pickled, copy.deepcopy):
        other, steps = make((model, optimizer))
        before = other.weight.detach().clone()
        assert torch.equal(before, model.weight)
        other(torch.ones(2, 4)).sum()
        for parameter in other.parameters():
            parameter.grad = torch.ones_like(parameter)
        steps.optimizer.step()
        assert not torch.equal(other.weight, before)
        assert torch.equal(model.weight, before)


def test_a_copied_logger_opens_its_files_anew_in_the_same_folder() -> None:
    for make in COPIES.values():
        first = wrote(loggers.TensorBoardLogger("logs"))
        second = make(first)
        assert second.log_dir == first.log_dir
        wrote(second)
        assert len([*Path(first.log_dir).glob("events*")]) >= 2


def test_a_copied_resumable_loader_begins_its_epoch_anew() -> None:
    prepared = set_up()[0].setup_dataloaders(loader(), resumable=True)
    batches = iter(prepared)
    next(batches)
    other = pickled(prepared)
    assert [float(batch[0, 0]) for batch in other] == [0, 2, 4, 6]
    assert other.epoch == 1
    assert [float(batch[0, 0]) for batch in batches] == [2, 4, 6], "the original goes on"


def test_a_copied_timer_has_measured_the_time_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    timer = callbacks.Timer()
    timer.on_train_start(None, None)  # type: ignore[arg-type]
    now = 130.0
    other = pickled(timer)
    now = 1000.0
    assert other.time_elapsed() == 30.0
    assert timer.time_elapsed() == 900.0


def _copies_in_ranks(folder: Path) -> None:
    copies = CopiesAll()
    run = trainer(
        folder, devices=2, strategy="ddp", callbacks=[copies], enable_progress_bar=True, enable_checkpointing=True
    )
    for name in HOOKS:  # torch makes a copy of its DDP only where the copy can join a group
        setattr(CopiesAll, name, lambda self, run, module, *_, **__: self.copy_some(run, module))
    CopiesAll.copy_some = _copy_some  # type: ignore[attr-defined]
    run.fit(Net(), datamodule=Data())
    assert copies.hooks
    _copy_some(copies, run, run.lightning_module)


def _copy_some(self: Any, run: L.Trainer, module: Any) -> None:
    self.hooks.add("any")
    for part in (run, module, run.datamodule, run.fabric, run.strategy, *run.callbacks, *run.wrapped_optimizers):
        pickled(part)
        copy.deepcopy(part)


def test_trainer_module_and_parts_are_copied_on_each_of_two_ranks(tmp_path: Path) -> None:
    run_in_ranks(_copies_in_ranks, tmp_path)
