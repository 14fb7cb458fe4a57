"""One process fails, all stop, and the failure of the right rank is shown.

The processes of a run are the *members* of a launch, one for each rank. They share a *board*, on which each leaves
*notes* that are written once and never change. Nothing here asks anything a step: a thread looks at the board five
times a second. Open :mod:`~treadle_fabric.failures.member` first.

- ``notes``: a type for each note.
- ``board``: what a board does; ``folder_board`` for processes that a launcher started on one machine, ``store_board``
  for those that torchrun, SLURM or MPI started, on several, ``memory_board`` for tests.
- ``member``: what one rank does when it fails, and when another one does. ``membership``: the member of this process.
- ``grace``: who may go on for how long once all must stop.
- ``report``: what is printed; ``places``: where each rank was when a collective failed.
- ``process``: the clock, the voice and the end of a process, which tests replace.

The states of a member, and the note that tells of each::

    joined       Joined             runs; the others rely on it
    failed       Failed             an exception left the launched function; the script may still catch it
    interrupted  Interrupted        it saw a KeyboardInterrupt; the script may still catch it
    stopping     Stopped            it ends because another rank failed
    ended        Ended              came to its end without an error
    released     Released           needs the board no longer

The notes (N: the number of a failure, counted from 1; R: a global rank)::

    note             written by                     read by, and what follows
    Launch           the launcher, at the start     started processes: their ranks, and whether the launcher is theirs
    Joined R         rank R                         all: a rank that joined and did not fail makes a failure final
    Peer R           rank R, without a launcher     ranks on its machine: whether the process is still there
    FirstFailure N   the first rank that fails; a   all: this rank's traceback is shown, and no other
                     launcher or a peer for a dead
    Failed N R       each rank that fails           all: it gets longer to end; where all fail and none goes down, the
                                                    scripts caught the exception, and the run goes on
    Final N          who goes down with a failure   all others: stop
    Place N R        rank R, when a collective      who reports: "where each rank was"
                     failed
    Reporting N      who prints the failure         all: so nobody else does
    Reported N       who has printed it             ranks that stop say so after it
    Stopped N R      rank R, when it stops          rank R itself: says so once, whichever of its threads comes first
    Interrupted R    rank R                         its launcher: needs no SIGINT any more
    FinalInterrupt   who an interrupt ends          the launcher ends all; a connection error is not a failure
    Ended R          rank R or its launcher         who reports: it did not come to the collective
    Crash R          faulthandler in rank R         who claims the death of R: the traceback
    LauncherDied     the first rank that sees it    the others end without a word
    Over             who hosts the store            the others release it and ask it no more
    Released R       rank R                         who hosts the board may end; a peer's end is healthy

What happens:

- *An exception*: the rank claims it (``FirstFailure``, ``Failed``) before any clean-up. A rank that only lost the
  connection to another one waits 2 s for the cause to claim first. When the exception leaves the script, it is final.
- *A final failure*: each rank gets the time of :mod:`~treadle_fabric.failures.grace` and then ends itself, after it
  has said that it stopped because of the first; a launcher ends those that cannot.
- *A death*: the launcher, or a peer where there is none, claims it for the dead rank, as final.
- *An interrupt*: a launcher passes it on, and nobody fails. Without one it ends the others as a failure does.
- *A run that is to end* (``end_run``): a failure with an exit status of its own, for example 143 after SIGTERM. Ranks
  that end it with the same status share one failure.

Imports only :mod:`treadle_fabric.errors` of the package; launchers, strategies and the trainer import it.
"""

from treadle_fabric.failures.membership import claim_failure, end_run, first_failure
from treadle_fabric.failures.notes import Failure
from treadle_fabric.failures.store_board import join_group, leave_group

__all__ = ["Failure", "claim_failure", "end_run", "first_failure", "join_group", "leave_group"]
