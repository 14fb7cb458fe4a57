"""Decide, once per run, which methods are called at each hook."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from torch import nn

from treadle.callbacks.callback import CALLBACK_HOOKS, Callback
from treadle.metrics.bus import Results
from treadle.module import LightningDataModule, LightningModule
from treadle.module.hooks import MODULE_HOOKS, ModuleHooks
from treadle.module.overriding import by_name, check_signature, overrides, without_last
from treadle.profilers.profiler import Profiler, timed
from treadle.run.hook_names import refuse_removed_hooks, tell_of_near_names
from treadle_fabric import (
    MisconfigurationException,
    Strategy,
    UnusableResultError,
    one_or_several,
    rank_zero_info,
    rank_zero_warn,
)

if TYPE_CHECKING:
    from treadle.contracts import Trainer

__all__ = ["Dispatch", "action_of", "is_overridden"]

Listeners = tuple[Callable[..., Any], ...]
Signature = tuple[list[int], dict[tuple[int, str], Any]]
_ASSIGNABLE: Final = frozenset(
    name
    for cls in (LightningModule, Callback)
    for name in dir(cls)
    if callable(getattr(cls, name)) and not hasattr(nn.Module, name)
)
"""The methods of modules and callbacks that may be assigned to an object during a run."""
MONITORS: Final = "on_train_epoch_end of monitoring callbacks"
"""Monitoring callbacks get on_train_epoch_end in a call of their own, after the module has logged in that hook."""
_AFTER_MODULE: Final = frozenset({"on_train_batch_end", "on_validation_end", "on_train_epoch_end"})
"""Hooks in which monitoring callbacks come after the module, so that their checkpoints have the whole hook's work."""


def is_overridden(method_name: str, instance: object | None = None, parent: type | None = None) -> bool:
    """Return whether an object overrides a method of its base class.

    Args:
        method_name: The method.
        instance: The object.
        parent: The base class. Default: LightningModule, LightningDataModule or Callback, which the object is.

    Raises:
        MisconfigurationException: The base class is not known, or does not have the method.
    """
    if getattr(instance, method_name, None) is None:
        return False
    bases = (LightningModule, LightningDataModule, Callback)
    parent = parent or next((base for base in bases if isinstance(instance, base)), None)
    if parent is None or not hasattr(parent, method_name):
        what = "no LightningModule, LightningDataModule or Callback" if parent is None else f"a {parent.__name__}"
        raise MisconfigurationException(
            f"is_overridden({method_name!r}, ...): the object is {what}, which has no such method. Pass the class that"
            " has it as `parent`."
        )
    return overrides(instance, method_name, parent)


class Dispatch:
    """The hooks of a run as tuples of bound methods: callbacks first, then the module.

    Args:
        trainer: Given to the callbacks' hooks.
        module: The module.
        callbacks: The trainer's, which may change during the run; see :meth:`refresh`.
        results: Where ``self.log`` goes.
        profiler: Measures the methods. Default: nobody does.

    Attributes:
        run: Calls a function (``configure_optimizers``, a dataloader method, ...) under the name of its hook; takes the
            name, the function and its arguments. None as the function is a method that is not there: nothing runs.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        callbacks: Sequence[Callback],
        results: Results,
        profiler: Profiler | None = None,
    ) -> None:
        self.results = results
        """Where ``self.log`` goes now. Its ``hook`` is set to the hook that runs."""
        self._trainer, self._module = trainer, module
        self._table: dict[str, Listeners] = {}
        self._known: tuple[Callback, ...] = tuple(callbacks)
        self._states: dict[str, Any] = {}  # in the checkpoint, of callbacks that may still come
        self._profiler = profiler
        self.run: Callable[..., Any] = self._run if profiler is None else self._run_timed
        self._signature: Signature | None = None  # to be compared once the hooks of the set-up have run
        self._fill(callbacks)

    def refresh(self, stage: str) -> bool:
        """Take over callbacks that were added or removed, and methods that were assigned to module or callbacks.

        A callback that comes to a running fit gets its ``setup``, and its state where the fit goes on.

        Args:
            stage: The stage that runs, such as "fit".

        Returns:
            Whether anything has changed since the last time. Loops that keep listeners are then to be made anew.
        """
        signature = self._current_signature()
        if signature == self._signature:
            return False
        callbacks = self._trainer.callbacks
        check_callbacks(callbacks)
        added = [c for c in callbacks if all(c is not known for known in self._known)]
        self._known, self._signature = tuple(callbacks), signature
        self._table.clear()
        self._fill(reorder_callbacks(callbacks))
        for callback in added:
            if callback.setup is not None:
                self.run("setup", by_name(callback.setup, 2, "stage"), self._trainer, self._module, stage)
            if (state := self._states.pop(callback.state_key, None)) is not None:
                callback.load_state_dict(state)
        return True

    def keep_states(self, states: Mapping[str, Any]) -> None:
        """Keep the saved states of callbacks that the trainer does not have yet."""
        self._states = dict(states)

    def tell_of_states(self) -> None:
        """Warn of the states that no callback has taken; the first epoch begins."""
        if self._states:
            rank_zero_warn(
                "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided"
                " during `Trainer` instantiation, because their states are in it. To go on as before, please add the"
                f" following callbacks: {sorted(self._states)}."
            )
            self._states = {}

    def _current_signature(self) -> Signature:
        """What decides who listens, as far as a run may change it; cheap enough for every epoch."""
        callbacks = self._trainer.callbacks
        assigned = {}
        for owner in (self._module, *callbacks):
            own = getattr(owner, "__dict__", {})  # what is no callback is refused afterwards
            assigned.update({(id(owner), name): own[name] for name in own.keys() & _ASSIGNABLE})
        return [*map(id, callbacks)], assigned

    def _fill(self, callbacks: Sequence[Callback]) -> None:
        trainer, module = self._trainer, self._module
        for name in dict.fromkeys([*MODULE_HOOKS, *CALLBACK_HOOKS]):
            first: list[Callable[..., Any]] = []
            last: list[Callable[..., Any]] = []
            for callback in callbacks if name in CALLBACK_HOOKS else ():
                if overrides(callback, name, Callback):
                    arguments = ("trainer", "pl_module", *CALLBACK_HOOKS[name])
                    method = _callable(getattr(callback, name), name, arguments, type(callback).__qualname__)
                    late = callback.__class__.monitors and name in _AFTER_MODULE
                    (last if late else first).append(self._timed(partial(method, trainer, module), name, callback))
            if name in MODULE_HOOKS and overrides(module, name, ModuleHooks):
                method = _callable(getattr(module, name), name, MODULE_HOOKS[name], type(module).__qualname__)
                first.append(self._timed(method, name, module))
            if name == "on_train_epoch_end":
                self._table[MONITORS] = tuple(last)
            else:
                first += last
            if first:
                self._table[name] = tuple(first)

    def listeners(self, name: str) -> Listeners:
        """Return the methods to call at a hook; empty where nothing overrides the hook."""
        return self._table.get(name, ())

    def call(self, name: str, *args: Any, hook: str = "") -> None:
        """Call the methods of a hook that is not on the hot path.

        Args:
            name: the hook, or :data:`MONITORS`.
            *args: of the hook.
            hook: the hook's name, where ``name`` is another one.
        """
        listeners = self._table.get(name)
        if listeners:
            self.results.hook = hook or name
            for listener in listeners:
                listener(*args)
            self.results.hook = ""

    def _timed(self, method: Callable[..., Any], name: str, owner: object) -> Callable[..., Any]:
        return timed(self._profiler, action_of(owner, name), method) if self._profiler is not None else method

    def _run_timed(self, name: str, function: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(function, "__self__", None)
        known = isinstance(owner, (LightningModule, LightningDataModule, Callback)) or name.endswith("_dataloader")
        if known and function is not None:
            function = self._timed(function, name, owner)
        return self._run(name, function, *args, **kwargs)

    def _run(self, name: str, function: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
        if function is None:  # a method that was set to None is not there
            return None
        results = self.results
        before, results.hook = results.hook, name
        try:
            return function(*args, **kwargs)
        finally:
            results.hook = before


def _callable(method: Callable[..., Any], name: str, arguments: Sequence[str], owner: str) -> Callable[..., Any]:
    """Return a user's hook as a function of exactly ``arguments``.

    A stage is given by name; a hook of an evaluation's batches may leave out ``dataloader_idx``.
    """
    if name in ("setup", "teardown"):
        method = by_name(method, len(arguments) - 1, "stage")
    if arguments[-1:] == ("dataloader_idx",) and (shorter := without_last(method, arguments)) is not None:
        return shorter
    check_signature(method, name, arguments, owner)
    return method


def action_of(owner: object, name: str) -> str:
    """Return the name of an action in the reports of profilers, which is the one that Lightning gives it.

    Args:
        owner: the object that does it: a callback, the module, the data module, a strategy; any other one is not named.
        name: of the hook or the method.
    """
    if isinstance(owner, Callback):
        return f"[Callback]{owner.state_key}.{name}"
    for kind in (LightningModule, LightningDataModule, Strategy):
        if isinstance(owner, kind):
            return f"[{kind.__name__}]{type(owner).__name__}.{name}"
    return name


def with_model_callbacks(callbacks: Sequence[Callback], module: LightningModule) -> list[Callback]:
    """Add the callbacks of the module's ``configure_callbacks``, which replace others of their type."""
    defined = overrides(module, "configure_callbacks", LightningModule)
    extra = one_or_several(module.configure_callbacks()) if defined else []
    check_callbacks(extra)
    kinds = {type(c) for c in extra}
    if names := sorted({type(c).__name__ for c in callbacks if type(c) in kinds}):
        rank_zero_info(
            "The callbacks that `LightningModule.configure_callbacks` returned override existing callbacks passed to"
            f" Trainer: {', '.join(names)}"
        )
    return reorder_callbacks([*(c for c in callbacks if type(c) not in kinds), *extra])


def reorder_callbacks(callbacks: Sequence[Callback]) -> list[Callback]:
    """Put tuner callbacks first and checkpoint callbacks last, and leave the others in the user's order."""
    return sorted(callbacks, key=lambda c: c.__class__.call_order)  # a mock has these in the class that it mocks


def check_callbacks(callbacks: Sequence[Any]) -> None:
    """Refuse objects that are no callbacks, two with one state key, and two that decide which weights are saved."""
    seen: Mapping[str, Callback] = {}
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise MisconfigurationException(
                f"callbacks has {callback!r} of type {type(callback).__name__}; a callback derives from"
                " `treadle.Callback`" + (": pass an instance, not the class." if isinstance(callback, type) else ".")
            )
        refuse_removed_hooks(callback)
        tell_of_near_names(callback)
        if overrides(callback, "state_dict", Callback):
            key = callback.state_key
            if key in seen:
                raise UnusableResultError(
                    f"Two callbacks of type {type(callback).__qualname__} have the state key {key!r}, so a checkpoint"
                    " could keep only one: give them different arguments, or override `state_key`."
                )
            seen = {**seen, key: callback}
    if (
        len(deciding := [type(callback).__qualname__ for callback in callbacks if callback.__class__.decides_weights])
        > 1
    ):
        raise MisconfigurationException(
            f"The callbacks {' and '.join(deciding)} each decide which weights are evaluated and saved: keep one of"
            " them."
        )
