"""A precision casts real floating-point numbers; complex, whole and quantized numbers stay what they are.

Tests of ``treadle_fabric.precision.precision``, ``treadle_fabric.precision.half``,
``treadle_fabric.precision.double``.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.models import Net as Lit
from tests.trainer.models import loader, trainer
from torch import Tensor, nn
from torchmetrics import MeanMetric

from treadle_fabric import Fabric, MisconfigurationException

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")

PRECISIONS = ["32-true", "64-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed"]
WEIGHTS = {"64-true": torch.float64, "16-true": torch.float16, "bf16-true": torch.bfloat16}
INPUTS = {**WEIGHTS, "16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
HALVES = ["16-true", "bf16-true"]


def fabric(precision: str) -> Fabric:
    return Fabric(accelerator="cpu", devices=1, precision=precision)


def others() -> dict[str, Tensor]:
    """Tensors that no precision changes."""
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized tensors are on their way out of torch
        quantized = torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
    whole = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.bool]
    return {
        **{str(dtype).removeprefix("torch."): torch.arange(3).to(dtype) for dtype in whole},
        "complex64": torch.complex(x, x + 0.1),
        "complex128": torch.complex(x, x + 0.1).to(torch.complex128),
        "sparse_complex": torch.complex(x, x).to_sparse(),
        "quantized": quantized,
        "float8": x.to(torch.float8_e4m3fn),
        "float8_scale": x.to(torch.float8_e8m0fnu),
        "float4": torch.arange(3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "mkldnn": x.to_mkldnn(),
    }


def reals() -> dict[str, Tensor]:
    """Tensors that are cast, and remain of their layout."""
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float32)
    return {
        "single_numbers": x,
        "double_numbers": x.double(),
        "coo_numbers": x.to_sparse(),
        "csr_numbers": x.to_sparse_csr(),
    }


def same(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.layout != b.layout:
        return False
    if a.layout is not torch.strided:
        return torch.equal(a.to_dense(), b.to_dense())
    if a.is_quantized:
        return torch.equal(a.int_repr(), b.int_repr())
    if a.is_floating_point():
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    return torch.equal(a, b)


class Holder(nn.Module):
    """Has every kind of buffer, a complex parameter, and a forward that returns what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.phase = nn.Parameter(torch.tensor([1.5 + 2.5j], dtype=torch.complex64))
        self.steps = nn.Parameter(torch.tensor([1, 2]), requires_grad=False)
        for name, tensor in {**others(), **reals()}.items():
            self.register_buffer(name, tensor)

    def forward(self, given: Any) -> Any:
        self.seen = given
        return given


@pytest.mark.parametrize("precision", PRECISIONS)
def test_parameters_and_buffers(precision: str) -> None:
    model: Any = fabric(precision).setup(Holder())
    for name, tensor in others().items():
        assert same(getattr(model, name), tensor), name
    assert model.phase.dtype == torch.complex64
    assert model.phase.item() == 1.5 + 2.5j
    assert model.steps.tolist() == [1, 2]
    assert model.steps.dtype == torch.int64
    for name, tensor in reals().items():
        its = getattr(model, name)
        assert its.dtype == WEIGHTS.get(precision, tensor.dtype), name
        assert its.layout == tensor.layout
    assert model.layer.weight.dtype == WEIGHTS.get(precision, torch.float32)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_inputs_and_outputs(precision: str) -> None:
    model: Any = fabric(precision).setup(Holder())
    given = {"others": others(), "reals": [reals()], "n": 3}
    returned = model(given)
    for batch in (model.seen, returned):
        for name, tensor in others().items():
            assert same(batch["others"][name], tensor), name
        assert batch["n"] == 3
    for name, tensor in reals().items():
        assert model.seen["reals"][0][name].dtype == INPUTS.get(precision, tensor.dtype), name
        assert returned["reals"][0][name].dtype == (tensor.dtype if precision == "32-true" else torch.float32), name


@pytest.mark.parametrize("precision", PRECISIONS)
def test_modules_and_tensors_made_in_the_precision(precision: str) -> None:
    run = fabric(precision)
    with run.init_module():
        model: Any = Holder()
        made = {"list": torch.tensor([1 + 2j]), "as": torch.as_tensor([0.3j]), "array": torch.asarray([0.3j])}
        made["complex"] = torch.complex(torch.ones(1), torch.ones(1))
        made["polar"] = torch.polar(torch.ones(1), torch.ones(1))
        made["full"] = torch.full((2,), 1j)
        real = torch.tensor([1.0])
    for name, tensor in others().items():
        if "complex" not in name and name != "mkldnn":
            assert same(getattr(model, name), tensor), name
    assert model.phase.dtype == torch.complex64
    assert model.complex128.dtype == torch.complex128
    expected = torch.complex128 if precision == "64-true" else torch.complex64
    assert {name: t.dtype for name, t in made.items()} == dict.fromkeys(made, expected)
    assert real.dtype == WEIGHTS.get(precision, torch.float32)
    with run.init_tensor():
        assert torch.tensor([1 + 2j]).tolist() == [1 + 2j]
        assert torch.tensor([1 + 2j]).dtype == expected
        assert torch.tensor([1 + 2j], dtype=torch.complex128).dtype == torch.complex128
        assert torch.tensor([1]).dtype == torch.int64
        assert torch.tensor([1.0]).dtype == WEIGHTS.get(precision, torch.float32)
    assert torch.tensor([1j]).dtype == torch.complex64
    assert torch.tensor([1.0]).dtype == torch.float32


class Rotary(Lit):
    """Rotates by complex numbers, as in many language models."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(2), torch.tensor([0.3, 0.7]))
        self.register_buffer("rotation", torch.polar(torch.ones_like(angles), angles))
        self.seen: set[torch.dtype] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add(self.rotation.dtype)
        rotated = torch.view_as_complex(x.float().reshape(-1, 2, 2)) * self.rotation
        return super().forward(torch.view_as_real(rotated).reshape(-1, 4).to(x.dtype))


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_complex_buffers_under_the_trainer(precision: str, tmp_path: Path) -> None:
    model = Rotary()
    rotation = model.rotation.clone()
    run = trainer(tmp_path, precision=precision)
    run.fit(model, loader(), loader())
    assert model.seen == {torch.complex64}
    assert torch.equal(model.rotation, rotation)
    assert rotation.imag.any()
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(torch.load(tmp_path / "a.ckpt")["state_dict"]["rotation"], rotation)
    other = Rotary()
    other.rotation.zero_()
    trainer(tmp_path, precision=precision, max_epochs=2).fit(other, loader(), ckpt_path=tmp_path / "a.ckpt")
    assert torch.equal(other.rotation, rotation)


def test_complex_parameters_and_scaled_gradients_are_refused_by_name() -> None:
    """Torch's own error, at the first step, is that a function is "not implemented for 'ComplexFloat'"."""
    model = Holder()
    with pytest.raises(MisconfigurationException, match=r"SGD has complex parameters.*'16-mixed'.*'bf16-mixed'"):
        fabric("16-mixed").setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model.phase.requires_grad_(False)
    fabric("16-mixed").setup(model, torch.optim.SGD([model.layer.weight, model.phase], lr=0.1))


@pytest.mark.parametrize("precision", HALVES)
def test_the_gradient_of_a_complex_parameter(precision: str) -> None:
    class Wave(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.amplitude = nn.Parameter(torch.tensor([1 + 1j]))

        def forward(self, x: Tensor) -> Tensor:
            return (self.amplitude * x).abs().square()

    run, wave = fabric(precision), Wave()
    model, optimizer = run.setup(wave, torch.optim.SGD(wave.parameters(), lr=0.25))
    run.backward(model(torch.ones(1)).sum())
    optimizer.step()
    assert model.amplitude.item() == pytest.approx(0.5 + 0.5j)


class Counting(Lit):
    """With a metric that was made with the module, before the run."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.counted = MeanMetric(), 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for _ in range(100):
            self.counted += 1
            self.mean.update(self.counted)
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("precision", HALVES)
def test_states_of_metrics_do_not_sum_up_in_half_precision(precision: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, precision=precision, max_epochs=1)
    run.fit(module := Counting(), loader())
    assert module.counted == 400 and module.mean.mean_value.dtype == torch.float32
    assert run.callback_metrics["mean"] == 200.5
