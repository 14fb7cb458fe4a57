"""Why a test cannot run here, where tests that were written for Lightning Fabric look for it."""

from treadle_fabric.accelerators.requirements import missing_here

__all__: list[str] = []

_runif_reasons = missing_here
