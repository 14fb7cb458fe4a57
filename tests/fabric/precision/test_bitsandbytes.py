"""Quantized layers of bitsandbytes, on the CPU: what is replaced, its numbers, its states and its training.

Tests of ``treadle_fabric.precision.bitsandbytes``, ``treadle_fabric.precision.quantized``.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import run_in_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader

import treadle as L
from treadle_fabric import DeviceUnavailableError, Fabric, MisconfigurationException
from treadle_fabric.plugins import BitsandbytesPrecision

# Each test in a process of its own: bitsandbytes has optimizers with the names of torch's, which a command line in this
# process could not tell apart.
pytestmark = [
    pytest.mark.apart,
    pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"),
]

MODES: dict[Any, tuple[torch.dtype, float]] = {  # the type of what is kept, and the largest error of an output
    "nf4": (torch.uint8, 0.25),
    "nf4-dq": (torch.uint8, 0.25),
    "fp4": (torch.uint8, 0.3),
    "fp4-dq": (torch.uint8, 0.3),
    "int8": (torch.int8, 0.02),
    "int8-training": (torch.float16, 0.02),
}
ON_THE_CPU = [mode for mode in MODES if mode != "int8-training"]


class Model(nn.Module):
    """Two large layers, an adapter, and a head that shares its weight with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, 64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)
        self.adapter = nn.Sequential(nn.Linear(64, 4, bias=False), nn.Linear(4, 64, bias=False))
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.norm(x + self.down(self.up(x).relu()) + self.adapter(x))
        out: Tensor = self.head(x)
        return out


def bitsandbytes_layers() -> Any:
    with warnings.catch_warnings():  # torch's own
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module("bitsandbytes").nn


def fabric(mode: Any, **kwargs: Any) -> Fabric:
    return Fabric(accelerator="cpu", devices=1, plugins=BitsandbytesPrecision(mode, **kwargs))


TOKENS = torch.arange(30).reshape(3, 10)


@pytest.mark.parametrize("mode", ON_THE_CPU)
def test_layers_are_quantized_and_their_states_come_back(
    mode: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept, error = MODES[mode]
    full = Model().eval()
    expected = full(TOKENS)
    run = fabric(mode, ignore_modules={"adapter"})
    own = copy.deepcopy(full)
    with caplog.at_level("INFO"):
        model = run.setup_module(own)
    half = "float16" if mode.startswith("int8") else "bfloat16"
    assert caplog.messages[-1] == (
        f"2 of 5 linear layers are quantized ({mode}), and their weights are not trained. The others stay in {half}: "
        "'adapter.0' (ignored), 'adapter.1' (ignored), 'head' (shares its weight with another layer)."
    )
    kinds = bitsandbytes_layers().Linear8bitLt if mode.startswith("int8") else bitsandbytes_layers().Linear4bit
    assert isinstance(own.up, kinds) and isinstance(own.down, kinds)
    assert own.up.weight.dtype == kept and not own.up.weight.requires_grad
    assert own.head.weight is own.embed.weight and own.norm.weight.dtype == getattr(torch, half)
    with torch.no_grad():
        output = model(TOKENS)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected, atol=error * expected.abs().max().item(), rtol=0)
    run.setup_module(copy.deepcopy(own))  # set up again: quantized already
    assert type(pickle.loads(pickle.dumps(own.up))) is type(own.up)

    run.save(tmp_path / "quantized.ckpt", {"model": model})
    run.save(tmp_path / "full.ckpt", {"model": full})
    with run.init_module():
        other = Model()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
    early = copy.deepcopy(other)
    other = run.setup_module(other.eval())
    with torch.no_grad():
        other(TOKENS)
        for name in ("quantized.ckpt", "full.ckpt"):
            run.load(tmp_path / name, {"model": other})
            torch.testing.assert_close(other(TOKENS), output, atol=0.02 if name == "full.ckpt" else 0, rtol=0)
    # into layers that have not reached their device
    early = run.strategy.precision.convert_module(early.eval())
    early.load_state_dict(copy.deepcopy(own.state_dict()))
    with torch.no_grad():
        assert torch.equal(run.setup_module(early)(TOKENS), output)
    wrong = {**full.state_dict(), "up.weight": torch.zeros(3, 3)}
    with pytest.raises(RuntimeError, match=r"size mismatch for up\.weight"):
        own.load_state_dict(wrong)
    with pytest.raises(RuntimeError, match=r"Missing key.*up\.weight"):
        own.load_state_dict({k: v for k, v in full.state_dict().items() if not k.startswith("up.weight")})


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_adapters_are_trained_beside_quantized_layers(mode: Any) -> None:
    run = fabric(mode, ignore_modules={"adapter"})
    own = Model().requires_grad_(False)
    own.adapter.requires_grad_(True)
    model = run.setup_module(own)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2
    optimizer = run.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.5))
    before = copy.deepcopy(own.state_dict())
    losses = []
    for _ in range(4):
        loss = nn.functional.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.roll(1).flatten())
        run.backward(loss)
        run.clip_gradients(model, optimizer, max_norm=10.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {name for name, value in own.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"adapter.0.weight", "adapter.1.weight"}


def test_int8_training_needs_a_gpu_and_trains_the_weights() -> None:
    precision = BitsandbytesPrecision("int8-training")
    for make in (Fabric, L.Trainer):
        with pytest.raises(DeviceUnavailableError, match="'int8-training'.* needs a GPU"):
            make(accelerator="cpu", plugins=precision)
    own = Model()
    own.down.requires_grad_(False)
    own = precision.convert_module(own)
    assert (
        isinstance(own.up, bitsandbytes_layers().Linear8bitLt)
        and own.up.weight.requires_grad
        and own.up.bias.requires_grad
    )
    assert own.up.weight.dtype == torch.float16 and not own.down.weight.requires_grad
    own.load_state_dict(Model().state_dict())


def test_an_optimizer_of_replaced_parameters_is_refused() -> None:
    run, own = fabric("nf4"), Model()
    with pytest.raises(MisconfigurationException, match=r"SGD holds 4 parameter\(s\) that BitsandbytesPrecision"):
        run.setup(own, torch.optim.SGD(own.parameters()))
    own = Model()
    run.setup(own, torch.optim.SGD(own.norm.parameters()))


def test_new_modules_are_in_the_hosts_memory() -> None:
    run = fabric("nf4")
    precision = run.strategy.precision
    with torch.device("meta"), precision.module_init_context():
        model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert model[1].running_mean.dtype == torch.bfloat16 and model[1].num_batches_tracked.dtype == torch.int64
    with run.init_module(empty_init=True):
        model = nn.Linear(64, 8)
    made = run.setup_module(model).module
    assert isinstance(made, bitsandbytes_layers().Linear4bit) and made.weight.dtype == torch.uint8


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Model().requires_grad_(False)
        self.net.adapter.requires_grad_(True)
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch).float(), batch.roll(1).flatten())
        self.losses.append(loss.item())
        return loss

    def predict_step(self, batch: Tensor) -> Tensor:
        logits: Tensor = self.net(batch)
        return logits

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


def fit(mode: Any, module: Module, steps: int, **kwargs: Any) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
        plugins=BitsandbytesPrecision(mode, ignore_modules=["net.adapter"]),
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.arange(60) % 40, batch_size=10), **kwargs)  # type: ignore[arg-type]
    return trainer


@pytest.mark.parametrize("mode", ["nf4-dq", "int8"])
def test_the_trainer_resumes_to_the_last_bit(mode: Any, tmp_path: Path) -> None:
    whole, first, second = Module(), Module(), Module()
    fit(mode, whole, 6)
    fit(mode, first, 3).save_checkpoint(tmp_path / "half.ckpt")
    with torch.no_grad():
        second.net.up.weight.zero_()
    fit(mode, second, 6, ckpt_path=tmp_path / "half.ckpt")
    assert first.losses + second.losses == whole.losses
    assert whole.losses[-1] < whole.losses[0]


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_weights_that_nobody_froze_are_saved_after_a_prediction_and_resumed(mode: Any, tmp_path: Path) -> None:
    first, second = Module(), Module()
    first.net.requires_grad_(True)
    second.net.requires_grad_(True)  # the quantized ones cannot be
    trainer = fit(mode, first, 3)
    trainer.predict(first, DataLoader(torch.arange(20), batch_size=10))  # type: ignore[arg-type] # packs them anew on some CPUs
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    fit(mode, second, 6, ckpt_path=tmp_path / "half.ckpt")
    assert len(second.losses) == 3
    for name, tensor in second.state_dict().items():
        if name == "net.up.weight":
            torch.testing.assert_close(tensor, first.state_dict()[name], rtol=0, atol=0)


def in_two_processes() -> None:
    run = Fabric(
        accelerator="cpu", devices=2, strategy="ddp", plugins=BitsandbytesPrecision("nf4", ignore_modules="adapter")
    )
    run.launch()
    own = Model().requires_grad_(False)
    own.adapter.requires_grad_(True)
    model = run.setup_module(own)
    optimizer = run.setup_optimizers(torch.optim.SGD(own.adapter.parameters(), lr=0.5))
    for _ in range(2):
        loss = nn.functional.cross_entropy(model(TOKENS + run.global_rank).flatten(0, 1), TOKENS.flatten())
        run.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    weights = torch.cat([p.detach().float().flatten() for p in own.adapter.parameters()])
    assert torch.equal(run.all_reduce(weights, reduce_op="max"), weights)
    assert not torch.equal(
        weights, torch.cat([p.detach().bfloat16().float().flatten() for p in Model().adapter.parameters()])
    )


def test_adapters_under_ddp() -> None:
    run_in_ranks(in_two_processes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "nf5"}, "mode='nf5'.*'nf4'"),
        ({"mode": "int8", "dtype": torch.bfloat16}, "dtype=torch.bfloat16.*compute with torch.float16"),
        ({"mode": "nf4", "dtype": torch.int8}, "dtype=torch.int8.*must be one of"),
        ({"mode": "nf4", "ignore_modules": [1]}, "has 1, and takes names"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        BitsandbytesPrecision(**arguments)


def test_a_name_and_a_model_that_have_nothing_to_quantize() -> None:
    for make in (Fabric, L.Trainer):
        with pytest.raises(MisconfigurationException, match=r"plugins=BitsandbytesPrecision\('nf4-dq'\)"):
            make(accelerator="cpu", precision="nf4-dq")
    with pytest.raises(MisconfigurationException, match="Conv1d has none to replace"):
        fabric("nf4").setup(nn.Conv1d(1, 1, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_on_a_gpu(mode: Any) -> None:
    kept, error = MODES[mode]
    full = Model().cuda().eval()
    run = Fabric(accelerator="cuda", devices=1, plugins=BitsandbytesPrecision(mode))
    with run.init_module(), torch.no_grad():
        model = Model()
        assert model.up.weight.device.type == "cpu"
    model = run.setup_module(model.eval())
    assert model.up.weight.dtype == kept and model.up.weight.device.type == "cuda"
    expected, output = full(TOKENS.cuda()), model(TOKENS.cuda())
    torch.testing.assert_close(output, expected, atol=2 * error * expected.abs().max().item(), rtol=0)
    state = copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    assert torch.equal(model(TOKENS.cuda()), output)
