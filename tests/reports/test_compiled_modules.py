"""A compiled module is the user's module: in files, in names, under the Trainer.

Tests of ``treadle_fabric.strategies.unwrapping``, ``treadle.trainer.preflight``, ``treadle.trainer.assembly``.
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import run_in_ranks
from tests.trainer.models import Net as Lit
from tests.trainer.models import loader, trainer
from torch import Tensor, nn
from torch.nn.parallel import DataParallel

import treadle as L
from treadle_fabric import (
    Fabric,
    FabricModule,
    MisconfigurationException,
    UnusedParametersError,
    is_wrapped,
    user_module,
)

# torch.compile itself looks at the gradient of a loss that a step logs before it returns the loss.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache.:UserWarning"),
]


def compiled(module: Any, backend: Any = "eager") -> Any:
    return torch.compile(module, backend=backend)


class Counting:
    """A backend that counts the graphs it compiles."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return graph


def fabric(**kwargs: Any) -> Fabric:
    return Fabric(accelerator="cpu", devices=1, **kwargs)


class Net(nn.Module):
    def __init__(self, compiles_head: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.head = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        if compiles_head:
            self.head = compiled(self.head)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x * self.weight)

    def twice(self, x: Tensor) -> Tensor:
        return self(x) + self(x)


NAMES = list(Net().state_dict())

# How a model may come to be compiled; each gives what goes into the state.
WAYS: dict[str, Callable[[Fabric], nn.Module]] = {
    "plain": lambda run: run.setup(Net()),
    "compiled, then set up": lambda run: run.setup(compiled(Net())),
    "set up, then compiled": lambda run: compiled(run.setup(Net())),
    "compiled in place": lambda run: _in_place(run.setup(Net())),
    "with a compiled part": lambda run: run.setup(Net(compiles_head=True)),
    "compiled, with a compiled part": lambda run: run.setup(compiled(Net(compiles_head=True))),
    "compiled, not set up": lambda run: compiled(Net()),
}


def _in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def _values(model: nn.Module) -> list[Tensor]:
    return list(user_module(model).state_dict().values())


@pytest.mark.parametrize("way", WAYS)
def test_files_have_the_users_names_and_go_into_every_model(way: str, tmp_path: Path) -> None:
    run = fabric()
    model = WAYS[way](run)
    with torch.no_grad():
        model.weight.fill_(3)
    model(torch.randn(4, 2))
    run.save(tmp_path / "a.ckpt", {"model": model})
    state = torch.load(tmp_path / "a.ckpt")["model"]
    assert list(state) == NAMES
    assert state._metadata["head.1"] == {"version": 2}
    Net().load_state_dict(state)
    for other_way, make in WAYS.items():
        other = make(run)
        run.load(tmp_path / "a.ckpt", {"model": other})
        for mine, its in zip(_values(model), _values(other), strict=True):
            assert torch.equal(mine, its), other_way


@pytest.mark.parametrize("way", WAYS)
def test_filters_see_the_users_names(way: str, tmp_path: Path) -> None:
    run = fabric()
    run.save(tmp_path / "a.ckpt", {"model": WAYS[way](run)}, filter={"model": lambda k, v: k == "weight"})
    assert list(torch.load(tmp_path / "a.ckpt")["model"]) == ["weight"]
    run.load(tmp_path / "a.ckpt", {"model": WAYS[way](run)}, strict=False)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("old", [lambda: compiled(Net()), lambda: Net(True), lambda: compiled(Net(True))])
def test_files_with_torchs_names_still_load(way: str, old: Any, tmp_path: Path) -> None:
    run = fabric()
    module, model = old(), WAYS[way](run)
    torch.save({"model": module.state_dict()}, tmp_path / "old.ckpt")
    assert any("_orig_mod" in name for name in module.state_dict())
    with torch.no_grad():
        user_module(module).weight.fill_(3)
    torch.save({"model": module.state_dict()}, tmp_path / "old.ckpt")
    run.load(tmp_path / "old.ckpt", {"model": model})
    assert model.weight.tolist() == [3, 3]
    torch.save(module.state_dict(), tmp_path / "raw.ckpt")
    run.load_raw(tmp_path / "raw.ckpt", model)
    if is_wrapped(model):
        user_module_of = next(m for m in (model, getattr(model, "_orig_mod", None)) if isinstance(m, FabricModule))
        user_module_of.load_state_dict(module.state_dict())


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_module_is_saved_and_loaded(tmp_path: Path) -> None:
    run = fabric()
    parts = [torch.jit.script(nn.Sequential(nn.Linear(2, 2))) for _ in range(2)]
    for name, (saved, loaded) in {"whole": parts, "part": [nn.ModuleDict({"net": part}) for part in parts]}.items():
        run.save(tmp_path / name, {"model": run.setup(saved)})
        run.load(tmp_path / name, {"model": run.setup(loaded)})
        for mine, its in zip(saved.parameters(), loaded.parameters(), strict=True):
            assert torch.equal(mine, its)


def test_a_name_of_the_users_is_not_taken_for_torchs(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._orig_mod = nn.Linear(1, 1)

    run = fabric()
    run.save(tmp_path / "a.ckpt", {"model": run.setup(Own())})
    assert list(torch.load(tmp_path / "a.ckpt")["model"]) == ["_orig_mod.weight", "_orig_mod.bias"]
    run.load(tmp_path / "a.ckpt", {"model": run.setup(Own())})


def test_the_users_module_is_found_in_any_nesting() -> None:
    net, run = Net(), fabric()
    model = run.setup(compiled(net))
    for wrapped in (
        net,
        compiled(net),
        model,
        compiled(model),
        DataParallel(model),
        compiled(DataParallel(compiled(net))),
    ):
        assert user_module(wrapped) is net
    assert model.module is net
    for wrapped in (model, compiled(model), DataParallel(model)):
        assert is_wrapped(wrapped)
        with pytest.raises(MisconfigurationException, match="set up already"):
            run.setup(wrapped)
    assert not is_wrapped(compiled(net))
    outer = nn.Sequential(nn.Sequential(compiled(model)))
    with pytest.raises(MisconfigurationException, match="'0.0'"):
        run.setup(compiled(outer))
    assert list(outer.state_dict())[0] == "0.0._orig_mod.weight"


def test_a_model_compiled_after_setup_is_the_wrapper() -> None:
    run, counting = fabric(precision="bf16-true"), Counting()
    net = Net()
    model, optimizer = run.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    fast = compiled(model, counting)
    for _ in range(3):
        loss = fast(torch.ones(2, 2)).sum()
        run.backward(loss, model=fast)
        run.clip_gradients(fast, optimizer, max_norm=1.0)
        optimizer.step()
        with run.no_backward_sync(fast):
            pass
    assert loss.dtype == torch.float32
    assert counting.graphs >= 1


def test_marked_methods_of_a_compiled_model_are_compiled() -> None:
    counting, net = Counting(), Net()
    model = fabric().setup(compiled(net, counting))
    x = torch.randn(4, 2)
    model.twice(x)
    assert counting.graphs == 0
    model.mark_forward_method("twice")
    net.eval()
    assert torch.equal(model.twice(x), net.twice(x))
    assert counting.graphs == 1


# Under the Trainer


class Deep(Lit):
    """Its layer is compiled in its constructor, as in many programs."""

    def __init__(self, compiles: bool = True, backend: Any = "eager") -> None:
        super().__init__()
        self.saved_names: list[str] = []
        if compiles:
            self.layer = torch.compile(self.layer, backend=backend)  # type: ignore[assignment]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.saved_names = list(checkpoint["state_dict"])


class Plain(Deep):
    def __init__(self) -> None:
        super().__init__(compiles=False)


def _run(tmp_path: Path, model: Any, **kwargs: Any) -> L.Trainer:
    run = trainer(tmp_path, **kwargs)
    run.fit(model, loader(), loader())
    return run


MODELS: dict[str, Callable[[], Any]] = {
    "plain": Plain,
    "part": Deep,
    "whole": lambda: compiled(Plain()),
    "both": lambda: compiled(Deep()),
}


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [("plain", "part"), ("part", "plain"), ("plain", "whole"), ("whole", "plain"), ("both", "part"), ("part", "both")],
)
def test_runs_go_on_from_each_others_checkpoints(saved: str, resumed: str, tmp_path: Path) -> None:
    """In the middle of an accumulation: gradients are saved by name, too."""
    path = tmp_path / "half.ckpt"
    whole = Plain()
    _run(tmp_path, whole, max_epochs=2, accumulate_grad_batches=4)

    class Half(L.Callback):
        def on_train_batch_end(self, run: L.Trainer, *args: Any) -> None:
            if run.fit_progress.batches == 2:
                run.save_checkpoint(path)
                run.should_stop = True

    model = MODELS[saved]()
    run = trainer(tmp_path, max_epochs=2, accumulate_grad_batches=4, callbacks=[Half()], min_epochs=0)
    run.fit(model, loader(), loader())
    checkpoint = torch.load(path)
    assert list(checkpoint["state_dict"]) == ["layer.weight", "layer.bias"]
    assert "_orig_mod" not in str(checkpoint)
    other = MODELS[resumed]()
    trainer(tmp_path, max_epochs=2, accumulate_grad_batches=4).fit(other, loader(), loader(), ckpt_path=path)
    for mine, its in zip(whole.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("cls", [Plain, Deep])
def test_checkpoints_load_by_hand_and_by_method(cls: Any, old: bool, tmp_path: Path) -> None:
    model = Deep()
    path = tmp_path / "a.ckpt"
    _run(tmp_path, model).save_checkpoint(path)
    assert model.saved_names == ["layer.weight", "layer.bias"]
    checkpoint = torch.load(path)
    if old:
        checkpoint["state_dict"] = model.state_dict()
        assert "_orig_mod" in str(checkpoint["state_dict"])
        torch.save(checkpoint, path)
    for other in (cls.load_from_checkpoint(path), cls()):
        other.load_state_dict(checkpoint["state_dict"])
        assert torch.equal(next(other.parameters()), next(model.parameters()))
    evaluated = trainer(tmp_path).validate(cls(), loader(), ckpt_path=path, verbose=False)
    assert evaluated == trainer(tmp_path).validate(model, loader(), verbose=False)


def test_a_compiled_module_is_trained(tmp_path: Path) -> None:
    events: list[str] = []

    class Own(Lit):
        def on_train_start(self) -> None:
            events.append("start")

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            assert self.trainer.lightning_module is self
            return super().training_step(batch, batch_idx)

    counting, module, plain = Counting(), Own(), Own()
    model = compiled(module, counting)
    run = trainer(tmp_path, max_epochs=3, enable_checkpointing=True)
    run.fit(model, loader(), loader())
    assert 0 < counting.graphs <= 6, "once for each step, and not again as the run goes on"
    assert run.lightning_module is module
    other = trainer(tmp_path, max_epochs=3)
    other.fit(plain, loader(), loader())
    assert torch.equal(module.layer.weight, plain.layer.weight)
    assert run.callback_metrics == other.callback_metrics
    assert set(run.callback_metrics) == {"train_loss", "val_loss"}
    path = run.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    assert list(torch.load(path)["state_dict"]) == ["layer.weight", "layer.bias"]
    assert torch.equal(Own.load_from_checkpoint(path).layer.weight, module.layer.weight)
    assert events == ["start"] * 2

    before = counting.graphs
    assert run.validate(model, loader(), verbose=False) == other.validate(plain, loader(), verbose=False)
    assert run.test(model, loader(), verbose=False) == other.test(plain, loader(), verbose=False)
    predicted: Any = run.predict(model, loader())
    assert counting.graphs > before
    assert torch.equal(torch.cat(predicted), torch.cat(other.predict(plain, loader())))  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="was called without a model"):
        run.validate(dataloaders=loader(), verbose=False)

    before = counting.graphs
    trainer(tmp_path).fit(module, loader())
    assert counting.graphs == before, "the module itself runs as it is, also after it ran compiled"


def test_a_compiled_module_is_trained_by_hand(tmp_path: Path) -> None:
    class Manual(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            optimizer.step()
            self.log_dict({"a": loss, "b": batch_idx})

    module, plain = Manual(), Manual()
    run = _run(tmp_path, compiled(module))
    _run(tmp_path, plain)
    assert run.global_step == 4
    assert torch.equal(module.layer.weight, plain.layer.weight)


def test_a_copy_of_a_module_compiled_in_place_runs_its_own_weights() -> None:
    model = Lit()
    model.compile(backend="eager")
    x = torch.ones(1, 4)
    assert model(x).any()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert not other(x).any()


def _compiling(graph: Any, inputs: Any) -> Any:
    Path("compiled").touch()
    return graph


def test_processes_that_the_trainer_starts_run_it_compiled(tmp_path: Path) -> None:
    module = Lit()
    before = module.layer.weight.clone()
    run = trainer(tmp_path, devices=2, strategy="ddp_fork", enable_model_summary=True)
    run.fit(compiled(module, _compiling), loader())
    assert Path("compiled").exists()
    assert not torch.equal(module.layer.weight, before)
    assert run.global_step == 2


def test_what_is_no_lightning_module_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=re.escape("type Net; a plain nn.Module has no")):
        trainer(tmp_path).fit(compiled(Net()), loader())
    with pytest.raises(MisconfigurationException, match="set up by Fabric already"):
        trainer(tmp_path).fit(compiled(fabric().setup(Lit())), loader())
    with pytest.raises(MisconfigurationException, match="the trainer wraps the module itself"):
        trainer(tmp_path).fit(compiled(DataParallel(Lit())), loader())


# DDP


def _under_ddp(folder: Path) -> None:
    run = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    run.launch()
    for name in ("compiled, then set up", "set up, then compiled", "compiled, with a compiled part"):
        model = WAYS[name](run)
        model(torch.ones(4, 2)).sum().backward()
        run.save(folder / f"{name}.ckpt", {"model": model}, filter={"model": lambda k, v: k != "weight"})
        assert list(torch.load(folder / f"{name}.ckpt")["model"]) == NAMES[1:]
        run.load(folder / f"{name}.ckpt", {"model": WAYS["plain"](run)}, strict=False)

    net = Net(compiles_head=True)
    model, optimizer = run.setup(compiled(net), torch.optim.SGD(net.parameters(), lr=0.1))
    counting = Counting()
    marked = run.setup(compiled(Net(), counting))
    marked.mark_forward_method("twice")
    marked.twice(torch.ones(4, 2)).sum().backward()
    assert counting.graphs >= 1
    assert marked.module.weight.grad is not None
    run.backward(model.weight.sum() + model(torch.ones(4, 2)).sum() * 0)
    net.get_parameter("head._orig_mod.0.weight").grad = None
    with pytest.raises(UnusedParametersError, match=r": head.0.weight\."):
        optimizer.step()
    run.strategy.teardown()


def test_under_ddp(tmp_path: Path) -> None:
    run_in_ranks(_under_ddp, tmp_path)


def _trained_under_ddp(folder: Path) -> None:
    module = Lit()
    run = trainer(folder, devices=2, strategy="ddp")
    run.fit(compiled(module), loader(), loader())
    run.save_checkpoint(folder / "a.ckpt")
    assert list(torch.load(folder / "a.ckpt")["state_dict"]) == ["layer.weight", "layer.bias"]
    assert run.global_step == 2
    run.strategy.teardown()


def test_trained_under_ddp(tmp_path: Path) -> None:
    run_in_ranks(_trained_under_ddp, tmp_path)
