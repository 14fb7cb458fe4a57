"""Several loaders iterated as one: the loader that users make (``loader.py``), and its cursor (``cursor.py``)."""

from treadle_fabric.data.combined.cursor import CombinedCursor, make_cursor
from treadle_fabric.data.combined.loader import CombinedLoader

__all__ = ["CombinedCursor", "CombinedLoader", "make_cursor"]
