"""What ranks exchange by all_gather and all_reduce: numbers, arrays, containers; and what cannot be exchanged.

Tests of ``treadle_fabric.coordination.as_tensors``, ``treadle_fabric.coordination.alike``,
``treadle_fabric.strategies.reduction``.
"""

from __future__ import annotations

import re
import sys
import time
from array import array
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.processes import own_lines, run_in_ranks

import treadle as L
from treadle_fabric import Fabric, MisconfigurationException
from treadle_fabric.coordination import alike

Point = namedtuple("Point", "x y")


class Level(IntEnum):
    HIGH = 3


@dataclass
class Box:
    size: Any
    name: str = "box"


def fabric_of(devices: int) -> Fabric:
    fabric = Fabric(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto")
    fabric.launch()
    return fabric


class Column:
    """What another library has for an array."""

    def __array__(self, *_: Any, **__: Any) -> Any:
        return np.array([1.0, 2.0])


def same(found: Any, wanted: torch.Tensor) -> bool:
    return found.dtype == wanted.dtype and found.shape == wanted.shape and bool((found == wanted).all())


VALUES: dict[str, tuple[Any, torch.Tensor]] = {
    "int": (3, torch.tensor(3)),
    "a large int": (2**40, torch.tensor(2**40)),
    "float": (0.5, torch.tensor(0.5)),
    "bool": (True, torch.tensor(True)),
    "complex": (1 + 2j, torch.tensor(1 + 2j)),
    "an enum": (Level.HIGH, torch.tensor(3)),
    "Decimal": (Decimal("0.25"), torch.tensor(0.25)),
    "Fraction": (Fraction(1, 4), torch.tensor(0.25)),
    "np.float32": (np.float32(1.5), torch.tensor(1.5)),
    "np.float64": (np.float64(1.5), torch.tensor(1.5, dtype=torch.float64)),
    "np.bool_": (np.bool_(True), torch.tensor(True)),
    "np.uint8": (np.uint8(200), torch.tensor(200, dtype=torch.uint8)),
    "an array without dimensions": (np.array(7), torch.tensor(7)),
    "an array of the other byte order": (np.array([1.0, 2.0], dtype=">f4"), torch.tensor([1.0, 2.0])),
    "an array read backwards": (np.arange(3)[::-1], torch.tensor([2, 1, 0])),
    "an empty array": (np.zeros((0, 3), dtype=np.float32), torch.zeros(0, 3)),
    "an empty tensor": (torch.zeros(2, 0), torch.zeros(2, 0)),
    **{
        f"an array of {dtype}": (np.array([[0, 1], [1, 0]], dtype=dtype), torch.tensor([[0, 1], [1, 0]]).to(kind))
        for dtype, kind in {
            "bool": torch.bool, "int8": torch.int8, "int16": torch.int16, "int32": torch.int32, "int64": torch.int64,
            "uint8": torch.uint8, "uint16": torch.uint16, "uint32": torch.uint32, "uint64": torch.uint64,
            "float16": torch.float16, "float32": torch.float32, "float64": torch.float64,
            "complex64": torch.complex64, "complex128": torch.complex128,
        }.items()
    },
    "bfloat16": (torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16)),
    "float8": (torch.ones(2).to(torch.float8_e4m3fn), torch.ones(2).to(torch.float8_e4m3fn)),
    "a row of floats": (array("d", [1.0, 2.0]), torch.tensor([1.0, 2.0], dtype=torch.float64)),
    "a row of integers": (array("h", [1, 2]), torch.tensor([1, 2])),
    "a column of a table": (Column(), torch.tensor([1.0, 2.0], dtype=torch.float64)),
    "a conjugate": (torch.tensor([1 + 2j]).conj(), torch.tensor([1 - 2j])),
    "the imaginary part of one": (torch.tensor([1 + 2j]).conj().imag, torch.tensor([-2.0])),
    "a tensor of other strides": (torch.arange(6).reshape(2, 3).T, torch.arange(6).reshape(2, 3).T),
}  # fmt: skip


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.resolve_neg().resolve_conj().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def gathers(devices: int) -> None:
    fabric = fabric_of(devices)
    for name, (value, alone) in VALUES.items():
        found = fabric.all_gather({"in": [value]})["in"][0]
        wide = alone.double() if alone.dtype.itemsize == 1 and alone.is_floating_point() else alone
        wanted = torch.stack([wide] * devices).to(alone.dtype) if devices > 1 else alone
        assert found.dtype == wanted.dtype and found.shape == wanted.shape, name
        assert _bytes(found).equal(_bytes(wanted)), name
    others = ["text", b"bytes", None, np.str_("text"), object(), Fabric, range(3)]
    assert all(a is b for a, b in zip(fabric.all_gather(others), others, strict=True))
    lead = (2,) if devices > 1 else ()
    sizes = fabric.all_gather(torch.zeros(3, 4).shape)
    assert type(sizes) is tuple and [size.shape for size in sizes] == [lead] * 2 and int(sizes[1].max()) == 4
    mixed = {"n": 1, "point": Point(1.0, "here"), "box": Box(np.ones(2)), "none": None}
    found = fabric.all_gather(mixed)
    assert found["n"].shape == found["point"].x.shape == lead and found["box"].size.shape == (*lead, 2)
    assert (found["point"].y, found["box"].name, found["none"]) == ("here", "box", None)
    assert mixed["n"] == 1 and type(mixed["box"].size) is np.ndarray
    module = L.LightningModule()
    module.fabric = fabric
    assert module.all_gather(np.ones(2)).shape == (*lead, 2) and module.all_gather("text") == "text"
    refused: dict[str, Any] = {
        "an array of objects": np.array([object()]), "an array of text": np.array(["a"]),
        "dates": np.array(["2020"], "M8[D]"),
        "a record": np.zeros(1, [("a", "i4")]), "a masked array": np.ma.masked_array([1, 2], [0, 1]), "a set": {1, 2},
        "a sparse tensor": torch.eye(2).to_sparse(), "a tensor without values": torch.ones(1, device="meta"),
        "a nested tensor": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
        "a masked tensor": torch.masked.masked_tensor(torch.ones(1), torch.tensor([True])),
        "a huge int": 2**70, "a row of huge integers": array("Q", [2**64 - 1]),
    }  # fmt: skip
    for name, value in refused.items():
        for call in (fabric.all_gather, fabric.all_reduce):
            with pytest.raises(MisconfigurationException, match=re.escape(f"{call.__name__}: data['deep'][1] (")):
                call({"deep": (1, value)})
                print(name)


@pytest.mark.parametrize("devices", [1, 2])
def test_numbers_and_arrays_are_gathered_and_the_rest_stays(devices: int) -> None:
    run_in_ranks(gathers, devices, devices=devices)


def reduces(devices: int) -> None:
    fabric = fabric_of(devices)
    rank = fabric.global_rank
    mean, total = 0.5 * (devices - 1), devices * (devices - 1) // 2

    def check(value: Any, op: Any, wanted: Any, dtype: torch.dtype) -> None:
        found = fabric.all_reduce([value], reduce_op=op)[0]
        assert same(found, torch.as_tensor(wanted).to(dtype)), (value, op, found)

    for number, kind in ((rank, torch.float32), (float(rank), torch.float32), (np.int16(rank), torch.float32),
                         (np.float64(rank), torch.float64), (complex(rank), torch.complex64)):  # fmt: skip
        check(number, "mean", mean, kind)
    for kind in (
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint16,
        torch.uint32,
    ):
        mine = torch.tensor([rank, 1]).to(kind)
        check(mine, "mean", [mean, 1.0], torch.float32)
        check(mine, "sum", [total, devices], torch.int64)
        check(mine, "product", [0, 1], torch.int64)
        check(mine, "min", [0, 1], kind)
        check(mine, "max", [devices - 1, 1], kind)
        check(mine, dist.ReduceOp.MAX, [devices - 1, 1], kind)
    check(torch.tensor([rank, 1], dtype=torch.bool), dist.ReduceOp.BOR, [devices > 1, True], torch.bool)
    check(torch.tensor(rank, dtype=torch.uint64), "sum", total, torch.int64)
    for kind in (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float32, torch.float64):
        mine = torch.tensor([rank, 2.0]).to(kind)
        check(mine, "mean", [mean, 2.0], kind)
        check(mine, "max", [devices - 1, 2.0], kind)
    check(torch.tensor(200, dtype=torch.uint8), "sum", 200 * devices, torch.int64)  # more than a byte
    check(torch.tensor(60000.0, dtype=torch.float16), "mean", 60000.0, torch.float16)  # as a sum more than 65504
    check(2**24 + 1, "sum", devices * (2**24 + 1), torch.int64)
    before = torch.tensor([1, 2])
    fabric.all_reduce(before, reduce_op="sum")
    assert before.tolist() == [1, 2]
    refused: list[tuple[Any, Any, str]] = [
        ({"a": ["text"]}, "mean", r"data\['a'\]\[0\] \(str\) is no number"),
        ({"a": None}, "mean", r"data\['a'\] \(NoneType\) is no number"),
        (object(), "sum", r"data \(object\) is no number"),
        ({"a": torch.ones(1, dtype=torch.complex64)}, "max", r"data\['a'\].*complex64.*'max' has no meaning"),
        ([torch.ones(1, dtype=torch.uint64)], "min", r"data\[0\].*uint64"),
        (torch.ones(1), "maen", "Did you mean 'mean'"),
        (torch.ones(1), None, "reduce_op=None is no reduction"),
        (0.5, dist.ReduceOp.BXOR, "combines bits"),
        (0.5, dist.ReduceOp.PREMUL_SUM, "is no reduction"),
    ]
    for value, op, text in refused:
        with pytest.raises(MisconfigurationException, match=text):
            fabric.all_reduce(value, reduce_op=op)


@pytest.mark.parametrize("devices", [1, 2])
def test_everything_that_is_a_number_is_reduced_and_the_rest_refused(devices: int) -> None:
    run_in_ranks(reduces, devices, devices=devices)


# --- shapes ---


@contextmanager
def differs(*texts: str) -> Iterator[None]:
    with pytest.raises(MisconfigurationException) as raised:
        yield
    for text in texts:
        assert text in str(raised.value), str(raised.value)


def unequal_shapes() -> None:
    fabric = fabric_of(3)
    rank = fabric.global_rank
    line = sys._getframe().f_lineno
    with differs("shapes differ", "shape (1,) on rank 0; shape (2,) on ranks 1-2", f"{__file__}:{line + 2}"):
        fabric.all_gather(torch.ones(min(rank, 1) + 1))
    for call in (fabric.all_gather, fabric.all_reduce):
        with differs("shapes differ", "data['b'][0] is shape () on rank 0; shape (1,) on ranks 1-2"):
            call({"a": 1, "b": [torch.ones(()) if rank == 0 else torch.ones(1)]})
        with differs("dtypes differ", "float32 on ranks 0-1; float64 on rank 2"):
            call(torch.ones(1, dtype=torch.float64 if rank == 2 else torch.float32))
        with differs("structures differ", "data[1] on rank 1", "nothing on ranks 0, 2"):
            call([1.0] * (2 if rank == 1 else 1))
        with differs("structures differ", "data['a'] on ranks 0-1; data['b'] on rank 2"):
            call({"a" if rank < 2 else "b": 1})
    with differs("shapes differ", "shape (1,) on ranks 0, 2; None on rank 1"):
        fabric.all_gather(None if rank == 1 else torch.ones(1))
    if rank == 0:
        with differs("shapes differ"):
            fabric.all_gather(torch.ones(1))
    else:
        with differs("shapes differ"):
            fabric.all_gather(torch.ones(2))
    fabric.all_reduce(rank or 0.5)  # both are means in the default dtype
    group = dist.new_group([1, 2])
    if rank:
        with differs("shape (1,) on rank 0; shape (2,) on rank 1"):
            fabric.all_gather(torch.ones(rank), group=group)
        assert fabric.all_gather(rank, group=group).tolist() == [1, 2]
    else:
        with pytest.raises(MisconfigurationException, match="Rank 0 is not in the process group"):
            fabric.all_gather(1, group=group)
    for number in range(3):  # the same line: the first call compares, and under detect_anomaly each does
        with torch.autograd.set_detect_anomaly(number == 2, check_nan=False):
            with differs("shapes differ") if number == 2 else pytest.MonkeyPatch.context():
                fabric.all_gather(torch.ones(rank + 1 if number == 2 else 1))
    assert fabric.all_gather(rank).tolist() == [0, 1, 2]


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_unequal_shapes_are_named_on_every_rank_before_they_are_exchanged() -> None:
    run_in_ranks(unequal_shapes, devices=3)


def from_other_lines() -> None:
    fabric = fabric_of(3)
    rank = fabric.global_rank

    def here() -> Any:
        return fabric.all_gather(rank)

    def there() -> Any:
        return fabric.all_gather(rank)

    plan: dict[int, list[Callable[[], Any]]] = {
        0: [here, here, here, there, here, here],
        1: [here, there, there, there, here, lambda: fabric.all_gather(rank)],
        2: [here, there, lambda: fabric.all_gather(rank), here, lambda: fabric.all_gather(rank), here],
    }
    for call in plan[rank]:
        assert call().tolist() == [0, 1, 2]
    fabric.barrier()


def test_ranks_that_call_from_different_lines_do_not_wait_for_each_other() -> None:
    run_in_ranks(from_other_lines, devices=3)


def exchanges_at_one_place() -> None:
    fabric = fabric_of(2)
    words: list[str] = []
    own: Any = dist.Store.set

    def counted(store: Any, key: str, value: str) -> None:
        words.append(key)
        own(store, key, value)

    dist.Store.set = counted
    for number in range(200):
        fabric.all_reduce(torch.ones(2))
        if number == 0:
            compared = sum("treadle/alike" in word for word in words)
    found = [word for word in words if "treadle/alike" in word]
    assert compared, "the first call is compared"
    assert len(found) - compared < 50, "the thread's, a few a second"
    fabric.barrier()


def test_a_later_call_at_a_place_costs_no_message() -> None:
    run_in_ranks(exchanges_at_one_place)


def comes_late(late: int) -> None:
    fabric = fabric_of(2)
    rank = fabric.global_rank
    alike._PATIENCE = 0.3
    store: Any = dist.distributed_c10d._get_default_store()
    if rank == late:
        store.wait(["gone on"])
    else:
        real = dist.all_gather
        dist.all_gather = lambda *args, **kwargs: (store.set("gone on", ""), real(*args, **kwargs))
    if rank == late:
        with differs("shapes differ", "shape (1,) on rank 0; shape (2,) on rank 1"):
            fabric.all_gather(torch.ones(rank + 1))
    else:
        with pytest.raises(RuntimeError):  # of gloo, because the other rank is gone
            fabric.all_gather(torch.ones(rank + 1))


@pytest.mark.parametrize("late", [0, 1])
def test_the_rank_that_comes_last_names_the_shapes(late: int) -> None:
    run_in_ranks(comes_late, late)


def comes_a_little_late() -> None:
    fabric = fabric_of(2)
    store: Any = dist.distributed_c10d._get_default_store()
    if fabric.global_rank:
        store.wait(["treadle/alike/0/0/1/0"])  # rank 0 compares
        until = time.monotonic() + 0.3
        while time.monotonic() < until:
            pass
    fabric.all_gather(torch.ones(1))


def test_a_rank_that_comes_a_little_late_is_waited_for_without_a_word() -> None:
    assert own_lines(run_in_ranks(comes_a_little_late)) == []


class Gathers(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.all_gather(torch.ones(2 if batch_idx == 2 and self.global_rank else 1))
        return self.layer(batch).sum()

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.ones(8, 1))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fits(detect: bool) -> None:
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_steps=4, detect_anomaly=detect, logger=False,
                        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    with differs("shapes differ", "shape (1,) on rank 0; shape (2,) on rank 1"):
        trainer.fit(Gathers())


def test_detect_anomaly_of_the_trainer_compares_at_every_call() -> None:
    run_in_ranks(fits, True)
