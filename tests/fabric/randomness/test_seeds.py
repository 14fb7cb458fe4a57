"""Seeds and random state of Python, NumPy and PyTorch.

Tests of ``treadle_fabric.randomness.seeds``, ``treadle_fabric.randomness.state``,
``treadle_fabric.randomness.generators``.
"""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.random_devices import Devices
from torch.utils.data import DataLoader, Dataset

from treadle_fabric.checkpoint import TorchCheckpointIO
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.randomness.seeds import global_seed, reset_seed, seed_everything, worker_init_function
from treadle_fabric.randomness.state import (
    as_own_rng_states,
    collect_rng_states,
    isolate_rng,
    own_rng_states,
    rng_states_of,
    same_rng_states,
    set_rng_states,
)

Draw = tuple[float, float, float]


@pytest.fixture(autouse=True)
def numpy_and_seed_variables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.delenv("PL_SEED_WORKERS", raising=False)
    state = np.random.get_state()
    yield
    np.random.set_state(state)


def draw() -> Draw:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


class Noise(Dataset[list[float]]):
    """What the generators of a worker give, which shows how they were seeded."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> list[float]:
        return list(draw())


def test_one_seed_sets_all_three_generators() -> None:
    assert seed_everything(5, verbose=False) == 5
    first, second = draw(), draw()
    assert first != second
    seed_everything(5, verbose=False)
    assert draw() == first
    seed_everything(6, verbose=False)
    assert all(a != b for a, b in zip(draw(), first))


def test_the_generators_start_as_a_plain_seed_starts_them() -> None:
    seed_everything(7, verbose=False)
    got = draw()
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    assert got == draw()


def test_launched_processes_find_the_seed_in_the_environment() -> None:
    seed_everything(8, workers=True, verbose=False)
    assert (os.environ["PL_GLOBAL_SEED"], os.environ["PL_SEED_WORKERS"]) == ("8", "1")
    assert seed_everything(verbose=False) == 8
    assert os.environ["PL_SEED_WORKERS"] == "0"


def test_without_any_seed_it_is_zero_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.warns(UserWarning, match="No seed found, seed set to 0"):
        assert seed_everything() == 0
    assert "Seed set to 0" in caplog.text


@pytest.mark.parametrize("seed", [-1, 2**32, "many"])
def test_a_seed_that_cannot_be_is_refused_with_the_range(seed: int) -> None:
    before = torch.get_rng_state()
    with pytest.raises(MisconfigurationException, match=rf"{seed}.*0 to 4294967295"):
        seed_everything(seed)
    assert torch.equal(torch.get_rng_state(), before)
    assert "PL_GLOBAL_SEED" not in os.environ


def test_a_bad_seed_in_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "abc")
    for read in (seed_everything, global_seed):  # loaders whose samples are shared out ask the second
        with pytest.raises(MisconfigurationException, match="PL_GLOBAL_SEED='abc' is no integer. Give one"):
            read()


def test_reset_seed_goes_back_to_the_last_seed() -> None:
    before = torch.get_rng_state()
    reset_seed()
    assert torch.equal(torch.get_rng_state(), before)
    seed_everything(9, workers=True, verbose=False)
    first = draw()
    reset_seed()
    assert draw() == first
    assert os.environ["PL_SEED_WORKERS"] == "1"


def test_isolate_rng_leaves_no_trace_even_after_an_error() -> None:
    seed_everything(10, verbose=False)
    with isolate_rng():
        inside = draw()
    assert draw() == inside
    seed_everything(10, verbose=False)
    with pytest.raises(KeyError), isolate_rng():
        draw()
        raise KeyError
    assert draw() == inside


def test_random_state_survives_a_checkpoint_that_loads_weights_only(tmp_path: Path) -> None:
    seed_everything(11, verbose=False)
    random.gauss(0, 1)  # Python and NumPy keep the second of a pair of normal numbers
    np.random.randn()
    io = TorchCheckpointIO()
    io.save_checkpoint(collect_rng_states(), tmp_path / "rng.ckpt")
    following = draw(), random.gauss(0, 1), np.random.randn()
    seed_everything(12, verbose=False)
    set_rng_states(io.load_checkpoint(tmp_path / "rng.ckpt", weights_only=True))
    assert (draw(), random.gauss(0, 1), np.random.randn()) == following


def test_state_in_the_form_that_lightning_saves_is_taken() -> None:
    seed_everything(13, verbose=False)
    states = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate(), "cuda": []}
    following = draw()
    draw()
    set_rng_states(states)
    assert draw() == following


@pytest.mark.parametrize("collect", [own_rng_states, collect_rng_states])
def test_a_rank_goes_on_with_its_own_device_wherever_that_is(
    collect: Callable[[], dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    devices = Devices(monkeypatch, current=2)
    devices.draw_own()
    io = TorchCheckpointIO()
    io.save_checkpoint(collect(), tmp_path / "rng.ckpt")
    following = devices.draw_own()
    devices = Devices(monkeypatch, current=1)
    set_rng_states(io.load_checkpoint(tmp_path / "rng.ckpt", weights_only=True))
    assert devices.draw_own() == following


def test_only_devices_of_the_process_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = Devices(monkeypatch, current=2)
    assert own_rng_states().keys() == {"torch", "python", "numpy", "own_cuda"}
    devices.contexts.add(0)
    devices.draw_own()
    states = own_rng_states()
    assert states["other_cuda"].keys() == {0}
    following = devices.draw()
    devices.current = 0
    set_rng_states(states)
    assert devices.draw_own() == following[2], "device 0 is the own one now"
    devices.current = 2
    set_rng_states(states)
    again = devices.draw()
    assert (again[0], again[2]) == (following[0], following[2])
    assert again[1] != following[1]


def test_isolate_rng_gives_each_device_its_own_state_back(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = Devices(monkeypatch, current=2)
    devices.draw_own()
    with isolate_rng():
        following = devices.draw()
        devices.current = 1
    assert devices.draw() == following


def test_states_are_set_without_cuda_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = Devices(monkeypatch, current=2)
    devices.contexts.add(0)
    states = own_rng_states()
    following = devices.draw_own()
    devices.initialized = False
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("this begins to use CUDA"))
    assert "own_cuda" not in own_rng_states()
    assert "cuda" not in collect_rng_states()
    set_rng_states(states)
    assert devices.draw_own() == following


@pytest.mark.parametrize(("rank", "own"), [(1, 1), (5, 2), (1, 3), (0, 2)])
def test_files_with_the_states_of_all_devices_give_a_rank_its_own(
    rank: int, own: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = Devices(monkeypatch, current=own)
    devices.draw_own()
    states = [collect_rng_states() for _ in range(rank + 1)]
    for old in states:
        del old["own_cuda"]
    following = devices.draw_own()
    devices = Devices(monkeypatch, current=0)
    for generator in devices.generators:
        generator.manual_seed(2)
    set_rng_states(rng_states_of(states, rank))
    assert devices.draw_own() == following


def test_of_two_devices_the_one_with_more_drawn_was_the_rank_s() -> None:
    """With two seeds that tells nothing, and the local rank decides."""

    def cuda_state(seed: int, offset: int) -> torch.Tensor:
        return torch.tensor([seed, offset]).view(torch.uint8)

    for (one, other), own in ((((7, 0), (7, 8)), 1), (((7, 12), (7, 8)), 0), (((7, 12), (8, 8)), 1)):
        states = {"cuda": [cuda_state(*one), cuda_state(*other)]}
        assert torch.equal(as_own_rng_states(states, rank=3)["own_cuda"], states["cuda"][own])


@pytest.mark.gpu
def test_the_gpu_draws_again_what_it_drew() -> None:
    seed_everything(15, verbose=False)
    torch.rand(1, device="cuda")
    states = collect_rng_states()
    following = torch.rand(3, device="cuda")
    set_rng_states(states)
    assert torch.equal(torch.rand(3, device="cuda"), following)


def workers_draw(rank: int) -> tuple[list[list[float]], list[list[float]]]:
    """Two epochs of what two workers of a rank draw."""
    seed_everything(14, verbose=False)
    init = functools.partial(worker_init_function, rank=rank)
    loader = DataLoader(Noise(), batch_size=None, num_workers=2, worker_init_fn=init)
    return list(loader), list(loader)


def test_each_worker_of_each_rank_and_epoch_draws_its_own_numbers_again_and_again() -> None:
    rank0, rank1 = workers_draw(0), workers_draw(1)
    for kind in range(3):  # Python, NumPy, PyTorch
        values = [sample[kind] for epochs in (rank0, rank1) for epoch in epochs for sample in epoch]
        assert len(set(values)) == len(values) == 16
    assert workers_draw(1) == rank1


@pytest.mark.parametrize(
    "draw", [lambda: torch.rand(1), random.random, lambda: np.random.rand(), lambda: random.gauss(0, 1)]
)
def test_random_states_are_the_same_until_a_generator_draws(draw: Callable[[], object]) -> None:
    before = collect_rng_states()
    assert same_rng_states(before, collect_rng_states())
    draw()
    assert not same_rng_states(before, collect_rng_states())
    set_rng_states(before)
    assert same_rng_states(before, collect_rng_states())
