"""The names of Lightning, as data: where Treadle has them, and what became of those that only Lightning 1 had.

``names.toml`` is the table of names, read by ``table.py``; ``older.toml``, read by ``older.py``, is for Lightning 1.
Both files are read when something asks for a name, and not before: programs that are run, rewritten or loaded ask all
the time, and others when an argument or a method is unknown. Imports nothing of this package.
"""
