"""Moving batches, and sharing out samples.

Tests of ``treadle_fabric.data.sharding``, ``treadle_fabric.data.samplers``, ``treadle_fabric.batches``,
``treadle_fabric.containers``.
"""

from __future__ import annotations

import random
from collections import OrderedDict, UserDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler

from treadle_fabric import (
    batch_mover,
    has_len,
    infer_batch_size,
    map_tensors,
    move_data_to_device,
    sampler_epoch,
    seed_everything,
    seed_workers,
    set_epoch,
    shard_dataloader,
    sized_len,
)
from treadle_fabric.containers import leaves, map_leaves
from treadle_fabric.randomness.private import PrivateRandomness

Point = namedtuple("Point", "x y")
META = torch.device("meta")  # a second device that every machine has


@dataclass
class Batch:
    x: Tensor
    name: str = "b"


@dataclass(frozen=True)
class FrozenBatch:
    x: Tensor


@dataclass(slots=True)
class Slots:
    x: Any


@dataclass(frozen=True, slots=True)
class FrozenSlots:
    x: Any


@dataclass
class Later:
    x: Any = field(init=False)
    never: Any = field(init=False)


class Sequence2(list[Any]):
    pass


class Movable:
    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def to(self, device: torch.device) -> Movable:
        return Movable(str(device))


class MovesInPlace(Movable):
    def to(self, device: torch.device) -> None:  # type: ignore[override]
        self.device = str(device)


def t() -> Tensor:
    return torch.zeros(2)


@pytest.mark.parametrize(
    "batch",
    [
        t(),
        [t(), t()],
        (t(), 3, "s", None),
        {"x": t(), "y": [t()]},
        OrderedDict(x=t()),
        UserDict(x=t()),
        Point(t(), t()),
        Batch(t()),
        FrozenBatch(t()),
        Sequence2([t()]),
        [{"a": (t(), Batch(t()))}],
        "text",
        7,
        None,
        [],
    ],
    ids=str,
)
def test_batch_that_is_there_is_the_same_object(batch: Any) -> None:
    assert move_data_to_device(batch, torch.device("cpu")) is batch
    assert move_data_to_device(batch, "cpu") is batch


def test_moves_every_kind_of_container() -> None:
    def meta(batch: Any) -> Any:
        return move_data_to_device(batch, META)

    assert meta(t()).device == META
    moved = meta([t(), (t(), 3), "s"])
    assert type(moved) is list
    assert moved[0].device == META
    assert type(moved[1]) is tuple
    assert moved[1][0].device == META
    assert moved[1][1:] == (3,)
    point = meta(Point(t(), 1))
    assert type(point) is Point
    assert point.x.device == META
    assert point.y == 1
    ordered = OrderedDict(x=t(), k=1)
    new = meta(ordered)
    assert type(new) is OrderedDict
    assert new["x"].device == META
    assert new["k"] == 1
    assert ordered["x"].device.type == "cpu", "the batch itself must stay as it was"
    user = meta(UserDict(x=t()))
    assert type(user) is UserDict
    assert user["x"].device == META
    batch = Batch(t())
    assert meta(batch).x.device == META
    assert batch.x.device.type == "cpu"
    assert meta(FrozenBatch(t())).x.device == META
    sequence = meta(Sequence2([t()]))
    assert type(sequence) is Sequence2
    assert sequence[0].device == META
    assert meta(Movable()).device == "meta"
    assert meta([MovesInPlace()])[0].device == "meta"
    packed = torch.nn.utils.rnn.pack_sequence([torch.zeros(2, 3)])
    assert meta(packed).data.device == META


def later(x: Any) -> Any:
    batch = Later()
    batch.x = x
    return batch


# each makes a container around a tensor, and finds the tensor in it
CONTAINERS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "list": (lambda x: ["s", x], lambda c: c[1]),
    "tuple": (lambda x: ("s", x), lambda c: c[1]),
    "namedtuple": (lambda x: Point(None, x), lambda c: c.y),
    "list subclass": (lambda x: Sequence2(["s", x]), lambda c: c[1]),
    "deque": (lambda x: deque([x], maxlen=3), lambda c: c[0]),
    "dict": (lambda x: {"s": "s", "x": x}, lambda c: c["x"]),
    "OrderedDict": (lambda x: OrderedDict(x=x), lambda c: c["x"]),
    "defaultdict": (lambda x: defaultdict(list, x=x), lambda c: c["x"]),
    "UserDict": (lambda x: UserDict(x=x), lambda c: c["x"]),
    "MappingProxyType": (lambda x: MappingProxyType({"x": x}), lambda c: c["x"]),
    "dataclass": (Batch, lambda c: c.x),
    "frozen dataclass": (FrozenBatch, lambda c: c.x),
    "dataclass with slots": (Slots, lambda c: c.x),
    "frozen dataclass with slots": (FrozenSlots, lambda c: c.x),
    "dataclass whose __init__ does not take the field": (later, lambda c: c.x),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_each_kind_of_container_is_moved_measured_and_converted(kind: str) -> None:
    make, get = CONTAINERS[kind]
    for nested in (False, True):
        batch = make([torch.zeros(3, 2)] if nested else torch.zeros(3, 2))
        inside = (lambda c: get(c)[0]) if nested else get
        moved = move_data_to_device(batch, META)
        assert type(moved) is type(batch)
        assert inside(moved).device == META
        assert inside(batch).device.type == "cpu", "the batch itself must stay as it was"
        assert infer_batch_size(batch) == 3
        converted = map_tensors(batch, lambda x: x.to(torch.int64))
        assert inside(converted).dtype == torch.int64
        assert map_tensors(batch, lambda x: x) is batch
        assert list(leaves(batch))[-1] is inside(batch) or kind == "dataclass"
        assert map_leaves(batch, str) is not batch


def test_what_a_deque_and_a_defaultdict_have_beside_their_values_stays() -> None:
    assert move_data_to_device(deque([t()], maxlen=3), META).maxlen == 3
    assert move_data_to_device(defaultdict(list, x=t()), META)["y"] == []


def test_the_number_of_samples() -> None:
    class Public:
        def __init__(self) -> None:
            self._private, self.public = torch.zeros(2), torch.zeros(5)

    packed = torch.nn.utils.rnn.pack_sequence([torch.zeros(4, 3), torch.zeros(2, 3)])
    assert infer_batch_size(packed) == 2, "sequences, not their elements"
    assert infer_batch_size({"lengths": "s", "x": [packed, torch.zeros(7)]}) == 2
    assert infer_batch_size(Public()) == 5
    assert infer_batch_size([torch.tensor(1.0), torch.zeros(3)]) == 3, "a number has no samples"
    assert infer_batch_size(numpy.zeros((6, 2))) == 6
    assert infer_batch_size(["text", {}, None, 3]) is None


def test_parts_that_are_there_are_the_same_objects() -> None:
    there = torch.zeros(2, device=META)
    inner = {"y": there}
    moved = move_data_to_device([t(), inner], META)
    assert moved[1] is inner


def test_batch_mover_does_the_same() -> None:
    stay, move = batch_mover(torch.device("cpu")), batch_mover(META)
    for batch in (t(), [t(), t()], (t(),), {"x": t()}, [t(), 1], "text"):
        assert stay(batch) is batch
    assert move([t(), 1])[0].device == META
    movable = stay([Movable("elsewhere"), t()])
    assert movable[0].device == "cpu"


# Sharing out


class Numbers(Dataset[int]):
    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> int:
        return i


def drawn(loader: Any) -> list[list[int]]:
    return [batch.tolist() if isinstance(batch, Tensor) else batch for batch in loader]


def shares(loader: Any, ranks: int, pad: bool = True, seed: int = 0, epoch: int = 0) -> list[list[list[int]]]:
    result = []
    for rank in range(ranks):
        torch.manual_seed(100 + rank)  # ranks differ in what they have drawn before
        random.seed(100 + rank)
        numpy.random.seed(100 + rank)
        shard = shard_dataloader(loader, num_replicas=ranks, rank=rank, seed=seed, pad=pad)
        set_epoch(shard, epoch)
        batches = drawn(shard)
        assert len(shard) == len(batches)
        result.append(batches)
    return result


def flattened(parts: Iterable[list[int]]) -> list[int]:
    return [i for part in parts for i in part]


def global_batches(parts: list[list[list[int]]]) -> list[list[int]]:
    """What all ranks see at a step, interleaved as they were dealt out."""
    joined = []
    for step in zip(*parts):
        rows = zip(*step) if len({len(s) for s in step}) == 1 else [flattened(step)]
        joined.append([i for row in rows for i in row])
    return joined


def test_one_process_keeps_its_loader() -> None:
    loader = DataLoader(Numbers(10), 3, shuffle=True)
    assert shard_dataloader(loader, num_replicas=1, rank=0) is loader


@pytest.mark.parametrize("n", [12, 24])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_see_the_global_batches_of_one_process(n: int, ranks: int) -> None:
    parts = shares(DataLoader(Numbers(n), 2), ranks)
    assert global_batches(parts) == drawn(DataLoader(Numbers(n), 2 * ranks))


@pytest.mark.parametrize("n", [0, 1, 2, 5, 7, 8, 2050])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_training_pads_to_equal_length(n: int, ranks: int) -> None:
    loader = DataLoader(Numbers(n), 2)
    parts = shares(loader, ranks)
    flat = [flattened(part) for part in parts]
    assert len({len(f) for f in flat}) == 1
    assert {i for f in flat for i in f} == set(range(n))
    assert sum(map(len, flat)) - n < ranks or n < ranks


@pytest.mark.parametrize("n", [1, 5, 7, 8])
@pytest.mark.parametrize("ranks", [2, 3])
def test_drop_last_drops_the_same_as_one_process(n: int, ranks: int) -> None:
    parts = shares(DataLoader(Numbers(n), 2, drop_last=True), ranks)
    assert global_batches(parts) == drawn(DataLoader(Numbers(n), 2 * ranks, drop_last=True))


@pytest.mark.parametrize("n", [1, 5, 7, 8, 1025])
@pytest.mark.parametrize("ranks", [2, 3])
def test_evaluation_counts_every_sample_once(n: int, ranks: int) -> None:
    parts = shares(DataLoader(Numbers(n), 2), ranks, pad=False)
    assert sorted(i for part in parts for batch in part for i in batch) == list(range(n))


def test_shuffling_is_kept_alike_on_all_ranks_and_new_each_epoch() -> None:
    loader = DataLoader(Numbers(40), 4, shuffle=True)
    first, again, second = (shares(loader, 2, epoch=e) for e in (0, 0, 1))
    other_seed = shares(loader, 2, seed=7)
    order = flattened(global_batches(first))
    assert sorted(order) == list(range(40))
    assert order != list(range(40))
    assert first == again
    assert first != second
    assert first != other_seed


def test_drawing_leaves_the_global_random_state_alone() -> None:
    loader = shard_dataloader(DataLoader(Numbers(40), 4, shuffle=True), num_replicas=2, rank=0)
    sampler = loader.batch_sampler
    torch.manual_seed(3)
    random.seed(3)
    numpy.random.seed(3)
    list(sampler)
    got = torch.rand(1).item(), random.random(), numpy.random.rand()
    torch.manual_seed(3)
    random.seed(3)
    numpy.random.seed(3)
    assert got == (torch.rand(1).item(), random.random(), numpy.random.rand())


class Custom(Sampler[int]):
    """Draws from all global generators, lazily."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.n):
            yield random.randrange(10**6) + int(numpy.random.randint(10**6)) + int(torch.randint(10**6, ()))

    def __len__(self) -> int:
        return self.n


class Identity(Dataset[int]):
    def __getitem__(self, i: int) -> int:
        return i


def test_order_of_a_custom_sampler_survives() -> None:
    sampler = Custom(3000)
    parts = shares(DataLoader(Identity(), 5, sampler=sampler), 2, epoch=4)
    flat = [flattened(part) for part in parts]
    torch.default_generator.manual_seed(4)
    random.seed(4)
    numpy.random.seed(4)
    order = list(sampler)
    assert flat == [order[0::2], order[1::2]]
    assert sampler.epochs == [4, 4]


def test_samplers_own_generator_is_kept() -> None:
    def loader() -> Any:
        return DataLoader(Numbers(20), 2, shuffle=True, generator=torch.Generator().manual_seed(5))

    parts = [drawn(shard_dataloader(loader(), num_replicas=2, rank=r, seed=r)) for r in range(2)]
    whole = DataLoader(Numbers(20), 4, shuffle=True, generator=torch.Generator().manual_seed(5))
    assert [sorted(b) for b in global_batches(parts)] == [sorted(b) for b in drawn(whole)]


class Endless(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        i = 0
        while True:
            yield i
            i += 1


def test_endless_sampler() -> None:
    shard = shard_dataloader(DataLoader(Identity(), 2, sampler=Endless()), num_replicas=2, rank=1)
    it = iter(shard)
    assert [next(it).tolist() for _ in range(2)] == [[1, 3], [5, 7]]
    assert sized_len(shard) is None


class ByLength(BatchSampler):
    """Whole batches of the user's making."""

    def __init__(self) -> None:
        self.batches = [[0], [1, 2], [3, 4, 5], [6], [7, 8]]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def test_custom_batch_sampler_deals_out_whole_batches() -> None:
    loader = DataLoader(Numbers(9), batch_sampler=ByLength())
    assert shares(loader, 2) == [[[0], [3, 4, 5], [7, 8]], [[1, 2], [6], [0]]]
    assert shares(loader, 2, pad=False) == [[[0], [3, 4, 5], [7, 8]], [[1, 2], [6]]]


def test_loader_without_batching() -> None:
    loader = DataLoader(Numbers(5), batch_size=None)
    parts = [[int(i) for i in shard_dataloader(loader, num_replicas=2, rank=r)] for r in range(2)]
    assert parts == [[0, 2, 4], [1, 3, 0]]


class MyLoader(DataLoader[int]):
    def __init__(self, extra: str) -> None:
        super().__init__(Numbers(8), batch_size=2)
        self.extra = extra


def test_a_subclass_keeps_class_and_attributes() -> None:
    loader = MyLoader("kept")
    shard = shard_dataloader(loader, num_replicas=2, rank=0)
    assert type(shard) is MyLoader
    assert shard.extra == "kept"
    assert shard is not loader
    assert len(loader) == 4, "the user's loader is as it was"
    assert len(shard) == 2
    assert drawn(loader)[0] == [0, 1]


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(4))


def test_left_alone() -> None:
    stream = DataLoader(Stream(), 2)
    own = DataLoader(Numbers(8), 2, sampler=DistributedSampler(Numbers(8), num_replicas=2, rank=0))
    for loader in (stream, own, [1, 2, 3]):
        assert shard_dataloader(loader, num_replicas=2, rank=1) is loader
    shard = shard_dataloader(DataLoader(Numbers(8), 2), num_replicas=2, rank=1)
    assert shard_dataloader(shard, num_replicas=2, rank=1) is shard


def test_set_epoch_reaches_samplers_below() -> None:
    own = DistributedSampler(Numbers(8), num_replicas=2, rank=0)
    loader = DataLoader(Numbers(8), batch_sampler=BatchSampler(own, 2, False))
    set_epoch(loader, 6)
    assert own.epoch == 6
    assert sampler_epoch(loader) == 6
    assert sampler_epoch(DataLoader(Numbers(8), 2)) is None
    set_epoch([1, 2], 3)  # nothing there to tell


def test_workers_share_out_too() -> None:
    loader = DataLoader(Numbers(8), 2, num_workers=1)
    assert shares(loader, 2) == [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]


class Draws(Dataset[Tensor]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> Tensor:
        return torch.rand(())


def test_seed_workers() -> None:
    loader = DataLoader(Draws(), 1, num_workers=1)
    assert seed_workers(loader, 0) is loader, "nobody asked"
    seed_everything(1, workers=True, verbose=False)
    assert seed_workers(DataLoader(Draws(), 1), 0).worker_init_fn is None, "no workers"

    def mine(_: int) -> None: ...

    assert seed_workers(DataLoader(Draws(), 1, num_workers=1, worker_init_fn=mine), 0).worker_init_fn is mine
    values = []
    for rank in (0, 0, 1):
        seed_everything(1, workers=True, verbose=False)
        seeded = seed_workers(loader, rank)
        assert loader.worker_init_fn is None
        values.append(torch.cat(list(seeded)).tolist())
    assert values[0] == values[1] != values[2]


@pytest.mark.parametrize("outside", ["nothing", "uniform", "normal", "two normals"])
@pytest.mark.parametrize("inside", ["nothing", "uniform", "normal", "two normals"])
def test_randomness_of_its_own(outside: str, inside: str) -> None:
    def draw(how: str) -> list[float]:
        if how == "nothing":
            return []
        if how == "uniform":
            return [numpy.random.rand(), random.random(), torch.rand(()).item()]
        return [numpy.random.randn() for _ in range(1 + how.startswith("two"))]  # one is kept for the next call

    def inner() -> Iterator[list[float]]:
        while True:
            yield draw(inside)

    def run(private: bool) -> tuple[list[Any], list[Any]]:
        seed_everything(4, verbose=False)
        mine, theirs, randomness, iterator = [], [], PrivateRandomness(9), inner()
        for _ in range(4):
            if private:
                iterator, found = randomness.take(iterator, 1)
                theirs += found
            mine.append(draw(outside))
        return mine, theirs

    alone, _ = run(False)
    mine, theirs = run(True)
    assert mine == alone
    seed_everything(9, verbose=False)
    assert theirs == [draw(inside) for _ in range(4)]


def test_lengths() -> None:
    assert sized_len(DataLoader(Numbers(5), 2)) == 3
    assert sized_len(DataLoader(Stream(), 2)) is None
    assert sized_len(iter([])) is None
    assert has_len([1])
    assert not has_len(DataLoader(Stream()))
