"""Errors, where users of a trainer look for them."""

from treadle.run.signals import SIGTERMException
from treadle_fabric import MisconfigurationException

__all__ = ["MisconfigurationException", "SIGTERMException"]
