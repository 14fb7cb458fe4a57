"""Batches of every type: moved, measured and converted by one walk.

The mean over an evaluation is weighted by the number of samples of each batch: a wrong number is a wrong mean.

Tests of ``treadle_fabric.containers``, ``treadle_fabric.batches``.
"""

from __future__ import annotations

from argparse import Namespace
from collections import OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from tests.processes import run_in_ranks
from tests.trainer.models import Net, trainer
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import treadle as L
from treadle_fabric import AttributeDict, Fabric, infer_batch_size, map_tensors, move_data_to_device
from treadle_fabric.loggers import CSVLogger

META = torch.device("meta")


class Pair(NamedTuple):
    x: Tensor
    name: str = "x"


class Paired(tuple[Any, ...]):
    """A tuple whose ``__new__`` takes its items one by one, and that has an attribute."""

    def __new__(cls, x: Tensor, name: str) -> Paired:
        made = super().__new__(cls, (x, name))
        made.label = name
        return made

    label: str


@dataclass(slots=True)
class Slots:
    x: Tensor


@dataclass(frozen=True, slots=True)
class FrozenSlots:
    name: str
    x: Tensor


@dataclass
class Later:
    """A field that ``__init__`` does not take, one that is never set, and an attribute that is no field."""

    size: InitVar[int]
    x: Tensor = field(init=False)
    never: Tensor = field(init=False)

    def __post_init__(self, size: int) -> None:
        self.x = self.mask = torch.zeros(size, 2)


@dataclass
class Inherits(Slots):
    y: Any = None


@dataclass
class Image:
    """A field called ``shape``, which is no size of the batch."""

    shape: tuple[int, ...]
    x: Tensor


class Attrs:
    """What the package attrs makes of a class, as far as others can see."""

    __slots__ = ("x",)
    __attrs_attrs__ = (SimpleNamespace(name="x"),)

    def __init__(self, x: Tensor) -> None:
        self.x = x


class OwnMapping(MutableMapping[str, Any]):
    """A mapping that keeps its entries in an attribute."""

    def __init__(self, entries: Any) -> None:
        self.entries = dict(entries)

    def __getitem__(self, key: str) -> Any:
        return self.entries[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.entries[key] = value

    def __delitem__(self, key: str) -> None:
        del self.entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


class Frozen(Mapping[str, Any]):
    def __init__(self, entries: Any) -> None:
        self._entries = dict(entries)

    def __getitem__(self, key: str) -> Any:
        return self._entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class Unbuildable(Frozen):
    def __init__(self, x: Any, y: Any) -> None:
        super().__init__({"x": x, "y": y})


class OwnSequence(Sequence[Any]):
    def __init__(self, items: Any) -> None:
        self.items = tuple(items)

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)


class Encoding(UserDict[str, Any]):
    """As of tokenizers: a mapping with a ``to`` that moves in place."""

    def to(self, device: Any) -> Encoding:
        self.data = {key: value.to(device) for key, value in self.data.items()}
        return self


class Graph:
    """As of graph libraries: entries by key, kept in private, and a ``to``."""

    def __init__(self, x: Tensor) -> None:
        self._store = {"x": x}

    def keys(self) -> Any:
        return self._store.keys()

    def __getitem__(self, key: str) -> Tensor:
        return self._store[key]

    def to(self, device: Any) -> Graph:
        moved = Graph(self._store["x"].to(device))
        moved.__dict__ |= {k: v for k, v in self.__dict__.items() if k != "_store"}
        return moved


def graphs(n: int) -> Graph:
    """``n`` graphs of four nodes each."""
    made = Graph(torch.zeros(4 * n, 2))
    made.num_graphs = n  # type: ignore[attr-defined]
    return made


class TensorTable(OwnMapping):
    """As of tensor dictionaries: a mapping with the shape of what is batched."""

    @property
    def shape(self) -> torch.Size:
        return torch.Size([len(self.entries["x"])])


class Counted:
    """Says how many samples it has; its first tensor does not tell."""

    def __init__(self, n: int) -> None:
        self.vocabulary, self.x, self.batch_size = torch.zeros(99), torch.zeros(n, 2), n


class Circle:
    """Knows what knows it."""

    def __init__(self, n: int) -> None:
        self.owner = SimpleNamespace(batch=self)
        self.x = torch.zeros(n, 2)


def zeros(n: int) -> Tensor:
    return torch.zeros(n, 2)


def ragged(n: int) -> list[Tensor]:
    return [torch.zeros(length, 2) for length in range(n + 1, 1, -1)]


def nested(n: int, layout: Any) -> Tensor:
    return torch.nested.nested_tensor(ragged(n), layout=layout)


CONTAINERS: dict[str, Callable[[int], Any]] = {
    "a packed sequence": lambda n: pack_sequence(ragged(n)),
    "a packed sequence among others": lambda n: ["text", {"x": pack_sequence(ragged(n))}, torch.zeros(9)],
    "a named tuple": lambda n: Pair(zeros(n)),
    "a tuple of the user's own": lambda n: Paired(zeros(n), "x"),
    "torch.return_types": lambda n: torch.max(torch.zeros(n, 2), 1),
    "a deque": lambda n: deque([zeros(n)]),
    "a UserList": lambda n: UserList([zeros(n)]),
    "a sequence": lambda n: OwnSequence([zeros(n)]),
    "a set": lambda n: {zeros(n)},
    "an OrderedDict": lambda n: OrderedDict(x=zeros(n)),
    "a defaultdict": lambda n: defaultdict(list, x=zeros(n)),
    "an AttributeDict": lambda n: AttributeDict(x=zeros(n), shape=(9, 9)),
    "a UserDict": lambda n: UserDict(x=zeros(n)),
    "a mapping of the user's own": lambda n: OwnMapping({"x": zeros(n)}),
    "a mapping that cannot be changed": lambda n: Frozen({"x": zeros(n)}),
    "a dataclass with slots": lambda n: Slots(zeros(n)),
    "a frozen dataclass with slots": lambda n: FrozenSlots("x", zeros(n)),
    "a dataclass with fields that are set later": lambda n: Later(n),
    "a dataclass that inherits": lambda n: Inherits(zeros(n)),
    "a dataclass with a field called shape": lambda n: Image((9, 9), zeros(n)),
    "an attrs class": lambda n: Attrs(zeros(n)),
    "a SimpleNamespace": lambda n: SimpleNamespace(x=zeros(n)),
    "a Namespace": lambda n: Namespace(x=zeros(n)),
    "an encoding": lambda n: Encoding(x=zeros(n)),
    "a tensor table": lambda n: TensorTable({"y": torch.zeros(9, 9), "x": zeros(n)}),
    "a scalar first": lambda n: {"step": torch.tensor(3), "scale": numpy.float32(2), "x": zeros(n)},
    "text first": lambda n: {"text": ["a"] * 9, "none": None, "x": zeros(n)},
}
OTHERS: dict[str, Callable[[int], Any]] = {
    "a graph batch": graphs,
    "a graph": lambda n: Graph(zeros(n)),
    "an object that says its size": Counted,
    "objects in a circle": Circle,
    "a jagged tensor": lambda n: nested(n, torch.jagged),
    "a nested tensor": lambda n: nested(n, torch.strided),
    "a sparse tensor": lambda n: zeros(n).to_sparse(),
    "an array": lambda n: numpy.zeros((n, 2)),
    "a tensor": zeros,
}
ALL = {**CONTAINERS, **OTHERS}

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


@dataclass
class Batches:
    """Three samples and then one, as a stream would give them."""

    make: Callable[[int], Any]

    def __iter__(self) -> Iterator[Any]:
        return (self.make(n) for n in (3, 1))


class Logs(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("value", (30.0, 10.0)[batch_idx])


@pytest.mark.parametrize("kind", ALL)
def test_the_mean_of_an_evaluation_is_weighted_by_samples(kind: str, tmp_path: Path) -> None:
    found = trainer(tmp_path).validate(Logs(), Batches(ALL[kind]), verbose=False)
    assert found == [{"value": 25.0}]


@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers_are_moved_and_converted_and_stay_of_their_type(kind: str) -> None:
    batch = CONTAINERS[kind](3)
    if kind != "an encoding":
        moved = move_data_to_device(CONTAINERS[kind](3), "meta")
        assert type(moved) is type(batch)
        assert infer_batch_size(moved) == 3
        assert all(t.device == META for t in tensors(moved) if t.is_floating_point())
    assert all(t.device.type == "cpu" for t in tensors(batch))

    class Takes(nn.Module):
        def forward(self, given: Any) -> Any:
            self.given = given

    model = Takes()
    Fabric(accelerator="cpu", precision="bf16-true").setup(model)(batch)
    assert type(model.given) is type(batch)
    assert {t.dtype for t in tensors(model.given) if t.is_floating_point()} == {torch.bfloat16}
    assert {t.dtype for t in tensors(batch) if t.is_floating_point()} == {torch.float32}, "the batch itself stays"
    assert map_tensors(batch, lambda t: t) is batch


def tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(value, lambda t: found.append(t) or t)
    return found


def test_what_a_tuple_and_a_dataclass_have_beside_their_items_stays() -> None:
    moved = move_data_to_device(Paired(zeros(3), "name"), "meta")
    assert (moved.label, moved[1]) == ("name", "name")
    moved = move_data_to_device(Later(3), "meta")
    assert moved.mask.device == META
    assert not hasattr(moved, "never")


def test_objects_with_a_method_to_are_moved_by_it() -> None:
    moved = move_data_to_device([graphs(3), Graph], "meta")
    assert moved[0]["x"].device == META
    assert infer_batch_size(moved) == 3
    assert moved[1] is Graph, "a class is no object to move"


def test_a_container_that_cannot_be_made_anew_is_named() -> None:
    batch = Unbuildable(torch.zeros(3), 1)
    assert infer_batch_size(batch) == 3
    assert move_data_to_device(batch, "cpu") is batch
    with pytest.raises(L.MisconfigurationException, match=r"A .*Unbuildable holds tensors .* Give the class a method"):
        move_data_to_device(batch, "meta")


# torch packs no sequence of length 0, and has no maximum of nothing; another tensor of the table has samples; each step
# looks at the first tensor only
NEVER_EMPTY = {
    "a packed sequence",
    "a packed sequence among others",
    "torch.return_types",
    "a tensor table",
    "a scalar first",
}


class Means(Net):
    """A loss that is NaN for a batch of no samples."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(torch.ones(infer_batch_size(batch) or 0, 4)).mean()


@pytest.mark.parametrize("kind", sorted({*CONTAINERS} - NEVER_EMPTY))
def test_a_batch_of_no_samples_is_skipped(kind: str, tmp_path: Path) -> None:
    model = Means()
    with pytest.warns(UserWarning, match="A batch of 0 samples"):
        trainer(tmp_path).fit(model, (CONTAINERS[kind](n) for n in (2, 0, 2)))
    assert bool(model.layer.weight.isfinite().all())


def _arrays() -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    rank = fabric.global_rank
    mine = {
        "array": numpy.full(2, float(rank)),
        "pair": Pair(torch.full((1,), float(rank))),
        "set": SimpleNamespace(n=rank),
    }
    gathered = fabric.all_gather(mine)
    assert gathered["array"].tolist() == [[0.0, 0.0], [1.0, 1.0]]
    assert gathered["pair"].x.tolist() == [[0.0], [1.0]]
    assert gathered["set"].n.tolist() == [0, 1]
    numbers = {name: value for name, value in mine.items() if name != "pair"}  # which holds a text
    assert fabric.all_reduce(numbers)["array"].tolist() == [0.5, 0.5]
    assert mine["array"].tolist() == [rank, rank]


def test_arrays_and_records_are_gathered_from_all_ranks() -> None:
    run_in_ranks(_arrays)


# ------------------------------------------------------------------------------------------------ hyper-parameters


@dataclass
class Config:
    width: int
    area: int = field(init=False)
    never: int = field(init=False)
    scale: float = field(default_factory=lambda: 2.0)

    def __post_init__(self) -> None:
        self.area = self.width**2


class Takes(Net):
    def __init__(self, config: Config, lr: float = 0.1) -> None:
        super().__init__(lr)
        self.save_hyperparameters()


class TakesOne(Net):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.save_hyperparameters(config)


@dataclass(eq=False)
class IsOne(L.LightningDataModule):
    """A data module that is a dataclass."""

    folder: str
    shuffle: InitVar[bool] = True
    found: list[str] = field(init=False)
    sizes: list[int] = field(default_factory=list)

    def __post_init__(self, shuffle: bool) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_a_dataclass_with_fields_that_are_not_set_gives_hyperparameters(tmp_path: Path) -> None:
    config = Config(3)
    model = Takes(config)
    assert model.hparams == {"config": config, "lr": 0.1}
    one = TakesOne(config)
    assert one.hparams == {"width": 3, "area": 9, "scale": 2.0}
    data = IsOne("here", shuffle=False)
    assert data.hparams == {"folder": "here", "shuffle": False, "sizes": []}
    logger = CSVLogger(tmp_path)
    logger.log_hyperparams(config)
    logger.log_hyperparams({"config": config})
    logger.save()
    written = (Path(logger.log_dir) / "hparams.yaml").read_text()
    assert "area: 9" in written
