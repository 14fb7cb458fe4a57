"""Tests of ``treadle_fabric.data.combined``."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from treadle_fabric.data.combined import CombinedLoader
from treadle_fabric.errors import CheckpointMismatchError, MisconfigurationException

SIDE_BY_SIDE = ["min_size", "max_size", "max_size_cycle"]
ALL = [*SIDE_BY_SIDE, "sequential"]


class Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        i = 0
        while True:
            yield i
            i += 1


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("min_size", [([0, 0], 0, 0), ([1, 1], 1, 0)]),
        ("max_size", [([0, 0], 0, 0), ([1, 1], 1, 0), ([None, 2], 2, 0)]),
        ("max_size_cycle", [([0, 0], 0, 0), ([1, 1], 1, 0), ([0, 2], 2, 0)]),
        ("sequential", [(0, 0, 0), (1, 1, 0), (0, 0, 1), (1, 1, 1), (2, 2, 1)]),
    ],
)
def test_modes(mode: Any, expected: list[Any]) -> None:
    combined = CombinedLoader([range(2), range(3)], mode)
    assert list(combined) == expected
    assert list(combined) == expected, "a second pass starts afresh"
    assert len(combined) == len(expected)


def test_cycle_repeats_as_often_as_needed() -> None:
    combined = CombinedLoader([range(2), range(5), range(1)], "max_size_cycle")
    assert [batch for batch, _, _ in combined] == [[0, 0, 0], [1, 1, 0], [0, 2, 0], [1, 3, 0], [0, 4, 0]]


def test_cycle_starts_nothing_again_when_all_end_together() -> None:
    class Counted:
        starts = 0

        def __iter__(self) -> Iterator[int]:
            self.starts += 1
            return iter(range(3))

    loaders = [Counted(), Counted()]
    assert len(list(CombinedLoader(loaders, "max_size_cycle"))) == 3
    assert [loader.starts for loader in loaders] == [1, 1]


@pytest.mark.parametrize("mode", SIDE_BY_SIDE)
def test_batches_have_the_structure_of_the_loaders(mode: Any) -> None:
    Pair = namedtuple("Pair", "left right")
    loaders = {"a": range(2), "b": [range(2, 4), (range(4, 6),)], "c": Pair(range(6, 8), range(8, 10))}
    combined = CombinedLoader(loaders, mode)
    batch, _, _ = next(iter(combined))
    assert batch == {"a": 0, "b": [2, (4,)], "c": Pair(6, 8)}
    assert isinstance(batch["c"], Pair)
    assert combined.flattened == [range(2), range(2, 4), range(4, 6), range(6, 8), range(8, 10)]


def test_one_loader_gives_its_own_batches() -> None:
    loader: DataLoader[Any] = DataLoader(range(5), batch_size=2)  # type: ignore[arg-type]
    assert [batch.tolist() for batch, _, _ in CombinedLoader(loader)] == [[0, 1], [2, 3], [4]]


def test_a_list_of_numbers_is_a_loader() -> None:
    assert [batch for batch, _, _ in CombinedLoader([[5, 6], [7, 8]])] == [[5, 7], [6, 8]]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("min_size", []),
        ("max_size", [[0, None], [1, None]]),
        ("max_size_cycle", [[0, None], [1, None]]),
        ("sequential", [0, 1]),
    ],
)
def test_an_empty_loader(mode: Any, expected: list[Any]) -> None:
    combined = CombinedLoader([range(2), []], mode)
    assert [batch for batch, _, _ in combined] == expected
    assert len(combined) == len(expected)


@pytest.mark.parametrize("mode", ALL)
@pytest.mark.parametrize("loaders", [[], {}, [[], []]])
def test_nothing_at_all(mode: Any, loaders: Any) -> None:
    assert list(CombinedLoader(loaders, mode)) == []
    assert len(CombinedLoader(loaders, mode)) == 0


@pytest.mark.parametrize(
    ("mode", "length"), [("min_size", 1), ("max_size", 2), ("max_size_cycle", 2), ("sequential", 3)]
)
def test_limits(mode: Any, length: int) -> None:
    combined = CombinedLoader([range(5), range(5)], mode)
    combined.limits = [2, 1]
    assert len(combined) == length
    assert len(list(combined)) == length
    combined.limits = 4
    assert combined.limits == [4, 4]
    combined.limits = None
    assert len(list(combined)) == (10 if mode == "sequential" else 5)


def test_sequential_limits_apply_to_each_loader() -> None:
    combined = CombinedLoader({"a": range(3), "b": range(3)}, "sequential")
    combined.limits = [1, float("inf")]
    assert list(combined) == [(0, 0, 0), (0, 0, 1), (1, 1, 1), (2, 2, 1)]


def test_a_limit_of_zero_does_not_start_the_loader() -> None:
    class Untouchable:
        def __iter__(self) -> Iterator[int]:
            raise AssertionError

    combined = CombinedLoader([Untouchable(), range(2)], "sequential")
    combined.limits = [0, 1]
    assert list(combined) == [(0, 0, 1)]


@pytest.mark.parametrize("limits", [[1], [1, 2, 3], [1.5, 1], -1])
def test_wrong_limits(limits: Any) -> None:
    with pytest.raises(MisconfigurationException, match="limit"):
        CombinedLoader([range(2), range(2)]).limits = limits


def test_wrong_mode() -> None:
    with pytest.raises(MisconfigurationException, match="'max_size_cycle'"):
        CombinedLoader([], "longest")  # type: ignore[arg-type]


def test_length_with_an_endless_loader() -> None:
    loaders = [DataLoader(Endless()), range(3)]
    assert len(CombinedLoader(loaders, "min_size")) == 3
    with pytest.raises(TypeError, match="DataLoader has no length"):
        len(CombinedLoader(loaders, "max_size_cycle"))
    limited = CombinedLoader(loaders, "sequential")
    limited.limits = 4
    assert len(limited) == len(list(limited)) == 7


def test_samplers_and_replacement() -> None:
    first: DataLoader[Any] = DataLoader(range(4), batch_size=2)  # type: ignore[arg-type]
    combined = CombinedLoader({"a": first, "b": [range(3)]}, "max_size")
    assert combined.sampler == {"a": first.sampler, "b": [None]}
    assert combined.batch_sampler == {"a": first.batch_sampler, "b": [None]}
    combined.flattened = [range(1), range(2)]
    assert combined.iterables == {"a": range(1), "b": [range(2)]}
    assert list(combined) == [({"a": 0, "b": [0]}, 0, 0), ({"a": None, "b": [1]}, 1, 0)]
    with pytest.raises(MisconfigurationException, match="3 loaders"):
        combined.flattened = [range(1)] * 3


@pytest.mark.timeout(60)
def test_reset_ends_the_pass_and_frees_persistent_workers() -> None:
    loader: DataLoader[Any] = DataLoader(torch.arange(4.0), num_workers=1, persistent_workers=True)  # type: ignore[arg-type]
    combined = CombinedLoader([loader])
    running = iter(combined)
    next(running)
    worker = loader._iterator._workers[0]  # type: ignore[union-attr]
    assert worker.is_alive()
    combined.reset()
    assert next(running, "ended") == "ended"
    del running
    worker.join(10)
    assert not worker.is_alive()
    assert len(list(combined)) == 4
    combined.reset()


class Stateful:
    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[int]:
        while self.position < 4:
            self.position += 1
            yield self.position

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def test_state_reaches_the_loaders_that_keep_one() -> None:
    before = CombinedLoader({"a": Stateful(), "b": range(9)}, "min_size")
    running = iter(before)
    seen = [next(running)[0]["a"], next(running)[0]["a"]]
    after = CombinedLoader({"a": Stateful(), "b": range(9)}, "min_size")
    after.load_state_dict(before.state_dict())
    assert seen + [batch["a"] for batch, _, _ in after] == [1, 2, 3, 4]
    with pytest.raises(CheckpointMismatchError, match="2 loaders"):
        CombinedLoader([range(2)]).load_state_dict(before.state_dict())
