"""A checkpoint of two processes gives each other layout, of one to four, its weights and optimizer state to the bit.

Tests of ``treadle_fabric.strategies.states.sharded_state``, ``treadle_fabric.checkpoint.distributed.saving``,
``treadle_fabric.checkpoint.stored``. ``test_transitions.py`` has the same of the Trainer, for all pairs.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.pipelining
from tests.equality.layouts import LAYOUTS
from tests.equality.model import BATCH, Model, Tokens, once, optimizer_state, parameter_groups, result, run_rows, whole
from tests.processes import run_in_ranks
from torch.utils.data import DataLoader

from treadle_fabric import Fabric

pytestmark = pytest.mark.timeout(400)  # the first test waits until all have run
WRITERS = ["fsdp2_policy", "fsdp2_full", "tensor2", "pipeline2"]
READERS = ["single", "fsdp2", "fsdp2_full", "tensor2", "pipeline2", "fsdp3", "fsdp4", "hybrid4", "pipeline2_fsdp2"]
TABLE = {layout.name: layout for layout in LAYOUTS}


def made(name: str, seed: int) -> tuple[Fabric, Any, Any]:
    layout = TABLE[name]
    fabric = Fabric(accelerator="cpu", devices=layout.processes, strategy=layout.strategy())
    fabric.launch()
    torch.manual_seed(seed)
    model: Any = Model()
    optimizer: Any = torch.optim.AdamW(parameter_groups(model), lr=1e-2 * seed)
    model, optimizer = fabric.setup(model, optimizer)
    return fabric, model, optimizer


def write(name: str, path: Path) -> Any:
    """Save after two steps; returns what was saved."""
    fabric, model, optimizer = made(name, seed=1)
    model.mark_forward_method("loss_of")
    shares = fabric.strategy.data_parallel_size
    for batch, _ in zip(fabric.setup_dataloaders(DataLoader(Tokens(), batch_size=BATCH // shares)), range(2)):
        if fabric.strategy.runs_whole_batch:
            fabric.run_batch(model, batch)
        else:
            fabric.backward(model.loss_of(batch))
        optimizer.step()
        optimizer.zero_grad()
    fabric.save(path, {"model": model, "optimizer": optimizer, "step": 2})
    return found(model, optimizer)


def read(name: str, path: Path) -> Any:
    """Load into other weights and an empty optimizer; returns what is there then."""
    fabric, model, optimizer = made(name, seed=2)
    state = {"model": model, "optimizer": optimizer, "step": 0}
    fabric.load(path, state)
    assert state["step"] == 2
    return found(model, optimizer)


def found(model: Any, optimizer: Any) -> dict[str, Any]:
    return {**whole(model.state_dict()), **optimizer_state(model, optimizer)}


def write_and_read(folder: Path) -> None:
    rows = [(name, partial(write, name, folder / f"{name}.ckpt")) for name in WRITERS]
    run_in_ranks(run_rows, rows, folder, devices=2)
    for processes in sorted({TABLE[name].processes for name in READERS}):
        rows = [
            (f"{writer}-{reader}", partial(read, reader, folder / f"{writer}.ckpt"))
            for writer, reader in product(WRITERS, READERS)
            if TABLE[reader].processes == processes
        ]
        run_in_ranks(run_rows, rows, folder, devices=processes)


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each layout wrote, and what each one read."""
    return once(tmp_path_factory, "checkpoints", write_and_read)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("writer", WRITERS)
def test_what_was_written_is_read(writer: str, reader: str, states: dict[str, Any]) -> None:
    written, loaded = result(states, writer), result(states, f"{writer}-{reader}")
    assert sum(name.endswith("exp_avg_sq") for name in written) == 14  # one for each trained parameter
    assert written.keys() == loaded.keys()
    for name, tensor in written.items():
        assert torch.equal(loaded[name], tensor), name
