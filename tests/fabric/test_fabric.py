"""Fabric in a hand-written loop: it changes nothing there, and says clearly what cannot work.

Tests of ``treadle_fabric.fabric``, ``treadle_fabric.setup.checks``, ``treadle_fabric.setup.wrapped``.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import own_lines
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from treadle_fabric import (
    AttributeDict,
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointUnsafeError,
    CPUAccelerator,
    CSVLogger,
    Fabric,
    FabricModule,
    MisconfigurationException,
    SingleDeviceStrategy,
)


def fabric(**kwargs: Any) -> Fabric:
    return Fabric(accelerator="cpu", devices=1, **kwargs)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


# A loop with Fabric equals the loop without


def loop(run: Fabric | None, optimizer_class: Any, workers: int) -> tuple[list[float], dict[str, Tensor]]:
    torch.manual_seed(7)
    model: Any = Net()
    optimizer = optimizer_class(model.parameters(), lr=0.05)
    data = TensorDataset(torch.randn(40, 4), torch.randn(40, 1))
    loader: Any = DataLoader(data, batch_size=8, shuffle=True, num_workers=workers)
    if run is not None:
        model, optimizer = run.setup(model, optimizer)
        loader = run.setup_dataloaders(loader)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    losses = []
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            if run is None:
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            else:
                run.backward(loss)
                run.clip_gradients(model, optimizer, max_norm=0.5)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
    return losses, model.state_dict()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("workers", [0, 1])
def test_no_loss_changes_to_the_last_bit(optimizer: Any, workers: int) -> None:
    raw = loop(None, optimizer, workers)
    ours = loop(fabric(), optimizer, workers)
    assert ours[0] == raw[0]
    assert all(torch.equal(ours[1][k], v) for k, v in raw[1].items())


def test_step_adds_few_calls() -> None:
    """Time depends on the machine; the Python calls that a step adds do not."""

    def calls(step: Callable[[], None]) -> int:
        step()
        count = 0

        def on_call(frame: Any, event: str, arg: Any) -> None:
            nonlocal count
            count += event == "call"

        sys.setprofile(on_call)
        try:
            step()
        finally:
            sys.setprofile(None)
        return count

    x, y = torch.ones(2, 4), torch.ones(2, 1)
    net = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def raw() -> None:
        for a, b in [[x, y]]:
            optimizer.zero_grad()
            nn.functional.mse_loss(net(a), b).backward()
            optimizer.step()

    run = fabric()
    model, wrapped = run.setup(net, optimizer)
    loader = run.setup_dataloaders([[x, y]])
    epoch = calls(lambda: [None for _ in loader] and None)  # type: ignore[func-returns-value]
    per_batch = 2  # the move, and what is called in it
    epoch -= per_batch

    def ours() -> None:
        for a, b in loader:
            wrapped.zero_grad()
            run.backward(nn.functional.mse_loss(model(a), b))
            wrapped.step()

    assert calls(ours) - epoch - calls(raw) <= 12


# Who and where


def test_properties() -> None:
    run = fabric()
    assert isinstance(run.accelerator, CPUAccelerator)
    assert isinstance(run.strategy, SingleDeviceStrategy)
    assert run.device == torch.device("cpu")
    assert (run.world_size, run.global_rank, run.local_rank, run.node_rank) == (1, 0, 0, 0)
    assert run.is_global_zero
    with pytest.raises(MisconfigurationException, match="no logger"):
        _ = run.logger


def test_everything_by_default() -> None:
    run = Fabric()
    model = run.setup(nn.Linear(1, 1))
    assert model.weight.device.type == run.device.type


def test_single_process_communication() -> None:
    run = fabric()
    x = torch.ones(2)
    assert run.all_gather(x) is x
    assert run.all_reduce({"a": x, "b": 2.0})["b"].item() == 2.0
    assert run.broadcast("x") == "x"
    run.barrier()
    with run.rank_zero_first(local=True):
        pass
    assert run.to_device([x])[0] is x
    net = nn.Linear(1, 1)
    assert run.to_device(net) is net


def test_print(capsys: pytest.CaptureFixture[str]) -> None:
    fabric().print("a", 1, sep="-")
    assert capsys.readouterr().out == "a-1\n"


def test_seed_everything() -> None:
    assert Fabric.seed_everything(5, verbose=False) == 5
    first = torch.rand(1)
    fabric().seed_everything(5, verbose=False)
    assert torch.equal(torch.rand(1), first)
    assert os.environ["PL_SEED_WORKERS"] == "1"


# Set-up


def test_setup_returns() -> None:
    run = fabric()
    net = nn.Linear(1, 1)
    first, second = (torch.optim.SGD(net.parameters(), lr=0.1) for _ in range(2))
    scheduler = torch.optim.lr_scheduler.StepLR(first, 1)
    assert isinstance(run.setup(net), FabricModule)
    _, one, two = run.setup(net, first, second)
    assert (one.optimizer, two.optimizer) == (first, second)
    _, one, same = run.setup(net, first, scheduler=scheduler)
    assert same is scheduler
    assert isinstance(run.setup_module(net), FabricModule)
    assert run.setup_optimizers(first).optimizer is first
    assert [o.optimizer for o in run.setup_optimizers(first, second)] == [first, second]
    assert len(run.setup_dataloaders([1])) == 1
    assert len(run.setup_dataloaders([1], [2])) == 2


def test_move_to_device() -> None:
    class Meta(CPUAccelerator):
        """Stands in for hardware; every machine has the meta device."""

        def setup_device(self, device: torch.device) -> None: ...

    run = Fabric(strategy=SingleDeviceStrategy(device="meta", accelerator=Meta()), devices=1)
    assert run.setup(nn.Linear(1, 1)).weight.device.type == "meta"
    assert run.setup(nn.Linear(1, 1), move_to_device=False).weight.device.type == "cpu"
    batches = [torch.ones(1)]
    assert next(iter(run.setup_dataloaders(batches))).device.type == "meta"
    assert next(iter(run.setup_dataloaders(batches, move_to_device=False))).device.type == "cpu"
    assert run.to_device(torch.ones(1)).device.type == "meta"
    with run.init_tensor():
        assert torch.ones(1).device.type == "meta"
    with run.init_module():
        assert nn.Linear(1, 1).weight.device.type == "meta"


def test_init_module_without_initialization(monkeypatch: pytest.MonkeyPatch) -> None:
    run = fabric()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with run.init_module(empty_init=True):
        net = nn.Linear(8, 8)
    assert net.weight.shape == (8, 8)
    assert torch.equal(torch.get_rng_state(), before), "weights were drawn"
    with run.init_module():
        nn.Linear(8, 8)
    assert not torch.equal(torch.get_rng_state(), before)
    with run.sharded_model():
        nn.Linear(1, 1)


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda f, m, o: f.setup("net"), "must be a torch.nn.Module"),
        (lambda f, m, o: f.setup(f.setup(m)), "set up already"),
        (lambda f, m, o: f.setup_module(f.setup(m)), "set up already"),
        (lambda f, m, o: f.setup(nn.Sequential(f.setup(m))), "set up already"),
        (lambda f, m, o: f.setup(m, f.setup_optimizers(o)), "set up already"),
        (lambda f, m, o: f.setup_optimizers(f.setup_optimizers(o)), "set up already"),
        (lambda f, m, o: f.setup(m, {"o": o}), "of type dict"),
        (lambda f, m, o: f.setup_optimizers(), "got no optimizer"),
        (lambda f, m, o: f.setup(nn.Linear(2, 2), o), r"2 parameter\(s\) that are not those of Linear"),
        (lambda f, m, o: f.setup_dataloaders(), "got no loader"),
        (lambda f, m, o: f.setup_dataloaders(5), "of type int, which cannot be iterated"),
        (lambda f, m, o: f.setup_dataloaders(f.setup_dataloaders([1])), "set up already"),
        (lambda f, m, o: f.backward(1.5), "got a float"),
        (lambda f, m, o: f.backward({"loss": torch.ones(1)}), "got a dict"),
        (lambda f, m, o: f.backward(torch.ones(1), model=m), r"Call model = fabric\.setup"),
        (lambda f, m, o: f.clip_gradients(f.setup(m), o), "exactly one"),
        (lambda f, m, o: f.clip_gradients(f.setup(m), o, clip_val=1.0, max_norm=1.0), "exactly one"),
        (lambda f, m, o: f.clip_gradients(f.setup(m), o, max_norm=-1.0), "max_norm=-1.0"),
        (lambda f, m, o: f.clip_gradients(f.setup(m), o, clip_val="1"), "clip_val='1'"),
        (lambda f, m, o: f.no_backward_sync(m), "needs the model that setup returned"),
        (lambda f, m, o: f.launch(5), "must be a function"),
        (lambda f, m, o: f.save("x", [m]), "must be a dict"),
        (lambda f, m, o: f.save("x", {1: m}), "must be a string"),
        (lambda f, m, o: f.save(5, {"m": m}), "no path"),
        (lambda f, m, o: f.save("x", {"model": m}, filter={"modl": bool}), "Did you mean 'model'"),
        (lambda f, m, o: f.save("x", {"model": m}, filter={"model": True}), "must be a function"),
        (lambda f, m, o: f.save("x", {"step": 1}, filter={"step": bool}), "nothing to filter"),
        (lambda f, m, o: f.load_raw("x", {"m": m}), "must be a module or an optimizer"),
        (lambda f, m, o: Fabric(accelerator="cpu", devices=1, strategy="dpd"), "'ddp'"),
        (lambda f, m, o: Fabric(accelerator="cpux"), "cpux"),
        (lambda f, m, o: Fabric(accelerator="cpu", devices=0), "devices"),
    ],
)
def test_refused_before_any_work(attempt: Any, says: str) -> None:
    net = nn.Linear(1, 1)
    with pytest.raises(MisconfigurationException, match=says):
        attempt(fabric(), net, torch.optim.SGD(net.parameters(), lr=0.1))
    assert not os.listdir()


def test_one_optimizer_for_several_models() -> None:
    run = fabric()
    one, two = nn.Linear(1, 1), nn.Linear(1, 1)
    joint = torch.optim.SGD([*one.parameters(), *two.parameters()], lr=0.1)
    with pytest.raises(MisconfigurationException, match="setup_module on each"):
        run.setup(one, joint)
    run.setup_module(one)
    run.setup_module(two)
    run.setup_optimizers(joint)
    run.setup(one, joint)  # now it is known whose the others are


def test_foreign_parameters_are_named_where_the_optimizer_knows_names() -> None:
    optimizer = torch.optim.SGD(nn.Linear(3, 2).named_parameters(), lr=0.1)  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match=r"'weight' of shape \(2, 3\), 'bias' of shape \(2,\)"):
        fabric().setup(nn.Linear(3, 2), optimizer)


# The step


def test_clip_gradients() -> None:
    run = fabric()
    net = nn.Linear(2, 1, bias=False)
    model, optimizer = run.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    run.backward(model(torch.tensor([[3.0, 4.0]])).sum())
    assert run.clip_gradients(model, optimizer, clip_val=3.5) is None
    torch.testing.assert_close(net.weight.grad, torch.tensor([[3.0, 3.5]]))
    norm = run.clip_gradients(model, optimizer, max_norm=1.0, norm_type=1.0)
    assert norm is not None
    assert norm.item() == pytest.approx(6.5)
    torch.testing.assert_close(net.weight.grad, torch.tensor([[3.0, 3.5]]) / 6.5)
    assert net.weight.grad is not None
    net.weight.grad.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="non-finite"):
        run.clip_gradients(model, optimizer, max_norm=1.0)
    run.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=False)


def test_backward_takes_the_arguments_of_torch() -> None:
    run = fabric()
    model = run.setup(nn.Linear(1, 1))
    y = model(torch.ones(1, 1))
    run.backward(y, torch.full((1, 1), 2.0), retain_graph=True, model=model)
    run.backward(y, gradient=torch.full((1, 1), 3.0))
    assert model.bias.grad.item() == 5.0


def test_no_backward_sync_on_one_device() -> None:
    run = fabric()
    model = run.setup(nn.Linear(1, 1))
    with run.no_backward_sync(model):
        run.backward(model(torch.ones(1, 1)).sum())
    assert model.bias.grad.item() == 1.0


# Callbacks, loggers, modules that know Fabric


class Recorder:
    not_callable = 3

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def on_epoch(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append((args, kwargs))

    def on_after_optimizer_step(self, strategy: Any, optimizer: Any) -> None:
        self.calls.append(("stepped", optimizer))


def test_call() -> None:
    first, second = Recorder(), Recorder()
    run = fabric(callbacks=[first, second])
    run.call("on_epoch", 1, x=2)
    run.call("on_nothing")
    assert first.calls == second.calls == [((1,), {"x": 2})]
    with pytest.warns(UserWarning, match="not callable"):
        run.call("not_callable")
    single = Recorder()
    run = fabric(callbacks=single)
    net = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    run.setup(net, optimizer)[1].step()
    assert single.calls == [("stepped", optimizer)]


def test_callbacks_get_the_keywords_that_their_methods_take() -> None:
    got: list[Any] = []

    class Some:
        def on_step(self, loss: float) -> None:
            got.append((self, loss))

    class Other(Some):
        def on_step(self, loss: float, **rest: Any) -> None:
            got.append((self, loss, rest))

    own = Some()
    own.on_step = lambda batch: got.append(batch)  # type: ignore[assignment, misc]
    first, second, other = Some(), Some(), Other()
    run = fabric(callbacks=[first, other, second, own])
    for loss in (1.0, 2.0):
        run.call("on_step", loss=loss, batch=3)
        assert got == [(first, loss), (other, loss, {"batch": 3}), (second, loss), 3]
        got.clear()


def test_what_is_known_of_callbacks_goes_with_their_class() -> None:
    made = type("Some", (), {"on_step": lambda self: None})
    method = weakref.ref(vars(made)["on_step"])
    fabric(callbacks=made()).call("on_step", loss=1.0)
    del made
    gc.collect()
    assert method() is None


def test_logging(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path, name="a"), CSVLogger(tmp_path, name="b")]
    run = fabric(loggers=loggers)
    assert run.logger is loggers[0]
    run.log("loss", torch.tensor(0.5), step=3)
    run.log_dict({"x": 1.0, "y": 2}, step=4)
    for logger in run.loggers:
        logger.save()
        text = next(Path(logger.log_dir).glob("metrics.csv")).read_text()
        assert "0.5" in text
        assert "loss" in text
        assert "x" in text


class Knowing(nn.Module):
    """What a LightningModule looks like to Fabric."""

    forward_methods = ("training_step",)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self._fabric: Fabric | None = None
        self.epochs = 0

    @property
    def fabric(self) -> Fabric | None:
        return self._fabric

    @fabric.setter
    def fabric(self, fabric: Fabric | None) -> None:
        self._fabric = fabric

    def training_step(self, batch: Tensor) -> Tensor:
        assert self.fabric is not None
        loss = self.layer(batch).sum()
        self.fabric.log("loss", loss.detach(), step=0)
        return loss

    def on_train_epoch_end(self) -> None:
        self.epochs += 1


def test_module_that_knows_fabric(tmp_path: Path) -> None:
    recorder = Recorder()
    logger = CSVLogger(tmp_path)
    run = fabric(callbacks=[recorder], loggers=logger, precision="bf16-mixed")
    module = Knowing()
    model = run.setup(module)
    assert module.fabric is run
    loss = model.training_step(torch.ones(1, 1))
    assert loss.dtype == torch.float32
    run.backward(loss)
    run.call("on_train_epoch_end")
    run.setup(module)
    run.call("on_train_epoch_end")
    assert module.epochs == 2, "set up twice, but called once each time"
    logger.save()
    assert "loss" in (Path(logger.log_dir) / "metrics.csv").read_text()


# Files


def make_state(run: Fabric) -> dict[str, Any]:
    net = nn.Linear(2, 2)
    model, optimizer = run.setup(net, torch.optim.Adam(net.parameters()))
    run.backward(model(torch.ones(1, 2)).sum())
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    nested = {"best": 0.5, "models": {"same": model}, "list": [scheduler, 2]}
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "step": 3, "nested": nested, "note": None}


def test_round_trip() -> None:
    run = fabric()
    saved = make_state(run)
    run.save("x.ckpt", saved)
    weight = saved["model"].weight.detach().clone()
    raw = torch.load("x.ckpt", weights_only=True)
    assert list(raw["model"]) == ["weight", "bias"]
    assert raw["nested"]["models"]["same"].keys() == raw["model"].keys()

    other = make_state(run)
    before = dict(other)
    other |= {"step": 0, "note": "old"}
    other["nested"].update(best=0.0)
    inner = other["nested"]
    run.load("x.ckpt", other)
    assert (other["step"], other["note"], other["nested"]["best"]) == (3, None, 0.5)
    assert other["nested"] is inner
    assert other["nested"]["list"][1] == 2
    for name in ("model", "optimizer", "scheduler"):
        assert other[name] is before[name], "restored in place"
    assert torch.equal(other["model"].weight, weight)
    for ours, theirs in zip(other["optimizer"].state.values(), saved["optimizer"].state.values()):
        assert torch.equal(ours["exp_avg"], theirs["exp_avg"])
    assert sorted(os.listdir()) == ["x.ckpt"], "no temporary file is left"


def test_load_returns_the_remainder() -> None:
    run = fabric()
    run.save("x.ckpt", AttributeDict(a=1, b=2, c=AttributeDict(d=4)))
    state = AttributeDict(a=0)
    assert run.load("x.ckpt", state) == {"b": 2, "c": {"d": 4}}
    assert state.a == 1
    assert run.load("x.ckpt") == {"a": 1, "b": 2, "c": {"d": 4}}


def test_filter() -> None:
    run = fabric()
    state = make_state(run)
    run.save("x.ckpt", state, filter={"model": lambda name, value: name == "weight" and value.dim() == 2})
    assert list(torch.load("x.ckpt", weights_only=True)["model"]) == ["weight"]
    with pytest.raises(CheckpointMismatchError, match="bias"):
        run.load("x.ckpt", {"model": state["model"]})
    run.load("x.ckpt", {"model": state["model"]}, strict=False)


def test_load_raw() -> None:
    run = fabric()
    net = nn.Linear(2, 2)
    torch.save(net.state_dict(), "raw.pt")
    model = run.setup(nn.Linear(2, 2))
    run.load_raw("raw.pt", model)
    assert torch.equal(model.weight, net.weight)
    with pytest.raises(CheckpointMismatchError):
        run.load_raw("raw.pt", nn.Linear(3, 3))


def test_keys_that_are_not_there() -> None:
    run = fabric()
    run.save("x.ckpt", {"model": 1, "step": 2})
    state = {"modle": 0, "step": 0}
    with pytest.raises(CheckpointMismatchError, match=r"has no 'modle'. Did you mean 'model'"):
        run.load("x.ckpt", state)
    assert state == {"modle": 0, "step": 0}, "nothing was touched"
    assert run.load("x.ckpt", state, strict=False) == {"model": 1}
    assert state == {"modle": 0, "step": 2}


def test_a_module_that_does_not_fit_leaves_plain_values_alone() -> None:
    run = fabric()
    run.save("x.ckpt", {"step": 2, "model": nn.Linear(3, 3)})
    state = {"step": 0, "model": run.setup(nn.Linear(2, 2))}
    with pytest.raises(CheckpointMismatchError, match=r"'model' of 'x.ckpt' does not fit state\['model'\]"):
        run.load("x.ckpt", state)
    assert state["step"] == 0


def test_files_that_cannot_be_read() -> None:
    run = fabric()
    with pytest.raises(CheckpointNotFoundError, match=r"missing\.ckpt"):
        run.load("missing.ckpt", {"a": 1})
    run.save("x.ckpt", {"a": torch.ones(1000)})
    whole = Path("x.ckpt").read_bytes()
    Path("x.ckpt").write_bytes(whole[: len(whole) // 2])
    state = {"a": 1}
    with pytest.raises(CheckpointCorruptError):
        run.load("x.ckpt", state)
    assert state == {"a": 1}


class Opaque:
    def __reduce__(self) -> Any:
        return os.system, ("touch broken",)


def test_loading_runs_no_code() -> None:
    run = fabric()
    torch.save({"a": Opaque()}, "x.ckpt")
    with pytest.raises(CheckpointUnsafeError, match="system"):
        run.load("x.ckpt", {"a": 1})
    assert not os.path.exists("broken")


def test_what_cannot_be_saved_leaves_the_old_file() -> None:
    run = fabric()
    run.save("x.ckpt", {"a": 1})
    with pytest.raises(CheckpointError, match="cannot be pickled"):
        run.save("x.ckpt", {"a": 2, "b": {"function": lambda: 1}})
    assert run.load("x.ckpt") == {"a": 1}
    assert os.listdir() == ["x.ckpt"]


# Launching


def test_launch_with_a_function() -> None:
    run = fabric()
    assert run.launch(lambda f, x, y: (f is run, x + y), 1, y=2) == (True, 3)
    run.launch()
    run.launch()


class Overrides(Fabric):
    def run(self, x: int) -> tuple[int, int]:
        inner = self.again() if x else 0
        return x + int(self.all_reduce(torch.tensor(1.0), reduce_op="sum").item()), inner

    def again(self) -> int:
        return self.run(0)[0]


@pytest.mark.parametrize(("devices", "strategy"), [(1, "auto"), (2, "ddp_fork")])
def test_run_launches(devices: int, strategy: str) -> None:
    run = Overrides(accelerator="cpu", devices=devices, strategy=strategy)
    assert run.run(5) == (5 + devices, devices)


@pytest.mark.parametrize(
    "use",
    [
        lambda f: f.setup(nn.Linear(1, 1)),
        lambda f: f.setup_module(nn.Linear(1, 1)),
        lambda f: f.setup_optimizers(torch.optim.SGD(nn.Linear(1, 1).parameters())),
        lambda f: f.setup_dataloaders([1]),
        lambda f: f.barrier(),
        lambda f: f.broadcast(1),
        lambda f: f.all_gather(1),
        lambda f: f.all_reduce(1),
        lambda f: f.rank_zero_first().__enter__(),
        lambda f: f.save("x", {}),
        lambda f: f.load("x"),
    ],
)
def test_use_before_launch(use: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"before launch\(\), and there are 2 processes"):
        use(Fabric(accelerator="cpu", devices=2, strategy="ddp"))


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn", "ddp_notebook"])
def test_strategies_that_need_a_function(strategy: str) -> None:
    with pytest.raises(MisconfigurationException, match=r"fabric\.launch\(train\)"):
        Fabric(accelerator="cpu", devices=2, strategy=strategy).launch()


SCRIPT = """
    import sys, torch
    from torch.utils.data import DataLoader
    from treadle_fabric import Fabric

    if __name__ == "__main__":
        fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
        fabric.launch()
        net = torch.nn.Linear(1, 1)
        model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
        loader = fabric.setup_dataloaders(DataLoader(torch.arange(6.0)[:, None], batch_size=1, shuffle=True))
        seen = []
        for x in loader:
            optimizer.zero_grad()
            fabric.backward(model(x).sum())
            optimizer.step()
            seen.append(x.item())
        if len(sys.argv) > 1 and fabric.global_rank == 1:
            raise ValueError("rank one is ill")
        seen = fabric.all_gather(torch.tensor(seen))
        fabric.print("seen", sorted(seen.flatten().tolist()))
        fabric.save("done.ckpt", {"model": model})
"""


def run_script(*args: str) -> subprocess.CompletedProcess[str]:
    Path("script.py").write_text(textwrap.dedent(SCRIPT))
    root = Path(__file__).resolve().parents[2]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join((str(root / "fabric"), os.environ.get("PYTHONPATH", "")))}
    return subprocess.run(
        [sys.executable, "script.py", *args], env=environ, capture_output=True, text=True, timeout=100, check=False
    )


def test_script_in_two_processes() -> None:
    done = run_script()
    assert done.returncode == 0, done.stderr
    assert own_lines(done.stdout) == ["seen [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]"]
    assert os.path.exists("done.ckpt")


def test_script_that_fails_on_one_rank() -> None:
    done = run_script("fail")
    assert done.returncode != 0
    assert done.stderr.count("ValueError: rank one is ill") == 1
    assert not os.path.exists("done.ckpt")
