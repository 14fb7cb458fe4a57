"""The profiler of torch-xla, whose traces have what the host and the devices of XLA do."""

from __future__ import annotations

from typing import Any, ClassVar, Final

from treadle.profilers.profiler import Profiler
from treadle_fabric import PathLike, require_package

__all__ = ["XLAProfiler"]

_STEPS: Final = ("training_step", "validation_step", "test_step", "predict_step")


class XLAProfiler(Profiler):
    """Marks the actions of a run for torch-xla's profiler, which TensorBoard and xprof show.

    The server runs while the process does, and a capture is started from outside, such as from TensorBoard or with
    ``torch_xla.debug.profiler.trace("localhost:9012", "logs")``. With ``dirpath``, each stage is written there whole,
    and no server is needed.

    Args:
        port: Of the server, on local rank 0; other ranks of the machine take the next ones. Default: 9012.
        dirpath: The folder for traces of whole stages. Default: none are written.

    Raises:
        MissingPackageError: torch-xla is not installed.
    """

    _servers: ClassVar[dict[int, Any]] = {}

    def __init__(self, port: int = 9012, dirpath: PathLike | None = None) -> None:
        super().__init__(dirpath=dirpath)
        require_package("torch_xla", "XLAProfiler", "xla", "Its last release, 2.9, goes with torch 2.9.")
        self.port = port
        self._running: dict[str, Any] = {}
        self._traces = False

    def begin(self) -> None:
        """Begin a trace, or start the server if it does not run yet."""
        import torch_xla.debug.profiler as xp  # an extra

        if self.dirpath is not None:
            if not self._traces:
                xp.start_trace(self.folder)
                self._traces = True
            return
        port = self.port + self.local_rank
        if port not in self._servers:
            self._servers[port] = xp.start_server(port, only_on_master=False)

    def start(self, action_name: str) -> None:
        """Begin to mark an action."""
        import torch_xla  # an extra

        if self.stage is None and not self._traces:
            self.begin()
        step = {"_r": 1} if action_name.endswith(_STEPS) else {}
        # Not a `Trace`: in its scope what is recorded cannot be run, and actions do that
        self._running[action_name] = mark = torch_xla._XLAC.profiler.TraceMe(action_name, **step)
        mark.__enter__()

    def stop(self, action_name: str) -> None:
        """End to mark an action."""
        mark = self._running.pop(action_name, None)
        if mark is not None:
            mark.__exit__(None, None, None)

    def finish(self) -> None:
        """End what still runs, and write the trace."""
        for action_name in [*self._running]:
            self.stop(action_name)
        if self._traces:
            import torch_xla.debug.profiler as xp  # an extra

            self._traces = False
            xp.stop_trace()
