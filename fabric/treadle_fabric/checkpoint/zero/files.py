"""The files of DeepSpeed in a checkpoint folder: their names, and how they are read without running code."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any, Final

import torch

from treadle_fabric.checkpoint.folder.layout import ENGINE_TAG, LATEST
from treadle_fabric.checkpoint.host.checked import trusting
from treadle_fabric.checkpoint.torch_file import load_file
from treadle_fabric.errors import CheckpointCorruptError, CheckpointError

__all__ = ["is_deepspeed_folder", "load_engine_file", "model_files", "optimizer_files", "tag_of"]

_MODEL: Final = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER: Final = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")


class _LossScaler:
    """The fields of DeepSpeed's scaler of the loss, without its methods."""


class _DynamicLossScaler:
    """The same of the scaler whose scale changes."""


class _FragmentAddress:
    """Where a piece of a parameter lies."""


class _Mapping(dict[Any, Any]):
    """The hyper-parameters that Lightning put into the file."""


_DATA: Final = [
    (_LossScaler, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_DynamicLossScaler, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_FragmentAddress, "deepspeed.utils.tensor_fragment.fragment_address"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]
"""Classes of objects in DeepSpeed's files, and what takes their place: their fields, and no code of theirs."""


def is_deepspeed_folder(path: str) -> bool:
    """Whether a local folder is one that DeepSpeed wrote: it names its newest part, and that is there."""
    try:
        return bool(model_files(os.listdir(os.path.join(path, tag_of(path)))))
    except (OSError, CheckpointError):
        return False


def tag_of(path: str, tag: str | None = None) -> str:
    """The name of the part of a DeepSpeed folder that is read.

    Args:
        path: The folder.
        tag: The part that the user asks for. Default: the newest, as the file ``latest`` says.

    Raises:
        CheckpointError: There is no such file.
    """
    if tag is not None:
        return tag
    try:
        with open(os.path.join(path, LATEST), encoding="utf-8") as file:
            found = file.read(256).strip()
    except (OSError, UnicodeDecodeError):
        found = ENGINE_TAG if os.path.isdir(os.path.join(path, ENGINE_TAG)) else ""
    if not found or os.path.basename(found) != found:
        raise CheckpointError(
            f"{path!r} is no folder of DeepSpeed: it has no file {LATEST!r} that names a part of it. Give the folder "
            "that save_checkpoint wrote to, or the name of the part with tag=."
        )
    return found


def model_files(names: Iterable[str]) -> list[str]:
    """The files of the model, in the order of the ranks; one for all ranks unless each has a part of the weights."""
    return _in_order(names, _MODEL)


def optimizer_files(names: Iterable[str]) -> list[str]:
    """The files of the partitions of the optimizer, in the order of the ranks."""
    return _in_order(names, _OPTIMIZER)


def _in_order(names: Iterable[str], pattern: re.Pattern[str]) -> list[str]:
    found = [(match, name) for name in names if (match := pattern.fullmatch(name))]
    if any(int(match[2]) for match, _ in found):
        raise CheckpointError(
            "The folder was written by a model that DeepSpeed had cut into several parts (mp_rank_01 and more), and "
            "these cannot be put together here. Load it with DeepSpeed, with the same number of processes."
        )
    ranks = sorted((int(match[1] or 0), name) for match, name in found)
    if [rank for rank, _ in ranks] != list(range(len(ranks))):
        raise CheckpointCorruptError(
            f"The files of the ranks {[rank for rank, _ in ranks]} are there, and one of those between them is "
            "missing. Copy the whole folder, or use another checkpoint."
        )
    return [name for _, name in ranks]


def load_engine_file(path: str, checked: tuple[int, ...] | None = None, map_location: Any = "cpu") -> Any:
    """Read one of DeepSpeed's files; objects in it keep their fields, and lose their code.

    Args:
        path: The file, local or behind a URL.
        checked: Its identity, where every byte of it was checked before.
        map_location: Where its tensors go.
    """
    with torch.serialization.safe_globals(list(_DATA)), trusting([checked] if checked else []):
        return load_file(path, map_location=map_location, weights_only=True)
