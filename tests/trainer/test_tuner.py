"""The tuner: a search finds what it is to find, and leaves everything else as it was, to the last bit.

Tests of ``treadle.tuner``, ``treadle.trainer.trials``, ``treadle.searches.snapshot``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import treadle as L
from tests.processes import run_in_ranks
from tests.trainer.searches.models import Random, Stateful, files, held, trainer
from treadle.callbacks import BatchSizeFinder, Callback, LearningRateFinder
from treadle.searches.snapshot import Snapshot
from treadle.trainer import trials
from treadle.tuner import Tuner
from treadle_fabric import MisconfigurationException
from treadle_fabric.loggers import CSVLogger

Search = Callable[[Tuner, L.LightningModule], Any]


def fitted(search: Search | None, folder: str, **settings: Any) -> tuple[dict[str, Any], str]:
    """All that a fit leaves, and the rows that it logs, after a search."""
    L.seed_everything(7, verbose=False)
    module = Stateful()
    made = trainer(logger=CSVLogger(folder, name=""), log_every_n_steps=1, enable_checkpointing=True, **settings)
    if search is not None:
        before, rng, written = held(module), Random(), files()
        parts = {name: module.get_submodule(name) for name, _ in module.named_modules()}
        weights = dict(module.named_parameters())
        of_trainer = {name: vars(value) if name == "_runner" else value for name, value in vars(made).items()}
        of_trainer = {name: dict(value) if isinstance(value, dict) else value for name, value in of_trainer.items()}
        callbacks = [dict(vars(callback)) for callback in made.callbacks]
        search(Tuner(made), module)
        assert held(module) == before and rng.is_unchanged() and files() == written
        assert all(part is module.get_submodule(name) for name, part in parts.items())
        assert all(weight is module.get_parameter(name) for name, weight in weights.items())
        assert {n: vars(v) if n == "_runner" else v for n, v in vars(made).items()} == of_trainer
        assert [vars(callback) for callback in made.callbacks] == callbacks
        assert module._trainer is None
    made.fit(module)
    rng_after = torch.rand(3).tolist()
    rows = next(Path(folder).rglob("metrics.csv")).read_text()
    optimizer = made.optimizers[0].state_dict()
    state = [v.tolist() for each in optimizer["state"].values() for v in each.values()]
    groups = [{name: value for name, value in group.items()} for group in optimizer["param_groups"]]
    module.__dict__.pop("_trainer"), module.__dict__.pop("_fabric")
    weights_after = {name: each.tolist() for name, each in module.state_dict().items()}
    plain = (module.calls, [each.item() for each in module.losses], module.nested, module.mean.tolist())
    return {"w": weights_after, "p": plain, "o": (state, groups), "rng": rng_after, "step": made.global_step}, rows


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    return fitted(None, str(tmp_path_factory.mktemp("untouched")), default_root_dir=tmp_path_factory.mktemp("root"))


def raising(error: BaseException, call: int) -> Callable[[int, int], BaseException | None]:
    return lambda size, calls: error if calls >= call else None


def fails(search: Search, error: type[BaseException], message: str | None, fault: Any) -> Search:
    def failing(tuner: Tuner, module: L.LightningModule) -> None:
        Stateful.error = staticmethod(fault)
        try:
            with pytest.raises(error, match=message):
                search(tuner, module)
        finally:
            Stateful.error = None

    return failing


def lr_find(tuner: Tuner, module: L.LightningModule) -> None:
    found = tuner.lr_find(module, num_training=15, update_attr=False, early_stop_threshold=None)
    assert len(found.results["lr"]) == 15


def scale(method: str = "fit", mode: str = "power") -> Search:
    def search(tuner: Tuner, module: Any) -> None:
        Stateful.error = staticmethod(lambda size, calls: torch.OutOfMemoryError("full") if size > 9 else None)
        try:
            assert tuner.scale_batch_size(module, method=method, mode=mode, margin=0) == (8 if mode == "power" else 9)
        finally:
            Stateful.error = None
        assert module.batch_size == module.hparams.batch_size
        module.batch_size = module.hparams.batch_size = 4

    return search


SEARCHES: dict[str, Search] = {
    "lr_find": lr_find,
    "an error": fails(lr_find, ValueError, "mine", raising(ValueError("mine"), 6)),
    "Ctrl-C": fails(lr_find, KeyboardInterrupt, None, raising(KeyboardInterrupt(), 6)),
    "out of memory": fails(lr_find, RuntimeError, "out of memory", raising(RuntimeError("MPS out of memory"), 6)),
    "batch size": scale(),
    "binsearch": scale(mode="binsearch"),
    "validate": scale("validate"),
    "predict": scale("predict"),
    "Ctrl-C in a batch-size trial": fails(
        lambda tuner, module: tuner.scale_batch_size(module), KeyboardInterrupt, None,
        lambda size, calls: KeyboardInterrupt() if size == 8 and calls == 2 else None,
    ),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_after_a_search_a_fit_is_that_of_an_untouched_trainer(
    untouched: tuple[dict[str, Any], str], name: str, tmp_path: Path
) -> None:
    found, rows = fitted(SEARCHES[name], str(tmp_path / "logs"), default_root_dir=tmp_path)
    assert found == untouched[0]
    assert rows == untouched[1]


class AtMilestones(LearningRateFinder):
    def __init__(self, milestones: tuple[int, ...], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.milestones = milestones

    def on_fit_start(self, *args: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch in self.milestones:
            self.lr_find(trainer, pl_module)


@pytest.mark.parametrize("milestones", [None, (0, 1)])
def test_inside_a_fit_a_search_changes_nothing_but_what_it_sets(
    untouched: tuple[dict[str, Any], str], milestones: tuple[int, ...] | None, tmp_path: Path
) -> None:
    options = {"num_training_steps": 15, "update_attr": False, "early_stop_threshold": None}
    finder = LearningRateFinder(**options) if milestones is None else AtMilestones(milestones, **options)
    found, rows = fitted(None, str(tmp_path / "logs"), default_root_dir=tmp_path, callbacks=[finder])
    assert len(finder.optimal_lr.results["loss"]) == 15
    assert found == untouched[0]
    assert rows == untouched[1]
