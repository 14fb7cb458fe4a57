"""Parts of the strategies for devices of XLA.

Start with ``several.py``, the base of those for several devices. ``process.py`` makes a process ready, ``exchange.py``
has the collectives, ``averaging.py`` averages gradients, ``sharded.py`` and ``parts.py`` are for parameters in parts,
and ``tensors.py`` moves modules. torch-xla is imported inside functions only.
"""
