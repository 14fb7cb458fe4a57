"""How callbacks decide by a logged metric, and decide alike on every rank.

Open ``monitored_metric.py`` first: the metric, whether it may still be logged, and at which hook it decides.
``on_rank_zero.py`` lets rank 0 act and tells all ranks the result.

These modules import the runtime only, and no callback.
"""
