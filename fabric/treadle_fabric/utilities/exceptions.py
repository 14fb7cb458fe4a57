"""Errors, where users of Lightning Fabric look for them."""

from treadle_fabric.errors import MisconfigurationException

__all__ = ["MisconfigurationException"]
