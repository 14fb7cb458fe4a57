"""Messages, warnings and calls of the first process only.

Tests of ``treadle_fabric.rank_zero``.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from treadle_fabric import Fabric
from treadle_fabric.rank_zero import rank_zero_debug, rank_zero_info, rank_zero_only, rank_zero_warn

RANKS = {"RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"}
SCRIPT = """
import logging
from treadle_fabric import Fabric
from treadle_fabric.rank_zero import rank_zero_info, rank_zero_only
print(rank_zero_only.rank, rank_zero_only(lambda: "ran")())
rank_zero_info("first %s", "message")
logging.basicConfig(format="configured: %(message)s", level=logging.INFO)
rank_zero_info("second")
"""


def run(**variables: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in RANKS} | variables
    return subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=60)


def test_rank_zero_prints_each_message_once_before_and_after_logging_is_set_up() -> None:
    done = run()
    assert done.stdout.split() == ["0", "ran"]
    assert done.stderr.splitlines() == ["first message", "configured: second"]


@pytest.mark.parametrize("variables", [{"RANK": "1", "LOCAL_RANK": "0"}, {"SLURM_PROCID": "1"}])
def test_other_ranks_know_themselves_by_the_environment_and_keep_silent(variables: dict[str, str]) -> None:
    done = run(**variables)
    assert done.stdout.split() == ["1", "None"]
    assert done.stderr == ""


def test_messages_name_the_line_that_sent_them(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "treadle_fabric")
    rank_zero_info("here")
    rank_zero_debug("and here")
    assert [(r.levelname, r.filename) for r in caplog.records] == [
        ("INFO", "test_rank_zero.py"),
        ("DEBUG", "test_rank_zero.py"),
    ]
    with pytest.warns(UserWarning, match="careful") as caught:
        rank_zero_warn("careful")
    assert caught[0].filename == __file__


def test_other_ranks_do_not_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 2)
    rank_zero_warn("a warning is an error in the tests, so this would raise")  # passes if nothing is raised


def test_warnings_show_the_line_of_the_users_that_led_to_them() -> None:
    with pytest.warns(UserWarning, match="careful") as issued:
        rank_zero_warn("careful")
    assert issued[0].filename == __file__
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[type("Odd", (), {"on_odd": 1})()])
    with pytest.warns(UserWarning, match="not callable") as issued:
        fabric.call("on_odd")
    assert issued[0].filename == __file__
