"""What users subclass: LightningModule, LightningDataModule, and the hooks they inherit.

Start with ``hooks.py``, which has the order of all hooks. ``hparams.py`` keeps constructor arguments, and
``loading.py`` makes an object from a checkpoint, ``configured/`` one whose arguments came from a config;
``overriding.py`` and ``steps/`` read what a user's methods override, take and return; ``optimizer.py`` is what
``self.optimizers()`` gives, and ``in_fabric/`` what a module has of a trainer in a loop by hand; ``modes.py`` and
``shared_parameters.py`` are about the submodules and parameters of a module, and ``export.py`` makes programs of it.
Imports metrics and contracts.
"""

from treadle.module.datamodule import LightningDataModule
from treadle.module.module import LightningModule
from treadle.module.steps.returned import LRSchedulerConfig

__all__ = ["LRSchedulerConfig", "LightningDataModule", "LightningModule"]
