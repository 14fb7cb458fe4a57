"""Resuming from odd places, with odd steps and loaders; and what a run that cannot save does when it has to end.

Tests of ``treadle.checkpoint.exact``, ``treadle.checkpoint.restore``.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.models import Net, Samples, loader, trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

import treadle as L


class Drawing(Net):
    """Draws its batches itself."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, float]] = []

    def training_step(self, dataloader_iter: Any) -> Any:
        batch, batch_idx, _ = next(dataloader_iter)
        self.seen.append((batch_idx, batch[0, 0].item()))
        return self.loss(batch)


class Stateful:
    """A loader that goes on from its own state."""

    def __init__(self) -> None:
        self.position = 0

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[Tensor]:
        while self.position < 8:
            self.position += 1
            yield torch.full((1, 4), self.position - 1.0)
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.position = state["position"]


class SaveAfter(L.Callback):
    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.fit_progress.batch == self.batch:
            trainer.save_checkpoint(f"{self.batch}.ckpt")


@pytest.mark.parametrize("kind", ["stateful", "plain"])
def test_a_step_that_draws_goes_on_twice(tmp_path: Path, kind: str) -> None:
    def fit(callback: L.Callback, ckpt_path: str | None = None) -> Drawing:
        model = Drawing()
        run = trainer(tmp_path, callbacks=callback)
        run.fit(model, Stateful() if kind == "stateful" else loader(8, 1), ckpt_path=ckpt_path)
        return model

    assert fit(SaveAfter(3)).seen == [(i, float(i)) for i in range(8)]
    assert fit(SaveAfter(5), "3.ckpt").seen == [(i, float(i)) for i in range(3, 8)]
    assert fit(SaveAfter(0), "5.ckpt").seen == [(i, float(i)) for i in range(5, 8)]


class Numbers(Net):
    """Keeps the numbers of the samples that it trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.seen += batch[:, 0].tolist()
        return self.loss(batch)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_another_batch_size_goes_on_at_the_next_sample(tmp_path: Path, accumulate: int) -> None:
    def fit(batch_size: int, callback: L.Callback, ckpt_path: str | None = None) -> list[float]:
        model = Numbers()
        run = trainer(tmp_path, callbacks=callback, accumulate_grad_batches=accumulate)
        run.fit(model, loader(22, batch_size, shuffle=True), ckpt_path=ckpt_path)
        return model.seen

    whole = fit(4, SaveAfter(3))
    with pytest.warns(UserWarning) as told:
        rest = fit(6, SaveAfter(0), "3.ckpt")
    assert rest == whole[12:]
    first, *rest_of_them = [m for w in told if "validation_step" not in (m := str(w.message))]
    assert "had 4: the epoch goes on at sample 12" in first
    assert ["an accumulation of 2 batches, of which 1 were done" in m for m in rest_of_them] == [True] * (
        accumulate - 1
    )


def test_another_dataset_in_mid_epoch_is_told_of(tmp_path: Path) -> None:
    trainer(tmp_path, callbacks=SaveAfter(3)).fit(Net(), loader(22, 4))
    with pytest.warns(UserWarning, match="of the middle of an epoch of 22 samples, and the training data have 30 now"):
        trainer(tmp_path).fit(Net(), loader(30, 4), ckpt_path="3.ckpt")


def test_another_sampler_in_mid_epoch_is_told_of(tmp_path: Path) -> None:
    trainer(tmp_path, callbacks=SaveAfter(3)).fit(Net(), loader(22, 4))
    with pytest.warns(UserWarning, match="in the order of SequentialSampler, and now it is that of RandomSampler"):
        trainer(tmp_path).fit(Net(), loader(22, 4, shuffle=True), ckpt_path="3.ckpt")


@pytest.mark.parametrize(
    "hook", ["on_fit_start", "on_sanity_check_end", "on_train_start", "on_train_epoch_start", "on_validation_end"]
)
def test_saved_in_any_hook_it_goes_on(tmp_path: Path, hook: str) -> None:
    def save(self: L.Callback, trainer: L.Trainer, pl_module: Any) -> None:
        trainer.save_checkpoint("hook.ckpt")

    callback = type("Saving", (L.Callback,), {hook: save})()
    batches = lambda: DataLoader(Samples(8), 2, shuffle=True, generator=torch.Generator())  # noqa: E731
    trainer(tmp_path, callbacks=callback).fit(Net(), batches(), batches())
    run = trainer(tmp_path, max_epochs=2)
    run.fit(Net(), batches(), batches(), ckpt_path="hook.ckpt")
    assert (run.global_step, run.current_epoch) == (8, 2)


class Endless(IterableDataset[Tensor]):
    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield torch.ones(4)


@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
def test_a_number_of_batches_is_a_limit_also_where_it_is_the_length(tmp_path: Path) -> None:
    run = trainer(tmp_path, limit_train_batches=3, limit_val_batches=3, num_sanity_val_steps=0)
    run.fit(Net(), DataLoader(Endless(), 2), DataLoader(Endless(), 2))
    assert run.global_step == 3


@pytest.mark.parametrize("policy", ["raise", "warn"])
def test_sigterm_without_a_place_to_save_ends_with_143(tmp_path: Path, policy: Any) -> None:
    class Killing(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    Path("file").touch()
    run = trainer(
        tmp_path / "file" / "folder",
        enable_checkpointing=True,
        callbacks=[Killing(), L.callbacks.ModelCheckpoint(tmp_path / "file" / "folder", every_n_epochs=5)],
        on_save_error=policy,
    )
    with pytest.warns(UserWarning, match="earlier checkpoints are untouched"), pytest.raises(SystemExit) as ended:
        run.fit(Net(), loader(8))
    assert ended.value.code == 143
    assert run.received_sigterm
