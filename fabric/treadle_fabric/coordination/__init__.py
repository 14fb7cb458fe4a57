"""How the ranks of a run decide things together without a collective at every step.

Start with ``stop_agreement.py``: all ranks stop after the same step. ``step_clock.py`` is a clock that all ranks read
alike. ``on_rank_zero.py``, ``once_a_node.py`` and ``gather_objects.py`` are for what happens seldom, a save for
example: rank 0, or one rank of each node, acts and the others learn what came of it; objects of all ranks come to one
rank or to all. Imports only the foundation (errors, types, checks).
"""

from treadle_fabric.coordination.gather_objects import all_gather_objects, gather_objects
from treadle_fabric.coordination.on_rank_zero import on_rank_zero
from treadle_fabric.coordination.once_a_node import once_a_node
from treadle_fabric.coordination.step_clock import StepClock
from treadle_fabric.coordination.stop_agreement import StopAgreement

__all__ = ["StepClock", "StopAgreement", "all_gather_objects", "gather_objects", "on_rank_zero", "once_a_node"]
