"""A folder that DeepSpeed wrote by itself, or Lightning with it, read as a checkpoint."""

from __future__ import annotations

import os
from typing import Any, Final

import torch
from torch import Tensor

from treadle_fabric.checkpoint.stored.tensor import StoredTensor, stored_tensors
from treadle_fabric.checkpoint.zero.files import load_engine_file, tag_of
from treadle_fabric.checkpoint.zero.partitions import Flat, FlatContent, Partitions
from treadle_fabric.errors import CheckpointError

__all__ = ["load_deepspeed_folder", "weights_of"]

_OF_ENGINE: Final = frozenset(
    "module buffer_names optimizer param_shapes frozen_param_shapes shared_params frozen_param_fragments data_sampler "
    "random_ltd skipped_steps global_steps global_samples dp_world_size mp_world_size ds_config ds_version num_experts "
    "checkpoint_parallel_dimensions sparse_tensor_module_names universal_checkpoint_info lr_scheduler".split()
)
"""What DeepSpeed's own files have of its engine; everything else is the user's."""


def load_deepspeed_folder(path: str, map_location: Any | None = None, tag: str | None = None) -> dict[str, Any]:
    """Read a DeepSpeed folder: "state_dict", "optimizer_states" and what its writer put in besides.

    Args:
        path: The local folder.
        map_location: ``"meta"`` for tensors without content. Default: the CPU.
        tag: Which part of the folder. Default: the newest.

    Raises:
        CheckpointError: Files are missing or damaged, or hold something that could run code.
    """
    meta = str(map_location) == "meta"
    found = _partitions(path, tag, "meta" if meta else "cpu")
    content = {key: value for key, value in found.models[0].items() if key not in _OF_ENGINE}
    content["state_dict"] = {name: _tensor(value, meta) for name, value in found.weights.items()}
    if "optimizer_states" not in content:
        content["optimizer_states"] = _optimizer_states(found, meta)
    scheduler = found.models[0].get("lr_scheduler")
    if scheduler is not None and "lr_schedulers" not in content:
        content["lr_schedulers"] = [scheduler]
    return content


def weights_of(path: str, tag: str | None = None) -> dict[str, Tensor]:
    """The weights of the model in a DeepSpeed folder, whole, in float32 where DeepSpeed trained them."""
    return {name: _tensor(value, False) for name, value in _partitions(path, tag, "cpu").weights.items()}


def _partitions(path: str, tag: str | None, map_location: str) -> Partitions:
    part = os.path.join(path, tag_of(path, tag))
    try:
        names = sorted(os.listdir(part))
    except OSError as e:
        raise CheckpointError(
            f"{path!r} has no part {os.path.basename(part)!r}. Give the name of a folder in it with tag=."
        ) from e
    try:
        return Partitions(lambda name: load_engine_file(os.path.join(part, name), None, map_location), names)
    except (KeyError, TypeError, IndexError, AttributeError) as e:
        raise CheckpointError(
            f"{path!r} could not be put together: DeepSpeed's files in it lack {e}. They are of a release or of an "
            "engine that is not known here; load it with DeepSpeed."
        ) from e


def _tensor(value: Any, meta: bool) -> Any:
    if not isinstance(value, Flat):
        return value
    if meta:
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    if stored_tensors():
        return StoredTensor(FlatContent(lambda: value, value.shape, value.dtype))
    return value.whole()


def _own(value: Any) -> Any:
    """A value that parameters of a group have in common, such as the count of steps, for one of them."""
    return value.clone() if type(value) is Tensor and value.dim() == 0 else value


def _optimizer_states(found: Partitions, meta: bool) -> list[dict[str, Any]]:
    if not found.groups:
        state = found.models[0].get("optimizer")
        return [state] if isinstance(state, dict) and "param_groups" in state else []
    states: dict[int, Any] = {}
    groups: list[dict[str, Any]] = []
    for group in found.groups:
        keys = range(len(states), len(states) + len(group.names))
        groups.append({**group.options, "params": list(keys)})
        for key, name in zip(keys, group.names, strict=True):
            states[key] = {which: _own(_tensor(value, meta)) for which, value in found.states[name].items()}
    return [{"state": {key: each for key, each in states.items() if each}, "param_groups": groups}]
