"""Checkpoint folders are read here: whole, or each tensor when it is used, or of each the part that a rank holds.

Start with ``folder.py``, which opens a folder; ``tensor.py`` has the tensors that are read later, ``regions.py`` fills
a rank's tensors with parts of them, and ``chunks.py`` reads parts from files. No process group takes part.
"""
