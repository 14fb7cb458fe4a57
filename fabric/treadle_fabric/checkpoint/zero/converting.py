"""One file of weights out of a DeepSpeed folder."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from treadle_fabric.checkpoint.folder.layout import ENGINE_TAG, has_manifest
from treadle_fabric.checkpoint.host.mapping import files_mapped
from treadle_fabric.checkpoint.reading import load_any
from treadle_fabric.checkpoint.torch_file import save_file
from treadle_fabric.checkpoint.zero.files import is_deepspeed_folder
from treadle_fabric.checkpoint.zero.foreign import load_deepspeed_folder
from treadle_fabric.errors import CheckpointError
from treadle_fabric.types import PathLike

__all__ = ["convert_zero_checkpoint_to_fp32_state_dict"]


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: PathLike, output_file: PathLike, tag: str | None = None
) -> dict[str, Any]:
    """Make one file of a DeepSpeed folder, with the weights in float32, whole and by the names of the user's module.

    DeepSpeed need not be installed, and nothing in the folder is run. The file is a checkpoint: besides the weights, as
    "state_dict", it has what the Trainer put into the folder, but no state of optimizers. It loads with
    ``load_from_checkpoint`` and with :func:`torch.load`.

    Args:
        checkpoint_dir: The folder that a run with DeepSpeed saved, of Treadle, of Lightning or of DeepSpeed alone.
        output_file: The file to write.
        tag: Which part of the folder. Default: the newest, as its file "latest" says.

    Returns:
        What was written.

    Raises:
        CheckpointError: The folder is none of DeepSpeed, is not whole, or the file cannot be written.
    """
    path = os.fspath(checkpoint_dir)
    if not os.path.isdir(path) or (tag is None and not is_deepspeed_folder(path)):
        raise CheckpointError(
            f"{path!r} is no folder that DeepSpeed wrote. Give the folder of the checkpoint, which has a file 'latest' "
            "and a folder of partitions in it. `treadle-fabric consolidate` takes every other kind of checkpoint."
        )
    with files_mapped():
        ours = has_manifest(path) and tag in (None, ENGINE_TAG)
        content = load_any(path) if ours else load_deepspeed_folder(path, tag=tag)
        if "state_dict" not in content:  # of a hand-written loop, under names of its own
            content["state_dict"] = load_deepspeed_folder(path, tag=tag)["state_dict"]
        kept = {key: value for key, value in content.items() if key not in ("optimizer_states", "lr_schedulers")}
        kept["state_dict"] = {name: _in_float32(value) for name, value in content["state_dict"].items()}
        save_file(kept, output_file)
    return kept


def _in_float32(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().to(torch.float32).clone()
