"""Hyper-parameters and metrics on their way to a logger, where users of Lightning Fabric look for them."""

from treadle_fabric.loggers import hyperparameters, scalars

__all__: list[str] = []

_convert_params = hyperparameters.from_namespace
_sanitize_callable_params = hyperparameters.call_functions
_flatten_dict = hyperparameters.join_names
_sanitize_params = hyperparameters.to_scalars
_convert_json_serializable = hyperparameters.to_json_values
_is_json_serializable = hyperparameters.is_json
_add_prefix = scalars.add_prefix
