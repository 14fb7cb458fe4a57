"""Precisions: names, dtypes inside and outside of the forward pass, gradient scaling.

Tests of ``treadle_fabric.precision.precision``,
``treadle_fabric.precision.autocast``, ``treadle_fabric.precision.double``, ``treadle_fabric.precision.half``.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from treadle_fabric import (
    DoublePrecision,
    Fabric,
    HalfPrecision,
    MisconfigurationException,
    MixedPrecision,
    Precision,
    canonical_precision,
    make_precision,
)


class Probe(nn.Module):
    """Remembers what its forward pass saw."""

    forward_methods = ("step",)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.seen: dict[str, Any] = {}

    def forward(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        y = self.layer(x)
        self.seen |= {"x": x.dtype, "y": y.dtype, "made": torch.zeros(1).dtype}
        if index is not None:
            self.seen["index"] = index.dtype
        return y

    def step(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        self.seen["target"] = batch["y"].dtype
        return {"loss": (self(batch["x"]) - batch["y"]).square().mean(), "n": len(batch["x"])}


def fabric(precision: Any, **kwargs: Any) -> Fabric:
    return Fabric(accelerator="cpu", devices=1, precision=precision, **kwargs)


@pytest.mark.parametrize(
    ("given", "full"),
    [
        (None, "32-true"),
        (64, "64-true"),
        ("64", "64-true"),
        (32, "32-true"),
        ("32", "32-true"),
        ("fp32", "32-true"),
        (16, "16-mixed"),
        ("16", "16-mixed"),
        ("fp16", "16-mixed"),
        ("bf16", "bf16-mixed"),
        ("bf16-true", "bf16-true"),
        ("16-true", "16-true"),
    ],
)
def test_names(given: Any, full: str) -> None:
    assert canonical_precision(given) == full
    assert make_precision(given, "cpu").precision == full
    assert fabric(given).strategy.precision.precision == full


@pytest.mark.parametrize("wrong", ["bf16-mixd", "8", 17, True, 16.0])
def test_unknown_name(wrong: Any) -> None:
    with pytest.raises(MisconfigurationException, match=f"precision={wrong!r}"):
        fabric(wrong)
    with pytest.raises(MisconfigurationException, match="Did you mean 'bf16-mixed'"):
        canonical_precision("bf16-mixd")


@pytest.mark.parametrize(
    ("precision", "weights", "inside", "result", "made"),
    [
        ("64-true", torch.float64, torch.float64, torch.float64, torch.float64),
        ("32-true", torch.float32, torch.float32, torch.float32, torch.float32),
        ("16-true", torch.float16, torch.float16, torch.float16, torch.float16),
        ("bf16-true", torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16),
        ("16-mixed", torch.float32, torch.float16, torch.float16, torch.float32),
        ("bf16-mixed", torch.float32, torch.bfloat16, torch.bfloat16, torch.float32),
    ],
)
def test_dtypes(
    precision: str, weights: torch.dtype, inside: torch.dtype, result: torch.dtype, made: torch.dtype
) -> None:
    run = fabric(precision)
    probe = Probe()
    model = run.setup(probe)
    assert probe.layer.weight.dtype == weights
    y = model(torch.ones(2, 4), index=torch.ones(2, dtype=torch.long))
    assert probe.seen == {"x": inside, "y": result, "made": made, "index": torch.long}
    assert y.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32
    with run.init_tensor():
        assert torch.ones(1).dtype == weights
    with run.init_module():
        assert nn.Linear(1, 1).weight.dtype == weights
    with run.autocast():
        assert probe.layer(torch.ones(1, 4, dtype=weights)).dtype == inside


def test_single_precision_leaves_everything_as_it_is() -> None:
    probe = Probe()
    model = fabric("32-true").setup(probe)
    x = torch.ones(2, 4)
    seen = []
    probe.layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(x)
    assert seen[0] is x
    assert not Precision().converts


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_targets_of_a_step_are_not_rounded_by_autocast(precision: str) -> None:
    probe = Probe()
    model = fabric(precision).setup(probe)
    out = model.step({"x": torch.ones(2, 4), "y": torch.full((2, 4), 1234.567)})
    assert probe.seen["target"] == torch.float32
    assert probe.seen["y"] in (torch.float16, torch.bfloat16)
    assert out["loss"].dtype == torch.float32
    assert out["n"] == 2


def test_true_half_casts_the_whole_batch() -> None:
    probe = Probe()
    model = fabric("bf16-true").setup(probe)
    model.step({"x": torch.ones(2, 4), "y": torch.ones(2, 4)})
    assert probe.seen["target"] == torch.bfloat16


def scaled_run(scale: float = 1024.0, **kwargs: Any) -> tuple[Fabric, nn.Module, Any, torch.amp.GradScaler]:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, **kwargs)
    run = fabric(None, plugins=MixedPrecision("16-mixed", "cpu", scaler))
    module = nn.Linear(2, 1, bias=False)
    nn.init.ones_(module.weight)
    model, optimizer = run.setup(module, torch.optim.SGD(module.parameters(), lr=0.5))
    return run, model, optimizer, scaler


def test_scaler_scales_backward_and_unscales_the_step() -> None:
    run, model, optimizer, _ = scaled_run(1024.0)
    run.backward(model(torch.tensor([[1.0, 2.0]])).sum())
    torch.testing.assert_close(model.weight.grad, torch.tensor([[1024.0, 2048.0]]))
    optimizer.step()
    torch.testing.assert_close(model.weight.data, torch.tensor([[0.5, 0.0]]))


def test_clipping_unscales_first_and_once() -> None:
    run, model, optimizer, _ = scaled_run(1024.0)
    run.backward(model(torch.tensor([[3.0, 4.0]])).sum())
    norm = run.clip_gradients(model, optimizer, max_norm=1.0)
    assert norm is not None
    assert norm.item() == pytest.approx(5.0)
    run.strategy.precision.unscale_gradients(optimizer.optimizer)
    run.clip_gradients(model, optimizer, clip_val=0.7)
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.6, 0.7]]))
    optimizer.step()
    torch.testing.assert_close(model.weight.data, torch.tensor([[0.7, 0.65]]))


def test_overflow_skips_the_step_and_lowers_the_scale() -> None:
    run, model, optimizer, _ = scaled_run(1024.0)
    before = model.weight.detach().clone()
    run.backward(model(torch.tensor([[1.0, 2.0]])).sum() * float("inf"))
    run.clip_gradients(model, optimizer, max_norm=1.0)  # an overflow is no error here
    optimizer.step()
    assert torch.equal(model.weight, before)
    assert run.strategy.precision.scaler.get_scale() == 512.0  # type: ignore[union-attr]
    optimizer.zero_grad()
    run.backward(model(torch.tensor([[1.0, 2.0]])).sum())
    optimizer.step()
    assert not torch.equal(model.weight, before)


def test_scale_stays_until_all_optimizers_of_the_iteration_have_stepped() -> None:
    """A scale that grew between two steps would halve the second optimizer's gradients."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    run = fabric(None, plugins=MixedPrecision("16-mixed", "cpu", scaler))
    modules = [nn.Linear(1, 1, bias=False) for _ in range(2)]
    for module in modules:
        nn.init.ones_(module.weight)
    models = [run.setup_module(m) for m in modules]
    optimizers = run.setup_optimizers(*(torch.optim.SGD(m.parameters(), lr=1.0) for m in modules))
    for clip in (False, True):
        for model, optimizer in zip(models, optimizers):
            optimizer.zero_grad()
            run.backward(model(torch.tensor([[0.25]])).sum())
        if clip:
            run.clip_gradients(models[1], optimizers[1], max_norm=100.0)
        for optimizer in optimizers:
            optimizer.step()
    assert [m.weight.item() for m in modules] == [0.5, 0.5]


def test_step_left_out_after_clipping() -> None:
    run, model, optimizer, _ = scaled_run(4.0)
    run.backward(model(torch.tensor([[1.0, 1.0]])).sum())
    run.clip_gradients(model, optimizer, max_norm=100.0)
    optimizer.zero_grad()  # the user thinks better of it
    run.backward(model(torch.tensor([[1.0, 1.0]])).sum())
    run.clip_gradients(model, optimizer, max_norm=100.0)
    torch.testing.assert_close(model.weight.grad, torch.tensor([[1.0, 1.0]]))
    optimizer.step()
    torch.testing.assert_close(model.weight.data, torch.tensor([[0.5, 0.5]]))


def test_closure_under_scaler() -> None:
    run, model, optimizer, _ = scaled_run(16.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.tensor([[1.0, 2.0]])).sum()
        run.backward(loss)
        return loss

    assert optimizer.step(closure).item() == pytest.approx(3.0)
    torch.testing.assert_close(model.weight.data, torch.tensor([[0.5, 0.0]]))


def test_scaler_refuses_lbfgs_before_work() -> None:
    model = nn.Linear(1, 1)
    with pytest.raises(MisconfigurationException, match="LBFGS"):
        fabric("16-mixed").setup(model, torch.optim.LBFGS(model.parameters()))
    fabric("bf16-mixed").setup(model, torch.optim.LBFGS(model.parameters()))


def test_unscaled_backward_is_refused_only_where_it_is_wrong() -> None:
    run, model, _, _ = scaled_run()
    x = torch.ones(1, 2, requires_grad=True)
    with pytest.raises(MisconfigurationException, match=r"fabric\.backward"):
        model(x).sum().backward()
    (gradient,) = torch.autograd.grad(model(x).sum(), x)  # accumulates nothing
    assert gradient.shape == x.shape
    other = nn.Linear(2, 1)
    other(x).sum().backward()  # not Fabric's
    run.backward(model(x).sum())
    pickle.loads(pickle.dumps(copy.deepcopy(model.module)))

    again = fabric("bf16-mixed").setup(model.module)
    again(x).sum().backward()  # no scaler, nothing wrong
    for precision in ("32-true", "bf16-true"):
        free = fabric(precision).setup(nn.Linear(2, 1))
        free(torch.ones(1, 2)).sum().backward()


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
        self.first, self.second = nn.Linear(2, 1), nn.Linear(2, 1)

    def forward(self, x: Tensor, part: str) -> Tensor:
        features = x if part == "only second" else self.trunk(x)
        head = self.second if "second" in part else self.first
        if part == "middle":
            return self.trunk[2].weight.sum()
        out: Tensor = features if part == "trunk" else head(features.detach() if part == "first" else features)
        return out.sum()


def watched(module: nn.Module) -> int:
    return sum(len(p._post_accumulate_grad_hooks or ()) for p in module.parameters())  # type: ignore[attr-defined]


def test_a_backward_pass_calls_few_hooks_and_an_unscaled_one_is_still_refused() -> None:
    """A hook for each parameter would be called at each backward pass of the run."""
    run = fabric(None, plugins=MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu")))
    module = Heads()
    model, optimizer = run.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    x = torch.ones(1, 2)
    parameters = len([*module.parameters()])
    assert watched(module) == parameters
    run.backward(model(x, "whole"))
    assert watched(module) == parameters  # an unscaled loss beside it is to be found, wherever it is
    with pytest.raises(MisconfigurationException, match=r"fabric\.backward"):
        model(x, "middle").backward()
    for _ in range(20):
        run.backward(model(x, "whole"))
        optimizer.step()
        # of what was reached, the one whose turn it is, and those of the second head, which was not reached
        assert watched(module) == 2 + 1 + 2
    run.backward(model(x, "second"))
    run.backward(model(x, "second"))
    assert watched(module) == 2 + 1 + 2  # the trunk is known
    for part in ("whole", "first", "trunk", "second", "only second"):
        with pytest.raises(MisconfigurationException, match=r"fabric\.backward"):
            model(x, part).backward()
    run.backward(model(x, "whole"))
    run.strategy.precision.teardown()
    assert watched(module) == 0


def test_an_unscaled_loss_of_any_parameter_is_found_in_the_end() -> None:
    """Those between the first and the last one that the first scaled loss reached are watched in turns."""
    run = fabric(None, plugins=MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu")))
    module = Heads()
    model = run.setup(module)
    x = torch.ones(1, 2)
    for _ in range(3):
        run.backward(model(x, "whole"))
        run.backward(model(x, "second"))
    named = dict(module.named_parameters())
    missed = {*named}
    for turn in range(len(named)):
        for name in [*missed]:
            gradient = None if named[name].grad is None else named[name].grad.clone()
            try:
                named[name].sum().backward()
            except MisconfigurationException:
                missed.remove(name)
            named[name].grad = gradient
        assert len(missed) == max(0, 7 - turn)  # one more each time
        run.backward(model(x, "whole"))
    assert not missed
    kept = [weakref.ref(parameter) for parameter in module.parameters()]
    del module, model, named
    gc.collect()
    assert not any(reference() for reference in kept)
    other = run.setup(Heads())
    for _ in range(3):
        run.backward(other(x, "whole"))


def test_parameters_that_are_frozen_by_turns() -> None:
    """As two networks that are trained against each other: those whose turn it is to be watched may be frozen."""
    run = fabric("16-mixed")
    layers = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    model = run.setup(layers)
    for step in range(9):
        for index, layer in enumerate(layers):
            layer.requires_grad_((step + index) % 3 > 0)
        run.backward(model(torch.ones(1, 2)).sum())
        assert [p.requires_grad for p in layers.parameters()] == [(step + i // 2) % 3 > 0 for i in range(8)]


def test_teardown_lets_go_of_modules_and_of_a_step_that_never_came() -> None:
    run, model, optimizer, _ = scaled_run(64.0, growth_interval=1)
    run.backward(model(torch.ones(1, 2)).sum())
    run.clip_gradients(model, optimizer, max_norm=1.0)
    precision = run.strategy.precision
    precision.teardown()  # before the step
    model.module(torch.ones(1, 2)).sum().backward()
    assert precision.scaler.get_scale() == 128.0  # not held back by an optimizer that is gone


def test_state_dict_carries_the_scale() -> None:
    run, model, optimizer, _ = scaled_run(64.0, growth_interval=1)
    run.backward(model(torch.ones(1, 2)).sum())
    optimizer.step()
    state = run.strategy.precision.state_dict()
    assert state["scale"] == 128.0
    other = MixedPrecision("16-mixed", "cpu")
    other.load_state_dict(state)
    assert other.state_dict() == {**state, "growth_interval": 1}
    assert Precision().state_dict() == {}


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_mixed_equals_a_hand_written_autocast_loop(precision: str) -> None:
    dtype = torch.float16 if precision == "16-mixed" else torch.bfloat16
    torch.manual_seed(1)
    x, y = torch.randn(32, 4), torch.randn(32, 4)
    start = Probe()

    def by_hand() -> list[float]:
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=precision == "16-mixed")
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                output = model(x)
            loss = nn.functional.mse_loss(output.float(), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        return losses

    def with_fabric() -> list[float]:
        run = fabric(precision)
        model = copy.deepcopy(start)
        model, optimizer = run.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            run.backward(loss)
            optimizer.step()
            losses.append(loss.item())
        return losses

    assert with_fabric() == by_hand()


def test_wrong_arguments() -> None:
    with pytest.raises(MisconfigurationException, match="32-mixed"):
        MixedPrecision("32-mixed", "cpu")  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match="needs no scaling"):
        MixedPrecision("bf16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(MisconfigurationException, match="32-true"):
        HalfPrecision("32-true")  # type: ignore[arg-type]


def test_hooks_of_a_users_precision_are_called() -> None:
    calls: list[str] = []

    class Mine(Precision):
        def pre_backward(self, tensor: Tensor, module: nn.Module | None) -> None:
            calls.append("pre")

        def post_backward(self, tensor: Tensor, module: nn.Module | None) -> None:
            calls.append("post")

    run = fabric(None, plugins=Mine())
    model = run.setup(nn.Linear(1, 1))
    run.backward(model(torch.ones(1, 1)).sum())
    assert calls == ["pre", "post"]
    assert DoublePrecision().precision == "64-true"
