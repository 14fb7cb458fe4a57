"""``on_nonfinite``: losses and gradients that are NaN or infinite.

Tests of ``treadle.numbers.watch``, ``treadle.numbers.examine``.
"""

from __future__ import annotations

import gc
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import run_in_ranks
from tests.trainer.models import Net, trainer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from treadle.cli.main import main
from treadle.numbers.watch import _Copies
from treadle_fabric import NonFiniteError

pytestmark = pytest.mark.timeout(110)

BATCHES, BAD = 6, 3


def batches(*bad: int, n: int = BATCHES, value: float = float("inf")) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = list(torch.randn(n, 3, 4, generator=generator))
    for i in bad:
        found[i][1, 2] = value
    return found


class Drops(Net):
    """Draws random numbers, has buffers, and steps a scheduler."""

    def __init__(self) -> None:
        super().__init__(lr=0.1)
        self.norm, self.drop = nn.BatchNorm1d(2), nn.Dropout(0.5)
        self.inner = nn.Sequential(self.layer, self.drop)

    def loss(self, batch: Tensor) -> Tensor:
        return self.inner(batch).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def weights(model: nn.Module) -> list[float]:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()]).tolist()


def fit(folder: Path, model: Any, data: Any, mode: Any, **arguments: Any) -> Any:
    run = trainer(folder, on_nonfinite=mode, **arguments)
    run.fit(model, data)
    return run


def raised(folder: Path, model: Any, data: Any, **arguments: Any) -> str:
    with pytest.raises(NonFiniteError) as caught:
        fit(folder, model, data, "raise", **arguments)
    return str(caught.value)


def files(folder: Path) -> list[str]:
    return sorted(os.listdir(folder / "nonfinite")) if (folder / "nonfinite").exists() else []


def test_nobody_looks_by_default(tmp_path: Path) -> None:
    model = Drops()
    run = trainer(tmp_path)
    run.fit(model, batches(BAD))
    assert run.global_step == BATCHES
    assert all(w != w for w in weights(model.layer))
    assert files(tmp_path) == []


def test_the_error_says_where_and_leaves_the_state_of_before(tmp_path: Path) -> None:
    model, before = Drops(), Drops()
    torch.manual_seed(1)
    message = raised(tmp_path, model, batches(BAD))
    for words in (
        "The loss is nan at epoch 0, batch_idx 3, global_step 3.",
        "layer.weight (2, 4), layer.bias (2,)",
        "'layer' (Linear): output of shape (3, 2), its input is not finite either",
        "treadle replay ",
    ):
        assert words in message
    torch.manual_seed(1)
    fit(tmp_path, before, batches(), None, limit_train_batches=BAD)
    assert weights(model) == weights(before)
    name = "epoch=0-step=3-batch=3-rank=0.replay"
    assert files(tmp_path) == [name]
    bundle = torch.load(tmp_path / "nonfinite" / name, weights_only=True)
    assert torch.equal(bundle["batch"], batches(BAD)[BAD])
    assert torch.equal(bundle["parameters"]["layer.weight"], model.layer.weight)


class Overflows(Drops):
    """Its second layer makes too large a number of a finite one."""

    def __init__(self) -> None:
        super().__init__()
        self.square = Square()
        self.inner = nn.Sequential(self.layer, self.square, nn.Flatten())


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x**8


def test_the_first_layer_is_named(tmp_path: Path) -> None:
    message = raised(tmp_path, Overflows(), batches(BAD, value=1e7))
    assert "'inner.1' (Square): output of shape (3, 2), its input is finite." in message


class Root(Drops):
    """The loss of a batch of zeros is finite, and its gradient is not; no layer is to blame."""

    def loss(self, batch: Tensor) -> Tensor:
        return (self.layer(batch) * batch[:, :2]).sum().abs().sqrt()


def test_gradients_are_looked_at_too(tmp_path: Path) -> None:
    data = batches()
    data[BAD] = torch.zeros(3, 4)
    message = raised(tmp_path, Root(), data)
    assert "Gradients are not finite, with a loss of 0.0 at epoch 0, batch_idx 3" in message
    assert "layer.weight (2, 4)" in message
    assert "No layer has an output that is not finite" in message


@pytest.mark.parametrize("how", ["loss", "gradients"])
def test_the_batch_of_an_accumulation_is_found(tmp_path: Path, how: str) -> None:
    data = batches(*([4] if how == "loss" else []))
    if how == "gradients":
        data[4] = torch.zeros(3, 4)
    message = raised(tmp_path, Drops() if how == "loss" else Root(), data, accumulate_grad_batches=3)
    assert "epoch 0, batch_idx 4, global_step 1" in message
    assert files(tmp_path) == ["epoch=0-step=1-batch=4-rank=0.replay"]


class SkipsByHand(Drops):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("seen", float(batch_idx), on_step=False, on_epoch=True, reduce_fx="sum")
        return loss if loss.isfinite() else None


def test_a_skipped_step_is_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Random numbers, logged values and what steps with the optimizer included; the second run leaves no trace."""
    torch.manual_seed(1)
    model = Logs()
    with pytest.warns(UserWarning) as told:
        run = fit(tmp_path, model, batches(2, 3), "skip", max_epochs=2)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    by_hand = SkipsByHand()
    other = trainer(tmp_path, max_epochs=2)
    other.fit(by_hand, batches(2, 3))
    assert torch.equal(drawn, torch.rand(1))
    assert run.callback_metrics == other.callback_metrics
    assert run.global_step == 2 * (BATCHES - 2)
    assert run.lr_scheduler_configs[0].scheduler.last_epoch == run.global_step
    # by hand, a step without gradients is a step: the scheduler went on
    assert other.global_step == 2 * BATCHES
    said = [str(w.message) for w in told]
    assert sum("The step is skipped" in text for text in said) == 3
    assert sum("4 optimizer step(s)" in text and "were skipped" in text for text in said) == 1
    assert len(files(tmp_path)) == 3


def test_running_an_earlier_batch_again_draws_nothing(tmp_path: Path) -> None:
    drawn = []
    for mode in ("skip", None):
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(tmp_path, Drops(), batches(2), mode, accumulate_grad_batches=2)
        drawn.append(torch.rand(1))
    assert drawn[0] == drawn[1]


class Logs(Drops):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("seen", float(batch_idx), on_step=False, on_epoch=True, reduce_fx="sum")
        return loss


def test_skipping_leaves_what_the_other_batches_make(tmp_path: Path) -> None:
    class Normalizes(Net):
        def __init__(self) -> None:
            super().__init__(lr=0.1)
            self.norm = nn.BatchNorm1d(4)

        def loss(self, batch: Tensor) -> Tensor:
            return self(self.norm(batch)).square().mean()

    model, without = Normalizes(), Normalizes()
    data = batches(BAD)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(tmp_path, model, data, "skip")
    fit(tmp_path, without, data[:BAD] + data[BAD + 1 :], None)
    assert weights(model) == weights(without)
    assert torch.equal(model.norm.running_var, without.norm.running_var)


def test_a_warning_only_warns(tmp_path: Path) -> None:
    model = Drops()
    with pytest.warns(UserWarning) as told:
        run = fit(tmp_path, model, batches(BAD), "warn")
    assert sum("The optimizer steps all the same" in str(w.message) for w in told) == 3
    assert run.global_step == BATCHES
    assert all(w != w for w in weights(model.layer))


def test_a_gradient_scaler_keeps_its_say_over_gradients(tmp_path: Path) -> None:
    """The first scales are too large, and gradients infinite: that is how the scale is found."""

    class Steep(Net):
        def loss(self, batch: Tensor) -> Tensor:
            return (self(batch).float() * 100).sum()

    run = fit(tmp_path, Steep(), batches(), "raise", precision="16-mixed")
    assert run.strategy.precision.scaler.get_scale() < 65536
    assert "The loss is inf" in raised(tmp_path, Net(), batches(BAD), precision="16-mixed")


def test_a_loss_that_is_not_learned_from_is_not_looked_at(tmp_path: Path) -> None:
    class Nothing(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return {"loss": self.loss(batch[:0] if batch_idx == BAD else batch), "weight": int(batch_idx != BAD)}

    with pytest.warns(UserWarning, match="0 in total"):
        assert fit(tmp_path, Nothing(), batches(), "raise").global_step == BATCHES - 1


class Marked(Tensor):
    """A tensor that can be found again."""


@pytest.mark.parametrize("why", ["weights of 0", "no optimizer"])
def test_batches_that_no_optimizer_steps_for_are_not_kept(tmp_path: Path, why: str) -> None:
    class Idle(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            if batch_idx == 25:
                gc.collect()
                self.kept = sum(type(o) is Marked for o in gc.get_objects())
            loss = self.loss(batch.as_subclass(Tensor))
            return {"loss": loss, "weight": 0} if why == "weights of 0" else loss

        def configure_optimizers(self) -> Any:
            return super().configure_optimizers() if why == "weights of 0" else None

    model = Idle()
    with pytest.warns(UserWarning):
        fit(tmp_path, model, (b.as_subclass(Marked) for b in batches(n=30)), "skip")
    assert model.kept < 12


def test_buffers_are_put_back_as_they_were_before_this_step(tmp_path: Path) -> None:
    """Also after a step whose weights are all 0."""

    class Counts(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(()))

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.mean += batch.abs().sum()
            return {"loss": self.loss(batch), "weight": int(batch_idx > 1)}

    model, data = Counts(), batches(2, n=3)
    with pytest.warns(UserWarning):
        run = fit(tmp_path, model, data, "skip")
    assert run.global_step == 0
    assert model.mean == data[0].abs().sum() + data[1].abs().sum()


@pytest.mark.parametrize("automatic", [True, False])
def test_a_fit_without_optimizers_looks_at_losses(tmp_path: Path, automatic: bool) -> None:
    class Own(Net):
        automatic_optimization = automatic

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            loss = self.loss(batch)
            if not automatic:
                self.manual_backward(loss)
            return loss

        def configure_optimizers(self) -> Any:
            return None

    with pytest.warns(UserWarning, match="this fit will run with no optimizer"):
        message = raised(tmp_path, Own(), batches(BAD))
    assert "The loss is inf at epoch 0, batch_idx 3, global_step 0." in message
    assert message.endswith("on_nonfinite='warn' would go on.")
    assert ("layer.weight" in message) == ("treadle replay" in message) == automatic
    if automatic:
        name = str(tmp_path / "nonfinite" / files(tmp_path)[0])
        assert main(["replay", name, "--module", "tests.trainer.models:Net"]) == 0
    model = Own()
    with pytest.warns(UserWarning) as told:
        fit(tmp_path, model, batches(BAD), "skip")
    said = [str(w.message) for w in told]
    assert sum("no optimizer that could be held back" in text for text in said) == 1
    assert sum("1 time(s) a loss was not finite" in text for text in said) == 1
    assert not automatic or bool(model.layer.weight.grad.isfinite().all())


class Manual(Net):
    automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([self.layer.weight], 0.1), torch.optim.Adam([self.layer.bias], 0.1)


def test_manual_optimization_is_looked_at_before_each_step(tmp_path: Path) -> None:
    message = raised(tmp_path, Manual(), batches(BAD))
    assert "The loss is inf at epoch 0, batch_idx 3, global_step 3" in message
    assert "layer.weight" in message and "treadle replay" not in message
    model, without, data = Manual(), Manual(), batches(BAD)
    with pytest.warns(UserWarning) as told:
        run = fit(tmp_path, model, data, "skip")
    assert any("The step is skipped" in str(each.message) for each in told)
    fit(tmp_path, without, data[:BAD] + data[BAD + 1 :], None)
    assert run.global_step == BATCHES - 1
    assert weights(model) == weights(without)


def test_a_batch_that_no_file_can_hold_is_still_explained(tmp_path: Path) -> None:
    class Own:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    class Takes(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch.x)

    data = [Own(b) for b in batches(BAD)]
    message = raised(tmp_path, Takes(), iter(data))
    assert "'layer' (Linear)" in message
    assert main(["replay", str(tmp_path / "nonfinite" / files(tmp_path)[0])]) == 2


# ------------------------------------------------------------------------------------------------------ two processes


class Adds(Net):
    """The loss of one rank is infinite, and all gradients are finite."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        together = self.all_gather(batch).mean()  # every rank waits for the others, also when a batch runs again
        return self.loss(batch) + together * 0 + (float("inf") if batch_idx == BAD and self.global_rank else 0.0)


def run_two(folder: Path) -> None:
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    out: dict[str, Any] = {}
    data = batches(*([BAD] if rank else []))
    arguments: dict[str, Any] = {"devices": 2, "use_distributed_sampler": False}
    for accumulate in (1, 2):
        model = Net()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = fit(folder, model, data, "skip", accumulate_grad_batches=accumulate, **arguments)
        out[f"skip {accumulate}"] = [*weights(model), run.global_step]
    model = Adds()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = fit(folder / "adds", model, batches(), "skip", **arguments)
    out["one-sided"] = [*weights(model), run.global_step]
    try:
        fit(folder, Net(), data, "raise", **arguments)
    except NonFiniteError as error:
        out["raise"] = str(error)
    (folder / f"out{rank}.json").write_text(json.dumps(out))


def test_two_ranks_do_the_same_when_one_has_a_bad_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_in_ranks(run_two, tmp_path)
    zero, one = (json.loads((tmp_path / f"out{rank}.json").read_text()) for rank in range(2))
    assert zero == one
    for accumulate, steps in ((1, 5), (2, 2)):
        assert zero[f"skip {accumulate}"][-1] == steps
        assert all(w == w for w in zero[f"skip {accumulate}"])
    assert zero["one-sided"][-1] == BATCHES - 1
    assert "The loss is inf at epoch 0, batch_idx 3, global_step 3, rank 1." in zero["raise"]
    assert "rank 0" not in zero["raise"]
    names = files(tmp_path)
    assert names and all("rank=1" in name for name in names)
    assert main(["replay", str(tmp_path / "nonfinite" / names[-1]), "--module", "tests.trainer.models:Net"]) == 0
    printed = capsys.readouterr().out
    assert "rank 1 of 2" in printed and "reproduced" in printed and "not compared" in printed


def test_buffers_are_copied_together_and_into_the_same_memory() -> None:
    copies, calls = _Copies(), []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    buffers = dict(nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(4))).named_buffers())
    first = copies.of(buffers)
    second = copies.of(buffers)  # of the next batch of an accumulation
    memory = {value.data_ptr() for each in (first, second) for value in each.values()}
    assert len(memory) == 2 * len(buffers)
    copies.reuse([first, second])
    for buffer in buffers.values():
        buffer += 1
    with Seen():
        third = copies.of(buffers)
    assert calls.count(torch.ops.aten._foreach_copy_) == 2  # the counters are integers
    assert torch.ops.aten.clone not in calls
    assert {value.data_ptr() for value in third.values()} < memory
    assert all(torch.equal(third[name], buffer) for name, buffer in buffers.items())
    buffers["0.running_mean"] = torch.ones(5)
    assert copies.of(buffers)["0.running_mean"].shape == (5,)
