"""Float8 training with torchao, emulated on the CPU: what is converted, its numbers, and its checkpoints.

Tests of ``treadle_fabric.precision.float8``, ``treadle_fabric.precision.layers``.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.fsdp
import torch.distributed.tensor
from tests.processes import run_in_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader

import treadle as L
from treadle_fabric import DeviceUnavailableError, Fabric, MisconfigurationException, Precision, make_precision
from treadle_fabric.measuring.peak_rates import compute_dtype
from treadle_fabric.plugins import Float8Precision, HalfPrecision
from treadle_fabric.strategies import FSDPStrategy

float8 = pytest.importorskip("torchao.float8")
from torchao.float8.float8_linear import Float8Linear  # noqa: E402 # after the question whether it is there


class Language(nn.Module):
    """Embedding, a frozen layer, a block, and a head that shares its weight with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(48, 32)
        self.frozen = nn.Linear(32, 32).requires_grad_(False)
        self.block = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.LayerNorm(32))
        self.narrow = nn.Linear(32, 1)
        self.head = nn.Linear(32, 48, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.block(self.frozen(x) * self.scale)
        out: Tensor = self.head(x) * torch.sigmoid(self.narrow(x))
        return out


def batches(number: int = 6, size: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 48, (size, 9), generator=generator) for _ in range(number)]


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(tokens[:, :-1]).float().flatten(0, 1), tokens[:, 1:].flatten())


def groups(model: nn.Module) -> list[dict[str, Any]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in trained if p.ndim > 1]}, {"params": [p for p in trained if p.ndim < 2], "lr": 0.02}]


def train(fabric: Fabric, data: list[Tensor], accumulate: int = 2) -> tuple[list[float], nn.Module]:
    """Losses of a loop with accumulation, clipping, two groups and a scheduler, and the user's module."""
    own = Language()
    model, optimizer = fabric.setup(own, torch.optim.AdamW(groups(own), lr=0.01))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer.optimizer, 0.9)
    losses = []
    for _ in range(2):
        for i, tokens in enumerate(data):
            with fabric.no_backward_sync(model, enabled=(i + 1) % accumulate != 0):
                loss = loss_of(model, tokens)
                fabric.backward(loss / accumulate)
            losses.append(loss.detach())
            if (i + 1) % accumulate == 0:
                fabric.clip_gradients(model, optimizer, max_norm=1.0)
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
    return fabric.all_reduce(torch.stack(losses)).tolist(), own


def single(precision: Any) -> Fabric:
    plugins = precision if isinstance(precision, Float8Precision) else None
    return Fabric(accelerator="cpu", devices=1, plugins=plugins, precision=None if plugins else precision)


@pytest.mark.parametrize(
    ("recipe", "precision", "dtype", "weights"),
    [
        ("tensorwise", "fp8-mixed", torch.bfloat16, torch.float32),
        ("tensorwise", "fp8-true", torch.bfloat16, torch.bfloat16),
        ("rowwise", "fp8-mixed", torch.float32, torch.float32),
        ("rowwise_with_gw_hp", "fp8-mixed", torch.bfloat16, torch.float32),
        ("rowwise_with_gw_hp", "fp8-true", torch.bfloat16, torch.bfloat16),
    ],
)
def test_training_is_that_in_single_precision_within_the_error_of_float8(
    recipe: Any, precision: Any, dtype: torch.dtype, weights: torch.dtype
) -> None:
    exact, _ = train(single("32-true"), batches())
    losses, model = train(single(Float8Precision(precision, recipe=recipe, dtype=dtype, emulate=True)), batches())
    assert losses == pytest.approx(exact, rel=0.03)
    assert losses != exact and losses[-1] < losses[0]
    assert {p.dtype for p in model.parameters()} == {weights}
    assert model.head.weight is model.embed.weight
    fresh = Language().frozen.weight.to(weights)
    assert torch.equal(model.frozen.weight, fresh) and not model.frozen.weight.requires_grad


def test_steps_are_those_of_torchao_by_hand() -> None:
    own = Language()
    config = float8.Float8LinearConfig(emulate=True)
    float8.convert_to_float8_training(own, config=config, module_filter_fn=lambda _, name: name != "narrow")
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
    by_hand = []
    for tokens in batches():
        loss = loss_of(own, tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        by_hand.append(loss.item())

    fabric, own = single(Float8Precision(emulate=True, dtype=torch.float32)), Language()
    model, optimizer = fabric.setup(own, torch.optim.SGD(own.parameters(), lr=0.1))
    losses = []
    for tokens in batches():
        loss = loss_of(model, tokens)
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses == by_hand


def test_what_is_converted_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    class Named(nn.Linear):
        """A class of the user's that computes as its base does."""

    model = nn.ModuleDict(
        {
            "plain": nn.Linear(16, 32),
            "named": Named(16, 16),
            "own": Own(16, 16),
            "odd": nn.Linear(16, 24),
            "lazy": nn.LazyLinear(16),
            "head": nn.Linear(16, 16),
            "header": nn.Linear(16, 16),
            "attention": nn.MultiheadAttention(16, 2),
            "filtered": nn.Linear(16, 16),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)),
            "twice": nn.Sequential(nn.Linear(16, 16)),
        }
    )
    model["again"] = model["twice"][0]
    called = []
    model["plain"].register_forward_hook(lambda *_: called.append(1))
    weights = {id(p) for p in model.parameters()}
    precision = Float8Precision(
        emulate=True, ignore_modules={"head"}, module_filter=lambda layer, name: name != "filtered", dtype=torch.float32
    )
    with caplog.at_level("INFO"):
        assert precision.convert_module(precision.convert_module(model)) is model
    (said,) = [record.message for record in caplog.records if "float8" in record.message]
    assert said.startswith("5 of 11 linear layers multiply in float8 by the recipe 'tensorwise', emulated. The others")
    assert "stay in float32: 'own' (has a forward of its own), 'odd' (24 outputs, not a multiple of 16)" in said
    assert "'lazy' (lazy, without a shape), 'head' (ignored)" in said and said.endswith("and 1 more.")
    converted = {name for name, m in model.named_modules() if isinstance(m, Float8Linear)}
    assert converted == {"plain", "named", "header", "normed", "twice.0"}
    assert isinstance(model["named"], Named) and model["again"] is model["twice"][0]
    assert {id(p) for p in model.parameters()} == weights
    x = torch.randn(3, 16)
    model["plain"](x)
    assert called == [1]
    assert not torch.equal(model["normed"](x), nn.functional.linear(x, model["normed"].weight, model["normed"].bias))

    for twin in (copy.deepcopy(model["named"]), pickle.loads(pickle.dumps(model["again"]))):
        assert isinstance(twin, Float8Linear) and twin.config.emulate
    Float8Precision.revert(model)
    assert {type(model[name]) for name in ("plain", "head", "named")} == {nn.Linear, Named}
    y = nn.functional.linear(x, model["plain"].weight, model["plain"].bias)
    assert torch.equal(model["plain"](x), y) and "config" not in vars(model["plain"])


def test_the_settings_are_those_of_the_last_precision() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    Float8Precision(emulate=True).convert_module(model)
    again = Float8Precision(emulate=True, recipe="rowwise", ignore_modules="1").convert_module(model)
    assert again[0].config.round_scales_to_power_of_2 and type(again[1]) is nn.Linear
    mine = float8.convert_to_float8_training(nn.Linear(16, 16), config=float8.Float8LinearConfig(emulate=True))
    made = Float8Precision(emulate=True, recipe="rowwise").convert_module(nn.Sequential(mine))
    assert not made[0].config.round_scales_to_power_of_2  # converted by the user, who chose the settings


@pytest.mark.parametrize("compiled", [False, True])
def test_a_linear_layer_alone(compiled: bool) -> None:
    fabric = single(Float8Precision(emulate=True, dtype=torch.float32))
    layer = nn.Linear(16, 16)
    x = torch.randn(5, 16)  # not a multiple of 16: summed over in the gradient of the weight
    expected = layer(x).detach()
    model = fabric.setup(torch.compile(layer, backend="eager") if compiled else layer)
    out = model(x)
    out.sum().backward()
    assert isinstance(layer, Float8Linear) and layer.linear_mm_config.grad_weight.pad_inner_dim
    assert not torch.equal(out, expected)
    torch.testing.assert_close(out, expected, atol=0.1, rtol=0.1)
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(16, 16), atol=0.2, rtol=0.1)


@pytest.mark.parametrize("precision", ["fp8-mixed", "fp8-true"])
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_inference_mode_computes_the_same(recipe: Any, precision: Any) -> None:
    fabric = single(Float8Precision(precision, recipe=recipe, emulate=True))
    model = fabric.setup(Language())
    tokens = batches(1)[0]
    with torch.inference_mode():
        output = model(tokens)
    assert torch.equal(output, model(tokens))
    fabric.backward(loss_of(model, tokens))


def test_checkpoints_fit_a_model_that_is_not_converted(tmp_path: Path) -> None:
    fabric = single(Float8Precision(emulate=True))
    _, own = train(fabric, batches())
    assert own.state_dict().keys() == Language().state_dict().keys()
    fabric.save(tmp_path / "8.ckpt", {"model": own})
    plain = Language()
    assert type(plain.block[0]) is nn.Linear
    single("32-true").load(tmp_path / "8.ckpt", {"model": plain})
    assert all(torch.equal(a, b) for a, b in zip(own.state_dict().values(), plain.state_dict().values()))
    with torch.no_grad():
        plain.narrow.bias.fill_(7.0)
    single("32-true").save(tmp_path / "32.ckpt", {"model": plain})
    model = fabric.setup(Language())
    fabric.load(tmp_path / "32.ckpt", {"model": model})
    assert model.narrow.bias.item() == 7.0 and isinstance(model.block[0], Float8Linear)


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Language()
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = loss_of(self.net, batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(groups(self.net), lr=0.01)


def trainer(steps: int, **kwargs: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        enable_checkpointing=False,
        **kwargs,
    )


@pytest.mark.parametrize("precision", ["fp8-mixed", "fp8-true"])
def test_the_trainer_resumes_to_the_last_bit(precision: Any, tmp_path: Path) -> None:
    def loader() -> DataLoader[Tensor]:
        return DataLoader(torch.cat(batches(8)), batch_size=4)  # type: ignore[arg-type]

    plugins = Float8Precision(precision, emulate=True)
    whole, first, second = Module(), Module(), Module()
    trainer(8, plugins=plugins).fit(whole, loader())
    half = trainer(4, plugins=Float8Precision(precision, emulate=True))
    half.fit(first, loader())
    half.save_checkpoint(tmp_path / "half.ckpt")
    rest = trainer(8, plugins=Float8Precision(precision, emulate=True))
    rest.fit(second, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert first.losses + second.losses == whole.losses
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), second.state_dict().values()))
    plain = Module.load_from_checkpoint(tmp_path / "half.ckpt")
    assert not any(isinstance(m, Float8Linear) for m in plain.modules())


def in_two_processes() -> None:
    data = batches(12, size=2)
    fabric = Fabric(
        accelerator="cpu", devices=2, strategy="ddp_find_unused_parameters_true",
        plugins=Float8Precision(emulate=True, dtype=torch.float32),
    )  # fmt: skip
    fabric.launch()
    losses, model = train(fabric, data[fabric.global_rank :: 2])
    alone, twin = train(single(Float8Precision(emulate=True, dtype=torch.float32)), batches(6))
    print("ddp", max(abs(a - b) / b for a, b in zip(losses, alone, strict=True)))
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(fabric.all_reduce(weights, reduce_op="max"), weights)

    # Sharded, of weights that were made on the meta device
    for precision, dtype in (
        (HalfPrecision("bf16-true"), torch.bfloat16),
        (HalfPrecision("16-true"), torch.float16),
        (Float8Precision("fp8-true", emulate=True), torch.bfloat16),
        (Float8Precision(emulate=True), torch.float32),
    ):
        fabric = Fabric(accelerator="cpu", devices=2, strategy=FSDPStrategy(), plugins=precision)
        fabric.launch()
        with fabric.init_module(empty_init=True):
            own: Any = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.Linear(64, 32))
        assert all(p.is_meta and p.dtype == dtype for p in own.parameters())
        model, optimizer = fabric.setup(own, torch.optim.SGD(own.parameters(), lr=0.01))
        assert {p.dtype for p in own.parameters()} == {dtype} and not own[0].weight.is_meta
        assert own[0].weight.to_local().shape == (32, 32)
        assert isinstance(own[0], Float8Linear) == precision.precision.startswith("fp8")
        loss = model(torch.ones(4, 32)).square().mean()
        fabric.backward(loss)
        optimizer.step()
        assert loss.isfinite() and own[0].weight.grad.dtype == dtype
    with pytest.raises(MisconfigurationException, match=r"FSDPStrategy shares .* Quantizing makes cannot"):
        Fabric(accelerator="cpu", devices=2, strategy=FSDPStrategy(), plugins=Quantizing())


class Quantizing(Precision):
    """Stands for any precision that makes other parameters."""

    replaces_parameters = True


def test_two_processes_train_as_one() -> None:
    said = run_in_ranks(in_two_processes)
    differences = [float(line.split()[1]) for line in said.splitlines() if line.startswith("ddp")]
    assert len(differences) == 2 and max(differences) < 0.03


def test_on_the_meta_device() -> None:
    precision = Float8Precision("fp8-true", emulate=True)
    with torch.device("meta"), precision.module_init_context():
        model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 3))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model = precision.convert_module(model)
    assert isinstance(model[0], Float8Linear) and model[0].weight.is_meta
    assert model[1].running_mean.dtype == torch.bfloat16 and model[1].num_batches_tracked.dtype == torch.int64
    model.to_empty(device="cpu")
    assert model[0](torch.ones(2, 16, dtype=torch.bfloat16)).shape == (2, 16)


@pytest.mark.parametrize("name", ["fp8", "fp8-mixed", "fp8-true", "float8", "transformer-engine"])
def test_a_device_without_float8_is_refused_before_any_work(name: str) -> None:
    for make in (Fabric, L.Trainer):
        with pytest.raises(DeviceUnavailableError, match=r"'cpu'\. Use precision='bf16-mixed', or .*emulate=True"):
            make(accelerator="cpu", devices=1, precision=name)
        with pytest.raises(DeviceUnavailableError, match="float8 numbers"):
            make(accelerator="cpu", devices=1, plugins=Float8Precision())


def test_a_gpu_without_float8_is_refused_at_setup(monkeypatch: pytest.MonkeyPatch) -> None:
    precision = make_precision("fp8", "cuda")
    assert precision.precision == "fp8-mixed" and compute_dtype(precision.precision) == "float8"
    precision.place("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    with pytest.raises(DeviceUnavailableError, match=r"NVIDIA A100 has no matrix units .* 8\.9"):
        precision.convert_module(nn.Linear(16, 16))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    layer = precision.convert_module(nn.Linear(16, 16))
    assert isinstance(layer, Float8Linear) and not layer.config.emulate


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "fp8"}, "precision='fp8'.*'fp8-mixed', 'fp8-true'"),
        ({"recipe": "blockwise"}, "recipe='blockwise'.*'tensorwise', 'rowwise'"),
        ({"dtype": torch.float16}, "float16.*must be torch.bfloat16"),
        ({"precision": "fp8-true", "dtype": torch.float32}, "torch.float32 with 'fp8-mixed'"),
        ({"module_filter": "head"}, "module_filter='head'.*ignore_modules"),
        ({"ignore_modules": [nn.Linear]}, "takes names of modules"),
        ({"emulate": "yes"}, "emulate='yes' must be True or False"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        Float8Precision(**arguments)


def test_models_without_a_layer_to_convert() -> None:
    fabric = single(Float8Precision(emulate=True))
    for model, why in (
        (nn.Conv2d(1, 1, 1), "Conv2d has none to replace: it has no torch.nn.Linear"),
        (nn.Sequential(nn.Linear(4, 2)), r"stay as they are: '0' \(4 inputs, not a multiple of 16\)"),
        (nn.Embedding.from_pretrained(torch.ones(2, 2, dtype=torch.int64)), "it has no torch.nn.Linear"),
    ):
        with pytest.raises(MisconfigurationException, match=why):
            fabric.setup(model)
    with pytest.warns(UserWarning, match=r"ignore_modules has 'haed'.*Did you mean 'head'"):
        Float8Precision(emulate=True, ignore_modules="haed").convert_module(nn.ModuleDict({"head": nn.Linear(16, 16)}))


def test_two_precisions_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="Two objects for the precision"):
        Fabric(accelerator="cpu", plugins=[Float8Precision(emulate=True), HalfPrecision()])
    with pytest.raises(MisconfigurationException, match=r"'bf16-mixed', and a Float8Precision object"):
        L.Trainer(accelerator="cpu", precision="bf16-mixed", plugins=Float8Precision(emulate=True))


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
@pytest.mark.parametrize("precision", ["fp8-mixed", "fp8-true"])
def test_real_float8(recipe: Any, precision: Any) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no compute capability 9.0")

    def run(given: Any) -> list[float]:
        fabric = Fabric(accelerator="cuda", devices=1, precision=None, plugins=given)
        losses, model = train(fabric, [tokens.cuda() for tokens in batches()])
        assert isinstance(model.block[0], Float8Linear)
        return losses

    real = run(Float8Precision(precision, recipe=recipe))
    assert real == pytest.approx(run(Float8Precision(precision, recipe=recipe, emulate=True)), rel=0.02)
    assert real == pytest.approx(train(single("32-true"), batches())[0], rel=0.05)


@pytest.mark.gpu
def test_real_float8_compiled() -> None:
    fabric = Fabric(accelerator="cuda", devices=1, precision="fp8-mixed")
    torch.manual_seed(0)
    own = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256))
    model, optimizer = fabric.setup(torch.compile(own), torch.optim.SGD(own.parameters(), lr=0.1))
    x = torch.randn(64, 256, device="cuda")
    losses = []
    for _ in range(5):
        loss = (model(x) - x).square().mean()
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
