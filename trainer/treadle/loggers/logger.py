"""The base of loggers, where users of a trainer look for it."""

from treadle_fabric.loggers import DummyLogger, Logger, rank_zero_experiment

__all__ = ["DummyLogger", "Logger", "rank_zero_experiment"]
