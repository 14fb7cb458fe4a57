"""Code that was written for Lightning: run as it is, or rewritten once.

``names.toml`` is the table of names, read by :mod:`treadle.compat.table` alone; open that file first.
"""
