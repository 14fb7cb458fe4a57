"""``benchmarks/gpu_smoke.py`` runs on the CPU, so that it does where a card is lent for minutes only."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SMOKE = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_smoke.py"


def smoke(*arguments: str) -> tuple[int, list[str]]:
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, str(SMOKE), "--cpu", *arguments]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=110)
    return done.returncode, (done.stdout or done.stderr).splitlines()


def test_the_checks_that_a_cpu_can_make_pass() -> None:
    """All but those that take long: compiling, and processes of their own."""
    parts = ["trains in", "Fabric loop", "resume", "file", "fused", "nonfinite", "predict", "memory", "mapped", "save"]
    status, lines = smoke("--only", *parts)
    assert status == 0 and len(lines) > 12, "\n".join(lines)
    kinds = [line[70:].split()[0] for line in lines[:-1]]
    assert set(kinds) == {"ok", "skipped"} and kinds.count("ok") >= 10, "\n".join(lines)


def test_a_check_that_fails_is_the_exit_status() -> None:
    status, lines = smoke("--only", "predict", "--seconds", "0")
    assert status == 1 and "failed" in lines[0] and lines[-1].endswith("1 failed"), "\n".join(lines)
