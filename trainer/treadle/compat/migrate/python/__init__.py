"""Programs in Python, rewritten with libcst: formatting and comments stay.

Start with ``source.py``, which rewrites one program. ``bindings.py`` finds what its imports bind, ``uses.py`` where
that is used, ``imports.py`` writes the imports anew, ``strings.py`` reads names in strings, ``loggers.py`` those of
loggers, ``outdated.py`` finds what Lightning 1 had, and ``rewriting.py`` puts the new statements and expressions in.
"""
