"""What ``Fabric.setup`` returns: wrappers around the user's module and optimizer, and the checks before.

Start with ``module.py``. ``optimizer.py`` wraps an optimizer, ``wrapped.py`` gets the user's objects out of wrappers,
``stateless.py`` tells of what a checkpoint keeps nothing, ``checks.py`` refuses what cannot be set up, and
``metrics.py`` has torchmetrics objects gather their states. Imports strategies, data and what is below them.
"""

from treadle_fabric.setup.device_aware import as_moved
from treadle_fabric.setup.metrics import compute_alone, forget_computed
from treadle_fabric.setup.module import FabricModule, engine_of, method_of
from treadle_fabric.setup.optimizer import FabricOptimizer
from treadle_fabric.setup.wrapped import is_wrapped

__all__ = [
    "FabricModule",
    "FabricOptimizer",
    "as_moved",
    "compute_alone",
    "engine_of",
    "forget_computed",
    "is_wrapped",
    "method_of",
]
