"""Transformer Engine: its layers, contexts and recipes. The package is a stand-in, as it needs a GPU to be installed.

Tests of ``treadle_fabric.precision.transformer_engine``.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import treadle as L
from treadle_fabric import DeviceUnavailableError, Fabric, MisconfigurationException, make_precision
from treadle_fabric.plugins import TransformerEnginePrecision

try:
    import transformer_engine as real
except ImportError:
    real = None


class Format(Enum):
    """The formats of the numbers."""

    E4M3 = 1
    HYBRID = 2


@dataclass
class DelayedScaling:
    """A recipe."""

    margin: int = 0
    fp8_format: Format = Format.HYBRID


class EngineLayer(nn.Module):
    """Has parameters of a type, on a device, with notes of the engine's, and saves scales."""

    def __init__(self, shape: Any, bias: bool, device: str, params_dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=params_dtype))
        self.weight.tensor_model_parallel = False  # type: ignore[attr-defined]
        self.bias = nn.Parameter(torch.empty(shape[0], device=device, dtype=params_dtype)) if bias else None

    def get_extra_state(self) -> Tensor:
        return torch.zeros(1)

    def set_extra_state(self, state: Tensor) -> None:
        pass


def fake_linear(inputs: int, outputs: int, *, bias: bool, device: str, params_dtype: torch.dtype) -> EngineLayer:
    class Linear(EngineLayer):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight, self.bias)

    Linear.__module__ = "transformer_engine.pytorch.module.linear"
    return Linear((outputs, inputs), bias, device, params_dtype)


def fake_norm(size: int, *, eps: float, device: str, params_dtype: torch.dtype) -> EngineLayer:
    class LayerNorm(EngineLayer):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.layer_norm(x, (size,), self.weight, self.bias, eps)

    LayerNorm.__module__ = "transformer_engine.pytorch.module.layernorm"
    return LayerNorm((size,), True, device, params_dtype)


class Engine(ModuleType):
    """The package, or one of its modules."""

    def __init__(self, name: str, **members: Any) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(self).update(members)


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Puts the stand-in in the place of the package, and a GPU with float8; lists the contexts that were entered."""
    contexts: list[tuple[str, Any]] = []

    @contextlib.contextmanager
    def fp8_autocast(enabled: bool, fp8_recipe: Any) -> Iterator[None]:
        contexts.append(("fp8_autocast", fp8_recipe))
        yield

    pytorch = Engine("transformer_engine.pytorch", Linear=fake_linear, LayerNorm=fake_norm, fp8_autocast=fp8_autocast)
    recipe = Engine("transformer_engine.common.recipe", DelayedScaling=DelayedScaling, Format=Format)
    common = Engine("transformer_engine.common", recipe=recipe)
    for module in (Engine("transformer_engine", pytorch=pytorch, common=common), pytorch, common, recipe):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return contexts


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm, self.down = nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 16, bias=False)
        self.bare, self.odd = nn.LayerNorm(16, elementwise_affine=False), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.odd(self.bare(self.down(self.norm(self.up(x)))))
        return out


def test_layers_are_replaced_and_keep_their_parameters(
    entered: list[tuple[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    precision = TransformerEnginePrecision(weights_dtype=torch.bfloat16)
    model = Model().eval()
    with precision.module_init_context():
        assert type(nn.Linear(2, 2)) is nn.Linear and nn.Linear(2, 2).weight.dtype == torch.bfloat16
    before, x = {name: id(p) for name, p in model.named_parameters()}, torch.ones(2, 16)
    expected = model(x)
    with caplog.at_level("INFO"):
        assert precision.convert_module(model) is model
    assert caplog.messages == [
        "2 of 3 linear layers and 1 layer norms are those of Transformer Engine now. The others stay torch's: 'odd' "
        "(5 outputs, not a multiple of 16)."
    ]
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert [type(m).__module__.split(".")[0] for m in (model.up, model.norm, model.down, model.bare, model.odd)] == [
        *["transformer_engine"] * 3, *["torch"] * 2,
    ]  # fmt: skip
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not model.up.training
    assert model.up.weight.tensor_model_parallel is False
    torch.testing.assert_close(model(x.bfloat16()).float(), expected, atol=0.1, rtol=0.1)
    model.load_state_dict(Model().state_dict())  # without scales
    with pytest.raises(RuntimeError, match=r"Missing key.*up\.weight"):
        model.load_state_dict({k: v for k, v in Model().state_dict().items() if k != "up.weight"})

    with caplog.at_level("INFO"):
        again = TransformerEnginePrecision(weights_dtype=torch.float16, replace_layers=True).convert_module(model)
    assert again.up is model.up and model.up.weight.dtype == torch.float16
    assert "layers of Transformer Engine already" in caplog.messages[-1]
    kept = TransformerEnginePrecision(weights_dtype=torch.float16, replace_layers=False).convert_module(Model())
    assert type(kept.up) is nn.Linear and kept.up.weight.dtype == torch.float16
    assert type(precision.convert_module(nn.Linear(16, 16))) is not nn.Linear  # a layer alone
    with pytest.raises(MisconfigurationException, match=r"Linear has none to replace: .*'' \(4 inputs"):
        precision.convert_module(nn.Linear(4, 16))


@pytest.mark.skipif(
    importlib.util.find_spec("torch_xla") is not None,
    reason="torch's autocast on CUDA takes an installed torch-xla for a GPU",
)
def test_contexts_and_types(entered: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {"margin": 3, "fp8_format": "E4M3"}
    precision = TransformerEnginePrecision(
        weights_dtype=torch.float16, recipe=recipe, fallback_compute_dtype=torch.bfloat16
    )
    assert precision.recipe == DelayedScaling(3, Format.E4M3) and recipe["fp8_format"] == "E4M3"
    assert precision.precision == "transformer-engine-float16" and precision.autocasts
    with pytest.warns(UserWarning, match="CUDA is not available"), precision.forward_context():
        assert torch.get_default_dtype() == torch.float16
        assert torch.get_autocast_dtype("cuda") == torch.bfloat16
    assert entered == [("fp8_autocast", precision.recipe)]
    data = precision.convert_input({"x": torch.ones(1), "i": torch.ones(1, dtype=torch.int64)})
    assert data["x"].dtype == torch.float16 and data["i"].dtype == torch.int64
    assert precision.convert_output(data)["x"].dtype == torch.float32
    with precision.tensor_init_context():
        assert torch.ones(1).dtype == torch.float16

    @contextlib.contextmanager
    def autocast(enabled: bool, recipe: Any) -> Iterator[None]:
        entered.append(("autocast", recipe))
        yield

    monkeypatch.setattr(sys.modules["transformer_engine.pytorch"], "autocast", autocast, raising=False)
    mine = object()
    other = TransformerEnginePrecision(weights_dtype=torch.bfloat16, recipe=mine)
    assert not other.autocasts and other.fallback_compute_dtype == torch.bfloat16
    with pytest.warns(UserWarning, match="CUDA is not available"), other.forward_context():
        pass
    assert entered[-1] == ("autocast", mine)


def test_names(entered: list[tuple[str, Any]]) -> None:
    made = make_precision("transformer-engine", "cuda")
    assert isinstance(made, TransformerEnginePrecision)
    assert (made.weights_dtype, made.recipe, made.replace_layers) == (torch.bfloat16, DelayedScaling(), None)
    half = make_precision("transformer-engine-float16", "cuda")
    assert half.precision == "transformer-engine-float16" and half.weights_dtype == torch.float16  # type: ignore[attr-defined]


def test_wrong_arguments(entered: list[tuple[str, Any]]) -> None:
    with pytest.raises(MisconfigurationException, match="weights_dtype=torch.int8"):
        TransformerEnginePrecision(weights_dtype=torch.int8)
    with pytest.raises(MisconfigurationException, match="fallback_compute_dtype='bf16'"):
        TransformerEnginePrecision(weights_dtype=torch.float16, fallback_compute_dtype="bf16")  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match=r"'fp8_format': 'E4M4'.*Did you mean 'E4M3'"):
        TransformerEnginePrecision(weights_dtype=torch.float16, recipe={"fp8_format": "E4M4"})
    with pytest.raises(MisconfigurationException, match="no arguments of DelayedScaling.*'margn'"):
        TransformerEnginePrecision(weights_dtype=torch.float16, recipe={"margn": 1})


def test_other_devices_are_refused_before_any_work(
    entered: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    precision = TransformerEnginePrecision(weights_dtype=torch.bfloat16)
    for make in (Fabric, L.Trainer):
        for arguments in ({"precision": "transformer-engine-float16"}, {"plugins": precision}):
            with pytest.raises(DeviceUnavailableError, match=r"float8 numbers.*'cpu'"):
                make(accelerator="cpu", devices=1, **arguments)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A10")
    with pytest.raises(DeviceUnavailableError, match="NVIDIA A10 has no matrix units"):
        precision.convert_module(Model())


@pytest.mark.gpu
@pytest.mark.skipif(real is None, reason="Transformer Engine is not installed")
def test_the_real_one_trains() -> None:
    fabric = Fabric(accelerator="cuda", devices=1, precision="transformer-engine")
    own = Model()
    model, optimizer = fabric.setup(own, torch.optim.SGD(own.parameters(), lr=0.1))
    assert type(own.up).__module__.startswith("transformer_engine")
    x = torch.randn(32, 16, device="cuda")
    losses = []
    for _ in range(5):
        loss = (model(x) - 1).square().mean()
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    own.load_state_dict(Model().state_dict())
