"""Modules, classes and functions in a checkpoint are kept, apart, and nothing of them runs in a default load.

Reported of programs carried over: a loss that ``on_save_checkpoint`` puts into the checkpoint comes back as its state
dict, and classes and modules among the hyper-parameters are dropped.

Tests of ``treadle.checkpoint.content``, ``treadle.module.loading``.
"""

from __future__ import annotations

import copy
import os
import signal
import warnings
import zipfile
from argparse import Namespace
from collections import OrderedDict, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import run_in_ranks
from tests.trainer.models import Net, loader, trainer
from torch import nn

import treadle as L
from treadle.callbacks import ModelCheckpoint
from treadle.cli.main import main
from treadle_fabric import (
    AsyncCheckpointIO,
    CheckpointCorruptError,
    CheckpointUnsafeError,
    DistributedCheckpointIO,
    Fabric,
    TorchCheckpointIO,
    newest_good,
)

WAYS = {"file": TorchCheckpointIO, "background": AsyncCheckpointIO, "folder": DistributedCheckpointIO}


class Loss(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(scale))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight.detach() * x.square().mean()


class WithLoss(Net):
    """Its loss is in no attribute of ``__init__``: the checkpoint has it."""

    def __init__(self) -> None:
        super().__init__()
        self.keep: dict[str, Any] = {"loss": Loss(2.0)}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.keep["loss"](self(batch / 10))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["loss"] = self.keep["loss"]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.keep["loss"] = checkpoint["loss"]


class Hyper(Net):
    def __init__(self, act: type[nn.Module], net: nn.Module, options: dict[str, Any], lr: float = 0.01) -> None:
        super().__init__(lr)
        self.save_hyperparameters()
        self.act, self.net = act, net


HYPER: dict[str, Any] = {
    "act": nn.ReLU,
    "net": nn.Linear(2, 2),
    "options": {"layers": [nn.Tanh, 3], "fn": torch.relu, "width": 4},
}


def saved(module: L.LightningModule, way: str = "file", path: str = "a.ckpt") -> L.Trainer:
    run = trainer(Path(), max_steps=2, plugins=WAYS[way]())
    run.fit(module, loader(8))
    run.save_checkpoint(path)
    run.strategy.checkpoint_io.wait()
    return run


def quiet() -> Any:
    return pytest.mark.filterwarnings("ignore:.*kept pickled", "ignore:.*nn.Module", "ignore:.*cannot be pickled")


# --- what on_save_checkpoint puts in ---


@quiet()
@pytest.mark.parametrize("way", WAYS)
def test_a_loss_comes_back_as_the_module(way: str) -> None:
    saved(WithLoss(), way)
    module = WithLoss.load_from_checkpoint("a.ckpt", weights_only=False)
    assert isinstance(module.keep["loss"], Loss)
    assert module.keep["loss"].weight.item() == 2.0
    run = trainer(Path(), max_steps=4, max_epochs=2)
    run.fit(again := WithLoss(), loader(8), ckpt_path="a.ckpt", weights_only=False)
    assert run.global_step == 4
    assert isinstance(again.keep["loss"], Loss)


@quiet()
@pytest.mark.parametrize("way", WAYS)
def test_a_default_load_gives_everything_else_and_an_error_at_the_use(way: str) -> None:
    saved(WithLoss(), way)
    module = WithLoss.load_from_checkpoint("a.ckpt")
    assert module.layer.weight.shape == (2, 4)
    stand_in = module.keep["loss"]
    assert "loss" in repr(stand_in)
    assert copy.deepcopy(stand_in) is stand_in
    uses = [
        lambda: stand_in(1),
        lambda: stand_in.weight,
        lambda: stand_in[0],
        lambda: bool(stand_in),
        lambda: stand_in == 1,
        lambda: list(stand_in),
        lambda: stand_in + 1,
        lambda: nn.Sequential(stand_in),
    ]
    for use in uses:
        with pytest.raises(CheckpointUnsafeError, match=r"'loss' .*Loss.*weights_only=False"):
            use()
    with pytest.raises(CheckpointUnsafeError, match=r"'loss' .*fit\(\.\.\., weights_only=False\)"):
        trainer(Path(), max_steps=4, max_epochs=2).fit(WithLoss(), loader(8), ckpt_path="a.ckpt")


def test_it_is_told_once_what_went_where() -> None:
    run = trainer(Path(), max_steps=2)
    run.fit(WithLoss(), loader(8))
    with pytest.warns(UserWarning, match=r"loss \(.*Loss\).*pickled.*resuming.*weights_only=False") as told:
        for name in ("a", "b", "c"):
            run.save_checkpoint(name)
    assert len(told) == 1


@quiet()
def test_what_cannot_be_pickled_is_left_out_and_fails_no_save() -> None:
    class Unpicklable(Net):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint.update(fn=lambda: 0, loss=nn.MSELoss(), mixed=[1, lambda: 0])

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.got = checkpoint

    run = trainer(Path(), max_steps=2)
    run.fit(Unpicklable(), loader(8))
    with pytest.warns(UserWarning, match=r"fn \(the function .*lambda.*mixed\[1\].*left out"):
        run.save_checkpoint("a.ckpt")
    got = Unpicklable.load_from_checkpoint("a.ckpt", weights_only=False).got
    assert "fn" not in got
    assert isinstance(got["loss"], nn.MSELoss)
    assert got["mixed"][0] == 1
    with pytest.raises(CheckpointUnsafeError, match=r"mixed\[1\].*left out"):
        got["mixed"][1]()


# --- hyper-parameters ---


@quiet()
@pytest.mark.parametrize("way", WAYS)
def test_classes_and_modules_among_the_hyperparameters_come_back(way: str) -> None:
    saved(Hyper(**HYPER), way)
    hparams = Hyper.load_from_checkpoint("a.ckpt", weights_only=False).hparams
    assert hparams.act is nn.ReLU
    assert torch.equal(hparams.net.weight, HYPER["net"].weight)
    assert hparams.options == HYPER["options"]
    with pytest.raises(CheckpointUnsafeError, match=r"hyper_parameters\.net.*weights_only=False.*`net=\.\.\.`"):
        Hyper.load_from_checkpoint("a.ckpt", act=nn.GELU)  # it has weights for what is not there
    stand_in = Hyper.load_from_checkpoint("a.ckpt", net=nn.Linear(2, 2)).act
    with pytest.raises(CheckpointUnsafeError, match=r"hyper_parameters\.act.*weights_only=False.*`act=\.\.\.`"):
        stand_in()
    given = Hyper.load_from_checkpoint("a.ckpt", act=nn.GELU, net=nn.Linear(2, 2), lr=0.5).hparams
    assert given.options["width"] == 4
    with pytest.raises(CheckpointUnsafeError, match=r"hyper_parameters\.options\.fn"):
        given.options["fn"](1)
    plain = torch.load("a.ckpt", weights_only=True)["hyper_parameters"] if way != "folder" else None
    assert plain in (None, {"options": {"layers": [None, 3], "width": 4}, "lr": 0.01})


@quiet()
def test_map_location_moves_what_is_pickled_too() -> None:
    saved(WithLoss())
    module = WithLoss.load_from_checkpoint("a.ckpt", map_location="cpu", weights_only=False)
    assert module.keep["loss"].weight.device.type == "cpu"
    locations: list[str] = []
    WithLoss.load_from_checkpoint(
        "a.ckpt", map_location=lambda storage, where: locations.append(where) or storage, weights_only=False
    )
    with_part = len(locations)
    locations.clear()
    WithLoss.load_from_checkpoint("a.ckpt", map_location=lambda storage, where: locations.append(where) or storage)
    assert with_part > len(locations)


@dataclass
class Parts:
    net: Any
    width: int = 3


class InOthers(Net):
    def __init__(self, parts: Parts, ns: Any, ordered: Any, pair: Any) -> None:
        super().__init__()
        self.save_hyperparameters()


@quiet()
def test_objects_in_other_values_are_kept_where_they_were() -> None:
    given = {
        "parts": Parts(nn.ReLU),
        "ns": Namespace(a=1, net=nn.Tanh, fn=lambda: 0, z=2),
        "ordered": OrderedDict(a=1, net=nn.GELU, z=2),
        "pair": (nn.SiLU, {"deep": deque([nn.ELU])}),
    }
    saved(InOthers(**given))
    whole = InOthers.load_from_checkpoint("a.ckpt", weights_only=False).hparams
    assert whole.parts == given["parts"]
    assert whole.ordered == given["ordered"]
    assert whole.pair == given["pair"]
    assert (whole.ns.a, whole.ns.net, whole.ns.z) == (1, nn.Tanh, 2)
    with pytest.raises(CheckpointUnsafeError, match=r"ns\.fn.*left out"):
        whole.ns.fn()
    rest = InOthers.load_from_checkpoint("a.ckpt").hparams
    assert (rest.parts.width, rest.ns.z, list(rest.ordered)) == (3, 2, ["a", "net", "z"])
    for stand_in in (rest.parts.net, rest.ns.net, rest.ordered["net"], rest.pair[0], rest.pair[1]["deep"][0]):
        with pytest.raises(CheckpointUnsafeError, match="weights_only=False"):
            stand_in()


# --- Fabric ---


@quiet()
@pytest.mark.parametrize("way", WAYS)
def test_fabric_keeps_objects_and_modules_in_the_state_are_their_state_dicts(way: str) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, plugins=WAYS[way]())
    with pytest.warns(UserWarning, match=r"state\['extra'\]\['act'\].*fabric\.load\(\.\.\., weights_only=False\)"):
        fabric.save("a.ckpt", {"model": nn.Linear(1, 1), "extra": {"act": nn.ReLU}, "step": 3})
    loaded = fabric.load("a.ckpt")
    assert sorted(loaded["model"]) == ["bias", "weight"]
    assert loaded["step"] == 3
    with pytest.raises(CheckpointUnsafeError, match=r"extra\.act.*weights_only=False"):
        loaded["extra"]["act"]()
    assert fabric.load("a.ckpt", weights_only=False)["extra"]["act"] is nn.ReLU


# --- nothing runs, every byte is checked ---


class Hostile:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


class Poisoned(Net):
    def __init__(self, thing: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["poison"] = Hostile()


@quiet()
@pytest.mark.parametrize("way", WAYS)
def test_a_default_load_runs_nothing_of_the_pickled_part(way: str) -> None:
    saved(Poisoned({"a": Hostile()}), way)
    Path("ran").unlink(missing_ok=True)  # a copy that the hyper-parameters make of themselves runs it, too
    Poisoned.load_from_checkpoint("a.ckpt")
    for name in ("validate", "test", "predict"):
        getattr(trainer(Path()), name)(Poisoned(), loader(2), ckpt_path="a.ckpt")
    trainer(Path(), max_steps=4, max_epochs=2).fit(Poisoned(), loader(8), ckpt_path="a.ckpt")
    Fabric(accelerator="cpu", devices=1).load("a.ckpt")
    assert newest_good(".") == Path("a.ckpt").absolute()
    for command in (["verify", "a.ckpt"], ["inspect", "a.ckpt"], ["diff", "a.ckpt", "a.ckpt"]):
        assert main(["checkpoint", *command]) == 0
    assert not Path("ran").exists()
    Poisoned.load_from_checkpoint("a.ckpt", weights_only=False)
    assert Path("ran").exists()


TYPES: dict[str, Any] = {
    "no list": 3,
    "no pair": [1],
    "no kind": [(("a",), {})],
    "an unknown kind": [(("a",), {"kind": "made up"})],
    "a class": [(("a",), {"kind": "dataclass", "class": "os.system", "more": None})],
    "an object": [(("a",), {"kind": "object", "class": "x", "pickled": 0})],
    "a dtype of objects": [(("a",), {"kind": "numpy.array", "more": "O"})],
    "a kind that it is not": [(("a",), {"kind": "range"})],
    "a place that is not there": [(("z", 3, "y"), {"kind": "Path"})],
    "a key that no dict takes": [(([],), {"kind": "Path"})],
}


@pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
def test_what_a_file_says_of_types_does_no_harm(types: Any) -> None:
    block = {"version": 1, "types": types, "pickled": torch.zeros(3, dtype=torch.uint8)}
    torch.save({"a": "x", "b": 1, "treadle": {"values": block}}, "a.ckpt")
    try:
        loaded = Fabric(accelerator="cpu", devices=1).load("a.ckpt")
    except CheckpointCorruptError as e:
        assert "a.ckpt" in str(e)
    else:
        assert loaded["b"] == 1
        assert loaded.keys() == {"a", "b"}


@quiet()
@pytest.mark.parametrize("way", ["file", "folder"])
def test_a_flipped_byte_of_the_pickled_part_is_found(way: str) -> None:
    saved(WithLoss(), way)
    path = Path("a.ckpt") if way == "file" else Path("a.ckpt", "meta.pt")
    content = bytearray(path.read_bytes())
    at = content.index(b"test_objects_in_a_checkpoint\x94\x8c\x04Loss")  # only the pickled part names the class so
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointCorruptError, match="damaged"):
        WithLoss.load_from_checkpoint("a.ckpt", weights_only=False)
    assert main(["checkpoint", "verify", "a.ckpt"]) == 1


@quiet()
def test_the_command_line_says_what_is_pickled(capsys: Any) -> None:
    saved(WithLoss())
    saved(Net(), path="b.ckpt")
    capsys.readouterr()
    main(["checkpoint", "inspect", "a.ckpt"])
    assert "loss (" in (said := capsys.readouterr().out)
    assert "weights_only=False" in said
    main(["checkpoint", "diff", "a.ckpt", "b.ckpt"])
    assert "loss: only in a.ckpt" in capsys.readouterr().out


@quiet()
def test_other_readers_open_the_file() -> None:
    saved(Hyper(**HYPER))
    for weights_only in (True, False):
        content = torch.load("a.ckpt", weights_only=weights_only)
        assert content["hyper_parameters"]["lr"] == 0.01
    assert zipfile.ZipFile("a.ckpt").testzip() is None


# --- killed and resumed ---


class Killed(WithLoss):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.losses = at, []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss


def run_until_killed(at: int, way: str) -> None:
    warnings.simplefilter("ignore")
    go(Killed(at), way)


def go(module: Killed, way: str, **kwargs: Any) -> L.Trainer:
    saver = ModelCheckpoint("checkpoints", every_n_train_steps=1, save_last=True)
    run = trainer(
        Path(), max_epochs=2, callbacks=saver, enable_checkpointing=True, auto_resume=True, plugins=WAYS[way]()
    )
    run.fit(module, loader(8, shuffle=True), **kwargs)
    return run


@quiet()
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("way", ["file", "folder"])
def test_a_killed_run_goes_on_with_its_objects(way: str) -> None:
    with pytest.raises(AssertionError):  # it was killed
        run_in_ranks(run_until_killed, 3, way, devices=1)
    with pytest.raises(CheckpointUnsafeError, match=r"'loss' .*fit\(\.\.\., weights_only=False\)"):
        go(Killed(-1), way)
    module = Killed(-1)
    run = go(module, way, weights_only=False)
    assert run.global_step == 8
    assert len(module.losses) == 5
    assert module.keep["loss"].weight.item() == 2.0


# --- two ranks ---


class Walker(torch.utils.data.IterableDataset[Any]):
    """A loader with a state of its own, which is different on each rank and has values of several kinds."""

    def __init__(self) -> None:
        self.seen = deque([Path(f"{os.environ['LOCAL_RANK']}-begun")], maxlen=3)
        self.restored: Any = None

    def __iter__(self) -> Any:
        for i in range(4):
            self.seen.append(Path(f"{os.environ['LOCAL_RANK']}-{i}"))
            yield torch.ones(2, 4)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": deque(self.seen, maxlen=3)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.restored = state["seen"]


def train_two_ranks(way: str) -> None:
    def make(max_steps: int) -> L.Trainer:
        return trainer(Path(), max_steps=max_steps, max_epochs=2, devices=2, strategy="ddp", plugins=WAYS[way]())

    warnings.simplefilter("ignore")
    run = make(2)
    run.fit(WithLoss(), Walker())
    run.save_checkpoint("a.ckpt")
    again, walker = WithLoss(), Walker()
    make(3).fit(again, walker, ckpt_path="a.ckpt", weights_only=False)
    assert isinstance(again.keep["loss"], Loss)
    assert walker.restored
    assert walker.restored.maxlen == 3
    assert all(isinstance(seen, Path) and seen.name[0] == str(run.global_rank) for seen in walker.restored)


@pytest.mark.parametrize("way", ["file", "folder"])
def test_two_ranks_keep_them_too(way: str) -> None:
    said = run_in_ranks(train_two_ranks, way)
    assert said.count("kept pickled") <= 1
