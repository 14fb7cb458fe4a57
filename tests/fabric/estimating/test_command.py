"""The command ``treadle-fabric estimate``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from treadle_fabric.cli import main

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    tensor_parallel_plan = {"up": "colwise", "down": "rowwise"}

    def __init__(self, width=32):
        super().__init__()
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, x):
        return self.down(self.up(x).relu())

batch = torch.zeros(4, 8)
wrong = torch.zeros(4, 9)
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"model_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def _arguments(model: str, *more: str) -> list[str]:
    return ["estimate", f"{model}.Net", "--batch", f"{model}:batch", "--optimizer", "SGD", "--devices", "4", *more]


def test_layouts_are_compared(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--strategies", "single_device,ddp,tensor_2", "--memory", "1GiB", "--init-args", '{"width": 64}')
    assert main(_arguments(model, *more)) == 0
    said = capsys.readouterr().out
    assert "1,096 parameters" in said
    assert [line.split()[0] for line in said.splitlines()[4:]] == ["single_device", "ddp", "tensor_2"]
    assert said.count("yes") == 3


def test_json_and_a_device_that_is_too_small(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_arguments(model, "--strategies", "ddp,deepspeed_stage_2", "--memory", "1KiB", "--json")) == 1
    ddp, zero = json.loads(capsys.readouterr().out)
    assert ddp["fits"] is False and ddp["traffic"]["all_reduce"]["payload"] == ddp["memory"]["parameters"]
    assert zero["memory"]["gradients"] < ddp["memory"]["gradients"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--memory", "much"), "no size"),
        (("--strategies", "ddp,fspd"), "'fspd' is unknown"),
        (("--init-args", "{width"), "no JSON"),
        (("--loss", "nowhere:loss"), "no module 'nowhere'"),
        (("--optimizer", "Adamm"), "no such class"),
        (("--num-nodes", "3"), "same number of ranks"),
        (("--init-args", '{"widht": 3}'), "unexpected keyword argument 'widht'"),
        (("--batch", "{model}:wrong"), "must have same reduction dim"),
    ],
)
def test_a_wrong_question_is_refused(
    model: str, more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_arguments(model, *(each.replace("{model}", model) for each in more))) == 2
    assert message in capsys.readouterr().err
