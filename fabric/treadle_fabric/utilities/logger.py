"""Hyper-parameters and metrics on their way to a logger, where users of Lightning Fabric look for them."""

from treadle_fabric.loggers import conversions, scalars

__all__: list[str] = []

_convert_params = conversions.from_namespace
_sanitize_callable_params = conversions.call_functions
_flatten_dict = conversions.join_names
_sanitize_params = conversions.to_scalars
_convert_json_serializable = conversions.to_json_values
_is_json_serializable = conversions.is_json
_add_prefix = scalars.add_prefix
