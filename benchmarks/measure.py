"""Runs contestants in processes of their own, by turns, and turns times into costs."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from instructions import instructions_a_step
from items import Item

__all__ = ["Result", "Worker", "measure"]

_HERE = Path(__file__).resolve().parent
_COLUMNS, _LINES = 120, 40


@dataclass
class Result:
    """What one item gave.

    Args:
        item: The row.
        cost: Contestant -> the cost in the item's unit (for the reference, its own value). Best of the rounds.
        typical: The same as the median over the rounds.
        rounds: Contestant -> the value of each round.
        notes: Contestant -> why it did not take part, or what there is to say.
    """

    item: Item
    cost: dict[str, float] = field(default_factory=dict)
    typical: dict[str, float] = field(default_factory=dict)
    rounds: dict[str, list[float]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """Treadle's cost as a share of Lightning's."""
        lightning, treadle = self.cost.get("lightning"), self.cost.get("treadle")
        return None if lightning is None or treadle is None or lightning <= 0 else treadle / lightning

    @property
    def ok(self) -> bool | None:
        """Whether Treadle is within the bars; None where that cannot be said."""
        return self.item.passed(self.cost.get("lightning"), self.cost.get("treadle"))


def _environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    environment = dict(os.environ)
    # Relative entries would point elsewhere from a worker's folder.
    paths = [str(Path(part).resolve()) for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part]
    environment["PYTHONPATH"] = os.pathsep.join([str(_HERE), *paths])
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # or each process compiles the packages anew
    environment |= {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TERM": "xterm",
        "COLUMNS": str(_COLUMNS),
        "LINES": str(_LINES),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return environment | (extra or {})


class Worker:
    """A process that runs one contestant; its terminal is a pseudo-terminal that somebody reads, as a user's is."""

    def __init__(self, folder: str, extra: dict[str, str] | None = None) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", _LINES, _COLUMNS, 0, 0))
        read_end, write_end = os.pipe()
        self._tail = b""
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(_HERE / "worker.py"), str(write_end)],
            stdin=subprocess.PIPE,
            stdout=slave,
            stderr=slave,
            pass_fds=(write_end,),
            cwd=folder,
            env=_environment(extra),
            start_new_session=True,
            text=True,
        )
        os.close(slave)
        os.close(write_end)
        self._answers: IO[str] = os.fdopen(read_end)
        self._drain = threading.Thread(target=self._read_terminal, daemon=True)
        self._drain.start()

    def _read_terminal(self) -> None:
        with contextlib.suppress(OSError):
            while chunk := os.read(self._master, 65536):
                self._tail = (self._tail + chunk)[-4000:]

    def send(self, **request: Any) -> None:
        """Gives a command without waiting for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def receive(self) -> Any:
        """The answer to the oldest command.

        Raises:
            RuntimeError: With the worker's traceback, or what it last printed if it died.
        """
        line = self._answers.readline()
        if not line:
            raise RuntimeError(f"a worker died: {self._tail.decode(errors='replace')}")
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(str(reply["error"]))
        return reply["answer"]

    def ask(self, **request: Any) -> Any:
        """A command and its answer."""
        self.send(**request)
        return self.receive()

    def close(self) -> None:
        """Ends the process, and whatever it started."""
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._answers.close()
        os.close(self._master)


def measure(item: Item, rounds: int, clock: str = "wall", together: tuple[Item, ...] = ()) -> Result:
    """Measures one item; the contestants take turns, and who begins changes from round to round.

    ``clock`` is "wall", or "cpu" for the processor time of the worker. ``together`` are the items of which instructions
    are counted: the first of them that is measured counts for all.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        if item.kind == "slope":
            return _slopes(item, rounds, clock, folder)
        if item.kind == "ddp":
            return _ddp(item, rounds, clock, folder)
        if item.kind == "import":
            return _imports(item, rounds, clock, folder)
        if item.kind == "instructions":
            return _instructions(item, together or (item,), folder)
        return _frames(item, folder)


def _slopes(item: Item, rounds: int, clock: str, folder: str) -> Result:
    result = Result(item)
    workers: dict[str, Worker] = {}
    times: dict[str, list[list[float]]] = {}
    try:
        for name in item.contestants:
            home = Path(folder, name)
            home.mkdir()
            worker = Worker(str(home))
            workers[name] = worker
            worker.send(do="prepare", contestant=name, item=item.key, clock=clock)
        for name in list(workers):
            problem = workers[name].receive()
            if problem is None:
                problem = _warm_up(workers[name], item)
            if problem is not None:
                result.notes[name] = problem
                workers.pop(name).close()
        times = {name: [] for name in workers}
        order = list(workers)
        for turn in range(rounds):
            for offset in range(len(order)):
                name = order[(turn + offset) % len(order)]
                times[name].append(workers[name].ask(do="run", units=[item.short, item.long]))
        for name in order:
            if remark := workers[name].ask(do="remark", item=item.key):
                result.notes[name] = remark
    finally:
        for worker in workers.values():
            worker.close()
    span = item.long - item.short
    for name, pairs in times.items():
        result.rounds[name] = [(long - short) / span * 1e6 for short, long in pairs]
        # Noise only ever adds time, so the fastest run of each length is the one closest to the truth.
        result.cost[name] = (min(pair[1] for pair in pairs) - min(pair[0] for pair in pairs)) / span * 1e6
    _over_raw(result)
    return result


def _warm_up(worker: Worker, item: Item) -> str | None:
    try:
        worker.ask(do="run", units=[item.short, item.short])
    except RuntimeError as error:
        return f"failed: {error}"
    return None


def _over_raw(result: Result) -> None:
    """From the value of each contestant to its cost over the reference, which keeps its own value."""
    raw = result.rounds.get("raw", [])
    for name, values in result.rounds.items():
        if name == "raw":
            result.typical[name] = statistics.median(values)
            continue
        result.cost[name] -= result.cost.get("raw", 0.0)
        differences = [value - reference for value, reference in zip(values, raw, strict=True)] if raw else values
        result.typical[name] = statistics.median(differences)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ddp_round(item: Item, contestant: str, clock: str, folder: str) -> float:
    """Microseconds per step of one run over two processes, which an external launcher (this one) starts."""
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "bench",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    pair = [Worker(folder, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    try:
        for worker in pair:
            worker.send(do="prepare", contestant=contestant, clock=clock)
        for worker in pair:
            problem = worker.receive()
            if problem is not None:
                raise LookupError(problem)
        for worker in pair:
            worker.send(do="ddp", contestant=contestant, short=item.short, long=item.long)
        begin, end = pair[0].receive()
        pair[1].receive()
        return float((end - begin) / (item.long - item.short) * 1e6)
    finally:
        for worker in pair:
            worker.close()


def _ddp(item: Item, rounds: int, clock: str, folder: str) -> Result:
    result = Result(item)
    values: dict[str, list[float]] = {name: [] for name in item.contestants}
    order = list(item.contestants)
    for turn in range(rounds):
        for offset in range(len(order)):
            name = order[(turn + offset) % len(order)]
            if name in result.notes:
                continue
            try:
                values[name].append(_ddp_round(item, name, clock, folder))
            except (LookupError, RuntimeError) as error:
                result.notes[name] = str(error)
                values.pop(name)
    result.rounds = values
    raw = min(values["raw"])
    result.cost["raw"], result.typical["raw"] = raw, statistics.median(values["raw"])
    for name in values:
        if name != "raw":
            result.cost[name] = (min(values[name]) / raw - 1) * 100
            result.typical[name] = (statistics.median(values[name]) / result.typical["raw"] - 1) * 100
    return result


_IMPORT = """
import json, resource, sys, time
clock = time.{clock}
def peak():
    # Not ru_maxrss where there is a choice: Linux lets a process inherit its parent's, and ours has torch.
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
    except OSError:
        scale = 1024 * 1024 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
start = clock()
import torch
begin, memory = clock(), peak()
{statement}
print(json.dumps([(begin - start) * 1e3, (clock() - begin) * 1e3, memory, peak() - memory]))
"""
_STATEMENTS = {
    "import": {
        "raw": "",
        "lightning": "from lightning import Trainer",
        "treadle": "from treadle import Trainer",
        "accelerate": "from accelerate import Accelerator",
    },
    "fabric-import": {
        "raw": "",
        "lightning": "from lightning.fabric import Fabric",
        "treadle": "from treadle_fabric import Fabric",
    },
}
_import_cache: dict[tuple[str, int], dict[str, list[list[float]] | str]] = {}


def _import_once(statement: str, clock: str, folder: str) -> list[float] | str:
    script = _IMPORT.format(statement=statement, clock="process_time" if clock == "cpu" else "perf_counter")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=folder,
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    return list(map(float, json.loads(done.stdout.splitlines()[-1])))


def _import_samples(
    key: str, contestants: tuple[str, ...], rounds: int, clock: str, folder: str
) -> dict[str, list[list[float]] | str]:
    if (key, rounds) not in _import_cache:
        statements = {name: statement for name, statement in _STATEMENTS[key].items() if name in contestants}
        # The first import compiles bytecode and fills the page cache; it says nothing about the next hundred.
        first = {name: _import_once(statement, clock, folder) for name, statement in statements.items()}
        samples: dict[str, list[list[float]] | str] = {
            name: value if isinstance(value, str) else [] for name, value in first.items()
        }
        for _ in range(rounds):
            for name, statement in statements.items():
                kept = samples[name]
                sample = _import_once(statement, clock, folder) if isinstance(kept, list) else None
                if isinstance(kept, list) and isinstance(sample, list):
                    kept.append(sample)
        _import_cache[key, rounds] = samples
    return _import_cache[key, rounds]


def _imports(item: Item, rounds: int, clock: str, folder: str) -> Result:
    result = Result(item)
    key = "import" if item.key == "rss" else item.key
    for name, samples in _import_samples(key, item.contestants, rounds, clock, folder).items():
        if isinstance(samples, str):
            result.notes[name] = samples
            continue
        column = (2 if name == "raw" else 3) if item.key == "rss" else (0 if name == "raw" else 1)
        values = [sample[column] for sample in samples]
        result.rounds[name] = values
        result.cost[name], result.typical[name] = min(values), statistics.median(values)
    return result


_instructions_cache: dict[tuple[Item, ...], tuple[dict[tuple[str, str], float], dict[str, str]]] = {}


def _instructions(item: Item, together: tuple[Item, ...], folder: str) -> Result:
    """Instructions a step: raw in thousands, the others in percent over it."""
    if together not in _instructions_cache:
        loops = [_loop(each) for each in together]
        by_hand = list(dict.fromkeys(_by_hand(each) for each in together))
        runs = {name: by_hand if name == "raw" else loops for name in item.contestants}
        counted = instructions_a_step(runs, item.short, item.long, _environment(), folder)
        _instructions_cache[together] = counted
    counts, problems = _instructions_cache[together]
    result = Result(item, notes=dict(problems))
    raw = counts.get(("raw", _by_hand(item)))
    for name in item.contestants if raw else ():
        count = raw if name == "raw" else counts.get((name, _loop(item)))
        if raw and count:
            result.rounds[name] = [count]
            result.cost[name] = result.typical[name] = count / 1000 if name == "raw" else (count / raw - 1) * 100
    return result


def _loop(item: Item) -> str:
    """The workload whose instructions are counted."""
    return item.key.removeprefix("instructions-")


def _by_hand(item: Item) -> str:
    """The workload that the loop by hand runs for the same: the Trainer's and Fabric's steps are compared to one."""
    return "step" if _loop(item) == "fabric" else _loop(item)


def _frames(item: Item, folder: str) -> Result:
    result = Result(item)
    for name in item.contestants:
        worker = Worker(folder)
        try:
            problem = worker.ask(do="prepare", contestant=name)
            if problem is not None:
                result.notes[name] = problem
                continue
            answer = worker.ask(do="frames", contestant=name)
            result.cost[name] = result.typical[name] = float(answer["library"])
            result.rounds[name] = [float(answer["library"])]
            result.notes[name] = f"{answer['other']} more of torch; " + " > ".join(answer["names"])
        except RuntimeError as error:
            result.notes[name] = str(error)
        finally:
            worker.close()
    return result
