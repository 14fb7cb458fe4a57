"""A user who checks types strictly, and annotates hooks with ``L.Trainer`` and ``L.LightningModule``, has no errors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.architecture.sources import PACKAGES

RIGHT = """
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

import treadle as L
from treadle.callbacks import EarlyStopping, ModelCheckpoint, TQDMProgressBar


class Noting(L.Callback):
    def __init__(self) -> None:
        self.epochs: list[int] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.epochs.clear()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > 10 and trainer.is_global_zero:
            trainer.should_stop = True

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        pl_module.log("batch", float(batch_idx))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None: ...

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.epochs.append(trainer.current_epoch)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs = state_dict["epochs"]

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None: ...


class Keeping(ModelCheckpoint):
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        path: str = self.best_model_path
        score: Tensor | None = self.best_model_score
        print(path, score)


class Bar(TQDMProgressBar):
    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_predict_end(trainer, pl_module)


class Net(L.LightningModule):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self(x), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log_dict({"val_loss": nn.functional.mse_loss(self(batch[0]), batch[1])})

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        out: Tensor = self(batch[0])
        return out

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx > 100 else None

    def on_train_epoch_end(self) -> None:
        self.print(self.current_epoch, self.trainer.callback_metrics["loss"])

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def configure_callbacks(self) -> list[L.Callback]:
        return [EarlyStopping("val_loss")]


class Data(L.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.rows: TensorDataset | None = None

    def prepare_data(self) -> None: ...

    def setup(self, stage: str) -> None:
        self.rows = TensorDataset(torch.randn(8, 8), torch.randn(8, 1))

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.rows is not None
        return DataLoader(self.rows, batch_size=2)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def state_dict(self) -> dict[str, Any]:
        return {}


def main() -> None:
    trainer = L.Trainer(max_epochs=1, callbacks=[Noting(), Bar(), Keeping(monitor="val_loss")])
    trainer.fit(Net(), datamodule=Data())
    results: list[Mapping[str, float]] = list(trainer.validate(Net(), datamodule=Data()))
    print(results)
"""

LOOP = """
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from treadle_fabric import CSVLogger, Fabric, seed_everything
from treadle_fabric.strategies import DDPStrategy


class Printing:
    def on_epoch_end(self, epoch: int, loss: float) -> None:
        print(epoch, loss)


def evaluate(fabric: Fabric, model: nn.Module, loader: DataLoader[Any]) -> float:
    total = torch.zeros((), device=fabric.device)
    with torch.inference_mode():
        for x, y in loader:
            total += nn.functional.mse_loss(model(x), y)
    mean = fabric.all_reduce(total, reduce_op="mean")
    assert isinstance(mean, Tensor)
    return mean.item()


def main() -> None:
    seed_everything(1)
    fabric = Fabric(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(find_unused_parameters=False),
        precision="bf16-mixed",
        loggers=[CSVLogger("logs")],
        callbacks=[Printing()],
    )
    fabric.launch()
    rows = TensorDataset(torch.randn(8, 4), torch.randn(8, 1))
    loader = fabric.setup_dataloaders(DataLoader(rows, batch_size=2, shuffle=True), resumable=True)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "loader": loader, "epoch": 0}
    path = Path("last.ckpt")
    if path.exists():
        fabric.load(path, state)
    for epoch in range(2):
        for i, (x, y) in enumerate(loader):
            accumulating = i % 2 == 0
            with fabric.no_backward_sync(model, enabled=accumulating):
                loss: Tensor = nn.functional.mse_loss(model(x), y)
                fabric.backward(loss)
            if not accumulating:
                fabric.clip_gradients(model, optimizer, max_norm=1.0)
                optimizer.step()
                optimizer.zero_grad()
            fabric.log("loss", loss, step=i)
        fabric.log_dict({"val": evaluate(fabric, model, loader)})
        fabric.call("on_epoch_end", epoch=epoch, loss=0.0)
        fabric.save(path, state)
        fabric.barrier()
        if fabric.is_global_zero:
            fabric.print(fabric.global_rank, fabric.world_size, fabric.local_rank)


if __name__ == "__main__":
    main()
"""

WRONG = """
import treadle as L


class Wrong(L.Callback):
    def on_train_start(self, trainer: int, pl_module: L.LightningModule) -> None: ...

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningDataModule) -> None: ...

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.no_such_attribute


class Net(L.LightningModule):
    def on_train_start(self) -> None:
        self.trainer.no_such_attribute


class Data(L.LightningDataModule):
    def setup(self, stage: int) -> None: ...
"""


CONFIG = """
[mypy]
# as for installed packages: only the user's own files are reported
follow_imports = silent

# half of the time would go into these, and no hook mentions them
[mypy-torch._dynamo.*,torch._export.*,torch._functorch.*,torch._higher_order_ops.*,torch._inductor.*,torch._prims.*,\
torch._refs.*,torch._subclasses.*,torch.ao.*,torch.distributed.*,torch.export.*,torch.fx.*,torch.jit.*,torch.onnx.*,\
torch.testing.*,numpy.*,sympy.*]
follow_imports = skip
"""


def check_types(folder: Path, *options: str, **variables: str) -> None:
    """Check the programs strictly, in an empty folder."""
    for name, text in (("loop.py", LOOP), ("right.py", RIGHT), ("wrong.py", WRONG), ("mypy.ini", CONFIG)):
        (folder / name).write_text(text.lstrip())
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--config-file=mypy.ini",
            "--cache-dir=cache",
            *options,
            "loop.py",
            "right.py",
            "wrong.py",
        ],
        env={**{name: value for name, value in os.environ.items() if name != "MYPYPATH"}, **variables},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    found = re.findall(r"^(\w+\.py):(\d+): error: .*\[([\w-]+)\]$", done.stdout, re.MULTILINE)
    assert found == [
        ("wrong.py", "5", "override"),
        ("wrong.py", "7", "override"),
        ("wrong.py", "10", "attr-defined"),
        ("wrong.py", "15", "attr-defined"),
        ("wrong.py", "19", "override"),
    ], done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("Found 5 errors in 1 file (checked 3 source files)")


@pytest.mark.package  # beside the same check against the installed wheel
@pytest.mark.timeout(300)
def test_a_strict_type_check_of_user_code(tmp_path: Path) -> None:
    check_types(tmp_path, MYPYPATH=os.pathsep.join(str(folder.parent) for folder in PACKAGES.values()))
