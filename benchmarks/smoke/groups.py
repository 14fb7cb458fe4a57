"""Process groups, and what starts the processes."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from torch import Tensor

from smoke.place import Model, Place, batches, check, made


@check("a process group of one process", apart=True)
def group_of_one(at: Place) -> str:
    fabric = at.fabric(strategy="ddp")
    fabric.launch()
    here = torch.full((3,), 2.0, device=fabric.device)
    assert fabric.all_reduce(here).tolist() == [2, 2, 2]
    assert torch.as_tensor(fabric.all_gather(here)).flatten().tolist() == [2, 2, 2]
    if not at.cpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.max_memory_allocated()
    thing = {"rows": torch.arange(16_000_000 if not at.cpu else 1000), "name": "x"}
    assert torch.equal(fabric.broadcast(thing)["rows"], thing["rows"])
    more = 0 if at.cpu else torch.cuda.max_memory_allocated() - before
    assert more < 1e6, f"an object took {more / 1e6:.0f} MB of the card"
    start = time.perf_counter()
    for _ in range(100):
        fabric.barrier()
    seconds = (time.perf_counter() - start) / 100
    model = made(Model)
    run = at.trainer(strategy="ddp", max_steps=3)
    run.fit(model, batches())
    run.save_checkpoint(at.folder / "a.ckpt")
    at.trainer(strategy="ddp", max_steps=5).fit(Model(), batches(), ckpt_path=at.folder / "a.ckpt")
    return f"barrier {seconds * 1e6:.0f} us"


class Fails(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 2:
            raise ZeroDivisionError("on purpose")
        return super().training_step(batch, batch_idx)


@check("a failure ends a process group at once", apart=True)
def failure(at: Place) -> str:
    start = time.perf_counter()
    try:
        at.trainer(strategy="ddp", max_steps=5).fit(made(Fails), batches())
    except ZeroDivisionError:
        seconds = time.perf_counter() - start
        assert seconds < 60, seconds
        return f"{seconds:.1f} s"
    raise AssertionError("no error")


@check("a task of SLURM that sees one card uses it", apart=True, card="what a task sees are cards")
def one_card_a_task(at: Place) -> str:
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    names = {
        "NTASKS": 1,
        "PROCID": 0,
        "LOCALID": 0,
        "NODEID": 0,
        "NNODES": 1,
        "JOB_ID": 1,
        "STEP_ID": 0,
        "NODELIST": "localhost",
    }
    os.environ |= {f"SLURM_{name}": str(value) for name, value in names.items()} | {"SLURM_JOB_NAME": "smoke"}
    run = at.trainer(strategy="ddp", devices="auto", max_steps=2)
    run.fit(made(Model), batches())
    assert run.world_size == 1 and run.strategy.root_device.index == 0
    # the second of eight tasks, each of which sees its card only: decided without the others
    os.environ |= {"SLURM_NTASKS": "8", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "8"}
    for given in ("auto", 1, 8):
        device = at.fabric(strategy="ddp", devices=given).strategy.root_device
        assert device == torch.device("cuda", 0), (given, device)
    return "devices='auto', 1 and 8"
