"""One training batch. Start with ``automatic.py``; ``manual.py`` is manual optimization, ``clipping.py`` clips
gradients, ``arguments.py`` finds out what a user's step takes.
"""

from treadle.loops.step.arguments import evaluation_arguments, step_arguments
from treadle.loops.step.automatic import AutomaticStep
from treadle.loops.step.clipping import Clipping
from treadle.loops.step.manual import ManualStep, manual_backward

__all__ = ["AutomaticStep", "Clipping", "ManualStep", "evaluation_arguments", "manual_backward", "step_arguments"]
