"""Enumerations of arguments, where users of a trainer look for them."""

from treadle.loops.step.clipping import GradClipAlgorithmType
from treadle_fabric.utilities import LightningEnum

__all__ = ["GradClipAlgorithmType", "LightningEnum"]
