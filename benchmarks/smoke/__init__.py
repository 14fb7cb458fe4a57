"""The checks of ``gpu_smoke.py``. Start with ``place.py``: where they run, and what they train.

``training.py``: losses, precision, files; ``costs.py``: time, memory and waits; ``groups.py``: processes.
"""

from smoke import costs, groups, training
from smoke.place import CHECKS, Place

__all__ = ["CHECKS", "Place", "costs", "groups", "training"]
