"""The strategy of one device, where users of a trainer look for it."""

from treadle_fabric.strategies import SingleDeviceStrategy

__all__ = ["SingleDeviceStrategy"]
