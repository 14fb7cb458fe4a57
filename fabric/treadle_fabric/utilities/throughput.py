"""Throughput and floating-point operations, where users of Lightning Fabric look for them."""

from treadle_fabric.measuring import Throughput, ThroughputMonitor, get_available_flops, measure_flops

__all__ = ["Throughput", "ThroughputMonitor", "get_available_flops", "measure_flops"]
