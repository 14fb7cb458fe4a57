"""Float8 training with NVIDIA's Transformer Engine, which has layers and scaling recipes of its own."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.nn import LayerNorm, Linear, Module

from treadle_fabric.checks import require_package
from treadle_fabric.errors import MisconfigurationException, near_names
from treadle_fabric.precision.layers import (
    INSTEAD,
    check_float8,
    check_on_cuda,
    find_linear_layers,
    refuse_odd_sizes,
    replace_layers,
)
from treadle_fabric.precision.precision import Precision, cast_floating, cast_module, default_dtype
from treadle_fabric.rank_zero import rank_zero_info

__all__ = ["TransformerEnginePrecision"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TransformerEnginePrecision(Precision):
    """Float8 training with NVIDIA's Transformer Engine.

    Its layers take the place of ``Linear`` and ``LayerNorm`` when the model is set up, and take over their parameters:
    an optimizer that was made before steps the same ones. The layers are no subclasses of torch's. A linear layer whose
    numbers of inputs or outputs are not multiples of 16 stays what it is, and a message says so.

    A checkpoint of torch's layers loads into those of Transformer Engine. The reverse takes ``strict=False``, because
    its layers also save scales, under ``"..._extra_state"``.

    Args:
        weights_dtype: The type of the weights and of what goes into the model.
        recipe: The scaling: an object of ``transformer_engine.common.recipe``, or the arguments of its
            ``DelayedScaling`` as a dict, with the name of a format as ``"fp8_format"``. Default: ``DelayedScaling()``.
        replace_layers: Replace layers: False leaves that to you. Default (None): yes, unless the model has layers of
            Transformer Engine already.
        fallback_compute_dtype: The type in which autocast runs what has no float8. Default: ``weights_dtype``.

    Raises:
        MisconfigurationException: A type or the recipe is none of these.
        MissingPackageError: Transformer Engine is not installed.
    """

    converts = True

    def __init__(
        self,
        *,
        weights_dtype: torch.dtype,
        recipe: Mapping[str, Any] | Any | None = None,
        replace_layers: bool | None = None,
        fallback_compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        fallback = fallback_compute_dtype or weights_dtype
        for name, dtype in (("weights_dtype", weights_dtype), ("fallback_compute_dtype", fallback)):
            if dtype not in _DTYPES:
                raise MisconfigurationException(
                    f"TransformerEnginePrecision({name}={dtype!r}): must be one of {', '.join(map(str, _DTYPES))}."
                )
        require_package("transformer_engine", "TransformerEnginePrecision", "transformer-engine")
        self.precision = "transformer-engine-float16" if weights_dtype == torch.float16 else "transformer-engine"
        self.weights_dtype = weights_dtype
        self.recipe = _recipe(recipe)
        self.replace_layers = replace_layers
        self.fallback_compute_dtype = fallback
        self.autocasts = fallback != weights_dtype  # which keeps casts of weights

    def place(self, device: str) -> None:
        """Refuse other devices than GPUs."""
        check_on_cuda(self.precision, device, INSTEAD)

    def convert_module(self, module: Module) -> Module:
        """Replace layers, and cast the weights.

        Raises:
            DeviceUnavailableError: The GPU has no float8.
            MisconfigurationException: There is no layer to replace, nor one that was replaced.
        """
        check_float8(self.precision, INSTEAD)
        if any(_is_of_engine(layer) for layer in module.modules()):
            if self.replace_layers:
                rank_zero_info("The model has layers of Transformer Engine already: none is replaced.")
        elif self.replace_layers is not False:
            module = self._replaced(module)
        return cast_module(module, self.weights_dtype)

    def _replaced(self, module: Module) -> Module:
        import transformer_engine.pytorch as te  # seconds

        layers = find_linear_layers(module, (), lambda layer, name: refuse_odd_sizes(layer))
        if not layers.chosen:
            raise layers.nothing(f"precision={self.precision!r}", module, "Make their sizes multiples of 16.")
        made: dict[Module, Module] = {}
        for layer in layers.chosen.values():
            there = layer.bias is not None
            twin = te.Linear(layer.in_features, layer.out_features, bias=there, device="meta", **_dtype_of(layer))
            made[layer] = _with_parameters_of(layer, twin)
        for norm in module.modules():
            if type(norm) is LayerNorm and _has_twin(norm):
                twin = te.LayerNorm(norm.normalized_shape[0], eps=norm.eps, device="meta", **_dtype_of(norm))
                made[norm] = _with_parameters_of(norm, twin)
        norms = len(made) - len(layers.chosen)
        layers.tell(f"and {norms} layer norms are those of Transformer Engine now", "stay torch's")
        return replace_layers(module, made)

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """Return a context in which new tensors have the type of the weights."""
        return default_dtype(self.weights_dtype)

    def module_init_context(self) -> AbstractContextManager[Any]:
        """Return a context in which new weights have their type. Layers are replaced later, without a copy of them."""
        return default_dtype(self.weights_dtype)

    @contextmanager
    def forward_context(self) -> Generator[None]:
        """Return the context in which layers of Transformer Engine multiply in float8, with autocast for the others."""
        import transformer_engine.pytorch as te  # of an extra

        kept = torch.is_autocast_cache_enabled()
        others = torch.autocast("cuda", dtype=self.fallback_compute_dtype, cache_enabled=kept)
        with default_dtype(self.weights_dtype), others:
            if hasattr(te, "autocast"):
                engine = te.autocast(enabled=True, recipe=self.recipe)
            else:  # older versions
                engine = te.fp8_autocast(enabled=True, fp8_recipe=self.recipe)
            with engine:
                yield

    def convert_input(self, data: Any) -> Any:
        """Cast floating-point tensors to the type of the weights."""
        return cast_floating(data, self.weights_dtype)

    def convert_output(self, data: Any) -> Any:
        """Cast floating-point tensors to torch's default dtype."""
        return cast_floating(data, torch.get_default_dtype())


def _recipe(recipe: Any) -> Any:
    """The recipe as an object."""
    from transformer_engine.common.recipe import DelayedScaling, Format  # of an extra

    if recipe is not None and not isinstance(recipe, Mapping):
        return recipe
    given = dict(recipe or {})
    name = given.get("fp8_format")
    if isinstance(name, str):
        known = [each for each in dir(Format) if not each.startswith("_")]
        if name not in known:
            raise MisconfigurationException(
                f"TransformerEnginePrecision(recipe={{'fp8_format': {name!r}}}) is unknown. {near_names(name, known)}"
            )
        given["fp8_format"] = getattr(Format, name)
    try:
        return DelayedScaling(**given)
    except TypeError as error:
        raise MisconfigurationException(
            f"TransformerEnginePrecision(recipe={recipe!r}): these are no arguments of DelayedScaling: {error}."
        ) from None


def _is_of_engine(layer: Module) -> bool:
    return type(layer).__module__.startswith("transformer_engine.pytorch")


def _dtype_of(layer: Linear | LayerNorm) -> dict[str, torch.dtype]:
    return {"params_dtype": layer.weight.dtype}


def _has_twin(norm: LayerNorm) -> bool:
    """Whether Transformer Engine's layer norm, over one dimension and with both parameters, is the same function."""
    return len(norm.normalized_shape) == 1 and norm.weight is not None and norm.bias is not None


def _with_parameters_of(layer: Linear | LayerNorm, made: Module) -> Module:
    """Give a new layer the parameters of an old one; it has none of its own memory."""
    for name, parameter in layer._parameters.items():
        if parameter is not None:
            vars(parameter).update(vars(made._parameters[name]))  # what the engine notes about a parameter
            made._parameters[name] = parameter
    listen: Any = made.register_load_state_dict_post_hook
    listen(_without_scales)
    return made.train(layer.training)


def _without_scales(layer: Module, keys: Any) -> None:
    """A checkpoint of torch's layers has no scales, and begins with new ones."""
    keys.missing_keys[:] = [key for key in keys.missing_keys if not key.endswith("_extra_state")]
