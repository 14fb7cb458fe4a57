"""The table of a model's layers.

Open ``layers.py`` first: it looks at the modules and runs the example input. ``formatting.py`` turns the numbers into
text, and ``fitting.py`` makes the table as narrow as the terminal. The callbacks that print the table are
``callbacks/model_summary.py`` and ``callbacks/rich_model_summary.py``.

These modules import the runtime and ``module/modes.py``, and no callback.
"""
