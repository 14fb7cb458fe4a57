"""What users subclass: LightningModule, LightningDataModule, and the hooks they inherit.

Start with ``hooks.py``, which has the order of all hooks. ``hparams.py`` keeps constructor arguments, and
``loading.py`` makes an object from a checkpoint, ``configured/`` one whose arguments came from a config;
``overriding.py`` and ``step_arguments.py`` read what a user's methods override and take, and ``returned.py`` has the
types of what they return; ``modes.py`` and ``shared_parameters.py`` are about the submodules and parameters of a
module, and ``export.py`` makes ONNX programs. Imports metrics and contracts.
"""

from treadle.module.datamodule import LightningDataModule
from treadle.module.module import LightningModule
from treadle.module.returned import LRSchedulerConfig

__all__ = ["LRSchedulerConfig", "LightningDataModule", "LightningModule"]
