"""Searches for a learning rate and a batch size, by trials: a few batches after which everything is as before.

Open ``learning_rate.py`` and ``batch_size.py`` first: the two searches, as functions of what runs their trials
(``trials.py`` declares it, and ``treadle/trainer/trials.py`` is it). ``snapshot.py`` notes what objects hold and puts
it back, ``attributes.py`` finds the attribute that a search is about, ``found.py`` keeps what a callback has found,
``memory.py`` tells errors of full memory from others, ``plot.py`` draws the range test, and ``status.py`` shows on a
terminal how far a search has come.

Imports the runtime, modules and the annotations in ``contracts.py``; callbacks and the tuner stand on it.
"""

from treadle.searches.batch_size import BatchSizeSearch
from treadle.searches.found import Found
from treadle.searches.learning_rate import LRFinder, LRSearch
from treadle.searches.snapshot import Snapshot

__all__ = ["BatchSizeSearch", "Found", "LRFinder", "LRSearch", "Snapshot"]
