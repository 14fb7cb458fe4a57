"""How callbacks decide by a logged metric, and decide alike on every rank.

Open ``monitored_metric.py`` first: the metric, whether it may still be logged, and at which hook it decides.
``intervals.py``: when a callback that follows the loggers is due.

These modules import the runtime only, and no callback.
"""
