"""Modules as programs of other libraries: ONNX, torch.export, and what is refused.

Tests of ``treadle.module.export``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.models import Net, loader, trainer
from torch import Tensor, nn

from treadle import LightningModule
from treadle_fabric import MisconfigurationException


class Scaled(Net):
    """Takes a keyword argument, has a part in evaluation mode, and logs in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.frozen = nn.Dropout(0.5), nn.BatchNorm1d(4).eval()

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.layer(self.dropout(self.frozen(x)))
        self.log("mean", y.mean(), on_step=True, on_epoch=True)
        return y if scale is None else y * scale


def test_an_onnx_file_computes_what_the_module_does_in_evaluation_mode(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="an extra: treadle[export]")
    reference = pytest.importorskip("onnx.reference")
    model, path = Scaled(), tmp_path / "net.onnx"
    exported: list[Any] = []

    class Exports(Scaled):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if not batch_idx:  # in a run, with a logger's slots behind `self.log`
                exported.append(self.to_onnx(path))

    model = Exports()
    model.example_input_array = {"x": torch.randn(2, 4), "scale": torch.tensor(3.0)}
    exported_weights = {name: value.clone() for name, value in model.state_dict().items()}
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    run.fit(model, loader())
    assert model.training and model.dropout.training and not model.frozen.training
    assert isinstance(exported[0], torch.onnx.ONNXProgram)
    assert type(run.callback_metrics["mean_epoch"]) is Tensor and {*run.callback_metrics} >= {"mean_step", "train_loss"}
    model.load_state_dict(exported_weights)  # a step has changed them since
    x = torch.randn(2, 4)
    inputs = {"x": x.numpy(), "scale": torch.tensor(2.0).numpy()}
    (found,) = reference.ReferenceEvaluator(str(path)).run(None, inputs)
    model.eval()
    with torch.no_grad(), pytest.warns(UserWarning, match="outside a run"):
        torch.testing.assert_close(torch.from_numpy(found), model(x, torch.tensor(2.0)))


def test_without_an_input_or_the_package_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MisconfigurationException, match="example_input_array"):
        Net().to_onnx("net.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install treadle\[export\]"):
        Net().to_onnx("net.onnx", torch.randn(2, 4))


class Step(nn.Module):
    """A step as a module of its own."""

    def __init__(self, module: LightningModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Tensor) -> Any:
        return self.module.training_step(batch, 0)


@pytest.mark.parametrize("attached", [False, True])
def test_torch_export_takes_modules_and_steps_that_log(attached: bool, tmp_path: Path) -> None:
    model = Net()
    if attached:
        trainer(tmp_path, limit_val_batches=0).fit(model, loader())
    x = torch.randn(2, 4)
    for strict in (False, True):
        program = torch.export.export(model, (x,), strict=strict)
        assert torch.equal(program.module()(x), model(x))
    step = torch.export.export(Step(model), (x,), strict=False)
    assert torch.equal(step.module()(x), model.loss(x))


@pytest.mark.filterwarnings("ignore:.torch.jit.load. is deprecated")
@pytest.mark.parametrize("method", ["script", "trace"])
def test_torchscript(method: str, tmp_path: Path) -> None:
    model, x = Net(), torch.randn(2, 4)
    model.example_input_array = None if method == "script" else x
    compiled = model.to_torchscript(tmp_path / "net.pt", method)
    assert model.training and model._trainer is None
    for program in (compiled, torch.jit.load(tmp_path / "net.pt")):  # type: ignore[no-untyped-call]
        assert torch.equal(program(x), model(x))
    with pytest.raises(ValueError, match="'script' or 'trace'"):
        model.to_torchscript(method="onnx")
    model.example_input_array = None
    with pytest.raises(ValueError, match="needs an input"):
        model.to_torchscript(method="trace")


def test_what_is_refused_names_what_takes_its_place(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="torch_tensorrt"):
        Net().to_tensorrt()
    with pytest.raises(MisconfigurationException, match="`configure_model`"):
        Net().configure_sharded_model()

    class Old(Net):
        def configure_sharded_model(self) -> None:  # type: ignore[override]
            pass

    with pytest.raises(MisconfigurationException, match=r"Old\.configure_sharded_model.*`configure_model`"):
        trainer(tmp_path).fit(Old(), loader())
