"""What a class gets ``save_hyperparameters`` from, where users of a trainer look for it."""

from treadle.core.mixins.hparams_mixin import HyperparametersMixin

__all__ = ["HyperparametersMixin"]
