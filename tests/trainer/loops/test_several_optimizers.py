"""Several optimizers in automatic optimization: they step together as the groups of one optimizer would.

Tests of ``treadle.loops.step.automatic``, ``treadle.loops.step.several``, ``treadle.loops.step.choose``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import run_in_ranks
from tests.trainer.loops.test_engines import AccumulatingEngine, SteppingEngine
from tests.trainer.models import Samples, trainer
from tests.trainer.trainer.test_capabilities import Joint
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, IterableDataset

import treadle as L
from treadle.callbacks import LearningRateMonitor, ModelCheckpoint
from treadle.plugins import MixedPrecision
from treadle_fabric import CheckpointMismatchError, Fabric, MisconfigurationException, NonFiniteError

BATCHES = 7  # with accumulations of 3, the last one is shorter


class Two(L.LightningModule):
    """Two layers; what ``configure_optimizers`` returns, and what is done to a loss, is given."""

    def __init__(self, make: Callable[[Any], Any], change: Callable[[Tensor, int], Any] = lambda loss, i: loss) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)
        self.make, self.change = make, change
        self.forwards = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.forwards += 1
        loss = self.second(self.first(batch / 10).tanh()).square().mean()
        self.log("loss", loss, on_epoch=True)
        return self.change(loss, batch_idx)

    def configure_optimizers(self) -> Any:
        return self.make(self)


def grouped(m: Two) -> Any:
    optimizer = SGD([{"params": m.first.parameters()}, {"params": m.second.parameters(), "lr": 0.3}], 0.1, 0.9)
    return [optimizer], [{"scheduler": ExponentialLR(optimizer, 0.9), "interval": "step"}]


def separate(m: Two) -> Any:
    both = SGD(m.first.parameters(), 0.1, 0.9), SGD(m.second.parameters(), 0.3, 0.9)
    return [*both], [{"scheduler": ExponentialLR(each, 0.9), "interval": "step"} for each in both]


def muon_and_adamw(m: Two) -> Any:
    matrices = Muon([m.first.weight, m.second.weight], lr=0.02)
    rest = AdamW([m.first.bias, m.second.bias], lr=0.01)
    return [matrices, rest], [
        {"scheduler": StepLR(matrices, 2, 0.5), "interval": "step"},
        {"scheduler": ExponentialLR(rest, 0.5), "interval": "epoch"},
    ]


class Stream(IterableDataset[Tensor]):
    """As many samples, without a length."""

    def __iter__(self) -> Iterator[Tensor]:
        samples = Samples(2 * BATCHES)
        return (samples[i] for i in range(2 * BATCHES))


def batches(data: Any = None) -> DataLoader[Tensor]:
    return DataLoader(Samples(2 * BATCHES) if data is None else data, batch_size=2)


def fit(folder: Path, model: Two, data: Any = None, ckpt_path: Any = None, **arguments: Any) -> L.Trainer:
    run = trainer(folder, **{"max_epochs": 2, **arguments})
    run.fit(model, batches() if data is None else data, ckpt_path=ckpt_path)
    return run


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def assert_same(one: nn.Module, other: nn.Module) -> None:
    assert torch.equal(weights(one), weights(other))


# ------------------------------------------------------------------------------------------------ as one, as by hand


@pytest.mark.filterwarnings("ignore:The weights of an optimizer step are 0")
@pytest.mark.parametrize(
    ("accumulate", "data", "change"),
    [
        (1, None, lambda loss, i: loss),
        (3, None, lambda loss, i: loss),
        (3, Stream(), lambda loss, i: loss),
        (3, Stream(), lambda loss, i: {"loss": loss, "weight": i + 1}),
        (2, None, lambda loss, i: None if i in (0, 3) else loss),
        (2, None, lambda loss, i: {"loss": loss, "weight": 0 if i < 2 else i}),
    ],
    ids=["plain", "accumulated", "stream", "weighted", "without a loss", "weights of 0"],
)
def test_two_optimizers_are_one_with_two_groups(tmp_path: Path, accumulate: int, data: Any, change: Any) -> None:
    models = [Two(make, change) for make in (grouped, separate)]
    runs = [fit(tmp_path, m, batches(data), accumulate_grad_batches=accumulate) for m in models]
    assert_same(*models)
    assert not torch.equal(weights(models[0]), weights(Two(separate)))
    one, two = runs
    assert two.global_step == one.global_step > 0
    assert two.fit_progress.optimizer_steps == 2 * one.fit_progress.optimizer_steps
    assert models[1].forwards == 2 * BATCHES


def loop(step: Any, accumulate: int, backward: Any, optimizers: Any, configs: Any) -> None:
    """Two epochs by hand."""
    for _ in range(2):
        for i, batch in enumerate(batches()):
            window = min(accumulate, BATCHES - i + i % accumulate)
            if not i % accumulate:
                for optimizer in optimizers:
                    optimizer.zero_grad()
            loss = step(batch, i)
            backward(loss / window if window > 1 else loss)
            if i % accumulate == accumulate - 1 or i == BATCHES - 1:
                for optimizer in optimizers:
                    optimizer.step()
                configs[0]["scheduler"].step()
        configs[1]["scheduler"].step()


def test_muon_beside_adamw_is_the_loop_by_hand_and_the_fabric_loop(tmp_path: Path) -> None:
    model, by_hand, by_fabric = (Two(muon_and_adamw) for _ in range(3))
    run = fit(tmp_path, model, accumulate_grad_batches=3, callbacks=[monitor := LearningRateMonitor()], logger=True)
    by_hand.log = by_fabric.log = lambda *a, **k: None  # type: ignore[method-assign]
    loop(by_hand.training_step, 3, Tensor.backward, *by_hand.configure_optimizers())
    fabric = Fabric(accelerator="cpu", devices=1)
    optimizers, configs = by_fabric.configure_optimizers()
    wrapped, *optimizers = fabric.setup(by_fabric, *optimizers)
    loop(wrapped.training_step, 3, fabric.backward, optimizers, configs)
    assert_same(model, by_hand)
    assert_same(model, by_fabric)
    assert [type(each) for each in run.optimizers] == [Muon, AdamW]
    assert sorted(monitor.lrs) == ["lr-AdamW", "lr-Muon"]
    assert [each.scheduler.last_epoch for each in run.lr_scheduler_configs] == [6, 2]
    found = model.optimizers()
    assert len(found) == 2 and isinstance(found[0], Muon) and isinstance(found[1], AdamW)


def test_plateau_schedulers_of_each(tmp_path: Path) -> None:
    def make(m: Two) -> Any:
        both = SGD(m.first.parameters(), 0.1), SGD(m.second.parameters(), 0.2)
        by_epoch, by_step = (ReduceLROnPlateau(o, mode="max", factor=0.5, patience=0) for o in both)
        return [
            {"optimizer": both[0], "lr_scheduler": {"scheduler": by_epoch, "monitor": "loss_epoch"}},
            {
                "optimizer": both[1],
                "lr_scheduler": {"scheduler": by_step, "monitor": "loss_step", "interval": "step", "frequency": 7},
            },
        ]

    run = fit(tmp_path, Two(make), max_epochs=4)
    assert [o.param_groups[0]["lr"] for o in run.optimizers] == [0.0125, 0.025]


# ------------------------------------------------------------------------------------------------ hooks and clipping


class Told(Two):
    """Keeps the hooks with their optimizers, and the norm of gradients after clipping."""

    def __init__(self, make: Callable[[Any], Any] = separate) -> None:
        super().__init__(make)
        self.told: list[Any] = []
        self.norms: list[float] = []

    def tell(self, hook: str, optimizer: Any) -> None:
        self.told.append((hook, [o is getattr(optimizer, "optimizer", optimizer) for o in self.trainer.optimizers]))

    def on_before_zero_grad(self, optimizer: Optimizer) -> None:
        self.tell("before zero", optimizer)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        self.tell("zero", optimizer)
        super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.tell("before step", optimizer)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        self.tell("clip", optimizer)
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        norm = torch.nn.utils.get_total_norm([p.grad for p in optimizer.param_groups[0]["params"]])
        self.norms.append(norm.item())


class Stepping(Told):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        self.tell("step", optimizer)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


A, B = [True, False], [False, True]
ZEROED = [("before zero", A), ("zero", A), ("before zero", B), ("zero", B)]


def test_hooks_and_clipping_are_of_each_optimizer(tmp_path: Path) -> None:
    limits = {"gradient_clip_val": 0.001, "limit_train_batches": 1, "max_epochs": 1}
    model, stepping = Told(), Stepping()
    fit(tmp_path, model, **limits)
    assert model.told == [*ZEROED, ("before step", A), ("clip", A), ("before step", B), ("clip", B)]
    assert model.norms == [pytest.approx(0.001, rel=0.01)] * 2  # one norm for both would be smaller for each
    fit(tmp_path, stepping, **limits)
    assert [hook for hook in stepping.told if hook not in ZEROED] == [
        ("step", A), ("before step", A), ("clip", A), ("step", B), ("before step", B), ("clip", B)
    ]  # fmt: skip
    assert_same(model, stepping)


def test_an_optimizer_step_of_the_module_runs_forward_once_a_batch(tmp_path: Path) -> None:
    plain, stepping = Two(separate), Stepping()
    runs = [fit(tmp_path, model, accumulate_grad_batches=3) for model in (plain, stepping)]
    assert_same(plain, stepping)
    assert runs[0].global_step == runs[1].global_step == 6
    assert stepping.forwards == 2 * BATCHES

    class InTurns(Stepping):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            mine = self.optimizers().index(optimizer)
            if mine == 0 and batch_idx % 2:
                return  # the second one's closure runs forward and backward then
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    turns = InTurns()
    run = fit(tmp_path, turns, max_epochs=1)
    assert (run.global_step, turns.forwards, run.fit_progress.optimizer_steps) == (7, 7, 11)

    class Twice(Stepping):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer_closure()
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    with pytest.raises(MisconfigurationException, match=r"closure of SGD was called twice at batch_idx 0.*by hand"):
        fit(tmp_path, Twice())


@pytest.mark.parametrize("accumulate", [1, 7])
def test_an_optimizer_that_needs_its_closure_gets_it_beside_others(tmp_path: Path, accumulate: int) -> None:
    class Unguarded(SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            loss = closure()
            super().step()
            return loss

    class Twice(Unguarded):
        def step(self, closure: Any = None) -> Any:
            closure()
            return super().step(closure)

    class Never(SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            return super().step(closure) if len(self.state) else None

    def of(first: Any, second: Any) -> Callable[[Two], Any]:
        return lambda m: [first(m.first.parameters(), 0.1), second(m.second.parameters(), 0.3)]

    plain = Two(of(SGD, SGD))
    steps = fit(tmp_path, plain, accumulate_grad_batches=accumulate).global_step
    for kinds in ((Unguarded, SGD), (SGD, Unguarded)):
        model = Two(of(*kinds))
        run = fit(tmp_path, model, accumulate_grad_batches=accumulate)
        assert_same(plain, model)
        assert (run.global_step, model.forwards) == (steps, plain.forwards)
    for kind, message in ((Twice, "was called twice"), (Never, "did not call it")):
        with pytest.raises(MisconfigurationException, match=message):
            fit(tmp_path, Two(of(SGD, kind)), accumulate_grad_batches=accumulate)


def test_a_strategy_that_sets_up_jointly(tmp_path: Path) -> None:
    model, plain, strategy = Two(separate), Two(separate), Joint()
    fit(tmp_path, model, strategy=strategy)
    fit(tmp_path, plain)
    assert "set up both, 2 optimizer" in strategy.calls
    assert_same(model, plain)


# ------------------------------------------------------------------------------------------------ what is refused


class AsksForIndex(Two):
    def training_step(self, batch: Tensor, batch_idx: int, optimizer_idx: int = 0) -> Any:
        return super().training_step(batch, batch_idx)


class StepsWithIndex(Two):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_idx: int, closure: Any) -> None:  # type: ignore[override]
        optimizer.step(closure=closure)


def overlapping(m: Two) -> Any:
    return [SGD(m.parameters(), 0.1), Adam([m.second.weight, m.second.bias])]


@pytest.mark.parametrize(
    ("model", "strategy", "message"),
    [
        (lambda: Two(overlapping), "auto", r"second\.weight, second\.bias in SGD \(number 0\) and Adam \(number 1\)"),
        (
            lambda: Two(lambda m: [LBFGS(m.first.parameters()), SGD(m.second.parameters(), 0.1)]),
            "auto",
            r"2 optimizers \(LBFGS, SGD\)\. LBFGS evaluates the loss several times.*automatic_optimization = False",
        ),
        (lambda: AsksForIndex(separate), "auto", r"AsksForIndex\.training_step` asks for `optimizer_idx`.*= False"),
        (lambda: StepsWithIndex(separate), "auto", r"StepsWithIndex\.optimizer_step` asks for `optimizer_idx`"),
        (lambda: Two(separate), AccumulatingEngine(), r"engine of AccumulatingEngine steps one optimizer.*groups"),
        (lambda: Two(separate), SteppingEngine(), r"engine of SteppingEngine steps one optimizer"),
    ],
)
def test_what_cannot_work_is_refused_before_a_batch(tmp_path: Path, model: Any, strategy: Any, message: str) -> None:
    module = model()
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, module, strategy=strategy)
    assert module.forwards == 0


def test_a_parameter_that_gets_a_second_optimizer_on_the_way(tmp_path: Path) -> None:
    class Adding(Two):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.optimizers()[1].add_param_group({"params": [self.first.bias]})

    with pytest.raises(MisconfigurationException, match=r"first\.bias in SGD \(number 0\) and SGD \(number 1\)"):
        fit(tmp_path, Adding(separate))


# ------------------------------------------------------------------------------------------------ numbers


class SpoiltGradient(Two):
    def on_after_backward(self) -> None:
        if self.trainer.fit_progress.batch == 2:
            assert self.second.bias.grad is not None
            self.second.bias.grad.fill_(float("nan"))


class SpoiltStepping(SpoiltGradient):
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)


@pytest.mark.parametrize("kind", [SpoiltGradient, SpoiltStepping])
@pytest.mark.parametrize("mode", ["raise", "skip", "warn"])
def test_no_optimizer_steps_where_the_gradients_of_one_are_not_finite(tmp_path: Path, mode: str, kind: Any) -> None:
    model, before = kind(separate), {}

    class Keeps(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            before[batch_idx] = pl_module.first.weight.detach().clone()

    arguments: dict[str, Any] = {"on_nonfinite": mode, "callbacks": [Keeps()], "max_epochs": 1}
    if mode == "raise":
        with pytest.raises(NonFiniteError, match=r"second\.bias"):
            fit(tmp_path, model, **arguments)
        assert torch.equal(model.first.weight, before[2])
        return
    with pytest.warns(UserWarning, match=r"second\.bias|were (skipped|taken)"):
        run = fit(tmp_path, model, **arguments)
    assert torch.equal(before[3], before[2]) is (mode == "skip")  # the first layer's gradients were finite
    assert bool(model.second.bias.isfinite().all()) is (mode == "skip")
    assert run.global_step == (BATCHES - 1 if mode == "skip" else BATCHES)


class Overflowing(Two):
    """The scaled gradients of the second layer alone overflow, at one batch."""

    def on_after_backward(self) -> None:
        if self.trainer.fit_progress.batch == 2:
            assert self.second.bias.grad is not None
            self.second.bias.grad.fill_(float("inf"))


@pytest.mark.parametrize("clip", [None, 0.01])
def test_a_gradient_scaler_unscales_each_and_is_updated_once(tmp_path: Path, clip: float | None) -> None:
    def scaled() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)

    model, by_hand, scaler = Overflowing(separate), Two(separate), scaled()
    plugin = MixedPrecision("16-mixed", "cpu", scaled())
    run = fit(tmp_path, model, plugins=[plugin], gradient_clip_val=clip, max_epochs=1)
    by_hand.log = lambda *a, **k: None  # type: ignore[method-assign]
    optimizers, configs = by_hand.configure_optimizers()
    for i, batch in enumerate(batches()):
        for optimizer in optimizers:
            optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = by_hand.training_step(batch, i)
        scaler.scale(loss).backward()
        if i == 2:
            by_hand.second.bias.grad.fill_(float("inf"))  # type: ignore[union-attr]
        for optimizer in optimizers:
            if clip is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
            scaler.step(optimizer)
        scaler.update()
        for config in configs:
            config["scheduler"].step()
    assert_same(model, by_hand)
    assert run.scaler.get_scale() == scaler.get_scale()
    assert run.global_step == BATCHES


# ------------------------------------------------------------------------------------------------ checkpoints, ranks


@pytest.mark.parametrize("kind", [Two, Stepping])
@pytest.mark.parametrize("stop", [2, 4, 7], ids=["in an accumulation", "between two", "at an epoch's end"])
def test_a_run_resumed_in_mid_epoch_is_the_run_never_stopped(tmp_path: Path, kind: Any, stop: int) -> None:
    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.fit_progress.batches == stop:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    whole, resumed = kind(muon_and_adamw), kind(muon_and_adamw)
    arguments: dict[str, Any] = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.01}
    first = fit(tmp_path, whole, callbacks=[Saves()], **arguments)
    second = fit(tmp_path, resumed, ckpt_path=tmp_path / "middle.ckpt", **arguments)
    assert_same(whole, resumed)
    assert 0 < resumed.forwards < whole.forwards
    assert second.callback_metrics == first.callback_metrics and second.global_step == first.global_step
    for one, other in zip(first.optimizers, second.optimizers, strict=True):
        assert one.param_groups[0]["lr"] == other.param_groups[0]["lr"]
        assert str(one.state_dict()) == str(other.state_dict())


def test_a_checkpoint_of_one_optimizer_does_not_fit_two(tmp_path: Path) -> None:
    saved = fit(tmp_path, Two(grouped), callbacks=[ModelCheckpoint(tmp_path)], enable_checkpointing=True)
    path = saved.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    with pytest.raises(CheckpointMismatchError, match="has 1 optimizer states, `configure_optimizers` made 2"):
        fit(tmp_path, Two(separate), ckpt_path=path, max_epochs=3)
    content = torch.load(path, weights_only=True)
    fit(
        tmp_path,
        model := Two(separate),
        callbacks=[saves := ModelCheckpoint(tmp_path / "two")],
        enable_checkpointing=True,
    )
    both = torch.load(saves.best_model_path, weights_only=True)
    assert (len(content["optimizer_states"]), len(both["optimizer_states"])) == (1, 2)
    assert both["optimizer_states"][1]["param_groups"][0]["params"] == [0, 1]
    assert model.trainer.global_step == 14


def on_each_rank(folder: Path) -> None:
    model = Two(muon_and_adamw)
    run = fit(folder, model, DataLoader(Samples(2 * BATCHES), batch_size=1), devices=2, strategy="ddp",
              accumulate_grad_batches=2, gradient_clip_val=0.01)  # fmt: skip
    torch.save((weights(model), run.global_step), folder / f"{run.global_rank}.pt")


def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    run_in_ranks(on_each_rank, tmp_path)
    model = Two(muon_and_adamw)
    run = fit(tmp_path, model, accumulate_grad_batches=2, gradient_clip_val=0.01)
    (first, steps), (second, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second) and steps == run.global_step == 8
    torch.testing.assert_close(first, weights(model), rtol=1e-4, atol=1e-5)
