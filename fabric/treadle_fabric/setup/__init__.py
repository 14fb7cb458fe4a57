"""What ``Fabric.setup`` returns: wrappers around the user's module and optimizer, and the checks before.

Start with ``module.py``. ``optimizer.py`` wraps an optimizer, ``wrapped.py`` gets the user's objects out of wrappers,
and ``checks.py`` refuses what cannot be set up. Imports strategies, data and what is below them.
"""

from treadle_fabric.setup.checks import check_loader, check_loggers, check_module, check_optimizer, check_ownership
from treadle_fabric.setup.module import FabricModule
from treadle_fabric.setup.optimizer import FabricOptimizer
from treadle_fabric.setup.wrapped import engine_of, is_wrapped, put_back, unwrap

__all__ = [
    "FabricModule",
    "FabricOptimizer",
    "check_loader",
    "check_loggers",
    "check_module",
    "check_optimizer",
    "check_ownership",
    "engine_of",
    "is_wrapped",
    "put_back",
    "unwrap",
]
