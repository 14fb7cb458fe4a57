"""PyTorch's profiler in a run and in a loop, and snapshots of a GPU's memory.

Tests of ``treadle.profilers.pytorch``, ``treadle.profilers.layer_names``, ``treadle.profilers.operator_table``,
``treadle.profilers.memory``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.models import Net, loader, trainer
from torch import Tensor
from torch.profiler import ProfilerActivity, schedule

import treadle as L
from treadle.profilers import MemorySnapshot, PyTorchProfiler
from treadle_fabric import Fabric, MisconfigurationException


class Part(Net):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        with self.profile("my part"):
            return self.loss(batch)


def events(path: Path) -> list[str]:
    return [event["name"] for event in json.loads(path.read_text())["traceEvents"] if "name" in event]


def test_the_trace_has_steps_actions_and_layers(tmp_path: Path) -> None:
    profiler = PyTorchProfiler(tmp_path, "x", row_limit=7, activities=[ProfilerActivity.CPU])
    run = trainer(tmp_path, profiler=profiler, max_epochs=3)
    run.fit(model := Part(), loader(), loader(4))
    assert [p.name for p in tmp_path.glob("*.json")] == [
        "fit-x-step=5.pt.trace.json"
    ]  # one recording, not one an epoch
    found = events(tmp_path / "fit-x-step=5.pt.trace.json")
    assert {"ProfilerStep#2", "ProfilerStep#3", "ProfilerStep#4"} <= {*found}
    assert "ProfilerStep#1" not in found and "ProfilerStep#5" not in found
    assert found.count("[pl][profile]my part") == found.count("[pl][profile]run_training_batch") == 3
    in_validation = found.count("[pl][profile][Strategy]SingleDeviceStrategy.validation_step")
    layer = "[pl][module]torch.nn.modules.linear.Linear: layer"
    assert in_validation == 2 and found.count(layer) == 3 + in_validation
    assert profiler.profiler is None and len(profiler.function_events) > 20
    assert not model.layer._forward_hooks and not model.layer._forward_pre_hooks
    text = (tmp_path / "fit-x.txt").read_text()
    lines = text.splitlines()
    assert lines[:2] == ["FIT Profiler Report", "The last recording ended with step 5 of 12."]
    assert max(map(len, lines)) == 100 and len(lines) == 7 + 7
    assert re.search(r"^Name +Self CPU % +Self CPU +CPU total +CPU mean +Calls$", text, re.MULTILINE)
    assert re.search(r"^ProfilerStep\* .* 3$", text, re.MULTILINE)
    run.test(model, loader(12), verbose=False)
    assert "[pl][profile][Strategy]SingleDeviceStrategy.test_step" in events(tmp_path / "test-x-step=5.pt.trace.json")


@pytest.mark.filterwarnings("ignore:.*Profiler clears events at the end of each cycle")
def test_schedules_and_handlers_of_the_users_own(tmp_path: Path) -> None:
    ready: list[int] = []
    own = PyTorchProfiler(
        tmp_path, record_module_names=False, schedule=schedule(wait=0, warmup=1, active=1), profile_memory=True,
        on_trace_ready=lambda profiler: ready.append(profiler.step_num),
    )  # fmt: skip
    trainer(tmp_path, profiler=own).fit(Part(), loader(12))
    assert ready == [2, 4, 6] and not [*tmp_path.glob("*.json")]
    text = (tmp_path / "fit.txt").read_text()
    assert "[pl][module]" not in text and re.search(r" Memory +Calls$", text, re.MULTILINE)


def test_a_handler_that_fails_ends_the_run(tmp_path: Path) -> None:
    profiler = PyTorchProfiler(tmp_path, on_trace_ready=lambda profiler: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, profiler=profiler).fit(model := Part(), loader(12))
    assert profiler.profiler is None and not model.layer._forward_hooks


def test_a_run_that_is_too_short_says_so(tmp_path: Path) -> None:
    profiler = PyTorchProfiler(tmp_path)
    trainer(tmp_path, profiler=profiler, fast_dev_run=True).fit(Part(), loader())
    assert "No step was recorded: there were 1, and the schedule begins later" in (tmp_path / "fit.txt").read_text()
    trainer(tmp_path, profiler=profiler, limit_train_batches=3).fit(Part(), loader())  # one of three steps is recorded
    assert "ended with step 3 of 3" in (tmp_path / "fit.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"sort_by_key": "count", "row_limit": 2}, r"Calls\n-+\n.* \d\d\n.* \d\d\n-+\n"),
        ({"table_kwargs": {"header": "my header"}, "row_limit": 3}, r"my header"),
        ({"group_by_input_shapes": True, "row_limit": -1}, r"Input Shapes[\s\S]*aten::addmm .*\[2, 4\]"),
    ],
)
def test_tables(tmp_path: Path, arguments: dict[str, Any], expected: str) -> None:
    profiler = PyTorchProfiler(tmp_path, export_to_chrome=False, **arguments)
    trainer(tmp_path, profiler=profiler).fit(Part(), loader(12))
    assert re.search(expected, (tmp_path / "fit.txt").read_text())
    assert not [*tmp_path.glob("*.json")]


def test_a_loop_counts_the_first_step_function_that_it_measures(tmp_path: Path) -> None:
    profiler, fabric = (
        PyTorchProfiler(tmp_path, "loop", activities=[ProfilerActivity.CPU]),
        Fabric(accelerator="cpu", devices=1),
    )
    model, optimizer = fabric.setup(net := Net(), torch.optim.SGD(net.parameters(), 0.1))
    profiler.watch(net)
    for batch in loader(16):
        with profiler.profile("training_step"):
            fabric.backward(model(batch).sum())
        with profiler.profile("validation_step"):
            optimizer.step()
    profiler.describe()
    found = events(tmp_path / "loop-step=5.pt.trace.json")
    assert (
        found.count("[pl][profile]training_step")
        == found.count("[pl][module]torch.nn.modules.linear.Linear: layer")
        == 3
    )
    with profiler.profile("training_step"):  # ended: nothing is recorded, and nothing left running
        pass
    assert profiler.profiler is None


def test_a_run_resumed_in_mid_epoch_is_profiled_and_exact(tmp_path: Path) -> None:
    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    whole, resumed = Part(), Part()
    trainer(tmp_path, profiler="pytorch", callbacks=[Saves()]).fit(whole, loader(16))
    profiler = PyTorchProfiler(tmp_path, "resumed")
    trainer(tmp_path, profiler=profiler).fit(resumed, loader(16), ckpt_path=tmp_path / "middle.ckpt")
    assert torch.equal(whole.layer.weight, resumed.layer.weight)
    assert "ended with step 5 of 5" in (tmp_path / "fit-resumed.txt").read_text()


class Broken(Part):
    """Its layer fails at the third batch, which is recorded."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.layer(batch if batch_idx < 3 else batch[:, :1]).sum()


def test_an_error_in_a_layer_leaves_no_hook(tmp_path: Path) -> None:
    profiler = PyTorchProfiler(tmp_path)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        trainer(tmp_path, profiler=profiler).fit(model := Broken(), loader(12))
    assert profiler.profiler is None and not model.layer._forward_hooks and not model.layer._forward_pre_hooks
    assert events(*tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"sort_by_key": "cpu_tim"},
            r"sort_by_key='cpu_tim' of PyTorchProfiler must be.*Did you mean 'cpu_time'",
        ),
        ({"with_stacks": True}, r"got 'with_stacks', which is no argument.*Did you mean 'with_stack'"),
        ({"row_limit": 2.5}, "row_limit"),
        ({"emit_nvtx": 1}, "PyTorchProfiler: emit_nvtx=1 must be True or False"),
        ({"schedule": 3}, r"schedule=3 must be a function of the step"),
        ({"schedule": lambda step: None}, r"returns a torch\.profiler\.ProfilerAction"),
        ({"on_trace_ready": "x"}, r"on_trace_ready='x' must be a function"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        PyTorchProfiler(**arguments)


def test_ranges_for_nvidias_profilers_need_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profiler = PyTorchProfiler(tmp_path, emit_nvtx=True)
    with pytest.raises(MisconfigurationException, match=r"emit_nvtx=True needs a CUDA device"):
        trainer(tmp_path, profiler=profiler).fit(Part(), loader())
    told: list[str] = []

    class Range:
        def __init__(self, name: str = "profile") -> None:
            self.name = name

        def __enter__(self) -> None:
            told.append(f"+{self.name}")

        def __exit__(self, *_: Any) -> None:
            told.append(f"-{self.name}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.profiler, "profile", Range)
    monkeypatch.setattr(torch.autograd.profiler, "emit_nvtx", lambda: Range("nvtx"))
    profiler.setup("fit")
    with profiler.profile("training_step"):
        pass
    profiler.describe()
    profiler.teardown("fit")
    assert told == ["+profile", "+nvtx", "-nvtx", "-profile"]
    assert not [*tmp_path.glob("*.txt")]


class FakeMemory:
    """The calls of ``torch.cuda.memory`` that record, on a machine without a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Any] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **kwargs: self.calls.append(kwargs))
        monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_text("snapshot"))


def test_a_memory_snapshot_on_demand_and_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MisconfigurationException, match="torch finds none: leave it out"):
        MemorySnapshot(tmp_path).start()
    fake, folder = FakeMemory(monkeypatch), tmp_path / "snapshots"
    with MemorySnapshot(folder, max_entries=10) as memory:
        assert memory.dump() == str(folder / "memory-1.pickle")
        assert memory.dump("mine") == str(folder / "memory-mine.pickle")
    assert fake.calls == [{"max_entries": 10}, {"enabled": None}] and not memory.recording
    with pytest.raises(MisconfigurationException, match="nothing is recorded"):
        memory.dump()

    class Full(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with (
        pytest.raises(torch.OutOfMemoryError),
        pytest.warns(UserWarning, match=r"Out of memory: .*out-of-memory\.pickle"),
    ):
        with MemorySnapshot(folder, "run") as memory:
            trainer(tmp_path).fit(Full(), loader())
    assert sorted(p.name for p in folder.iterdir()) == [
        "memory-1.pickle", "memory-mine.pickle", "run-out-of-memory.pickle"
    ]  # fmt: skip
    with pytest.raises(ZeroDivisionError), MemorySnapshot(folder, "other"):
        raise ZeroDivisionError
    assert not [*folder.glob("other*")] and fake.calls[-1] == {"enabled": None}
    with pytest.raises(MisconfigurationException, match="max_entries"):
        MemorySnapshot(folder, max_entries=0)
