"""DeepSpeed: its config, its engine, and the state that its ranks have parts of.

Start with ``config.py``, which makes DeepSpeed's config of a strategy's arguments and is pure. ``engine.py`` runs a
module, or one of its methods, through DeepSpeed's engine. ``state.py`` has what a checkpoint gets of an engine and
gives back; ``partitioned.py`` knows which part of a parameter a rank holds, ``accumulating.py`` what an engine keeps
between micro-batches, and ``writing.py`` has DeepSpeed write its files into a folder of ours. DeepSpeed itself is
imported inside of functions only.
"""
