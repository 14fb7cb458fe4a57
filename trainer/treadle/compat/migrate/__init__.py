"""``treadle migrate``: programs for Lightning, rewritten once for Treadle.

Start with ``tree.py``, which walks over files and gives each to what reads its kind: ``python/`` rewrites programs,
``notebooks.py`` their cells, ``configs.py`` values of YAML, JSON and TOML; ``dependencies.py`` finds what a project
installs. ``names.py`` says what a dotted name is in Treadle, by the tables in :mod:`treadle.names`. ``python/`` imports
libcst, an extra, so ``tree.py`` is imported when the command runs.
"""
