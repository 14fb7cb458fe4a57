"""One training batch. Start with ``automatic.py``: automatic optimization, made of the parts beside it.

``gradients.py`` is forward, zero, scale and backward; ``backward.py`` the backward pass with its hooks;
``preparation.py`` makes gradients ready for the optimizer; ``clipping.py`` clips them. ``manual.py`` is manual
optimization.
"""

from treadle.loops.step.automatic import AutomaticStep
from treadle.loops.step.backward import manual_backward
from treadle.loops.step.clipping import Clipping
from treadle.loops.step.manual import ManualStep

__all__ = ["AutomaticStep", "Clipping", "ManualStep", "manual_backward"]
