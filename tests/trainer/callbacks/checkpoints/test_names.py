from __future__ import annotations

import os

import pytest
import torch

from treadle.callbacks import ModelCheckpoint
from treadle_fabric.errors import MisconfigurationException


def name(template: str | None, metrics: dict[str, object], **arguments: object) -> str:
    return ModelCheckpoint(filename=template, **arguments).format_checkpoint_name(metrics)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("template", "metrics", "expected"),
    [
        (None, {"epoch": 1, "step": 5}, "epoch=1-step=5.ckpt"),
        ("", {"epoch": 1, "step": 5}, "epoch=1-step=5.ckpt"),
        ("model", {}, "model.ckpt"),
        (
            "m-{epoch:02d}-{val_loss:.2f}",
            {"epoch": 1, "val_loss": torch.tensor(0.1234)},
            "m-epoch=01-val_loss=0.12.ckpt",
        ),
        ("{epoch}-{epoch_num}-{e}", {"epoch": 1, "epoch_num": 3, "e": 4}, "epoch=1-epoch_num=3-e=4.ckpt"),
        ("{val/loss:.2f}", {"val/loss": 0.1234}, "val/loss=0.12.ckpt"),
        ("{acc@1:.2f} {top 5}", {"acc@1": torch.tensor(3.0), "top 5": 1.0}, "acc@1=3.00 top 5=1.0.ckpt"),
        ("{val_loss:.2f}-{acc}", {"val_loss": float("nan"), "acc": float("inf")}, "val_loss=nan-acc=inf.ckpt"),
        ("{step:>6}", {"step": torch.tensor(3)}, "step=     3.ckpt"),
        ("{acc:d}", {"acc": 2.6}, "acc=3.ckpt"),
    ],
)
def test_fields_take_the_values_of_metrics(template: str | None, metrics: dict[str, object], expected: str) -> None:
    assert name(template, metrics) == expected


def test_names_can_be_left_out() -> None:
    found = name("e={epoch}-v={val/loss:.2f}", {"epoch": 1, "val/loss": 0.1234}, auto_insert_metric_name=False)
    assert found == "e=1-v=0.12.ckpt"


def test_a_missing_metric_counts_as_zero_and_is_reported_with_near_names() -> None:
    with pytest.warns(UserWarning, match=r"'val_los'.*Did you mean 'val_loss'"):
        assert name("{val_los:.3f}", {"val_loss": 1.0}) == "val_los=0.000.ckpt"


@pytest.mark.parametrize("template", ["{}x", "{{epoch}}", "{epoch", "epoch}", "{epoch:02q}"])
def test_an_impossible_template_is_refused_at_once(template: str) -> None:
    with pytest.raises(MisconfigurationException, match="file name"):
        ModelCheckpoint(filename=template)


def test_folder_version_prefix_and_characters() -> None:
    checkpoint = ModelCheckpoint(dirpath="here", filename="{epoch}")
    folder = os.path.realpath("here")
    assert checkpoint.format_checkpoint_name({"epoch": 1}, ver=2) == f"{folder}/epoch=1-v2.ckpt"
    assert checkpoint.format_checkpoint_name({"epoch": 1}, "{epoch}.x", 3, "pre") == f"{folder}/pre-epoch=1.x-v3.ckpt"

    class Dotted(ModelCheckpoint):
        CHECKPOINT_JOIN_CHAR = "."
        CHECKPOINT_EQUALS_CHAR = "_"
        FILE_EXTENSION = ".pt"

    assert Dotted().format_checkpoint_name({"epoch": 1, "step": 2}, ver=1) == "epoch_1.step_2.v1.pt"
