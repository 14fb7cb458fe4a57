"""What moves batches and changes their leaves, where users of Lightning Fabric look for it."""

from lightning_utilities.core.apply_func import apply_to_collection

from treadle_fabric.batches import convert_tensors_to_scalars, convert_to_tensors, move_data_to_device

__all__ = ["apply_to_collection", "convert_tensors_to_scalars", "convert_to_tensors", "move_data_to_device"]
