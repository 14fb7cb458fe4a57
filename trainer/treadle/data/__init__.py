"""Where the batches of a run come from, how many there are, and how they reach the device.

Start with ``training.py`` and ``evaluation.py``. ``find.py`` finds the loaders, ``lookahead.py`` tells the last batch
of an epoch, ``transfer.py`` runs the transfer hooks, ``limits.py`` and ``lengths.py`` count batches. Imports module and
below.
"""
