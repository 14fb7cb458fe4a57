"""What callbacks that write checkpoints are made of: names, paths, links, and the ranking of what is kept.

Open ``ranking.py`` first: which checkpoints are kept, as a frozen value with pure functions. ``triggers.py`` says when
a checkpoint is due, ``names.py`` fills file name templates, ``paths.py`` and ``links.py`` look at and change files.
The callback that uses them is ``callbacks/model_checkpoint.py``.

These modules import the runtime and ``callbacks/monitoring``, and no callback.
"""
