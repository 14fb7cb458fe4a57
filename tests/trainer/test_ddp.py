"""Two real processes: what they compute together is what one process computes alone, and they live and die together.

Tests of ``treadle_fabric.strategies.ddp``, ``treadle_fabric.strategies.parallel``, ``treadle.trainer.outcome``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tests.processes import run_in_ranks, wait_until
from tests.trainer.models import Net, Samples, loader, trainer
from torch import Tensor
from torch.utils.data import DataLoader

import treadle as L
from treadle.callbacks import ModelCheckpoint
from treadle_fabric import MisconfigurationException, ProcessFailedError, UnusedParametersError

pytestmark = pytest.mark.timeout(110)

WORLD = 2


# Everything from here to `run_everything` runs with two processes in a script, and with one in the test itself.


class Logging(Net):
    """Logs a value of each sample in every way of reducing."""

    def step(self, stage: str, batch: Tensor) -> Tensor:
        loss = self.loss(batch)
        values = {"mean": loss, "sum": batch.sum(), "min": batch.min(), "max": batch.max()}
        for how, value in values.items():
            self.log(f"{stage}_{how}", value, on_step=False, on_epoch=True, reduce_fx=how)
        self.log(f"{stage}_largest", batch.max(), on_step=False, on_epoch=True, reduce_fx=torch.amax)
        return loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.step("train", batch)

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.step("val", batch)


class Manual(Net):
    """Steps one optimizer, after two backward passes at every second batch."""

    automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        if batch_idx % 2:
            self.manual_backward(self.loss(batch))
        optimizer.step()


class Toggling(Net):
    """Steps two optimizers in turn, each for parameters of its own."""

    automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = self.optimizers()
        for optimizer in (first, second) if batch_idx % 2 else (first,):
            with self.toggled_optimizer(optimizer):
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([self.layer.weight], 0.1), torch.optim.SGD([self.layer.bias], 0.1)


class Watching(Net):
    """Keeps the samples of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.seen += batch[:, 0].tolist()
        return self.loss(batch)

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen += batch[:, 0].tolist()


class Backwards:
    """A sampler of the user's own."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Any:
        return iter(range(self.n - 1, -1, -1))

    def __len__(self) -> int:
        return self.n


class Half(Net):
    """Has parameters that the loss does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = torch.nn.Linear(2, 2)


class Normalized(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Sequential(torch.nn.BatchNorm1d(4), self.layer)


class Stopping(Net):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.trainer.should_stop = self.global_step == 3


class Sided(Net):
    """Each rank logs a name of its own, and one that both have."""

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("both", 1.0 + self.global_rank)
        self.log(f"only_{self.global_rank}", 5.0 + self.global_rank)


class Measuring(Net):
    """Logs a torchmetrics object."""

    def __init__(self) -> None:
        super().__init__()
        from torchmetrics import MeanMetric  # takes seconds, and every process imports this file

        self.metric = MeanMetric()

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.metric.update(batch)
        self.log("mean", self.metric)


def weights(model: torch.nn.Module) -> list[float]:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()]).tolist()


def training(folder: Path, world: int, **arguments: Any) -> list[float]:
    """The weights after two epochs; with every process the batches of all together are the same."""
    arguments = {"model": Net, **arguments, **({"strategy": "auto"} if world == 1 else {})}
    model = arguments.pop("model")()
    trainer(folder, devices=world, max_epochs=2, **arguments).fit(model, loader(28, 4 // world))
    return weights(model)


WEIGHTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 3},
    "clipping": {"gradient_clip_val": 0.05},
    "accumulation and clipping": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
    "clipping of values": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
    "manual optimization": {"model": Manual},
    "two optimizers": {"model": Toggling, "strategy": "ddp_find_unused_parameters_true"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "16-mixed": {"precision": "16-mixed", "gradient_clip_val": 0.05},
}


def run_everything(folder: Path, world: int) -> dict[str, Any]:
    """What one process finds out; ``world`` is the number of processes."""
    out: dict[str, Any] = {name: training(folder, world, **arguments) for name, arguments in WEIGHTS.items()}

    # 13 samples: the ranks have 4 and 3 batches, the last ones of 1 and 2 samples
    model, run = Logging(), trainer(folder, devices=world)
    run.fit(model, loader(28, 4 // world), loader(13, 2))
    out["metrics"] = {name: value.item() for name, value in run.callback_metrics.items()}
    out["validate"] = run.validate(model, [loader(13, 2), loader(1, 2)], verbose=False)

    model = Watching()
    trainer(folder, devices=world).fit(model, DataLoader(Samples(8), 4 // world, sampler=Backwards(8)))
    out["own sampler"] = model.seen
    model = Watching()
    trainer(folder, devices=world, max_epochs=2).fit(model, DataLoader(Samples(8), 4 // world, shuffle=True))
    out["shuffled"] = model.seen
    model = Watching()
    trainer(folder, devices=world).validate(model, DataLoader(Samples(7), 2, shuffle=True), verbose=False)
    out["evaluated"] = model.seen

    run = trainer(folder, devices=world, max_epochs=9)
    run.fit(Stopping(), loader(28, 4 // world))
    out["stopped"] = [run.global_step, run.current_epoch]

    callback = ModelCheckpoint(folder / f"checkpoints_{world}", monitor="val_mean")
    arguments: dict[str, Any] = {"devices": world, "callbacks": callback, "enable_checkpointing": True}
    run = trainer(folder, max_epochs=2, **arguments)
    run.fit(Logging(), loader(28, 4 // world), loader(13, 2))
    out["best"] = [os.path.basename(callback.best_model_path), float(callback.best_model_score)]
    model = Logging()
    run = trainer(
        folder,
        max_epochs=3,
        **{**arguments, "callbacks": ModelCheckpoint(folder / f"checkpoints_{world}", monitor="val_mean")},
    )
    run.fit(model, loader(28, 4 // world), loader(13, 2), ckpt_path=callback.best_model_path)
    out["resumed"] = [*weights(model), run.global_step]
    found = run.predict(model, loader(13, 2), ckpt_path="best")
    out["predicted"] = torch.cat(found)[:, 0].tolist()
    streamed = run.predict(model, loader(13, 2), return_predictions="stream")
    out["streamed"] = torch.cat(list(streamed))[:, 0].tolist()
    return out


def run_what_needs_two(folder: Path) -> dict[str, Any]:
    """What only makes sense with several processes."""
    out: dict[str, Any] = {}

    def fails(model: L.LightningModule, **arguments: Any) -> list[str]:
        try:
            trainer(folder, devices=WORLD, **arguments).fit(model, loader(8, 2))
        except Exception as error:
            return [type(error).__name__, str(error)]
        return []

    out["unused"] = fails(Half(), max_steps=1)  # torch itself would notice at the second step
    model = Half()
    trainer(folder, devices=WORLD, strategy="ddp_find_unused_parameters_true").fit(model, loader(8, 2))
    out["allowed"] = weights(model.layer)
    out["batch norm"] = fails(Normalized(), sync_batchnorm=True)
    out["no batch norm"] = fails(Net(), sync_batchnorm=True)
    out["one-sided"] = trainer(folder, devices=WORLD).validate(Sided(), loader(8, 2), verbose=False)
    out["metric"] = [trainer(folder, devices=WORLD).validate(Measuring(), loader(n), verbose=False) for n in (5, 1)]
    return out


def start(folder: Path, source: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    (folder / "script.py").write_text(source)
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "TREADLE"))}
    environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.Popen(
        [sys.executable, "script.py", str(folder)],
        cwd=folder,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_rank(folder: Path) -> None:
    """Write down what a rank finds out."""
    out = {**run_everything(folder, 2), **run_what_needs_two(folder)}
    (folder / f"out{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(out))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    """What each of two ranks found out, and what they said."""
    folder = tmp_path_factory.mktemp("ddp")
    said = run_in_ranks(run_rank, folder)
    return [json.loads((folder / f"out{rank}.json").read_text()) for rank in range(WORLD)], said


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process finds out with the whole batches."""
    return run_everything(tmp_path_factory.mktemp("alone"), 1)


Ranks = tuple[list[dict[str, Any]], str]


@pytest.mark.parametrize("how", WEIGHTS)
def test_weights_are_those_of_one_process_with_the_whole_batch(ranks: Ranks, alone: dict[str, Any], how: str) -> None:
    zero, one = (found[how] for found in ranks[0])
    assert zero == one
    assert zero == pytest.approx(alone[how], rel=1e-2 if "16" in how else 1e-6)
    assert zero != pytest.approx(weights(Net()), rel=1e-2)


def test_epoch_metrics_are_those_of_one_process_without_sync_dist(ranks: Ranks, alone: dict[str, Any]) -> None:
    for found in ranks[0]:
        assert found["metrics"] == pytest.approx(alone["metrics"], rel=1e-6)
        assert found["metrics"]["val_sum"] == 4 * sum(range(13))
        assert found["metrics"]["train_sum"] == 4 * sum(range(28))


def test_evaluation_counts_every_sample_once(ranks: Ranks, alone: dict[str, Any]) -> None:
    for found in ranks[0]:
        assert found["validate"][0] == pytest.approx(alone["validate"][0], rel=1e-6)
        # rank 1 has no sample of the second loader, and cannot know what the callable makes of rank 0's
        theirs = dict(alone["validate"][1])
        if found is ranks[0][1]:
            del theirs["val_largest/dataloader_idx_1"]
        assert found["validate"][1] == pytest.approx(theirs, rel=1e-6)
    assert sorted(ranks[0][0]["evaluated"] + ranks[0][1]["evaluated"]) == list(range(7))


def test_the_order_of_samples_is_the_samplers(ranks: Ranks, alone: dict[str, Any]) -> None:
    zero, one = (found["own sampler"] for found in ranks[0])
    assert (zero, one) == ([7, 5, 3, 1], [6, 4, 2, 0])
    assert alone["own sampler"] == [7, 6, 5, 4, 3, 2, 1, 0]
    zero, one = (found["shuffled"] for found in ranks[0])
    first, second = zero[:4] + one[:4], zero[4:] + one[4:]
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second


def test_ranks_stop_and_save_alike(ranks: Ranks, alone: dict[str, Any]) -> None:
    for found in ranks[0]:
        assert found["stopped"] == alone["stopped"] == [3, 1]
        assert found["best"][0] == alone["best"][0]
        assert found["best"][1] == pytest.approx(alone["best"][1])
        assert found["resumed"] == pytest.approx(alone["resumed"], rel=1e-6)


def test_ranks_predict_the_whole_in_order(ranks: Ranks, alone: dict[str, Any]) -> None:
    for found in ranks[0]:
        assert found["predicted"] == pytest.approx(alone["predicted"], rel=1e-6)
        assert found["streamed"] == found["predicted"]


def test_unused_parameters_are_named_unless_they_are_allowed(ranks: Ranks) -> None:
    for rank, found in enumerate(ranks[0]):
        kind, message = found["unused"]
        assert kind == UnusedParametersError.__name__
        assert "idle.weight, idle.bias" in message
        assert f"rank {rank}" in message
        assert "ddp_find_unused_parameters_true" in message
        assert found["allowed"] != pytest.approx(weights(Net()))
    assert ranks[0][0]["allowed"] == ranks[0][1]["allowed"]


def test_sync_batchnorm_is_refused_on_the_cpu_where_there_is_something_to_synchronize(ranks: Ranks) -> None:
    for found in ranks[0]:
        kind, message = found["batch norm"]
        assert kind == MisconfigurationException.__name__
        assert "'layer.0'" in message
        assert found["no batch norm"] == []


def test_a_name_that_one_rank_logs_is_reduced_over_it_with_a_warning(ranks: Ranks) -> None:
    for found in ranks[0]:
        assert found["one-sided"] == [{"both": 1.5, "only_0": 5.0, "only_1": 6.0}]
    for name, rank in (("only_0", 1), ("only_1", 0)):
        assert ranks[1].count(f"'{name} in validation_step' was not logged on rank {rank}") == 1


def test_a_metric_object_is_reduced_also_with_a_rank_without_samples(ranks: Ranks) -> None:
    for found in ranks[0]:
        assert found["metric"] == [[{"mean": 2.0}], [{"mean": 0.0}]]


# --------------------------------------------------------------------------------- processes started by a function


def launched(folder: Path, strategy: str, devices: int) -> dict[str, Any]:
    """A fit in processes of their own, and a validation; what the process that waited has then."""
    callback = ModelCheckpoint(folder / strategy, monitor="val_mean")
    arguments: dict[str, Any] = {"callbacks": callback, "enable_checkpointing": True, "max_epochs": 2}
    run = trainer(folder, devices=devices, strategy=strategy, **arguments)
    model = Logging()
    run.fit(model, loader(28, 4 // devices), loader(13, 2))
    out: dict[str, Any] = {
        "weights": weights(model),
        "metrics": {name: value.item() for name, value in run.callback_metrics.items()},
        "progress": [run.global_step, run.current_epoch],
        "best": [callback.best_model_path == str(folder / strategy / "epoch=1-step=14.ckpt")],
        "score": float(callback.best_model_score),
    }
    assert run.state.status == "finished"
    if strategy != "ddp_spawn":  # processes that import everything anew take long
        out["validated"] = run.validate(model, loader(13, 2), ckpt_path="best", verbose=False)
    return out


@pytest.mark.faults  # takes long
def test_spawned_and_forked_processes_send_back_what_they_did(tmp_path: Path) -> None:
    found = {strategy: launched(tmp_path, strategy, 2) for strategy in ("ddp_spawn", "ddp_fork")}
    assert "RANK" not in os.environ and "LOCAL_RANK" not in os.environ
    expected = launched(tmp_path, "auto", 1)
    expected["best"] = [True]
    for strategy in ("ddp_spawn", "ddp_fork"):
        for name, value in found[strategy].items():
            if name == "validated":
                assert value[0] == pytest.approx(expected[name][0], rel=1e-6)
            else:
                assert value == pytest.approx(expected[name], rel=1e-6), (strategy, name)


# --------------------------------------------------------------------------------- one fails, all end

FAILING = """
import os, sys, time
from pathlib import Path
import torch
from tests.trainer.models import Net, Samples, trainer
from torch.utils.data import DataLoader

folder, where = Path(sys.argv[1]), Path(sys.argv[1]).name
rank = int(os.environ.get("LOCAL_RANK", "0"))
(folder / f"pid{rank}").write_text(str(os.getpid()))


def fail():
    (folder / "failed").touch()
    raise RuntimeError("broken on purpose")


class Failing(Net):
    def training_step(self, batch, batch_idx):
        if where == "fit" and self.global_rank == 1 and batch_idx == 2:
            fail()
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        if where == "validation" and self.global_rank == 0 and batch_idx == 1:
            fail()
        super().validation_step(batch, batch_idx)


trainer(folder, devices=2, num_sanity_val_steps=0).fit(
    Failing(), DataLoader(Samples(16), 2), DataLoader(Samples(16), 2)
)
(folder / "finished").touch()
"""


class Lopsided(Net):
    """One rank logs with callables, the other does not."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if self.global_rank == 1:
            self.log("median", batch.mean(), on_step=False, on_epoch=True, reduce_fx=torch.median)
            self.log("largest", batch.max(), on_step=False, on_epoch=True, reduce_fx=torch.amax)
        return self.loss(batch)

    def on_train_end(self) -> None:
        if self.global_rank == 1:
            torch.save(dict(self.trainer.callback_metrics), "logged.pt")


@pytest.mark.filterwarnings("ignore:.*was not logged on rank")
def test_a_save_in_mid_epoch_does_not_wait_for_names_that_one_rank_lacks(tmp_path: Path) -> None:
    def fit(**kwargs: Any) -> dict[str, Any]:
        saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
        run = trainer(tmp_path, strategy="ddp_fork", devices=2, enable_checkpointing=True, callbacks=saving)
        run.fit(Lopsided(), loader(16, 2), **kwargs)
        return torch.load("logged.pt")

    whole = fit()
    assert whole.keys() == {"median", "largest"}
    resumed = fit(ckpt_path=tmp_path / "step=3.ckpt")
    assert resumed == whole


def test_a_rank_that_raises_ends_all_with_its_traceback(tmp_path: Path) -> None:
    processes = {where: start(tmp_path / where, FAILING) for where in ("fit", "validation")}
    for where, process in processes.items():
        folder = tmp_path / where
        wait_until((folder / "failed").exists, timeout=90)
        stdout, stderr = process.communicate(timeout=10)
        assert process.returncode == 1, stdout + stderr
        assert stderr.count("RuntimeError: broken on purpose") == 1, stderr
        failing = 0 if where == "validation" else 1
        assert f"rank {failing} failed:" in stderr
        assert f"rank {1 - failing} stopped because rank {failing} failed" in stderr
        assert not (folder / "finished").exists()
        for rank in range(WORLD):
            assert not psutil.pid_exists(int((folder / f"pid{rank}").read_text())), "an orphan"


def test_a_rank_whose_loader_raises_ends_all_with_its_traceback(tmp_path: Path) -> None:
    class Bad(Samples):
        def __getitem__(self, index: int) -> Tensor:
            if index == 9 and os.environ["LOCAL_RANK"] == "1":
                raise RuntimeError("broken on purpose")
            return super().__getitem__(index)

    with pytest.raises(ProcessFailedError, match=r"rank 1 failed:[\s\S]*RuntimeError: broken on purpose"):
        trainer(tmp_path, strategy="ddp_fork", devices=2).fit(Net(), DataLoader(Bad(16), 2, num_workers=0))
