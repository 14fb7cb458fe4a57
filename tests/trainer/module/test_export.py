"""Modules as programs of other libraries: ONNX, TorchScript, TensorRT and torch.export.

Tests of ``treadle.module.export``.
"""

from __future__ import annotations

import sys
import warnings
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.trainer.models import Net, loader, trainer
from torch import Tensor, nn

from treadle import LightningModule
from treadle_fabric import MisconfigurationException

pytestmark = pytest.mark.filterwarnings("ignore:Found 1 module")  # `Scaled` has one in evaluation mode


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


@pytest.mark.parametrize("method", ["script", "trace"])
@pytest.mark.parametrize("attached", [False, True])
def test_torchscript_computes_what_the_module_does_in_evaluation_mode(
    method: str, attached: bool, tmp_path: Path
) -> None:
    class Plain(Scaled):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.layer(self.dropout(self.frozen(x)))

    model, x = Plain(), torch.randn(2, 4)
    model.save_hyperparameters({"width": 4})
    if attached:
        trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(model, loader())
    model.train()
    model.frozen.eval()
    model.example_input_array = torch.randn(3, 4)
    compiled = model.to_torchscript(tmp_path / "net.pt", method)
    assert model.training and model.dropout.training and not model.frozen.training
    assert isinstance(compiled, torch.jit.ScriptModule)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.load", DeprecationWarning)  # of newer releases of torch
        loaded = torch.jit.load(tmp_path / "net.pt")
    for found in (compiled, loaded):
        assert torch.equal(found(x), model.eval()(x))


def test_torchscript_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="'script' or 'trace'"):
        Net().to_torchscript(method="torch")
    with pytest.raises(ValueError, match="example_input_array"):
        Net().to_torchscript(method="trace")


def test_tensorrt_needs_its_package_and_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"pip install treadle\[tensorrt\]"):
        Net().to_tensorrt("net.ep", torch.randn(2, 4))
    package: Any = ModuleType("torch_tensorrt")  # which compiles for CUDA devices only
    package.__spec__ = ModuleSpec("torch_tensorrt", None)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", package)
    with pytest.raises(MisconfigurationException, match="CUDA"):
        Net().to_tensorrt("net.ep", torch.randn(2, 4), default_device="cpu")


def test_the_old_name_of_configure_model_is_called_and_told(tmp_path: Path) -> None:
    class Old(Net):
        def configure_sharded_model(self) -> None:
            self.added = nn.Linear(2, 2)

    with pytest.warns(DeprecationWarning, match=r"Old\.configure_sharded_model.*`configure_model`"):
        trainer(tmp_path, max_steps=1).fit(model := Old(), loader())
    assert "added.weight" in model.state_dict()

    class Both(Old):
        def configure_model(self) -> None:
            pass

    with pytest.raises(MisconfigurationException, match=r"configure_sharded_model.*never called"):
        trainer(tmp_path).fit(Both(), loader())
