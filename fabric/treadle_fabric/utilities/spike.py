"""The detection of spikes, where users of Lightning Fabric look for it."""

from treadle_fabric.errors import TrainingSpikeException
from treadle_fabric.measuring import SpikeDetection

__all__ = ["SpikeDetection", "TrainingSpikeException"]
