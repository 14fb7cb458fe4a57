"""What makes one file of a DeepSpeed folder, where users of a trainer look for it."""

from treadle_fabric.checkpoint import convert_zero_checkpoint_to_fp32_state_dict

__all__ = ["convert_zero_checkpoint_to_fp32_state_dict"]
