"""The parts of model parallelism: ranks work together on one batch, along the named dimensions of a mesh.

The strategy is ``model_parallel.py`` in the folder above. Imports the bases of strategies and what is below them.
"""

__all__: list[str] = []
