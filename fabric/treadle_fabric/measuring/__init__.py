"""What a run achieves: how fast it trains, which share of the hardware's peak that is, and whether its loss spikes.

Start with ``throughput.py`` (batches, samples and floating-point operations a second). ``flops.py`` counts the
operations of a model, ``peak_rates.py`` knows how many a chip can do, ``spikes.py`` ends a run whose loss jumps, and
``shared_files.py`` finds out whether all ranks see one file system. Imports Fabric and what is below it.
"""

from treadle_fabric.measuring.flops import measure_flops
from treadle_fabric.measuring.peak_rates import compute_dtype, get_available_flops
from treadle_fabric.measuring.shared_files import is_shared_filesystem
from treadle_fabric.measuring.spikes import SpikeDetection
from treadle_fabric.measuring.throughput import Throughput, ThroughputMonitor

__all__ = [
    "SpikeDetection",
    "Throughput",
    "ThroughputMonitor",
    "compute_dtype",
    "get_available_flops",
    "is_shared_filesystem",
    "measure_flops",
]
