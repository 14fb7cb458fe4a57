"""Save and load states of modules, optimizers and plain values, by the state dicts that a strategy gives of them."""

from __future__ import annotations

from argparse import Namespace
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, Final, cast
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from treadle_fabric.attribute_dict import AttributeDict
from treadle_fabric.checkpoint import (
    Keeping,
    PerRank,
    check_share,
    classes_in_state,
    files_mapped,
    in_memory,
    is_sharded_tensor,
    kept_by_engines,
    noting_checks,
    pack,
    placed_like,
    raise_together,
    state_of,
    tensors_on_demand,
    trusting,
    unpack,
)
from treadle_fabric.containers import entries, holds_state, leaves, update_entries, with_entries
from treadle_fabric.coordination import gather_objects, on_every_rank, on_rank_zero, once_a_node
from treadle_fabric.errors import (
    CheckpointError,
    CheckpointMismatchError,
    MisconfigurationException,
    WrongTypeError,
    near_names,
)
from treadle_fabric.rank_zero import rank_zero_warn
from treadle_fabric.strategies.strategy import Strategy
from treadle_fabric.strategies.unwrapping import class_of, user_module
from treadle_fabric.types import PathLike

__all__ = ["CheckpointingStrategy"]

Filter = Callable[[str, Any], bool]
_LATER: Final = (
    "Loading these values will need `fabric.load(..., weights_only=False)`. For a dataclass, an enum or a named tuple "
    "it is enough that `state` has one of its class in its place."
)
_LATER_IN_TRAINER: Final = (
    "To get these values, resuming and loading will need `fit(..., weights_only=False)` and "
    "`load_from_checkpoint(..., weights_only=False)`. A hyper-parameter can be passed to `load_from_checkpoint` as an "
    "argument instead; a dataclass, an enum or a named tuple needs no pickle if the argument of `__init__` is "
    "annotated with its class."
)
_SHOWN: Final = 12
_PLAIN: Final = (list, tuple, dict, AttributeDict, OrderedDict, defaultdict, deque, Namespace, SimpleNamespace)
"""Containers that stay of their type around the state dicts of what they held; all others become dicts."""
_told: MutableMapping[Strategy, set[tuple[str, str]]] = WeakKeyDictionary()
"""What each strategy has said about values that a default load does not give."""


class CheckpointingStrategy(Strategy):
    """A strategy whose state goes through its checkpoint IO: rank 0 writes a file, or all ranks write a folder."""

    def save_checkpoint(
        self,
        path: PathLike,
        state: dict[str, Any],
        storage_options: Any | None = None,
        filter: dict[str, Filter] | None = None,
        keeping: Keeping | None = None,
    ) -> None:
        """Rank 0 writes, or all ranks where the checkpoint IO shares that out; all learn whether it was done."""
        if isinstance(path, dict):  # the checkpoint first, as a Trainer's strategy of Lightning takes it
            path, state = cast("PathLike", state), cast("dict[str, Any]", path)
        filters = filter or {}
        _check_state(path, state)
        _check_filters(state, filters)
        with kept_by_engines():
            content = self.as_stored({key: _plain(self, value, keeping is None) for key, value in state.items()})
        for key, keep in filters.items():
            content[key] = {name: value for name, value in content[key].items() if keep(name, value)}

        def write() -> None:  # without a result: what a user's CheckpointIO returns need not be something to send
            self.checkpoint_io.save_checkpoint(self._packed(content, path, keeping), path, storage_options)

        if self.checkpoint_io.sharded:
            write()
        else:
            on_rank_zero(self, write, f"could not write {str(path)!r}")

    def wait_for_saves(self, failure: str = "could not write a checkpoint") -> None:
        if self.checkpoint_io.after_saves is None:
            return
        if self.checkpoint_io.sharded:
            raise_together(self.checkpoint_io.wait, f"A rank {failure}")
        else:
            on_rank_zero(self, self.checkpoint_io.wait, failure)

    def as_stored(self, content: dict[str, Any]) -> dict[str, Any]:
        """The content in tensors that the checkpoint IO takes; every rank calls this. Default: as it is."""
        return content

    def _packed(self, content: dict[str, Any], path: PathLike, keeping: Keeping | None) -> dict[str, Any]:
        """The content in plain values; what does not come back from a default load is told, once."""
        try:
            packed = pack(content, keeping or Keeping())
        except CheckpointError as e:
            raise CheckpointError(f"The checkpoint {str(path)!r} was not written: {e}") from e
        told = _told.setdefault(self, set())
        pickled, left_out = (_news(found, told) for found in (packed.pickled, packed.left_out))
        if pickled:
            rank_zero_warn(
                f"{pickled}: such values are kept pickled, in a part of the checkpoint that only an explicit "
                "`weights_only=False` reads, because unpickling can run code. Everything else loads without it. "
                + (_LATER if keeping is None else _LATER_IN_TRAINER)
            )
        if left_out:
            rank_zero_warn(
                f"{left_out}: such values cannot be pickled, and are left out of the checkpoint. Pass a "
                "hyper-parameter to `load_from_checkpoint` as an argument, or leave it out with "
                "`save_hyperparameters(ignore=...)`; make other values anew when you load."
            )
        return packed.content

    def load_checkpoint(
        self,
        path: PathLike,
        state: Module | Optimizer | dict[str, Any] | None = None,
        strict: bool = True,
        weights_only: bool | None = None,
        classes: Collection[type] = (),
        together: bool = True,
    ) -> dict[str, Any]:
        """Every rank reads the file; the first of each node checks it, before the others read."""
        with files_mapped():  # what only this function refers to ends inside
            return self._loaded(path, state, strict, weights_only, classes, together)

    def _loaded(
        self,
        path: PathLike,
        state: Module | Optimizer | dict[str, Any] | None,
        strict: bool,
        weights_only: bool | None,
        classes: Collection[type],
        together: bool,
    ) -> dict[str, Any]:
        if isinstance(state, Mapping) and not state:
            raise MisconfigurationException("state={} asks for nothing. Leave it out to get all that the file holds.")
        if state is not None and not isinstance(state, (Module, Optimizer)):
            _check_state(path, state)
        self.wait_for_saves("could not write an earlier checkpoint")  # which a rank may still have in its hands
        with nullcontext() if state is None else tensors_on_demand():  # each goes where it belongs by itself
            content = self._read(path, weights_only, together and self.world_size > 1)
        if isinstance(content, dict):
            known = {*classes, *classes_in_state(state)}
            content = unpack(content, str(path), weights_only=weights_only, map_location="cpu", classes=known)
        if state is None:
            return dict(content) if isinstance(content, dict) else content
        if isinstance(state, (Module, Optimizer)):
            _restore(self, path, "", state, content, strict)
            return {}
        if not isinstance(content, dict):
            raise CheckpointMismatchError(
                f"{str(path)!r} holds an object {_kind(content)}, not a dict with the keys "
                f"{', '.join(map(repr, state))}. Use load_raw for it."
            )
        missing = [key for key in state if key not in content]
        if missing and strict:
            raise CheckpointMismatchError(
                f"{str(path)!r} has no {', '.join(map(repr, missing))}. {near_names(missing[0], content)} "
                "Correct the key, or pass strict=False to leave what is missing as it is."
            )
        remainder = dict(content)
        # Modules first: they are what does not fit, and plain values are not to be touched before that is known
        for key in sorted((key for key in state if key in content), key=lambda k: not isinstance(state[k], Module)):
            state[key] = _restore(self, path, key, state[key], remainder.pop(key), strict)
        return in_memory(remainder)

    def _read(self, path: PathLike, weights_only: bool | None, together: bool) -> Any:
        """What the checkpoint holds. Together, the ranks of a node share out the check of a folder, and those of all
        nodes that of a remote one; one rank of each node reads a file first, and so checks it for the others.
        """

        def read() -> Any:
            return self.checkpoint_io.load_checkpoint(path, map_location="cpu", weights_only=weights_only)

        if not together:
            return read()
        remote = "://" in str(path)
        group, share, shares = self.node_rank, self.local_rank, max(1, self.world_size // self.num_nodes)
        if remote:  # which is the same for all nodes
            group, share, shares = 0, self.global_rank, self.world_size

        def check() -> tuple[int, int, tuple[int, ...] | None]:
            return group, share, check_share(path, share, shares) if share < shares else None

        folders = _checked(on_every_rank(self, check, f"could not read {str(path)!r}"), shares)
        if folders is not None:
            with trusting([folders[group]]):
                return read()
        if remote:  # to read one after the other would take twice the time
            return read()
        content: list[Any] = []

        def read_first() -> set[tuple[int, ...]]:
            with noting_checks() as checked:
                content.append(read())
            return checked

        checked = once_a_node(self, read_first, f"could not read {str(path)!r}")
        if content:
            return content[0]
        with trusting(checked or ()):
            return read()


def _checked(
    found: Collection[tuple[int, int, tuple[int, ...] | None]], shares: int
) -> dict[int, tuple[int, ...]] | None:
    """Of each group of ranks which folder they have checked; None, on all ranks: some group has not checked all of one.

    Args:
        found: Of each rank its group, its share, and of which folder it has checked that.
        shares: The number of shares.
    """
    groups: dict[int, dict[int, tuple[int, ...] | None]] = {}
    for group, share, identity in found:
        groups.setdefault(group, {})[share] = identity
    checked = {}
    for group, parts in groups.items():
        identity = parts.get(0)
        if identity is None or len(parts) != shares or any(other != identity for other in parts.values()):
            return None
        checked[group] = identity
    return checked


def _check_state(path: Any, state: Any) -> None:
    if not isinstance(path, str) and not hasattr(path, "__fspath__"):
        raise MisconfigurationException(f"path={path!r} is no path. Give a string or a pathlib.Path.")
    if not isinstance(state, Mapping):
        raise WrongTypeError(
            f"state is {_kind(state)}, and must be a dict: each key names a part, such as "
            "state={'model': model, 'optimizer': optimizer, 'step': step}."
        )
    for key in state:
        if not isinstance(key, str):
            raise MisconfigurationException(f"The key {key!r} of state is {_kind(key)}, and must be a string.")


def _check_filters(state: Mapping[str, Any], filters: Mapping[str, Filter]) -> None:
    if not isinstance(filters, Mapping):
        raise WrongTypeError(f"filter is {_kind(filters)}, and must be a dict from keys of state to functions.")
    for key, keep in filters.items():
        if key not in state:
            raise MisconfigurationException(f"filter has the key {key!r}, and state has not. {near_names(key, state)}")
        if not callable(keep):
            raise WrongTypeError(
                f"filter[{key!r}] is {_kind(keep)}, and must be a function of a name and a value that returns a bool."
            )
        if not (isinstance(state[key], Mapping) or callable(getattr(state[key], "state_dict", None))):
            raise MisconfigurationException(
                f"filter[{key!r}] has nothing to filter: state[{key!r}] is {_kind(state[key])}. "
                "Filter modules, optimizers and dicts."
            )


def _kind(value: Any) -> str:
    cls = class_of(user_module(value)) if isinstance(value, Module) else type(value)
    return f"of type {cls.__name__}"


def _is_stateful(value: Any) -> bool:
    return (
        callable(getattr(value, "state_dict", None))
        and callable(getattr(value, "load_state_dict", None))
        and not isinstance(value, type)
    )


def _news(found: dict[str, str], told: set[tuple[str, str]]) -> str:
    """What was not told yet, as text."""
    new = [(place, kind) for place, kind in found.items() if (place, kind) not in told]
    told.update(new)
    more = f" and {len(new) - _SHOWN} more" if len(new) > _SHOWN else ""
    return ", ".join(f"{place} ({kind})" for place, kind in new[:_SHOWN]) + more


def _plain(strategy: Strategy, value: Any, stateful: bool, within: tuple[int, ...] = ()) -> Any:
    """The value with the values of all ranks gathered and, if asked, state dicts in the place of ``stateful`` objects.

    Where rank 0 writes a single file, tensors of which ranks have parts are gathered, one after the other; on other
    ranks they are then on the meta device. A container in which nothing changes is the same object. One of a class of
    the user's, such as a dataclass or a named tuple, whose objects became state dicts is a dict by names.
    """
    if isinstance(value, PerRank):
        mine = _plain(strategy, value.value, stateful)
        return PerRank(mine) if strategy.checkpoint_io.sharded else gather_objects(strategy, mine)
    if strategy.shards_parameters and not strategy.checkpoint_io.sharded and is_sharded_tensor(value):
        whole: Tensor = value.detach().full_tensor()
        return whole.cpu() if strategy.is_global_zero else whole.to("meta")
    if stateful:
        if isinstance(value, Module):
            return strategy.get_module_state_dict(value)
        if isinstance(value, Optimizer):
            return strategy.get_optimizer_state(value)
        if _is_stateful(value):
            return _plain(strategy, state_of(value), False)
    if id(value) in within or not (stateful or isinstance(value, (dict, list, tuple))):
        return value  # what holds itself is seen when it is packed
    held = entries(value)
    new = {key: _plain(strategy, each, stateful, (*within, id(value))) for key, each in held.items()}
    if all(new[key] is each for key, each in held.items()):
        return value
    return with_entries(value, new) if type(value) in _PLAIN else new


def _restore(strategy: Strategy, path: PathLike, key: str, current: Any, saved: Any, strict: bool) -> Any:
    """What takes the place of ``current``: itself, restored, or the saved value."""
    if _is_stateful(current):
        try:
            if isinstance(current, Module):
                strategy.load_module_state_dict(current, saved, strict=strict)
            elif isinstance(current, Optimizer):
                strategy.load_optimizer_state(current, saved)
            else:
                current.load_state_dict(_state_for(strategy, current, saved))
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as e:
            what = f"state[{key!r}]" if key else "the object"
            unfit = f"{key!r} of {str(path)!r} does not fit {what}, {_kind(current)}: {e}"
            if isinstance(e, CheckpointMismatchError):  # says what to do
                raise CheckpointMismatchError(unfit) from e
            unfit = unfit.rstrip(". ")
            if isinstance(current, Optimizer):
                saved_sizes = (
                    [len(group["params"]) for group in saved["param_groups"]] if "param_groups" in saved else "?"
                )
                sizes = [len(group["params"]) for group in current.param_groups]
                raise CheckpointMismatchError(
                    f"{unfit}. It has parameter groups of the sizes {sizes}, and those in the file are {saved_sizes}:"
                    " make the same groups before loading, those too that the run added (optimizer.add_param_group)."
                ) from e
            raise CheckpointMismatchError(
                f"{unfit}. "
                "Build it as it was when the file was written" + (", or pass strict=False." if strict else ".")
            ) from e
        return current
    held, found = entries(current), entries(saved)
    if not holds_state(saved) or not any(map(_holds_stateful, held.values())):
        return _sharded_as(strategy, current, saved)
    if isinstance(current, Sequence) and isinstance(saved, Sequence) and len(held) != len(found):
        raise CheckpointMismatchError(
            f"{key!r} of {str(path)!r} has {len(found)} entries, and state has {len(held)} there."
        )
    missing = [k for k in held if k not in found]
    if missing and strict:
        raise CheckpointMismatchError(
            f"{key!r} of {str(path)!r} has no {', '.join(map(repr, missing))}. {near_names(str(missing[0]), found)}"
        )
    for k, each in held.items():
        if k in found:
            found[k] = _restore(strategy, path, f"{key}.{k}", each, found[k], strict)
    return update_entries(current, {k: found[k] for k in held if k in found})


def _holds_stateful(value: Any) -> bool:
    return any(_is_stateful(leaf) for leaf in leaves(value, lambda v: _is_stateful(v) or not holds_state(v)))


def _state_for(strategy: Strategy, current: Any, saved: Any) -> Any:
    """What an object with a state loads: tensors that are sharded in its state now are sharded again."""
    if strategy.shards_parameters and any(
        isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves(saved)
    ):
        return _sharded_as(strategy, current.state_dict(), saved)
    return in_memory(saved)


def _sharded_as(strategy: Strategy, current: Any, saved: Any) -> Any:
    """The saved value, in memory; tensors in it are sharded as those in the same places of ``current`` are."""
    if isinstance(current, Tensor) and isinstance(saved, Tensor) and saved.shape == current.shape:
        if is_sharded_tensor(current):
            return placed_like(saved, current)
        if current.is_meta and strategy.stage_groups:  # another rank has it
            return current
    held = entries(current)
    if not strategy.shards_parameters or not held or not holds_state(saved):
        return in_memory(saved)
    found = {key: _sharded_as(strategy, held.get(key), each) for key, each in entries(saved).items()}
    return with_entries(saved, found)
