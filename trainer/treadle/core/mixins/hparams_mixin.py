"""What a class gets ``save_hyperparameters`` from, where users of a trainer look for it."""

from treadle.module.hparams import HyperparametersMixin

__all__ = ["HyperparametersMixin"]
