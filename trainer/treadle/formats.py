"""Checkpoints of Lightning 1, in the keys of Lightning 2."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping
from typing import Any, Final

__all__ = ["SCALERS", "modernize"]

_BEFORE: Final = ("hparams", "module_arguments")  # what the hyper-parameters were called
_OF_CALLBACKS: Final = {
    "checkpoint_callback_best_model_score": ("ModelCheckpoint", "best_model_score"),
    "checkpoint_callback_best_model_path": ("ModelCheckpoint", "best_model_path"),
    "checkpoint_callback_best": ("ModelCheckpoint", "best_model_score"),
    "early_stop_callback_wait": ("EarlyStopping", "wait_count"),
    "early_stop_callback_patience": ("EarlyStopping", "patience"),
}
"""Before 1.0, states of callbacks were entries of the checkpoint: the callback, and what the value is called in it."""
_MOVED_LOOPS: Final = (
    ("epoch_loop.batch_loop.optimizer_loop.", "epoch_loop.automatic_optimization."),
    ("epoch_loop.batch_loop.manual_loop.", "epoch_loop.manual_optimization."),
)
SCALERS: Final = (
    "MixedPrecision", "MixedPrecisionPlugin", "NativeMixedPrecisionPlugin", "AMPGradScalerPlugin",
    "native_amp_scaling_state",
)  # fmt: skip
"""The keys under which releases of Lightning have the state of the gradient scaler."""


def modernize(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint of Lightning 1 in the keys of Lightning 2, and any other checkpoint as it is.

    Entries that are called otherwise now are there under both names, for the hooks of a module that know the old one.
    """
    version = re.match(r"(\d+)\.(\d+)", str(checkpoint.get("pytorch-lightning_version", "")))
    release = (int(version[1]), int(version[2])) if version else (0, 0)
    if release >= (2, 0) or "treadle" in checkpoint:
        return checkpoint
    new = dict(checkpoint)
    old = next((key for key in _BEFORE if isinstance(checkpoint.get(key), Mapping | Namespace)), None)
    if old is not None:
        new.setdefault("hyper_parameters", checkpoint[old])
    states: dict[str, Any] = {_name(key): state for key, state in (checkpoint.get("callbacks") or {}).items()}
    for key, (callback, name) in _OF_CALLBACKS.items():
        if key in checkpoint:
            states.setdefault(callback, {})[name] = checkpoint[key]
    if states:
        new["callbacks"] = states
    loops = checkpoint.get("loops")
    if isinstance(loops, Mapping) and "fit_loop" in loops:
        # Before 1.6 the progress was not what the run went on from, and the counters beside it were
        fit = _loop(loops["fit_loop"]) if release >= (1, 6) else None
        new["loops"] = {**loops, "fit_loop": fit}
    return new


def _name(key: Any) -> Any:
    """What the state of a callback is called now; until 1.4 its class was the key."""
    if isinstance(key, type):
        return key.__qualname__
    if isinstance(key, str) and key.startswith("ModelCheckpoint{"):  # until 1.8 with one argument more
        return re.sub(r", 'save_on_train_epoch_end': (True|False|None)", "", key)
    return key


def _loop(state: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for key, value in state.items():
        for old, new in _MOVED_LOOPS:
            key = key.replace(old, new, 1) if key.startswith(old) else key
        found[key] = value
    return found
