"""Layers that share over the ranks what they compute of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["LayerSync", "TorchSyncBatchNorm"]


class LayerSync(ABC):
    """Makes layers of a module share over the ranks, for a run with several of them: ``Trainer(plugins=...)``."""

    @abstractmethod
    def apply(self, model: nn.Module) -> nn.Module:
        """Make the layers share, in place, and return the module; before it is set up."""

    @abstractmethod
    def revert(self, model: nn.Module) -> nn.Module:
        """Undo :meth:`apply`, in place, and return the module; when the run has ended."""


class TorchSyncBatchNorm(LayerSync):
    """Batch norm by the statistics of all ranks, torch's ``SyncBatchNorm``: what ``Trainer(sync_batchnorm=True)`` uses.

    Layers stay the same objects, with their parameters, statistics and hooks.
    """

    def apply(self, model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
                module.__dict__.update(_class_before=type(module), process_group=None)
                module.__class__ = nn.SyncBatchNorm
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        for module in model.modules():
            if (before := module.__dict__.pop("_class_before", None)) is not None:
                module.__class__ = before
                del module.__dict__["process_group"]
        return model
