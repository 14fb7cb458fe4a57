"""What a recorded run consists of: subclasses that write down each call and do what their base class does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tests.trainer.hook_calls import call, hooks_of, recording
from tests.trainer.models import Net, loader

import treadle as L
from treadle.callbacks import EarlyStopping, ModelCheckpoint
from treadle_fabric import TorchCheckpointIO
from treadle_fabric.loggers import Logger

LOADERS = "train_dataloader val_dataloader test_dataloader predict_dataloader".split()
TRANSFER = "on_before_batch_transfer transfer_batch_to_device on_after_batch_transfer".split()
# A module that overrides one of these leaves the straight line that the step is for most modules.
STEPPING = """optimizer_step optimizer_zero_grad backward configure_gradient_clipping clip_gradients
    lr_scheduler_step""".split()


class RecordedSGD(torch.optim.SGD):
    def step(self, *args: Any, **kwargs: Any) -> Any:  # with an argument `closure`, it would always get one
        with call("optimizer", "step"):
            return super().step(*args, **kwargs)

    def zero_grad(self, set_to_none: bool = True) -> None:
        with call("optimizer", "zero_grad"):
            super().zero_grad(set_to_none)


class RecordedLBFGS(torch.optim.LBFGS):
    def step(self, closure: Any) -> Any:
        with call("optimizer", "step"):
            return super().step(closure)


class RecordedStepLR(torch.optim.lr_scheduler.StepLR):
    made = False  # the constructor steps too

    def step(self, epoch: int | None = None) -> None:
        if not self.made:
            return super().step(epoch)
        with call("scheduler", "step"):
            super().step(epoch)


class Plateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
    def step(self, *args: Any, **kwargs: Any) -> None:
        with call("plateau", "step"):
            super().step(*args, **kwargs)


class Model(Net):
    """What the recording modules add their hooks to; options are plain attributes."""

    schedulers: tuple[str, ...] = ("step",)
    lbfgs = False
    optimizers_made = 1
    step_result: Callable[[Any, int], Any] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.layer.weight.register_hook(self.gradient)

    @staticmethod
    def gradient(grad: Any) -> None:
        with call("weight", "gradient"):
            pass

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch["a"] if isinstance(batch, dict) else batch, batch_idx)
        return loss if self.step_result is None else self.step_result(loss, batch_idx)

    def configure_optimizers(self) -> Any:
        if self.lbfgs:
            return RecordedLBFGS(self.parameters(), lr=0.1, max_iter=2)
        optimizers = [RecordedSGD(self.parameters(), lr=0.1) for _ in range(self.optimizers_made)]
        if len(optimizers) > 1 or not self.schedulers:
            return optimizers
        return optimizers, [self.scheduler(kind, optimizers[0]) for kind in self.schedulers]

    @staticmethod
    def scheduler(kind: str, optimizer: Any) -> dict[str, Any]:
        if kind == "plateau":
            return {"scheduler": Plateau(optimizer), "monitor": "val_loss"}
        scheduler = RecordedStepLR(optimizer, 1)
        scheduler.made = True
        return {"scheduler": scheduler, "interval": kind}


class ModelWithLoaders(Model):
    """Defines the loaders itself."""

    def train_dataloader(self) -> Any:
        return loader(4)

    def val_dataloader(self) -> Any:
        return loader(2)


class Data(L.LightningDataModule):
    batches = 2
    val_loaders = 1

    def train_dataloader(self) -> Any:
        return loader(2 * self.batches)

    def val_dataloader(self) -> Any:
        return [loader(2) for _ in range(self.val_loaders)]

    def test_dataloader(self) -> Any:
        return loader(2)

    def predict_dataloader(self) -> Any:
        return loader(2)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert state_dict == {"seen": 1}


class Stateful(L.Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"seen": 2}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert state_dict == {"seen": 2}


class MemoryLogger(Logger):
    name, version, experiment = "recorded", 0, None
    log_dir = root_dir = None

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        with call("logger", "log_metrics", ", ".join(metrics)):
            pass

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        with call("logger", "log_hyperparams"):
            pass

    def finalize(self, status: str) -> None:
        with call("logger", "finalize", status):
            pass


MODULE = [hook for hook in hooks_of(Model) if "state_dict" not in hook]  # PyTorch's, and no hooks of the trainer


def module_like(base: type, *hidden: str) -> Any:
    return recording(base, "module", [hook for hook in MODULE if hook not in (*LOADERS, *hidden)])


RecordedModel = module_like(Model)
StraightModel = module_like(Model, *STEPPING, *TRANSFER)
RecordedModelWithLoaders = recording(ModelWithLoaders, "module", MODULE)
RecordedData = recording(Data, "data", hooks_of(Data))
RecordedCallback = recording(Stateful, "callback", hooks_of(Stateful))
RecordedStopping = recording(EarlyStopping, "stopping", hooks_of(EarlyStopping))
RecordedFiles = recording(TorchCheckpointIO, "files", ["save_checkpoint", "load_checkpoint", "remove_checkpoint"])


def checkpoint(who: str, *args: Any, **kwargs: Any) -> ModelCheckpoint:
    """A checkpoint callback that writes down its calls as those of ``who``."""
    recorded: ModelCheckpoint = recording(ModelCheckpoint, who, hooks_of(ModelCheckpoint))(*args, **kwargs)
    return recorded
