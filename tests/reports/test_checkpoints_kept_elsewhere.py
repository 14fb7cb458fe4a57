"""A CheckpointIO of the user's may keep a checkpoint elsewhere than at its path: in a database, under a longer name.

Such classes of programs for Lightning encrypt, compress or upload. What is removed, ranked or linked was looked for at
the path, so that every checkpoint stayed and a resumed run ranked anew.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.callbacks.scripted import files, fit

from treadle.callbacks import ModelCheckpoint
from treadle_fabric import AsyncCheckpointIO, CheckpointIO


class Database(CheckpointIO):
    """Writes nothing to the disk."""

    def __init__(self) -> None:
        self.rows: dict[str, bytes] = {}

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        stream = io.BytesIO()
        torch.save(checkpoint, stream)
        self.rows[str(path)] = stream.getvalue()

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> Any:
        return torch.load(io.BytesIO(self.rows[str(path)]), map_location, weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        del self.rows[str(path)]

    def names(self) -> list[str]:
        return sorted(Path(path).name for path in self.rows)


@pytest.mark.parametrize("save_last", [None, True, "link"])
def test_replaced_checkpoints_are_removed(save_last: Any) -> None:
    database = Database()
    checkpoint = ModelCheckpoint("c", "{step}", "val_loss", save_last=save_last)
    fit(checkpoint, script=[3, 2, 1], max_epochs=3, plugins=[database])
    assert database.names() == ["last.ckpt", "step=12.ckpt"][not save_last :]
    assert files("c") == []  # no link to what is not there


@pytest.mark.parametrize("save_last", [None, True, "link"])
def test_replaced_checkpoints_are_removed_in_the_background(save_last: Any) -> None:
    database = Database()
    fit(ModelCheckpoint("c", "{step}", save_last=save_last), max_epochs=3, plugins=[AsyncCheckpointIO(database)])
    assert database.names() == ["last.ckpt", "step=12.ckpt"][not save_last :]


def test_a_resumed_run_goes_on_ranking() -> None:
    database = Database()
    one, two = (ModelCheckpoint("c", "{step}", "val_loss", save_top_k=2) for _ in range(2))
    fit(one, script=[3, 2], max_epochs=2, plugins=[database])
    fit(two, script=[1], max_epochs=3, plugins=[database], ckpt_path=one.best_model_path)
    assert [Path(path).name for path in two.best_k_models] == database.names()[::-1] == ["step=8.ckpt", "step=12.ckpt"]


def test_a_path_may_be_of_a_kind_that_only_the_class_knows() -> None:
    database = Database()
    checkpoint = ModelCheckpoint("c", "{step}", "val_loss")
    trainer = fit(checkpoint, script=[3], max_epochs=1, plugins=[database])
    trainer.save_checkpoint("database://run/1")
    trainer = fit(ModelCheckpoint("c", "{step}", "val_loss"), script=[2], max_epochs=2, plugins=[database],
                  ckpt_path="database://run/1")  # fmt: skip
    assert trainer.global_step == 8 and database.names() == ["1", "step=8.ckpt"]
