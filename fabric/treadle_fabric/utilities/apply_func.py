"""What moves batches, where users of Lightning Fabric look for it."""

from lightning_utilities.core.apply_func import apply_to_collection

from treadle_fabric.batches import move_data_to_device

__all__ = ["apply_to_collection", "move_data_to_device"]
