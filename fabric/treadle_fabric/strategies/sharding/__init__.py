"""The parts of sharding: a rank holds a part of each parameter, gradient and optimizer state.

The strategy is ``fsdp.py`` in the folder above. ``arguments.py`` makes its arguments options, ``wrapping.py`` chooses
the submodules that are gathered one after the other, ``materialize.py`` gives a module from the meta device its values,
and ``recompute.py`` is activation checkpointing. Imports the bases of strategies and what is below them.
"""

__all__: list[str] = []
