"""How the ranks of a run decide things together without a collective at every step.

Start with ``stop_agreement.py``: all ranks stop after the same step. ``step_clock.py`` is a clock that all ranks read
alike. Imports only the foundation (errors, types, checks).
"""

from treadle_fabric.coordination.step_clock import StepClock
from treadle_fabric.coordination.stop_agreement import StopAgreement

__all__ = ["StepClock", "StopAgreement"]
