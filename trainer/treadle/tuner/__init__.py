"""The tuner: searches for a learning rate and a batch size before training.

Start with ``tuning.py``; the searches themselves are in ``treadle.searches``. Imports the trainer and what is below it.
"""

from treadle.tuner import lr_finder as lr_finder
from treadle.tuner.tuning import Tuner

__all__ = ["Tuner"]
