"""Checkpoints for other programs: one file out of a folder, and the weights as safetensors.

Start with ``consolidate.py``, which makes one file, and ``exporting.py``, with which every save is also exported.
``weights.py`` finds the weights in a checkpoint and shares them out to files; ``safetensors_file.py`` writes one file.
Tensors are read from a folder in pieces of a few MB, whatever their size.
"""
