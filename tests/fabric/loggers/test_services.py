"""What the loggers of all tracking services have in common.

Tests of ``treadle_fabric.loggers.service``, ``treadle_fabric.loggers.saved_checkpoints``.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest

from treadle.loggers import CometLogger, MLFlowLogger, TrackioLogger, WandbLogger
from treadle_fabric import rank_zero_only
from treadle_fabric.loggers.saved_checkpoints import SavedCheckpoints

CLIENTS = {CometLogger: "comet_ml", MLFlowLogger: "mlflow", TrackioLogger: "trackio", WandbLogger: "wandb"}
pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, CLIENTS.values())), reason="a client is not installed"
)


def test_no_client_is_imported_before_something_is_logged() -> None:
    program = f"""
        import pickle, sys
        import treadle
        from treadle.loggers import *
        from treadle_fabric import rank_zero_only
        made = [CometLogger(online=False), MLFlowLogger(), TrackioLogger(), WandbLogger(offline=True)]
        copies = [pickle.loads(pickle.dumps(logger)) for logger in made]
        rank_zero_only.rank = 1
        for logger in made + copies:  # on another rank nothing is ever begun
            logger.log_metrics({{"a": 1.0}}, 0)
            logger.log_hyperparams({{"lr": 1}})
            logger.log_image("a", [object()])
            logger.log_table("a", data=[[1]])
            logger.resume({{"run": "x"}})
            logger.branch({{"run": "x"}})
            logger.begin_anew()
            logger.after_save_checkpoint(None)
            logger.experiment.anything()
            logger.save()
            logger.finalize("success")
            logger.state_dict(), logger.name, logger.version, logger.save_dir
        print([name for name in {[*CLIENTS.values()]!r} if name in sys.modules])
    """
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(program)], capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
    assert os.listdir() == []


class Saves(SimpleNamespace):
    """Has what loggers read of a checkpoint callback."""

    monitor, mode, save_last, save_top_k, save_weights_only = "loss", "min", None, 1, False
    every_n_epochs, best_model_score, best_model_path, last_model_path = 1, None, "", ""
    best_k_models: dict[str, Any] = {}


def test_each_checkpoint_is_sent_once_when_it_is_due(tmp_path: Path) -> None:
    for number, name in enumerate(("a.ckpt", "b.ckpt", "last.ckpt")):
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, (number, number))
    paths = [str(tmp_path / name) for name in ("a.ckpt", "b.ckpt", "last.ckpt", "gone.ckpt")]
    saves = Saves(
        best_k_models={paths[1]: 0.5, paths[0]: 0.7, paths[3]: 0.9}, best_model_path=paths[1], best_model_score=0.5,
        last_model_path=paths[2],
    )  # fmt: skip
    at_once, at_the_end, never = SavedCheckpoints("all"), SavedCheckpoints(True), SavedCheckpoints(False)
    assert [(c.name, c.score, c.aliases) for c in at_once.saved(saves)] == [
        ("a.ckpt", 0.7, ["latest"]), ("b.ckpt", 0.5, ["latest", "best"]), ("last.ckpt", None, ["latest"]),
    ]  # fmt: skip
    assert at_once.saved(saves) == []
    os.utime(paths[2], (9, 9))
    assert [c.name for c in at_once.saved(saves)] == ["last.ckpt"], "a file that was written again is another one"
    assert [at_once.remaining(), at_the_end.saved(saves), never.saved(saves), never.remaining()] == [[], [], [], []]
    assert pickle.loads(pickle.dumps(at_the_end)).remaining() == []
    assert [c.name for c in at_the_end.remaining()] == ["a.ckpt", "b.ckpt", "last.ckpt"]
    assert at_the_end.remaining() == []
    saves.save_top_k = -1
    assert len(SavedCheckpoints(True).saved(saves)) == 3, "a callback that keeps all has them sent at once"


def test_remote_checkpoints_are_copied_for_as_long_as_it_takes() -> None:
    path = "memory://checkpoints-of-a-run/a.ckpt"
    with fsspec.open(path, "wb") as file:
        file.write(b"weights")
    [checkpoint] = SavedCheckpoints("all").saved(Saves(best_model_path=path, best_model_score=0.5))
    with checkpoint.local() as copied:
        assert (Path(copied).name, Path(copied).read_bytes()) == ("a.ckpt", b"weights")
    assert not Path(copied).parent.exists()


def test_a_state_of_another_kind_is_ignored() -> None:
    assert rank_zero_only.rank == 0
    for kind in CLIENTS:
        logger = kind()
        assert logger.state_dict() == {}
        logger.resume({})
        logger.branch({})
        assert logger.state_dict() == {}
