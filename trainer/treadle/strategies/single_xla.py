"""The strategy of one device of XLA, where users of a trainer look for it."""

from treadle_fabric.strategies import SingleDeviceXLAStrategy

__all__ = ["SingleDeviceXLAStrategy"]
