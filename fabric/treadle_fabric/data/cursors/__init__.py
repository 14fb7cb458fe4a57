"""Iterate one loader from any position, with the randomness that it would have had there."""

from treadle_fabric.data.cursors.cursor import Cursor

__all__ = ["Cursor"]
