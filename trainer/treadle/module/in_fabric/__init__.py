"""What a module has of a trainer in a loop that is written by hand, with Fabric: see trainer.py."""

from treadle.module.in_fabric.trainer import TrainerInFabric

__all__ = ["TrainerInFabric"]
