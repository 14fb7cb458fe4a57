"""Which functions each action called, by Python's own profiler."""

from __future__ import annotations

import io
import threading
from typing import TYPE_CHECKING, Any

from treadle.profilers.profiler import Profiler, write_file
from treadle.profilers.report import WIDTH, readable
from treadle_fabric import MisconfigurationException, PathLike, check_flag

if TYPE_CHECKING:
    import cProfile

__all__ = ["AdvancedProfiler"]


class AdvancedProfiler(Profiler):
    """Reports the functions that ran in each action, by ``cProfile``; it makes Python code several times slower.

    An action's functions are those that ran in it outside of other actions: those inside of it have tables of their
    own. Only the thread that starts the first action is measured.

    Args:
        dirpath: See :class:`Profiler`.
        filename: See :class:`Profiler`.
        line_count_restriction: The lines of each table: a number (int), or a fraction of them (float). Default: 1.0.
        dump_stats: Also write the measurements of each action into a file ``{stage}-{filename}-{action}.prof``, which
            ``pstats`` and viewers read. Default: False.

    Raises:
        MisconfigurationException: an argument is wrong.
    """

    def __init__(
        self,
        dirpath: PathLike | None = None,
        filename: str | None = None,
        line_count_restriction: float = 1.0,
        dump_stats: bool = False,
    ) -> None:
        super().__init__(dirpath, filename)
        lines = line_count_restriction
        number = isinstance(lines, (int, float)) and not isinstance(lines, bool)
        if not number or not 0 < lines <= (1 if isinstance(lines, float) else lines):
            raise MisconfigurationException(
                f"line_count_restriction={lines!r} must be a number of lines (an int from 1), or a fraction of them (a"
                " float above 0 and up to 1.0)."
            )
        check_flag("AdvancedProfiler: dump_stats", dump_stats)
        self.line_count_restriction, self.dump_stats = line_count_restriction, dump_stats
        self.profiled_actions: dict[str, cProfile.Profile] = {}
        """The measurements of each action."""
        self._running: list[str] = []  # the actions that have begun, the innermost last
        self._thread = 0
        self._ended = False

    def begin(self) -> None:
        """Forget what an earlier stage measured; what was measured before the first stage stays."""
        if self._ended:
            self.profiled_actions, self._thread, self._ended = {}, 0, False
        self._running = []

    def finish(self) -> None:
        """End what runs, and write the files of ``dump_stats``."""
        for name in self._running:
            self.profiled_actions[name].disable()
        self._running, self._ended = [], True
        if self.dump_stats:
            for name, profile in self.profiled_actions.items():
                _dump(profile, self.path_of(".prof", name))

    def start(self, action_name: str) -> None:
        """Begin to measure an action; the one around it pauses."""
        import cProfile  # only runs that measure load it

        me = threading.get_ident()
        self._thread = self._thread or me
        if me != self._thread:
            return
        if self._running:
            self.profiled_actions[self._running[-1]].disable()
        self._running.append(action_name)
        profile = self.profiled_actions.get(action_name)
        if profile is None:
            profile = self.profiled_actions[action_name] = cProfile.Profile()
        profile.enable()

    def stop(self, action_name: str) -> None:
        """End to measure an action; the one around it goes on.

        Raises:
            ValueError: The action has not begun, or another one has begun inside of it and not ended.
        """
        if threading.get_ident() != self._thread:
            return
        innermost = self._running[-1] if self._running else None
        if innermost != action_name:
            raise ValueError(
                f"The action {action_name!r} was stopped, and {innermost!r} is the last that was started and not"
                " stopped: stop actions in the opposite order."
            )
        self.profiled_actions[self._running.pop()].disable()
        if self._running:
            self.profiled_actions[self._running[-1]].enable()

    def summary(self) -> str:
        """Return a table of functions for each action, the longest action first."""
        import pstats  # only runs that measure load it

        found: list[tuple[float, str, str]] = []
        for name, profile in self.profiled_actions.items():
            stream = io.StringIO()
            stats = pstats.Stats(profile, stream=stream).strip_dirs().sort_stats("cumulative")
            stats.print_stats(self.line_count_restriction)
            lines = [line.rstrip() for line in stream.getvalue().splitlines() if line.strip()]
            table = "\n".join(line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…" for line in lines)
            found.append((stats.total_tt, name, table))  # type: ignore[attr-defined]
        found.sort(key=lambda each: each[0], reverse=True)
        return "\n\n".join([self.title, *(f"Profile stats for: {readable(name)}\n{table}" for _, name, table in found)])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "profiled_actions": {}, "_running": [], "_thread": 0}  # those cannot be copied


def _dump(profile: Any, path: str) -> None:
    import marshal  # only runs that measure load it

    profile.create_stats()
    write_file(path, marshal.dumps(profile.stats))
