"""``treadle-fabric consolidate``: one file out of a checkpoint folder."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import torch

from treadle_fabric.checkpoint import consolidate
from treadle_fabric.errors import CheckpointError, MisconfigurationException

__all__ = ["add_consolidate_command"]


def add_consolidate_command(commands: Any) -> None:
    """Add ``consolidate`` to the commands of a parser."""
    about = (
        "Make one file out of a checkpoint that is a folder. The file holds all that the folder holds, loads with "
        "every strategy, and with torch.load. A file whose name ends in .safetensors gets the weights of the model "
        "only. The folder is checked, and read in pieces: the memory that this takes does not grow with the model."
    )
    parser = commands.add_parser("consolidate", help="make one file out of a checkpoint folder", description=about)
    parser.add_argument("checkpoint_folder", metavar="CHECKPOINT", help="the folder: a local path or a URL")
    parser.add_argument(
        "--output-file",
        "--output_file",
        "--output",
        dest="output",
        metavar="FILE",
        help="the file to write, which must not be there; default: CHECKPOINT.consolidated",
    )
    parser.add_argument("--key", help="for .safetensors: the entry with the weights; default: state_dict")
    parser.add_argument("--dtype", help="for .safetensors: float32, bfloat16 or float16; default: as they are")
    parser.add_argument(
        "--strip-prefix",
        "--strip_prefix",
        default="",
        metavar="PREFIX",
        help="for .safetensors: what names lose where they begin with it, 'model.' for example",
    )
    parser.set_defaults(run=_consolidate)


def _consolidate(given: argparse.Namespace) -> int:
    dtype = getattr(torch, given.dtype.removeprefix("torch."), None) if given.dtype is not None else None
    try:
        if given.dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise MisconfigurationException(f"--dtype={given.dtype} is no type of floating-point numbers of torch.")
        written, left_out = consolidate(
            given.checkpoint_folder, given.output, key=given.key, dtype=dtype, strip_prefix=given.strip_prefix
        )
    except (CheckpointError, MisconfigurationException) as e:
        print(f"treadle-fabric: {e}", file=sys.stderr)
        return 1
    if left_out:
        print(f"treadle-fabric: not in the file: {', '.join(left_out)}.", file=sys.stderr)
    print(f"Wrote {written} ({os.path.getsize(written) / 1e6:,.1f} MB).")
    return 0
