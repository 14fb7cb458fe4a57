"""Which operators ran on the CPU and on devices, by PyTorch's own profiler."""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, ClassVar, Final

import torch
from torch import nn
from torch.autograd.profiler import record_function

from treadle.profilers.layer_names import LayerNames
from treadle.profilers.operator_table import operator_table
from treadle.profilers.profiler import Profiler, write_file
from treadle_fabric import MisconfigurationException, PathLike, check_flag, check_integer, near_names, rank_zero_info

__all__ = ["PyTorchProfiler"]

_STEP_OF: Final = {"validate": "validation_step", "test": "test_step", "predict": "predict_step"}
_BATCH: Final = "run_training_batch"
_RECORDING: Final = ("RECORD", "RECORD_AND_SAVE")


class PyTorchProfiler(Profiler):
    """Records operators with ``torch.profiler``: a table, and a trace for chrome://tracing or Perfetto.

    By default the first step is left out, the second one warms up, and the three steps after it are recorded. A step is
    a training batch in fit, else a call of ``validation_step``, ``test_step`` or ``predict_step``; in a Fabric loop it
    is the first action whose name ends in one of ``STEP_FUNCTIONS`` or is "run_training_batch".

    Args:
        dirpath: The folder of report and traces; see :class:`Profiler`.
        filename: See :class:`Profiler`.
        group_by_input_shapes: One row for each operator and shape of its inputs. Default: False.
        emit_nvtx: Give the actions to NVIDIA's profilers instead: run the script under ``nsys``. Default: False.
        export_to_chrome: Write a trace of each recording, ``{stage}-{filename}-step=N.pt.trace.json``. Default: True.
        row_limit: The rows of the table; -1 for all. Default: 20.
        sort_by_key: One of ``AVAILABLE_SORT_KEYS``. Default: "cuda_time_total" where there is CUDA, else
            "cpu_time_total".
        record_module_names: Also record the forward pass of each layer under its name. Default: True.
        table_kwargs: Arguments of torch's own table, which is then printed instead of one that fits 100 columns.
        **profiler_kwargs: Arguments of ``torch.profiler.profile``. ``schedule`` decides which steps are recorded, and
            ``on_trace_ready`` gets the recordings instead of ``export_to_chrome``.

    Attributes:
        profiler: The ``torch.profiler.profile`` while it runs; else None.
        function_events: The operators of the last recording; None before it.

    Raises:
        MisconfigurationException: an argument is wrong.
    """

    STEP_FUNCTIONS: ClassVar[set[str]] = {"training_step", "validation_step", "test_step", "predict_step"}
    AVAILABLE_SORT_KEYS: ClassVar[set[str]] = {
        "cpu_time", "cpu_time_total", "self_cpu_time_total", "cpu_memory_usage", "self_cpu_memory_usage",
        "cuda_time", "cuda_time_total", "self_cuda_time_total", "cuda_memory_usage", "self_cuda_memory_usage", "count",
    }  # fmt: skip

    def __init__(
        self,
        dirpath: PathLike | None = None,
        filename: str | None = None,
        group_by_input_shapes: bool = False,
        emit_nvtx: bool = False,
        export_to_chrome: bool = True,
        row_limit: int = 20,
        sort_by_key: str | None = None,
        record_module_names: bool = True,
        table_kwargs: dict[str, Any] | None = None,
        **profiler_kwargs: Any,
    ) -> None:
        super().__init__(dirpath, filename)
        self._options = _checked(
            group_by_input_shapes=group_by_input_shapes,
            emit_nvtx=emit_nvtx,
            export_to_chrome=export_to_chrome,
            record_module_names=record_module_names,
        )
        self._row_limit = check_integer("row_limit", row_limit, minimum=-1)
        self._sort_by = self._checked_key(sort_by_key)
        self._table_kwargs = dict(table_kwargs or {})
        self._arguments = _torch_arguments(profiler_kwargs, group_by_input_shapes)
        self.profiler: torch.profiler.profile | None = None
        self.function_events: Any = None
        self._averages: Any = None
        self._layers = LayerNames(record_module_names)
        self._running: dict[str, list[Any]] = {}  # the open records of each action
        self._steps, self._recorded_at = 0, 0
        self._step_name, self._ended = "", False
        self._nvtx: ExitStack | None = None

    def _checked_key(self, key: str | None) -> str:
        if key is None:
            return "cuda_time_total" if torch.cuda.is_available() else "cpu_time_total"
        if key not in self.AVAILABLE_SORT_KEYS:
            raise MisconfigurationException(
                f"sort_by_key={key!r} of PyTorchProfiler must be one of {', '.join(sorted(self.AVAILABLE_SORT_KEYS))}."
                f" {near_names(str(key), sorted(self.AVAILABLE_SORT_KEYS))}"
            )
        return key

    def watch(self, module: nn.Module) -> None:
        """Take the module whose layers are named; a Trainer gives its own, a Fabric loop may call it."""
        self._layers.module = module

    def begin(self) -> None:
        """Forget the recording of an earlier stage.

        Raises:
            MisconfigurationException: ``emit_nvtx`` needs CUDA.
        """
        if self._options["emit_nvtx"] and not torch.cuda.is_available():
            raise MisconfigurationException("emit_nvtx=True needs a CUDA device, and torch finds none: leave it out.")
        self.finish()
        self.function_events = self._averages = None
        self._steps, self._ended = 0, False
        self._step_name = _BATCH if self.stage == "fit" else _STEP_OF.get(self.stage or "", "")

    def start(self, action_name: str) -> None:
        """Begin an action: a range of the trace, while steps are recorded."""
        if self.profiler is None and self._nvtx is None and not self._ended:
            self._begin_recording()
        if self._nvtx is not None or self._records_now:
            self._running.setdefault(action_name, []).append(record := record_function(f"[pl][profile]{action_name}"))
            record.__enter__()  # type: ignore[no-untyped-call]

    def stop(self, action_name: str) -> None:
        """End an action; the end of a step may begin or end a recording."""
        if records := self._running.get(action_name):
            records.pop().__exit__(None, None, None)
        if not self._step_name and self._is_step(action_name):
            self._step_name = action_name
        if self.profiler is not None and action_name.endswith(self._step_name) and self._is_step(action_name):
            self._steps += 1
            try:
                self.profiler.step()
            except BaseException:  # torch's profiler is between two states, in which stopping it crashes the process
                self.profiler, self._ended = None, True
                raise
            self._layers.record(self._records_now)

    def _is_step(self, action_name: str) -> bool:
        return action_name == _BATCH or action_name.rpartition(".")[2] in self.STEP_FUNCTIONS

    @property
    def _records_now(self) -> bool:
        return self.profiler is not None and self.profiler.current_action.name in _RECORDING

    def _begin_recording(self) -> None:
        if self._options["emit_nvtx"]:
            self._nvtx = ExitStack()
            self._nvtx.enter_context(torch.cuda.profiler.profile())
            self._nvtx.enter_context(torch.autograd.profiler.emit_nvtx())  # type: ignore[no-untyped-call]
        else:
            schedule = self._arguments.get("schedule") or torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1)
            arguments = {**self._arguments, "schedule": schedule, "on_trace_ready": self._ready}
            self.profiler = torch.profiler.profile(**arguments)
            self.profiler.start()
        self._layers.record(self._nvtx is not None or self._records_now)

    def _ready(self, profiler: torch.profiler.profile) -> None:
        """Take a recording that is complete."""
        self._recorded_at = self._steps
        self.function_events = profiler.events()  # type: ignore[no-untyped-call]
        self._averages = profiler.key_averages(group_by_input_shape=self._options["group_by_input_shapes"])
        own: Callable[..., Any] | None = self._arguments["on_trace_ready"]
        if own is not None:
            own(profiler)
        elif self._options["export_to_chrome"]:
            path = self.path_of(".pt.trace.json", f"step={self._steps}")
            with tempfile.TemporaryDirectory() as folder:
                profiler.export_chrome_trace(made := os.path.join(folder, "trace.json"))
                with open(made, "rb") as file:
                    write_file(path, file.read())
            rank_zero_info(f"{type(self).__name__}: {path}")

    def finish(self) -> None:
        """End the recording, until :meth:`begin`; a window of steps that is not complete yet is kept as it is."""
        self._ended = True
        self._layers.record(False)
        for records in self._running.values():
            while records:
                records.pop().__exit__(None, None, None)
        profiler, self.profiler = self.profiler, None
        if profiler is not None:
            profiler.stop()
        nvtx, self._nvtx = self._nvtx, None
        if nvtx is not None:
            nvtx.close()

    def summary(self) -> str:
        """Return the table of operators of the last recording; a recording that runs ends."""
        self.finish()
        if self._options["emit_nvtx"]:
            return ""
        if self._averages is None:
            return (
                f"{self.title}\nNo step was recorded: there were {self._steps}, and the schedule begins later. Use"
                " `schedule=torch.profiler.schedule(wait=0, warmup=0, active=1)` to record from the first step on."
            )
        title = f"{self.title}\nThe last recording ended with step {self._recorded_at} of {self._steps}."
        if self._table_kwargs or self._options["group_by_input_shapes"]:
            arguments = {"sort_by": self._sort_by, "row_limit": self._row_limit, **self._table_kwargs}
            return f"{title}\n{self._averages.table(**arguments)}"
        return "\n".join([title, *operator_table(self._averages, self._sort_by, self._row_limit)])

    def __getstate__(self) -> dict[str, Any]:
        """A copy has the options; the recording stays with this process."""
        nothing = dict.fromkeys(("profiler", "function_events", "_averages", "_nvtx"))
        layers = LayerNames(self._options["record_module_names"])
        return {**self.__dict__, **nothing, "_running": {}, "_layers": layers}


def _checked(**flags: Any) -> dict[str, bool]:
    for name, value in flags.items():
        check_flag(f"PyTorchProfiler: {name}", value)
    return flags


def _torch_arguments(given: Mapping[str, Any], shapes: bool) -> dict[str, Any]:
    """Check the arguments of ``torch.profiler.profile``."""
    known = list(inspect.signature(torch.profiler.profile).parameters)
    for name in given:
        if name not in known:
            raise MisconfigurationException(
                f"PyTorchProfiler got {name!r}, which is no argument of it or of torch.profiler.profile."
                f" {near_names(name, known)}"
            )
    schedule, ready = given.get("schedule"), given.get("on_trace_ready")
    if schedule is not None and (not callable(schedule) or not isinstance(schedule(0), torch.profiler.ProfilerAction)):
        raise MisconfigurationException(
            f"schedule={schedule!r} must be a function of the step that returns a torch.profiler.ProfilerAction: use"
            " torch.profiler.schedule(wait=..., warmup=..., active=...)."
        )
    if ready is not None and not callable(ready):
        raise MisconfigurationException(f"on_trace_ready={ready!r} must be a function of the torch.profiler.profile.")
    arguments = {**given, "on_trace_ready": ready}
    arguments["record_shapes"] = given.get("record_shapes", False) or shapes
    return arguments
