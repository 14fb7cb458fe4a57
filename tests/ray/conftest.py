"""One cluster of Ray for all tests; starting one takes seconds."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest
from tests.processes import importing_tests, wait_until


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A cluster of this machine; its workers import tests. When it ends, none of its processes is left."""
    import ray

    before = set(psutil.Process().children(recursive=True))
    with pytest.MonkeyPatch.context() as patch:
        told = {
            "RAY_AUTH_MODE": "disabled",  # else Ray warns that it made a token in the user's home
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # an actor that takes seconds to start
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        }
        for name, value in {**importing_tests(), **told}.items():
            patch.setenv(name, value)
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
        try:
            yield
        finally:
            ray.shutdown()
            left = [process for process in psutil.Process().children(recursive=True) if process not in before]
            wait_until(lambda: not any(map(_runs, left)), timeout=30)


def _runs(process: psutil.Process) -> bool:
    return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)


@pytest.fixture(autouse=True)
def no_process_left(isolated: None) -> None:
    """The processes of the cluster stay until its end."""
