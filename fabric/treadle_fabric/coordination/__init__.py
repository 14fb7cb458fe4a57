"""How the ranks of a run decide things together without a collective at every step.

Start with ``stop_agreement.py``: all ranks stop after the same step. ``step_clock.py`` is a clock that all ranks read
alike. ``on_rank_zero.py``, ``once_a_node.py`` and ``objects.py`` are for what happens seldom, a save for example: rank
0, or one rank of each node, acts and the others learn what came of it; objects of ranks come to one rank or to all.
These go through ``hosts.py``, and wait for no device. ``as_tensors.py`` and ``alike.py`` come before an exchange
of tensors: what is exchanged, and whether it is alike. ``rendezvous.py`` is where the ranks meet at the start, and
``waiting.py`` says for whom a rank waits; ``network.py`` ends connections to machines that are gone. Imports only the
foundation (errors, containers, tensor_pickle) and environments.
"""

from treadle_fabric.coordination.alike import check_alike
from treadle_fabric.coordination.as_tensors import as_tensors
from treadle_fabric.coordination.hosts import (
    HostGroup,
    group_apart,
    host_group,
    patient_barrier,
    reached_by,
    wait_for_rank_zero,
    waits_in_vain,
)
from treadle_fabric.coordination.network import (
    address_towards,
    choose_interface,
    end_connections_when_silent,
    end_when_silent,
    silence,
)
from treadle_fabric.coordination.objects import all_gather_objects, broadcast_object, gather_objects
from treadle_fabric.coordination.on_rank_zero import first_different, on_rank_zero
from treadle_fabric.coordination.once_a_node import on_every_rank, once_a_node
from treadle_fabric.coordination.rendezvous import is_running, meet, new_group, this_machine
from treadle_fabric.coordination.step_clock import StepClock
from treadle_fabric.coordination.stop_agreement import StopAgreement
from treadle_fabric.coordination.waiting import WaitMessages, list_ranks, wait_with_messages

__all__ = [
    "HostGroup",
    "StepClock",
    "StopAgreement",
    "WaitMessages",
    "address_towards",
    "all_gather_objects",
    "as_tensors",
    "broadcast_object",
    "check_alike",
    "choose_interface",
    "end_connections_when_silent",
    "end_when_silent",
    "first_different",
    "gather_objects",
    "group_apart",
    "host_group",
    "is_running",
    "list_ranks",
    "meet",
    "new_group",
    "on_every_rank",
    "on_rank_zero",
    "once_a_node",
    "patient_barrier",
    "reached_by",
    "silence",
    "this_machine",
    "wait_for_rank_zero",
    "wait_with_messages",
    "waits_in_vain",
]
