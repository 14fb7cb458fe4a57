"""A hostile pickle never runs, whichever way it comes in."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.models import Net, loader, trainer

import treadle as L
from treadle.cli.main import main
from treadle.replay import replay
from treadle_fabric import CheckpointError, Fabric, TreadleError
from treadle_fabric.checkpoint import newest_good

FILE = Path("checkpoints") / "last.ckpt"


class Hostile:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


def archive() -> None:
    torch.save({**honest(), "callbacks": {"one": Hostile()}}, FILE)


def old_format() -> None:
    torch.save({**honest(), "callbacks": {"one": Hostile()}}, FILE, _use_new_zipfile_serialization=False)


def bare_pickle() -> None:
    FILE.write_bytes(pickle.dumps(Hostile()))


def honest() -> dict[str, Any]:
    """The rest of the file is a checkpoint like any other."""
    run = trainer(Path(), max_steps=1)
    run.fit(Net(), loader(2))
    run.save_checkpoint(FILE)
    return dict(torch.load(FILE, weights_only=True))


def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


class Data(L.LightningDataModule):
    pass


WAYS: dict[str, Callable[[], Any]] = {
    "fit": lambda: trainer(Path()).fit(Net(), loader(2), ckpt_path=FILE),
    "last": lambda: trainer(Path(), enable_checkpointing=True).fit(Net(), loader(2), ckpt_path="last"),
    "validate": lambda: trainer(Path()).validate(Net(), loader(2), ckpt_path=FILE),
    "test": lambda: trainer(Path()).test(Net(), loader(2), ckpt_path=FILE),
    "predict": lambda: trainer(Path()).predict(Net(), loader(2), ckpt_path=FILE),
    "stream": lambda: trainer(Path()).predict(Net(), loader(2), ckpt_path=FILE, return_predictions="stream"),
    "load_from_checkpoint": lambda: Net.load_from_checkpoint(FILE),
    "a data module": lambda: Data.load_from_checkpoint(FILE),
    "Fabric.load": lambda: fabric().load(FILE),
    "Fabric.load into": lambda: fabric().load(FILE, {"state_dict": Net()}),
    "Fabric.load_raw": lambda: fabric().load_raw(FILE, Net()),
    "replay": lambda: replay(FILE),
}


@pytest.mark.parametrize("kind", [archive, old_format, bare_pickle])
@pytest.mark.parametrize("way", WAYS)
def test_it_is_refused_and_does_not_run(kind: Callable[[], None], way: str) -> None:
    FILE.parent.mkdir()
    kind()
    with pytest.raises(TreadleError):
        WAYS[way]()
    assert not Path("ran").exists()


@pytest.mark.parametrize("kind", [archive, old_format, bare_pickle])
def test_auto_resume_passes_over_it(kind: Callable[[], None]) -> None:
    FILE.parent.mkdir()
    kind()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert newest_good("checkpoints") is None
        run = trainer(Path(), enable_checkpointing=True, auto_resume=True)
        run.fit(Net(), loader(2))
    assert run.global_step == 1 and not Path("ran").exists()


@pytest.mark.parametrize("kind", [archive, old_format, bare_pickle])
@pytest.mark.parametrize("command", ["verify", "inspect", "diff", "prune"])
def test_the_command_line_does_not_run_it(kind: Callable[[], None], command: str, capsys: Any) -> None:
    FILE.parent.mkdir()
    kind()
    arguments = {"diff": [FILE, FILE], "prune": ["checkpoints", "--keep", "1"]}.get(command, [FILE])
    status = main(["checkpoint", command, *map(str, arguments)])
    assert status != 0 or command == "prune"
    assert not Path("ran").exists()


def test_the_file_that_would_do_the_damage_is_able_to() -> None:
    FILE.parent.mkdir()
    archive()
    with pytest.raises(CheckpointError):
        fabric().load(FILE)
    fabric().load(FILE, weights_only=False)
    assert Path("ran").exists()
