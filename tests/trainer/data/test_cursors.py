"""Going on in the middle of an epoch: which batches come, with which randomness, and that skipping loads nothing.

Tests of ``treadle_fabric.data.cursors.indexed``, ``treadle_fabric.data.cursors.workers``,
``treadle_fabric.data.cursors.stateful``, ``treadle_fabric.data.cursors.listed``,
``treadle_fabric.data.cursors.replayed``, ``treadle_fabric.data.cursors.combined``,
``treadle_fabric.data.cursors.one_loader``, ``treadle_fabric.data.cursors.orders``,
``treadle_fabric.data.cursors.seeded``, ``treadle_fabric.data.cursors.make``, ``treadle_fabric.randomness.private``,
``treadle.data.lookahead``, ``treadle.data.training``.
"""

from __future__ import annotations

import gc
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.faults.victim import OddBatches, Samples, UnsizedStateful, make_loader
from tests.trainer.models import trainer
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, Sampler

import treadle as L
from treadle_fabric import CheckpointMismatchError
from treadle_fabric.data import Epochs, ShardedSampler

pytestmark = [
    pytest.mark.filterwarnings("ignore:The training loader .* draws from the global random generators"),
    pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined"),
]
SEVERAL = pytest.param(2, marks=pytest.mark.faults)


class Watcher(L.LightningModule):
    """Keeps the batches that it is given, draws random numbers in between, and saves after some of them."""

    def __init__(self, folder: Path, save_after: Any = ()) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.folder, self.save_after = folder, save_after
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append((self.current_epoch, batch_idx, batch))
        random.random()
        return self.layer(torch.rand(1, 1)).sum()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (self.current_epoch, batch_idx) in self.save_after:
            self.trainer.save_checkpoint(self.folder / f"{self.current_epoch}-{batch_idx}.ckpt")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def watch(folder: Path, loader: Any, ckpt_path: Any = None, save_after: Any = (), **kwargs: Any) -> list[Any]:
    L.seed_everything(11, verbose=False)
    model = Watcher(folder, save_after)
    run = trainer(folder, **{"max_epochs": 3, **kwargs})
    run.fit(model, loader() if callable(loader) else loader, ckpt_path=ckpt_path)
    seen = model.seen
    del run, model, loader
    gc.collect()  # ends workers that persist
    return seen


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def assert_goes_on(folder: Path, loader: Callable[[], Any], points: Any = ((0, 1), (1, 3)), **kwargs: Any) -> list[Any]:
    """From each point on, a resumed run gets the batches of the run that went on; returns these."""
    whole = watch(folder, loader, save_after=points, **kwargs)
    order = [(epoch, index) for epoch, index, _ in whole]
    for epoch, index in points:
        rest = watch(folder, loader, folder / f"{epoch}-{index}.ckpt", **kwargs)
        assert same(rest, whole[order.index((epoch, index)) + 1 :]), (epoch, index)
    return whole


class Counted(Dataset[Tensor]):
    """Says how often it was read, in whatever process."""

    def __init__(self, n: int) -> None:
        self.n, self.read = n, multiprocessing.get_context("fork").Value("i", 0)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Tensor:
        with self.read.get_lock():
            self.read.value += 1
        return torch.tensor([float(index)])


@pytest.mark.parametrize("workers", [0, 1, SEVERAL])
@pytest.mark.parametrize("batched", [True, False])
def test_what_is_skipped_is_not_read(tmp_path: Path, workers: int, batched: bool) -> None:
    dataset = Counted(24 if batched else 8)

    def loader() -> DataLoader[Tensor]:
        return DataLoader(dataset, 3 if batched else None, shuffle=True, num_workers=workers)

    whole = watch(tmp_path, loader, save_after=[(0, 5)], max_epochs=1)
    assert dataset.read.value == dataset.n
    dataset.read.value = 0
    rest = watch(tmp_path, loader, tmp_path / "0-5.ckpt", max_epochs=1)
    assert same(rest, whole[6:])
    assert dataset.read.value == (6 if batched else 2)


def combined(mode: Any, n: int, workers: int) -> L.CombinedLoader:
    """One loader of ``n // 3`` batches with others of half and two thirds as many, of different kinds."""
    kinds = ("persistent" if workers else "shuffled", n, workers), ("generator", n // 2, 0), ("weighted", 2 * n // 3, 0)
    return L.CombinedLoader([make_loader(*kind) for kind in kinds], mode)


@pytest.mark.parametrize(
    "mode",
    [
        "min_size",
        pytest.param("max_size", marks=pytest.mark.faults),
        "max_size_cycle",
        pytest.param("sequential", marks=pytest.mark.faults),
    ],
)
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.faults)])
def test_combined_loaders_at_every_position(tmp_path: Path, mode: str, workers: int) -> None:
    length = len(combined(mode, 18, 0))
    points = [*((0, index) for index in range(length)), (1, 0), (1, length - 1)]
    assert_goes_on(tmp_path, lambda: combined(mode, 18, workers), points, max_epochs=2)


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle", "sequential"])
def test_what_combined_loaders_skip_is_not_read(tmp_path: Path, mode: Any) -> None:
    parts = Counted(24), Counted(9)

    def loader() -> L.CombinedLoader:
        return L.CombinedLoader([DataLoader(part, 3, shuffle=True) for part in parts], mode)

    last = len(loader()) - 2
    whole = watch(tmp_path, loader, save_after=[(0, last)], max_epochs=1)
    for part in parts:
        part.read.value = 0
    assert same(watch(tmp_path, loader, tmp_path / f"0-{last}.ckpt", max_epochs=1), whole[-1:])
    assert sum(part.read.value for part in parts) <= 6


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
def test_combined_loaders_shuffle_as_in_a_loop_by_hand(tmp_path: Path, mode: Any) -> None:
    def loader() -> L.CombinedLoader:
        return L.CombinedLoader([DataLoader(Counted(n), 3, shuffle=True) for n in (12, 18)], mode)

    L.seed_everything(11, verbose=False)
    Watcher(tmp_path)
    seen, loaders = [], loader()
    for epoch in range(2):
        for batch, batch_idx, _ in loaders:
            seen.append((epoch, batch_idx, batch))
            torch.rand(1, 1)
    assert same(watch(tmp_path, loader, max_epochs=2), seen)


@pytest.mark.parametrize("several", [True, False])
def test_saved_before_a_batch_is_trained_on(tmp_path: Path, several: bool) -> None:
    class Early(Watcher):
        saves = False

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.saves:
                self.trainer.save_checkpoint(self.folder / f"{batch_idx}.ckpt")

    def fit(save: bool, ckpt_path: Any = None) -> list[Any]:
        L.seed_everything(11, verbose=False)
        model = Early(tmp_path)
        model.saves = save
        loader = {name: DataLoader(Counted(n), 3, shuffle=True) for name, n in (("a", 24), ("b", 9))}
        trainer(tmp_path, max_epochs=1).fit(model, loader if several else loader["a"], ckpt_path=ckpt_path)
        return model.seen

    whole = fit(True)
    for index in range(8):
        assert same(fit(False, tmp_path / f"{index}.ckpt"), whole[index:]), index


def test_combined_with_a_loader_that_does_not_know_its_length(tmp_path: Path) -> None:
    class Endless(Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            while True:
                yield int(torch.randint(9, ()))

    def loader() -> L.CombinedLoader:
        return L.CombinedLoader([make_loader("shuffled", 12, 0), DataLoader(Counted(9), 2, sampler=Endless())])

    assert_goes_on(tmp_path, loader, ((0, 1), (1, 2)))


def test_other_loaders_than_in_the_checkpoint_are_refused(tmp_path: Path) -> None:
    one, two = (lambda: make_loader("shuffled", 9, 0)), (lambda: make_loader("cycle", 9, 0))
    for before, after in ((one, two), (two, one), (two, lambda: [*two().values(), one()])):
        watch(tmp_path, before, save_after=[(0, 1)], max_epochs=1)
        with pytest.raises(CheckpointMismatchError, match="Resume with the loaders that it was saved with"):
            watch(tmp_path, after, tmp_path / "0-1.ckpt", max_epochs=1)


@pytest.mark.alone
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("several", [False, True])
def test_batch_100000_is_reached_within_a_second(tmp_path: Path, workers: int, several: bool) -> None:
    dataset = Counted(200_050)
    loader: Any = DataLoader(dataset, 2, shuffle=True, num_workers=workers)
    if several:
        loader = {"long": loader, "short": DataLoader(Counted(30), 2, shuffle=True)}
    path = tmp_path / "early.ckpt"

    class Early(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            trainer.fit_progress.batch = 100_000  # as if it had come so far
            trainer.save_checkpoint(path)
            trainer.fit_progress.batch = 1

    class Wide(Watcher):
        began = 0.0

        def on_train_epoch_start(self) -> None:
            self.began = time.perf_counter()

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.took = time.perf_counter() - self.began
            self.index = batch_idx

    trainer(tmp_path, max_steps=1, callbacks=Early()).fit(Wide(tmp_path), loader)
    dataset.read.value = 0
    model = Wide(tmp_path)
    trainer(tmp_path, max_steps=2).fit(model, loader, ckpt_path=path)
    assert model.index == 100_000
    assert model.took < 1
    assert dataset.read.value <= 10  # with what a worker fetches ahead


@pytest.mark.parametrize("workers", [0, 1, SEVERAL])
@pytest.mark.parametrize(
    "kind",
    """plain shuffled generator weighted persistent batch_sampler lazy_sampler unbatched sampled stream sized_stream
    persistent_stream cycle""".split(),
)
def test_order_and_augmentation(tmp_path: Path, kind: str, workers: int) -> None:
    kind = kind.replace("_", " ")
    points = ((0, 1), (1, 4)) if workers < 2 else ((1, 2),)
    assert_goes_on(tmp_path, lambda: make_loader(kind, 15, workers), points, max_epochs=2 + (workers == 0))


@pytest.mark.parametrize(
    "kind", ["custom", "list", "stateful", "unsized stateful", "min_size", "max_size", "sequential"]
)
def test_order_of_what_is_no_dataloader(tmp_path: Path, kind: str) -> None:
    assert_goes_on(tmp_path, lambda: make_loader(kind, 15, 0), ((0, 1), (1, 1)))


@pytest.mark.parametrize("kind", ["plain", "stream", "custom", "cycle"])
def test_epochs_differ_where_training_draws_nothing(tmp_path: Path, kind: str) -> None:
    class Deaf(Watcher):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.seen.append(batch)
            return self.layer(torch.ones(1, 1)).sum()

    for workers in (0, 1):
        model = Deaf(tmp_path)
        trainer(tmp_path, max_epochs=2).fit(model, make_loader(kind, 9, workers))
        half = len(model.seen) // 2
        assert not same(model.seen[:half], model.seen[half:])


def test_workers_draw_the_same_however_many_they_are(tmp_path: Path) -> None:
    one, two = (watch(tmp_path, make_loader("shuffled", 12, n), max_epochs=2) for n in (1, 2))
    assert same(one, two)


@pytest.mark.parametrize("persistent", [False, True])
def test_the_end_of_an_epoch_leaves_no_trace(tmp_path: Path, persistent: bool) -> None:
    """A generator draws once more at an epoch's end, and workers that persist are seeded once."""

    def loader() -> DataLoader[Any]:
        generator = None if persistent else torch.Generator().manual_seed(3)
        workers = int(persistent)
        return DataLoader(
            Samples(12), 3, shuffle=True, generator=generator, num_workers=workers, persistent_workers=persistent
        )

    assert_goes_on(tmp_path, loader, ((0, 3), (1, 3)))


@pytest.mark.parametrize("points", [((0, 4), (1, 4)), ((0, 2), (1, 0))])
def test_a_loaders_own_state(tmp_path: Path, points: Any) -> None:
    """At an epoch's end, too, and without having been asked for the batches before."""
    made: list[Asked] = []

    class Asked(UnsizedStateful):
        batches = 0

        def __init__(self) -> None:
            super().__init__(15)
            made.append(self)

        def __len__(self) -> int:
            return 5

        def __iter__(self) -> Iterator[Any]:
            for batch in super().__iter__():
                self.batches += 1
                yield batch

    assert_goes_on(tmp_path, Asked, points)
    for loader, (epoch, index) in zip(made[1:], points):  # one more where it is asked whether anything is left
        assert loader.batches in (rest := 14 - 5 * epoch - index, rest + (index == 4))


def test_generators_of_a_stateful_loader_after_its_last_batch(tmp_path: Path) -> None:

    class Drawing:
        def __init__(self) -> None:
            self.generator, self.position = torch.Generator().manual_seed(3), 0

        def __len__(self) -> int:
            return 4

        def __iter__(self) -> Iterator[Tensor]:
            while self.position < 4:
                self.position += 1
                yield torch.rand(1, generator=self.generator)
            self.position = 0

        def state_dict(self) -> dict[str, int]:
            return {"position": self.position}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.position = state["position"]

    assert_goes_on(tmp_path, Drawing, ((0, 3), (1, 3)))


def test_a_generator_that_sampler_and_dataset_draw_from(tmp_path: Path) -> None:
    class Noisy(Samples):
        def __init__(self, n: int, generator: torch.Generator) -> None:
            super().__init__(n)
            self.generator = generator

        def __getitem__(self, index: int) -> Any:
            return index, torch.rand(1, generator=self.generator)

    def loader() -> Any:
        generator = torch.Generator().manual_seed(3)
        return DataLoader(Noisy(12, generator), 3, shuffle=True, generator=generator)

    assert_goes_on(tmp_path, loader, ((0, 1), (1, 2)))


def test_only_samplers_of_the_users_own_class_draw_apart() -> None:
    """PyTorch's and those that share samples out draw when an epoch begins; others may draw at any time."""

    class Own(Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(12))

        def __len__(self) -> int:
            return 12

    def ends_without_drawing(sampler: Any) -> bool:
        loader = DataLoader(Samples(12), 3, sampler=sampler)
        given: dict[str, Any] = {"rank": 0, "world_size": 1, "num_batches": 4, "exact": True, "whole": True}
        return Epochs(loader, [loader], **given, share_alone=lambda: (loader, [loader])).ends_without_drawing

    usual = torch.utils.data.RandomSampler(range(12))
    assert ends_without_drawing(usual)
    assert ends_without_drawing(ShardedSampler(usual, num_replicas=2, rank=0))
    assert not ends_without_drawing(Own())
    assert not ends_without_drawing(ShardedSampler(Own(), num_replicas=2, rank=0))


def test_a_distributed_sampler_of_the_users(tmp_path: Path) -> None:
    def loader() -> DataLoader[Any]:
        return DataLoader(Samples(30), 3, sampler=DistributedSampler(range(30), num_replicas=2, rank=1))

    whole = assert_goes_on(tmp_path, loader)
    assert len(whole) == 15


@pytest.mark.parametrize("pad", [True, False])
def test_a_sharded_sampler(tmp_path: Path, pad: bool) -> None:
    def loader() -> DataLoader[Any]:
        sampler = ShardedSampler(torch.utils.data.RandomSampler(range(31)), num_replicas=2, rank=1, pad=pad)
        return DataLoader(Samples(31), 3, sampler=sampler)

    assert_goes_on(tmp_path, loader)


def test_a_sharded_batch_sampler(tmp_path: Path) -> None:
    assert_goes_on(
        tmp_path, lambda: DataLoader(Samples(31), batch_sampler=ShardedSampler(OddBatches(31), num_replicas=2, rank=0))
    )


def test_a_sampler_that_knows_the_epoch(tmp_path: Path) -> None:
    class ByEpoch(Sampler[int]):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Iterator[int]:
            return iter([(i + 5 * self.epoch) % 12 for i in range(12)])

        def __len__(self) -> int:
            return 12

    def loader() -> DataLoader[Any]:
        return DataLoader(Counted(12), batch_sampler=BatchSampler(ByEpoch(), 3, drop_last=False))

    whole = assert_goes_on(tmp_path, loader, ((0, 3), (1, 1)))
    assert [int(batch[0]) for _, index, batch in whole if index == 0] == [0, 5, 10]


def test_what_a_worker_init_fn_puts_into_the_dataset_is_there(tmp_path: Path) -> None:
    class Opened(Samples):
        file: Any = None

        def __getitem__(self, index: int) -> Any:
            assert self.file == "open"
            return torch.tensor([index])

    def start(worker_id: int) -> None:
        info = torch.utils.data.get_worker_info()
        assert info is not None
        info.dataset.file = "open"  # type: ignore[attr-defined]
        assert len(info.dataset) == 6  # type: ignore[arg-type]

    assert len(watch(tmp_path, DataLoader(Opened(6), 2, num_workers=1, worker_init_fn=start), max_epochs=1)) == 3


def test_a_changed_limit_of_batches(tmp_path: Path) -> None:
    """An epoch that was cut short is followed by a new one, with a loader's own state as well."""
    for kind in ("shuffled", "stateful"):
        assert_goes_on(tmp_path, lambda kind=kind: make_loader(kind, 15, 0), ((0, 2), (1, 1)), limit_train_batches=3)


@pytest.mark.parametrize("kind", ["generator", "persistent"])
def test_what_workers_fetched_beyond_the_limit(tmp_path: Path, kind: str) -> None:
    """After the last batch within it nothing is loaded any more, but the loader has drawn as if it were."""
    assert_goes_on(tmp_path, lambda: make_loader(kind, 15, 1), ((0, 2), (0, 1)), limit_train_batches=3, max_epochs=2)
