"""Find methods that look like hooks and would never be called: misspelled, of another class, or of Lightning 1."""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache, partial
from typing import Any, Final

from torch import nn

from treadle.callbacks.callback import CALLBACK_HOOKS, Callback
from treadle.module import LightningDataModule, LightningModule
from treadle.module.hooks import MODULE_HOOKS, DataHooks
from treadle.module.overriding import overrides
from treadle_fabric import (
    MisconfigurationException,
    PossibleUserWarning,
    RemovedHookError,
    rank_zero_deprecation,
    rank_zero_warn,
)

__all__ = ["refuse_removed_hooks", "tell_of_near_names"]

_REMOVED: Final = {
    "training_epoch_end": "on_train_epoch_end",
    "validation_epoch_end": "on_validation_epoch_end",
    "test_epoch_end": "on_test_epoch_end",
}
"""Hooks that Lightning had before 2.0, and refuses."""
_OLDER: Final = re.compile("on_|(training|validation|test|predict)_|tbptt_|tng_|get_(progress_bar|tqdm)_")
"""How the methods begin that Lightning 1 called and nobody calls today."""
_SAME_WORD: Final = {
    "val": "validation", "valid": "validation", "validate": "validation", "training": "train", "testing": "test",
    "prediction": "predict", "predicting": "predict", "optim": "optimizer", "begin": "start",
}  # fmt: skip
_STEPS: Final = ("training_step", "validation_step", "test_step", "predict_step")
_CONFIGURES: Final = (
    "configure_optimizers", "configure_callbacks", "configure_model", "configure_gradient_clipping", "optimizer_step",
    "optimizer_zero_grad", "lr_scheduler_step", "backward",
)  # fmt: skip
_LOADERS: Final = ("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader")
_OF_DATA: Final = tuple(name for name in vars(DataHooks) if not name.startswith("_"))
_SAVED: Final = ("on_save_checkpoint", "on_load_checkpoint")
_STATE: Final = ("state_dict", "load_state_dict")
_CALLED: Final[Mapping[type, tuple[str, ...]]] = {
    LightningModule: (*MODULE_HOOKS, *_STEPS, *_CONFIGURES, *_LOADERS, *_OF_DATA, *_SAVED),
    LightningDataModule: (*_LOADERS, *_OF_DATA, *_STATE, "on_exception"),
    Callback: (*CALLBACK_HOOKS, *_SAVED, *_STATE),
}
"""The methods that a trainer calls, by the class that declares them."""
_NOUN: Final = {LightningModule: "module", LightningDataModule: "data module", Callback: "callback"}
_told: dict[int, weakref.ref[object]] = {}
"""The objects whose names were looked at, by identity: they may be unhashable."""


def refuse_removed_hooks(obj: object) -> None:
    """Refuse methods of a module or a callback by which a run of Lightning 1 collected what its steps returned.

    Raises:
        RemovedHookError: a method is such a hook, which would never be called.
        MisconfigurationException: the module has a `configure_sharded_model` beside its new name.
    """
    for cls, name, _ in _methods(obj):
        if name == "configure_sharded_model" and isinstance(obj, LightningModule):
            if type(obj).configure_model is not LightningModule.configure_model:
                raise MisconfigurationException(
                    f"`{cls.__qualname__}.{name}` is never called, because there is a `configure_model`, its new name:"
                    " remove it."
                )
            rank_zero_deprecation(
                f"`{cls.__qualname__}.{name}` has another name now: rename it to `configure_model`, which makes"
                " layers where they belong, sharded or not."
            )
        if new := _REMOVED.get(name):
            raise RemovedHookError(
                f"`{cls.__qualname__}.{name}` is never called. Support for `{name}` has been removed: collect the"
                f" outputs of the steps yourself, and define `{new}(self)`, which replaces it."
            )


def tell_of_near_names(*objects: object) -> None:
    """Warn, once for each object, of methods that look like hooks and are never called.

    A method is left alone where the hook that it looks like is defined too: it is then a part of the user's own.
    Attributes that are no functions do not count.
    """
    for obj in objects:
        ref = _told.get(id(obj))
        if obj is None or (ref is not None and ref() is obj):
            continue
        _told[id(obj)] = weakref.ref(obj, partial(_forget, id(obj)))
        kinds = tuple(kind for kind in _CALLED if isinstance(obj, kind))
        for cls, name, method in _methods(obj):
            if not kinds or name.startswith("_") or not inspect.isroutine(method):
                continue
            if any(hasattr(kind, name) for kind in kinds) or hasattr(nn.Module, name):
                continue
            hook, reason = _meant(name, kinds)
            if hook and (hook == name or not any(overrides(obj, hook, kind) for kind in kinds)):
                rank_zero_warn(f"`{cls.__qualname__}.{name}` is never called{reason}", category=PossibleUserWarning)


def _forget(key: int, _: object) -> None:
    _told.pop(key, None)


def _methods(obj: object) -> Iterator[tuple[type, str, Any]]:
    """What the user's own classes of an object have, which is not only methods."""
    for cls in type(obj).__mro__:
        if cls.__module__.partition(".")[0] not in ("treadle", "treadle_fabric", "torch", "builtins"):
            yield from ((cls, name, found) for name, found in vars(cls).items())


@lru_cache(4096)
def _meant(name: str, kinds: tuple[type, ...]) -> tuple[str, str]:
    """The hook that a method may be meant for, and how the warning ends; empty where there is none."""
    called = [hook for kind in kinds for hook in _CALLED[kind]]
    others = [kind for kind in _CALLED if name.startswith("on_") and name in _CALLED[kind]]
    if others:
        nouns = " and ".join(f"{_NOUN[kind]}s" for kind in others)
        return name, f" in a {_NOUN[kinds[0]]}: it is a hook of {nouns}. Move it there."
    if _OLDER.match(name) and name not in called:
        from treadle.names.older import older  # read where a name asks

        for kind in kinds:
            if remedy := older().method(kind.__name__, name):
                return name, f": it was a hook of Lightning 1. To have it called, {remedy}."
    near = _nearest(name, tuple(dict.fromkeys(called)))
    return near, f". Did you mean {near!r}?"


def _nearest(name: str, hooks: tuple[str, ...]) -> str:
    """The hook that a name is nearly: the same words in another form, or one letter beside."""
    forms, words = _forms(name), name.lower().strip("_").split("_")
    for hook, known in _known(hooks):
        if known & forms:
            return hook
    for hook in hooks:
        pairs = zip(words, hook.split("_"), strict=False)
        unlike = [(one, other) for one, other in pairs if one != other]
        if len(words) == hook.count("_") + 1 and len(unlike) == 1 and _one_edit(*unlike[0]):
            return hook
    return ""


@cache
def _known(hooks: tuple[str, ...]) -> tuple[tuple[str, set[str]], ...]:
    return tuple((hook, _forms(hook)) for hook in hooks)


def _forms(name: str) -> set[str]:
    """The letters of a name, as they are, and with synonyms and plurals made one."""
    words = name.lower().split("_")
    same = [_SAME_WORD.get(word, word) for word in words]
    return {"".join(words), "".join(word[:-1] if len(word) > 3 and word.endswith("s") else word for word in same)}


def _one_edit(one: str, other: str) -> bool:
    """Whether a letter was added, left out, replaced, or changed places with its neighbour; digits are no slips."""
    if len(other) < 3 or any(c.isdigit() for c in one):
        return False
    short, long = sorted((one, other), key=len)
    if len(long) - len(short) > 1:
        return False
    at = next((i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), len(short))
    if len(long) > len(short):
        return short[at:] == long[at + 1 :]
    swapped = long[at + 1 : at + 2] + long[at : at + 1] + long[at + 2 :]
    return short[at + 1 :] == long[at + 1 :] or short[at:] == swapped
