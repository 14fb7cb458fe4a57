"""Counts of the long tests, summed over all processes that ran them."""

from __future__ import annotations

from collections import Counter

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what the tests counted."""
    counts: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed"):
        if report.when == "call":
            counts.update({k: v for k, v in report.user_properties if isinstance(v, int)})
    if counts:
        terminalreporter.section("faults")
        terminalreporter.write_line(", ".join(f"{name}: {count}" for name, count in counts.items()))
