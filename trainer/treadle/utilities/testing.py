"""Why a test cannot run here, where tests that were written for Lightning look for it."""

from treadle_fabric.utilities import missing_here

__all__: list[str] = []

_runif_reasons = missing_here
