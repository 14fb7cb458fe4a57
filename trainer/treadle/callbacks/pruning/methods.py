"""What a pruning method takes, and which parameters it can prune."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeAlias

from torch import nn
from torch.nn.utils import prune

from treadle_fabric import MisconfigurationException, check_integer, near_names

__all__ = [
    "CONTAINERS",
    "Amount",
    "Pairs",
    "check_amount",
    "find_parameters",
    "is_structured",
    "options_of",
    "read_method",
]

Amount: TypeAlias = int | float
Pairs: TypeAlias = list[tuple[nn.Module, str]]
"""Modules, each with the name of one of its parameters."""

CONTAINERS: Final = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_NAMED: Final[dict[str, type[prune.BasePruningMethod]]] = {
    "ln_structured": prune.LnStructured,
    "l1_unstructured": prune.L1Unstructured,
    "random_structured": prune.RandomStructured,
    "random_unstructured": prune.RandomUnstructured,
}
_NORMS: Final = "an integer, 'fro', 'nuc', or infinity"


def read_method(given: Any) -> type[prune.BasePruningMethod]:
    """Find the class of a pruning method by its name or by itself.

    Raises:
        MisconfigurationException: It is neither.
    """
    if isinstance(given, str):
        if given not in _NAMED:
            raise MisconfigurationException(
                f"ModelPruning(pruning_fn={given!r}) is unknown: it is one of {', '.join(_NAMED)}, or a subclass of"
                f" torch.nn.utils.prune.BasePruningMethod. {near_names(given, _NAMED)}"
            )
        return _NAMED[given]
    if not (isinstance(given, type) and issubclass(given, prune.BasePruningMethod)):
        instance = isinstance(given, prune.BasePruningMethod)
        raise MisconfigurationException(
            f"ModelPruning(pruning_fn={given!r}): it is one of {', '.join(_NAMED)}, or a subclass of"
            " torch.nn.utils.prune.BasePruningMethod" + (": pass the class, not an instance." if instance else ".")
        )
    if issubclass(given, prune.CustomFromMask | prune.PruningContainer):
        raise MisconfigurationException(
            f"ModelPruning(pruning_fn={given.__name__}) computes no mask: write a subclass of BasePruningMethod with a"
            " `compute_mask` that returns yours."
        )
    return given


def is_structured(method: type[prune.BasePruningMethod]) -> bool:
    """Whether a method prunes whole rows or channels, of parameters with several dimensions."""
    return getattr(method, "PRUNING_TYPE", "unstructured") == "structured"


def options_of(method: type[prune.BasePruningMethod], everywhere: bool, dim: Any, norm: Any) -> dict[str, Any]:
    """Collect the arguments of a method besides the amount.

    Args:
        method: The method.
        everywhere: Whether one ranking of the entries of all parameters decides.
        dim: ``pruning_dim``.
        norm: ``pruning_norm``.

    Raises:
        MisconfigurationException: An argument is missing, or does not fit.
    """
    name = method.__name__
    if everywhere:
        if is_structured(method):
            raise MisconfigurationException(
                f"ModelPruning: {name} prunes whole channels of one parameter, and use_global_unstructured=True ranks"
                " the entries of all parameters together: pass use_global_unstructured=False."
            )
        return {}
    takes = inspect.signature(method.__init__).parameters
    options: dict[str, Any] = {}
    if is_structured(method) and "dim" in takes:
        if dim is None:
            raise MisconfigurationException(
                f"ModelPruning: {name} needs `pruning_dim`, the dimension along which it removes channels, such as 0"
                " for the outputs of a layer."
            )
        options["dim"] = check_integer("ModelPruning: pruning_dim", dim)
    if "n" in takes:
        if norm is None:
            raise MisconfigurationException(
                f"ModelPruning: {name} needs `pruning_norm`, the norm by which it ranks channels: {_NORMS}."
            )
        options["n"] = _norm(norm)
    return options


def _norm(given: Any) -> Any:
    if given in ("fro", "nuc") or (isinstance(given, float) and math.isinf(given)):
        return given
    return check_integer("ModelPruning: pruning_norm", given)


def check_amount(amount: Any, of: str = "") -> Amount:
    """Refuse what is neither a fraction nor a number of entries.

    Args:
        amount: What was given, or what a function returned.
        of: Where it comes from, for the message.
    """
    number = isinstance(amount, int | float) and not isinstance(amount, bool)
    if not number or amount < 0 or (isinstance(amount, float) and not amount <= 1):
        raise MisconfigurationException(
            f"ModelPruning: amount{of} is {amount!r}: it is a fraction, a float from 0.0 to 1.0, or the number of"
            " entries to prune, an int from 0."
        )
    checked: Amount = amount
    return checked


def find_parameters(
    module: nn.Module,
    containers: tuple[type[nn.Module], ...],
    given: Sequence[tuple[nn.Module, str]],
    names: Iterable[str],
) -> Pairs:
    """Collect what is to be pruned.

    Args:
        module: The module that is trained.
        containers: Types whose own parameters are left out, unless given.
        given: Submodules and names of their parameters; empty for all of ``names``.
        names: The names of parameters to look for in all submodules.

    Raises:
        MisconfigurationException: A given parameter is not in the module, or nothing is found.
    """
    if not given:
        found = [
            (m, name)
            for name in names
            for m in module.modules()
            if not isinstance(m, containers) and parameter_of(m, name) is not None
        ]
        if not found:
            raise MisconfigurationException(
                f"ModelPruning found nothing to prune: no layer of {type(module).__name__} has a parameter"
                f" {' or '.join(names)}. Pass parameters_to_prune=[(self.layer, 'name'), ...]."
            )
        return found
    pairs = _as_pairs(given)
    known = {id(m) for m in module.modules()}
    for owner, name in pairs:
        if id(owner) not in known or parameter_of(owner, name) is None:
            what = "is no submodule of" if id(owner) not in known else f"has no parameter {name!r}, in"
            raise MisconfigurationException(
                f"ModelPruning: parameters_to_prune has ({type(owner).__name__}, {name!r}), which {what}"
                f" {type(module).__name__}. Give submodules of the module that is trained, and names such as 'weight'."
            )
    return pairs


def _as_pairs(given: Any) -> Pairs:
    wrong = [
        p for p in given if not (isinstance(p, tuple | list) and len(p) == 2 and isinstance(p[0], nn.Module))
        or not isinstance(p[1], str)
    ]  # fmt: skip
    if wrong:
        raise MisconfigurationException(
            f"ModelPruning: parameters_to_prune has {wrong[0]!r}: it holds pairs such as (model.layer, 'weight')."
        )
    return [(m, name) for m, name in given]


def parameter_of(module: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter of a layer, pruned or not; None where there is none."""
    parameters: dict[str, nn.Parameter | None] = module._parameters
    return parameters.get(f"{name}_orig") if f"{name}_mask" in module._buffers else parameters.get(name)


def choose(value: Any, name: str) -> bool | Callable[[int], Any]:
    """Check an argument that is a bool, or a function of the epoch."""
    if not isinstance(value, bool) and not callable(value):
        raise MisconfigurationException(
            f"ModelPruning({name}={value!r}): it is True, False, or a function of the number of the epoch."
        )
    chosen: bool | Callable[[int], Any] = value
    return chosen
