"""What every test gets: a folder of its own, an untouched environment, and a check that it left no process behind."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import random
import signal
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch._dynamo  # seconds of work that each forked rank would do at its first optimizer

from tests.nodes.hosts import has_hosts
from tests.processes import wait_until
from treadle_fabric import rank_zero_only

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would the processes that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Also for the processes that tests start: several with many threads each fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# Helpers that multiprocessing keeps for the life of the process, and the S3 server of a module of tests.
KEPT = ("resource_tracker", "forkserver", "moto.server")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs hardware that is not there, or what has an environment of its own: an engine, a server.

    ``TREADLE_GPU_TESTS_ON=cpu`` runs ``tests/gpu`` on the CPU.
    """
    missing = {
        "gpu": "" if torch.cuda.is_available() else "no CUDA device",
        "deepspeed": "" if find_spec("deepspeed") else "DeepSpeed is not installed; `make test-deepspeed` installs it",
        "lightning": "" if find_spec("lightning") else "Lightning is not installed; `make test-lightning` installs it",
        "nodes": "" if has_hosts() else "makes hosts of namespaces, which needs root on Linux, iproute2 and util-linux",
        "ray": "" if find_spec("ray") else "Ray is not installed; `make test-ray` installs it",
        "remote": "" if find_spec("moto") and find_spec("s3fs") else "no S3 server here; `make test-remote` has one",
    }
    missing["xla"] = "" if find_spec("torch_xla") else "torch-xla is not installed; `make test-xla` installs it"
    for item in items:
        if os.environ.get("TREADLE_GPU_TESTS_ON") == "cpu" and item.path.parent.name == "gpu":
            continue
        for name, reason in missing.items():
            if reason and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what the long tests counted, summed over all processes that ran them."""
    counts: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed"):
        if report.when == "call":
            counts.update({k: v for k, v in report.user_properties if isinstance(v, int)})
    if counts:
        terminalreporter.section("faults")
        terminalreporter.write_line(", ".join(f"{name}: {count}" for name, count in counts.items()))


@pytest.fixture(scope="session")
def server() -> Iterator[Any]:
    """Runs the victims of kills; starting it takes seconds."""
    from tests.faults.forkserver import ForkServer

    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs in a fresh folder; environment, random state and torch's global switches come back as they were."""
    monkeypatch.chdir(tmp_path)
    environ = dict(os.environ)
    python_rng, torch_rng = random.getstate(), torch.get_rng_state()
    dtype, deterministic = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    rank = rank_zero_only.rank
    yield
    rank_zero_only.rank = rank
    os.environ.clear()
    os.environ.update(environ)
    random.setstate(python_rng)
    torch.set_rng_state(torch_rng)
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = benchmark
    torch.set_grad_enabled(True)
    torch.autograd.set_detect_anomaly(False)


@pytest.fixture(autouse=True)
def no_process_left(isolated: None) -> Iterator[None]:
    """Fails a test that leaves a process group or a child process behind."""
    yield
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    if grouped:
        torch.distributed.destroy_process_group()
    gc.collect(0)
    left = _children()
    if left:
        gc.collect()  # workers of a loader that is only garbage end here
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: not _children(), timeout=10, every=0.05)
        left = _children()
    if left:
        _end([process for process, _ in left])
    assert not left, f"the test left processes behind: {[name for _, name in left]}"
    assert not grouped, "the test left a process group behind; end it with the strategy's teardown or fabric's"


def _end(processes: list[psutil.Process]) -> None:
    """Kill processes without a trace in this one.

    A test that failed keeps its loader alive, in its traceback. When a worker of a loader dies, torch's handler of
    SIGCHLD raises an error wherever the main thread is, and that would break another test, or pytest itself.
    """
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        for process in processes:
            process.kill()
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: not _children(), timeout=5)
        multiprocessing.active_children()  # takes notice of those that are dead, so that the handler does not
    finally:
        signal.signal(signal.SIGCHLD, handler if handler is not None else signal.SIG_DFL)


def _children() -> list[tuple[psutil.Process, str]]:
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            name = " ".join(child.cmdline())
            if child.status() != psutil.STATUS_ZOMBIE and not any(kept in name for kept in KEPT):
                found.append((child, name))
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is marked ``apart`` in a fork; its error is printed there, and fails the test."""
    if pyfuncitem.get_closest_marker("apart") is None or pyfuncitem.get_closest_marker("gpu") is not None:
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                pyfuncitem.obj(**arguments)
                status = 0
            except BaseException:
                traceback.print_exc(file=said)
                said.flush()
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        said.seek(0)
        if status:
            pytest.fail(f"status {os.waitstatus_to_exitcode(status)}:\n{said.read()}", pytrace=False)
    return True
