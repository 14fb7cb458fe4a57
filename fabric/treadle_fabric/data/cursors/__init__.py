"""Iterate the epochs of a training loader from any position, with the randomness that it would have had there.

Start with ``cursor.py``: what every cursor can do. ``make.py`` decides which kind of cursor a loader gets:
``indexed.py`` (samples have indices, loaded in this process), ``workers.py`` (the same, loaded by workers),
``stateful.py`` (a loader with a ``state_dict``), ``listed.py`` (a list of batches), ``replayed.py`` (anything else) or
``combined.py`` (several loaders). ``one_loader.py`` keeps what all but the last have in common. The other files put
something between a loader and its samplers or dataset: ``orders.py`` leaves out the first items of an order, or draws
it from private random numbers, ``seeded.py`` seeds workers. Imports the samplers and loaders of ``data``, and
randomness.
"""

from treadle_fabric.data.cursors.cursor import Cursor
from treadle_fabric.data.cursors.make import make_cursor

__all__ = ["Cursor", "make_cursor"]
