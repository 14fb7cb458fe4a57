"""How the ranks of several processes share failures where no launcher looks after all of them: on several hosts.

Start with ``group.py``: what a process does when it joins a process group, and when it leaves. ``linked_board.py`` is
the board of processes that a launcher started on one of several hosts. ``peers.py`` looks for processes of the same
host that died without a word, and ``lines.py`` for hosts that are gone.

Imports the boards, and what a member of a launch is.
"""
