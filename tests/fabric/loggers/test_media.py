"""Images, figures, texts, tables and files on loggers that keep files, and on a logger of one's own.

Tests of ``treadle_fabric.loggers.media``, ``treadle_fabric.loggers.media_files``, ``treadle_fabric.loggers.logger``.
"""

from __future__ import annotations

import csv
import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import matplotlib
import matplotlib.figure
import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from treadle_fabric import MisconfigurationException, rank_zero_only
from treadle_fabric.loggers import CSVLogger, DummyLogger, Logger, TensorBoardLogger

RED = np.zeros((2, 3, 3), np.uint8)
RED[:, :, 0] = 255
CHW = torch.from_numpy(RED).permute(2, 0, 1)


@pytest.fixture
def logger(tmp_path: Path) -> CSVLogger:
    return CSVLogger(tmp_path, name="run", version="v")


def media(folder: Path) -> list[str]:
    root = folder / "run" / "v" / "media"
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def pixels(source: Any) -> Any:
    with Image.open(source) as image:
        return np.asarray(image)


def figure() -> Any:
    drawn = matplotlib.figure.Figure()
    drawn.add_subplot().plot([1, 2])
    return drawn


@pytest.mark.parametrize(
    "image",
    [
        CHW, CHW.float() / 255, CHW.double() / 255, (CHW / 255).to(torch.bfloat16), CHW > 0, CHW.long(), CHW[None],
        (CHW.float() / 255).requires_grad_(), RED, RED.astype(np.float32) / 255, RED > 0, RED[None], RED[::-1],
        Image.fromarray(RED), [CHW], (RED,),
    ],
)  # fmt: skip
def test_images_of_every_kind_keep_their_pixels(image: Any, logger: CSVLogger, tmp_path: Path) -> None:
    logger.log_image("red", image, step=1)
    assert np.array_equal(pixels(tmp_path / "run/v/media/red_1.png"), RED)


def test_gray_transparent_and_other_images(logger: CSVLogger, tmp_path: Path) -> None:
    logger.log_image("gray", [torch.ones(2, 3) / 5, np.full((2, 3, 1), 51, np.uint8)])
    logger.log_image("clear", np.full((2, 3, 4), 7, np.uint8))
    Image.fromarray(RED).convert("CMYK").save("red.jpg")
    logger.log_image("paths", ["red.jpg", Path("red.jpg")], 2)
    logger.log_image("sorted", CHW.permute(0, 2, 1), caption=["a"])
    folder = tmp_path / "run/v/media"
    assert np.unique(pixels(folder / "gray_0.png")) == np.unique(pixels(folder / "gray_1.png")) == 51
    assert pixels(folder / "clear.png").tolist() == [[[7] * 4] * 3] * 2
    assert pixels(folder / "paths_2_0.png").shape == pixels(folder / "paths_2_1.png").shape == (2, 3, 3)
    assert pixels(folder / "sorted.png").shape == (3, 2, 3)
    with pytest.warns(UserWarning, match="values from -3 to 3"):
        logger.log_image("wide", torch.tensor([[-3.0, 0.0, float("nan"), 3.0]]))
    assert pixels(folder / "wide.png").tolist() == [[0, 0, 0, 255]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda log: log.log_image("x", torch.ones(2, 3, 3)), r"\(2, 3, 3\).* CHW .*permute\(2, 0, 1\)"),
        (lambda log: log.log_image("x", torch.ones(5, 3, 7)), r"\(5, 3, 7\).* Give such images"),
        (lambda log: log.log_image("x", np.ones((3, 8, 9))), r"\(3, 8, 9\).* HWC .*transpose\(1, 2, 0\)"),
        (lambda log: log.log_image("x", torch.ones(4)), r"\(4,\)"),
        (lambda log: log.log_image("x", torch.ones(3, 0, 4)), "0 x 4 pixels"),
        (lambda log: log.log_image("x", object()), "this is a object"),
        (lambda log: log.log_image("x", torch.ones(1, 2, 2, dtype=torch.complex64)), "no colors"),
        (lambda log: log.log_image("x", CHW, caption=["a", "b"]), "caption has 2 entries, and there are 1 items"),
        (lambda log: log.log_image("x", CHW, caption="a"), "caption is the str 'a'"),
        (lambda log: log.log_figure("x", CHW), "'x' is a Tensor"),
        (lambda log: log.log_text("x", ["a"], [["b"]]), "either a string, or a table by keywords"),
        (lambda log: log.log_text("x"), "either a string"),
        (lambda log: log.log_text("x", "a", data=[["b"]]), "either a string"),
        (lambda log: log.log_table("x", ["a", "b"], [[1, 2], [1]]), "Row 1 of the table 'x' has 1 cells"),
        (lambda log: log.log_table("x", ["a"]), "has no rows"),
        (lambda log: log.log_file("nothing.txt"), "'nothing.txt' is not there"),
        (lambda log: log.log_file("."), "'.' is a folder"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[Any], None], message: str, logger: CSVLogger) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        call(logger)


class Frame:
    """Has what pandas' data frames have."""

    columns = ["a", 2]
    values = np.array([[1, 2], [3, 4]])


def test_figures_texts_tables_and_files_are_in_the_folder(logger: CSVLogger, tmp_path: Path) -> None:
    drawn = figure()
    logger.log_figure("figure", drawn, 1)
    logger.log_figure("axes", drawn.axes[0])
    logger.log_text("said", "fünf\n", 3)
    logger.log_text("said", "fünf\n", 3)  # the same step again: a run that went on
    logger.log_text("said", "a")
    logger.log_text("said", "b")
    logger.log_text("texts", columns=["a", "b"], data=[["x,y", None]], step=3)
    logger.log_table("table", data=[[1.5, torch.tensor(2)]])
    logger.log_table("frame", dataframe=Frame())
    Path("notes.txt").write_text("written")
    logger.log_file("notes.txt")
    logger.log_file("deep/copy", "notes.txt", 4)
    assert media(tmp_path) == [
        "axes.png", "deep/copy_4.txt", "figure_1.png", "frame.csv", "notes.txt", "said-1.txt", "said.txt",
        "said_3.txt", "table.csv", "texts_3.csv",
    ]  # fmt: skip
    folder = tmp_path / "run/v/media"
    assert (folder / "said_3.txt").read_text("utf-8") == "fünf\n"
    assert (folder / "said-1.txt").read_text() == "b"
    assert [*csv.reader((folder / "texts_3.csv").read_text().splitlines())] == [["a", "b"], ["x,y", ""]]
    assert (folder / "frame.csv").read_text() == "a,2\n1,2\n3,4\n"
    assert (folder / "table.csv").read_text() == "column_0,column_1\n1.5,2\n"
    assert (folder / "deep/copy_4.txt").read_text() == "written"
    assert pixels(folder / "axes.png").shape[0] > 100


ODD = [
    "a/b",
    "a_b",
    "a%2Fb",
    "../up",
    "/top",
    ".hidden",
    "..",
    "a//b",
    "a/",
    "é" * 300,
    "é" * 301,
    "x:y*?",
    "\x00",
    "",
    "\ud800",
]


def test_odd_and_long_names_stay_in_the_folder_and_apart(logger: CSVLogger, tmp_path: Path) -> None:
    for key in ODD:
        logger.log_text(key, repr(key), 1)
    found = media(tmp_path)
    assert len(found) == len(ODD)
    assert {(tmp_path / "run/v/media" / name).read_text() for name in found} == {repr(key) for key in ODD}
    assert "a/b_1.txt" in found
    assert all(len(os.fsencode(part)) <= 255 for name in found for part in name.split("/"))
    assert os.listdir(tmp_path) == ["run"]


def test_remote_folders_and_prefixes() -> None:
    logger = CSVLogger("memory://media-of-a-run", name="n", version=0, prefix="p")
    logger.log_image("red", CHW, 1)
    logger.log_text("said", "a")
    logger.log_text("said", "b")
    fs = fsspec.filesystem("memory")
    root = "/media-of-a-run/n/version_0/media/p-"
    assert fs.cat(f"{root}said-1.txt") == b"b"
    assert np.array_equal(pixels(io.BytesIO(fs.cat(f"{root}red_1.png"))), RED)


def test_tensorboard_shows_images_figures_and_texts(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="run", version="v", prefix="p")
    logger.log_image("red", CHW, 1)
    logger.log_image("two", [torch.ones(2, 3), np.full((2, 3, 4), 9, np.uint8)], 1)
    logger.log_figure("figure", figure(), 2)
    logger.log_text("said", "words", 3)
    logger.log_table("table", ["a", "b"], [[1, "x|y"]], step=4)
    Path("notes.txt").write_text("written")
    logger.log_file("notes.txt")
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir).Reload()
    assert sorted(events.Tags()["images"]) == ["p-figure", "p-red", "p-two/0", "p-two/1"]
    [image] = events.Images("p-red")
    assert image.step == 1
    assert np.array_equal(pixels(io.BytesIO(image.encoded_image_string)), RED)
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert texts["p-said/text_summary"] == "words"
    assert texts["p-table/text_summary"] == "| a | b |\n| --- | --- |\n| 1 | x\\|y |"
    assert media(tmp_path) == ["p-notes.txt"], "TensorBoard has no place for files"


class Own(Logger):
    """A logger of a user."""

    folder: str | None = None

    @property
    def name(self) -> str:
        return "own"

    @property
    def version(self) -> int:
        return 0

    @property
    def log_dir(self) -> str | None:
        return self.folder

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        return None

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        return None


def test_a_logger_of_ones_own_keeps_files_or_says_that_it_cannot(tmp_path: Path) -> None:
    own = Own()
    with pytest.warns(UserWarning, match="Own records numbers only, and has no folder for files: 'said'") as told:
        own.log_text("said", "words")
        own.log_image("red", CHW)
    assert len(told) == 1
    own.folder = str(tmp_path / "mine")
    own.log_text("said", "words", 1)
    assert (tmp_path / "mine/media/said_1.txt").read_text() == "words"


def test_other_ranks_and_the_dummy_do_nothing(logger: CSVLogger, tmp_path: Path) -> None:
    rank_zero_only.rank = 1
    logger.log_image("red", object())
    logger.log_text("said", "words")
    logger.log_file("nothing.txt")
    rank_zero_only.rank = 0
    with warnings.catch_warnings():
        DummyLogger().log_image("red", CHW)
    assert not os.listdir(tmp_path)
