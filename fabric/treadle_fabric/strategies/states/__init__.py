"""How a strategy saves and loads states: every rank has the whole of them, or a part.

Start with ``checkpointing.py``. Imports ``strategy.py`` and what is below it.
"""

__all__: list[str] = []
