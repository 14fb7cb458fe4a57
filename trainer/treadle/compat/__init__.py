"""Code that was written for Lightning: run as it is, or rewritten once.

The table of names is in :mod:`treadle.names`. :mod:`treadle.compat.importing` imports by it: under ``treadle run``,
and after :func:`replace_lightning`. ``shim/`` is the folder that ``treadle run`` puts in front of Python's path:
packages of Lightning's names that do no more than call ``replace_lightning``, and what tells of their version.
"""

from treadle.compat.importing import SHIM, replace_lightning

__all__ = ["SHIM", "replace_lightning"]
