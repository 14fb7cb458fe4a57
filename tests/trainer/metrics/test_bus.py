"""``self.log``: what loggers, callbacks, the progress bar and the caller get from it, and where it is refused.

Tests of ``treadle.metrics.bus``, ``treadle.metrics.slot``, ``treadle.metrics.options``, ``treadle.metrics.values``,
``treadle.metrics.sinks``, ``treadle.metrics.latest``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.trainer.models import Net, loader, trainer
from torch import Tensor
from torchmetrics import MaxMetric, MeanMetric, Metric, MetricCollection, SumMetric

import treadle as L
from treadle.callbacks import ModelCheckpoint
from treadle_fabric.loggers import Logger


class Rows(Logger):
    """Keeps what it is given: (step, metrics)."""

    name, version, experiment = "rows", 0, None
    root_dir = log_dir = None

    def __init__(self) -> None:
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass


class Silent(Net):
    """Logs what its ``train`` and ``evaluate`` attributes log."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.train_logs(batch, batch_idx)
        return self.layer.weight.sum()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.eval_logs(batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.eval_logs(batch, batch_idx, dataloader_idx)

    def train_logs(self, batch: Any, i: int) -> None:
        """In ``training_step``."""

    def eval_logs(self, batch: Any, i: int, dataloader_idx: int) -> None:
        """In ``validation_step`` and ``test_step``."""


def net(**methods: Callable[..., Any]) -> Any:
    """A silent module with ``methods`` of its own."""
    return type("Logging", (Silent,), methods)()


class Seen(L.Callback):
    """What callbacks, loggers and the bar could see, at the end of batches, epochs and training."""

    def __init__(self) -> None:
        self.at: list[tuple[str, dict[str, float], dict[str, float], dict[str, float]]] = []

    def see(self, hook: str, trainer: L.Trainer) -> None:
        views = (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics)
        floats = [{k: round(torch.as_tensor(v).item(), 4) for k, v in view.items()} for view in views]
        self.at.append((hook, *floats))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.see(f"batch {batch_idx}", trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.see("epoch", trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.see("train", trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.see("sanity" if trainer.sanity_checking else "validation", trainer)


@dataclass
class Outcome:
    trainer: L.Trainer
    rows: list[tuple[int | None, dict[str, float]]]
    seen: list[tuple[str, dict[str, float], dict[str, float], dict[str, float]]]

    def final(self, view: str = "callback") -> dict[str, float]:
        return {k: float(v) for k, v in getattr(self.trainer, f"{view}_metrics").items()}


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., Outcome]:
    """Fits a module over ``n`` batches of one sample, with a logger that keeps its rows."""

    def fit(module: L.LightningModule, n: int = 5, val: Any = None, batches: Any = None, **kwargs: Any) -> Outcome:
        logger, seen = Rows(), Seen()
        callbacks = [seen, *kwargs.pop("callbacks", [])]
        options = {"logger": logger, "callbacks": callbacks, "log_every_n_steps": 2, **kwargs}
        if val is None:
            options.setdefault("limit_val_batches", 0)
        fitting = trainer(tmp_path, **options)
        fitting.fit(module, loader(n, 1) if batches is None else batches, loader(1, 1) if val is None else val)
        return Outcome(fitting, logger.rows, seen.at)

    return fit


@pytest.fixture
def evaluate(tmp_path: Path) -> Callable[..., tuple[list[dict[str, float]], Outcome]]:
    """Validates (or tests) a module and gives the result too."""

    def evaluate(module: L.LightningModule, loaders: Any, stage: str = "validate") -> Any:
        logger, seen = Rows(), Seen()
        running = trainer(tmp_path, logger=logger, callbacks=[seen])
        result = getattr(running, stage)(module, loaders, verbose=False)
        return result, Outcome(running, logger.rows, seen.at)

    return evaluate


# ------------------------------------------------------------------------------------------------ names and times


def many(self: Any, batch: Any, i: int) -> None:
    value = torch.tensor(i + 10.0 * self.current_epoch)
    self.log("default", value)
    self.log("st", value, prog_bar=True, on_step=True)
    self.log("both", value, prog_bar=True, on_step=True, on_epoch=True)
    self.log("epoch_only", value, on_step=False, on_epoch=True)
    self.log("nologger", value, logger=False)


def test_what_everybody_sees_in_the_middle_and_at_the_end(fit: Any) -> None:
    out = fit(net(train_logs=many), max_epochs=2)
    earlier: dict[str, float] = {}
    for epoch in range(2):
        rest = {k: v for k, v in earlier.items() if k in ("both_epoch", "epoch_only")}
        for i in range(5):
            v = i + 10.0 * epoch
            hook, callback, logged, bar = out.seen[6 * epoch + i]
            assert hook == f"batch {i}"
            assert callback == {"default": v, "st": v, "both": v, "both_step": v, "nologger": v, **rest}
            assert logged == {"default": v, "st": v, "both_step": v, **rest}
            assert bar == {"st": v, "both_step": v, **{k: x for k, x in rest.items() if k == "both_epoch"}}
        mean = 2.0 + 10 * epoch
        hook, callback, logged, bar = out.seen[6 * epoch + 5]
        assert hook == "epoch"
        earlier = {"default": v, "st": v, "both": mean, "both_step": v, "nologger": v}
        earlier |= {"both_epoch": mean, "epoch_only": mean}
        assert callback == earlier
        assert logged == {k: x for k, x in earlier.items() if k not in ("both", "nologger")}
        assert bar == {"st": v, "both_step": v, "both_epoch": mean}
    assert out.seen[-1] == ("train", callback, logged, bar)
    assert (out.final(), out.final("logged"), out.final("progress_bar")) == (callback, logged, bar)


def test_what_loggers_get(fit: Any) -> None:
    def step(v: float) -> dict[str, float]:
        return {"default": v, "st": v, "both_step": v}

    assert fit(net(train_logs=many), max_epochs=2).rows == [
        (1, {**step(1), "epoch": 0}),
        (3, {**step(3), "epoch": 0}),
        (4, {"both_epoch": 2, "epoch_only": 2, "epoch": 0}),
        (5, {**step(10), "epoch": 1}),  # steps are counted on across epochs
        (7, {**step(12), "epoch": 1}),
        (9, {**step(14), "epoch": 1}),
        (9, {"both_epoch": 12, "epoch_only": 12, "epoch": 1}),
    ]


def test_the_steps_of_loggers_are_optimizer_steps(fit: Any) -> None:
    out = fit(net(train_logs=many), max_epochs=2, accumulate_grad_batches=2)
    rows = [(step, m.get("default"), m["epoch"]) for step, m in out.rows]
    assert rows == [(1, 3, 0), (2, None, 0), (3, 11, 1), (5, 14, 1), (5, None, 1)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_log_every_n_steps_counts_on_across_epochs(fit: Any, accumulate: int) -> None:
    module = net(train_logs=lambda self, batch, i: self.log("x", float(i)))
    out = fit(module, max_epochs=3, log_every_n_steps=3, accumulate_grad_batches=accumulate)
    steps, values = [step for step, _ in out.rows], [m["x"] for _, m in out.rows]
    assert steps == ([2, 5, 8, 11, 14] if accumulate == 1 else [2, 5, 8])
    assert values == ([2, 0, 3, 1, 4] if accumulate == 1 else [4, 4, 4])


def test_manual_optimization_counts_batches_not_optimizers(fit: Any) -> None:
    class Manual(Silent):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.step()
            self.log("x", float(batch_idx))

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), 0.1) for _ in range(2)]

    assert fit(Manual()).rows == [(1, {"x": 1, "epoch": 0}), (3, {"x": 3, "epoch": 0})]


def test_a_metric_called_step_replaces_the_step(fit: Any) -> None:
    def logs(self: Any, batch: Any, i: int) -> None:
        self.log("step", i + 100.0)
        self.log("x", float(i))

    def end(self: Any) -> None:
        self.log("step", 77)
        self.log("y", 1.0)

    rows = fit(net(train_logs=logs, on_train_epoch_end=end)).rows
    assert rows == [(101, {"x": 1}), (103, {"x": 3}), (77, {"y": 1})]


def test_a_metric_called_epoch_stays_as_it_is(fit: Any) -> None:
    module = net(train_logs=lambda self, batch, i: self.log_dict({"x": i, "epoch": 33.0}))
    assert fit(module).rows == [(1, {"x": 1, "epoch": 33}), (3, {"x": 3, "epoch": 33})]


def test_log_dict_takes_the_options_of_log(fit: Any) -> None:
    def logs(self: Any, batch: Any, i: int) -> None:
        self.log_dict({"d/a": 1.0, "d/b": torch.tensor(2.0)}, prog_bar=True, on_step=True, on_epoch=True)

    out = fit(net(train_logs=logs), 2)
    assert out.rows == [
        (1, {"d/a_step": 1, "d/b_step": 2, "epoch": 0}),
        (1, {"d/a_epoch": 1, "d/b_epoch": 2, "epoch": 0}),
    ]
    assert out.final("progress_bar") == {"d/a_step": 1, "d/b_step": 2, "d/a_epoch": 1, "d/b_epoch": 2}


def test_nested_dictionaries_are_flattened(fit: Any) -> None:
    def logs(self: Any, batch: Any, i: int) -> None:
        self.log("one", {"a": 1.0, "b": {"c": torch.tensor(2.0)}})
        self.log_dict({"two": {"a": 3}, "three": 4.0})

    assert fit(net(train_logs=logs)).final() == {"one/a": 1, "one/b/c": 2, "two/a": 3, "three": 4}


# ------------------------------------------------------------------------------------------------ evaluation


def eval_logs(self: Any, batch: Any, i: int, dataloader_idx: int) -> None:
    value = torch.tensor(i + 1.0 + 10 * dataloader_idx)
    self.log("v", value, prog_bar=True)
    self.log("v_only", value, on_step=True, on_epoch=False)
    self.log("v_both", value, on_step=True, on_epoch=True)
    if dataloader_idx == 0:
        self.log("v_noidx", value, add_dataloader_idx=False)


def log_at_the_end(self: Any) -> None:
    self.log("ve", 7.0)


VAL = {"v": 1.5, "v_both_epoch": 1.5, "v_noidx": 1.5, "ve": 7.0}


def test_validation_in_fit(fit: Any) -> None:
    def train_logs(self: Any, batch: Any, i: int) -> None:
        self.log("train", float(i), on_step=True, on_epoch=True)

    def end(self: Any) -> None:
        self.log("te", 9.0)
        self.log("te_bar", 8.0, prog_bar=True)

    methods = dict(train_logs=train_logs, eval_logs=eval_logs, on_validation_epoch_end=log_at_the_end)
    out = fit(net(**methods, on_train_epoch_end=end), 5, loader(2, 1), max_epochs=2)
    assert out.seen[0] == ("sanity", VAL | {"v_both": 1.5}, VAL | {"v_only": 2, "v_both_step": 2}, {"v": 1.5})
    assert out.seen[1] == ("batch 0", {"train": 0, "train_step": 0}, {"train_step": 0}, {})  # nothing of it is left
    hook, callback, logged, bar = out.seen[6]
    assert hook == "validation"
    assert callback == {"train": 4, "train_step": 4, "v_both": 1.5, **VAL}
    assert logged == {"train_step": 4, "v_only": 2, "v_both_step": 2, **VAL}
    assert bar == {"v": 1.5}
    hook, callback, logged, bar = out.seen[7]
    assert hook == "epoch"
    assert callback == {"train": 2, "train_step": 4, "train_epoch": 2, "v_both": 1.5, **VAL}
    assert logged == {"train_step": 4, "train_epoch": 2, "v_only": 2, "v_both_step": 2, **VAL}
    assert out.final("progress_bar") == {"v": 1.5, "te_bar": 8}
    first = [
        (1, {"train_step": 1, "epoch": 0}),
        (3, {"train_step": 3, "epoch": 0}),
        (0, {"v_only": 1, "v_both_step": 1}),  # evaluation batches have a count of their own, and no epoch
        (1, {"v_only": 2, "v_both_step": 2}),
        (4, {**VAL, "epoch": 0}),
        (4, {"train_epoch": 2, "te": 9, "te_bar": 8, "epoch": 0}),
    ]
    assert out.rows[:6] == first
    assert [step for step, _ in out.rows[6:]] == [5, 7, 9, 2, 3, 9, 9]


def test_validation_in_mid_epoch(fit: Any) -> None:
    def train_logs(self: Any, batch: Any, i: int) -> None:
        self.log("t", float(i), on_step=False, on_epoch=True)

    module = net(train_logs=train_logs, eval_logs=lambda self, b, i, d: self.log("v", float(i)))
    out = fit(module, 5, loader(2, 1), val_check_interval=2)
    assert out.rows == [(1, {"v": 0.5, "epoch": 0}), (3, {"v": 0.5, "epoch": 0}), (4, {"t": 2, "epoch": 0})]


def test_several_validation_loaders(fit: Any) -> None:
    module = net(eval_logs=eval_logs, on_validation_epoch_end=log_at_the_end)
    out = fit(module, 1, [loader(2, 1), loader(2, 1)])
    epoch = {"v/dataloader_idx_0": 1.5, "v/dataloader_idx_1": 11.5, "v_noidx": 1.5, "ve": 7}
    epoch |= {"v_both_epoch/dataloader_idx_0": 1.5, "v_both_epoch/dataloader_idx_1": 11.5}
    step = {"v_only/dataloader_idx_0": 2, "v_only/dataloader_idx_1": 12}
    step |= {"v_both_step/dataloader_idx_0": 2, "v_both_step/dataloader_idx_1": 12}
    assert out.final() == {**epoch, "v_both/dataloader_idx_0": 1.5, "v_both/dataloader_idx_1": 11.5}
    assert out.final("logged") == {**epoch, **step}
    assert out.final("progress_bar") == {"v/dataloader_idx_0": 1.5, "v/dataloader_idx_1": 11.5}
    assert out.rows == [
        (0, {"v_only/dataloader_idx_0": 1, "v_both_step/dataloader_idx_0": 1}),
        (1, {"v_only/dataloader_idx_0": 2, "v_both_step/dataloader_idx_0": 2}),
        (0, {"v_only/dataloader_idx_1": 11, "v_both_step/dataloader_idx_1": 11}),
        (1, {"v_only/dataloader_idx_1": 12, "v_both_step/dataloader_idx_1": 12}),
        (0, {**epoch, "epoch": 0}),
    ]


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_results(evaluate: Any, stage: str) -> None:
    name = "validation" if stage == "validate" else stage
    module = net(eval_logs=eval_logs, **{f"on_{name}_epoch_end": log_at_the_end})
    result, out = evaluate(module, loader(2, 1), stage)
    assert result == [VAL]
    assert all(type(value) is float for value in result[0].values())
    assert out.rows == [
        (0, {"v_only": 1, "v_both_step": 1}),
        (1, {"v_only": 2, "v_both_step": 2}),
        (0, {**VAL, "epoch": 0}),
    ]
    assert out.final() == {**VAL, "v_both": 1.5}
    assert out.final("logged") == {**VAL, "v_only": 2, "v_both_step": 2}


def test_results_of_several_loaders(evaluate: Any) -> None:
    module = net(eval_logs=eval_logs, on_validation_epoch_end=log_at_the_end)
    result, _ = evaluate(module, [loader(2, 1), loader(2, 1)])
    assert result == [
        {"v/dataloader_idx_0": 1.5, "v_both_epoch/dataloader_idx_0": 1.5, "v_noidx": 1.5, "ve": 7},
        {"v/dataloader_idx_1": 11.5, "v_both_epoch/dataloader_idx_1": 11.5, "ve": 7},
    ]


def test_results_of_epoch_hooks_belong_to_every_loader(evaluate: Any) -> None:
    result, _ = evaluate(net(on_test_epoch_end=log_at_the_end), [loader(2, 1), loader(2, 1)], "test")
    assert result == [{"ve": 7}, {"ve": 7}]


def test_results_when_nothing_is_logged(evaluate: Any) -> None:
    result, out = evaluate(net(), loader(2, 1), "test")
    assert (result, out.rows, out.final()) == ([{}], [], {})


def test_the_x_axis_of_evaluation_steps_counts_batches_of_a_loader_without_length(tmp_path: Path) -> None:
    class Batches:
        def __iter__(self) -> Any:
            return iter(loader(6))

    rows = Rows()
    model = net(eval_logs=lambda self, batch, i, idx: self.log("v", float(i), on_step=True, on_epoch=False))
    run = trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0, logger=rows)
    run.fit(model, loader(4), Batches())
    assert [step for step, metrics in rows.rows if "v" in metrics] == [0, 1, 2, 3, 4, 5]


def test_evaluation_after_fit_goes_on_from_its_step(tmp_path: Path) -> None:
    logger = Rows()
    running = trainer(tmp_path, logger=logger, limit_val_batches=1, num_sanity_val_steps=0)
    module = net(eval_logs=lambda self, b, i, d: self.log("v", 1.0))
    running.fit(module, loader(3, 1), loader(1, 1))
    running.validate(module, loader(1, 1), verbose=False)
    assert logger.rows == [(2, {"v": 1, "epoch": 0}), (3, {"v": 1, "epoch": 1})]


# ------------------------------------------------------------------------------------------------ reductions


@pytest.mark.parametrize("as_tensor", [False, True])
def test_reductions(fit: Any, as_tensor: bool) -> None:
    def logs(self: Any, batch: Any, i: int) -> None:
        value = torch.tensor(i + 1.0) if as_tensor else i + 1.0
        for name in ("mean", "min", "max", "sum"):
            self.log(name, value, on_epoch=True, on_step=False, reduce_fx=name)
        self.log("torch_max", value, on_epoch=True, on_step=False, reduce_fx=torch.max)
        self.log("python_min", value, on_epoch=True, on_step=False, reduce_fx=min)
        self.log("median", value, on_epoch=True, on_step=False, reduce_fx=lambda values: values.median())
        self.log("weighted", value, on_epoch=True, on_step=True, batch_size=i + 1)
        self.log("sum_both", value, on_epoch=True, on_step=True, reduce_fx="sum", batch_size=9)

    out = fit(net(train_logs=logs))
    epoch = {"mean": 3, "min": 1, "max": 5, "sum": 15, "torch_max": 5, "python_min": 1, "median": 3}
    weighted = pytest.approx(55 / 15)
    assert out.rows[-1] == (4, {**epoch, "weighted_epoch": weighted, "sum_both_epoch": 15, "epoch": 0})
    assert out.final() == {
        **epoch,
        **{"weighted": weighted, "weighted_epoch": weighted, "weighted_step": 5},
        **{"sum_both": 15, "sum_both_epoch": 15, "sum_both_step": 5},
    }


@dataclass
class Pair:
    label: str
    x: Tensor


BATCHES: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, x[:1]),
    "dict": lambda x: {"label": "a string", "x": x},
    "nested": lambda x: [None, {"y": ("text", [x])}],
    "dataclass": lambda x: Pair("label", x),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_means_are_weighted_by_the_size_of_the_batch(fit: Any, kind: str) -> None:
    batches = [BATCHES[kind](torch.ones(n, 2)) for n in (2, 2, 1)]

    class Batches:
        def __iter__(self) -> Any:
            return iter(batches)

        def __len__(self) -> int:
            return 3

    module = net(train_logs=lambda self, batch, i: self.log("x", float(i), on_step=False, on_epoch=True))
    assert fit(module, batches=Batches()).final() == {"x": pytest.approx(4 / 5)}


def test_epoch_values_of_epoch_hooks_are_not_weighted(fit: Any) -> None:
    module = net(on_train_epoch_end=lambda self: self.log("x", 2.5), on_train_start=lambda self: self.log("y", 1.5))
    assert fit(module).final() == {"x": 2.5, "y": 1.5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, float, int])
def test_many_values_are_reduced_exactly(fit: Any, dtype: Any) -> None:
    n = 600  # more than are folded at once
    if isinstance(dtype, torch.dtype):
        values: list[Any] = list((10000 + torch.arange(n) * 0.37).to(dtype))
    else:
        values = [dtype(10000 + i * 0.37) for i in range(n)]
    exact = torch.tensor([float(v) for v in values], dtype=torch.float64)

    def logs(self: Any, batch: Any, i: int) -> None:
        for reduce in ("mean", "min", "max", "sum"):
            self.log(reduce, values[i], on_step=False, on_epoch=True, reduce_fx=reduce)

    final = fit(net(train_logs=logs), n).trainer.callback_metrics
    for name, expected in {"mean": exact.mean(), "min": exact.min(), "max": exact.max(), "sum": exact.sum()}.items():
        assert final[name].dtype == torch.float32
        assert final[name] == expected.float(), name


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *[(3, 3.0), (True, 1.0), (2.5, 2.5), (np.float32(1.5), 1.5), (np.int64(4), 4.0), (np.array(0.5), 0.5)],
        *[(torch.tensor(7), 7.0), (torch.tensor(True), 1.0), (torch.tensor([[2.0]]), 2.0)],
        *[(torch.tensor(1.5, dtype=torch.float16), 1.5), (torch.tensor(2.5, dtype=torch.float64), 2.5)],
        *[(float("inf"), float("inf")), (torch.tensor(-float("inf")), -float("inf"))],
    ],
    ids=repr,
)
def test_values_of_any_kind(fit: Any, value: Any, expected: float) -> None:
    def logs(self: Any, batch: Any, i: int) -> None:
        self.log("x", value, prog_bar=True, on_step=True, on_epoch=True)

    out = fit(net(train_logs=logs), 2)
    names = ("x_step", "x_epoch")
    assert [m[name] for (_, m), name in zip(out.rows, names, strict=True)] == [expected, expected]
    assert all(type(m[name]) is float for (_, m), name in zip(out.rows, names, strict=True))
    for name in names:
        bar = out.trainer.progress_bar_metrics[name]
        assert (bar, type(bar)) == (expected, float)
        tensor = out.trainer.callback_metrics[name]
        assert tensor == expected
        assert tensor.shape == ()
        assert isinstance(value, Tensor) or tensor.dtype == torch.float32


@pytest.mark.parametrize("order", [1, -1])
def test_tensors_and_numbers_in_one_epoch_are_written_alike(fit: Any, order: int) -> None:
    """Whichever of them comes last: a logger gets what a tensor holds."""
    values: list[Any] = [torch.tensor(0.7), 0.1][::order]
    out = fit(net(train_logs=lambda self, b, i: self.log("x", values[i], on_step=False, on_epoch=True)), 2)
    assert out.rows[-1][1]["x"] == torch.tensor(0.4).item()
    assert out.rows[-1][1]["x"] != 0.4


def test_not_a_number_stays_one(fit: Any) -> None:
    module = net(train_logs=lambda self, b, i: self.log("x", float("nan"), on_step=False, on_epoch=True))
    assert fit(module).trainer.callback_metrics["x"].isnan()


# ------------------------------------------------------------------------------------------------ torchmetrics


class WithMetrics(Silent):
    def __init__(self) -> None:
        super().__init__()
        self.forwarded, self.updated = MeanMetric(), MeanMetric()
        self.collection = MetricCollection({"sum": SumMetric(), "max": MaxMetric()}, prefix="c_")

    def train_logs(self, batch: Tensor, i: int) -> None:
        value = float(i + 1)
        self.forwarded(value)
        self.updated.update(value)
        self.collection(value)
        self.log("acc", self.forwarded, on_step=True, on_epoch=True)
        self.log("acc2", self.updated, on_step=False, on_epoch=True)
        self.log_dict(self.collection, on_step=False, on_epoch=True)


def test_torchmetrics(fit: Any) -> None:
    epoch = {"acc_epoch": 3, "acc2": 3, "c_sum": 15, "c_max": 5}
    assert fit(WithMetrics(), max_epochs=2).rows == [
        (1, {"acc_step": 2, "epoch": 0}),
        (3, {"acc_step": 4, "epoch": 0}),
        (4, {**epoch, "epoch": 0}),
        (5, {"acc_step": 1, "epoch": 1}),
        (7, {"acc_step": 3, "epoch": 1}),
        (9, {"acc_step": 5, "epoch": 1}),
        (9, {**epoch, "epoch": 1}),  # they were reset in between
    ]


def test_a_metric_collection_under_a_name(fit: Any) -> None:
    class Model(WithMetrics):
        def train_logs(self, batch: Tensor, i: int) -> None:
            self.collection(float(i))
            self.log("all", self.collection, on_step=True, on_epoch=True)

    out = fit(Model(), 2)
    assert out.rows == [
        (1, {"all/c_sum_step": 1, "all/c_max_step": 1, "epoch": 0}),
        (1, {"all/c_sum_epoch": 1, "all/c_max_epoch": 1, "epoch": 0}),
    ]


class Extremes(Metric):
    """Computes a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("low", torch.tensor(float("inf")), dist_reduce_fx="min")
        self.add_state("high", torch.tensor(-float("inf")), dist_reduce_fx="max")

    def update(self, value: float) -> None:
        self.low, self.high = self.low.clamp(max=value), self.high.clamp(min=value)

    def compute(self) -> dict[str, Tensor]:
        return {"low": self.low, "high": self.high}


def test_a_metric_that_computes_a_dictionary(fit: Any) -> None:
    class Model(Silent):
        def __init__(self) -> None:
            super().__init__()
            self.extremes = Extremes()

        def train_logs(self, batch: Tensor, i: int) -> None:
            self.extremes(float(i))
            self.log("x", self.extremes, on_step=True, on_epoch=True)

    out = fit(Model(), 2)
    assert out.rows == [
        (1, {"x/low_step": 1, "x/high_step": 1, "epoch": 0}),
        (1, {"x/low_epoch": 0, "x/high_epoch": 1, "epoch": 0}),
    ]
    assert out.final() == {
        **{"x/low": 0, "x/low_step": 1, "x/low_epoch": 0, "x/high": 1, "x/high_step": 1, "x/high_epoch": 1}
    }


def test_torchmetrics_in_validation(evaluate: Any) -> None:
    class Model(Silent):
        def __init__(self) -> None:
            super().__init__()
            self.metrics = torch.nn.ModuleList([MeanMetric(), MeanMetric()])

        def eval_logs(self, batch: Tensor, i: int, dataloader_idx: int) -> None:
            metric = self.metrics[dataloader_idx]
            metric.update(float(i + dataloader_idx))
            self.log("acc", metric)

    module = Model()
    for _ in range(2):  # the second time from the beginning again
        result, _ = evaluate(module, [loader(2, 1), loader(2, 1)])
        assert result == [{"acc/dataloader_idx_0": 0.5}, {"acc/dataloader_idx_1": 1.5}]


# ------------------------------------------------------------------------------------------------ what is kept


def test_values_stay_as_they_were_logged(fit: Any) -> None:
    def logs(self: Any, batch: Any, i: int) -> None:
        value = torch.tensor(float(i))
        self.log("x", value, on_step=True, on_epoch=True)
        value.fill_(100)

    out = fit(net(train_logs=logs))
    assert [m for _, m in out.rows] == [
        {"x_step": 1, "epoch": 0},
        {"x_step": 3, "epoch": 0},
        {"x_epoch": 2, "epoch": 0},
    ]


@pytest.mark.parametrize("enable_graph", [False, True])
def test_enable_graph_keeps_the_graph(fit: Any, enable_graph: bool) -> None:
    found = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            found.append(trainer.callback_metrics["x"].requires_grad)

    def logs(self: Any, batch: Any, i: int) -> None:
        self.log("x", self.layer.weight.sum(), enable_graph=enable_graph)

    fit(net(train_logs=logs), 1, callbacks=[Look()])
    assert found == [enable_graph]


def test_the_last_of_two_values_of_a_batch_is_the_steps_and_both_count(fit: Any) -> None:
    def logs(self: Any, batch: Any, i: int) -> None:
        for value in (1.0, 4.0):
            self.log("x", value, on_step=True, on_epoch=True)

    assert fit(net(train_logs=logs)).final() == {"x": 2.5, "x_step": 4, "x_epoch": 2.5}


def test_a_value_that_is_not_logged_again_is_not_written_again(fit: Any) -> None:
    module = net(train_logs=lambda self, batch, i: self.log("x", 5.0) if i == 0 else None)
    out = fit(module, log_every_n_steps=1)
    assert out.rows == [(0, {"x": 5, "epoch": 0})]
    assert out.final() == {"x": 5}


# ------------------------------------------------------------------------------------------------ who may log


class Logging(L.Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        pl_module.log("batch", float(batch_idx))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.log("epoch_end", 3.0)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.log("validated", 4.0)


def test_callbacks_log_through_the_module(fit: Any) -> None:
    out = fit(net(), 4, loader(1, 1), callbacks=[Logging()])
    assert out.rows == [
        (1, {"batch": 1, "epoch": 0}),
        (3, {"batch": 3, "epoch": 0}),
        (3, {"validated": 4, "epoch": 0}),
        (3, {"epoch_end": 3, "epoch": 0}),
    ]


def test_logging_after_a_checkpoint_was_saved_in_the_same_hook(fit: Any, tmp_path: Path) -> None:
    def end(self: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("x", float(batch_idx))

    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    out = fit(net(on_train_batch_end=end), 2, callbacks=[saving], enable_checkpointing=True)
    assert out.rows == [(1, {"x": 1, "epoch": 0})]


def test_children_log_through_the_module(fit: Any) -> None:
    class Child(L.LightningModule):
        def forward(self, i: int) -> None:
            self.log("child", float(i))

    module = net(train_logs=lambda self, batch, i: self.child(i))
    module.child = Child()
    assert fit(module).final() == {"child": 4}


def test_outside_a_trainer_a_value_is_dropped_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"`self.log\('x', ...\)` without a Trainer"):
        Net().log("x", 1.0)


def test_in_a_hand_written_loop_values_go_to_the_fabric() -> None:
    logger = Rows()
    fabric = L.Fabric(accelerator="cpu", devices=1, loggers=logger)
    module = Net()
    fabric.setup(module)
    module.log("x", torch.tensor(2.0))
    module.log_dict({"y": {"z": 3.0}})
    module.log("hidden", 1.0, logger=False)
    assert [m for _, m in logger.rows] == [{"x": 2}, {"y/z": 3}]


# ------------------------------------------------------------------------------------------------ where it is refused

STEP = """on_train_batch_start on_train_batch_end on_before_zero_grad on_before_backward on_after_backward
    on_before_optimizer_step""".split()
EVAL_STEP = [f"on_{stage}_batch_{end}" for stage in ("validation", "test") for end in ("start", "end")]
EPOCH = "on_train_start on_train_epoch_start on_train_epoch_end".split()
EPOCH += [f"on_{stage}_{end}" for stage in ("validation", "test") for end in ("start", "epoch_start", "epoch_end")]
REFUSED = """on_fit_start on_fit_end on_train_end on_validation_end on_test_end on_save_checkpoint on_load_checkpoint
    setup teardown""".split()
PREDICT = [f"on_predict_{point}" for point in "start end epoch_start epoch_end batch_start batch_end".split()]
MODULE_STEP = "optimizer_step optimizer_zero_grad backward configure_gradient_clipping".split()
MODULE_REFUSED = """prepare_data configure_model configure_optimizers configure_callbacks train_dataloader
    val_dataloader on_before_batch_transfer transfer_batch_to_device on_after_batch_transfer
    on_validation_model_zero_grad
    on_validation_model_eval on_validation_model_train on_test_model_eval on_test_model_train""".split()


def run(tmp_path: Path, owner: str, hook: str, log: Callable[[Any], None]) -> None:
    """Test, predict, or fit, save and validate with ``log(module)`` at the end of a hook of "module" or "callback"."""
    base: type = Net if owner == "module" else L.Callback
    original = getattr(base, hook)

    def method(self: Any, *args: Any) -> Any:
        result = original(self, *args) if "dataloader" not in hook else loader(1, 1)
        log(self if owner == "module" else args[1])
        return result

    changed = type("Changed", (base,), {hook: method})()
    module = changed if owner == "module" else Net()
    callbacks: list[Any] = [ModelCheckpoint(tmp_path, "a"), *([changed] if owner == "callback" else [])]
    running = trainer(tmp_path, callbacks=callbacks, enable_checkpointing=True)
    for stage in ("test", "predict"):
        if stage in hook:
            getattr(running, stage)(module, loader(1, 1))
            return
    loaders = [None if hook == f"{stage}_dataloader" else loader(1, 1) for stage in ("train", "val")]
    running.fit(module, *loaders)
    running.validate(module, loader(1, 1), ckpt_path=tmp_path / "a.ckpt", verbose=False)


def both(*hooks: list[str]) -> list[tuple[str, str]]:
    return [(owner, hook) for owner in ("module", "callback") for group in hooks for hook in group]


SANITY = [("callback", "on_sanity_check_start"), ("callback", "on_sanity_check_end")]


@pytest.mark.parametrize(
    ("owner", "hook"),
    [*both(REFUSED, PREDICT), *SANITY, *[("module", hook) for hook in [*MODULE_REFUSED, "predict_step"]]],
)
def test_refused_hooks_are_named(tmp_path: Path, owner: str, hook: str) -> None:
    with pytest.raises(L.MisconfigurationException, match=rf"`self\.log\('x', \.\.\.\)` was called in `{hook}`"):
        run(tmp_path, owner, hook, lambda module: module.log("x", 1.0))


@pytest.mark.parametrize(("owner", "hook"), [*both(STEP, EVAL_STEP), *[("module", hook) for hook in MODULE_STEP]])
def test_hooks_of_steps_take_every_option(tmp_path: Path, owner: str, hook: str) -> None:
    training = not any(stage in hook for stage in ("validation", "test"))
    seen: list[dict[str, float]] = []

    def log(module: Any) -> None:
        module.log("default", 1.0)
        for on_step in (True, False):
            for on_epoch in (True, False):
                if on_step or on_epoch:
                    module.log(f"{int(on_step)}{int(on_epoch)}", 1.0, on_step=on_step, on_epoch=on_epoch)
        seen.append({k: v for k, v in module.trainer.logged_metrics.items() if k == "default"})

    run(tmp_path, owner, hook, log)
    assert bool(seen[0]) is training  # a step value shows at once, an epoch value only at its end


@pytest.mark.parametrize(("owner", "hook"), both(EPOCH))
def test_hooks_of_epochs_take_epoch_values(tmp_path: Path, owner: str, hook: str) -> None:
    calls: list[None] = []

    def log(module: Any) -> None:
        module.log("x", 1.0)
        module.log("y", 1.0, on_step=False, on_epoch=True)
        calls.append(None)
        with pytest.raises(L.MisconfigurationException, match=rf"on_step=True\)` was called in `{hook}`"):
            module.log("z", 1.0, on_step=True)

    run(tmp_path, owner, hook, log)
    assert calls


def raises(fit: Any, log: Callable[[Any], None], match: str) -> None:
    with pytest.raises(L.MisconfigurationException, match=match):
        fit(net(train_logs=lambda self, batch, i: log(self)))


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (torch.ones(3), r"tensor of shape \(3,\)"),
        (torch.ones(0), r"tensor of shape \(0,\)"),
        ("high", "got str"),
        ("1.5", "got str"),
        (None, "got NoneType"),
        ([1.0], "got list"),
        (np.ones(2), "got ndarray"),
        ({"a": {"b": "text"}}, "`self.log\\('x/a/b', ...\\)` got str"),
    ],
    ids=repr,
)
def test_refused_values(fit: Any, value: Any, match: str) -> None:
    raises(fit, lambda module: module.log("x", value), match)


REFUSED_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "neither": ({"on_step": False, "on_epoch": False}, "logs nothing"),
    "reduction": ({"reduce_fx": "median"}, "'median'"),
    "loader": ({"name": "x/dataloader_idx_0"}, "x/dataloader_idx_0.*add_dataloader_idx"),
    "name": ({"name": 3}, "name 3"),
}


@pytest.mark.parametrize("case", REFUSED_OPTIONS)
def test_refused_options(fit: Any, case: str) -> None:
    options, match = REFUSED_OPTIONS[case]
    raises(fit, lambda module: module.log(**{"name": "x", "value": 1.0, **options}), match)


def test_log_dict_refuses_a_number(fit: Any) -> None:
    raises(fit, lambda module: module.log_dict(1.0), "log_dict got float")


def test_other_options_the_second_time_are_refused(fit: Any) -> None:
    def log(module: Any) -> None:
        module.log("x", 1.0)
        module.log("x", 1.0, prog_bar=True)

    raises(fit, log, "'x'.*twice in `training_step` with different options")


@pytest.mark.filterwarnings("ignore:Casting complex values")
def test_of_complex_numbers_the_real_part_counts(tmp_path: Path) -> None:
    class Complex(Net):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("z", torch.tensor(2 + 1j))

    assert trainer(tmp_path).validate(Complex(), loader(4)) == [{"z": 2.0}]


@pytest.mark.parametrize("samples", [4, 5])
def test_values_with_a_graph_are_weighted_by_samples_too(tmp_path: Path, samples: int) -> None:
    class Graphs(Silent):
        def train_logs(self, batch: Any, i: int) -> None:
            value = batch[:, 0].mean() + 0 * self.layer.weight.sum()  # requires a gradient, so it is not read at once
            self.log("mean", value, on_step=False, on_epoch=True, enable_graph=True)

    run = trainer(tmp_path)
    run.fit(Graphs(), loader(samples))
    assert run.callback_metrics["mean"].item() == pytest.approx((samples - 1) / 2)


class SavesOften(L.Callback):
    """Saves at the end of batches and epochs, and keeps the states of the values that were logged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.states: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.save(trainer, f"{trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.save(trainer, f"end of {trainer.current_epoch}.ckpt")

    def save(self, trainer: L.Trainer, name: str) -> None:
        trainer.save_checkpoint(self.folder / name)
        self.states[name] = [rank["results"] for rank in torch.load(self.folder / name)["treadle"]["ranks"]]


def test_a_later_checkpoint_does_not_tell_that_the_run_was_resumed(tmp_path: Path) -> None:
    whole, resumed = SavesOften(tmp_path / "whole"), SavesOften(tmp_path / "resumed")
    trainer(tmp_path, callbacks=[whole], max_epochs=2).fit(Net(), loader())
    trainer(tmp_path, callbacks=[resumed], max_epochs=2).fit(Net(), loader(), ckpt_path=whole.folder / "2.ckpt")
    assert list(whole.states)[2:] == list(resumed.states)
    assert resumed.states == {name: whole.states[name] for name in resumed.states}


def test_a_resumed_epoch_keeps_the_precision_of_its_values(tmp_path: Path) -> None:
    class Kinds(Silent):
        def train_logs(self, batch: Any, i: int) -> None:
            third = torch.tensor(1 / 3, dtype=torch.float32 if i else torch.float64)
            for _ in range(1 if i else 256):  # as many as are summed at once
                self.log("mean", third, on_step=False, on_epoch=True)

    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if not batch_idx:
                trainer.save_checkpoint(tmp_path / "mid.ckpt")

    whole, resumed = trainer(tmp_path, callbacks=[Saves()]), trainer(tmp_path)
    whole.fit(Kinds(), loader(4))
    resumed.fit(Kinds(), loader(4), ckpt_path=tmp_path / "mid.ckpt")
    assert resumed.callback_metrics["mean"].dtype == torch.float64
    assert resumed.callback_metrics["mean"] == whole.callback_metrics["mean"]
