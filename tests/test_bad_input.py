"""What users get wrong: each mistake has an error that says the value, the rule and the remedy, and costs nothing."""

from __future__ import annotations

import inspect
import resource
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import TensorDataset

import treadle as L
from tests.trainer.models import Net, Samples, loader, trainer
from treadle.callbacks import EarlyStopping, ModelCheckpoint, TQDMProgressBar
from treadle.callbacks.progress import PlainProgressBar
from treadle_fabric import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointUnsafeError,
    DeviceUnavailableError,
    Fabric,
    MisconfigurationException,
    NoModuleError,
    RemovedHookError,
    TreadleError,
    UnknownArgumentError,
    UnusableResultError,
    WrongTypeError,
)
from treadle_fabric.precision import MixedPrecision
from treadle_fabric.strategies import DDPStrategy

Mistake: TypeAlias = tuple[str, Callable[[], Any], type[Exception], tuple[str, ...]]
"""What is wrong, what the user does, the error, and words that its message must have."""


def rows(mistakes: list[Mistake]) -> Any:
    assert len({name for name, *_ in mistakes}) == len(mistakes)
    return pytest.mark.parametrize(("do", "error", "words"), [pytest.param(*m[1:], id=m[0]) for m in mistakes])


def check(do: Callable[[], Any], error: type[Exception], words: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        do()
    message = str(caught.value)
    assert isinstance(caught.value, TreadleError)  # of a class that says more, where there is one
    assert all(word in message for word in words), message
    assert message[-1] in ".?)" and message[:1].strip(), message


# --------------------------------------------------------------------------------------------------- constructors


def T(**arguments: Any) -> L.Trainer:
    return trainer(Path(), **arguments)


def F(**arguments: Any) -> Fabric:
    return Fabric(**{"accelerator": "cpu", "devices": 1, **arguments})


CONSTRUCTORS: list[Mistake] = [
    ("misspelled Trainer argument", lambda: L.Trainer(max_epoch=3), UnknownArgumentError,
     ("Trainer(max_epoch=...)", "Did you mean 'max_epochs'")),
    ("argument of an old release", lambda: L.Trainer(gpus=2), UnknownArgumentError,
     ("gpus", "accelerator", "devices")),
    ("misspelled Fabric argument", lambda: Fabric(device=1), UnknownArgumentError,
     ("Fabric(device=...)", "Did you mean 'devices'?")),
    ("misspelled strategy argument", lambda: DDPStrategy(find_unused_parameter=True), UnknownArgumentError,
     ("find_unused_parameter=", "'find_unused_parameters'")),
    ("misspelled accelerator", lambda: T(accelerator="cdua"), MisconfigurationException,
     ("accelerator='cdua'", "Did you mean 'cuda'?")),
    ("accelerator of a wrong type", lambda: F(accelerator=3), MisconfigurationException, ("accelerator=3", "name")),
    ("misspelled on_nonfinite", lambda: T(on_nonfinite="rasie"), MisconfigurationException,
     ("on_nonfinite='rasie'", "'skip'", "Did you mean 'raise'?")),
    ("on_nonfinite of a wrong type", lambda: T(on_nonfinite=True), MisconfigurationException,
     ("on_nonfinite=True", "'raise', 'skip' or 'warn'")),
    ("no device", lambda: T(devices=0), DeviceUnavailableError, ("devices=0", "from 1")),
    ("devices as a word", lambda: T(devices="two"), DeviceUnavailableError, ("devices='two'", "number from 1")),
    ("a list of CPUs", lambda: T(devices=[0, 1]), DeviceUnavailableError, ("devices=[0, 1]", "Use devices=2")),
    ("no machine", lambda: T(num_nodes=0), MisconfigurationException, ("num_nodes=0", "at least 1")),
    ("misspelled strategy", lambda: T(strategy="dpp"), MisconfigurationException,
     ("strategy='dpp'", "Did you mean 'ddp'?")),
    ("one-device strategy on two", lambda: T(strategy="single_device", devices=2), MisconfigurationException,
     ("single_device", "devices=2", "strategy='auto'")),
    ("misspelled start method", lambda: DDPStrategy(start_method="popn"),
     MisconfigurationException, ("start_method='popn'", "'popen'")),
    ("misspelled precision", lambda: T(precision="16-mixd"), MisconfigurationException,
     ("precision='16-mixd'", "'16-mixed'")),
    ("two precisions", lambda: F(precision="16-true", plugins=MixedPrecision("bf16-mixed", "cpu")),
     MisconfigurationException, ("precision='16-true'", "MixedPrecision", "Give one")),
    ("a name among the plugins", lambda: T(plugins=["16-mixed"]), MisconfigurationException,
     ("plugins", "'16-mixed'", "precision=")),
    ("half an epoch", lambda: T(max_epochs=1.5), MisconfigurationException, ("max_epochs=1.5", "integer", "-1")),
    ("steps as text", lambda: T(max_steps="100"), MisconfigurationException, ("max_steps='100'", "integer")),
    ("time in words", lambda: T(max_time="10 minutes"), MisconfigurationException,
     ("max_time='10 minutes'", "DD:HH:MM:SS")),
    ("more than all", lambda: T(limit_train_batches=1.5), MisconfigurationException,
     ("limit_train_batches=1.5", "int", "0.0 to 1.0")),
    ("negative limit", lambda: T(limit_val_batches=-1), MisconfigurationException, ("limit_val_batches=-1", "int")),
    ("validation never", lambda: T(val_check_interval=0), MisconfigurationException,
     ("val_check_interval=0", "at least 1")),
    ("validation every no epochs", lambda: T(check_val_every_n_epoch=0), MisconfigurationException,
     ("check_val_every_n_epoch=0", "at least 1", "None")),
    ("fraction of no epoch", lambda: T(check_val_every_n_epoch=None), MisconfigurationException,
     ("check_val_every_n_epoch=None", "val_check_interval=1.0", "int")),
    ("no accumulation", lambda: T(accumulate_grad_batches=0), MisconfigurationException,
     ("accumulate_grad_batches=0", "at least 1")),
    ("clipping at NaN", lambda: T(gradient_clip_val=float("nan")), MisconfigurationException,
     ("gradient_clip_val=nan", "at least 0")),
    ("misspelled clipping", lambda: T(gradient_clip_algorithm="nrom"), MisconfigurationException,
     ("gradient_clip_algorithm='nrom'", "Did you mean 'norm'?")),
    ("flag as a word", lambda: T(deterministic="yes"), MisconfigurationException, ("deterministic='yes'", "'warn'")),
    ("folder as a number", lambda: T(default_root_dir=5), MisconfigurationException, ("default_root_dir=5", "path")),
    ("a callback's class", lambda: T(callbacks=[EarlyStopping]), MisconfigurationException,
     ("EarlyStopping", "instance, not the class")),
    ("no callback", lambda: T(callbacks=["x"]), MisconfigurationException, ("'x'", "treadle.Callback")),
    ("two alike", lambda: T(callbacks=[ModelCheckpoint(), ModelCheckpoint()], enable_checkpointing=True),
     RuntimeError, ("ModelCheckpoint", "state key", "different arguments")),
    ("checkpoints on and off", lambda: T(callbacks=ModelCheckpoint()), MisconfigurationException,
     ("enable_checkpointing=False", "ModelCheckpoint", "leave it out")),
    ("two bars", lambda: T(callbacks=[TQDMProgressBar(), PlainProgressBar()], enable_progress_bar=True),
     MisconfigurationException, ("several progress bars", "keep one")),
    ("a logger's name", lambda: T(logger="csv"), MisconfigurationException, ("'csv'", "Logger")),
    ("a logger's name in Fabric", lambda: F(loggers="csv"), MisconfigurationException, ("'csv'", "CSVLogger('logs')")),
    ("barebones with a logger", lambda: T(barebones=True, logger=True), MisconfigurationException,
     ("barebones=True, logger=True", "turns logger off", "Leave one")),
    ("better neither way", lambda: EarlyStopping("loss", mode="auto"), MisconfigurationException,
     ("mode='auto'", "'min' or 'max'")),
    ("placeholder left open", lambda: ModelCheckpoint(filename="{epoch-{loss:.2f}"), MisconfigurationException,
     ("{epoch-",)),
]  # fmt: skip


@rows(CONSTRUCTORS)
def test_arguments(do: Callable[[], Any], error: type[Exception], words: tuple[str, ...], tmp_path: Path) -> None:
    check(do, error, words)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device that is asked for")
def test_an_accelerator_that_is_not_there() -> None:
    for name in ("cuda", "gpu"):
        check(lambda n=name: T(accelerator=n), DeviceUnavailableError, (f"accelerator='{name}'", "There is: cpu"))


def test_the_check_for_misspelled_arguments_hides_no_signature() -> None:
    for kind, n in ((L.Trainer, 45), (Fabric, 9)):
        parameters = inspect.signature(kind.__init__).parameters
        assert len(parameters) == n
        assert parameters["devices"].default == "auto"

    class Own(L.Trainer):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)

    with pytest.raises(TypeError, match=r"Own\(max_epoch=...\)"):
        Own(max_epoch=3)


# --------------------------------------------------------------------------------------------------- a Fabric loop


def layer() -> nn.Linear:
    return nn.Linear(4, 2)


def sgd(*models: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD([p for m in models for p in m.parameters()], 0.1)


def set_up() -> tuple[Fabric, Any, Any]:
    fabric, model = F(), layer()
    return fabric, *fabric.setup(model, sgd(model))


def _saved(content: dict[str, Any]) -> Fabric:
    fabric = F()
    fabric.save("a.ckpt", content)
    return fabric


def _load(data: bytes) -> None:
    Path("a.ckpt").write_bytes(data)
    F().load("a.ckpt")


def _load_half() -> None:
    _saved({"x": torch.zeros(9999)})
    _load(Path("a.ckpt").read_bytes()[:20000])


def _load_zip() -> None:
    with zipfile.ZipFile("a.ckpt", "w") as file:
        file.writestr("readme.txt", "no weights")
    F().load("a.ckpt")


class Hostile:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("hostile-ran"),)


def _load_hostile() -> None:
    torch.save({"x": Hostile()}, "a.ckpt")
    F().load("a.ckpt")


def _save_under_a_file() -> None:
    Path("file").touch()
    F().save("file/a.ckpt", {})


FABRIC: list[Mistake] = [
    ("optimizer in the model's place", lambda: F().setup(sgd(layer())), MisconfigurationException,
     ("SGD", "torch.nn.Module", "setup(model, optimizer)")),
    ("scheduler in the optimizer's place", lambda: F().setup(m := layer(), StepLR(sgd(m), 1)),
     MisconfigurationException, ("StepLR", "torch.optim.Optimizer")),
    ("optimizer of another model", lambda: F().setup(layer(), sgd(layer())), MisconfigurationException,
     ("SGD", "2 parameter(s)", "(2, 4)", "this model's parameters()")),
    ("set up twice", lambda: (s := set_up())[0].setup(s[1]), MisconfigurationException, ("set up already", "once")),
    ("a number as a loader", lambda: F().setup_dataloaders(5), MisconfigurationException, ("int", "DataLoader")),
    ("a dataset as a loader", lambda: F().setup_dataloaders(TensorDataset(torch.ones(2))), MisconfigurationException,
     ("TensorDataset", "samples", "DataLoader(")),
    ("a number as a loss", lambda: F().backward(0.5), MisconfigurationException,
     ("float", "tensor", ".item()")),
    ("both ways to clip", lambda: (s := set_up())[0].clip_gradients(s[1], s[2], clip_val=1, max_norm=1),
     MisconfigurationException, ("clip_val=1", "max_norm=1", "exactly one")),
    ("two processes and no launch", lambda: F(devices=2).setup(layer()), MisconfigurationException,
     ("before launch()", "2 processes", "fabric.launch()")),
    ("nothing to spawn", lambda: F(devices=2, strategy="ddp_spawn").launch(), MisconfigurationException,
     ("fabric.launch(train)", "strategy='ddp'")),
    ("a launch of no function", lambda: F().launch(5), MisconfigurationException,
     ("launch(5)", "function")),
    ("no logger", lambda: F().logger, MisconfigurationException, ("no logger", "CSVLogger")),
    ("a seed that is no number", lambda: F().seed_everything("a"), MisconfigurationException,
     ("seed='a'", "from 0")),
    ("misspelled method", lambda: set_up()[1].mark_forward_method("reset_parameter"), MisconfigurationException,
     ("'reset_parameter'", "Did you mean 'reset_parameters'?")),
    ("a list to save", lambda: F().save("a.ckpt", [1]), MisconfigurationException,
     ("list", "dict", "state={")),
    ("a lambda to save", lambda: F().save("a.ckpt", {"f": lambda: 0}), CheckpointError,
     ("state['f']", "cannot be pickled", "leave it out")),
    ("misspelled filter", lambda: F().save("a.ckpt", {"model": layer()}, filter={"modl": lambda k, v: True}),
     MisconfigurationException, ("'modl'", "Did you mean 'model'?")),
    ("a file as a folder", _save_under_a_file, CheckpointError, ("file/a.ckpt", "part of the path is a file")),
    ("a read-only file system", lambda: F().save("/proc/a.ckpt", {}), CheckpointError, ("/proc/a.ckpt", "folder")),
    ("no checkpoint", lambda: F().load("a.ckpt"), CheckpointNotFoundError, ("'a.ckpt'", "check the path")),
    ("a text as a checkpoint", lambda: _load(b"no checkpoint"), CheckpointCorruptError, ("a.ckpt", "b'no check'")),
    ("an empty checkpoint", lambda: _load(b""), CheckpointCorruptError, ("a.ckpt", "empty")),
    ("half a checkpoint", _load_half, CheckpointCorruptError, ("a.ckpt", "truncated", "20000 bytes")),
    ("somebody else's archive", _load_zip, CheckpointCorruptError, ("a.ckpt", "zip archive", "readme.txt")),
    ("a checkpoint that runs code", _load_hostile, CheckpointUnsafeError,
     ("pathlib", "add_safe_globals", "weights_only=False")),
    ("misspelled part", lambda: _saved({"model": layer()}).load("a.ckpt", {"modle": layer()}), CheckpointMismatchError,
     ("'modle'", "Did you mean 'model'?", "strict=False")),
    ("a model of another shape", lambda: _saved({"model": layer()}).load("a.ckpt", {"model": nn.Linear(3, 3)}),
     CheckpointMismatchError, ("'model'", "Linear", "size mismatch for weight")),
]  # fmt: skip


@rows(FABRIC)
def test_fabric(do: Callable[[], Any], error: type[Exception], words: tuple[str, ...], tmp_path: Path) -> None:
    check(do, error, words)
    assert not (tmp_path / "hostile-ran").exists()
    assert not [p.name for p in tmp_path.iterdir() if "tmp" in p.name]


# --------------------------------------------------------------------------------------------------- a run


class Counting(Net):
    """Counts what was done, in all its subclasses together."""

    batches = optimizer_steps = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        Counting.batches += 1
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return CountingSGD(self.parameters(), 0.1)


class CountingSGD(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        Counting.optimizer_steps += 1
        return result


@pytest.fixture(autouse=True)
def _start_counting() -> None:
    Counting.batches = Counting.optimizer_steps = 0


def module(**members: Any) -> Counting:
    """A module that differs from a good one by these members of its class."""
    return type("Wrong", (Counting,), members)()


def bare(**members: Any) -> L.LightningModule:
    return type("Wrong", (L.LightningModule,), members)()


def fit(model: Any = None, *data: Any, ckpt_path: Any = None, datamodule: Any = None, **arguments: Any) -> L.Trainer:
    run = T(num_sanity_val_steps=0, **arguments)
    if not data and datamodule is None:
        data = (loader(8), loader(4))
    run.fit(Counting() if model is None else model, *data, ckpt_path=ckpt_path, datamodule=datamodule)
    return run


def optimizers(make: Callable[[Any], Any]) -> Counting:
    return module(configure_optimizers=make)


def scheduled(make: Callable[[Any], Any]) -> Counting:
    def configure(self: Any) -> Any:
        optimizer = CountingSGD(self.parameters(), 0.1)
        return {"optimizer": optimizer, "lr_scheduler": make(optimizer)}

    return optimizers(configure)


def logging(hook: str, *args: Any, **kwargs: Any) -> Counting:
    def logs(self: Any, *given: Any) -> Any:
        self.log(*args, **kwargs)
        return Counting.training_step(self, *given) if hook == "training_step" else None

    if hook == "on_fit_start":
        return module(on_fit_start=lambda self: logs(self))
    if hook == "on_train_start":
        return module(on_train_start=lambda self: logs(self))
    return module(training_step=lambda self, batch, batch_idx: logs(self, batch, batch_idx))


def losing(loss: Callable[[Any, Tensor], Any]) -> Counting:
    """A module with this loss."""
    return module(training_step=lambda self, batch, batch_idx: loss(self, batch))


BEFORE: list[Mistake] = [
    ("a plain module", lambda: fit(layer()), WrongTypeError, ("Linear", "training_step", "LightningModule")),
    ("a class", lambda: fit(Net), WrongTypeError, ("`Net` is a class", "instance")),
    ("a module from Fabric", lambda: fit(F().setup(Net())), WrongTypeError,
     ("set up by Fabric already", "the module itself")),
    ("a constructor without super", lambda: fit(module(__init__=lambda self: None)), MisconfigurationException,
     ("Wrong.__init__", "super().__init__()")),
    ("no training_step", lambda: fit(bare(train_step=lambda s, b: 0, configure_optimizers=lambda s: None)),
     MisconfigurationException, ("No `training_step()` method", "Wrong needs one", "`train_step`")),
    ("no optimizer", lambda: fit(bare(training_step=lambda s, b: 0)), MisconfigurationException,
     ("No `configure_optimizers()` method", "Wrong needs one")),
    ("no validation_step", lambda: T().validate(bare(val_step=lambda s, b: 0), loader()), MisconfigurationException,
     ("No `validation_step()` method", "Wrong needs one", "`val_step`")),
    ("a hook of Lightning 1", lambda: fit(module(validation_epoch_end=lambda s, outputs: None)),
     RemovedHookError, ("Wrong.validation_epoch_end", "never called", "on_validation_epoch_end")),
    ("a hook with too few arguments", lambda: fit(module(on_train_batch_end=lambda self, outputs: None)),
     MisconfigurationException, ("Wrong.on_train_batch_end(outputs)", "on_train_batch_end(self, outputs, batch, ")),
    ("a callback's hook without the trainer",
     lambda: fit(callbacks=type("Own", (L.Callback,), {"on_train_start": lambda self: None})()),
     MisconfigurationException, ("Own.on_train_start()", "on_train_start(self, trainer, pl_module)")),
    ("a transfer hook with too few arguments", lambda: fit(module(on_after_batch_transfer=lambda self, batch: batch)),
     MisconfigurationException, ("on_after_batch_transfer(batch)", "(self, batch, dataloader_idx)")),
    ("a step with too many arguments", lambda: fit(module(training_step=lambda self, x, y, z: 0)),
     MisconfigurationException, ("(x, y, z)", "(batch, batch_idx)")),
    ("a step without a batch", lambda: fit(module(training_step=lambda self: 0)), MisconfigurationException,
     ("takes no batch", "(self, batch, batch_idx)")),
    ("no loader", lambda: T().fit(Counting()), WrongTypeError,
     ("fit has no batches", "train_dataloaders", "datamodule")),
    ("nothing to test on", lambda: T().test(Counting()), WrongTypeError, ("test has no batches",)),
    ("nothing to predict with", lambda: T().predict(dataloaders=loader()), WrongTypeError,
     ("predict got no model", "pass it")),
    ("a dataset", lambda: fit(None, Samples(4)), WrongTypeError, ("Samples", "wrap it in a DataLoader")),
    ("a number as the loader", lambda: fit(None, 5), WrongTypeError, ("int", "cannot be iterated")),
    ("a loader method without return", lambda: T().fit(module(train_dataloader=lambda self: None)),
     WrongTypeError, ("Wrong.train_dataloader", "returned None", "iterable")),
    ("a fraction of unknown length", lambda: fit(None, iter([torch.ones(2, 4)]), limit_train_batches=0.5),
     MisconfigurationException, ("limit_train_batches=0.5", "unknown", "int")),
    ("a fraction below one batch", lambda: fit(limit_train_batches=0.01), MisconfigurationException,
     ("limit_train_batches=0.01", "4 batches", "0.25")),
    ("validation at half of unknown length",
     lambda: fit(None, iter([torch.ones(2, 4)]), loader(), val_check_interval=0.5), MisconfigurationException,
     ("val_check_interval=0.5", "unknown", "int")),
    ("validation after the end", lambda: fit(val_check_interval=50), MisconfigurationException,
     ("val_check_interval=50", "4 training batches", "check_val_every_n_epoch=None")),
    ("loaders twice", lambda: fit(None, loader(), datamodule=L.LightningDataModule()), MisconfigurationException,
     ("dataloaders and a datamodule", "one of them")),
    ("a loader as the data module", lambda: fit(datamodule=loader()), MisconfigurationException,
     ("DataLoader", "LightningDataModule")),
    ("an optimizer's name", lambda: fit(optimizers(lambda s: "adam")), MisconfigurationException,
     ("'adam'", "configure_optimizers", "an optimizer")),
    ("a misspelled key", lambda: fit(optimizers(lambda s: {"optimiser": 1})), MisconfigurationException,
     ("with 'optimiser'", "Did you mean 'optimizer'?")),
    ("another model's parameters", lambda: fit(optimizers(lambda s: sgd(layer()))), MisconfigurationException,
     ("SGD", "2 of 2 parameters", "(2, 4)", "self.parameters()")),
    ("a parameter in two optimizers", lambda: fit(optimizers(lambda s: [sgd(s), sgd(s)])),
     MisconfigurationException, ("layer.weight, layer.bias", "automatic_optimization = False")),
    ("a misspelled scheduler key", lambda: fit(scheduled(lambda o: {"schedule": StepLR(o, 1)})),
     MisconfigurationException, ("'schedule'", "Did you mean 'scheduler'?")),
    ("a misspelled interval", lambda: fit(scheduled(lambda o: {"scheduler": StepLR(o, 1), "interval": "steps"})),
     MisconfigurationException, ("interval='steps'", "'step'")),
    ("a scheduler of no optimizer", lambda: fit(scheduled(lambda o: StepLR(sgd(layer()), 1))),
     MisconfigurationException, ("StepLR", "wasn't returned")),
    ("a plateau of nothing", lambda: fit(scheduled(ReduceLROnPlateau)), MisconfigurationException,
     ("ReduceLROnPlateau", "'monitor'")),
    ("clipping in manual optimization", lambda: fit(module(automatic_optimization=False), gradient_clip_val=1),
     MisconfigurationException, ("gradient_clip_val=1", "self.clip_gradients")),
    ("accumulation in manual optimization",
     lambda: fit(module(automatic_optimization=False), accumulate_grad_batches=2), MisconfigurationException,
     ("accumulate_grad_batches=2", "in `training_step`")),
    ("a checkpoint that is not there", lambda: fit(ckpt_path="none.ckpt"), CheckpointNotFoundError, ("'none.ckpt'",)),
    ("the best of none", lambda: fit(ckpt_path="best"), MisconfigurationException, ("'best'", "ModelCheckpoint")),
    ("another program's checkpoint", lambda: (torch.save({"weights": 1}, "a.ckpt"), fit(ckpt_path="a.ckpt")),
     CheckpointMismatchError, ("'state_dict'", "['weights']", "not written by a Trainer")),
    ("saving before anything ran", lambda: T().save_checkpoint("a.ckpt"), NoModuleError,
     ("save_checkpoint", "fit")),
    ("logging in on_fit_start", lambda: fit(logging("on_fit_start", "loss", 1.0)), MisconfigurationException,
     ("'loss'", "`on_fit_start`", "self.logger")),
    ("a step value outside steps", lambda: fit(logging("on_train_start", "loss", 1.0, on_step=True)),
     MisconfigurationException, ("'loss', on_step=True", "`on_train_start`", "on_epoch=True")),
]  # fmt: skip


@rows(BEFORE)
def test_before_the_first_batch(do: Callable[[], Any], error: type[Exception], words: tuple[str, ...]) -> None:
    check(do, error, words)
    assert (Counting.batches, Counting.optimizer_steps) == (0, 0)


STEP: list[Mistake] = [
    ("a loss that is a float", lambda: fit(losing(lambda s, b: 0.5)), MisconfigurationException,
     ("float", "scalar tensor", "None to skip")),
    ("a loss under another key", lambda: fit(losing(lambda s, b: {"los": s.loss(b)})), MisconfigurationException,
     ("['los']", "key 'loss'")),
    ("a loss that is no scalar", lambda: fit(losing(lambda s, b: s(b))), UnusableResultError,
     ("shape (2, 2)", ".mean()")),
    ("a loss without gradient", lambda: fit(losing(lambda s, b: s.loss(b).detach())), UnusableResultError,
     ("does not depend on any parameter", ".detach()")),
    ("a vector to log", lambda: fit(logging("training_step", "loss", torch.ones(3))), MisconfigurationException,
     ("'loss'", "shape (3,)", ".mean()")),
    ("text to log", lambda: fit(logging("training_step", "loss", "low")), MisconfigurationException,
     ("'loss'", "str", "number")),
    ("a name that is none", lambda: fit(logging("training_step", 3, 1.0)), MisconfigurationException,
     ("name 3", "string")),
    ("a misspelled reduction", lambda: fit(logging("training_step", "loss", 1.0, reduce_fx="avrage")),
     MisconfigurationException, ("reduce_fx='avrage'", "'mean'")),
    ("logging nowhere", lambda: fit(logging("training_step", "loss", 1.0, on_step=False, on_epoch=False)),
     MisconfigurationException, ("on_step=False, on_epoch=False", "set one")),
    ("a mean over batches of unknown size",
     lambda: fit(losing(lambda s, b: s.log("loss", 1.0, on_epoch=True)), [["a", "b"]]),
     MisconfigurationException, ("'loss'", "no tensor", "batch_size")),
]  # fmt: skip


@rows(STEP)
def test_in_the_first_batch(do: Callable[[], Any], error: type[Exception], words: tuple[str, ...]) -> None:
    check(do, error, words)
    assert Counting.optimizer_steps == 0


def test_enough_mistakes() -> None:
    assert len(CONSTRUCTORS) + len(FABRIC) + len(BEFORE) + len(STEP) >= 100


# --------------------------------------------------------------------------------------------------- nothing is lost


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Files can have this many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))  # Python ignores the signal that comes with it
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Wide(Counting):
    """Too large for the full disk."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ballast", torch.zeros(100_000))


def test_a_full_disk_in_the_middle_of_a_run_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    class Filling(L.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    callback = ModelCheckpoint(tmp_path)
    arguments: dict[str, Any] = {"max_epochs": 4, "enable_checkpointing": True}
    with full_disk(resource.getrlimit(resource.RLIMIT_FSIZE)[0]), pytest.raises(CheckpointError) as caught:
        fit(Wide(), callbacks=[Filling(), callback], **arguments)
    assert "epoch=2-step=12.ckpt" in str(caught.value)
    assert "File too large" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["epoch=1-step=8.ckpt"]
    assert callback.best_model_path == str(tmp_path / "epoch=1-step=8.ckpt")
    resumed = fit(Wide(), ckpt_path=callback.best_model_path, callbacks=ModelCheckpoint(tmp_path), **arguments)
    assert (resumed.global_step, resumed.current_epoch) == (16, 4)


def test_a_full_disk_leaves_what_save_checkpoint_wrote_before(tmp_path: Path) -> None:
    run = fit(Wide())
    run.save_checkpoint("a.ckpt")
    before = Path("a.ckpt").read_bytes()
    with full_disk(100_000), pytest.raises(CheckpointError, match="untouched"):
        run.save_checkpoint("a.ckpt")
    assert Path("a.ckpt").read_bytes() == before
    run.save_checkpoint("a.ckpt")  # and the run is as good as before


def test_a_misspelled_monitor_is_named_and_what_was_trained_is_kept(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, monitor="val_los")
    with pytest.raises(MisconfigurationException, match="'val_los'.*Did you mean 'val_loss'") as caught:
        fit(callbacks=callback, enable_checkpointing=True)
    kept = tmp_path / "epoch=0-step=4.ckpt"
    assert str(kept) in str(caught.value)
    with pytest.warns(UserWarning, match="please add the following callbacks"):
        assert fit(ckpt_path=kept, max_epochs=2).global_step == 8
    with pytest.raises(MisconfigurationException, match=r"'val_los'.*Did you mean 'val_loss'\?.*strict=False"):
        fit(callbacks=EarlyStopping("val_los"))


def test_the_sanity_check_speaks_of_a_misspelled_monitor_before_the_training() -> None:
    said: list[int] = []

    def note(self: Any) -> None:
        said.append(Counting.batches)

    with pytest.warns(UserWarning, match="logged 'val_loss', not 'val_los'"), pytest.raises(MisconfigurationException):
        T(callbacks=EarlyStopping("val_los")).fit(module(on_train_start=note), loader(8), loader(4))
    assert said == [0]


class Diverging(Counting):
    """Its validation loss is NaN from the second epoch on."""

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", float("nan") if self.current_epoch else 1.0)


def test_nan_is_never_the_best_and_stops_where_that_is_asked(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, monitor="val_loss")
    with pytest.warns(UserWarning, match=r"ModelCheckpoint\(monitor='val_loss'\): the value is nan"):
        fit(Diverging(), callbacks=callback, enable_checkpointing=True, max_epochs=3)
    assert callback.best_model_path == str(tmp_path / "epoch=0-step=4.ckpt")
    assert callback.best_model_score == 1.0
    assert fit(Diverging(), callbacks=EarlyStopping("val_loss"), max_epochs=9).current_epoch == 2
    stopping = EarlyStopping("val_loss", check_finite=False, patience=3)
    assert fit(Diverging(), callbacks=stopping, max_epochs=9).current_epoch == 4


def test_a_name_that_is_almost_a_hook_is_pointed_out() -> None:
    with pytest.warns(
        UserWarning, match=r"`Wrong.on_training_epoch_end` is never called. Did you mean 'on_train_epoch"
    ):
        fit(module(on_training_epoch_end=lambda self: None))
    own = type("Own", (L.Callback,), {"on_train_batch_ends": lambda *args: None})
    with pytest.warns(UserWarning, match=r"`Own.on_train_batch_ends`.*'on_train_batch_end'"):
        T(callbacks=own())
    T(callbacks=type("Own", (L.Callback,), {"on_new_best": lambda self: None})())


def test_a_mistake_in_a_run_leaves_the_trainer_and_the_module_usable() -> None:
    model, run = Counting(), T()
    with pytest.raises(MisconfigurationException):
        run.fit(model, [Samples(4)])
    run.fit(model, loader(8), loader(4))
    assert run.global_step == 4
