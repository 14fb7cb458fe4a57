"""The path of a value from ``self.log`` to loggers, progress bar and callbacks.

Start with ``bus.py``: values go into slots (``slot.py``) and leave them together, reduced over the ranks in one
collective (``reduction.py``). ``values.py`` says what can be logged, ``options.py`` has the options of a call, and
``sinks.py`` decides where its value goes. ``latest.py`` keeps the newest value of each name, ``table.py`` prints
results. Imports contracts only.
"""
