"""``treadle replay``: run a micro-batch again whose loss or gradients were not finite."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from treadle.replay import read_bundle, run_bundle

__all__ = ["add_replay_command"]


def add_replay_command(commands: Any) -> None:
    """Add ``replay`` to the subparsers of a command line."""
    parser = commands.add_parser(
        "replay",
        help="run a batch that was not finite again; exit status 1 if it comes out differently",
        description="Run again the batch in a file that on_nonfinite wrote. This imports the module's code.",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="such as nonfinite/epoch=0-step=12-batch=12-rank=0.replay")
    parser.add_argument("--module", metavar="WHERE:CLASS", help="path/to/file.py:Class or package.module:Class")
    parser.set_defaults(run=_command)


def _command(given: argparse.Namespace) -> int:
    bundle = read_bundle(given.bundle)
    _line("batch", f"epoch {bundle['epoch']}, batch_idx {bundle['batch_idx']}, global_step {bundle.get('step')}")
    _line("process", f"rank {bundle.get('rank')} of {bundle.get('world_size')}")
    done = run_bundle(bundle, given.module)
    found = done.findings
    _line("loss", f"{_number(found.loss)}, in the run {_number(done.recorded)}: {_verdict(done.same_loss)}")
    _line("gradients", f"{', '.join(found.gradients) or 'none'} not finite: {_verdict(done.same_gradients)}")
    _line("layer", found.layer or "no layer has an output that is not finite")
    if bundle.get("torch") != str(torch.__version__):
        _line("torch", f"{torch.__version__}, in the run {bundle.get('torch')}")
    _line("result", "reproduced" if done.reproduced else "NOT reproduced")
    return 0 if done.reproduced else 1


def _line(name: str, text: str) -> None:
    print(f"{name:<10} {text}", flush=True)


def _verdict(same: bool | None) -> str:
    return "not compared" if same is None else "identical" if same else "different"


def _number(loss: Tensor | None) -> str:
    return "none" if loss is None else repr(loss.cpu().double().item())  # MPS has no float64
