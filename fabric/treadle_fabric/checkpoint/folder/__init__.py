"""A checkpoint that is a folder: which files it has, its manifest, and how it takes its name.

Start with ``layout.py``. ``checksummed.py`` writes files whose checksums are known then, ``manifest.py`` lists the
files with their checksums, ``placing.py`` puts a finished folder in place, whole or not at all, and ``names.py`` makes
names that a file system takes. ``destination.py`` is where a save writes to and ``source.py`` where a load reads from,
and ``remote.py`` has the folders behind URLs. Imports only the foundation.
"""
