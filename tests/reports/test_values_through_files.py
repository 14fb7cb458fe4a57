"""What is saved comes back equal and of its type, or saving says at once that it will not.

Reported of Lightning and Fabric: a dataclass, an OmegaConf object or a Namespace among the hyper-parameters comes back
as a dict, an Enum as its value, a Path as a string; and ``fabric.load`` refuses files that ``fabric.save`` wrote.

Tests of ``treadle_fabric.checkpoint.values.kinds``, ``treadle_fabric.checkpoint.values.not_loaded``,
``treadle_fabric.checkpoint.values.numpy_kinds``, ``treadle_fabric.checkpoint.values.omegaconf_kinds``,
``treadle_fabric.checkpoint.values.packing``, ``treadle_fabric.checkpoint.values.standard_kinds``,
``treadle_fabric.checkpoint.values.structures``, ``treadle_fabric.checkpoint.values.unpacking``.
"""

from __future__ import annotations

import array
import enum
import io
import random
import re
import uuid
import warnings
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field, make_dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import MappingProxyType, SimpleNamespace
from typing import Any, Literal, NamedTuple, TypedDict
from zoneinfo import ZoneInfo

import numpy as np
import pytest
import torch
from tests.trainer.models import Net, loader, trainer
from torch import nn

import treadle as L
from treadle_fabric import (
    AttributeDict,
    CheckpointError,
    CheckpointUnsafeError,
    DistributedCheckpointIO,
    Fabric,
    MisconfigurationException,
)


class Color(enum.Enum):
    RED = "red"
    GREEN = ("g", 2)


class Level(enum.IntEnum):
    LOW = 1


class Flags(enum.Flag):
    A = 1
    B = 2


class Point(NamedTuple):
    x: int
    where: Path


@dataclass
class Inner:
    dim: int = 4
    root: Path = Path("data")


@dataclass(frozen=True)
class Config:
    net: Inner
    color: Color | None = None
    layers: list[Inner] = field(default_factory=list)
    by_name: dict[str, Point] = field(default_factory=dict)


@dataclass(slots=True)
class Slotted:
    width: int
    doubled: int = field(init=False)

    def __post_init__(self) -> None:
        self.doubled = 2 * self.width


VALUES: dict[str, Any] = {
    "none": None,
    "complex": 1 + 2j,
    "bytes": b"\0a",
    "bytearray": bytearray(b"x"),
    "large integer": 10**40,
    "tuple": (1, ("a", [2.5])),
    "set": {1, "a"},
    "set of paths": {Path("a"), Path("b")},
    "frozenset": frozenset({1, 2}),
    "frozenset of paths": frozenset({Path("a")}),
    "path": Path("a/b"),
    "pure path": PurePosixPath("a/b"),
    "windows path": PureWindowsPath(r"c:\b"),
    "namespace": Namespace(lr=0.1, root=Path("r"), inner=Namespace(a=1)),
    "simple namespace": SimpleNamespace(a=slice(1)),
    "attribute dict": AttributeDict(a=AttributeDict(b=2)),
    "mapping proxy": MappingProxyType({"a": 1}),
    "ordered dict": OrderedDict(b=1, a=range(3)),
    "ordered dict, made by its alias": OrderedDict[str, list[int]](b=[1], a=[2]),
    "counter": Counter("aab"),
    "defaultdict": defaultdict(list, {"a": [1]}),
    "deque": deque([1, Path("a")], maxlen=3),
    "slice": slice(1, None, 2),
    "range": range(1, 9, 2),
    "ellipsis": [..., 1],
    "array": array.array("d", [1.0, 2.0]),
    "pattern": re.compile("a+", re.IGNORECASE),
    "timedelta": timedelta(days=-1, seconds=2, microseconds=3),
    "date": date(2026, 1, 2),
    "time": time(1, 2, 3, 4),
    "datetime": datetime(2026, 1, 2, 3, 4, 5, 6),
    "datetime in UTC": datetime(2026, 1, 2, tzinfo=UTC),
    "datetime with an offset": datetime(2026, 1, 2, tzinfo=timezone(timedelta(hours=2), "X")),
    "datetime in a zone": datetime(2026, 10, 25, 2, 30, tzinfo=ZoneInfo("Europe/Paris"), fold=1),
    "decimal": Decimal("1.10"),
    "fraction": Fraction(1, 3),
    "uuid": uuid.UUID(int=5),
    "torch size": torch.Size([1, 2]),
    "torch dtype": torch.bfloat16,
    "torch device": torch.device("cpu"),
    "torch memory format": torch.channels_last,
    "torch version": torch.__version__,
    "numpy array": np.arange(6).reshape(2, 3),
    "numpy array, Fortran order": np.asfortranarray(np.ones((2, 3), dtype="float32")),
    "numpy array, large": np.arange(50_000.0),
    "numpy array, no dimension": np.array(3.0),
    "numpy array, empty": np.zeros((0, 3)),
    "numpy array, other byte order": np.arange(3, dtype=">i4"),
    "numpy array of text": np.array(["a", "bc"]),
    "numpy array of dates": np.array(["2026-01-02"], dtype="datetime64[ns]"),
    "numpy array with fields": np.zeros(2, dtype=[("a", "i4"), ("b", "f8")]),
    "numpy float": np.float32(1.1),
    "numpy double": np.float64(1.1),
    "numpy bool": np.bool_(True),
    "numpy text": np.str_("a"),
    "numpy date": np.datetime64("2026-01-02"),
    "numpy dtype": np.dtype("float32"),
    "keys": {Path("a"): 1, (1, Path("b")): Path("c"), 2: {None: date(2026, 1, 2)}},
    "nested": [{"a": (Path("x"), {"b": deque([np.int64(3)])})}],
}
"""One value of every kind that people keep."""


def same(saved: Any, loaded: Any) -> bool:
    """Whether two values are equal and of the same type, and so is what they hold."""
    if type(saved) is not type(loaded):
        return False
    if isinstance(saved, np.ndarray):
        return bool(saved.dtype == loaded.dtype and np.array_equal(saved, loaded))
    if isinstance(saved, dict):
        return len(saved) == len(loaded) and all(
            same(list(pair[0]), list(pair[1])) for pair in zip(saved.items(), loaded.items(), strict=True)
        )
    if isinstance(saved, list | tuple | deque):
        return len(saved) == len(loaded) and all(map(same, saved, loaded))
    if isinstance(saved, Namespace | SimpleNamespace):
        return same(vars(saved), vars(loaded))
    return bool(saved == loaded)


def fabric(folder: bool = False) -> Fabric:
    return Fabric(accelerator="cpu", devices=1, plugins=DistributedCheckpointIO() if folder else None)


class Keeps(Net):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.value = value


def save(module: L.LightningModule, path: str = "a.ckpt", folder: bool = False) -> L.Trainer:
    plugins = DistributedCheckpointIO() if folder else None
    run = trainer(Path(), max_steps=1, limit_val_batches=0, plugins=plugins)
    run.fit(module, loader(4))
    run.save_checkpoint(path)
    return run


# --- one value of every kind, in both packages, in a file and in a folder ---


@pytest.mark.parametrize("folder", [False, True])
def test_fabric_gives_every_value_back(folder: bool) -> None:
    runtime = fabric(folder)
    runtime.save("a.ckpt", {"values": VALUES, **VALUES})
    loaded = runtime.load("a.ckpt")
    assert list(loaded) == ["values", *VALUES]
    for name, value in VALUES.items():
        assert same(value, loaded[name]), name
        assert same(value, loaded["values"][name]), name
    assert loaded["deque"].maxlen == 3
    assert loaded["defaultdict"]["new"] == []
    assert loaded["datetime in a zone"].utcoffset() == VALUES["datetime in a zone"].utcoffset()
    state = {"model": nn.Linear(1, 1), "path": None}
    runtime.save("b.ckpt", {"model": nn.Linear(1, 1), "path": Path("x")})
    assert runtime.load("b.ckpt", state) == {}
    assert state["path"] == Path("x")


@pytest.mark.parametrize("folder", [False, True])
def test_the_trainer_gives_every_value_back(folder: bool) -> None:
    save(Keeps(VALUES), folder=folder)
    loaded = Keeps.load_from_checkpoint("a.ckpt").value
    for name, value in VALUES.items():
        assert same(value, loaded[name]), name


@pytest.mark.parametrize("name", VALUES)
def test_a_value_by_itself_is_an_argument(name: str) -> None:
    save(Keeps(VALUES[name]))
    assert same(VALUES[name], Keeps.load_from_checkpoint("a.ckpt").value)


@pytest.mark.parametrize("hook", ["callback", "on_save_checkpoint", "datamodule"])
def test_hooks_may_save_them_too(hook: str) -> None:
    got: dict[str, Any] = {}

    class Keeper(L.Callback):
        def state_dict(self) -> dict[str, Any]:
            return VALUES if hook == "callback" else {}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            got.update(state_dict)

    class Data(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader(4)

        def state_dict(self) -> dict[str, Any]:
            return VALUES if hook == "datamodule" else {}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            got.update(state_dict)

    class Hooked(Net):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint.update({"mine": VALUES} if hook == "on_save_checkpoint" else {})

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            got.update(checkpoint.get("mine", {}))

    run = trainer(Path(), max_steps=1, callbacks=Keeper())
    run.fit(Hooked(), datamodule=Data())
    run.save_checkpoint("a.ckpt")
    trainer(Path(), max_steps=2, max_epochs=2, callbacks=Keeper()).fit(Hooked(), datamodule=Data(), ckpt_path="a.ckpt")
    assert all(same(value, got[name]) for name, value in VALUES.items())


def test_other_readers_find_plain_values() -> None:
    with pytest.warns(UserWarning, match="Level"):
        save(Keeps({"path": Path("a"), "color": Level.LOW, "ns": Namespace(a=1), "deque": deque([1])}), "a.ckpt")
    for weights_only in (True, False):
        plain = torch.load("a.ckpt", weights_only=weights_only)["hyper_parameters"]
        assert plain == {"value": {"path": "a", "color": 1, "ns": {"a": 1}, "deque": [1]}}


# --- classes of the program ---


class Annotated(Net):
    def __init__(
        self,
        cfg: Config,
        level: Level = Level.LOW,
        flags: Flags | None = None,
        point: Point | None = None,
        slotted: list[Slotted] | None = None,
        named: Literal[Color.RED, Color.GREEN] = Color.RED,
        keys: dict[Color, int] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()


CONFIG = Config(Inner(3), Color.GREEN, [Inner(5, Path("e"))], {"a": Point(1, Path("p"))})


def test_classes_in_the_annotations_come_back() -> None:
    given = {
        "cfg": CONFIG,
        "level": Level.LOW,
        "flags": Flags.A | Flags.B,
        "point": Point(2, Path("q")),
        "slotted": [Slotted(4)],
        "named": Color.GREEN,
        "keys": {Color.RED: 1},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(Annotated(**given))
    loaded = Annotated.load_from_checkpoint("a.ckpt").hparams
    assert all(same(value, loaded[name]) for name, value in given.items())
    assert loaded.cfg.net.dim == 3
    assert torch.load("a.ckpt", weights_only=True)["hyper_parameters"]["cfg"]["net"] == {"dim": 3, "root": "data"}


class Settings(TypedDict):
    inner: Inner


def test_annotations_are_followed_as_deep_as_they_go() -> None:
    class Deep(Net):
        def __init__(self, settings: Settings, act: Callable[[Inner], Color], other: OnlyForTypeCheckers) -> None:  # noqa: F821
            super().__init__()
            self.save_hyperparameters()

    given = {"settings": {"inner": Inner(9)}, "act": [Color.RED], "other": 1}
    save(Deep(**given))  # type: ignore[arg-type]
    assert dict(Deep.load_from_checkpoint("a.ckpt").hparams) == given


def test_what_the_constructor_sets_beside_the_fields_is_there_again() -> None:
    class Wide(Net):
        def __init__(self, cfg: Sized) -> None:
            super().__init__()
            self.save_hyperparameters()

    save(Wide(Sized(3)))
    loaded = Wide.load_from_checkpoint("a.ckpt").hparams.cfg
    assert loaded == Sized(3)
    assert loaded.area == 9


@dataclass
class Sized:
    width: int

    def __post_init__(self) -> None:
        self.area = self.width**2


def test_a_dataclass_that_got_another_field_since_and_has_arguments_that_are_no_fields() -> None:
    def cfg(*more: Any) -> Any:
        fields = [("width", int), ("scale", InitVar[int]), *more]
        found = make_dataclass("Growing", fields, namespace={"__post_init__": lambda self, scale: None})
        found.__module__ = __name__
        return found

    def net(kind: Any) -> Any:
        class Wide(Net):
            def __init__(self, cfg: Any) -> None:
                super().__init__()
                self.save_hyperparameters()

        Wide.__init__.__annotations__["cfg"] = kind
        return Wide

    old, new = cfg(), cfg(("depth", int, field(default=2)), ("names", list, field(default_factory=list)))
    save(net(old)(old(3, 4)))
    loaded = net(new).load_from_checkpoint("a.ckpt").hparams.cfg
    assert type(loaded) is new and vars(loaded) == {"width": 3, "depth": 2, "names": []}


class AnyArguments(Net):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.save_hyperparameters()


@pytest.mark.parametrize("value", [Inner(3), Color.RED, Point(1, Path("a")), [Inner(3)]])
def test_a_class_that_no_annotation_names_is_told_and_pickled(value: Any) -> None:
    run = trainer(Path(), max_steps=1, limit_val_batches=0)
    run.fit(AnyArguments(thing=value, lr=0.1), loader(4))
    with pytest.warns(UserWarning, match=r"hyper_parameters\.thing.*weights_only=False.*annotated"):
        run.save_checkpoint("a.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.save_checkpoint("a.ckpt")  # it was told
    assert AnyArguments.load_from_checkpoint("a.ckpt", weights_only=False).hparams.thing == value
    assert AnyArguments.load_from_checkpoint("a.ckpt", thing=1).hparams == {"thing": 1, "lr": 0.1}
    thing = AnyArguments.load_from_checkpoint("a.ckpt").hparams.thing
    with pytest.raises(CheckpointUnsafeError, match=r"hyper_parameters\.thing.*weights_only=False"):
        (thing[0] if isinstance(value, list) else thing).name
    if not isinstance(value, list):
        with pytest.raises(CheckpointUnsafeError, match=r"`thing=\.\.\.` to `load_from_checkpoint`"):
            thing()


@pytest.mark.parametrize("whole", [CONFIG, Namespace(net=Inner(3), root=Path("a")), AttributeDict(net=Inner(1))])
def test_one_object_that_holds_them_all_comes_back(whole: Any) -> None:
    class One(Net):
        def __init__(self, cfg: Config | Namespace | AttributeDict, lr: float = 0.1) -> None:
            super().__init__()
            self.save_hyperparameters(cfg)
            self.cfg = cfg

    save(One(whole))
    assert same(whole, One.load_from_checkpoint("a.ckpt").cfg)


def test_one_object_whose_class_is_not_known_is_told() -> None:
    class One(Net):
        def __init__(self, cfg: Any) -> None:
            super().__init__()
            self.save_hyperparameters(cfg)
            self.cfg, self.dim = cfg, cfg.dim

    with pytest.warns(UserWarning, match=r"Inner"):
        save(One(Inner(7)))
    with pytest.raises(CheckpointUnsafeError, match="weights_only=False"):
        One.load_from_checkpoint("a.ckpt")
    assert One.load_from_checkpoint("a.ckpt", weights_only=False).cfg == Inner(7)
    assert One.load_from_checkpoint("a.ckpt", cfg=Inner(8)).cfg == Inner(8)


def test_a_class_that_the_loading_program_does_not_know_is_named() -> None:
    class Other(Net):
        def __init__(self, cfg: Any) -> None:
            super().__init__()
            self.dim = cfg.net.dim

    save(Annotated(CONFIG))
    with pytest.raises(CheckpointUnsafeError, match=r"hyper_parameters\.cfg.*Config.*Annotate.*`cfg=\.\.\.`"):
        Other.load_from_checkpoint("a.ckpt")


def test_fabric_knows_the_classes_that_the_state_has() -> None:
    runtime = fabric()
    with pytest.warns(UserWarning, match=r"state\['cfg'\].*Config.*weights_only=False"):
        runtime.save("a.ckpt", {"cfg": CONFIG, "step": 1})
    state = {"cfg": Config(Inner(0)), "step": 0}
    runtime.load("a.ckpt", state)
    assert same(state["cfg"], CONFIG)
    loaded = runtime.load("a.ckpt")
    assert loaded["step"] == 1
    with pytest.raises(CheckpointUnsafeError, match=r"'cfg'.*weights_only=False"):
        loaded["cfg"].net
    assert runtime.load("a.ckpt", weights_only=False)["cfg"] == CONFIG


def test_what_cannot_be_pickled_is_refused_by_fabric_when_it_is_saved() -> None:
    with pytest.raises(CheckpointError, match=r"state\['fns'\]\[1\].*<lambda>.*cannot be pickled.*leave it out"):
        fabric().save("a.ckpt", {"fns": [1, lambda: 0]})
    assert not Path("a.ckpt").exists()


def test_streams_and_generators_come_back() -> None:
    generator = torch.Generator().manual_seed(3)
    fabric().save("a.ckpt", {"generator": generator, "stream": io.BytesIO(b"abc")})
    loaded = fabric().load("a.ckpt")
    assert torch.equal(torch.rand(3, generator=loaded["generator"]), torch.rand(3, generator=generator))
    assert loaded["stream"].read() == b"abc"


def test_the_key_of_the_types_is_the_users_as_long_as_it_is_a_dict() -> None:
    fabric().save("a.ckpt", {"treadle": {"mine": 1}, "path": Path("a")})
    assert fabric().load("a.ckpt") == {"treadle": {"mine": 1}, "path": Path("a")}
    with pytest.raises(MisconfigurationException, match="'treadle'"):
        fabric().save("b.ckpt", {"treadle": 1, "path": Path("a")})


@pytest.mark.parametrize("kind", ["PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64", "RandomState", "Random"])
def test_generators_of_random_numbers_go_on_where_they_were(kind: str) -> None:
    numbers: Any = {"RandomState": np.random.RandomState, "Random": random.Random}.get(kind, lambda seed: seed)(3)
    if numbers == 3:
        numbers = np.random.Generator(getattr(np.random, kind)(3))
        numbers.spawn(1)
    (numbers.gauss if kind == "Random" else numbers.standard_normal)()
    runtime = fabric()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runtime.save("a.ckpt", {"numbers": numbers})
    loaded = runtime.load("a.ckpt")["numbers"]
    assert type(loaded) is type(numbers)
    draw = "gauss" if kind == "Random" else "standard_normal"
    assert [getattr(numbers, draw)() for _ in range(5)] == [getattr(loaded, draw)() for _ in range(5)]
    if isinstance(numbers, np.random.Generator):
        assert numbers.spawn(1)[0].random() == loaded.spawn(1)[0].random()
        assert numbers.integers(9, dtype=np.int32) == loaded.integers(9, dtype=np.int32)


def test_attributes_of_a_mapping_come_back_or_are_told() -> None:
    plain, odd = OrderedDict(a=1), OrderedDict(a=1)
    plain.version = {"a": 2}  # type: ignore[attr-defined]
    odd.owner = CONFIG  # type: ignore[attr-defined]
    runtime = fabric()
    with pytest.warns(UserWarning, match=r"state\['odd'\] \(collections.OrderedDict\)"):
        runtime.save("a.ckpt", {"plain": plain, "odd": odd})
    assert runtime.load("a.ckpt")["plain"].version == {"a": 2}
    assert runtime.load("a.ckpt", weights_only=False)["odd"].owner == CONFIG


# --- OmegaConf ---


def test_omegaconf_comes_back() -> None:
    omegaconf = pytest.importorskip("omegaconf")
    config = omegaconf.OmegaConf.create(
        {"net": {"dim": 3, "layers": [1, {"p": Path("x")}]}, "dim": "${net.dim}", "none": None, "missing": "???"}
    )

    class Hydra(Net):
        def __init__(self, cfg: Any, part: Any = None) -> None:
            super().__init__()
            self.save_hyperparameters()

    save(Hydra(config, config.net.layers))
    loaded = Hydra.load_from_checkpoint("a.ckpt").hparams
    assert type(loaded.cfg) is omegaconf.DictConfig
    assert loaded.cfg == config
    assert loaded.cfg.net.dim == loaded.cfg.dim == 3
    assert omegaconf.OmegaConf.to_yaml(loaded.cfg) == omegaconf.OmegaConf.to_yaml(config)
    assert type(loaded.part) is omegaconf.ListConfig
    fabric().save("b.ckpt", {"cfg": config})
    assert fabric().load("b.ckpt")["cfg"] == config

    class Whole(Net):
        def __init__(self, cfg: Any) -> None:
            super().__init__()
            self.save_hyperparameters(cfg)
            self.cfg = cfg

    save(Whole(config.net), "c.ckpt")
    loaded = Whole.load_from_checkpoint("c.ckpt").cfg
    assert type(loaded) is omegaconf.DictConfig
    assert loaded == config.net


def test_a_resolver_is_never_called_by_a_file() -> None:
    omegaconf = pytest.importorskip("omegaconf")
    called: list[int] = []
    omegaconf.OmegaConf.register_resolver("told", lambda: called.append(1) or 1, replace=True)
    fabric().save("a.ckpt", {"cfg": omegaconf.OmegaConf.create({"a": "${told:}", "b": "${a}"})})
    assert fabric().load("a.ckpt")["cfg"] == {"a": 1, "b": 1}
    called.clear()
    for place in ("content", "links"):
        content = torch.load("a.ckpt", weights_only=True)
        if place == "content":
            content["cfg"]["a"] = "${told:}"
        else:
            content["treadle"]["values"]["types"][0][1]["more"]["links"] = [(("a",), "${told:}")]
        torch.save(content, "b.ckpt")
        with pytest.raises(CheckpointUnsafeError):
            fabric().load("b.ckpt")["cfg"].a
    assert not called


def test_a_data_module_gets_its_values_back() -> None:
    class Data(L.LightningDataModule):
        def __init__(self, root: Path, cfg: Config, stamp: datetime) -> None:
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self) -> Any:
            return loader(4)

    given = {"root": Path("a"), "cfg": CONFIG, "stamp": datetime(2026, 1, 2)}
    run = trainer(Path(), max_steps=1)
    run.fit(Net(), datamodule=Data(**given))
    run.save_checkpoint("a.ckpt")
    loaded = Data.load_from_checkpoint("a.ckpt").hparams
    assert all(same(value, loaded[name]) for name, value in given.items())


def test_an_open_file_gives_them_too() -> None:
    save(Annotated(CONFIG))
    with open("a.ckpt", "rb") as file:
        assert same(CONFIG, Annotated.load_from_checkpoint(file).hparams.cfg)


def test_a_run_that_goes_on_sees_them_and_saves_them_again() -> None:
    seen: list[Any] = []

    class Looking(Annotated):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            seen.append(checkpoint["hyper_parameters"]["cfg"])

    save(Looking(CONFIG))
    run = trainer(Path(), max_steps=2, max_epochs=2)
    run.fit(Looking(CONFIG), loader(4), ckpt_path="a.ckpt")
    assert same(seen, [CONFIG])
    run.save_checkpoint("b.ckpt")
    assert same(CONFIG, Looking.load_from_checkpoint("b.ckpt").hparams.cfg)
