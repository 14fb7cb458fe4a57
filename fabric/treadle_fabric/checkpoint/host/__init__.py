"""The host's memory: what its processes share when they read a checkpoint, and what a save in the background keeps.

``mapping.py`` maps files into memory, so that all processes of a host have one copy of what they read; ``checked.py``
has it checked by one of them; ``arena.py`` is the memory into which a state is copied to be written later. Imports only
the foundation.
"""
