"""The command ``treadle-fabric``. Start with ``main.py``; each other file is one sub-command."""

from treadle_fabric.cli.main import main

__all__ = ["main"]
