"""Why a test cannot run here, where tests that were written for Lightning Fabric look for it."""

from treadle_fabric.accelerators.requirements import missing_here

__all__ = ["missing_here"]

_runif_reasons = missing_here
