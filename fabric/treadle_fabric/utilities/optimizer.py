"""The state of optimizers on a device, where users of Lightning Fabric look for it."""

from treadle_fabric.setup import optimizer

__all__: list[str] = []

_optimizer_to_device = optimizer.optimizer_to_device
_optimizers_to_device = optimizer.optimizers_to_device
