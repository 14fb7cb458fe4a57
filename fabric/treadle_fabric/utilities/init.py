"""Modules without values, where users of Lightning Fabric look for what makes them."""

from treadle_fabric.strategies import without_values

__all__: list[str] = []

_EmptyInit = without_values.empty_init
_has_meta_device_parameters_or_buffers = without_values.has_meta_tensors
_materialize = without_values.materialize_one
_materialize_meta_tensors = without_values.materialize_all
