"""The command ``treadle``. Start with ``main.py``; each other file is one sub-command."""

from treadle.cli.main import main

__all__ = ["main"]
