"""Small training runs, described by a `Case`, that write down everything a resumed run must repeat to the last bit."""

from __future__ import annotations

import hashlib
import json
import os
import random
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
import torchmetrics
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

import treadle as L
from treadle.callbacks import EarlyStopping, GradientAccumulationScheduler, LearningRateMonitor, ModelCheckpoint
from treadle_fabric.loggers import CSVLogger, Logger

WIDTH = 6


@dataclass(frozen=True)
class Case:
    """What is trained, and how. Every field is a plain value, so that it can be sent to another process."""

    loader: str = "shuffled"
    workers: int = 0
    samples: int = 22
    epochs: int = 2
    max_steps: int = -1
    limit: float = 1.0
    optimization: str = "automatic"
    """or "manual" (one optimizer that steps at every second batch), "several" (two, manual), "lbfgs"."""
    accumulate: int = 1
    accumulate_later: int = 0
    """from the second epoch on; 0: no change"""
    scheduler: str = ""
    """ "step", "epoch", "plateau" (by validation), "cyclic" """
    clip: float | None = None
    precision: str = "32-true"
    validate: str = "epoch"
    """when: "never", "epoch", "half", "every 3 batches", "every 4 across epochs" """
    val_shuffle: bool = False
    every: int = 2
    """optimizer steps between checkpoints; 0: at epochs"""
    monitor: str = ""
    top_k: int = 1
    link: bool = False
    patience: int = 0
    metric: bool = False
    """torchmetrics objects in training and validation"""
    lr_monitor: bool = False
    log_every: int = 2
    norm: bool = False
    reload_every: int = 0
    devices: int = 1
    auto_resume: bool = False
    """instead of ckpt_path="last" """
    seed: int = 1

    def __str__(self) -> str:
        changed = {k: v for k, v in asdict(self).items() if v != getattr(Case, k)}
        return " ".join(f"{k}={v}" for k, v in changed.items()) or "default"


def augmented(index: int) -> tuple[Tensor, Tensor]:
    """Sample ``index``, changed by every source of randomness that a dataset may use."""
    x = torch.linspace(-1, 1, WIDTH) * (1 + index % 5) + 0.1 * torch.randn(WIDTH)
    return x + 0.1 * random.random() + 0.1 * float(numpy.random.rand()), torch.tensor(index % 2)


class Samples(Dataset[Any]):
    """An indexed dataset with random augmentation; with ``size`` each item is a whole batch."""

    def __init__(self, n: int, size: int = 0) -> None:
        self.n, self.size = n, size

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Any:
        if not self.size:
            return augmented(index)
        xs, ys = zip(*(augmented(index + i) for i in range(self.size)))
        return torch.stack(xs), torch.stack(ys)


class Stream(IterableDataset[Any]):
    """Draws its samples; each worker has its share."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        for _ in range(first, self.n, step):
            yield augmented(int(torch.randint(1000, ())))


class OddBatches(BatchSampler):
    """A batch sampler of its own: shuffled, batches of changing size."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.n).tolist()
        while order:
            size = min(len(order), 2 + len(order) % 3)
            yield [order.pop() for _ in range(size)]

    def __len__(self) -> int:
        n, count = self.n, 0
        while n > 0:
            n, count = n - min(n, 2 + n % 3), count + 1
        return count


class Buckets(BatchSampler):
    """Draws each batch only when it is asked for it, from the global random state."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[list[int]]:
        left = list(range(self.n))
        while left:
            yield [left.pop(random.randrange(len(left))) for _ in range(min(len(left), 3))]

    def __len__(self) -> int:
        return (self.n + 2) // 3


class Custom:
    """An iterable of batches that is no DataLoader."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[Any]:
        dataset = Samples(self.n, 3)
        for _ in range(0, self.n, 3):
            yield dataset[int(torch.randint(1000, ()))]


class UnsizedStateful:
    """A loader that knows how to go on from its own state."""

    def __init__(self, n: int) -> None:
        self.n, self.epoch, self.position = n, -1, 0
        self.resumed = False

    def __iter__(self) -> Iterator[Any]:
        if not self.resumed or self.position == self.n // 3:
            self.epoch, self.position = self.epoch + 1, 0
        self.resumed = False
        while self.position < self.n // 3:
            generator = torch.Generator().manual_seed(100 * self.epoch + self.position)
            self.position += 1
            yield torch.randn(3, WIDTH, generator=generator), torch.tensor([0, 1, 0])

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self.resumed = True


class Stateful(UnsizedStateful):
    """The same with a length."""

    def __len__(self) -> int:
        return self.n // 3


LOADERS = (
    "plain", "shuffled", "generator", "weighted", "drop last", "persistent", "batch sampler", "unbatched", "sampled",
    "stream", "sized stream", "custom", "list", "stateful", "unsized stateful", "cycle", "min_size", "max_size",
    "sequential", "distributed", "lazy sampler", "persistent stream",
)  # fmt: skip
INDEXED = ("plain", "shuffled", "generator", "weighted", "drop last", "persistent", "batch sampler", "unbatched")


def make_loader(kind: str, n: int, workers: int) -> Any:
    """A training loader; batches of about 3."""
    kwargs: dict[str, Any] = {"num_workers": workers}
    if workers and kind == "persistent":
        kwargs["persistent_workers"] = True
    match kind:
        case "plain":
            return DataLoader(Samples(n), 3, **kwargs)
        case "shuffled" | "persistent":
            return DataLoader(Samples(n), 3, shuffle=True, **kwargs)
        case "generator":
            return DataLoader(Samples(n), 3, shuffle=True, generator=torch.Generator().manual_seed(5), **kwargs)
        case "weighted":
            sampler = WeightedRandomSampler([1.0 + i % 4 for i in range(n)], n)
            return DataLoader(Samples(n), 3, sampler=sampler, **kwargs)
        case "drop last":
            return DataLoader(Samples(n), 3, shuffle=True, drop_last=True, **kwargs)
        case "batch sampler":
            return DataLoader(Samples(n), batch_sampler=OddBatches(n), **kwargs)
        case "lazy sampler":
            return DataLoader(Samples(n), batch_sampler=Buckets(n), **kwargs)
        case "unbatched":
            return DataLoader(Samples(n // 3, 3), batch_size=None, shuffle=True, **kwargs)
        case "sampled":  # whole batches are the indices
            sampler = BatchSampler(RandomSampler(range(n)), 3, drop_last=False)
            return DataLoader(ByList(n), batch_size=None, sampler=sampler, **kwargs)
        case "persistent stream":
            return DataLoader(Stream(n), 3, persistent_workers=bool(workers), **kwargs)
        case "stream":
            return DataLoader(Stream(n), 3, **kwargs)
        case "sized stream":
            return DataLoader(SizedStream(n), 3, **kwargs)
        case "custom":
            return Custom(n)
        case "list":
            torch.manual_seed(7)
            return [(torch.randn(3, WIDTH), torch.tensor([0, 1, 1])) for _ in range(n // 3)]
        case "stateful":
            return Stateful(n)
        case "unsized stateful":
            return UnsizedStateful(n)
        case "cycle":
            return {"a": make_loader("shuffled", n, workers), "b": make_loader("shuffled", n // 2, 0)}
        case "min_size" | "max_size" | "sequential":
            parts = {"a": make_loader("shuffled", n, 0), "b": make_loader("plain", n // 2, workers)}
            return L.CombinedLoader(parts, kind)
        case "distributed":
            sampler = DistributedSampler(range(n), num_replicas=2, rank=int(os.environ.get("LOCAL_RANK", 0)), seed=3)
            return DataLoader(Samples(n), 3, sampler=sampler, **kwargs)
    raise ValueError(kind)


class ByList(Samples):
    """Takes a list of indices."""

    def __getitem__(self, index: Any) -> Any:
        xs, ys = zip(*(augmented(i) for i in index))
        return torch.stack(xs), torch.stack(ys)


class SizedStream(Stream):
    """A stream with a length."""

    def __len__(self) -> int:
        return self.n


class Model(L.LightningModule):
    """Dropout, an optional batch norm, logging of every kind; randomness in validation too."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.first = nn.Linear(WIDTH, 8)
        self.middle = nn.Sequential(*([nn.BatchNorm1d(8)] if case.norm else []), nn.ReLU(), nn.Dropout(0.3))
        self.last = nn.Linear(8, 2)
        if case.metric:
            self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=2)
            self.mean = torchmetrics.MeanMetric()
            self.confidences = torchmetrics.CatMetric()
            several = [
                torchmetrics.Precision("multiclass", num_classes=2),
                torchmetrics.Recall("multiclass", num_classes=2),
            ]
            self.several = torchmetrics.MetricCollection(several)
            self.val_accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=2)
        self.automatic_optimization = case.optimization in ("automatic", "lbfgs")

    def loss(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, y = batch
        logits = self.last(self.middle(self.first(x.to(self.first.weight.dtype))))
        return nn.functional.cross_entropy(logits, y), logits, y

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = [p for p in batch.values() if p is not None] if isinstance(batch, dict) else [batch]
        losses = [self.loss(part) for part in parts]
        loss = torch.stack([one for one, _, _ in losses]).sum()
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("largest", loss, reduce_fx="max", on_step=False, on_epoch=True)
        self.log("python", float(batch_idx), reduce_fx="sum", on_step=False, on_epoch=True)
        self.log("function", loss, reduce_fx=torch.min, on_step=False, on_epoch=True)
        self.log("own", loss, reduce_fx=lambda values: values.median(), on_step=False, on_epoch=True)
        if batch_idx % 3 == 1:
            self.log("sometimes", loss.detach() * 2)
        if self.case.metric:
            _, logits, y = losses[0]
            self.accuracy(logits, y)
            self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
            self.several.update(logits, y)
            self.log_dict(self.several, on_step=False, on_epoch=True)
            self.mean.update(loss.detach())
            self.confidences.update(logits.detach().float().flatten()[:2])
            self.log("mean", self.mean, on_step=False, on_epoch=True)
        if not self.automatic_optimization:
            self.step_by_hand(loss, batch_idx)
        return loss

    def step_by_hand(self, loss: Tensor, batch_idx: int) -> None:
        found = self.optimizers()
        optimizers = found if isinstance(found, list) else [found]
        self.manual_backward(loss / 2)
        for i, optimizer in enumerate(optimizers):
            if batch_idx % (2 + i) == 1:
                optimizer.step()
                optimizer.zero_grad()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss, logits, y = self.loss(batch)
        self.log("val", loss + 0.01 * torch.rand(()))
        self.log("val_each", loss, on_step=True, on_epoch=False)
        if self.case.metric:
            self.val_accuracy.update(logits, y)
            self.log("val_accuracy", self.val_accuracy)

    def on_train_epoch_end(self) -> None:
        if self.case.metric:
            self.log("spread", self.confidences.compute().std())
            self.confidences.reset()

    def configure_optimizers(self) -> Any:
        case = self.case
        if case.optimization == "several":
            return torch.optim.Adam(self.first.parameters(), 0.01), torch.optim.SGD(self.last.parameters(), 0.1, 0.9)
        if case.optimization == "lbfgs":
            return torch.optim.LBFGS(self.parameters(), 0.1, max_iter=3)
        optimizer = torch.optim.AdamW(self.parameters(), 0.02)
        schedulers = torch.optim.lr_scheduler
        match case.scheduler:
            case "step":
                scheduler: Any = {"scheduler": schedulers.CosineAnnealingLR(optimizer, 9), "interval": "step"}
            case "epoch":
                scheduler = schedulers.ExponentialLR(optimizer, 0.7)
            case "cyclic":
                scheduler = {
                    "scheduler": schedulers.OneCycleLR(optimizer, 0.05, total_steps=200),
                    "interval": "step",
                    "frequency": 2,
                }
            case "plateau":
                plateau = schedulers.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
                scheduler = {"scheduler": plateau, "monitor": "val", "strict": False}
            case _:
                return optimizer
        return [optimizer], [scheduler]


class Trace:
    """One line an event, in the file before anything else happens: a killed process has lost none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None

    def write(self, *event: Any) -> None:
        if self._file is None:
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(self._file, (json.dumps(event, sort_keys=True) + "\n").encode())


class Recorder(L.Callback):
    """Writes down what training does."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.loss = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_rank:
            self.trace.path = self.trace.path.with_suffix(f".rank{trainer.global_rank}")
        self.trace.write("start", trainer.fit_progress.batches, int(trainer.fit_progress.phase))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        values = {k: float(v) for k, v in trainer.logged_metrics.items()}
        rates = [group["lr"] for o in trainer.optimizers for group in o.param_groups]
        loss = float(outputs["loss"])
        self.trace.write("batch", trainer.current_epoch, batch_idx, trainer.global_step, loss, rates, values)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.trace.write("validated", trainer.global_step, self.known(trainer))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.trace.write("epoch", trainer.current_epoch, self.known(trainer))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        state = [torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()]
        self.trace.write("trained", self.known(trainer), hashlib.sha256(repr(state).encode()).hexdigest())

    def known(self, trainer: L.Trainer) -> dict[str, float]:
        return {k: float(v) for k, v in trainer.callback_metrics.items()}


class Rows(Logger):
    """A logger that writes to the trace."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace

    @property
    def name(self) -> str:
        return "rows"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.trace.write("row", step, {k: float(v) for k, v in metrics.items()})

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        return None


def decisions(trainer: L.Trainer) -> list[Any]:
    """What the callbacks have decided so far."""
    found: list[Any] = [trainer.should_stop]
    for callback in trainer.callbacks:
        if isinstance(callback, EarlyStopping):
            found.append([callback.wait_count, callback.stopped_epoch, float(callback.best_score)])
        elif isinstance(callback, ModelCheckpoint):
            best = {plain_name(path): float(score) for path, score in callback.best_k_models.items()}
            score = callback.best_model_score
            found.append(
                [
                    best,
                    plain_name(callback.best_model_path),
                    None if score is None else float(score),
                    plain_name(callback.kth_best_model_path),
                    float(callback.kth_value),
                ]
            )
    return found


def plain_name(path: str) -> str:
    """Without the version: a file that was written, then lost by the kill, keeps its name from its successor."""
    return Path(path).stem.split("-v")[0]


def fingerprint(trainer: L.Trainer) -> str:
    """Of weights, buffers, optimizers and schedulers."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(str((value.dtype, tuple(value.shape))).encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else b"")
            digest.update(repr(value.tolist()).encode() if not value.ndim else b"")
        elif isinstance(value, Mapping):
            for key in value:
                digest.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        elif not callable(value):
            digest.update(repr(value).encode())

    assert trainer.lightning_module is not None
    add(trainer.lightning_module.state_dict())
    for optimizer in trainer.optimizers:
        add(optimizer.state_dict())
    for config in trainer.lr_scheduler_configs:
        add(config.scheduler.state_dict())
    add(trainer.strategy.precision.state_dict())
    return digest.hexdigest()


def build(case: Case, folder: Path, trace: Trace, **kwargs: Any) -> L.Trainer:
    """The trainer of a case; ``kwargs`` win."""
    save: dict[str, Any] = {"every_n_train_steps": case.every} if case.every else {}
    if case.monitor:
        save |= {"monitor": case.monitor, "save_top_k": case.top_k}
    callbacks: list[L.Callback] = [
        Recorder(trace),
        ModelCheckpoint(folder / "ckpt", filename="{step}", save_last="link" if case.link else True, **save),
    ]
    if case.patience:
        callbacks.append(EarlyStopping("val", patience=case.patience))
    if case.lr_monitor:
        callbacks.append(LearningRateMonitor())
    if case.accumulate_later:
        callbacks.append(GradientAccumulationScheduler({0: case.accumulate, 1: case.accumulate_later}))
    intervals: dict[str, dict[str, Any]] = {
        "never": {"limit_val_batches": 0},
        "epoch": {},
        "half": {"val_check_interval": 0.5},
        "every 3 batches": {"val_check_interval": 3},
        "every 4 across epochs": {"val_check_interval": 4, "check_val_every_n_epoch": None},
    }
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": case.devices,
        "strategy": "auto" if case.devices == 1 else "ddp_fork",
        "precision": case.precision,
        "max_epochs": case.epochs,
        "max_steps": case.max_steps,
        "limit_train_batches": case.limit,
        "accumulate_grad_batches": 1 if case.accumulate_later else case.accumulate,
        "gradient_clip_val": case.clip,
        "log_every_n_steps": case.log_every,
        "reload_dataloaders_every_n_epochs": case.reload_every,
        "callbacks": callbacks,
        "logger": [Rows(trace), CSVLogger(folder, "csv", flush_logs_every_n_steps=case.log_every)],
        "auto_resume": case.auto_resume,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        **intervals[case.validate],
    }
    return L.Trainer(**{**settings, **kwargs})


def train(case: Case, folder: Path, name: str, ckpt_path: Any = None, **kwargs: Any) -> L.Trainer:
    """Run a case in ``folder``, its trace in the file ``name``; ``kwargs`` go to the trainer."""
    L.seed_everything(case.seed, verbose=False)
    trainer = build(case, folder, Trace(folder / name), **kwargs)
    model, loader = Model(case), make_loader(case.loader, case.samples, case.workers)
    val = DataLoader(Samples(7), 3, shuffle=case.val_shuffle)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, loader, None if case.validate == "never" else val, ckpt_path=ckpt_path)
    if case.devices == 1:  # else the run was in other processes
        Trace(folder / name).write("end", decisions(trainer), fingerprint(trainer))
    return trainer


def read(path: Path) -> list[Any]:
    """The events of a trace; one that was cut off is none."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def find(part: list[Any], whole: list[Any]) -> int:
    """Where ``part`` begins in ``whole``; an assertion that shows the first difference where it is not there."""
    if not part:
        return len(whole)
    for start in range(len(whole) - len(part) + 1):
        if repr(part) == repr(whole[start : start + len(part)]):
            return start
    starts = [i for i, event in enumerate(whole) if event[:3] == part[0][:3]] or [max(len(whole) - len(part), 0)]
    longest = max(starts, key=lambda start: _agreeing(part, whole[start:]))
    agreed = _agreeing(part, whole[longest:])
    other = whole[longest + agreed] if longest + agreed < len(whole) else "nothing"
    came = part[agreed] if agreed < len(part) else "nothing"
    raise AssertionError(f"after {agreed} of {len(part)} events that agree came\n{came}\nwhere the other has\n{other}")


def _agreeing(one: list[Any], other: list[Any]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other)) if repr(a) != repr(b)), min(len(one), len(other)))
