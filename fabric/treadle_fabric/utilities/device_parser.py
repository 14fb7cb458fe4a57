"""What reads ``devices=``, where users of Lightning Fabric look for it."""

from treadle_fabric.accelerators import gpus

__all__: list[str] = []

_determine_root_gpu_device = gpus.first_gpu
_parse_gpu_ids = gpus.parse_gpus
_select_auto_accelerator = gpus.preferred_accelerator
