"""The loops: fit, its epochs and steps, evaluation and prediction.

Start with ``fit.py``, then ``epoch.py`` and ``step/``. ``optimizers.py`` reads what ``configure_optimizers`` returned
and steps the schedulers; ``schedule.py`` computes when things fall. Imports run, data, checkpoint and numbers.
"""
