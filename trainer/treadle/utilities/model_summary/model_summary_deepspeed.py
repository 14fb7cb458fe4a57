"""The summary of a module under DeepSpeed, where users of a trainer look for it."""

from treadle.callbacks.summary.layers import DeepSpeedSummary

__all__ = ["DeepSpeedSummary"]
