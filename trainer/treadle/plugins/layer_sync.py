"""Layers that share over the ranks, where users of a trainer look for them."""

from treadle.run.layer_sync import LayerSync, TorchSyncBatchNorm

__all__ = ["LayerSync", "TorchSyncBatchNorm"]
