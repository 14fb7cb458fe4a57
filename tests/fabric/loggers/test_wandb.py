"""Weights & Biases, offline: what the logger leaves in the run's file, read back with W&B's own messages.

Tests of ``treadle_fabric.loggers.wandb``, ``treadle_fabric.loggers.service``,
``treadle_fabric.loggers.saved_checkpoints``.
"""

from __future__ import annotations

import copy
import json
import pickle
import struct
import sys
import wave
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import wait_until
from tests.trainer.models import Net, loader, trainer

import treadle as L
from treadle.callbacks import ModelCheckpoint
from treadle.loggers import CSVLogger, WandbLogger
from treadle_fabric import MisconfigurationException

wandb = pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    yield
    wandb.teardown()


def offline(**kwargs: Any) -> WandbLogger:
    settings = wandb.Settings(console="off", x_disable_stats=True, x_disable_meta=True)
    return WandbLogger(offline=True, settings=settings, **{"project": "p", **kwargs})


def records(content: bytes) -> Iterator[bytes]:
    """The records of W&B's file: a header of 7 bytes, then LevelDB's log, in blocks of 32 KiB."""
    position, record = 7, b""
    while position + 7 <= len(content):
        if (left := -position % 32768) < 7 and left:  # no room for a header: zeros
            position += left
            continue
        length, kind = struct.unpack("<4xHB", content[position : position + 7])
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def complete(path: Path, kind: Any) -> list[Any]:
    found = [kind.FromString(data) for data in records(path.read_bytes())]
    return found if any(record.HasField("exit") for record in found) else []


def nested(items: Any) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for item in items:
        *outer, last = item.nested_key or [item.key]
        place = result
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)
    return result


class Read:
    """What is in the offline folders of a run."""

    def __init__(self, run: str, folder: str = ".") -> None:
        from wandb.proto.wandb_internal_pb2 import Record

        self.history: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        self.artifacts: list[Any] = []
        self.runs: list[Any] = []
        self.exits: list[int] = []
        self.files: list[str] = []
        for path in sorted(Path(folder).glob(f"wandb/offline-run-*-{run}*/run-{run}.wandb")):
            # the process that writes the file does so a moment after the run was finished
            wait_until(whole := partial(complete, path, Record))
            for record in whole():
                self.add(record, record.WhichOneof("record_type"))

    def add(self, record: Any, kind: str) -> None:
        if kind == "history":
            row = nested(record.history.item)
            self.history.append({k: v for k, v in row.items() if not k.startswith("_")})
        elif kind in ("run", "config"):
            update = record.run.config.update if kind == "run" else record.config.update
            self.config |= nested(update)
            self.runs += [record.run] if kind == "run" else []
        elif kind == "request" or kind == "artifact":
            found = record.artifact if kind == "artifact" else record.request.log_artifact.artifact
            self.artifacts += [found] if found.name else []
        elif kind == "exit":
            self.exits.append(record.exit.exit_code)
        elif kind == "files":
            self.files += [file.path for file in record.files.files]


class Logs(Net):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_a_fit_leaves_metrics_settings_and_checkpoints(tmp_path: Path) -> None:
    logger = offline(log_model=True, prefix="x", checkpoint_name="net", save_dir="out")
    other = offline(project="q", save_dir="out")
    saves = ModelCheckpoint(monitor="val_loss", save_top_k=2)
    run = trainer(
        tmp_path, logger=[logger, CSVLogger(tmp_path), other], callbacks=[saves], max_epochs=2, log_every_n_steps=1,
        enable_checkpointing=True, limit_train_batches=2,
    )  # fmt: skip
    copied: list[WandbLogger] = []

    class Copies(L.Callback):
        def on_train_batch_end(self, *_: Any, **__: Any) -> None:
            copied[:] = [copy.deepcopy(logger), pickle.loads(pickle.dumps(logger))]

    run.callbacks.append(Copies())
    run.fit(Logs(width=5), loader(), loader())
    assert saves.dirpath == str(tmp_path / "out" / "p" / logger.version / "checkpoints")
    for twin in copied:
        assert twin.version == logger.version
        twin.log_metrics({"of a copy": 1.0}, 9)
    run.test(Logs(), loader(), verbose=False)  # after the fit, into the same run
    logger.experiment.finish()
    other.experiment.finish()
    read = Read(logger.version, "out")
    assert read.config["width"] == 5
    assert read.runs[0].project == "p"
    losses = [(row["trainer/global_step"], row["x-val_loss"]) for row in read.history if "x-val_loss" in row]
    assert [step for step, _ in losses] == [1, 3]
    assert sum("x-of a copy" in row for row in read.history) == 2
    assert any("x-test_loss" in row for row in read.history)
    sent = [artifact for artifact in read.artifacts if artifact.name == "net"]
    assert [artifact.type for artifact in sent] == ["model", "model"]
    assert ["best" in artifact.aliases for artifact in sent].count(True) == 1
    metadata = [json.loads(artifact.metadata) for artifact in sent]
    assert {m["original_filename"] for m in metadata} == {Path(p).name for p in saves.best_k_models}
    assert metadata[0]["ModelCheckpoint"]["monitor"] == "val_loss"
    assert read.exits == [0]
    second = Read(other.version, "out")
    assert second.runs[0].project == "q"
    assert any("val_loss" in row for row in second.history)


def test_media_go_to_wandb_in_its_own_classes(tmp_path: Path) -> None:
    import matplotlib.figure
    import numpy as np

    logger = offline(prefix="m")
    logger.log_image("images", [torch.rand(3, 4, 5), np.zeros((4, 5), np.uint8)], step=3, caption=["a", "b"])
    logger.log_image(key="own", images=[wandb.Image(np.ones((2, 2, 3), np.uint8))])
    figure = matplotlib.figure.Figure()
    figure.add_subplot().plot([1, 2])
    logger.log_figure("figure", figure, step=3)
    logger.log_text("text", "words", 4)
    logger.log_text(key="texts", columns=["a"], data=[["x"]], step=4)
    logger.log_table(key="table", columns=["a", "b"], data=[[1, "x"], [2, "y"]], step=5)
    (tmp_path / "notes.txt").write_text("written")
    logger.log_file("notes.txt")
    with wave.open("tone.wav", "wb") as sound:
        sound.setparams((1, 2, 8000, 4, "NONE", ""))
        sound.writeframes(struct.pack("<4h", 1, 2, 3, 4))
    with pytest.raises(wandb.Error, match="soundfile"):  # which W&B needs for sounds
        logger.log_audio("sounds", ["tone.wav"], step=5, caption=["beep"])
    Path("clip.mp4").write_bytes(b"0000ftypmp42")
    logger.log_video("clips", ["clip.mp4"], step=5, format=["mp4"])
    with pytest.raises(MisconfigurationException, match="caption has 1 entries, and there are 2 items"):
        logger.log_audio("sounds", ["tone.wav", "tone.wav"], caption=["one"])
    with pytest.raises(MisconfigurationException, match="log_video takes a list"):
        logger.log_video("clips", "clip.mp4")
    logger.watch(torch.nn.Linear(2, 2))
    logger.experiment.finish()
    read = Read(logger.version)
    logged = {name: (row.get("trainer/global_step"), row[name]) for row in read.history for name in row}
    step, images = logged["m-images"]
    assert (step, images["_type"], images["count"], images["captions"]) == (3, "images/separated", 2, ["a", "b"])
    kinds = {name: value["_type"] for name, (_, value) in logged.items() if isinstance(value, dict)}
    assert kinds == {
        "m-images": "images/separated", "m-own": "images/separated", "m-figure": "image-file", "m-text": "table-file",
        "m-texts": "table-file", "m-table": "table-file", "m-clips": "videos",
    }  # fmt: skip
    table = json.loads(next(Path(".").glob("wandb/*/files/" + logged["m-table"][1]["path"])).read_text())
    assert (table["columns"], table["data"]) == (["a", "b"], [[1, "x"], [2, "y"]])
    assert "media/files/m-notes.txt" in read.files
    assert next(Path(".").glob("wandb/*/files/media/files/m-notes.txt")).read_text() == "written"


def test_a_run_goes_on_or_branches(tmp_path: Path) -> None:
    first = offline()
    first.log_metrics({"a": 1.0}, 0)
    state = first.state_dict()
    first.experiment.finish()
    json.dumps(state)
    again = offline()
    again.resume(state)
    again.log_metrics({"a": 2.0}, 1)
    assert again.version == first.version
    again.finalize("failed")
    read = Read(first.version)
    assert [row["a"] for row in read.history] == [1.0, 2.0]
    assert {run.run_id for run in read.runs} == {first.version}
    assert read.exits == [0, 1]
    again.log_metrics({"a": 3.0}, 2)  # after a failure the run is opened again
    again.branch(state)  # and a branch of it is another run
    again.log_metrics({"a": 4.0}, 1)
    assert again.version != first.version
    assert again.state_dict()["parent"] == first.version
    again.experiment.finish()
    assert Read(again.version).config["parent_run"] == first.version
    assert [row["a"] for row in Read(first.version).history] == [1.0, 2.0, 3.0]
    named = offline(id="mine")
    named.resume(state)  # the user's choice of a run wins: it is a branch
    assert named.version == "mine"
    assert named.state_dict()["parent"] == first.version
    fold = again.version
    again.begin_anew()
    assert again.version != fold


def test_the_run_of_the_program_is_used() -> None:
    with wandb.init(project="own", mode="offline", settings=wandb.Settings(console="off")) as run:
        logger = offline()
        assert logger.version == run.id
        logger.log_metrics({"a": 1.0}, 0)
        logger.finalize("failed")  # the run is the program's to end
        run.log({"b": 1})
        given = WandbLogger(experiment=run)
        assert (given.version, given.name) == (run.id, "own")
        given.log_hyperparams({"deep": {"lr": torch.tensor(0.5), "act": torch.nn.ReLU}, 3: [1, None]})
    read = Read(run.id)
    assert [row.get("a") for row in read.history] == [1.0, None]
    assert read.config["deep"] == {"lr": 0.5, "act": str(torch.nn.ReLU)}
    assert read.config["3"] == [1, None]
    assert read.exits == [0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"log_model": "some"}, "log_model='some' must be"), ({"add_file_policy": "no"}, "add_file_policy='no' must be")],
)
def test_wrong_values_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        WandbLogger(**arguments)


def test_without_wandb_the_constructor_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install treadle\[wandb\]"):
        WandbLogger()
