"""Stopping together: when one rank has to stop, all stop after the same step, and no step pays for it."""

from __future__ import annotations

import itertools
import threading
from datetime import timedelta
from typing import Any

import torch.distributed as dist

__all__ = ["StopAgreement"]

_made = itertools.count()
_POLL_S = 0.2
_PATIENCE = timedelta(seconds=60)


class StopAgreement:
    """Finds the step after which all ranks stop, through the store that they met at.

    A thread looks for a request a few times a second; a step itself only takes a lock. The rank that wants to stop
    posts the number of steps that it has done, and waits. The thread of each other rank posts the step that its rank
    has begun last; that rank finishes the step, and waits. All stop after the largest number posted.

    The ranks may be several steps apart: those that do not wait for one another in each step (gradient accumulation
    without synchronization, evaluation, a host that only queues what its device does and the collectives of NCCL) go on
    until their thread has seen the request, for up to 0.2 seconds. That does no harm: a rank that has posted begins no
    other step before all have posted, so that all find the same largest number, and no rank is beyond it. A rank that
    is behind makes up for the steps in between, and the collectives in them find the ranks that are ahead, which have
    begun the same steps. So a stop may take as many steps as lie between two places where the ranks wait for one
    another, or as fit into 0.2 seconds. The boundaries must be the same on all ranks; where they are not, as in an
    evaluation with unequal numbers of batches, the ranks have to agree once more afterwards.

    Every rank makes the same number of these, in the same order.
    """

    def __init__(self) -> None:
        self._key = f"treadle/stop/{next(_made)}"
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._seen = False  # the request; from then on no step is begun before the decision
        self._committed = 0  # the step that was begun last: this rank is not beyond it, but may be far ahead of others
        self._rank, self._world_size = 0, 1
        self._store: Any = None
        self._thread: threading.Thread | None = None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
            store: Any = dist.distributed_c10d._get_default_store()
            self._store, theirs = store.clone(), store.clone()  # one connection a thread
            self._thread = threading.Thread(target=self._watch, args=(theirs,), name="stop agreement", daemon=True)
            self._thread.start()

    def at_boundary(self, step: int, wish: str = "") -> str:
        """Ask between two steps whether to stop here.

        Args:
            step: the steps done so far.
            wish: why this rank wants to stop; empty if it does not.

        Returns:
            Why all stop here; empty to go on.
        """
        if self._store is None:
            return wish
        with self._lock:
            if not wish and not self._seen:
                self._committed = step + 1
                return ""
            first, self._seen = not self._seen, True
        if wish:
            self._store.compare_set(self._key, "", wish)  # the first wish stands
        if first:
            self._post(self._store, step)
        last = self._decide()
        return "" if step < last else str(self._store.get(self._key).decode())

    def close(self) -> None:
        """The run is over for this rank; others that are still deciding need not wait for it."""
        if self._store is None or self._closed.is_set():
            return
        self._closed.set()
        with self._lock:
            first, self._seen = not self._seen, True
        try:
            if first:
                self._post(self._store, self._committed)
        except RuntimeError:  # the store went with its process
            pass
        assert self._thread is not None
        self._thread.join(timeout=30)  # a thread inside the store when the interpreter ends would abort the process

    def _post(self, store: Any, step: int) -> None:
        store.set(f"{self._key}/{self._rank}", str(step))

    def _decide(self) -> int:
        keys = [f"{self._key}/{rank}" for rank in range(self._world_size)]
        try:
            self._store.set_timeout(_PATIENCE)
            return max(int(value) for value in self._store.multi_get(keys))
        except RuntimeError:  # a rank whose process is gone or stopped, for its thread would answer: stop here
            return 0

    def _watch(self, store: Any) -> None:
        try:
            while not self._closed.wait(_POLL_S):
                if self._seen:
                    return
                if store.check([self._key]):
                    with self._lock:
                        if self._seen:
                            return
                        self._seen, step = True, self._committed
                    self._post(store, step)
                    return
        except RuntimeError:  # the store went with its process; the launcher sees to the rest
            return
