"""Communication hooks under DDP: the ranks train what one process trains, also after a change and after a resume.

Users of Lightning reported hooks that nobody called on their hardware, PowerSGD that began anew after a resume, models
that parted for ever under post-local SGD, and errors out of the middle of a backward pass.

Tests of ``treadle_fabric.strategies.data_parallel.communication``,
``treadle_fabric.strategies.data_parallel.averaging``, ``treadle_fabric.strategies.data_parallel.hook_checks``,
``treadle_fabric.strategies.data_parallel.ddp_engine``.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.processes import run_in_ranks
from tests.reports.two_layers import weights
from tests.trainer.models import loader, trainer
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    allreduce_hook,
    bf16_compress_hook,
    fp16_compress_hook,
    fp16_compress_wrapper,
)
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import (
    PowerSGDState,
    batched_powerSGD_hook,
    powerSGD_hook,
)
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.algorithms.model_averaging.hierarchical_model_averager import HierarchicalModelAverager

import treadle as L
from treadle.tuner import Tuner
from treadle_fabric import DDPStrategy, Fabric, MisconfigurationException
from treadle_fabric.checkpoint import PerRank
from treadle_fabric.strategies.data_parallel.averaging import ModelAveraging

pytestmark = pytest.mark.timeout(110)

PARTS = {"bucket_cap_mb": 0.0005}  # several buckets, also of a small model


def power(start: int = 2, **kwargs: Any) -> dict[str, Any]:
    state = PowerSGDState(None, start_powerSGD_iter=start, min_compression_rate=1, **kwargs)
    return {"ddp_comm_state": state, "ddp_comm_hook": powerSGD_hook, **PARTS}


def local(start: int = 2, period: Any = 1, **kwargs: Any) -> dict[str, Any]:
    state = PostLocalSGDState(None, None, start, **{"post_local_gradient_allreduce": False, **kwargs})
    return {"ddp_comm_state": state, "ddp_comm_hook": post_localSGD_hook, "model_averaging_period": period, **PARTS}


class Counting:
    """A hook of the user's, with a state that has a state dict; its annotations are strings."""

    def __init__(self) -> None:
        self.calls = 0

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]


def counting_hook(state: Counting, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    state.calls += bucket.is_last()
    return allreduce_hook(None, bucket)  # type: ignore[arg-type]


HOOKS: dict[str, Any] = {
    "none": dict,
    "own": lambda: {"ddp_comm_state": Counting(), "ddp_comm_hook": counting_hook},
    "fp16": lambda: {"ddp_comm_hook": fp16_compress_hook},
    "bf16": lambda: {"ddp_comm_hook": bf16_compress_hook},
    "fp16 around": lambda: {"ddp_comm_hook": allreduce_hook, "ddp_comm_wrapper": fp16_compress_wrapper},
    "power later": lambda: power(1000),
    "power": power,
    "local": local,
}
ERRORS = {"fp16": 1e-4, "bf16": 1e-3, "fp16 around": 1e-4, "power": 1e-2}


class Net(L.LightningModule):
    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.below, self.middle, self.above = nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.above(self.middle(self.below(x / 10).tanh()).tanh())

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if self.kind == "nothing" and self.global_rank == 1 and batch_idx in (1, 4):
            return None
        loss = self(batch).square().mean()
        if self.kind == "noise":
            return loss * torch.rand(())
        return {"loss": loss, "weight": batch_idx + self.global_rank} if self.kind == "weighted" else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9 if self.kind == "noise" else 0)


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.01},
    "weighted": {"accumulate_grad_batches": 2},
    "nothing": {},
}


def by_trainer(folder: Path, world: int, feature: str = "plain", **arguments: Any) -> list[float]:
    strategy = "auto" if world == 1 else DDPStrategy(**arguments)
    model = Net(feature)
    trainer(folder, devices=world, strategy=strategy, **FEATURES[feature]).fit(model, loader(24, 4 // world))
    return weights(model)


def after_a_trial(folder: Path) -> list[float]:
    """A search has run its trials with the same engine and the same hook before."""
    run = trainer(folder, devices=2, strategy=DDPStrategy(**power()))
    Tuner(run).lr_find(model := Net(), loader(24, 2), num_training=14, update_attr=False)
    run.fit(model, loader(24, 2))
    return weights(model)


def by_hand(world: int, **arguments: Any) -> list[float]:
    fabric = Fabric(accelerator="cpu", devices=world, strategy="auto" if world == 1 else DDPStrategy(**arguments))
    fabric.launch()
    model, optimizer = fabric.setup(module := Net(), module.configure_optimizers())
    for i, batch in enumerate(fabric.setup_dataloaders(loader(24, 4 // world))):
        with fabric.no_backward_sync(model, enabled=i % 2 == 0):
            fabric.backward(model(batch).square().mean() / 2)
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()
    return weights(module)


def two_models() -> list[float]:
    """PowerSGD for two models, whose buckets have other sizes, and a layer that is frozen and unfrozen."""
    strategy = DDPStrategy(**power())
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    nets = Net(), nn.Sequential(nn.Linear(4, 12), nn.Linear(12, 9), nn.Linear(9, 1))
    pairs = [fabric.setup(net, torch.optim.SGD(net.parameters(), 0.05)) for net in nets]
    for i in range(9):
        nets[0].middle.requires_grad_(not 4 <= i < 6)
        for model, optimizer in pairs:
            torch.manual_seed(10 * i + fabric.global_rank)
            fabric.backward(model(torch.randn(4, 4)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    return weights(nets[0]) + weights(nets[1])


def on_machines() -> list[float]:
    """Post-local SGD where each rank is a machine of its own: the gradients of a machine are averaged."""
    rank = os.environ["LOCAL_RANK"]
    os.environ.update(LOCAL_RANK="0", NODE_RANK=rank)
    strategy = DDPStrategy(**local(period=3, post_local_gradient_allreduce=True))
    fabric = Fabric(accelerator="cpu", devices=1, num_nodes=2, strategy=strategy)
    fabric.launch()
    model, optimizer = fabric.setup(module := Net(), module.configure_optimizers())
    apart = []
    for i in range(9):
        torch.manual_seed(10 * i + int(rank))
        fabric.backward(model(torch.randn(4, 4)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        one, other = fabric.all_gather(module.above.weight.detach())
        apart.append(float(not torch.equal(one, other)))
    os.environ.update(LOCAL_RANK=rank, NODE_RANK="0")
    return apart


class Slopes(nn.Module):
    """Has gradients that do not depend on its weights, but on the rank and the step."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Parameter(torch.zeros(6, 8)), nn.Parameter(torch.zeros(4, 4))

    def forward(self, i: int) -> Tensor:
        torch.manual_seed(10 * i + dist.get_rank())
        slopes = torch.randn(6, 8), torch.randn(4, 4)
        return sum((p * slope).sum() for p, slope in zip((self.one, self.other), slopes, strict=True))


def after_a_change(**arguments: Any) -> list[float]:
    """The sum of the gradients of six steps, the last of them after a change: compressed, or whole without hook."""
    fabric = Fabric(accelerator="cpu", devices=2, strategy=DDPStrategy(**arguments))
    fabric.launch()
    model, optimizer = fabric.setup(module := Slopes(), torch.optim.SGD(module.parameters(), 1.0))
    for i in range(6):
        module.other.requires_grad_(i < 5)
        fabric.backward(model(i))
        optimizer.step()
        optimizer.zero_grad()
    return weights(nn.ParameterList([module.one]))


def saved_by_hand(folder: Path) -> bool:
    """PowerSGD in a hand-written loop that is saved in the middle; the first ends as the second."""

    def run(saves: bool) -> list[float]:
        strategy = DDPStrategy(**power())
        fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
        fabric.launch()
        model, optimizer = fabric.setup(module := Net(), module.configure_optimizers())
        state = {"model": model, "optimizer": optimizer}
        if not saves:
            kept = fabric.load(folder / "hand.ckpt", state)
            strategy.load_engine_state(kept["engine"][fabric.global_rank])
        for i in range(0 if saves else 5, 8):
            if i == 5 and saves:
                fabric.save(folder / "hand.ckpt", {**state, "engine": PerRank(strategy.engine_state())})
            torch.manual_seed(10 * i + fabric.global_rank)
            fabric.backward(model(torch.randn(4, 4)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        return weights(module)

    return run(True) == run(False)


def run_rank(folder: Path) -> None:
    out: dict[str, Any] = {"machines": on_machines()}
    for name, hook in HOOKS.items():
        out[f"{name}, by hand"] = by_hand(2, **hook())
        for feature in FEATURES:
            out[f"{name}, {feature}"] = by_trainer(folder, 2, feature, **hook())
    state = (arguments := HOOKS["own"]())["ddp_comm_state"]
    by_trainer(folder, 2, **arguments)
    out.update(calls=state.calls, two=two_models(), saved=saved_by_hand(folder), trial=after_a_trial(folder))
    out["sums"] = after_a_change(**power()), after_a_change()
    (folder / f"{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(out))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    run_in_ranks(run_rank, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("feature", ["by hand", *FEATURES])
@pytest.mark.parametrize("hook", HOOKS)
def test_the_ranks_train_what_one_process_trains(ranks: Any, tmp_path: Path, hook: str, feature: str) -> None:
    zero, one = (found[f"{hook}, {feature}"] for found in ranks)
    assert zero == one
    whole = ranks[0][f"none, {feature}"]
    if hook == "none" and feature in ("by hand", "plain", "clipped"):
        whole = by_hand(1) if feature == "by hand" else by_trainer(tmp_path, 1, feature)
    if (hook, feature) != ("local", "clipped"):  # where each rank clips its own gradients
        assert zero == pytest.approx(whole, rel=1e-5, abs=ERRORS.get(hook, 1e-7))
    if hook in ERRORS:
        assert zero != pytest.approx(whole, rel=1e-7, abs=1e-9), "nothing was compressed"


def test_a_hook_is_called_for_each_backward_pass(ranks: Any) -> None:
    assert ranks[0]["calls"] == 6


def test_trials_leave_no_trace_in_a_hook(ranks: Any) -> None:
    assert ranks[0]["trial"] == ranks[0]["power, plain"]


def test_each_model_has_a_state_of_its_own_that_survives_changes(ranks: Any) -> None:
    assert ranks[0]["two"] == ranks[1]["two"]


def test_no_gradient_is_lost_when_the_module_is_wrapped_again(ranks: Any) -> None:
    """What PowerSGD has not sent yet goes along with the next gradients, which are sent whole."""
    compressed, whole = ranks[0]["sums"]
    assert compressed == pytest.approx(whole, abs=1e-5)


def test_machines_learn_apart_between_two_averages(ranks: Any) -> None:
    assert ranks[0]["machines"] == [0, 0, 0, 1, 1, 0, 1, 1, 0]


def test_a_hand_written_loop_goes_on_to_the_last_bit(ranks: Any) -> None:
    assert ranks[0]["saved"] and ranks[1]["saved"]


# Exact resume

RESUMED: dict[str, Any] = {
    "plain": lambda: {"bucket_cap_mb": 0.01},
    "power": lambda: {**power(), "gradient_as_bucket_view": True},
    "local": lambda: local(1, 4),
}


class Wide(Net):
    """Numbers that round in the sum of three ranks, and buckets that DDP arranges after the first step."""

    def __init__(self) -> None:
        super().__init__("noise")
        self.below, self.middle, self.above = nn.Linear(4, 70), nn.Linear(70, 64), nn.Linear(64, 61)


class Saves(L.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.current_epoch == 0 and args[-1] == 6:  # in the middle of an accumulation
            trainer.save_checkpoint(self.path)


def resumed(folder: Path, name: str) -> tuple[list[float], list[float]]:
    def fit(path: Path | None, **kwargs: Any) -> list[float]:
        L.seed_everything(1 + int(os.environ["LOCAL_RANK"]), verbose=False)
        run = trainer(
            folder,
            devices=3,
            strategy=DDPStrategy(**RESUMED[name]()),
            accumulate_grad_batches=2,
            max_epochs=2,
            **kwargs,
        )
        run.fit(model := Wide(), loader(48, 2), ckpt_path=path)
        return weights(model)

    path = folder / f"{name}.ckpt"
    return fit(None, callbacks=Saves(path)), fit(path)


def run_resumed(folder: Path) -> None:
    for name in RESUMED:
        unbroken, again = resumed(folder, name)
        assert again == unbroken, name


def run_by_fewer(folder: Path) -> None:
    """With another number of ranks the counts go on, and what single ranks remember is given up."""
    for name, iterations in (("power", 10), ("local", 1)):
        arguments = RESUMED[name]()
        strategy = DDPStrategy(**arguments)
        run = trainer(folder, devices=2, strategy=strategy, accumulate_grad_batches=2, max_epochs=2)
        run.fit(model := Wide(), loader(48, 2), ckpt_path=folder / f"{name}.ckpt")
        assert arguments["ddp_comm_state"].iter >= iterations, name
        found = torch.tensor(weights(model))
        assert name == "local" or torch.equal(*run.strategy.all_gather(found)), name


def test_each_rank_goes_on_to_the_last_bit(tmp_path: Path) -> None:
    run_in_ranks(run_resumed, tmp_path, devices=3)
    run_in_ranks(run_by_fewer, tmp_path)


# Averages


def run_averages() -> None:
    fabric = Fabric(accelerator="cpu", devices=4, strategy="ddp")
    fabric.launch()

    def step(average: Any) -> list[Tensor]:
        layer = nn.Linear(3, 2)
        with torch.no_grad():
            layer.weight.fill_(1 + fabric.global_rank)
        optimizer, seen = torch.optim.SGD(layer.parameters(), 0.1), []
        for i in range(9):
            layer(torch.full((1, 3), float(i + fabric.global_rank))).sum().backward()
            optimizer.step()
            average(optimizer)
            seen.append(layer.weight.detach().clone())
        return seen

    for period, torchs in (
        (3, PeriodicModelAverager(3)),
        (OrderedDict({2: 2, 4: 4}), HierarchicalModelAverager(OrderedDict({2: 2, 4: 4}))),
    ):
        ours = ModelAveraging(period)
        ours.prepare()
        mine = step(lambda optimizer, ours=ours: ours.after_step(optimizer, True))
        theirs = step(lambda optimizer, torchs=torchs: torchs.average_parameters(optimizer.param_groups))
        assert all(map(torch.equal, mine, theirs)), period
    with pytest.raises(MisconfigurationException, match="with 4 processes"):
        ModelAveraging({2: 3}).prepare()


def test_models_are_averaged_when_torch_averages_them() -> None:
    run_in_ranks(run_averages, devices=4)


# What does not fit together


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"ddp_comm_hook": "fp16"}, "ddp_comm_hook='fp16' must be a function of a state and a bucket"),
        ({"ddp_comm_hook": lambda bucket: bucket}, "cannot be called with a state and a bucket"),
        ({"ddp_comm_wrapper": fp16_compress_wrapper}, "ddp_comm_wrapper=fp16_compress_wrapper has an effect only with"),
        ({"ddp_comm_state": object()}, "ddp_comm_state=.* has an effect only with a hook"),
        ({"ddp_comm_hook": allreduce_hook, "ddp_comm_wrapper": 1}, "ddp_comm_wrapper=1 must be a function"),
        ({"ddp_comm_hook": powerSGD_hook}, "powerSGD_hook cannot work with ddp_comm_state=None: give .*PowerSGDState"),
        ({"ddp_comm_hook": post_localSGD_hook}, "give ddp_comm_state=PostLocalSGDState"),
        ({**power(), "ddp_comm_hook": fp16_compress_hook}, "fp16_compress_hook cannot work with"),
        ({**local(), "model_averaging_period": None}, "PostLocalSGDState without model_averaging_period"),
        ({"model_averaging_period": 4}, "model_averaging_period has an effect only with post-local SGD"),
        ({**power(), "model_averaging_period": 4}, "model_averaging_period has an effect only with post-local SGD"),
        ({**local(), "model_averaging_period": 0}, "model_averaging_period=0 must be an integer of at least 1"),
        ({**local(), "model_averaging_period": {4: 2, 2: 4}}, "in ascending order"),
        ({**power(), "static_graph": True}, "PowerSGD with static_graph=True"),
        ({"ddp_comm_hook": allreduce_hook, "mixed_precision": object()}, "ddp_comm_hook with mixed_precision"),
        ({"ddp_comm_hok": allreduce_hook}, "Did you mean 'ddp_comm_hook'"),
    ],
)
def test_arguments_that_do_not_fit_together(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(MisconfigurationException, match=says):
        DDPStrategy(**arguments)


def test_a_hook_that_torch_has_broken_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="batched_powerSGD_hook fails in this version of torch"):
        DDPStrategy(**{**power(), "ddp_comm_hook": batched_powerSGD_hook})


@pytest.mark.parametrize(
    ("arguments", "precision", "module", "says"),
    [
        (
            power(),
            "32-true",
            nn.Embedding(3, 2, sparse=True),
            "PowerSGD cannot exchange sparse gradients, and 'weight'",
        ),
        (HOOKS["fp16"](), "32-true", nn.Embedding(3, 2, sparse=True), "to float16 on the CPU cannot exchange sparse"),
        (power(), "16-mixed", nn.Linear(3, 2), "PowerSGD with a precision that scales losses"),
    ],
)
def test_modules_that_a_hook_cannot_train(arguments: Any, precision: Any, module: nn.Module, says: str) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, strategy=DDPStrategy(**arguments), precision=precision)
    fabric.launch()
    try:
        with pytest.raises(MisconfigurationException, match=says):
            fabric.setup(module)
    finally:
        fabric.strategy.teardown()


@pytest.mark.parametrize("arguments", [power(3), local(5, {2: 1, 4: 2})])
def test_a_strategy_travels_to_another_process(arguments: dict[str, Any]) -> None:
    """As to the processes that ``ddp_spawn`` starts, which have no process group yet."""
    strategy = pickle.loads(pickle.dumps(DDPStrategy(start_method="spawn", **arguments)))
    state, travelled = arguments["ddp_comm_state"], strategy._communication._state
    assert type(travelled) is type(state)
    values = itertools.chain.from_iterable((getattr(each, name) for each in (state, travelled)) for name in ("iter",))
    assert len({*values}) == 1
    for name in ("start_powerSGD_iter", "start_localSGD_iter", "matrix_approximation_rank"):
        assert getattr(travelled, name, None) == getattr(state, name, None)


def forked() -> list[float]:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=DDPStrategy(start_method="fork", **power()))
    found: list[float] = fabric.launch(in_fork)
    return found


def in_fork(fabric: Fabric) -> list[float]:
    model, optimizer = fabric.setup(module := Net(), module.configure_optimizers())
    for i, batch in enumerate(fabric.setup_dataloaders(loader(24, 2))):
        with fabric.no_backward_sync(model, enabled=i % 2 == 0):
            fabric.backward(model(batch).square().mean() / 2)
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()
    return weights(module)


def test_hooks_run_in_processes_that_are_forked(ranks: Any) -> None:
    assert forked() == ranks[0]["power, by hand"]
