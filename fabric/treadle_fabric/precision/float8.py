"""Float8 training with torchao: linear layers multiply numbers of 8 bits, everything else is in 16 or 32 bits."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Linear, Module

from treadle_fabric.checks import check_flag, require_package
from treadle_fabric.errors import MisconfigurationException, MissingPackageError
from treadle_fabric.precision.autocast import MixedPrecision
from treadle_fabric.precision.half import HalfPrecision
from treadle_fabric.precision.layers import (
    INSTEAD,
    check_float8,
    check_on_cuda,
    find_linear_layers,
    refuse_odd_sizes,
    told_names,
)
from treadle_fabric.precision.precision import Precision

__all__ = ["Float8Precision"]

_NAMES = ("fp8-mixed", "fp8-true")
_RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")


class Float8Precision(Precision):
    """Float8 training: linear layers multiply in float8, with scales that follow the numbers (torchao).

    Both operands of a product are rounded to 8 bits, after a division by their largest magnitude; the result is in the
    higher precision. Weights, optimizer state and checkpoints stay in the higher precision, under the same names: a
    checkpoint loads into a model that is not converted, and the reverse.

    Layers are converted in place, when the model is set up; :meth:`revert` makes them linear layers of torch again.
    Those whose numbers of inputs or outputs are not multiples of 16, lazy ones and those with a forward of their own
    stay in the higher precision, and a message says which. Speed needs large layers, and ``torch.compile``, which fuses
    the casts: ``fabric.setup(torch.compile(model))``.

    Args:
        precision: ``"fp8-mixed"`` (default): weights in float32, everything but the products under autocast to
            bfloat16. ``"fp8-true"``: weights and everything else in bfloat16.
        recipe: ``"tensorwise"`` (default, the fastest): one scale for a tensor. ``"rowwise"``: one for each row, more
            exact. ``"rowwise_with_gw_hp"``: the same, and the gradients of weights in the higher precision. The two
            need a GPU of compute capability 9.0 (Hopper).
        ignore_modules: Names of modules whose linear layers stay in the higher precision, such as ``"lm_head"``.
        module_filter: Gets a linear layer and its name, and returns whether to convert it. Default: all.
        emulate: Compute the rounded numbers in float32, on any hardware, slowly. Default: False.
        dtype: The higher precision: ``torch.bfloat16`` (default), or under ``"fp8-mixed"`` ``torch.float32``, for which
            there is no autocast.

    Raises:
        MisconfigurationException: An argument is none of these.
        MissingPackageError: torchao is not installed.
    """

    def __init__(
        self,
        precision: Literal["fp8-mixed", "fp8-true"] = "fp8-mixed",
        *,
        recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = "tensorwise",
        ignore_modules: str | Iterable[str] = (),
        module_filter: Callable[[Linear, str], bool] | None = None,
        emulate: bool = False,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        for name, value, allowed in (("precision", precision, _NAMES), ("recipe", recipe, _RECIPES)):
            if value not in allowed:
                raise MisconfigurationException(
                    f"Float8Precision({name}={value!r}): must be one of {', '.join(map(repr, allowed))}."
                )
        if dtype not in (torch.bfloat16, torch.float32) or (dtype == torch.float32 and precision == "fp8-true"):
            raise MisconfigurationException(
                f"Float8Precision({precision!r}, dtype={dtype}): must be torch.bfloat16, or torch.float32 with "
                "'fp8-mixed'. float16 would need a scaling of the loss, which bfloat16 does without."
            )
        if module_filter is not None and not callable(module_filter):
            raise MisconfigurationException(
                f"Float8Precision(module_filter={module_filter!r}): must be a function of a layer and its name. Names"
                " of modules to leave out go into ignore_modules."
            )
        check_flag("Float8Precision: emulate", emulate)
        require_package("torchao", "Float8Precision", "fp8")
        self.precision = precision
        self.recipe = recipe
        self.ignore_modules = told_names(ignore_modules, "Float8Precision: ignore_modules")
        self.module_filter = module_filter
        self.emulate = emulate
        self.dtype = dtype
        self._base = _higher(precision, dtype)
        self._told: tuple[int, str] | None = None
        self.converts, self.autocasts = self._base.converts, self._base.autocasts

    def place(self, device: str) -> None:
        """Refuse devices without float8, unless it is emulated."""
        if not self.emulate:
            check_on_cuda(self.precision, device, INSTEAD)
        self._base.place(device)

    def convert_module(self, module: Module) -> Module:
        """Cast the weights to the higher precision, and let linear layers multiply in float8; in place.

        Raises:
            DeviceUnavailableError: The GPU has no float8.
            MisconfigurationException: There is no layer to convert.
        """
        if not self.emulate:
            check_float8(self.precision, INSTEAD)
        module = self._base.convert_module(module)
        template = _template(self.recipe, self.emulate)
        float8: Any = type(template)
        settings = {name: value for name, value in vars(template).items() if name not in vars(_PLAIN)}
        self.revert(module)  # converted before, perhaps by another precision with other settings
        layers = find_linear_layers(module, self.ignore_modules, self._refuse, lambda layer: isinstance(layer, float8))
        if not layers.chosen and not any(isinstance(layer, float8) for layer in module.modules()):
            raise layers.nothing(
                f"precision={self.precision!r}", module, "Make their sizes multiples of 16, or use 'bf16-mixed'."
            )
        for layer in layers.chosen.values():
            vars(layer).update(settings)
            kind: Any = type(layer)  # hashable, which mypy does not know of classes
            layer.__class__ = _float8_class(kind, float8)
        news = (len(layers.chosen), layers.reasons())
        if layers.chosen and news != self._told:  # a run may convert a model twice
            self._told = news
            how = f"by the recipe {self.recipe!r}{', emulated' if self.emulate else ''}"
            layers.tell(f"multiply in float8 {how}", f"stay in {str(self.dtype).removeprefix('torch.')}")
        return module

    def _refuse(self, layer: Linear, name: str) -> str:
        if odd := refuse_odd_sizes(layer):
            return odd
        return "" if self.module_filter is None or self.module_filter(layer, name) else "left out by the filter"

    @staticmethod
    def revert(module: Module) -> Module:
        """Make converted layers linear layers of torch again, in place, to export a model or to use it elsewhere.

        Args:
            module: The model, not its wrapper.

        Returns:
            The same model. The weights stay as they are.
        """
        for layer in module.modules():
            original = _original(layer)
            if original is not None:
                for name in vars(_template("tensorwise", True)).keys() - vars(_PLAIN).keys():
                    del vars(layer)[name]
                layer.__class__ = original
        return module

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """Return a context in which new tensors have the type of the weights."""
        return self._base.tensor_init_context()

    def module_init_context(self) -> AbstractContextManager[Any]:
        """Return a context in which the weights of new modules have their type: float32 under ``"fp8-mixed"``."""
        return self._base.module_init_context()

    def forward_context(self) -> AbstractContextManager[Any]:
        """Return the context of the higher precision."""
        return self._base.forward_context()

    def convert_input(self, data: Any) -> Any:
        """Cast floating-point tensors to the higher precision."""
        return self._base.convert_input(data)

    def convert_output(self, data: Any) -> Any:
        """Cast floating-point tensors to torch's default dtype."""
        return self._base.convert_output(data)


_PLAIN = Linear(16, 16, device="meta")


def _higher(precision: str, dtype: torch.dtype) -> Precision:
    """The precision of everything but the products."""
    if precision == "fp8-true":
        return HalfPrecision("bf16-true")
    return MixedPrecision("bf16-mixed") if dtype == torch.bfloat16 else Precision()


@functools.cache
def _template(recipe: str, emulate: bool) -> Linear:
    """A layer as torchao makes it, whose class and attributes make a float8 layer of a linear one."""
    with _without_absent_kernels():
        try:
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # takes a second
        except ImportError as error:
            raise MissingPackageError(
                f"The installed torchao does not work with this torch, {torch.__version__} ({error}). Install releases"
                " that belong together, such as torchao 0.17 with torch 2.9: `pip install 'torchao==0.17.*'`."
            ) from error

    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
    made: Any = convert_to_float8_training(Linear(16, 16, device="meta"), config=config)
    products = made.linear_mm_config
    # Only in the gradient of a weight are rows of the batch summed over, and their number need not be a multiple of 16
    padded = products.grad_weight._replace(pad_inner_dim=True)
    made.linear_mm_config = products._replace(grad_weight=padded)
    layer: Linear = made
    return layer


def _original(layer: Module) -> type[Linear] | None:
    """The class that a layer had before it was converted here; None where it was not."""
    return vars(type(layer)).get("treadle_original")


@contextlib.contextmanager
def _without_absent_kernels() -> Generator[None]:
    """Where there is no GPU, torchao tells at its import of each library of kernels that it cannot load."""
    logger = logging.getLogger("torchao")
    level = logger.level
    if not torch.cuda.is_available():
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@functools.cache
def _float8_class(original: type[Linear], float8: type[Linear]) -> type[Linear]:
    """A class of float8 layers that has everything else of a layer's class, also if that is parametrized."""

    def forward(self: Linear, input: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu") and input.device.type == "cpu":  # torchao asks for the GPU's autocast only
            input = input.to(torch.get_autocast_dtype("cpu"))
        if not torch.is_inference_mode_enabled():
            return float8.forward(self, input)
        with torch.inference_mode(False), torch.no_grad():  # else operations reach torchao that it does not know
            return float8.forward(self, input)

    def reduce(self: Linear, protocol: Any) -> Any:
        return _remade, (original,), vars(self)

    members = {"forward": forward, "treadle_original": original, "__reduce_ex__": reduce, "__module__": __name__}
    bases = (float8,) if original is Linear else (float8, original)
    return type(f"Float8{original.__name__}", bases, members)


def _remade(original: Any) -> Any:
    """A layer for what was pickled, as only this module has its class."""
    float8: Any = type(_template("tensorwise", True))
    cls = _float8_class(original, float8)
    return cls.__new__(cls)
