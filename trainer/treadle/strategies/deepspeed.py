"""ZeRO on DeepSpeed, where users of a trainer look for it."""

from treadle_fabric.strategies import DeepSpeedStrategy

__all__ = ["DeepSpeedStrategy"]
