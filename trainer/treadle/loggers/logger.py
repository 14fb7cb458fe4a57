"""The base of loggers, where users of a trainer look for it."""

from treadle_fabric.loggers import DummyExperiment, DummyLogger, Logger, rank_zero_experiment

__all__ = ["DummyExperiment", "DummyLogger", "Logger", "rank_zero_experiment"]
