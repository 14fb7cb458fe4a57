"""Collective operations on groups of one's own.

Tests of ``treadle_fabric.plugins.collectives``.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from tests.processes import run_in_ranks

from treadle_fabric import find_free_port
from treadle_fabric.plugins.collectives import Collective, SingleDeviceCollective, TorchCollective

pytestmark = pytest.mark.timeout(60)


def test_one_process_gets_what_it_gave() -> None:
    alone = SingleDeviceCollective()
    with pytest.raises(RuntimeError, match="`SingleDeviceCollective` does not own a group. HINT: try"):
        _ = alone.group
    assert alone.setup().create_group() is alone
    with pytest.raises(RuntimeError, match="already owns a group"):
        alone.create_group()
    one = torch.ones(1)
    assert (alone.rank, alone.world_size, alone.is_initialized(), alone.is_available()) == (0, 1, True, True)
    for got in (
        alone.broadcast(one, 0),
        alone.all_reduce(one),
        alone.reduce(one, 0),
        *alone.all_gather([torch.zeros(1)], one),
        *alone.gather(one, [torch.zeros(1)]),
        alone.scatter(torch.zeros(1), [one]),
        alone.reduce_scatter(torch.zeros(1), [one]),
        *alone.all_to_all([torch.zeros(1)], [one]),
        alone.recv(one),
    ):
        assert got is one
    alone.send(one, 0)
    alone.barrier()
    alone.teardown()
    with pytest.raises(RuntimeError, match="does not own a group"):
        alone.teardown()


def in_two_ranks() -> None:
    collective: Collective = TorchCollective()
    with pytest.raises(RuntimeError, match="does not own a group"):
        _ = collective.rank
    rank = int(os.environ["LOCAL_RANK"])
    port = os.environ.pop("MASTER_PORT")
    del os.environ["MASTER_ADDR"]
    collective.setup(main_address="127.0.0.1", main_port=port, backend="gloo", rank=rank, world_size=2)
    assert "MASTER_PORT" not in os.environ and TorchCollective.manages_default_group
    assert (collective.rank, collective.world_size) == (rank, 2)
    own = torch.tensor([float(rank)])
    assert collective.all_reduce(own.clone()).item() == collective.all_reduce(own.clone(), "SUM").item() == 1
    assert collective.all_reduce(own.clone(), dist.ReduceOp.MAX).item() == 1
    assert collective.broadcast(own.clone(), 1).item() == 1
    assert collective.all_gather([torch.zeros(1), torch.zeros(1)], own) == [torch.zeros(1), torch.ones(1)]
    assert isinstance(collective, TorchCollective)
    assert collective.all_gather_object([None, None], {"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert collective.broadcast_object_list([rank], 1) == [1]
    if rank == 0:
        collective.send(own + 5, 1)
    else:
        assert collective.recv(own.clone(), 0).item() == 5
    for op, told in ((1, "Unsupported op 1 of type int"), ("no", "op 'NO' is not a member of `ReduceOp`")):
        with pytest.raises(ValueError, match=told):
            collective.all_reduce(own, op)
    part = TorchCollective().create_group(ranks=[1])
    part.barrier()
    if rank == 1:
        assert (part.rank, part.world_size) == (0, 1)
    part.teardown()
    assert collective.is_initialized()
    collective.teardown()
    assert not collective.is_initialized() and not TorchCollective.manages_default_group


def test_the_operations_of_torch() -> None:
    run_in_ranks(in_two_ranks)


def test_a_group_that_another_one_initialized_stays() -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_port())}
    dist.init_process_group("gloo", rank=0, world_size=1)
    try:
        TorchCollective().setup().create_group().teardown()
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()
