"""One process fails, all stop, and the failure of the right rank is shown.

The processes of a run are the *members* of a launch, one for each rank. They share a *board*, on which each leaves
*notes* that are written once and never change. A training step costs nothing more: a thread looks at the board five
times a second. Open :mod:`~treadle_fabric.failures.member` first.

- ``notes``: a type for each note.
- ``board``: what a board does; ``folder_board`` for processes that a launcher started on one machine, ``store_board``
  for those that torchrun, SLURM or MPI started, on several, ``memory_board`` for tests.
- ``hosts``: how hosts share failures; where launchers on several machines started the processes, a board that links a
  folder to a store.
- ``member``: what one rank does when it fails, and when another one does. ``membership``: the member of this process.
- ``grace``: who may go on for how long once all must stop.
- ``report``: what is printed; ``places``: where each rank was when a collective failed.
- ``process``: how a process reads the clock, prints and ends, which tests replace.

The states of a member, and the note that tells of each::

    joined       Joined             runs; the others rely on it
    failed       Failed             an exception left the launched function; the script may still catch it
    interrupted  Interrupted        it saw a KeyboardInterrupt; the script may still catch it
    stopping     Stopped            it ends because another rank failed
    ended        Ended              came to its end without an error
    released     Released           needs the board no longer

The notes (N: the number of a failure, counted from 1; R: a global rank)::

    note             written by                      read by, and what follows
    Launch           the launcher, at the start      started processes: their ranks, and whether the launcher is theirs
    Joined R         rank R                          all: a rank that joined and did not fail makes a failure final
    Peer R           rank R, without a launcher      ranks on its machine: whether its process is still there
    FirstFailure N   the first rank that fails; for  all: the traceback of this rank is shown, and no other
                     a dead rank its launcher or a
                     peer
    Failed N R       each rank that fails            all: rank R gets longer to end; where all ranks fail and none ends,
                                                     the scripts caught the exception, and the run goes on
    Final N          a process that ends with it     all others: stop
    Place N R        rank R, if a collective failed  the process that reports: "where each rank was"
    Reporting N      the process that prints it      all others: do not print it
    Reported N       the same, when it is printed    ranks that stop: they say so after it
    Stopped N R      rank R, when it stops           rank R: says so once, whichever of its threads comes first
    Interrupted R    rank R                          its launcher: rank R needs no SIGINT any more
    FinalInterrupt   a rank that an interrupt ends   the launcher: end all; ranks: a lost connection is no failure
    Ended R          rank R or its launcher          the process that reports: rank R did not come to the collective
    Crash R          faulthandler in rank R          the process that claims its death: the traceback
    LauncherDied     the first rank that notices     the others: end without a word
    Over             the rank that hosts the store   the others: release the store and ask it no more
    Released R       rank R                          the host: may end; peers: the end of rank R is healthy
    Changed E G      a rank whose DDP engine E has   the others: those that went on without wrapping it say so
                     to wrap its module again
    Unchanged E G    a rank that went on             the rank that waits: raises an error
    Done M G R       a rank that has no batch left   ranks with batches: a collective would wait for rank R
    Held M G R       a rank in such a collective     the rank that raises the error: where, in which batch
    Blocked M G      the same                        ranks that wait at meeting M: raise an error

What happens:

- *An exception*: the rank claims it (``FirstFailure``, ``Failed``) before any clean-up. A rank that only lost the
  connection to another one waits 2 s for the cause to claim first. When the exception leaves the script, it is final.
- *A final failure*: each other rank gets the time of :mod:`~treadle_fabric.failures.grace`, then says that it stopped
  because another rank failed, and ends itself; a launcher ends the processes that do not.
- *A death*: the launcher, or a peer where there is none, claims it for the dead rank, as final.
- *An interrupt*: a launcher passes it on, and nobody fails. Without one it ends the others as a failure does.
- *A run that is to end* (``end_run``): a failure with an exit status of its own, for example 143 after SIGTERM. Ranks
  that end it with the same status share one failure.

Imports only the foundation, environments and coordination; launchers, strategies and the trainer import it.
"""

from typing import TYPE_CHECKING

from treadle_fabric.checks import on_demand
from treadle_fabric.failures.membership import call_at_looks, claim_failure, current_member, end_run, first_failure
from treadle_fabric.failures.notes import Failure
from treadle_fabric.failures.process import end_process

if TYPE_CHECKING:
    from treadle_fabric.failures.hosts.group import join_group, leave_group

__all__ = [
    "Failure",
    "call_at_looks",
    "claim_failure",
    "current_member",
    "end_process",
    "end_run",
    "first_failure",
    "join_group",
    "leave_group",
]

if not TYPE_CHECKING:  # for several processes only
    __getattr__ = on_demand(
        __name__, dict.fromkeys(("join_group", "leave_group"), "treadle_fabric.failures.hosts.group")
    )
