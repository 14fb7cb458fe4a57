"""The parts of model parallelism: ranks work together on one batch, along the named dimensions of a mesh.

The strategy is ``model_parallel.py`` in the folder above. ``plans.py`` shards layers over the tensor-parallel ranks,
``loss.py`` has the cross entropy of sharded logits, and ``sequence.py`` the attention over shared sequences, of which
loaders get slices in ``slices.py``. ``substitution.py`` puts these functions in the place of torch's while a model
runs. ``replicas.py`` is about what ranks must have alike, ``explain.py`` about errors of models whose layers are
sharded, and ``sizes.py`` about the dimensions of the mesh. ``pipeline/`` runs models in stages. Imports the bases of
strategies and what is below them.
"""

__all__: list[str] = []
