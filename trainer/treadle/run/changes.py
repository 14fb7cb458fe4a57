"""What a run changes about its module and optimizers, other than weights and states."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

from treadle.module.modes import restore_modes
from treadle_fabric import FabricOptimizer, PossibleUserWarning, rank_zero_info, rank_zero_warn, with_plain_names
from treadle_fabric.strategies import own_groups

__all__ = ["ModelChanges", "group_names"]

Groups: TypeAlias = list[list[str]]
"""For each parameter group of an optimizer the names of its parameters; empty for one that the module has not."""
_SHOWN = 5


class ModelChanges:
    """What is trainable, what is in evaluation mode and what the optimizers hold: as the program made it, and now.

    What is in evaluation mode includes the norms that do not update their running statistics.

    A checkpoint keeps both. Where a resumed program makes the same as it made then, it gets what the run had when the
    checkpoint was saved; where the program was changed, its new state stays.
    """

    def __init__(self) -> None:
        self._trainable: dict[str, bool] = {}
        self._modes: dict[str, bool] = {}
        self._tracking: dict[str, bool] = {}
        self._groups: list[Groups] = []
        self._saved: Mapping[str, Any] = {}
        self._told: set[str] = set()
        self.modes_before: list[tuple[nn.Module, bool]] = []
        """The modes of all submodules before the evaluation that runs; empty outside of one."""

    def begin(self, module: nn.Module) -> None:
        """Note the module as the program made it; after ``configure_model``, before anything is restored."""
        self._trainable, self._modes = _trainable(module), self._current_modes(module)
        self._tracking = _tracking(module)

    def state_dict(self, module: nn.Module, optimizers: Iterable[FabricOptimizer]) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {
            "requires_grad": _trainable(module),
            "training": self._current_modes(module),
            "tracking": _tracking(module),
            "groups": [group_names(module, each.optimizer) for each in optimizers],
            "made": {
                "requires_grad": self._trainable,
                "training": self._modes,
                "tracking": self._tracking,
                "groups": self._groups,
            },
        }

    def _current_modes(self, module: nn.Module) -> dict[str, bool]:
        before = {id(m): mode for m, mode in self.modes_before}
        return {name: before.get(id(m), m.training) for name, m in with_plain_names(module, module.named_modules())}

    def tell_untrained(self, module: nn.Module, optimizers: Sequence[FabricOptimizer]) -> None:
        """Warn of parameters that came, or became trainable, during the run, and that no optimizer has."""
        new = {name: p for name, p in _parameters(module) if p.requires_grad and not self._trainable.get(name)}
        if not new or not optimizers:
            return
        held = {id(p) for each in optimizers for group in own_groups(each.optimizer) for p in group}
        names = [name for name, p in new.items() if id(p) not in held and name not in self._told]
        if names:
            self._told.update(names)
            rank_zero_warn(
                f"{_shown(names)} can be trained now, but no optimizer has them, so they do not learn. Add them: "
                "`self.optimizers().add_param_group({'params': ...})`.",
                category=PossibleUserWarning,
            )

    # Going on from a checkpoint

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`state_dict` returned; nothing of it is restored yet."""
        self._saved = state

    @property
    def added(self) -> list[str]:
        """The parameters that came after the saved run had begun."""
        made = self._saved.get("made", {}).get("requires_grad", {})
        return [name for name in self._saved.get("requires_grad", {}) if name not in made]

    def restore_trainable(self, module: nn.Module, *, tell: bool = False) -> None:
        """Let the parameters require gradients that did when the checkpoint was saved, and no others.

        Args:
            module: The module.
            tell: Say which parameters something has changed since they were restored.
        """
        changed = _require(module, self._wanted("requires_grad", self._trainable))
        if tell and changed:
            rank_zero_info(
                f"What is trainable was changed before the first batch ({_shown(changed)}), and is again what it was"
                " when the checkpoint was saved. To change it where a run is resumed, build the module otherwise."
            )

    def restore_modes(self, module: nn.Module) -> None:
        """Put submodules into the modes in which they were when the checkpoint was saved.

        Norms also update their running statistics, or not, as then.
        """
        modes, tracking = self._wanted("training", self._modes), self._wanted("tracking", self._tracking)
        parts = list(with_plain_names(module, module.named_modules()))
        restore_modes([(part, modes[name]) for name, part in parts if name in modes])
        for name, part in parts:
            if name in tracking:
                part.track_running_stats = tracking[name]

    def _wanted(self, key: str, built: Mapping[str, bool]) -> dict[str, bool]:
        """The values that were saved, where the program makes what it made then."""
        made = self._saved.get("made", {}).get(key, {})
        return {name: now for name, now in self._saved.get(key, {}).items() if built.get(name) is made.get(name)}

    @contextmanager
    def undone(self, module: nn.Module) -> Generator[None]:
        """While a resumed run makes its optimizers, require gradients as when it made them first."""
        if self._saved:
            _require(module, self._trainable)
        yield
        self.restore_trainable(module)

    def note_groups(self, module: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        """Note the optimizers as ``configure_optimizers`` made them."""
        self._groups = [group_names(module, optimizer) for optimizer in optimizers]

    def restore_groups(self, module: nn.Module, index: int, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """Give an optimizer the parameter groups that it had when the checkpoint was saved.

        Args:
            module: The module.
            index: The optimizer's number.
            optimizer: The optimizer.
            state: Its state in the checkpoint, with the options of each group.
        """
        wanted: Groups = self.saved_groups("groups", index)
        have, added = group_names(module, optimizer), {*self.added}
        begun = [[name for name in names if name not in added] for names in have]  # added layers are there at once now
        if have == wanted or begun != self.saved_groups("made", index):
            return
        parameters = dict(_parameters(module, remove_duplicate=False))
        if not all(name in parameters for names in wanted for name in names):
            return
        options = [dict(group) for group in state["param_groups"]]
        for group, names in zip(options, wanted, strict=True):
            group["params"] = [parameters[name] for name in names]
        kept = len(have) if have == wanted[: len(have)] else 0
        if not kept:  # groups were changed or removed, and not only added
            for group, mine in zip(options, optimizer.param_groups, strict=False):
                mine.clear()
                mine.update(group)
            kept = min(len(options), len(optimizer.param_groups))
            del optimizer.param_groups[kept:]
        for group in options[kept:]:
            labels = group.pop("param_names", None)
            if labels is not None:
                group["params"] = list(zip(labels, group["params"], strict=True))
            optimizer.add_param_group(group)

    def saved_groups(self, when: str, index: int) -> Groups:
        """The groups of an optimizer as saved: "made" by the program, or "groups" at the time; empty if not known."""
        found = (self._saved.get("made", {}) if when == "made" else self._saved).get("groups", [])
        return found[index] if index < len(found) else []

    # Hooks that ran before the checkpoint was saved, and run again

    @contextmanager
    def repeated(self, optimizers: Iterable[FabricOptimizer]) -> Generator[None]:
        """While a hook of a run that goes on runs again, add no parameter group that is there already."""
        with ExitStack() as stack:
            for each in optimizers:
                stack.enter_context(_adding_once(each))
            yield

    @contextmanager
    def unchanged(self, optimizers: Sequence[FabricOptimizer]) -> Generator[None]:
        """The same, and what a checkpoint has restored is afterwards as before: it was saved after this hook."""
        resumed = optimizers if self._saved else ()
        before = [[{**g, "params": list(g["params"])} for g in each.param_groups] for each in resumed]
        with self.repeated(optimizers):
            yield
        for each, groups in zip(resumed, before, strict=True):
            for group, old in zip(each.param_groups, groups, strict=False):
                group.clear()
                group.update(old)
            each.param_groups[:] = [*each.param_groups[: len(groups)], *groups[len(each.param_groups) :]]

    def restored(self, module: nn.Module) -> None:
        """Restore for good what hooks may have changed since; the first batch follows."""
        self.restore_trainable(module, tell=True)
        self.restore_modes(module)
        self._saved = {}


def group_names(module: nn.Module, optimizer: Optimizer) -> Groups:
    """Return, for each parameter group, the names of its parameters; empty for one that the module has not."""
    names = {id(p): name for name, p in _parameters(module)}
    return [[names.get(id(p), "") for p in group] for group in own_groups(optimizer)]


def _parameters(module: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield parameters with plain names; what ``torch.nn.utils.prune`` calls ``weight_orig`` is ``weight``."""
    buffers = {name for name, _ in with_plain_names(module, module.named_buffers())}
    found = module.named_parameters(remove_duplicate=remove_duplicate)
    for name, parameter in with_plain_names(module, found):
        own = name.removesuffix("_orig")
        yield own if own != name and f"{own}_mask" in buffers else name, parameter


def _shown(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _trainable(module: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in _parameters(module)}


def _tracking(module: nn.Module) -> dict[str, bool]:
    """Whether each norm updates its running statistics."""
    parts = with_plain_names(module, module.named_modules())
    return {name: part.track_running_stats for name, part in parts if hasattr(part, "track_running_stats")}


def _require(module: nn.Module, wanted: Mapping[str, bool]) -> list[str]:
    """Let parameters require gradients or not; return the names of those that changed.

    Those that were quantized in the meantime cannot: they stay as they are.
    """
    now = {n: p for n, p in _parameters(module) if p.is_floating_point() or p.is_complex()}
    changed = [name for name, required in wanted.items() if name in now and now[name].requires_grad is not required]
    for name in changed:
        now[name].requires_grad_(wanted[name])
    return changed


@contextmanager
def _adding_once(wrapped: FabricOptimizer) -> Generator[None]:
    optimizer = wrapped.optimizer
    add: Callable[[dict[str, Any]], None] = optimizer.add_param_group

    def once(param_group: dict[str, Any]) -> None:
        given = param_group["params"]
        params = [given] if isinstance(given, Tensor) else list(given)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not all(id(p[1] if isinstance(p, tuple) else p) in held for p in params):
            add({**param_group, "params": params})

    optimizer.__dict__["add_param_group"] = wrapped.__dict__["add_param_group"] = once
    try:
        yield
    finally:
        del optimizer.__dict__["add_param_group"]
        wrapped.__dict__["add_param_group"] = add
