"""The processes of a group: on which hosts they are, and whether those on the same machine are still there."""

from __future__ import annotations

import socket

from treadle_fabric.coordination import is_running, this_machine
from treadle_fabric.failures import notes
from treadle_fabric.failures.member import Member
from treadle_fabric.failures.store_board import StoreBoard, is_hosted_by_a_rank

__all__ = ["Peers"]


class Peers:
    """The processes of a group, of which one may die without a word.

    Args:
        member: This process's part.
        board: The board of all hosts.
    """

    def __init__(self, member: Member, board: StoreBoard) -> None:
        self._member = member
        self._board = board
        self._unknown = set(board.ranks) - {member.rank}
        self._pids: dict[int, int] = {}
        self._machine = this_machine()
        host = socket.gethostname()
        board.hosts[member.rank] = host
        board.post(notes.Peer(member.rank), notes.ProcessIdentity(member.pid, self._machine, host))

    def answer(self) -> bool:
        """Check, at a look of the member's; False once this group has ended."""
        if self._board.exists():
            self.check()
        return self._board.exists()

    def check(self) -> None:
        """Report a process that has died, where no launcher does."""
        rank, board = self._member.rank, self._board
        if rank != 0 and is_hosted_by_a_rank() and board.has(notes.Over()) and board.final_failure() is None:
            board.post(notes.Released(rank))
            board.remove()  # before the store goes: torch prints a warning where it asks a store in vain
        for rank in list(self._unknown):
            if (peer := board.read(notes.Peer(rank))) is not None:
                self._unknown.discard(rank)
                board.hosts[rank] = peer.host
                if peer.machine is not None and peer.machine == self._machine:
                    self._pids[rank] = peer.pid
        if self._member.board.has_launcher:
            return
        for rank, pid in list(self._pids.items()):
            if not is_running(pid):
                del self._pids[rank]
                if not board.has(notes.Released(rank)) and board.exists():
                    self._member.report_death(rank)
