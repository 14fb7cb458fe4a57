"""The order of samples in numbers that do not depend on how many processes share it out.

A checkpoint of one number of processes is resumed by another: what the order was drawn from and how many samples all
ranks together have had is enough to go on, each sample once. Where the batch of all ranks together is as large as
before, its batches are the same ones too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import BatchSampler

from treadle_fabric.data.samplers import innermost_sampler, is_indexed, samplers_of, sized_len
from treadle_fabric.data.sharding import ShardedSampler
from treadle_fabric.rank_zero import rank_zero_warn

__all__ = ["SampleOrder"]


class SampleOrder:
    """The order that the samplers of a training loader draw, and where an epoch stands in it.

    Args:
        parts: the loaders of this rank; those with indexed samples count.
        world_size: processes that share them.
        num_batches: of an epoch.
    """

    def __init__(self, parts: Sequence[Any], world_size: int, num_batches: float) -> None:
        self._parts, self._world_size, self._num_batches = parts, world_size, num_batches
        self._samplers = [sampler for part in parts if (sampler := _sharded(part)) is not None]
        self.base = 0
        """Batches of this epoch that this loader's iteration does not count: other ranks have trained on them."""
        self.end: int | None = None
        """The number that this epoch ends before, where that is not the number of batches of any other."""
        self._start: list[int] = [0] * len(self._samplers)
        self._source: Any = None
        self._continues = False

    def begin(self) -> None:
        """An epoch begins, from the front unless it is the one that was resumed."""
        if not self._continues:
            self._begin_anew()
        self._continues = False

    def forget(self) -> None:
        """Nothing is left of the epoch that was resumed."""
        self._continues = False

    def _begin_anew(self) -> None:
        self._set(0, [0] * len(self._samplers), None)

    def _set(self, base: int, start: list[int], source: Any, end: int | None = None) -> None:
        self.base, self.end, self._start, self._source = base, end, start, source
        for sampler, first in zip(self._samplers, start):
            sampler.go_on(first, source)

    @property
    def seed(self) -> int | None:
        """What orders are drawn from, with the epoch; None where the user's samplers draw them as they do alone."""
        return self._samplers[0].seed if self._samplers else None

    @seed.setter
    def seed(self, seed: int) -> None:
        for sampler in self._samplers:
            sampler.seed = seed

    @property
    def per_step(self) -> list[int | None]:
        """Items of each loader's order that all ranks together take at a step."""
        return [_per_step(part, self._world_size) for part in self._parts]

    @property
    def _samples(self) -> list[int | None]:
        return [sized_len(part.dataset) if is_indexed(part) else None for part in self._parts]

    @property
    def _kinds(self) -> list[str | None]:
        return [type(innermost_sampler(part)).__name__ if is_indexed(part) else None for part in self._parts]

    def state_dict(self, drawn_from: Any) -> dict[str, Any]:
        """What another number of processes needs to go on in the same order.

        Args:
            drawn_from: the seed or random states of this epoch's order, where no seed of all ranks is behind it.
        """
        alone = not self._samplers
        return {
            "world_size": self._world_size,
            "seed": self.seed,
            "source": drawn_from if alone else self._source,
            "base": self.base,
            "end": self.end,
            "start": self._start or [0] * len(self._parts),
            "per_step": self.per_step,
            "samples": self._samples,
            "samplers": self._kinds,
            "num_batches": self._num_batches,
        }

    def load_state_dict(self, state: Mapping[str, Any], *, within: bool) -> None:
        """Go on with as many processes as the state is of; ``within`` an epoch or after it."""
        self._continues = within
        if within and state.get("samples", self._samples) != self._samples:
            rank_zero_warn(
                f"The checkpoint is of the middle of an epoch of {_listed(state['samples'])} samples, and the training"
                f" data have {_listed(self._samples)} now: what is left of the epoch is in another order, so that some"
                " samples come twice and others not at all. Change data between epochs."
            )
        if within and state.get("samplers", self._kinds) != self._kinds:
            rank_zero_warn(
                f"The checkpoint is of the middle of an epoch in the order of {_listed(state['samplers'])}, and now it"
                f" is that of {_listed(self._kinds)}: some of the samples left come twice and others not at all. Change"
                " samplers, and `shuffle`, between epochs."
            )
        if within and self._samplers and "base" in state:
            self._set(state["base"], list(state["start"]), state["source"], state.get("end"))

    def take_over(self, state: Mapping[str, Any], position: int, accumulate: int) -> int | None:
        """Go on with another number of processes in the middle of an epoch.

        Args:
            state: of :meth:`state_dict`, from any rank.
            position: the batches of the epoch that are done with.
            accumulate: batches of an optimizer step.

        Returns:
            The batch of the epoch to go on from; None where the epoch begins anew.
        """
        self.load_state_dict(state, within=True)
        per_step = self.per_step
        unshared = not self._samplers or len(self._samplers) != len(self._parts) or None in per_step
        if unshared or (len(self._parts) > 1 and state["seed"] is None):
            rank_zero_warn(
                "The number of processes or the batch size has changed, and the position in this training loader has a"
                " meaning for the old one only (a stream, an iterable of one's own, or several loaders at once): the"
                " epoch begins anew."
            )
            self._begin_anew()
            return None
        if per_step == state["per_step"]:
            return position
        if len(self._parts) > 1:
            rank_zero_warn(
                "The batch of all ranks together has another size than in the checkpoint, and there are several"
                " training loaders: the epoch begins anew. Keep batch_size times the number of processes as it was."
            )
            self._begin_anew()
            return None
        before, now = state["per_step"][0], per_step[0]
        assert now is not None
        stepped = max(position - position % accumulate, state["base"])  # gradients after it are of another size
        done = state["start"][0] + (stepped - state["base"]) * before
        self._set(0, [done], self._source)
        limit, size = state["end"] or state["num_batches"], sized_len(self._parts[0])
        left = math.inf if limit == math.inf else max(math.ceil((limit - stepped) * before / now), 0)
        left = left if size is None else min(left, size)
        if left == math.inf:
            self.base = stepped
        else:
            base = int(max(self._num_batches - left, 0))
            self.base = base - base % accumulate if left else base  # an optimizer step begins here
            self.end = int(self.base + left)
        again = (
            f" What the last {position - stepped} batches logged, for which no optimizer has stepped, is logged again."
            if position > stepped
            else ""
        )
        rank_zero_warn(
            f"All ranks together have {now} samples a batch, and had {before}: the epoch goes on at sample {done}, as"
            f" batch {self.base}. Keep batch_size times the number of processes as it was for the same batches.{again}"
        )
        return self.base


def _listed(items: Sequence[Any]) -> str:
    return ", ".join("unknown" if item is None else str(item) for item in items)


def _sharded(loader: Any) -> ShardedSampler | None:
    return next((s for s in samplers_of(loader) if isinstance(s, ShardedSampler)), None)


def _per_step(loader: Any, world_size: int) -> int | None:
    """Items of the order that all ranks together take at a step: samples, or the batches of somebody's own sampler."""
    if not is_indexed(loader):
        return None
    batched = type(loader.batch_sampler) is BatchSampler
    return int(loader.batch_sampler.batch_size) * world_size if batched else world_size
