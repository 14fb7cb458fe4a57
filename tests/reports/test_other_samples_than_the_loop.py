"""A stream that draws from the global generators, or reads the model's weights, gives the samples of the plain loop.

Adding Treadle changes no number: losses and weights are those of the loop by hand, to the last bit. A run that was
resumed goes on with the numbers of the run that was not, or says what would make it so.

Tests of ``treadle_fabric.data.streams``, ``treadle_fabric.data.cursors.replayed``, ``treadle.data.training``,
``treadle.data.lookahead``, ``treadle.loops.epoch``.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from tests.trainer.models import loader, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import treadle as L
from treadle.callbacks import EarlyStopping, ModelCheckpoint
from treadle_fabric import Fabric, MisconfigurationException, PrivateStream
from treadle_fabric.data import CombinedLoader, Epochs
from treadle_fabric.randomness import PrivateRandomness

BATCHES, EPOCHS = 5, 2
DRAWS = "ignore:The training loader .* draws from the global random generators"


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))


def draw() -> Tensor:
    """A number of each library's global generator."""
    return torch.tensor([float(torch.rand(())), float(numpy.random.rand()), random.random()])


class Drawing:
    """Draws each batch when it is asked for the batch."""

    def __init__(self, model: nn.Module) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.at = 0
        return self

    def __next__(self) -> Tensor:
        if self.at == BATCHES:
            raise StopIteration
        self.at += 1
        return torch.stack([draw(), draw()])


class Sized(Drawing):
    """Has a length, which is not right."""

    def __len__(self) -> int:
        return BATCHES - 2


class Acting(Drawing):
    """Makes its batches with the model, as reinforcement learning does."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __next__(self) -> Tensor:
        batch = super().__next__()
        with torch.no_grad():
            return batch + self.model[0].weight.sum()


class Windows(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(2 * BATCHES):
            yield draw()


class OwnLoader(DataLoader[Tensor]):
    """Changes the batches of indexed samples in this process."""

    def __iter__(self) -> Any:
        for (batch,) in super().__iter__():
            yield batch[:, :3] + draw()


class Walk:
    """Keeps what it drew: the next batch depends on all that were drawn before."""

    def __init__(self, model: nn.Module) -> None:
        pass

    def __iter__(self) -> Iterator[Tensor]:
        at = torch.zeros(2, 3)
        for _ in range(BATCHES):
            at = at + draw()
            yield at


def samples() -> list[tuple[Tensor]]:
    return [(torch.full((4,), i / 10),) for i in range(2 * BATCHES)]


def summed(model: nn.Module) -> Any:
    """Two loaders side by side."""
    return CombinedLoader([Drawing(model), DataLoader(samples(), 2, shuffle=True)], "min_size")


STREAMS: dict[str, Callable[[nn.Module], Iterable[Any]]] = {
    "iterable": Drawing,
    "with a wrong length": Sized,
    "reads the weights": Acting,
    "keeps what it drew": Walk,
    "DataLoader of a stream": lambda model: DataLoader(Windows(), 2),
    "DataLoader with an __iter__ of its own": lambda model: OwnLoader(samples(), 2, shuffle=True),
    "combined": summed,
}


def part(batch: Any) -> Tensor:
    """The tensor to train on."""
    if isinstance(batch, tuple):  # of a CombinedLoader iterated by hand
        batch = batch[0]
    return batch[0] + batch[1][0][:, :3] if isinstance(batch, list) else batch


Seen = list[list[float]]


def by_hand(stream: Callable[[nn.Module], Iterable[Any]], epochs: int = EPOCHS) -> Seen:
    torch.manual_seed(0)
    model = net()
    optimizer, batches, seen = torch.optim.SGD(model.parameters(), 0.1), stream(model), []
    seed(5)
    for _ in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            loss = model(part(batch)).square().mean()
            loss.backward()
            optimizer.step()
            seen.append([loss.item(), *part(batch).flatten().tolist()])
    return seen


def seed(number: int) -> None:
    torch.manual_seed(number)
    numpy.random.seed(number)
    random.seed(number)


def by_fabric(stream: Callable[[nn.Module], Iterable[Any]], resumable: bool) -> Seen:
    torch.manual_seed(0)
    inner = net()
    fabric, seen = Fabric(accelerator="cpu", devices=1), []
    model, optimizer = fabric.setup(inner, torch.optim.SGD(inner.parameters(), 0.1))
    batches = fabric.setup_dataloaders(stream(inner), resumable=resumable)
    seed(5)
    for _ in range(EPOCHS):
        for batch in batches:
            optimizer.zero_grad()
            loss = model(part(batch)).square().mean()
            fabric.backward(loss)
            optimizer.step()
            seen.append([loss.item(), *part(batch).flatten().tolist()])
    return seen


class Module(L.LightningModule):
    """Trains as the loop by hand does, and saves where it is told to."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.folder = net(), folder
        self.seen: Seen = []
        self.told: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.net(part(batch)).square().mean()
        self.seen.append([loss.item(), *part(batch).flatten().tolist()])
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.net(batch[:, :3]).sum() + torch.rand(()))

    def save(self, name: str) -> None:
        if self.folder is not None and not self.trainer.sanity_checking:
            self.trainer.save_checkpoint(self.folder / f"{name}{len(self.seen)}.ckpt")

    def on_train_start(self) -> None:
        if self.trainer.ckpt_path is None:
            seed(5)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Saving(Module):
    """Saves at every place where something may be saved."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.save("before")

    def on_train_batch_end(self, *args: Any) -> None:
        self.save("after")

    def on_validation_end(self) -> None:
        self.save("validated")

    def on_train_epoch_end(self) -> None:
        self.save("epoch")


def fit(
    folder: Path,
    stream: Callable[[nn.Module], Iterable[Any]],
    module: Module | None = None,
    val: Any = None,
    **kwargs: Any,
) -> Module:
    module = Module() if module is None else module
    ckpt_path = kwargs.pop("ckpt_path", None)
    run = trainer(folder, **{"max_epochs": EPOCHS, "num_sanity_val_steps": 0, **kwargs})
    run.fit(module, stream(module.net), val, ckpt_path=ckpt_path)
    return module


@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
@pytest.mark.parametrize("kind", STREAMS)
def test_to_the_last_bit(kind: str, tmp_path: Path) -> None:
    expected = by_hand(STREAMS[kind])
    assert len(expected) == EPOCHS * BATCHES
    assert fit(tmp_path, STREAMS[kind]).seen == expected
    assert by_fabric(STREAMS[kind], resumable=False) == expected
    if kind != "combined":
        assert by_fabric(STREAMS[kind], resumable=True) == expected


def test_a_step_that_draws_its_batches_itself(tmp_path: Path) -> None:
    class Own(Module):
        def training_step(self, dataloader_iter: Iterator[Any]) -> Tensor:
            return super().training_step(next(dataloader_iter)[0], 0)

    assert fit(tmp_path, Acting, Own()).seen == by_hand(Acting)


def test_a_generator_that_goes_on_from_epoch_to_epoch(tmp_path: Path) -> None:
    def endless(model: nn.Module) -> Iterator[Tensor]:
        while True:
            yield draw().repeat(2, 1) + model[0].weight.sum().detach()

    def limited(model: nn.Module) -> Any:
        stream = endless(model)
        return (next(stream) for _ in range(EPOCHS * BATCHES))

    assert fit(tmp_path, endless, limit_train_batches=BATCHES).seen == by_hand(limited, epochs=1)


@pytest.mark.parametrize("kind", ["iterable", "reads the weights", "DataLoader of a stream"])
def test_within_an_accumulation_one_batch_is_asked_for_ahead(kind: str, tmp_path: Path) -> None:
    """The samples are those of the loop all the same: weights change between accumulations only."""

    class Plain(Module):
        def on_train_start(self) -> None:
            super().on_train_start()
            self.net.eval()  # whose dropout would draw in between

    torch.manual_seed(0)
    model = net().eval()
    optimizer, batches, expected = torch.optim.SGD(model.parameters(), 0.1), STREAMS[kind](model), []
    seed(5)
    for _ in range(EPOCHS):
        for number, batch in enumerate(batches, 1):
            loss = model(batch).square().mean()
            expected.append([loss.item(), *batch.flatten().tolist()])
            (loss if number == BATCHES else loss / 2).backward()
            if number % 2 == 0 or number == BATCHES:
                optimizer.step()
                optimizer.zero_grad()
    assert fit(tmp_path, STREAMS[kind], Plain(), accumulate_grad_batches=2).seen == expected


def by_stream_alone(stream: Callable[[nn.Module], Iterable[Any]]) -> Seen:
    batches = stream(net())
    seed(5)
    return [[0.0, *batch.flatten().tolist()] for batch in batches]


# ------------------------------------------------------------------------------------- resumed


@pytest.mark.filterwarnings(DRAWS, "ignore:Length of IterableDataset", "ignore:.* nothing is left to do")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "kind", ["iterable", "with a wrong length", "reads the weights", "DataLoader of a stream", "combined"]
)
def test_resumed_at_every_place(kind: str, accumulate: int, tmp_path: Path) -> None:
    val = loader(4)
    settings = {"accumulate_grad_batches": accumulate, "val": val}
    whole = fit(tmp_path, STREAMS[kind], Saving(tmp_path), **settings)
    saved = sorted(tmp_path.glob("*.ckpt"))
    assert len(saved) == EPOCHS * (2 * BATCHES + 2)
    for path in saved:
        done = int("".join(filter(str.isdigit, path.stem)))
        assert fit(tmp_path, STREAMS[kind], ckpt_path=path, **settings).seen == whole.seen[done:], path.stem


@pytest.mark.parametrize("combined", [False, True])
def test_a_stream_that_keeps_what_it_drew_is_exact_with_states_of_its_own(combined: bool, tmp_path: Path) -> None:
    def private(model: nn.Module) -> Any:
        stream = PrivateStream(Walk(model))
        return CombinedLoader([stream, DataLoader(samples(), 2, shuffle=True)], "min_size") if combined else stream

    whole = fit(tmp_path, private, Saving(tmp_path))
    for path in tmp_path.glob("after*.ckpt"):
        done = int(path.stem.removeprefix("after"))
        assert fit(tmp_path, private, ckpt_path=path).seen == whole.seen[done:], path.stem


def test_what_needs_no_states_of_its_own_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="does not draw its batches in this process"):
        PrivateStream(DataLoader(samples(), 2))
    with pytest.raises(TypeError, match="has no length"):
        len(PrivateStream(Walk(net())))
    assert len(PrivateStream(Sized(net()))) == BATCHES - 2


def words(run: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if "draws from the global random generators" in str(w.message)]


class Late:
    """Draws for its tenth batch only."""

    def __init__(self, model: nn.Module) -> None:
        pass

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(14)  # when the epoch begins
        for i in range(14):
            if i == 10:
                draw()
            yield order[i].float().repeat(2, 3)


def test_a_stream_that_draws_is_told_at_the_first_save(tmp_path: Path) -> None:
    class Some(Module):
        at: tuple[int, ...] = ()

        def on_train_batch_end(self, *args: Any) -> None:
            if len(self.seen) in self.at:
                self.save("after")

    def told(stream: Callable[[nn.Module], Iterable[Any]], *at: int, **kwargs: Any) -> list[str]:
        module = Some(tmp_path)
        module.at = at
        return words(lambda: fit(tmp_path, stream, module, **kwargs))

    (message,) = told(Drawing, 3, 4, 8)
    for remedy in ("num_workers=1", "generators of the loader's own", "treadle_fabric.PrivateStream(loader)"):
        assert remedy in message
    assert not told(Drawing), "nothing is saved"
    assert not told(lambda model: PrivateStream(Drawing(model)), 3, 8)
    assert not told(Late, 3, 7, max_epochs=1), "so far it drew only when the epoch began"
    assert not told(Late, 3, 7, max_epochs=1, accumulate_grad_batches=2)
    assert told(Late, 10, 12, max_epochs=1), "batches after a save are watched"
    assert not told(Late, 12, max_epochs=1), "no batch between the eighth and the sixteenth is, without a save"
    assert words(lambda: fit(tmp_path, Late, ckpt_path=tmp_path / "after12.ckpt")), "but a resumed run draws it again"
    assert not words(lambda: fit(tmp_path, Late, ckpt_path=tmp_path / "after7.ckpt"))


def test_a_hand_written_loop_is_told_as_well(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)

    def run(stream: Any) -> None:
        batches = fabric.setup_dataloaders(stream, resumable=True)
        for number, _ in enumerate(batches):
            if number in (2, 3):
                fabric.save(tmp_path / "it.ckpt", {"batches": batches})

    (message,) = words(lambda: run(Walk(net())))
    assert "The training loader (Walk)" in message
    assert not words(lambda: run(PrivateStream(Walk(net()))))


def test_an_epoch_of_an_older_checkpoint_goes_on_as_it_began() -> None:
    """Streams had private random states before; the epochs after that one share the global generators."""

    def epochs() -> Epochs:
        stream = Drawing(net())
        given: dict[str, Any] = {"rank": 0, "world_size": 1, "num_batches": math.inf, "exact": False, "whole": True}
        return Epochs(stream, [stream], **given, share_alone=lambda: (stream, [stream]))

    ours = epochs()
    next(ours.iterate(0))
    state = ours.state_dict(2)
    del state["shares"], state["before"]
    (expected,) = PrivateRandomness(state["key"]).chunks(Drawing(net()), 100)
    other = epochs()
    other.resume(state, 1, 2, begun=True, ended=False)
    assert torch.equal(torch.stack(list(other.iterate(0, 2))), torch.stack(expected[2:]))
    seed(5)
    second = list(other.iterate(1))
    assert [batch.flatten().tolist() for batch in second] == [row[1:] for row in by_stream_alone(Drawing)]


# ------------------------------------------------------------------------------------- an end that nobody knew


class Telling(Module):
    """Writes down the order of things at an epoch's end."""

    def on_train_batch_end(self, *args: Any) -> None:
        self.told.append(["batch", self.trainer.is_last_batch])

    def on_validation_start(self) -> None:
        self.told.append(["validation", self.trainer.is_last_batch, self.optimizers().param_groups[0]["lr"]])

    def on_train_epoch_end(self) -> None:
        self.told.append(["epoch", self.trainer.global_step, float(self.trainer.callback_metrics["val"]) > -99])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.125)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


@pytest.mark.parametrize("limits", [{"max_epochs": 2}, {"max_steps": 2 * BATCHES, "max_epochs": -1}])
def test_validation_and_schedulers_follow_the_last_batch(limits: dict[str, int], tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, monitor="val", save_top_k=-1)
    found = fit(tmp_path, Drawing, Telling(), loader(4), callbacks=saving, enable_checkpointing=True, **limits).told
    batches: list[Any] = [["batch", False]] * BATCHES
    first, second = ["validation", True, 0.0625], ["validation", True, 0.03125]
    assert found == [*batches, first, ["epoch", BATCHES, True], *batches, second, ["epoch", 2 * BATCHES, True]]
    assert len(saving.best_k_models) == 2


def test_early_stopping_ends_after_an_epoch_of_a_stream(tmp_path: Path) -> None:
    stopping = EarlyStopping("val", patience=0, mode="min", stopping_threshold=1e9)
    module = fit(tmp_path, Drawing, Telling(), loader(4), callbacks=stopping, max_epochs=5)
    assert len(module.seen) == BATCHES
    assert [entry[0] for entry in module.told].count("validation") == 1


def test_validation_by_batches_is_not_repeated_at_the_end(tmp_path: Path) -> None:
    found = fit(tmp_path, Drawing, Telling(), loader(4), max_epochs=1, val_check_interval=BATCHES).told
    assert [entry[0] for entry in found] == [*["batch"] * BATCHES, "validation", "epoch"]
