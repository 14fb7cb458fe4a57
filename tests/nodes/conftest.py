"""Two hosts for each test, and no process left on either."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.nodes.hosts import Cluster, two_hosts


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Two hosts, which are gone afterwards."""
    with two_hosts(tmp_path) as cluster:
        yield cluster
