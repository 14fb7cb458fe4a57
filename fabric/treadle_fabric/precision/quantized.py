"""The quantized layers of bitsandbytes, which here also load what they saved: ``FourBitLinear`` and ``Int8Linear``.

The classes are made when they are first asked for, as bitsandbytes takes seconds to import, and is an extra.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module

__all__ = ["make_layer", "quantized_layers"]


@functools.cache
def _bitsandbytes() -> Any:
    with warnings.catch_warnings():  # torch's own, about what bitsandbytes imports
        warnings.simplefilter("ignore", DeprecationWarning)
        import bitsandbytes
    return bitsandbytes


def quantized_layers() -> tuple[type[Module], ...]:
    """Return the classes of layers that are quantized already."""
    layers = _bitsandbytes().nn
    return layers.Linear4bit, layers.Linear8bitLt


class _FourBitStates(Linear):
    """A linear layer whose weight is in 4 bits; it loads weights of linear layers, and those that it saved."""

    weight: Any
    compute_dtype: Any
    quant_state: Any

    @property
    def support_avx512bf16_for_cpu(self) -> bool:
        """False: bitsandbytes packs weights anew for such CPUs; when a state is saved, scales stay transposed."""
        return False

    @support_avx512bf16_for_cpu.setter
    def support_avx512bf16_for_cpu(self, supported: bool) -> None: ...

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing_keys: list[str], *rest: Any
    ) -> None:  # fmt: skip
        key = f"{prefix}weight"
        statistics = {name: value for name, value in state_dict.items() if name.startswith(f"{key}.")}
        weight = state_dict.get(key)
        if weight is None or (not statistics and not self.weight.bnb_quantized):
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, *rest)
            return
        if statistics:
            named = {name.removeprefix(f"{key}."): value for name, value in statistics.items()}
            self._take(weight, _bitsandbytes().functional.QuantState.from_dict(named, device=self.weight.device))
        elif _fits(self, weight, key, rest[-1]):
            self._take(*self._quantize(weight))
        others = {name: value for name, value in state_dict.items() if name != key and name not in statistics}
        super()._load_from_state_dict(others, prefix, metadata, strict, missing_keys, *rest)
        if key in missing_keys:
            missing_keys.remove(key)

    def _quantize(self, weight: Tensor) -> Any:
        kept, made = self.weight, self.compute_dtype or torch.float16
        return _bitsandbytes().functional.quantize_4bit(
            weight.to(kept.device, made).contiguous(),
            blocksize=kept.blocksize,
            compress_statistics=kept.compress_statistics,
            quant_type=kept.quant_type,
            quant_storage=kept.quant_storage,
        )

    def _take(self, packed: Tensor, state: Any) -> None:
        self.weight.data = packed.to(self.weight.device, copy=True)
        self.weight.quant_state = self.quant_state = state
        self.weight.bnb_quantized = True


class _Int8States(Linear):
    """A linear layer whose weight is in 8 bits; it loads weights of linear layers, and those that it saved."""

    weight: Any
    state: Any

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing_keys: list[str], *rest: Any
    ) -> None:  # fmt: skip
        key = f"{prefix}weight"
        weight, scales = state_dict.get(key), state_dict.get(f"{prefix}SCB")
        if weight is None or self.state.has_fp16_weights or (scales is None and self.weight.dtype != torch.int8):
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, *rest)
            return
        if scales is not None:
            self._take(weight, scales)
        elif _fits(self, weight, key, rest[-1]):
            made = _bitsandbytes().functional.int8_vectorwise_quant(
                weight.to(self.weight.device, torch.float16).contiguous()
            )
            self._take(made[0], made[1])
        taken = (key, f"{prefix}SCB", f"{prefix}weight_format")
        others = {name: value for name, value in state_dict.items() if name not in taken}
        super()._load_from_state_dict(others, prefix, metadata, strict, missing_keys, *rest)
        if key in missing_keys:
            missing_keys.remove(key)

    def _take(self, weight: Tensor, scales: Tensor) -> None:
        kept = self.weight
        kept.data = weight.to(kept.device, copy=True)
        kept.CB, kept.SCB = kept.data, scales.to(kept.device, copy=True)  # the next forward moves both to the state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Module:
        """Move the scales along with the weight, wherever they are now."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for holder in (self.weight, self.state):
            if holder.CB is not None:
                holder.CB, holder.SCB = self.weight.data, holder.SCB.to(self.weight.device)
        return self


_CLASSES = {"FourBitLinear": (_FourBitStates, "Linear4bit"), "Int8Linear": (_Int8States, "Linear8bitLt")}


@functools.cache
def _class(name: str) -> Any:
    states, base = _CLASSES[name]
    bases = (states, getattr(_bitsandbytes().nn, base))
    return type(name, bases, {"__module__": __name__, "__doc__": states.__doc__})


def __getattr__(name: str) -> Any:  # for pickle, too
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _class(name)


def make_layer(layer: Linear, mode: str, dtype: torch.dtype) -> Module:
    """Make a layer that quantizes its weight when it reaches its device; the bias is that of ``layer``.

    Args:
        layer: A linear layer.
        mode: Of ``BitsandbytesPrecision``.
        dtype: The type of the products.
    """
    size = (layer.in_features, layer.out_features)
    bias = layer.bias is not None
    made: Any
    if mode.startswith("int8"):
        trains = mode == "int8-training"
        made = _class("Int8Linear")(*size, bias=bias, has_fp16_weights=trains, threshold=6.0, device="meta")
        # from the host, because bitsandbytes quantizes weights on their way from there
        weight = layer.weight.data if trains or layer.weight.is_meta else layer.weight.data.cpu()
        made.weight = _bitsandbytes().nn.Int8Params(
            weight, has_fp16_weights=trains, requires_grad=trains and layer.weight.requires_grad
        )
    else:
        kind, _, nested = mode.partition("-")
        made = _class("FourBitLinear")(
            *size, bias=bias, compute_dtype=dtype, quant_type=kind, compress_statistics=nested == "dq", device="meta"
        )
        made.weight = _bitsandbytes().nn.Params4bit(
            layer.weight.data, requires_grad=False, quant_type=kind, compress_statistics=nested == "dq", module=made
        )
    made.bias = layer.bias
    result: Module = made.train(layer.training)
    return result


def _fits(layer: Any, weight: Tensor, key: str, errors: list[str]) -> bool:
    shape = (layer.out_features, layer.in_features)
    if tuple(weight.shape) == shape:
        return True
    errors.append(f"size mismatch for {key}: the checkpoint has {tuple(weight.shape)}, the layer is of {shape}.")
    return False
