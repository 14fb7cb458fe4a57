"""Decide where an epoch goes on after a restart, also with other processes or another batch size.

The order of samples does not depend on the number of processes that share it: what the order is drawn from, and how
many samples all ranks together have had, is enough to continue it, each sample once. Where the batch of all ranks
together has the size that it had, the batches are the same ones too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["Layout", "NewEpoch", "Same", "Saved", "Shifted", "decide", "size_of_batch"]

_UNSHARED = (
    "The number of processes or the batch size has changed, and the position in this training loader has a meaning for"
    " the old one only (a stream, an iterable or a batch sampler of one's own, or several loaders at once): the epoch"
    " begins anew."
)
_UNKNOWN = "The checkpoint does not tell the order of its samples: the epoch begins anew."
_SEVERAL = (
    "The batch of all ranks together has another size than in the checkpoint, and there are several training loaders:"
    " the epoch begins anew. Keep batch_size times the number of processes as it was."
)


@dataclass(frozen=True)
class Saved:
    """The position in a checkpoint, and the layout of the run that saved it. Tuples have one entry a loader.

    Attributes:
        world_size: Number of processes.
        begun: Whether the checkpoint is of an epoch, or of the time between two.
        batches: Batches of the epoch that are done; 0 where no batch is done, or none is left.
        per_step: Items of the order that all ranks together take for a batch, None where the loader has no order; None
            instead of the tuple in checkpoints that do not tell it.
        seed: What orders are drawn from, together with the epoch; None where no order is shared out.
        base: Batches of the epoch that were trained in an earlier layout.
        start: Items of the order that were trained in an earlier layout.
        end: The number of batches of this epoch, where an earlier layout changed it.
        num_batches: Batches of a usual epoch; infinity where that is unknown.
        samples: Size of the data set; None where it is unknown, or instead of the tuple.
        samplers: Class of the sampler; None where there is none, or instead of the tuple.
        sizes: Size of a batch where ``per_step`` does not tell it, because the loader has no order or the batches are
            those of a batch sampler of the user's own; None where it is unknown, or instead of the tuple.
    """

    world_size: int
    begun: bool
    batches: int
    per_step: tuple[int | None, ...] | None
    seed: int | None = None
    base: int = 0
    start: tuple[int, ...] = (0,)
    end: int | None = None
    num_batches: float = math.inf
    samples: tuple[int | None, ...] | None = None
    samplers: tuple[str | None, ...] | None = None
    sizes: tuple[int | None, ...] | None = None

    @classmethod
    def read(cls, order: Mapping[str, Any], **position: Any) -> Saved:
        """The position in the ``state_dict`` of a ``SampleOrder``; ``position``: the first three attributes."""
        known = {name: order[name] for name in (f.name for f in fields(cls)) if name in order} | position
        known = {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}
        return cls(**{"per_step": None, **known})

    @property
    def items(self) -> int:
        """The items of the order that are done; 0 where that is unknown."""
        step = self.per_step[0] if self.per_step else None
        return 0 if step is None else self.start[0] + (self.batches - self.base) * step


@dataclass(frozen=True)
class Layout:
    """The layout of the run that goes on. Tuples have one entry a loader.

    Attributes:
        world_size: Number of processes.
        per_step: As in :class:`Saved`.
        samples: As in :class:`Saved`.
        samplers: As in :class:`Saved`.
        sizes: As in :class:`Saved`.
        shared: Whether each loader draws an order that its ranks share out.
        num_batches: Batches of a usual epoch; infinity where that is unknown.
        left: Batches of the order after ``Saved.items``; None where that is unknown.
    """

    world_size: int
    per_step: tuple[int | None, ...]
    samples: tuple[int | None, ...]
    samplers: tuple[str | None, ...]
    sizes: tuple[int | None, ...] = ()
    shared: bool = True
    num_batches: float = math.inf
    left: int | None = None


@dataclass(frozen=True)
class Same:
    """The layout is the saved one: each rank goes on from its own state, to the last bit."""

    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shifted:
    """The layout is another one: the order of samples is shared out anew.

    Attributes:
        batch: The batch to go on from, counted in this layout.
        base: The batches before it that this layout does not iterate.
        start: Items of each loader's order that this layout leaves out.
        end: The number of batches of this epoch, where it is not the usual one.
        warnings: What to tell the user.
    """

    batch: int
    base: int
    start: tuple[int, ...]
    end: int | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class NewEpoch:
    """Nothing of the saved epoch is continued.

    Attributes:
        again: True: it begins anew, because its position has no meaning in this layout. False: it had ended, and the
            next one follows.
        warnings: What to tell the user.
    """

    again: bool = False
    warnings: tuple[str, ...] = ()


def decide(saved: Saved, now: Layout) -> Same | Shifted | NewEpoch:
    """What a saved position means in the layout of now."""
    unchanged, resized = saved.world_size == now.world_size, saved.sizes not in (None, now.sizes)
    if unchanged and (not saved.begun or (saved.per_step in (None, now.per_step) and not resized)):
        return Same(_changes(saved, now) if saved.begun else ())
    if not saved.batches:
        return NewEpoch()
    if saved.per_step is None:
        return NewEpoch(True, (_UNKNOWN,))
    changes, several = _changes(saved, now), len(now.per_step) > 1
    if resized or not now.shared or None in (*now.per_step, *saved.per_step) or (several and saved.seed is None):
        return NewEpoch(True, (*changes, _UNSHARED))
    if saved.per_step == now.per_step:
        return Shifted(saved.batches, saved.base, saved.start, saved.end, changes)
    if several:
        return NewEpoch(True, (*changes, _SEVERAL))
    return _in_other_batches(saved, now, changes)


def size_of_batch(saved: Saved, now: Layout) -> float:
    """The number of batches of now that have the samples of one saved batch; 1 where the loader has no order."""
    before, size = (saved.per_step or (None,))[0], now.per_step[0]
    return 1.0 if before is None or size is None else before / size


def _in_other_batches(saved: Saved, now: Layout, changes: tuple[str, ...]) -> Shifted:
    """Go on at the next sample, and keep the number of the epoch's last batch."""
    assert saved.per_step is not None
    before, size = saved.per_step[0], now.per_step[0]
    assert before is not None
    assert size is not None
    limit = saved.end or saved.num_batches
    left = math.inf if limit == math.inf else max(math.ceil((limit - saved.batches) * before / size), 0)
    left = left if now.left is None else min(left, now.left)
    base, end = saved.batches, None
    if left != math.inf:
        base = int(max(now.num_batches - left, 0))
        end = int(base + left)
    warning = (
        f"All ranks together have {size} samples a batch, and had {before}: the epoch goes on at sample {saved.items},"
        f" as batch {base}. Keep batch_size times the number of processes as it was for the same batches."
    )
    return Shifted(base, base, (saved.items,), end, (*changes, warning))


def _changes(saved: Saved, now: Layout) -> tuple[str, ...]:
    """What to tell of data and samplers that were changed in the middle of an epoch."""
    warnings = []
    if saved.samples not in (None, now.samples):
        warnings.append(
            f"The checkpoint is of the middle of an epoch of {_listed(saved.samples)} samples, and the training"
            f" data have {_listed(now.samples)} now: what is left of the epoch is in another order, so that some"
            " samples come twice and others not at all. Change data between epochs."
        )
    if saved.samplers not in (None, now.samplers):
        warnings.append(
            f"The checkpoint is of the middle of an epoch in the order of {_listed(saved.samplers)}, and now it"
            f" is that of {_listed(now.samplers)}: some of the samples left come twice and others not at all. Change"
            " samplers, and `shuffle`, between epochs."
        )
    return tuple(warnings)


def _listed(items: Sequence[Any] | None) -> str:
    return ", ".join("unknown" if item is None else str(item) for item in items or ())
