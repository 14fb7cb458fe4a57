"""How the ranks of a run decide things together without a collective at every step.

Start with ``stop_agreement.py``: all ranks stop after the same step. ``step_clock.py`` is a clock that all ranks read
alike. ``on_rank_zero.py`` and ``gather_objects.py`` are for what happens seldom, a save for example: rank 0 acts and
all ranks learn what came of it; objects of all ranks come to one rank or to all. ``rendezvous.py`` is where the ranks
meet at the start, and ``waiting.py`` says for whom a rank waits. Imports only the foundation and environments.
"""

from treadle_fabric.coordination.gather_objects import all_gather_objects, gather_objects
from treadle_fabric.coordination.on_rank_zero import on_rank_zero
from treadle_fabric.coordination.rendezvous import meet, new_group, this_machine
from treadle_fabric.coordination.step_clock import StepClock
from treadle_fabric.coordination.stop_agreement import StopAgreement
from treadle_fabric.coordination.waiting import WaitMessages, list_ranks, wait_with_messages

__all__ = [
    "StepClock",
    "StopAgreement",
    "WaitMessages",
    "all_gather_objects",
    "gather_objects",
    "list_ranks",
    "meet",
    "new_group",
    "on_rank_zero",
    "this_machine",
    "wait_with_messages",
]
