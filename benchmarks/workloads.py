"""The loops that are compared: by hand, and the same through Lightning, Treadle and Accelerate.

Lightning and Treadle share a vocabulary, so one text serves both; which of them it drives is the module imported. Every
workload is a function of the number of units and returns the seconds it took, set-up included: the slope between two
lengths is what counts.
"""

from __future__ import annotations

import gc
import importlib
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

__all__ = ["BATCH", "CLOCKS", "REMARKS", "WORKLOADS", "available", "ddp_step_times", "frames_to_step", "workload"]

BATCH = 8
_IN, _HIDDEN, _OUT = 32, 64, 2
_EPOCH_TRAIN, _EPOCH_VAL = 4, 2
_SCALAR_EVERY = 50
_PACKAGES = {"lightning": "lightning", "treadle": "treadle", "accelerate": "accelerate"}
_RUNTIMES = {"lightning": "lightning.fabric", "treadle": "treadle_fabric", "accelerate": "accelerate"}

Batch = tuple[Tensor, Tensor]
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""``cpu`` leaves out the time in which the machine did something else."""
clock_name = "wall"
REMARKS: dict[str, str] = {}
"""Item -> what a reader should know about how it was run."""


class TinyDataset(Dataset[Batch]):
    """64 samples in a list, repeated up to a length."""

    def __init__(self, batches: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.length = batches * BATCH
        self.items = [
            (torch.randn(_IN, generator=generator), torch.randn(_OUT, generator=generator)) for _ in range(64)
        ]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Batch:
        return self.items[index % 64]


class Stream:
    """An iterable that is no DataLoader, and does not know its length: 8 batches, repeated."""

    def __init__(self, batches: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.length = batches
        self.batches = [
            (torch.randn(BATCH, _IN, generator=generator), torch.randn(BATCH, _OUT, generator=generator))
            for _ in range(8)
        ]

    def __iter__(self) -> Iterator[Batch]:
        for index in range(self.length):
            yield self.batches[index % 8]


def _loader(batches: int) -> DataLoader[Batch]:
    return DataLoader(TinyDataset(batches), batch_size=BATCH, num_workers=0)


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(_IN, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, _OUT))


def _sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.01)


def _package(contestant: str, runtime: bool = False) -> Any:
    module = importlib.import_module((_RUNTIMES if runtime else _PACKAGES)[contestant])
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "treadle", "treadle_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return module


def available(contestant: str, runtime: bool = False) -> str | None:
    """None where the contestant can take part, else why it cannot."""
    if contestant == "raw":
        return None
    try:
        module = _package(contestant, runtime)
    except ImportError as error:
        return str(error)
    needed = "Accelerator" if contestant == "accelerate" else "Fabric" if runtime else "Trainer"
    return None if hasattr(module, needed) else f"{module.__name__} has no {needed}"


@contextmanager
def _timed(result: list[float]) -> Iterator[None]:
    gc.collect()
    clock = CLOCKS[clock_name]
    start = clock()
    yield
    result.append(clock() - start)


def _module(
    package: Any, log_train: bool = False, prog_bar: bool = False, on_step: Callable[[], None] | None = None
) -> Any:
    class Net(package.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = _net()

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            if on_step is not None:
                on_step()
            inputs, targets = batch
            loss = nn.functional.mse_loss(self.net(inputs), targets)
            if log_train:
                self.log("train_loss", loss, prog_bar=prog_bar)
            return loss

        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            inputs, targets = batch
            self.log("val_loss", nn.functional.mse_loss(self.net(inputs), targets))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return _sgd(self.net)

    return Net()


def _bare(package: Any, **settings: Any) -> Any:
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": 1,
    }
    return package.Trainer(**{**options, **settings})


# ---------------------------------------------------------------------------------------------------- by hand


def _raw_step(units: int, make: Callable[[int], Any] = _loader) -> float:
    seconds: list[float] = []
    with _timed(seconds):
        net, loader = _net(), make(units)
        optimizer = _sgd(net)
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(net(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return seconds[0]


def _raw_defaults(units: int) -> float:
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm

    seconds: list[float] = []
    with _timed(seconds):
        net, loader = _net(), _loader(units)
        optimizer = _sgd(net)
        writer = SummaryWriter("raw_logs")
        bar = tqdm(total=len(loader), file=sys.stdout)
        for step, (inputs, targets) in enumerate(loader):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(net(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if bar.update():  # it has just been redrawn: bring the loss along the next time
                bar.set_postfix(train_loss=loss.item(), refresh=False)
            if (step + 1) % _SCALAR_EVERY == 0:
                writer.add_scalar("train_loss", loss.item(), step)
        bar.close()
        writer.close()
        torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, "raw.ckpt")
    return seconds[0]


def _raw_evaluate(net: nn.Module, loader: DataLoader[Batch]) -> Tensor:
    net.eval()
    total = torch.zeros(())
    with torch.inference_mode():
        for inputs, targets in loader:
            total += nn.functional.mse_loss(net(inputs), targets)
    net.train()
    return total / len(loader)


def _raw_val(units: int) -> float:
    seconds: list[float] = []
    with _timed(seconds):
        _raw_evaluate(_net(), _loader(units)).item()
    return seconds[0]


def _raw_epoch(units: int) -> float:
    seconds: list[float] = []
    with _timed(seconds):
        net, train, val = _net(), _loader(_EPOCH_TRAIN), _loader(_EPOCH_VAL)
        optimizer = _sgd(net)
        for _ in range(units):
            for inputs, targets in train:
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(net(inputs), targets)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            _raw_evaluate(net, val)
    return seconds[0]


# ---------------------------------------------------------------------------------------------------- through a Trainer


def _trainer_step(package: Any, units: int, make: Callable[[int], Any] = _loader) -> float:
    seconds: list[float] = []
    with _timed(seconds):
        _bare(package).fit(_module(package), make(units))
    return seconds[0]


def _trainer_defaults(package: Any, units: int) -> float:
    seconds: list[float] = []
    with _timed(seconds):
        trainer = package.Trainer(accelerator="cpu", devices=1, max_epochs=1)
        trainer.fit(_module(package, log_train=True, prog_bar=True), _loader(units))
    chosen = (trainer.progress_bar_callback, *trainer.loggers)
    REMARKS["defaults"] = "its defaults are " + ", ".join(type(part).__name__ for part in chosen)
    return seconds[0]


def _trainer_val(package: Any, units: int) -> float:
    seconds: list[float] = []
    with _timed(seconds):
        _bare(package).validate(_module(package), _loader(units), verbose=False)
    return seconds[0]


def _trainer_epoch(package: Any, units: int) -> float:
    seconds: list[float] = []
    with _timed(seconds):
        trainer = _bare(package, max_epochs=units)
        trainer.fit(_module(package, log_train=True), _loader(_EPOCH_TRAIN), _loader(_EPOCH_VAL))
    return seconds[0]


# ---------------------------------------------------------------------------------------------------- through a runtime


def _fabric_step(package: Any, units: int) -> float:
    seconds: list[float] = []
    with _timed(seconds):
        fabric = package.Fabric(accelerator="cpu", devices=1)
        fabric.launch()
        net = _net()
        net, optimizer = fabric.setup(net, _sgd(net))
        loader = fabric.setup_dataloaders(_loader(units))
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(net(inputs), targets)
            fabric.backward(loss)
            optimizer.step()
    return seconds[0]


def _accelerate_step(package: Any, units: int) -> float:
    seconds: list[float] = []
    with _timed(seconds):
        accelerator = package.Accelerator(cpu=True)
        net = _net()
        net, optimizer, loader = accelerator.prepare(net, _sgd(net), _loader(units))
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(net(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
    return seconds[0]


WORKLOADS: dict[str, tuple[Callable[[int], float], Callable[[Any, int], float]]] = {
    "step": (_raw_step, _trainer_step),
    "iterable": (partial(_raw_step, make=Stream), partial(_trainer_step, make=Stream)),
    "defaults": (_raw_defaults, _trainer_defaults),
    "val": (_raw_val, _trainer_val),
    "epoch": (_raw_epoch, _trainer_epoch),
    "fabric": (_raw_step, _fabric_step),
}


def workload(item: str, contestant: str) -> Callable[[int], float]:
    """The function that runs so many units of an item for a contestant."""
    by_hand, through = WORKLOADS[item]
    if contestant == "raw":
        return by_hand
    package = _package(contestant, runtime=item == "fabric")
    if contestant == "accelerate":
        through = _accelerate_step
    return lambda units: through(package, units)


# ---------------------------------------------------------------------------------------------------- two processes


def ddp_step_times(contestant: str, short: int, long: int) -> list[float]:
    """When steps ``short`` and ``long`` of a data-parallel run began (s); the rendezvous is in the environment."""
    marks: list[float] = []
    count = 0

    def mark() -> None:
        nonlocal count
        if count in (short, long):
            marks.append(CLOCKS[clock_name]())
        count += 1

    if contestant == "raw":
        import torch.distributed as dist

        dist.init_process_group("gloo")
        net = nn.parallel.DistributedDataParallel(_net())
        optimizer = _sgd(net)
        for inputs, targets in _loader(long + 1):
            mark()
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(net(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        dist.destroy_process_group()
    else:
        package = _package(contestant)
        trainer = _bare(package, devices=2, strategy="ddp", use_distributed_sampler=False)
        trainer.fit(_module(package, on_step=mark), _loader(long + 1))
    return marks


# ---------------------------------------------------------------------------------------------------- the stack


def frames_to_step(contestant: str) -> dict[str, Any]:
    """The frames from ``fit`` to ``training_step``: those of the library, those of others, and their names."""
    package = _package(contestant)
    roots = [Path(package.__file__).parent.resolve()]
    if contestant == "treadle":
        roots.append(Path(str(importlib.import_module("treadle_fabric").__file__)).parent.resolve())
    library: list[str] = []
    other: list[str] = []

    def walk() -> None:
        if library:
            return
        frame = sys._getframe(2)
        while True:
            file, name = Path(frame.f_code.co_filename).resolve(), frame.f_code.co_name
            ours = any(root in file.parents for root in roots)
            (library if ours else other).append(f"{file.parent.name}/{file.name}:{name}")
            if (ours and name == "fit") or frame.f_back is None:
                return
            frame = frame.f_back

    _bare(package).fit(_module(package, on_step=walk), _loader(2))
    return {"library": len(library), "other": len(other), "names": library[::-1]}
