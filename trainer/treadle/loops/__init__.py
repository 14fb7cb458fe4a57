"""The loops: fit, its epochs and steps, evaluation and prediction.

Start with ``fit.py``, then ``epoch.py`` and ``step/``. ``optimizers.py`` reads what ``configure_optimizers`` returned,
``schedulers.py`` steps the learning-rate schedulers, ``stopping.py`` asks whether training ends, ``schedule.py``
computes when validation and other things are due, and ``inference.py`` keeps tensors of an evaluation out of training.
Imports run, data, checkpoint and numbers.
"""
