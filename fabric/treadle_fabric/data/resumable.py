"""Set up loaders, among them the one whose position is saved in a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils.data import BatchSampler

from treadle_fabric.batches import batch_mover
from treadle_fabric.coordination import all_gather_objects
from treadle_fabric.data.epochs import Epochs
from treadle_fabric.data.loader import FabricDataLoader, WrappedLoader, share_loader
from treadle_fabric.data.samplers import innermost_sampler, is_indexed, sampler_epoch, sized_len
from treadle_fabric.data.sharding import one_of_each, shares_of_ranks
from treadle_fabric.errors import CheckpointMismatchError, MisconfigurationException
from treadle_fabric.randomness.state import own_rng_states, rng_states_of, set_rng_states
from treadle_fabric.strategies import Strategy

__all__ = ["ResumableDataLoader", "wrap_loader"]

_put_back: WeakKeyDictionary[Strategy, dict[str, Any]] = WeakKeyDictionary()
"""Random states that were loaded, to be set before the next batch of any loader: a process has one random state."""


def wrap_loader(
    loader: Any, strategy: Strategy, *, share: bool, device: torch.device | None, resumable: bool
) -> WrappedLoader:
    """This rank's share of a loader.

    Args:
        loader: The user's loader, any iterable of batches.
        strategy: Tells the number of ranks.
        share: Whether to share the samples out among the ranks.
        device: The device that batches are moved to; None: they are not moved.
        resumable: Whether the loader's position can be saved in the middle of an epoch.
    """
    take_share = partial(share_loader, loader, strategy, share=share)
    if resumable:
        return ResumableDataLoader(take_share(), device, strategy, share_alone=partial(take_share, alone=True))
    return FabricDataLoader(take_share(), device)


class ResumableDataLoader(WrappedLoader):
    """A loader that goes on after a restart at the batch after the last one, with the same random numbers.

    Put the loader into the state that ``Fabric.save`` and ``Fabric.load`` get, and save after the step: the batch that
    the loop got last counts as done. The loader's state holds the position, what the order of the epoch was drawn from,
    and the random state of every rank, which is set again before the next batch. Resuming skips by index arithmetic
    where the dataset is indexed, through the loader's own ``state_dict`` where it has one, and otherwise by iterating
    up to the position; a stream that keeps what it draws needs a :class:`PrivateStream` around it. With another number
    of processes or another batch size, the order of samples stays the same.

    An epoch that was left with ``break`` is unfinished until the next one begins or ``set_epoch`` is called. The same
    holds for an epoch of which only the first batch was looked at, one that was ended by a shorter loader in a ``zip``,
    and one of which a loop takes ``n`` batches (``n - loader.position`` where it is resumed). A process has one random
    state: of several loaders that are loaded, the one that is iterated first sets it. An iteration begins with its
    first batch, not with ``iter``. The state does not hold generators that the dataset or the loop keeps, nor gradients
    that no optimizer has stepped with.

    Args:
        dataloader: This rank's share of a loader.
        device: The device that batches are moved to. ``None``: they are not moved.
        strategy: Tells the number of ranks.
        share_alone: Gives the loader that one process alone iterates in the order that several have.
    """

    def __init__(
        self, dataloader: Any, device: torch.device | None, strategy: Strategy, share_alone: Callable[[], Any]
    ) -> None:
        super().__init__(dataloader, device)
        self._strategy, self._share_alone = strategy, share_alone
        self._epochs = Epochs(
            dataloader,
            [dataloader],
            rank=strategy.data_parallel_rank,
            world_size=strategy.data_parallel_size,
            num_batches=math.inf if (length := sized_len(dataloader)) is None else length,
            exact=True,
            whole=True,
            share_alone=lambda: (loader := share_alone(), [loader]),
        )
        self._position = 0
        self._begun = self._continues = False
        self._iteration: object = None

    def __reduce__(self) -> Any:  # a copy begins the epoch anew: iterators are not copied
        made_of = (self._dataloader, self._device, self._strategy, self._share_alone)
        return ResumableDataLoader, made_of, {"_epoch": self._epoch}

    @property
    def epoch(self) -> int:
        """The epoch that was begun last, or the one after it where that has ended."""
        return self._epoch

    @property
    def position(self) -> int:
        """The number of batches of :attr:`epoch` that the loop has got."""
        return self._position

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the epoch that the next iteration is, from 0; a resumed epoch keeps its position."""
        if not (self._continues and epoch == self._epoch):
            if self._continues:
                self._epochs.leave()
            self._position, self._begun, self._continues, self._iteration = 0, False, False, None
        self._tell_samplers(epoch)

    def __iter__(self) -> Iterator[Any]:
        if (told := self._told_epoch()) is not None:
            self.set_epoch(told)
        elif self._begun and not self._continues:  # it was left before its end
            self.set_epoch(self._epoch + 1)
        self._begun, self._continues = True, False
        self._iteration = iteration = object()
        if random := _put_back.pop(self._strategy, None):
            set_rng_states(random)
        batches = self._epochs.iterate(self._epoch, self._position)
        self._known_epoch = sampler_epoch(self._dataloader)
        move = None if self._device is None else batch_mover(self._device)
        for batch in batches:
            if self._iteration is not iteration:
                raise MisconfigurationException(
                    f"An iteration of a resumable loader goes on after epoch {self._epoch} was begun by another one,"
                    " set or loaded; the loader has one position only. End it with `break` and begin anew, or set up a"
                    " loader for each."
                )
            self._position += 1
            yield batch if move is None else move(batch)
        if self._iteration is iteration:
            self._epoch, self._position, self._begun = self._epoch + 1, 0, False

    def state_dict(self) -> dict[str, Any]:
        """The position, what it means, and the random states of every rank; every rank must call this.

        Where ranks work together on a share of the samples, ``shares`` tells the share of each rank.
        """
        strategy = self._strategy
        random = _put_back.get(strategy) or own_rng_states()
        data = self._epochs.state_dict(self._position)
        self._epochs.tell()
        mine = {"random": random, "data": data, "loader": _describe(self._dataloader, data)}
        state = {"epoch": self._epoch, "position": self._position, "ranks": all_gather_objects(strategy, mine)}
        together = strategy.data_parallel_size < strategy.world_size
        return {**state, "shares": shares_of_ranks(strategy)} if together else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the next iteration where ``state`` was saved, perhaps on another number of ranks.

        Raises:
            CheckpointMismatchError: The state is of no such loader, or of one whose positions mean something else.
        """
        strategy = self._strategy
        self._check(state)
        position, ranks, shares = state["position"], state["ranks"], state.get("shares")
        share, rank = strategy.data_parallel_rank, strategy.global_rank
        parts = one_of_each(ranks, shares)
        mine = parts[share if len(parts) == strategy.data_parallel_size else 0]["data"]
        position = self._epochs.resume(mine, len(parts), position, begun=position > 0, ended=position == 0).batch or 0
        self._dataloader = self._epochs.loader
        if len(ranks) == strategy.world_size and share == (rank if shares is None else shares[rank]):
            parts, share = ranks, rank  # each rank goes on with its own
        _put_back[strategy] = rng_states_of([part["random"] for part in parts], share)
        self._epoch, self._position, self._begun, self._iteration = state["epoch"], position, False, None
        self._continues = position > 0
        self._known_epoch = sampler_epoch(self._dataloader)

    def _check(self, state: dict[str, Any]) -> None:
        """Refuse a state with which the loader would go on at a wrong place."""
        if not {"epoch", "position", "ranks"} <= set(state):
            found = ", ".join(map(repr, list(state)[:5])) or "nothing"
            raise CheckpointMismatchError(
                f"It has {found} in it, and must be what a resumable loader saved: set the loader up with"
                " resumable=True where it is saved, too, or leave it out of the state that is loaded."
            )
        parts, data = one_of_each(state["ranks"], state.get("shares")), self._epochs.state_dict(self._position)
        shares = self._strategy.data_parallel_size
        alike = len(parts) == shares
        before = parts[self._strategy.data_parallel_rank if alike else 0].get("loader", {})
        now = _describe(self._dataloader, data)
        sides = (len(parts), parts[0]["data"]), (shares, data)
        shared = alike or all(number == 1 or part["order"]["seed"] is not None for number, part in sides)
        # where the user shares out, another number of processes begins the epoch anew, which a warning says
        names = before if state["position"] and shared else {"kind"} & set(before)
        if differ := [f"{name}: {before[name]}, here {now[name]}" for name in names if before[name] != now[name]]:
            raise CheckpointMismatchError(
                f"It is position {state['position']} in epoch {state['epoch']} of another loader ({'; '.join(differ)}),"
                " which means something else in this one. Set the loader up as it was, or leave it out of the state"
                " that is loaded and call loader.set_epoch to begin an epoch."
            )


def _describe(loader: Any, state: dict[str, Any]) -> dict[str, Any]:
    """What gives a position in a loader its meaning.

    Args:
        loader: The loader inside.
        state: The state of its ``Epochs``.
    """
    indexed, batches = is_indexed(loader), getattr(loader, "batch_sampler", None)
    sized = indexed and type(batches) is BatchSampler  # then an epoch can go on with another batch size
    return {
        "kind": "one with a state_dict" if "loader" in state else "indexed" if indexed else "iterated",
        "samples": sized_len(loader.dataset) if indexed else None,
        "batch_size": None if sized else getattr(loader if batches is None else batches, "batch_size", None),
        "sampler": type(innermost_sampler(loader)).__name__ if indexed else None,
        "generators": len(state["generators_now"]),
    }
