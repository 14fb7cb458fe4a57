"""The epochs of training loaders, each from any position on, also in another layout than the checkpoint's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from treadle_fabric.data.cursors import make_cursor
from treadle_fabric.data.order import SampleOrder
from treadle_fabric.data.resume import NewEpoch, Same, Saved, Shifted, decide, size_of_batch
from treadle_fabric.data.samplers import set_epoch
from treadle_fabric.data.streams import warn_of_draws
from treadle_fabric.rank_zero import rank_zero_warn

__all__ = ["Epochs"]


class Resumed(NamedTuple):
    """Where the epoch of a checkpoint goes on."""

    batch: int | None
    """The batch to go on from; None where the epoch begins anew, because its position has no meaning here."""
    size: float = 1.0
    """The number of batches of now that have the samples of one batch in the checkpoint."""


class Epochs:
    """Iterates this rank's share of a training loader, and knows what a position in it means.

    A trainer iterates with :meth:`iterate`, and saves the ``state_dict`` of every rank with the number of batches that
    are done. :meth:`resume` gives the state back: with the same number of processes and batch size the epoch goes on to
    the last bit, with another number or size it goes on in the same order of samples.

    Args:
        loader: What is iterated.
        parts: The loaders of a ``CombinedLoader``, where each is to have a position of its own; else ``[loader]``.
        rank: This process.
        world_size: Number of processes that share the samples out.
        num_batches: Batches of an epoch; infinity where that is unknown.
        exact: Whether the trainer relies on that number; otherwise it finds out when the loader ends.
        whole: Whether an epoch is the whole loader, and is not cut short by a limit.
        share_alone: Gives the loader and parts that one process alone iterates in the order that several have.
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
    ) -> None:
        self.loader, self.parts = loader, parts
        self._rank, self._world_size, self._num_batches = rank, world_size, num_batches
        self._exact, self._whole, self._share_alone = exact, whole, share_alone
        self._looks_ahead = not exact
        self._draws = self._told = False
        self._begin_order()

    def _begin_order(self) -> None:
        self._cursor = make_cursor(self.loader, self.parts, self._rank, looks_ahead=self._looks_ahead)
        self._order = SampleOrder(self.parts, self._world_size, self._num_batches)

    @property
    def end(self) -> int | None:
        """This epoch's end (exclusive), where it differs from other epochs' after a resume."""
        return self._order.end

    @property
    def ends_without_drawing(self) -> bool:
        """Whether it makes no difference that the loader is asked for a batch after the last one."""
        return self._cursor.ends_without_drawing

    def look_ahead(self) -> None:
        """Say that batches are drawn before training comes to them. Call it before :meth:`resume`."""
        if not self._looks_ahead:
            self._looks_ahead = True
            self._begin_order()

    def iterate(self, epoch: int, skip: int = 0, *, ahead: bool = False) -> Iterator[Any]:
        """The batches of an epoch.

        Args:
            epoch: The number of the epoch, which samplers are told.
            skip: The number of batches to leave out at the beginning.
            ahead: Whether each batch is asked for before training comes to it, while the one before it is trained on.
        """
        for part in self.parts:
            set_epoch(part, epoch)
        self._order.begin()
        return self._cursor.iterate(epoch, skip - self._order.base, ahead=ahead)

    def finish(self, epoch: int, skip: int, *, drain: bool) -> None:
        """End a resumed epoch that has no batch left: samplers draw what they draw at the end of an epoch.

        Args:
            epoch: The number of the epoch.
            skip: The number of its batches.
            drain: Whether an iteration would have come to the loader's end.
        """
        for part in self.parts:
            set_epoch(part, epoch)
        skip -= self._order.base
        drain = drain and self._whole and self._exact and not self.ends_without_drawing
        self._order.leave()
        self._cursor.finish(epoch, skip, drain=drain, whole=self._whole)

    def leave(self) -> None:
        """Begin the epoch after the resumed one, although that has batches left."""
        self._order.leave()
        self._cursor.leave()

    def close(self) -> None:
        """End the workers that persist between epochs; no epoch follows."""
        self._cursor.close()

    def state_dict(self, position: int) -> dict[str, Any]:
        """What is needed to continue this epoch, as tensors and plain containers.

        Args:
            position: The number of batches of the epoch that are done.
        """
        state = self._cursor.state_dict(position - self._order.base)
        self._draws = state.get("draws", False)
        if "order" in state:  # resumed, and not iterated yet
            return state
        return {**state, "order": self._order.state_dict(self._cursor.drawn_from)}

    def tell(self) -> None:
        """Tell the user once, where a checkpoint is saved, that the batches before it may not be drawn again alike."""
        if self._draws and not self._told:
            self._told = True
            warn_of_draws(self.loader)

    def resume(self, state: dict[str, Any], world_size: int, batch: int, *, begun: bool, ended: bool) -> Resumed:
        """Continue the epoch of a checkpoint, or begin the one after it.

        Args:
            state: Returned by :meth:`state_dict`, on this rank; on any rank where their number was another one.
            world_size: Number of processes of the run that saved it.
            batch: The number of batches of the epoch that were done.
            begun: Whether the epoch had begun; False: the checkpoint was saved between two epochs.
            ended: Whether nothing is left of the epoch.

        Returns:
            Where the epoch goes on. The user is told where that is another batch, or where the epoch begins anew.

        Raises:
            CheckpointMismatchError: The state is that of another number of loaders.
        """
        if not state:  # saved before there was a loader
            return Resumed(batch)
        self._order.leave()
        order, batches = state.get("order", {}), 0 if ended else batch
        self._draw_from(order.get("seed"))
        saved = Saved.read(order, world_size=world_size, begun=begun, batches=batches)
        decision = decide(saved, layout := self._order.layout(saved))
        if batches and self._world_size == 1 and self._order.seed is None and not isinstance(decision, Same):
            self._share()  # only a shared order has a position that is no multiple of the batch size
            decision = decide(saved, layout := self._order.layout(saved))
        source = order.get("source")
        if isinstance(decision, Same):
            self._cursor.load_state_dict(state, within=begun, whole=self._whole)
            if begun:
                self._order.go_on(saved.base, saved.start, saved.end, source)
        else:
            self._cursor.take_generators(state, within=bool(batches))
        size = 1.0
        if isinstance(decision, Shifted):
            self._order.go_on(decision.base, decision.start, decision.end, source)
            batch, size = decision.batch, size_of_batch(saved, layout)
        for warning in decision.warnings:
            rank_zero_warn(warning)
        return Resumed(None if isinstance(decision, NewEpoch) and decision.again else batch, size)

    def follow(self, before: Epochs) -> None:
        """Go on with the orders of loaders that these loaders replace."""
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
