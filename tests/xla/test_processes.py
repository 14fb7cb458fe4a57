"""Several devices of XLA: collectives, the launch, checkpoints that other strategies read; also in threads.

PJRT connects the devices of one process on the CPU, not those of several: there, processes exchange over their hosts,
and XLA's own collectives run in threads of one process, whose strategies do not know of threads.

Tests of ``treadle_fabric.strategies.on_xla.exchange``, ``treadle_fabric.strategies.on_xla.several``,
``treadle_fabric.strategies.on_xla.parts``, ``treadle_fabric.environments.xla``: `make test-xla`.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.fsdp
from torch import Tensor, nn

from tests.processes import run_as_program, run_in_ranks
from treadle_fabric import Fabric, MisconfigurationException
from treadle_fabric.plugins.environments import XLAEnvironment
from treadle_fabric.strategies import XLAFSDPStrategy

pytestmark = [pytest.mark.xla, pytest.mark.timeout(600)]


def communicate() -> None:
    fabric = Fabric(accelerator="tpu", devices=2, strategy="xla")
    fabric.launch()
    rank = fabric.global_rank
    mine = torch.tensor([1.0, 2.0], device=fabric.device) * (rank + 1)
    assert fabric.all_reduce(mine, reduce_op="sum").tolist() == [3.0, 6.0]
    assert fabric.all_reduce(torch.tensor(rank, device=fabric.device)).item() == 0.5
    assert fabric.all_gather(mine).tolist() == [[1.0, 2.0], [2.0, 4.0]]
    assert fabric.broadcast({"rank": rank})["rank"] == 0
    assert fabric.strategy.reduce_boolean_decision(rank == 0, all=False)
    fabric.barrier()
    torch.manual_seed(rank)
    model = fabric.setup(nn.Linear(2, 1))
    assert fabric.all_gather(model.weight.detach())[0].equal(fabric.all_gather(model.weight.detach())[1])
    with fabric.no_backward_sync(model):
        fabric.backward(model(mine).sum())
    assert model.weight.grad.tolist() == [mine.tolist()]  # of this rank alone
    fabric.backward(model(mine).sum())
    assert model.weight.grad.tolist() == [[3.0, 6.0]]  # the mean of twice each


def test_collectives_and_gradients() -> None:
    run_in_ranks(communicate, timeout=300)


def save_parts(folder: str) -> None:
    fabric = Fabric(accelerator="tpu", devices=2, strategy="xla_fsdp")
    fabric.launch()
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
    whole = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    model, optimizer = fabric.setup(plain, torch.optim.AdamW(plain.parameters(), lr=0.1))
    assert sum(p.numel() for p in model.parameters()) < sum(t.numel() for t in whole.values())
    for name, part in model.state_dict().items():
        assert torch.equal(part.full_tensor(), whole[name])
    fabric.backward(model(torch.ones(2, 3, device=fabric.device)).sum())
    optimizer.step()
    fabric.save(f"{folder}/parts.ckpt", {"model": model, "optimizer": optimizer})
    after = {name: part.full_tensor() for name, part in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    fabric.load(f"{folder}/parts.ckpt", {"model": model, "optimizer": optimizer})
    assert all(torch.equal(part.full_tensor(), after[name]) for name, part in model.state_dict().items())
    if fabric.is_global_zero:
        torch.save(after, f"{folder}/after.pt")


def read_parts(folder: str, strategy: str, processes: int) -> None:
    fabric = Fabric(accelerator="cpu", devices=processes, strategy=strategy)
    fabric.launch()
    plain = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
    model, optimizer = fabric.setup(plain, torch.optim.AdamW(plain.parameters(), lr=0.1))
    fabric.load(f"{folder}/parts.ckpt", {"model": model, "optimizer": optimizer})
    after = torch.load(f"{folder}/after.pt")
    for name, found in model.state_dict().items():
        assert torch.equal(found.full_tensor() if hasattr(found, "full_tensor") else found, after[name])
    assert [state["step"].item() for state in optimizer.state.values()] == [1.0] * 4


def test_parts_are_read_by_every_strategy(tmp_path: Path) -> None:
    run_in_ranks(save_parts, str(tmp_path), timeout=300)
    run_in_ranks(read_parts, str(tmp_path), "auto", 1, devices=1, timeout=200)
    run_in_ranks(read_parts, str(tmp_path), "fsdp", 2, timeout=200)


def over_devices() -> None:
    """Two threads, each with a device, which XLA's own collectives connect.

    The graphs of the threads are compiled one after the other: of two that are compiled at the same time, each would
    wait for its twin.
    """
    os.environ["CPU_NUM_DEVICES"] = "2"
    import torch_xla
    import torch_xla.runtime as xr
    from torch_xla._internal import pjrt

    from treadle_fabric.strategies.on_xla.exchange import OverDevices, find_exchange

    one_at_a_time = threading.Lock()

    def value(tensor: Tensor) -> list[float]:
        with one_at_a_time:
            torch_xla.sync()
        return tensor.cpu().tolist()  # type: ignore[no-any-return]

    def check() -> bool:
        rank = xr.global_ordinal()
        exchange = find_exchange(rank, 2)
        assert isinstance(exchange, OverDevices)
        mine = (torch.tensor([1.0, 2.0]) * (rank + 1)).to(torch_xla.device())
        value(mine)
        assert value(exchange.all_reduce(mine, dist.ReduceOp.SUM)) == [3.0, 6.0]
        assert value(exchange.all_reduce(mine, dist.ReduceOp.MAX)) == [2.0, 4.0]
        assert value(exchange.all_gather(mine)) == [[1.0, 2.0], [2.0, 4.0]]
        gradient = mine.clone()
        exchange.average([gradient])
        assert value(gradient) == [1.5, 3.0]
        return True

    found = pjrt._run_thread_per_device(0, 1, check, pjrt.initialize_multiprocess)
    assert found == {0: True, 1: True}


def test_collectives_of_xla() -> None:
    run_in_ranks(over_devices, devices=1, timeout=300)


SCRIPT = """
import torch
from treadle_fabric import Fabric

if __name__ == "__main__":
    fabric = Fabric(accelerator="tpu", devices=2)
    fabric.launch()
    assert fabric.world_size == 2 and fabric.device.type == "xla"
    total = fabric.all_reduce(torch.ones((), device=fabric.device), reduce_op="sum")
    assert total.item() == 2
"""


def test_a_script_is_launched(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    run_as_program(str(tmp_path / "script.py"), timeout=500)


def in_processes_of_torch_xla(port: str) -> None:
    os.environ |= {"PJRT_LOCAL_PROCESS_RANK": os.environ.pop("LOCAL_RANK"), "PJRT_LOCAL_PROCESS_COUNT": "2"}
    assert XLAEnvironment.detect()
    fabric = Fabric(accelerator="tpu", plugins=XLAEnvironment())
    fabric.launch()
    assert fabric.world_size == 2
    assert int(fabric.all_reduce(torch.tensor(fabric.global_rank), reduce_op="sum")) == 1


def test_processes_that_torch_xla_started() -> None:
    run_in_ranks(in_processes_of_torch_xla, "0", timeout=300)


def refuse() -> None:
    with pytest.raises(MisconfigurationException, match=r"shrad=\.\.\.\) is no argument"):
        XLAFSDPStrategy(shrad=True)
    with pytest.raises(MisconfigurationException, match=r"flatten_parameters=True\): Treadle cuts"):
        XLAFSDPStrategy(flatten_parameters=True)
    fabric = Fabric(accelerator="tpu", devices=1, strategy="xla_fsdp", precision="bf16-true")
    fabric.launch()
    with pytest.raises(MisconfigurationException, match=r"compute_dtype=torch\.bfloat16"):
        fabric.setup(nn.Linear(2, 1))


def test_refused() -> None:
    run_in_ranks(refuse, devices=1, timeout=300)
