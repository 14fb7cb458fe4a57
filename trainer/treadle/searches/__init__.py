"""Searches for a learning rate and a batch size, by trials: a few batches after which everything is as before.

Open ``learning_rate.py`` and ``batch_size.py`` first: the two searches, as functions of what runs their trials
(``trials.py`` declares it, and ``treadle/trainer/trials.py`` is it). ``snapshot.py`` notes what objects hold and puts
it back, ``attributes.py`` finds the attribute that a search is about, ``found.py`` keeps what a callback has found,
``plot.py`` draws the range test, and ``status.py`` shows on a terminal how far a search has come.

Imports the runtime, modules and the annotations in ``contracts.py``; callbacks and the tuner stand on it.
"""

from typing import TYPE_CHECKING

from treadle.searches.snapshot import Snapshot
from treadle_fabric import on_demand

if TYPE_CHECKING:
    from treadle.searches.batch_size import BatchSizeSearch
    from treadle.searches.found import Found
    from treadle.searches.learning_rate import LRFinder, LRSearch

__all__ = ["BatchSizeSearch", "Found", "LRFinder", "LRSearch", "Snapshot"]

if not TYPE_CHECKING:  # which tell of any other name
    __getattr__ = on_demand(  # a run without a search needs none of them
        __name__,
        {
            "BatchSizeSearch": "treadle.searches.batch_size",
            "Found": "treadle.searches.found",
            "LRFinder": "treadle.searches.learning_rate",
            "LRSearch": "treadle.searches.learning_rate",
        },
    )
