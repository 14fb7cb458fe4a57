"""Hand-written loops that go on where they were killed, to the last bit: the loader's position is in the checkpoint.

Tests of ``treadle_fabric.data.resumable``, ``treadle_fabric.data.epochs``, ``treadle_fabric.data.order``,
``treadle_fabric.data.loader``.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from tests.processes import importing_tests, run_in_ranks
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, Sampler

from treadle_fabric import (
    CheckpointMismatchError,
    Fabric,
    MisconfigurationException,
    ResumableDataLoader,
    seed_everything,
)

pytestmark = pytest.mark.filterwarnings("ignore:The training loader .* draws from the global random generators")
EPOCHS = 3


class Noisy(Dataset[Tensor]):
    """Samples with their number first, and random augmentation."""

    def __init__(self, size: int = 22) -> None:
        self.items = torch.linspace(-1, 1, size * 3).reshape(size, 3)
        self.loaded = 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Tensor:
        self.loaded += 1
        noise = 0.1 * torch.randn(3) * random.random()
        return torch.cat([torch.tensor([float(index)]), self.items[index] + noise])


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        for index in torch.randperm(22).tolist():
            yield torch.cat([torch.tensor([float(index)]), torch.randn(3)])


class ByLot(Sampler[int]):
    """Of the user's own class, and draws while it is iterated."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.size):
            yield random.randrange(self.size)

    def __len__(self) -> int:
        return self.size


class Deck(Sampler[int]):
    """Draws from generators of its own, which go on from epoch to epoch."""

    def __init__(self, size: int) -> None:
        self.size, self.coin = size, random.Random(1)
        self.by_torch = torch.Generator().manual_seed(2)
        self.new, self.old = numpy.random.default_rng(3), numpy.random.RandomState(4)

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self.size // 2, generator=self.by_torch).tolist()
        for _ in range(self.size // 2):
            yield [int(self.coin.random() * self.size), int(self.new.integers(self.size)), self.old.randint(self.size)][
                self.coin.randrange(3)
            ]

    def __len__(self) -> int:
        return self.size


class Lent(Noisy):
    """Draws from the generator that the order of its samples is drawn from, too."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __getitem__(self, index: int) -> Tensor:
        return super().__getitem__(index) + torch.rand((), generator=self.generator)


def lent() -> DataLoader[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return DataLoader(Lent(generator), 4, shuffle=True, generator=generator)


class Stateful:
    """Keeps its position itself."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[Tensor]:
        while self.at < 6:
            self.at += 1
            yield torch.full((4, 4), float(self.at)) + torch.rand(())
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


KINDS: dict[str, Callable[[], Any]] = {
    "in order": lambda: DataLoader(Noisy(), 4),
    "shuffled": lambda: DataLoader(Noisy(), 4, shuffle=True),
    "generator": lambda: DataLoader(Noisy(), 4, shuffle=True, generator=torch.Generator().manual_seed(3)),
    "workers": lambda: DataLoader(Noisy(), 4, shuffle=True, num_workers=2),
    "persistent": lambda: DataLoader(Noisy(), 4, shuffle=True, num_workers=1, persistent_workers=True),
    "batch sampler": lambda: DataLoader(Noisy(), batch_sampler=BatchSampler(RandomSampler(range(22)), 5, True)),
    "own sampler": lambda: DataLoader(Noisy(), 4, sampler=ByLot(22)),
    "sampler's generators": lambda: DataLoader(Noisy(), 4, sampler=Deck(22)),
    "shared generator": lent,
    "stream": lambda: DataLoader(Stream(), 4),
    "stateful": Stateful,
    "list": lambda: [torch.full((4, 4), float(i)) for i in range(6)],
}


class Run:
    """What one life of a program has: the things that ``fabric.setup`` returned, and what it saw."""

    def __init__(self, fabric: Fabric, loader: Any) -> None:
        model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.model, self.optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), 0.01, momentum=0.9))
        self.loader = fabric.setup_dataloaders(loader, resumable=True)
        self.fabric = fabric
        self.state = {"model": self.model, "optimizer": self.optimizer, "loader": self.loader, "steps": 0}
        self.seen: list[Any] = []

    def train(self, after_step: Callable[[int], None] = lambda step: None, epochs: int = EPOCHS) -> None:
        for epoch in range(self.loader.epoch, epochs):
            for batch in self.loader:
                assert self.loader.epoch == epoch
                loss = self.model(batch[:, 1:]).square().mean()
                self.fabric.backward(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.state["steps"] += 1
                self.seen.append([self.state["steps"], epoch, loss.item(), batch.tolist()])
                after_step(self.state["steps"])

    def weights(self) -> list[list[float]]:
        return [p.tolist() for p in self.model.parameters()]


def begin(kind: str, seed: int) -> Run:
    seed_everything(seed, verbose=False)
    return Run(Fabric(accelerator="cpu", devices=1), KINDS[kind]())


@pytest.mark.parametrize("kind", KINDS)
def test_goes_on_in_the_middle_of_an_epoch_to_the_last_bit(kind: str, tmp_path: Path) -> None:
    whole = begin(kind, 1)

    def save(step: int) -> None:
        if step in (8, 9):  # the second one is of the epoch that follows a whole one
            whole.fabric.save(tmp_path / f"{step}.ckpt", whole.state)

    whole.train(save)
    for step in (8, 9):
        again = begin(kind, 2)
        torch.rand(7)
        again.fabric.load(tmp_path / f"{step}.ckpt", again.state)
        assert again.state["steps"] == step
        again.train()
        assert again.seen == whole.seen[step:]
        assert again.weights() == whole.weights()


def test_between_epochs_and_at_the_last_batch_of_one(tmp_path: Path) -> None:
    whole = begin("shuffled", 1)
    steps = len(whole.loader)

    def save(step: int) -> None:
        if step == steps:
            whole.fabric.save(tmp_path / "last batch.ckpt", whole.state)

    whole.train(save)
    between = begin("shuffled", 1)
    between.train(epochs=1)
    between.fabric.save(tmp_path / "between.ckpt", between.state)
    assert (between.loader.epoch, between.loader.position) == (1, 0)

    for name in ("last batch", "between"):
        again = begin("shuffled", 2)
        again.fabric.load(tmp_path / f"{name}.ckpt", again.state)
        again.fabric.save(tmp_path / "unmoved.ckpt", again.state)  # before anything was drawn
        again = begin("shuffled", 3)
        again.fabric.load(tmp_path / "unmoved.ckpt", again.state)
        again.train()
        assert again.seen == whole.seen[steps:]


def test_what_is_loaded_last_counts(tmp_path: Path) -> None:
    whole = begin("shuffled", 1)
    whole.train(lambda step: whole.fabric.save(tmp_path / f"{step}.ckpt", whole.state) if step in (3, 8) else None, 2)
    whole.fabric.save(tmp_path / "12.ckpt", whole.state)
    seen = len(whole.seen)
    whole.train()
    for first, second in [(3, 8), (8, 3), (8, seen)]:
        again = begin("shuffled", 2)
        for step in (first, second):
            again.fabric.load(tmp_path / f"{step}.ckpt", again.state)
        again.train()
        assert again.seen == whole.seen[second:]


def test_an_epoch_that_was_left_before_its_end(tmp_path: Path) -> None:
    def first_two(run: Run) -> list[Any]:
        found = []
        for batch in run.loader:
            found.append(batch.tolist())
            if len(found) == 2:
                break
        return found

    whole = begin("shuffled", 1)
    first_two(whole)
    whole.fabric.save(tmp_path / "unfinished.ckpt", whole.state)
    assert (whole.loader.epoch, whole.loader.position) == (0, 2)
    whole.loader.set_epoch(1)
    whole.fabric.save(tmp_path / "finished.ckpt", whole.state)
    following = first_two(whole)
    assert whole.loader.epoch == 1

    again = begin("shuffled", 2)
    again.fabric.load(tmp_path / "finished.ckpt", again.state)
    assert first_two(again) == following

    again = begin("shuffled", 2)
    again.fabric.load(tmp_path / "unfinished.ckpt", again.state)
    again.loader.set_epoch(again.loader.epoch)  # as loops do that tell the sampler
    assert len(list(again.loader)) == 4
    assert len(list(again.loader)) == 6


def test_skipping_loads_nothing(tmp_path: Path) -> None:
    def make() -> tuple[Noisy, ResumableDataLoader, Fabric]:
        seed_everything(1, verbose=False)
        fabric, data = Fabric(accelerator="cpu", devices=1), Noisy(4000)
        return data, fabric.setup_dataloaders(DataLoader(data, 4, shuffle=True), resumable=True), fabric

    data, loader, fabric = make()
    batches = iter(loader)
    for _ in range(900):
        next(batches)
    fabric.save(tmp_path / "late.ckpt", {"loader": loader})
    expected = next(batches)
    data, loader, fabric = make()
    fabric.load(tmp_path / "late.ckpt", {"loader": loader})
    assert next(iter(loader)).equal(expected)
    assert data.loaded == 4


def test_loaders_in_one_state_put_the_random_state_back_once(tmp_path: Path) -> None:
    """Whether they are iterated together, or one of them only later."""

    def life(seed: int) -> tuple[Fabric, dict[str, Any]]:
        seed_everything(seed, verbose=False)
        fabric = Fabric(accelerator="cpu", devices=1)
        loaders = [DataLoader(Noisy(n), 4, shuffle=True) for n in (22, 14, 8)]
        return fabric, dict(zip("abv", fabric.setup_dataloaders(*loaders, resumable=True)))

    def train(loaders: dict[str, Any], after_step: Callable[[int], None] = lambda step: None) -> list[Any]:
        a, b, v = loaders.values()
        seen: list[Any] = []
        others = iter(b)
        for epoch in range(a.epoch, 3):
            for batch in a:
                if (other := next(others, None)) is None:
                    other = next(others := iter(b))
                seen.append([epoch, batch.tolist(), other.tolist(), torch.rand(()).item()])
                if a.position == 3:
                    seen[-1] += [validated.tolist() for validated in v]
                after_step(epoch * len(a) + a.position)
        return seen

    fabric, state = life(1)
    whole = train(state, lambda step: fabric.save(tmp_path / f"{step}.ckpt", state))
    for step in (2, 4, 6, 11):  # in epochs of both, at the end of one of each, where validation follows
        fabric, state = life(2)
        fabric.load(tmp_path / f"{step}.ckpt", state)
        assert train(state) == whole[step:]


def test_workers_that_persisted_are_given_up(tmp_path: Path) -> None:
    """In the second epoch they drew no seed before the order was drawn."""

    def life(seed: int, workers: dict[str, Any]) -> Run:
        seed_everything(seed, verbose=False)
        return Run(Fabric(accelerator="cpu", devices=1), DataLoader(Noisy(), 4, shuffle=True, **workers))

    whole = life(1, {"num_workers": 1, "persistent_workers": True})
    whole.train(lambda step: whole.fabric.save(tmp_path / "8.ckpt", whole.state) if step == 8 else None, epochs=2)
    there = life(2, {})
    there.fabric.load(tmp_path / "8.ckpt", there.state)
    there.train(lambda step: there.fabric.save(tmp_path / "14.ckpt", there.state) if step == 14 else None)
    assert numbers(there)[:4] == numbers(whole)[8:]
    again = life(3, {})
    again.fabric.load(tmp_path / "14.ckpt", again.state)
    again.train()
    assert numbers(again) == numbers(there)[6:]  # its own epoch


def test_the_rest_of_a_resumed_epoch_is_skipped(tmp_path: Path) -> None:
    def second_epoch(run: Run) -> list[Any]:
        run.loader.set_epoch(1)
        return [batch.tolist() for batch in run.loader]

    for kind in ("shuffled", "generator", "own sampler", "stateful"):
        whole = begin(kind, 1)
        batches = iter(whole.loader)
        next(batches)
        whole.fabric.save(tmp_path / "first.ckpt", whole.state)
        batches.close()  # type: ignore[attr-defined]
        expected = second_epoch(whole)
        again = begin(kind, 2)
        again.fabric.load(tmp_path / "first.ckpt", again.state)
        assert second_epoch(again) == expected


def numbers(run: Run) -> list[list[float]]:
    return [[sample[0] for sample in batch] for *_, batch in run.seen]


def saved_in_mid_epoch(kind: str, path: Path) -> Run:
    run = begin(kind, 1)
    run.train(lambda step: run.fabric.save(path, run.state) if step == 8 else None)
    return run


@pytest.mark.parametrize("kind", ["shuffled", "generator", "own sampler", "sampler's generators"])
@pytest.mark.parametrize("batch_size", [2, 6])
def test_another_batch_size_goes_on_at_the_next_sample(kind: str, batch_size: int, tmp_path: Path) -> None:
    whole = saved_in_mid_epoch(kind, tmp_path / "8.ckpt")
    steps = len(whole.loader)
    rest = [number for batch in numbers(whole)[8 : 2 * steps] for number in batch]
    again = begin(kind, 2)
    inside = again.loader.dataloader
    other = DataLoader(inside.dataset, batch_size, sampler=inside.sampler, generator=inside.generator)
    again = Run(again.fabric, other)
    with pytest.warns(
        UserWarning, match=f"have {batch_size} samples a batch, and had 4: the epoch goes on at sample 8"
    ):
        again.fabric.load(tmp_path / "8.ckpt", again.state)
    again.train()
    epochs = [step[1] for step in again.seen]
    found = numbers(again)[: epochs.count(1)]
    assert [number for batch in found for number in batch] == rest
    assert [len(batch) for batch in found[:-1]] == [batch_size] * (len(found) - 1)
    assert epochs.count(2) == -(-22 // batch_size)


OTHERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "samples: 22, here 30": ("shuffled", lambda: DataLoader(Noisy(30), 4, shuffle=True)),
    "sampler: RandomSampler, here SequentialSampler": ("shuffled", lambda: DataLoader(Noisy(), 4)),
    "generators: 1, here 0": ("generator", lambda: DataLoader(Noisy(), 4, shuffle=True)),
    "kind: indexed, here iterated": ("shuffled", lambda: DataLoader(Stream(), 4)),
    "kind: one with a state_dict, here indexed": ("stateful", lambda: DataLoader(Noisy(), 4)),
    "batch_size: 4, here 5": ("stream", lambda: DataLoader(Stream(), 5)),
}


@pytest.mark.parametrize("differs", OTHERS)
def test_a_position_in_another_loader_is_refused(differs: str, tmp_path: Path) -> None:
    kind, other = OTHERS[differs]
    saved_in_mid_epoch(kind, tmp_path / "8.ckpt")
    fabric = Fabric(accelerator="cpu", devices=1)
    state = {"loader": fabric.setup_dataloaders(other(), resumable=True)}
    with pytest.raises(
        CheckpointMismatchError, match=f"'loader' of .* in epoch 1 of another .*{differs}.* Set the loader"
    ):
        fabric.load(tmp_path / "8.ckpt", state)


def test_another_dataset_may_follow_between_epochs(tmp_path: Path) -> None:
    run = begin("shuffled", 1)
    run.train(epochs=1)
    run.fabric.save(tmp_path / "between.ckpt", run.state)
    again = Run(run.fabric, DataLoader(Noisy(30), 4, shuffle=True))
    again.fabric.load(tmp_path / "between.ckpt", again.state)
    again.train()
    assert len(again.seen) == 2 * 8


def test_what_no_resumable_loader_saved_is_refused(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.save(tmp_path / "inner.ckpt", {"loader": fabric.setup_dataloaders(Stateful())})
    state = {"loader": fabric.setup_dataloaders(Stateful(), resumable=True)}
    with pytest.raises(CheckpointMismatchError, match="has 'at' in it, and must be what a resumable loader saved"):
        fabric.load(tmp_path / "inner.ckpt", state)


def test_one_iteration_at_a_time(tmp_path: Path) -> None:
    run = begin("shuffled", 1)
    run.fabric.save(tmp_path / "begin.ckpt", run.state)
    with pytest.raises(MisconfigurationException, match="goes on after epoch 1 was begun by another one"):
        list(zip(run.loader, run.loader))
    batches = iter(run.loader)
    next(batches)
    run.fabric.load(tmp_path / "begin.ckpt", run.state)
    with pytest.raises(MisconfigurationException, match="goes on after epoch 0 was .* loaded"):
        next(batches)
    for _ in run.loader:
        if run.loader.position == 6:
            run.loader.set_epoch(5)  # as good as after the loop
    assert (run.loader.epoch, run.loader.position) == (5, 0)


def test_a_loader_without_a_position_is_left_out_with_a_word(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    loader = fabric.setup_dataloaders(DataLoader(Noisy(), 4))
    with pytest.warns(UserWarning, match="resumable=True"):
        fabric.save(tmp_path / "state.ckpt", {"loader": loader, "epoch": 3})
    assert fabric.load(tmp_path / "state.ckpt") == {"epoch": 3}


# ------------------------------------------------------------------------------------------------ several processes


def goes_on_with_shares_of_its_own(fabric: Fabric, path: Path) -> bool:
    """Whether that holds for data that the user shares out, of which ranks have unequally many."""

    def life(seed: int) -> ResumableDataLoader:
        torch.manual_seed(seed)
        mine = DataLoader(Noisy(8 + 4 * fabric.global_rank), 2, shuffle=True)
        return fabric.setup_dataloaders(mine, use_distributed_sampler=False, resumable=True)

    loader = life(1)
    batches = iter(loader)
    next(batches)
    fabric.save(path, {"loader": loader})
    expected = [batch.tolist() for batch in batches]
    loader = life(2)
    fabric.load(path, {"loader": loader})
    return [batch.tolist() for batch in loader] == expected


def main(folder: str, devices: int, batch_size: int, save_every: int, kill_at: int) -> None:
    """A program that is killed, and goes on when it is started again."""
    fabric = Fabric(accelerator="cpu", devices=devices)
    fabric.launch()
    if not kill_at:
        assert goes_on_with_shares_of_its_own(fabric, Path(folder) / "shares.ckpt")
    path = Path(folder) / "last.ckpt"
    resumes = path.exists()
    seed_everything(5 if not resumes else 6, verbose=False)
    torch.manual_seed(torch.initial_seed() + fabric.global_rank)
    if resumes:
        os.environ["PL_GLOBAL_SEED"] = "8"  # the order goes on all the same
    run = Run(fabric, DataLoader(Noisy(30), batch_size, shuffle=True))
    if resumes:
        fabric.load(path, run.state)

    def after_step(step: int) -> None:
        with open(Path(folder) / f"seen_{devices}_{fabric.global_rank}", "a") as file:
            file.write(json.dumps(run.seen.pop()) + "\n")
        if step % save_every == 0:
            fabric.save(path, run.state)
        if step == kill_at and fabric.global_rank == devices - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    run.train(after_step)
    fabric.save(Path(folder) / "end.ckpt", {"model": run.model})


def live(folder: Path, devices: int, batch_size: int, save_every: int, kill_at: int = 0) -> list[list[Any]]:
    """Run the program once more; what each rank saw, also in earlier lives with as many."""
    folder.mkdir(exist_ok=True)
    if kill_at:
        arguments = [str(a) for a in (folder, devices, batch_size, save_every, kill_at)]
        done = subprocess.run(
            [sys.executable, __file__, *arguments],
            env=importing_tests(),
            timeout=90,
            capture_output=True,
            text=True,
        )
        assert done.returncode == -signal.SIGKILL or "SIGKILL" in done.stderr, done.stderr
    else:
        run_in_ranks(main, str(folder), devices, batch_size, save_every, 0, devices=devices)
    return seen_by(folder, devices)


def seen_by(folder: Path, devices: int) -> list[list[Any]]:
    lines = [(folder / f"seen_{devices}_{rank}").read_text().splitlines() for rank in range(devices)]
    return [[json.loads(line) for line in rank] for rank in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    live(folder, 2, 3, 100)
    return folder


def test_two_ranks_of_which_one_is_killed(whole: Path, tmp_path: Path) -> None:
    live(tmp_path / "killed", 2, 3, 4, kill_at=7)
    for seen, expected in zip(live(tmp_path / "killed", 2, 3, 4), seen_by(whole, 2)):
        assert len(expected) == 15
        assert seen[-11:] == expected[4:]
    folders = whole, tmp_path / "killed"
    ends = [torch.load(folder / "end.ckpt", weights_only=True)["model"] for folder in folders]
    assert all(ends[0][name].equal(ends[1][name]) for name in ends[0])


@pytest.mark.faults  # takes long
def test_another_number_of_ranks_goes_on_in_the_same_order(whole: Path, tmp_path: Path) -> None:
    def batches(ranks: list[list[Any]], steps: range) -> list[set[float]]:
        found: dict[int, set[float]] = {step: set() for step in steps}
        for rank in ranks:
            for step, _, _, batch in rank:
                if step in found:
                    found[step] |= {sample[0] for sample in batch}
        return list(found.values())

    two = seen_by(whole, 2)
    live(tmp_path / "elastic", 2, 3, 2, kill_at=2)
    one = live(tmp_path / "elastic", 1, 6, 2, kill_at=8)
    three = live(tmp_path / "elastic", 3, 2, 2)
    assert batches(one, range(3, 9)) == batches(two, range(3, 9))
    assert batches(three, range(9, 16)) == batches(two, range(9, 16))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
