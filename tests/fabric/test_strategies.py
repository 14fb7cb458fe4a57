"""Strategies: collectives, DDP against one process, files, names.

Tests of ``treadle_fabric.strategies.strategy``, ``treadle_fabric.strategies.native_step``,
``treadle_fabric.strategies.states.checkpointing``, ``treadle_fabric.strategies.states.whole_state``,
``treadle_fabric.strategies.single_device``, ``treadle_fabric.strategies.parallel``,
``treadle_fabric.strategies.ddp``, ``treadle_fabric.strategies.registry``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.processes import own_lines
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from treadle_fabric import (
    STRATEGY_REGISTRY,
    CheckpointError,
    CheckpointIO,
    DDPStrategy,
    Fabric,
    FabricModule,
    MisconfigurationException,
    ProcessFailedError,
    SingleDeviceStrategy,
    Strategy,
    TorchCheckpointIO,
    UnusedParametersError,
    engine_of,
    method_of,
)
from treadle_fabric.strategies.unwrapping import inside, name_in, plain_name


def two(function: Callable[..., Any], *args: Any, strategy: Any = "ddp_fork", **kwargs: Any) -> Any:
    """Run in two processes; rank 0's result."""
    return Fabric(accelerator="cpu", devices=2, strategy=strategy, **kwargs).launch(function, *args)


def gather(value: Any) -> list[Any]:
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


# Names


@pytest.mark.parametrize("name", ["ddp", "ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_ddp_names(name: str) -> None:
    methods = {"ddp": "popen", "ddp_spawn": "spawn", "ddp_fork": "fork", "ddp_notebook": "fork"}
    for suffix in ("", "_find_unused_parameters_true", "_find_unused_parameters_false"):
        strategy = STRATEGY_REGISTRY.get(name + suffix)
        assert isinstance(strategy, DDPStrategy)
        assert strategy.start_method == methods[name]
    assert "single_device" in STRATEGY_REGISTRY
    assert name in STRATEGY_REGISTRY.available_strategies()


def test_unknown_names() -> None:
    with pytest.raises(MisconfigurationException, match="Did you mean 'ddp_spawn'"):
        STRATEGY_REGISTRY.get("ddp_spwan")
    with pytest.raises(MisconfigurationException, match="ddpp"):
        Fabric(accelerator="cpu", devices=1, strategy="ddpp")
    with pytest.raises(MisconfigurationException, match="Did you mean 'spawn'"):
        DDPStrategy(start_method="spwan")  # type: ignore[arg-type]


def test_a_users_strategy_can_be_registered() -> None:
    class Mine(SingleDeviceStrategy):
        pass

    STRATEGY_REGISTRY.register("mine", Mine, device="cpu")
    try:
        with pytest.raises(MisconfigurationException, match="taken"):
            STRATEGY_REGISTRY.register("mine", Mine)
        assert type(Fabric(accelerator="cpu", devices=1, strategy="mine").strategy) is Mine
    finally:
        STRATEGY_REGISTRY.remove("mine")
    assert "mine" not in STRATEGY_REGISTRY


# One device


def test_one_device_refuses_the_reductions_that_several_refuse() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    assert fabric.all_reduce(torch.tensor(2.0), reduce_op="sum").item() == 2.0
    with pytest.raises(MisconfigurationException, match="Did you mean 'avg'|mean"):
        fabric.all_reduce(torch.tensor(2.0), reduce_op="avrage")


def test_reduce_is_all_reduce_and_leaves_what_is_no_tensor() -> None:
    strategy = SingleDeviceStrategy("cpu")
    one, other = torch.ones(2), object()
    assert torch.equal(strategy.reduce(one, reduce_op="sum"), strategy.all_reduce(one, reduce_op="sum"))
    assert strategy.reduce(other) is other


def test_single_device() -> None:
    strategy = Fabric(accelerator="cpu", devices=1).strategy
    assert isinstance(strategy, SingleDeviceStrategy)
    assert strategy.root_device == torch.device("cpu")
    ranks = strategy.world_size, strategy.global_rank, strategy.local_rank, strategy.node_rank
    assert ranks == (1, 0, 0, 0)
    assert strategy.is_global_zero
    assert strategy.launcher is None
    assert strategy.distributed_sampler_kwargs is None
    x = torch.ones(2)
    assert strategy.all_reduce(x) is x
    assert strategy.all_gather(x) is x
    assert strategy.broadcast(x) is x
    strategy.barrier()
    assert strategy.reduce_boolean_decision(True)
    assert not strategy.reduce_boolean_decision(False, all=False)
    net = nn.Linear(1, 1)
    assert strategy.setup_module(net) is net


def test_moves_state_that_an_optimizer_has_already() -> None:
    parameter = nn.Parameter(torch.ones(1, device="meta"))  # as if its model had moved
    optimizer = torch.optim.Adam([parameter])
    optimizer.state[parameter] = {n: torch.zeros(1) for n in ("step", "exp_avg", "exp_avg_sq")}
    Fabric(accelerator="cpu", devices=1).setup_optimizers(optimizer)
    devices = {k: v.device.type for s in optimizer.state.values() for k, v in s.items()}
    assert devices == {"step": "cpu", "exp_avg": "meta", "exp_avg_sq": "meta"}


def test_a_users_strategy_sees_every_backward_and_step() -> None:
    """The short cuts of hot loops are for strategies that add nothing."""
    calls: list[str] = []

    class Watching(SingleDeviceStrategy):
        def backward(self, tensor: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
            calls.append("backward")
            super().backward(tensor, module, *args, **kwargs)

        def before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            calls.append("step")

    fabric = Fabric(accelerator="cpu", devices=1, strategy=Watching())
    net = nn.Linear(1, 1)
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    fabric.backward(model(torch.ones(1, 1)).sum())
    optimizer.step()
    assert calls == ["backward", "step"]


# Collectives


def collectives(fabric: Fabric) -> None:
    rank = fabric.global_rank
    strategy = fabric.strategy
    assert (fabric.world_size, fabric.local_rank, fabric.node_rank) == (2, rank, 0)
    assert dist.get_backend() == "gloo"
    x = torch.tensor([1.0, 2.0]) * (rank + 1)
    assert fabric.all_reduce(x).tolist() == [1.5, 3.0]
    assert x.tolist() == [rank + 1.0, 2 * (rank + 1.0)], "the argument stays as it was"
    assert fabric.all_reduce(x, reduce_op="sum").tolist() == [3.0, 6.0]
    assert fabric.all_reduce(x, reduce_op=dist.ReduceOp.MAX).tolist() == [2.0, 4.0]
    assert fabric.all_reduce(torch.tensor(rank)).item() == 0.5
    assert fabric.all_reduce({"a": [x], "b": rank})["b"].item() == 0.5
    try:
        fabric.all_reduce(x, reduce_op="maen")
    except MisconfigurationException as e:
        assert "Did you mean 'mean'" in str(e)
    else:
        raise AssertionError("an unknown operation was taken")
    assert fabric.all_gather(x).tolist() == [[1.0, 2.0], [2.0, 4.0]]
    assert fabric.all_gather({"a": rank})["a"].tolist() == [0, 1]
    w = torch.tensor([1.0], requires_grad=True)
    (fabric.all_gather(w * (rank + 1), sync_grads=True) ** 2).sum().backward()
    assert w.grad is not None
    assert w.grad.item() == 2 * 2 * (rank + 1) ** 2
    assert fabric.broadcast({"from": rank}, src=1) == {"from": 1}
    fabric.barrier("here")
    votes = [strategy.reduce_boolean_decision(rank == 0, all=a) for a in (True, False)]
    assert votes == [False, True]
    assert strategy.reduce_boolean_decision(True)
    order = Path("order")
    with fabric.rank_zero_first():
        if rank == 0:
            order.write_text("0")
        assert order.exists()
    fabric.print(f"printed by rank {rank}")


def test_collectives(capfd: pytest.CaptureFixture[str]) -> None:
    two(collectives)
    out = capfd.readouterr().out
    assert "printed by rank 0" in out
    assert "printed by rank 1" not in out


# DDP against one process


class Net(nn.Module):
    forward_methods = ("training_step",)

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 1)
        self.norm = nn.BatchNorm1d(8, affine=False, momentum=1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))

    def training_step(self, batch: Any, weight: float = 1.0) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self(x), y) * weight

    def unmarked(self, batch: Any) -> Tensor:
        return self.training_step(batch)


def train(fabric: Fabric, how: str, accumulate: int, path: str) -> tuple[list[float], dict[str, Tensor]]:
    torch.manual_seed(0)
    net = Net()
    data = TensorDataset(torch.randn(32, 4), torch.randn(32, 1))
    loader = fabric.setup_dataloaders(DataLoader(data, 8 // fabric.world_size))
    model, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters(), lr=0.05))
    step = {"marked": model.training_step, "method": method_of(model, "training_step")}.get(
        how, lambda batch: nn.functional.mse_loss(model(batch[0]), batch[1])
    )
    losses = []
    for _ in range(2):
        for i, batch in enumerate(loader):
            last = (i + 1) % accumulate == 0
            with fabric.no_backward_sync(model, enabled=not last):
                loss = step(batch)
                fabric.backward(loss / accumulate)
            if last:
                fabric.clip_gradients(model, optimizer, max_norm=1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(fabric.all_reduce(loss.detach()).item())
    parameters = {k: v.clone() for k, v in model.state_dict().items()}
    for other in gather(parameters) if fabric.world_size > 1 else []:
        assert all(torch.equal(other[k], parameters[k]) for k in other), "the ranks drifted apart"
    fabric.save(path, {"model": model, "optimizer": optimizer, "epoch": 2})
    return losses, parameters


@pytest.mark.parametrize(("how", "accumulate"), [("forward", 1), ("marked", 1), ("method", 2)])
def test_two_processes_equal_one_with_the_whole_batch(how: str, accumulate: int, tmp_path: Path) -> None:
    one = train(Fabric(accelerator="cpu", devices=1), how, accumulate, str(tmp_path / "one.ckpt"))
    both = two(train, how, accumulate, str(tmp_path / "two.ckpt"))
    assert both[0] == pytest.approx(one[0], rel=1e-5)
    torch.testing.assert_close(both[1], one[1])
    files = [torch.load(tmp_path / f"{n}.ckpt", weights_only=True) for n in ("one", "two")]
    torch.testing.assert_close(files[0], files[1])
    assert list(files[1]["model"]) == list(Net().state_dict())


def no_sync(fabric: Fabric) -> None:
    model = fabric.setup(nn.Linear(1, 1, bias=False))
    x = torch.tensor([[fabric.global_rank + 1.0]])
    with fabric.no_backward_sync(model):
        fabric.backward(model(x).sum())
    assert [g.item() for g in gather(model.weight.grad)] == [1.0, 2.0]
    model.zero_grad()
    with fabric.no_backward_sync(model, enabled=False):
        fabric.backward(model(x).sum())
    assert [g.item() for g in gather(model.weight.grad)] == [1.5, 1.5]


def test_no_backward_sync() -> None:
    two(no_sync)


def mixed(fabric: Fabric) -> Any:
    torch.manual_seed(0)
    net = Net()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    x, y = torch.ones(4, 4), torch.ones(4, 1)
    first = model.training_step((x, y)).item()
    for _ in range(4):  # the scaler may skip steps until its scale is low enough
        optimizer.zero_grad()
        fabric.backward(model.training_step((x, y)))
        fabric.clip_gradients(model, optimizer, max_norm=10.0)
        optimizer.step()
    assert model.training_step((x, y)).item() < first
    return model(x).dtype


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-true"])
def test_precision_under_ddp(precision: str) -> None:
    assert two(mixed, precision=precision) == torch.float32


def methods(fabric: Fabric) -> None:
    torch.manual_seed(0)
    model = fabric.setup(Net())
    batch = torch.ones(2, 4), torch.ones(2, 1)
    try:
        model.unmarked(batch)
    except MisconfigurationException as e:
        assert "mark_forward_method('unmarked')" in str(e)
    else:
        raise AssertionError("gradients of an unmarked method would not have been reduced")
    with torch.no_grad():
        model.unmarked(batch)
        if fabric.global_rank == 0:  # ranks may evaluate different numbers of batches
            model.training_step(batch)
            model(batch[0])
    model.mark_forward_method("unmarked")
    fabric.backward(model.unmarked((batch[0] * fabric.global_rank, batch[1])))
    first, second = gather(model.one.weight.grad)
    assert torch.equal(first, second)
    assert isinstance(model, FabricModule)
    assert model.module.one is model.one
    frozen = fabric.setup(nn.Linear(1, 1).requires_grad_(False))  # nothing to average
    frozen(torch.ones(1, 1))


def test_methods_under_ddp() -> None:
    two(methods)


# Unused parameters


class Partly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare, self.frozen = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1).requires_grad_(False)

    def forward(self, x: Tensor, both: bool = False) -> Tensor:
        return self.used(x) + (self.spare(x) if both else 0)


def unused(fabric: Fabric, at: str) -> str:
    net = Partly()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    for i in range(3):
        both = at == "later" and i == 0
        try:
            loss = model(torch.ones(1, 1), both=both).sum()
            fabric.backward(loss)
            if at != "no step":
                optimizer.step()
            optimizer.zero_grad()
        except UnusedParametersError as e:
            return f"{i}: {e}"
    return ""


@pytest.mark.parametrize(("at", "when"), [("first", 0), ("later", 2), ("no step", 1)])
def test_unused_parameters_are_named(at: str, when: int) -> None:
    text = two(unused, at)
    assert text.startswith(f"{when}: ")
    assert "spare.weight, spare.bias." in text
    assert "used.weight" not in text
    assert "frozen" not in text
    assert "ddp_find_unused_parameters_true" in text


def test_unused_parameters_may_be_found() -> None:
    assert two(unused, "first", strategy="ddp_fork_find_unused_parameters_true") == ""
    assert two(unused, "first", strategy=DDPStrategy(start_method="fork", static_graph=True)) == ""


class Expert(torch.nn.Module):
    """A shared layer, and one of each rank's own, of which every other rank has another one."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.shared, self.own, self.unused = (torch.nn.Linear(3, 3, bias=False) for _ in range(3))
        self.register_buffer("seen", torch.full((1,), float(rank)))
        for layer in (self.shared, self.own, self.unused):
            torch.nn.init.constant_(layer.weight, 1.0 + rank)
        names = ["own.weight", "unused.weight", "seen"]
        torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, names)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.own(self.shared(x)) + self.seen
        return out


def experts(fabric: Fabric) -> None:
    for wrap in (lambda module: module, lambda module: torch.compile(module, backend="eager")):
        own = Expert(fabric.global_rank)
        model, optimizer = fabric.setup(wrap(own), torch.optim.SGD(own.parameters(), 0.1))
        for _ in range(2):
            fabric.backward(model(torch.ones(1, 3)).sum())
            optimizer.step()
            optimizer.zero_grad()
        assert own.shared.weight.unique().numel() == 1 and len({t.sum().item() for t in gather(own.shared.weight)}) == 1
        assert [t[0, 0].item() for t in gather(own.unused.weight)] == [1, 2]
        assert [t.item() for t in gather(own.seen)] == [0, 1]
        first, second = gather(own.own.weight)
        torch.testing.assert_close(second - first, torch.ones(3, 3))  # each stepped by its own gradient
        assert (first != 1).all()


def test_what_a_module_keeps_from_ddp_is_each_ranks_own() -> None:
    two(experts)


def adversarial(fabric: Fabric) -> None:
    """Two models, each with an optimizer of its own: a step of one must not miss the other's gradients."""
    torch.manual_seed(0)
    nets = nn.Linear(1, 1), nn.Linear(1, 1)
    (g, go), (d, do) = (fabric.setup(n, torch.optim.SGD(n.parameters(), lr=0.1)) for n in nets)
    for _ in range(2):
        fake = g(torch.ones(1, 1))
        fabric.backward(d(fake.detach()).sum())
        do.step()
        do.zero_grad()
        fabric.backward(d(fake).sum())
        go.step()
        go.zero_grad()
        do.zero_grad()


def test_two_models_step_apart() -> None:
    two(adversarial)  # passes if nothing is raised


# Files


class Refuses(TorchCheckpointIO):
    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        raise CheckpointError("the disk is full")


def failing_save(fabric: Fabric) -> str:
    try:
        fabric.save("x.ckpt", {"a": 1})
    except CheckpointError as e:
        return "; ".join(gather(str(e)))
    return ""


def test_all_ranks_learn_that_rank_zero_could_not_write() -> None:
    text = two(failing_save, plugins=Refuses())
    assert text == "the disk is full; Rank 0 could not write 'x.ckpt': the disk is full"
    assert not os.path.exists("x.ckpt")


def save_and_load(fabric: Fabric) -> None:
    torch.manual_seed(fabric.global_rank)
    net = nn.Linear(2, 2)
    model, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters()))
    fabric.backward(model(torch.ones(1, 2)).sum())
    optimizer.step()
    fabric.save("x.ckpt", {"model": model, "optimizer": optimizer, "step": 3})
    with torch.no_grad():
        model.weight.zero_()
    state = {"model": model, "optimizer": optimizer, "step": 0}
    assert fabric.load("x.ckpt", state) == {}
    assert state["step"] == 3
    first, second = gather(model.weight.detach())
    assert torch.equal(first, second)
    assert first.any()
    strategy: Strategy = fabric.strategy
    assert list(strategy.get_module_state_dict(engine_of(model))) == ["weight", "bias"]
    assert isinstance(strategy.checkpoint_io, CheckpointIO)


def test_save_and_load_under_ddp() -> None:
    two(save_and_load)


# Start and end


def fails_on_rank_one(fabric: Fabric) -> None:
    if fabric.global_rank == 1:
        raise ValueError("a bad batch")
    fabric.barrier()


def test_failure_of_one_process_ends_all() -> None:
    with pytest.raises(ProcessFailedError, match="a bad batch"):
        two(fails_on_rank_one)


def spawned(fabric: Fabric, x: int) -> int:
    return x + int(fabric.all_reduce(torch.tensor(1.0), reduce_op="sum").item())


def test_spawn_returns_rank_zeros_result() -> None:
    assert two(spawned, 40, strategy="ddp_spawn") == 42


def test_teardown_ends_the_process_group() -> None:
    environ = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "0"}
    environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "TORCHELASTIC_RUN_ID": "1"}
    os.environ.update(environ)
    fabric = Fabric(accelerator="cpu", devices=1, strategy="ddp")
    fabric.launch()
    assert dist.is_initialized()
    assert fabric.all_reduce(torch.ones(1)).item() == 1.0
    fabric.strategy.teardown()
    assert not dist.is_initialized()


LATE_THREAD = """
import hashlib, os, sys, threading, time
from treadle_fabric import Fabric

fabric = Fabric(accelerator="cpu", devices=2)
fabric.launch()
fabric.barrier()
names = [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
assert "pt_gloo_runloop" in names or names.count(names[0]) > 1, names  # torch 2.9 gives its threads no names

def hold_tensors():
    # as the backend's own thread does when it comes to the processor late
    with open(f"/proc/self/task/{threading.get_native_id()}/comm", "w") as file:
        file.write("pt_gloo_runloop")
    started.set()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000)
    os.write(1, f"rank {fabric.global_rank} let go\\n".encode())

started = threading.Event()
threading.Thread(target=hold_tensors, daemon=True).start()
started.wait()
"""


@pytest.mark.faults
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads' names cannot be seen")
def test_the_end_waits_for_the_threads_of_the_backend(tmp_path: Path) -> None:
    # They need the interpreter to let go of tensors; one that does so when it ends would abort the process.
    (tmp_path / "late.py").write_text(LATE_THREAD)
    done = subprocess.run(
        [sys.executable, "late.py"], cwd=tmp_path, timeout=60, capture_output=True, text=True, check=True
    )
    assert sorted(own_lines(done.stdout)) == ["rank 0 let go", "rank 1 let go"]


class Around(nn.Module):
    """A wrapper, as engines put around layers."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.held = module


inside.register(Around, lambda wrapper: wrapper.held)


def test_names_in_wrappers_that_are_around_one_another() -> None:
    module = nn.Sequential(Around(Around(nn.Linear(2, 1))))
    there = {name for name, _ in module.named_parameters()}
    assert there == {"0.held.held.weight", "0.held.held.bias"}
    assert {plain_name(module, name) for name in there} == {"0.weight", "0.bias"}
    for name in ("0.weight", "0.held.held.weight"):  # also where the name has them already
        assert name_in(module, name) == "0.held.held.weight"
