"""The parts of sharding: a rank holds a part of each parameter, gradient and optimizer state.

The strategy is ``fsdp.py`` in the folder above. Imports the bases of strategies and what is below them.
"""

__all__: list[str] = []
