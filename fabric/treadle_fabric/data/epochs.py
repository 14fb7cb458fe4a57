"""The epochs of training loaders, each from any position on, also where another number of processes goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from treadle_fabric.data.cursors.cursor import Cursor
from treadle_fabric.data.order import SampleOrder
from treadle_fabric.data.samplers import set_epoch
from treadle_fabric.rank_zero import rank_zero_warn

__all__ = ["EpochCursor", "Epochs"]


class EpochCursor(Protocol):
    """Iterates the epochs of a loader from a position: :class:`Cursor`, or one like it."""

    @property
    def drawn_from(self) -> int | dict[str, Any]: ...

    @property
    def ends_without_drawing(self) -> bool: ...

    def iterate(self, epoch: int, skip: int = 0) -> Iterator[Any]: ...

    def finish(self, epoch: int, skip: int, *, drain: bool, whole: bool) -> None: ...

    def leave(self) -> None: ...

    def close(self) -> None: ...

    def state_dict(self, position: int) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], *, within: bool = True, whole: bool = True) -> None: ...

    def take_generators(self, state: dict[str, Any], *, within: bool) -> None: ...


class Epochs:
    """Iterates this rank's share of a loader, and knows what a position in it means.

    Args:
        loader: what is iterated.
        parts: the loaders that it combines; itself where it is only one.
        rank: this process.
        world_size: processes that share the samples out.
        num_batches: of an epoch; infinity where that is unknown.
        exact: whether who iterates relies on that number; else it looks one batch ahead.
        whole: whether an epoch is all of the loader.
        share_alone: gives loader and parts that one process alone iterates in the order that several have.
        make_cursor: gives what iterates the loader.
    """

    def __init__(
        self,
        loader: Any,
        parts: Sequence[Any],
        *,
        rank: int,
        world_size: int,
        num_batches: float,
        exact: bool,
        whole: bool,
        share_alone: Callable[[], tuple[Any, Sequence[Any]]],
        make_cursor: Callable[..., EpochCursor] = Cursor,
    ) -> None:
        self.loader, self.parts = loader, parts
        self._rank, self._world_size, self._num_batches = rank, world_size, num_batches
        self._exact, self._whole, self._share_alone = exact, whole, share_alone
        self._looks_ahead, self._make_cursor = not exact, make_cursor
        self._begin_order()

    def _begin_order(self) -> None:
        self._cursor: EpochCursor = self._make_cursor(self.loader, self._rank, exact=not self._looks_ahead)
        self._order = SampleOrder(self.parts, self._world_size, self._num_batches)

    @property
    def end(self) -> int | None:
        """The number that this epoch ends before, where that is not the number of batches of any other."""
        return self._order.end

    @property
    def ends_without_drawing(self) -> bool:
        """Whether it makes no difference that the end of an epoch is asked for a batch in vain."""
        return self._cursor.ends_without_drawing

    def look_ahead(self) -> None:
        """Whoever iterates draws batches before training comes to them; to be said before anything is resumed."""
        self._looks_ahead = True
        self._begin_order()

    def iterate(self, epoch: int, skip: int = 0) -> Iterator[Any]:
        """The batches of an epoch, in its order, from the one after the first ``skip`` on."""
        for part in self.parts:
            set_epoch(part, epoch)
        self._order.begin()
        return self._cursor.iterate(epoch, skip - self._order.base)

    def finish(self, epoch: int, skip: int, *, drain: bool) -> None:
        """Nothing is left of a resumed epoch but what its samplers draw at its end."""
        for part in self.parts:
            set_epoch(part, epoch)
        skip -= self._order.base
        self._order.forget()
        drain = drain and self._whole and self._exact and not self.ends_without_drawing
        self._cursor.finish(epoch, skip, drain=drain, whole=self._whole)

    def leave(self) -> None:
        """An epoch that was resumed is not continued."""
        self._order.forget()
        self._cursor.leave()

    def close(self) -> None:
        """No epoch follows."""
        self._cursor.close()

    def state_dict(self, position: int) -> dict[str, Any]:
        """What is needed to draw this epoch's order again, when ``position`` batches of it are done with."""
        state = self._cursor.state_dict(position - self._order.base)
        if "order" in state:  # resumed, and not iterated yet
            return state
        return {**state, "order": self._order.state_dict(self._cursor.drawn_from)}

    def steps_alike(self, state: dict[str, Any]) -> bool:
        """Whether all ranks together take as much at a step as where ``state`` is of."""
        before = state.get("order", {}).get("per_step")
        return before is None or before == self._order.per_step

    def resume(self, state: dict[str, Any], *, within: bool) -> None:
        """The next iteration continues the epoch that ``state`` is of, or follows it where not ``within``."""
        if not state:  # saved before there was a loader
            return
        order = state.get("order", {})
        self._draw_from(order.get("seed"))
        self._order.load_state_dict(order, within=within)
        self._cursor.load_state_dict(state, within=within, whole=self._whole)

    def take_over(self, state: dict[str, Any], position: int, accumulate: int = 1) -> int | None:
        """Go on where another number of processes stood, or batches had another size, after ``position`` of them.

        Args:
            state: of :meth:`state_dict`, from any of them.
            position: the batches of the epoch that are done with.
            accumulate: batches of an optimizer step.

        Returns:
            The batch to go on from; None where the epoch begins anew.
        """
        if not state:
            return None
        order = state.get("order", {})
        self._draw_from(order.get("seed"))
        if position and self._order.seed is None and self._world_size == 1:
            self._share()  # only a shared order has a position that is no multiple of the batch size
        self._cursor.take_generators(state, within=bool(position))
        if not position:
            self._order.load_state_dict(order, within=False)
            return 0
        if "per_step" not in order:  # saved before that was kept
            rank_zero_warn("The checkpoint does not tell the order of its samples: the epoch begins anew.")
            return None
        return self._order.take_over(order, position, accumulate)

    def follow(self, before: Epochs) -> None:
        """Go on with the orders of loaders that these ones replace."""
        self._draw_from(before._order.seed)

    def _draw_from(self, seed: int | None) -> None:
        """Draw orders from the seed that several processes drew them from, also where there is one now."""
        if seed is None:
            return
        if self._world_size == 1:
            self._share()
        self._order.seed = seed

    def _share(self) -> None:
        self.loader, self.parts = self._share_alone()
        self._begin_order()
