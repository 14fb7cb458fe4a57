"""Checkpoints: what they hold, what comes back from them, and that they travel between this library and Lightning.

Tests of ``treadle.checkpoint.content``, ``treadle.checkpoint.restore``, ``treadle.checkpoint.exact``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.models import Net, loader, trainer
from torch import Tensor

import treadle as L
from treadle.callbacks import EarlyStopping, ModelCheckpoint
from treadle_fabric import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointUnsafeError,
)

# these tests resume into other folders on purpose
pytestmark = pytest.mark.filterwarnings(
    "ignore:(The dirpath has changed|Checkpoint directory .* is not empty):UserWarning"
)

LIGHTNING = Path(__file__).parent.parent / "data" / "lightning-2.6.6.ckpt"
"""Saved by Lightning 2.6.6 after one epoch of `Resumable` on `loader(10)`, validated on `loader(4)`."""
# what Lightning's own weights were one epoch after that file
RESUMED_BY_LIGHTNING = {
    "layer.weight": [[0.03680368512868881] * 4] * 2,
    "layer.bias": [0.02782386913895607] * 2,
}


class Resumable(Net):
    """With an optimizer and a scheduler that have state."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__(lr)
        self.save_hyperparameters()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), self.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def fit(path: Path, epochs: int, ckpt_path: Any = None, **kwargs: Any) -> tuple[Resumable, L.Trainer]:
    kwargs = {"callbacks": ModelCheckpoint(path, save_last=True), "enable_checkpointing": True, **kwargs}
    model, run = Resumable(), trainer(path, max_epochs=epochs, **kwargs)
    run.fit(model, loader(10), loader(4), ckpt_path=ckpt_path)
    return model, run


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


KEYS = {
    "epoch", "global_step", "pytorch-lightning_version", "state_dict", "loops", "treadle", "callbacks",
    "optimizer_states", "lr_schedulers", "hparams_name", "hyper_parameters",
}  # fmt: skip


def test_a_checkpoint_has_lightnings_keys_and_loads_with_weights_only(tmp_path: Path) -> None:
    _, run = fit(tmp_path, 1)
    saved = torch.load(run.checkpoint_callback.best_model_path, weights_only=True)
    assert set(saved) == KEYS
    theirs = torch.load(LIGHTNING, weights_only=True)
    assert set(theirs) == KEYS - {"treadle"}
    assert (saved["epoch"], saved["global_step"]) == (theirs["epoch"], theirs["global_step"]) == (0, 5)

    def shape(tree: Any) -> Any:
        return {k: shape(v) for k, v in tree.items()} if isinstance(tree, dict) else None

    fit_loop = saved["loops"]["fit_loop"]
    assert shape(fit_loop) == shape(theirs["loops"]["fit_loop"])
    for part in ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.automatic_optimization.optim_progress"):
        assert fit_loop[part] == theirs["loops"]["fit_loop"][part], part


def test_resuming_at_an_epochs_end_continues_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole, run = fit(tmp_path / "whole", 4)
    _, half = fit(tmp_path / "half", 2)
    path = half.checkpoint_callback.best_model_path
    resumed, again = fit(tmp_path / "again", 4, path)
    assert same(whole, resumed)
    assert (again.global_step, again.current_epoch) == (run.global_step, run.current_epoch) == (20, 4)
    assert again.optimizers[0].param_groups[0]["lr"] == run.optimizers[0].param_groups[0]["lr"] == 0.01 * 0.5**4
    assert again.ckpt_path == path


@pytest.mark.parametrize(
    ("stops", "goes_on"),
    [
        ({"stopping_threshold": 1e9}, {"stopping_threshold": -1.0}),
        ({"divergence_threshold": -1.0}, {"divergence_threshold": None}),
        ({"patience": 0, "min_delta": 1e9}, {"patience": 9, "min_delta": 1e9}),
    ],
)
def test_a_stopped_run_goes_on_once_the_callback_that_stopped_it_would_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, stops: dict[str, Any], goes_on: dict[str, Any]
) -> None:
    def callbacks(arguments: dict[str, Any]) -> list[L.Callback]:
        return [EarlyStopping("val_loss", **arguments), ModelCheckpoint(tmp_path, save_last=True)]

    _, run = fit(tmp_path, 4, callbacks=callbacks(stops))
    stopped, last = run.global_step, run.checkpoint_callback.last_model_path
    assert stopped < 20
    _, same_again = fit(tmp_path, 4, last, callbacks=callbacks(stops))
    assert same_again.global_step == stopped and "leave it out" in caplog.text
    with pytest.warns(UserWarning, match="add the following callbacks: .*EarlyStopping"):
        _, without = fit(tmp_path / "without", 4, last)
    assert (without.global_step, without.should_stop) == (20, False)
    _, changed = fit(tmp_path, 4, last, callbacks=callbacks(goes_on))
    assert changed.global_step == 20 and changed.early_stopping_callback.stopping_reason == 0


@pytest.mark.parametrize("minimum", [0, 3])
def test_a_run_that_the_program_stopped_goes_on_and_a_stop_that_the_minimum_holds_back_is_to_come(
    tmp_path: Path, minimum: int
) -> None:
    class Stopping(Resumable):
        def on_train_epoch_end(self) -> None:
            self.trainer.should_stop |= self.current_epoch == 1

    def fitted(ckpt_path: Path | None = None) -> L.Trainer:
        kept = ModelCheckpoint(tmp_path, save_top_k=-1)
        run = trainer(tmp_path, max_epochs=5, min_epochs=minimum, callbacks=kept, enable_checkpointing=True)
        run.fit(Stopping(), loader(10), loader(4), ckpt_path=ckpt_path)
        return run

    assert fitted().current_epoch == max(minimum, 2)
    (saved,) = tmp_path.glob("epoch=1*.ckpt")
    assert fitted(saved).current_epoch == (minimum or 5)


def test_a_finished_run_that_is_resumed_does_nothing(tmp_path: Path) -> None:
    model, run = fit(tmp_path, 2)
    with pytest.warns(UserWarning, match="nothing is left to do"):
        again, second = fit(tmp_path / "again", 2, run.checkpoint_callback.best_model_path)
    assert same(model, again)
    assert second.global_step == 10


def test_callbacks_and_datamodule_come_back(tmp_path: Path) -> None:
    class Data(L.LightningDataModule):
        seen = 0

        def train_dataloader(self) -> Any:
            return loader(4)

        def state_dict(self) -> dict[str, Any]:
            return {"seen": 7}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.seen = state_dict["seen"]

    class Counter(L.Callback):
        epochs = 0

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.epochs += 1

        def state_dict(self) -> dict[str, Any]:
            return {"epochs": self.epochs}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.epochs = state_dict["epochs"]

    def go(epochs: int, ckpt_path: Any = None) -> tuple[Counter, Data]:
        counter, data = Counter(), Data()
        run = trainer(
            tmp_path, max_epochs=epochs, callbacks=[counter, ModelCheckpoint(tmp_path)], enable_checkpointing=True
        )
        run.fit(Resumable(), datamodule=data, ckpt_path=ckpt_path)
        return counter, data

    go(2)
    saved = torch.load(tmp_path / "epoch=1-step=4.ckpt", weights_only=True)
    assert saved["callbacks"][Counter.__qualname__] == {"epochs": 2}  # the name that Lightning gives the state
    counter, data = go(5, tmp_path / "epoch=1-step=4.ckpt")
    assert counter.epochs == 5
    assert data.seen == 7


def test_best_and_last(tmp_path: Path) -> None:
    class Worse(Resumable):
        def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val_loss", float(self.current_epoch))

    callback = ModelCheckpoint(tmp_path, monitor="val_loss", save_last=True)
    run = trainer(tmp_path, max_epochs=3, callbacks=callback, enable_checkpointing=True)
    model = Worse()
    run.fit(model, loader(4), loader(2))
    after = model.layer.weight.clone()
    run.validate(dataloaders=loader(2), ckpt_path="best", verbose=False)
    assert run.ckpt_path == callback.best_model_path
    assert not torch.equal(model.layer.weight, after)
    run.test(model, loader(2), ckpt_path="last", verbose=False)
    assert torch.equal(model.layer.weight, after)
    with pytest.raises(L.MisconfigurationException, match="ckpt_path='best' needs a ModelCheckpoint"):
        trainer(tmp_path).validate(model, loader(2), ckpt_path="best")
    for word, near in (("bestt", "best"), ("lst", "last"), ("LAST", "last")):
        with pytest.raises(L.MisconfigurationException, match=f"Did you mean '{near}'"):
            trainer(tmp_path).validate(model, loader(2), ckpt_path=word)
    with pytest.warns(UserWarning, match="no last checkpoint available"):
        trainer(tmp_path / "empty").fit(Net(), loader(2), ckpt_path="last")


def test_a_checkpoint_of_lightning_opens_and_goes_on_as_there(tmp_path: Path) -> None:
    callbacks = [ModelCheckpoint(tmp_path, monitor="val_loss"), EarlyStopping("val_loss")]
    model, run = fit(tmp_path, 2, LIGHTNING, callbacks=callbacks)
    assert (run.global_step, run.current_epoch) == (10, 2)
    for name, value in RESUMED_BY_LIGHTNING.items():
        torch.testing.assert_close(model.state_dict()[name], torch.tensor(value), atol=1e-6, rtol=0)
    loaded = Resumable.load_from_checkpoint(LIGHTNING)
    assert loaded.hparams.lr == 0.01


def test_save_checkpoint_by_hand_with_and_without_training_state(tmp_path: Path) -> None:
    model, run = fit(tmp_path, 1)
    run.save_checkpoint(tmp_path / "all.ckpt")
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    weights = torch.load(tmp_path / "weights.ckpt", weights_only=True)
    assert "optimizer_states" not in weights
    assert same(Resumable.load_from_checkpoint(tmp_path / "weights.ckpt"), model)
    with pytest.raises(CheckpointMismatchError, match="weights only"):
        fit(tmp_path / "again", 2, tmp_path / "weights.ckpt")
    with pytest.raises(L.MisconfigurationException, match="save_checkpoint needs"):
        trainer(tmp_path).save_checkpoint(tmp_path / "none.ckpt")


def test_hooks_may_add_to_a_checkpoint_and_read_it_back(tmp_path: Path) -> None:
    class Adding(Resumable):
        seen: Any = None

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["extra"] = {"tokens": 12}

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.seen = checkpoint["extra"]

    run = trainer(tmp_path)
    run.fit(Adding(), loader(4))
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert Adding.load_from_checkpoint(tmp_path / "a.ckpt").seen == {"tokens": 12}
    model = Adding()
    trainer(tmp_path, max_epochs=2).fit(model, loader(4), ckpt_path=tmp_path / "a.ckpt")
    assert model.seen == {"tokens": 12}


def test_a_hook_may_empty_the_states_that_are_to_begin_anew(tmp_path: Path) -> None:
    class Anew(Resumable):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["optimizer_states"] = checkpoint["lr_schedulers"] = []

    _, run = fit(tmp_path, 2)
    model, again = Anew(), trainer(tmp_path, max_epochs=3)
    with pytest.warns(UserWarning) as told:
        again.fit(model, loader(10), loader(4), ckpt_path=run.checkpoint_callback.best_model_path)
    assert [
        kind for kind in ("optimizer", "scheduler") if any(f"no {kind} states" in str(w.message) for w in told)
    ] == [
        "optimizer",
        "scheduler",
    ]
    assert again.global_step == 15 and again.optimizers[0].param_groups[0]["lr"] == 0.01 * 0.5
    assert again.optimizers[0].state[model.layer.weight]["step"] == 5


def _other_width(path: Path) -> None:
    model = Resumable()
    model.layer = torch.nn.Linear(4, 3)
    run = trainer(path)
    run.fit(model, loader(4))
    run.save_checkpoint(path / "bad.ckpt")


def _two_optimizers(path: Path) -> None:
    fit(path, 1)[1].save_checkpoint(path / "bad.ckpt")
    saved = torch.load(path / "bad.ckpt", weights_only=True)
    saved["optimizer_states"] *= 2
    torch.save(saved, path / "bad.ckpt")


def _truncated(path: Path) -> None:
    data = LIGHTNING.read_bytes()
    (path / "bad.ckpt").write_bytes(data[: len(data) // 2])


class Hostile:
    def __reduce__(self) -> Any:
        return os.system, ("touch hostile-ran",)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda p: None, CheckpointNotFoundError, "bad.ckpt"),
        (_truncated, CheckpointCorruptError, "bad.ckpt"),
        (lambda p: (p / "bad.ckpt").write_text("no checkpoint"), CheckpointCorruptError, "bad.ckpt"),
        (lambda p: torch.save({"x": Hostile()}, p / "bad.ckpt"), CheckpointUnsafeError, "system"),
        (lambda p: torch.save({"weights": 1}, p / "bad.ckpt"), CheckpointMismatchError, "no 'state_dict'"),
        (_other_width, CheckpointMismatchError, "do not fit Resumable"),
        (_two_optimizers, CheckpointMismatchError, "2 optimizer states"),
    ],
)
def test_what_cannot_be_resumed_from_is_named(tmp_path: Path, damage: Any, error: type, message: str) -> None:
    damage(tmp_path)
    with pytest.raises(error, match=message):
        fit(tmp_path / "again", 2, tmp_path / "bad.ckpt")
    assert not (tmp_path / "hostile-ran").exists()


def test_hyperparameters_that_a_checkpoint_cannot_hold_are_left_out_with_a_warning(tmp_path: Path) -> None:
    class Odd(Net):
        def __init__(self, width: int, act: Any, folder: Path) -> None:
            super().__init__()
            self.save_hyperparameters()

    run = trainer(tmp_path)
    run.fit(Odd(3, lambda x: x, tmp_path), loader(4))
    with pytest.warns(UserWarning, match=r"hyper_parameters\.act"):
        run.save_checkpoint(tmp_path / "odd.ckpt")
    saved = torch.load(tmp_path / "odd.ckpt", weights_only=True)["hyper_parameters"]
    assert saved == {"width": 3, "folder": str(tmp_path)}


def test_resuming_within_an_epoch_goes_on_with_the_next_batch(tmp_path: Path) -> None:
    seen: list[float] = []

    class Watching(Resumable):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            seen.append(batch[0, 0].item())
            return super().training_step(batch, batch_idx)

    def go(ckpt_path: Any = None) -> Watching:
        callback = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
        model = Watching()
        run = trainer(tmp_path, max_epochs=2, callbacks=callback, enable_checkpointing=True)
        run.fit(model, loader(10), ckpt_path=ckpt_path)
        return model

    whole = go()
    seen.clear()
    resumed = go(tmp_path / "epoch=0-step=3.ckpt")
    assert seen == [6, 8, 0, 2, 4, 6, 8]
    assert same(whole, resumed)
    # a file of Lightning's has no more than this to go by
    for step, batches in ((3, [6, 8, 0, 2, 4, 6, 8]), (5, [0, 2, 4, 6, 8])):
        seen.clear()
        content = torch.load(tmp_path / f"epoch=0-step={step}.ckpt", weights_only=True)
        del content["treadle"]
        torch.save(content, tmp_path / "lightning.ckpt")
        go(tmp_path / "lightning.ckpt")
        assert seen == batches


def test_a_tilde_is_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run = trainer(Path("~/root"))
    run.fit(Net(), loader(4))
    run.save_checkpoint("~/a.ckpt")
    assert run.default_root_dir == str(tmp_path / "home" / "root") and (tmp_path / "home" / "a.ckpt").is_file()
    Net.load_from_checkpoint("~/a.ckpt")
    again = trainer(tmp_path, max_epochs=2)
    again.fit(Net(), loader(4), ckpt_path="~/a.ckpt")
    assert again.global_step == 4 and not os.path.exists("~")


def test_a_strategy_removes_a_checkpoint(tmp_path: Path) -> None:
    _, run = fit(tmp_path, 1)
    path = Path(run.checkpoint_callback.best_model_path)
    assert path.exists()
    run.strategy.remove_checkpoint(path)
    assert not path.exists()
