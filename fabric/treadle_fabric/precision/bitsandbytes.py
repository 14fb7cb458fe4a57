"""Quantized layers of bitsandbytes: weights in 4 or 8 bits, to run large models, and to train adapters of them."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch.nn import Linear, Module

from treadle_fabric.checks import require_package
from treadle_fabric.errors import DeviceUnavailableError, MisconfigurationException, near_names
from treadle_fabric.precision.layers import find_linear_layers, replace_layers, told_names
from treadle_fabric.precision.precision import Precision, cast_floating, cast_module, default_dtype, half_init
from treadle_fabric.precision.quantized import make_layer, quantized_layers

__all__ = ["BitsandbytesPrecision"]

_MODES = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int8-training")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class BitsandbytesPrecision(Precision):
    """Quantized linear layers of bitsandbytes, on GPUs and, but for ``"int8-training"``, on the CPU.

    Linear layers are replaced when the model is set up, and each weight is quantized on its way to the device; all
    other weights are cast to ``dtype``. Quantized weights are not trained (but for ``"int8-training"``): train adapters
    beside them, whose modules ``ignore_modules`` names. A layer that shares its weight with another one stays as it is,
    and a message says so. Where the model has layers of bitsandbytes already, none is replaced.

    Modules made in ``fabric.init_module()`` are in the host's memory until they are set up, so that the device holds at
    most one weight at a time that is not quantized. With ``empty_init=True`` they take up memory there only when they
    are filled. Layers load checkpoints of full weights, which they quantize, and checkpoints that they wrote.

    Args:
        mode: ``"nf4"`` or ``"fp4"``: 4 bits; with ``"-dq"`` the scales are quantized, too. ``"int8"``: 8 bits.
            ``"int8-training"``: 16-bit weights that are trained, products in 8 bits.
        dtype: The type of products and of all other weights. Default: float16 for the int8 modes, which take no other;
            bfloat16 for the others where the device has it, otherwise float16.
        ignore_modules: Names of modules whose linear layers are not replaced, such as ``{"lm_head"}``.

    Raises:
        MisconfigurationException: There is no such mode, or it does not go with the type.
        MissingPackageError: bitsandbytes is not installed.
    """

    converts = True
    replaces_parameters = True

    def __init__(
        self,
        mode: Literal["nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int8-training"],
        dtype: torch.dtype | None = None,
        ignore_modules: str | Iterable[str] | None = None,
    ) -> None:
        super().__init__()
        if mode not in _MODES:
            raise MisconfigurationException(
                f"BitsandbytesPrecision(mode={mode!r}) is unknown. {near_names(str(mode), _MODES)}"
            )
        if dtype is None and mode.startswith("int8"):
            dtype = torch.float16
        if mode.startswith("int8") and dtype is not torch.float16:
            raise MisconfigurationException(
                f"BitsandbytesPrecision(mode={mode!r}, dtype={dtype}): the int8 modes compute with torch.float16. Leave"
                " dtype out, or use mode='nf4'."
            )
        if dtype is not None and dtype not in _DTYPES:
            raise MisconfigurationException(
                f"BitsandbytesPrecision(dtype={dtype!r}): must be one of {', '.join(map(str, _DTYPES))}."
            )
        require_package("bitsandbytes", "BitsandbytesPrecision", "bitsandbytes")
        self.mode = mode
        self.ignore_modules = set(told_names(ignore_modules or (), "BitsandbytesPrecision: ignore_modules"))
        self._dtype = dtype
        self._device = "cpu"

    @property
    def dtype(self) -> torch.dtype:
        """The type of products and of all weights that are not quantized."""
        if self._dtype is None:  # asks the GPU, so not before processes are forked
            able = self._device != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
            self._dtype = torch.bfloat16 if able else torch.float16
        return self._dtype

    def place(self, device: str) -> None:
        """Learn on which devices the run is, for the default type, and refuse the CPU for ``"int8-training"``."""
        if self.mode == "int8-training" and device == "cpu":
            raise DeviceUnavailableError(
                "BitsandbytesPrecision('int8-training') needs a GPU: bitsandbytes has no such product for the CPU. Use"
                " precision='16-true', or 'int8' without training the quantized layers."
            )
        self._device = device

    def convert_module(self, module: Module) -> Module:
        """Cast the weights, and put quantized layers in the place of linear ones.

        Raises:
            MisconfigurationException: There is no layer to replace.
        """
        quantized = quantized_layers()
        module = cast_module(module, self.dtype)
        if any(isinstance(layer, quantized) for layer in module.modules()):
            for layer in module.modules():
                if isinstance(layer, quantized) and hasattr(layer, "compute_dtype"):
                    vars(layer).update(compute_dtype=self.dtype, compute_type_is_set=True)
            return module
        owners = Counter(id(p) for layer in module.modules() for p in layer._parameters.values() if p is not None)

        def refuse(layer: Linear, name: str) -> str:
            return "shares its weight with another layer" if owners[id(layer.weight)] > 1 else ""

        layers = find_linear_layers(module, self.ignore_modules, refuse)
        if not layers.chosen:
            raise layers.nothing(f"BitsandbytesPrecision({self.mode!r})", module, "Use precision='bf16-true'.")
        made = {layer: make_layer(layer, self.mode, self.dtype) for layer in layers.chosen.values()}
        frozen = "" if self.mode == "int8-training" else ", and their weights are not trained"
        layers.tell(f"are quantized ({self.mode}){frozen}", f"stay in {str(self.dtype).removeprefix('torch.')}")
        return replace_layers(module, made)

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """Return a context in which new tensors are of :attr:`dtype`."""
        return _init(self.dtype)

    @contextlib.contextmanager
    def module_init_context(self) -> Generator[None]:
        """Return a context in which new modules are in the host's memory, with weights of :attr:`dtype`."""
        with torch.device("cpu"), _init(self.dtype):
            yield

    def forward_context(self) -> AbstractContextManager[Any]:
        """Return a context in which :attr:`dtype` is torch's default dtype."""
        return default_dtype(self.dtype)

    def convert_input(self, data: Any) -> Any:
        """Cast floating-point tensors to :attr:`dtype`."""
        return cast_floating(data, self.dtype)

    def convert_output(self, data: Any) -> Any:
        """Cast floating-point tensors to torch's default dtype."""
        return cast_floating(data, torch.get_default_dtype())


def _init(dtype: torch.dtype) -> AbstractContextManager[Any]:
    return default_dtype(dtype) if dtype == torch.float32 else half_init(dtype)
