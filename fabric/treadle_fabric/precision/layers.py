"""Which linear layers of a model a precision replaces, and which hardware multiplies numbers of 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Linear, Module
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

from treadle_fabric.checks import one_or_several
from treadle_fabric.errors import DeviceUnavailableError, MisconfigurationException, near_names
from treadle_fabric.rank_zero import rank_zero_info, rank_zero_warn

__all__ = [
    "INSTEAD",
    "LinearLayers",
    "check_float8",
    "check_on_cuda",
    "find_linear_layers",
    "refuse_odd_sizes",
    "replace_layers",
    "told_names",
]

INSTEAD = (
    "Use precision='bf16-mixed', or plugins=Float8Precision(emulate=True), which computes the same numbers anywhere, "
    "slowly, to try out a model."
)
"""What to do where devices have no float8."""
_SHOWN = 5
_COMPILED = "_orig_mod"  # the name under which a compiled module holds the module that was compiled


@dataclass(frozen=True)
class LinearLayers:
    """The linear layers of a model."""

    chosen: Mapping[str, Linear]
    """Those to replace, by name."""
    left: Mapping[str, str]
    """The reasons why others are not replaced, by name."""

    def tell(self, done: str, stay: str) -> None:
        """Tell how many layers were replaced, and which were not, with the reasons.

        Args:
            done: What was done, such as ``"compute in float8"``.
            stay: What happens to the others, such as ``"stay in bfloat16"``.
        """
        whole = len(self.chosen) + len(self.left)
        others = f" The others {stay}: {self.reasons()}." if self.left else ""
        rank_zero_info(f"{len(self.chosen)} of {whole} linear layers {done}.{others}")

    def reasons(self) -> str:
        """The layers that are not replaced, with the reasons."""
        listed = [f"{name!r} ({reason})" for name, reason in [*self.left.items()][:_SHOWN]]
        return ", ".join(listed) + (f" and {len(self.left) - _SHOWN} more" if len(self.left) > _SHOWN else "")

    def nothing(self, argument: str, module: Module, remedy: str) -> MisconfigurationException:
        """Return the error for a model of which no layer is replaced."""
        why = f"its linear layers stay as they are: {self.reasons()}" if self.left else "it has no torch.nn.Linear"
        return MisconfigurationException(
            f"{argument} replaces linear layers, and {type(module).__name__} has none to replace: {why}. {remedy}"
        )


def find_linear_layers(
    module: Module,
    ignored: Collection[str],
    refuse: Callable[[Linear, str], str],
    done: Callable[[Module], bool] = lambda layer: False,
) -> LinearLayers:
    """Sort the linear layers of a model.

    Args:
        module: The model.
        ignored: Names of modules, whose linear layers are left as they are.
        refuse: Gives the reason why a layer stays as it is, or an empty text; gets the layer and its name.
        done: Whether a layer is replaced already; such a layer is not listed.
    """
    chosen: dict[str, Linear] = {}
    left: dict[str, str] = {}
    names = []
    for full, layer in module.named_modules():
        name = ".".join(part for part in full.split(".") if part != _COMPILED)
        names.append(name)
        if not isinstance(layer, Linear) or done(layer):
            continue
        reason = _not_plain(layer) or ("ignored" if _is_ignored(name, ignored) else refuse(layer, name))
        if reason:
            left[name] = reason
        else:
            chosen[name] = layer
    for each in ignored:
        if each not in names:
            rank_zero_warn(f"ignore_modules has {each!r}, and the model has no module of this name. "
                           f"{near_names(each, [name for name in names if name])}")  # fmt: skip
    return LinearLayers(chosen, left)


def told_names(names: Any, argument: str) -> tuple[str, ...]:
    """Return the names of modules that an argument has, which may be one or several."""
    found = tuple(one_or_several(names))
    for name in found:
        if not isinstance(name, str):
            raise MisconfigurationException(f"{argument} has {name!r}, and takes names of modules, such as 'lm_head'.")
    return found


def _is_ignored(name: str, ignored: Iterable[str]) -> bool:
    return any(name == each or name.startswith(f"{each}.") for each in ignored)


def _not_plain(layer: Linear) -> str:
    """Why a layer cannot be replaced by another implementation of the same product."""
    if is_lazy(layer.weight):
        return "lazy, without a shape"
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return "MultiheadAttention uses its weight without its forward"
    if type(layer).forward is not Linear.forward or "forward" in vars(layer):
        return "has a forward of its own"
    if not layer.weight.is_floating_point() or layer.weight.dtype.itemsize == 1:
        return f"its weight is of {str(layer.weight.dtype).removeprefix('torch.')}"
    return ""


def refuse_odd_sizes(layer: Linear) -> str:
    """Why the matrix units cannot multiply this layer's weight in float8: they take blocks of 16."""
    for size, what in ((layer.in_features, "input"), (layer.out_features, "output")):
        if size % 16:
            return f"{size} {what}{'s' * (size != 1)}, not a multiple of 16"
    return ""


def replace_layers(module: Module, made: Mapping[Any, Module]) -> Module:
    """Put layers in the places of others, wherever these are in the model, and return the model, or what replaces it.

    Args:
        module: The model.
        made: The new layers by the old ones.
    """
    for parent in [*module.modules()]:
        for name, child in parent._modules.items():
            if child in made:
                parent._modules[name] = made[child]
    return made.get(module, module)


def check_on_cuda(name: str, device: str, remedy: str) -> None:
    """Refuse a type of devices that has no numbers of 8 bits.

    Args:
        name: Of the precision.
        device: The type, such as ``"cpu"``.
        remedy: What to do, as a sentence.

    Raises:
        DeviceUnavailableError: It is not ``"cuda"``.
    """
    if device != "cuda":
        raise DeviceUnavailableError(
            f"precision={name!r} multiplies float8 numbers, which takes an NVIDIA GPU of compute capability 8.9 or"
            f" newer (Ada, Hopper, Blackwell) or an AMD MI300, and the run is on {device!r}. {remedy}"
        )


def check_float8(name: str, remedy: str) -> None:
    """Refuse the current GPU where it has no matrix units for float8.

    Raises:
        DeviceUnavailableError: It has none.
    """
    if torch.version.hip:
        arch = str(torch.cuda.get_device_properties().gcnArchName)
        able = arch.startswith(("gfx94", "gfx95", "gfx12"))
    else:
        able = torch.cuda.get_device_capability() >= (8, 9)
    if not able:
        raise DeviceUnavailableError(
            f"precision={name!r} multiplies float8 numbers, and {torch.cuda.get_device_name()} has no matrix units for"
            f" them: that takes compute capability 8.9 or newer (Ada, Hopper, Blackwell) or an AMD MI300. {remedy}"
        )
