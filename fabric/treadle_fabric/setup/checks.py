"""Checks that refuse, before any work, what cannot be set up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.utils.data import Dataset

from treadle_fabric.errors import MisconfigurationException, WrongTypeError
from treadle_fabric.rank_zero import PossibleUserWarning, rank_zero_warn
from treadle_fabric.setup.wrapped import is_wrapped
from treadle_fabric.strategies.unwrapping import user_module

__all__ = [
    "check_loader",
    "check_loggers",
    "check_module",
    "check_optimizer",
    "check_ownership",
    "check_replaced",
    "tell_of_devices",
]


def check_module(module: Any) -> None:
    """Refuse an object that is no module, and a module that is set up already."""
    if not isinstance(module, Module):
        raise WrongTypeError(
            f"The model is of type {type(module).__name__}, and must be a torch.nn.Module. Optimizers come after it: "
            "fabric.setup(model, optimizer)."
        )
    wrapped = [""] if is_wrapped(module) else _wrapped_inside(user_module(module))
    if wrapped:
        where = f" (in {wrapped[0]!r})" if wrapped[0] else ""
        raise MisconfigurationException(
            f"This {type(module).__name__} is set up already{where}. Set up each model once, and use what setup "
            "returned."
        )


def _wrapped_inside(module: Module) -> list[str]:
    """The names of the submodules that are set up; ``named_modules`` gives the users' modules inside of them."""
    found = []
    for name, child in module._modules.items():
        if is_wrapped(child):
            found.append(name)
        elif child is not None:
            found += [f"{name}.{deeper}" for deeper in _wrapped_inside(child)]
    return found


def check_optimizer(optimizer: Any) -> None:
    """Refuse an object that is no optimizer, and an optimizer that is set up already."""
    if is_wrapped(optimizer):
        raise MisconfigurationException(
            f"{type(optimizer).__name__} is set up already. Set up each optimizer once, and use what setup returned."
        )
    if not isinstance(optimizer, Optimizer):
        raise WrongTypeError(
            f"An optimizer is of type {type(optimizer).__name__}, and must be a torch.optim.Optimizer. Give several "
            "one by one: fabric.setup(model, optimizer_1, optimizer_2)."
        )


def check_loader(loader: Any) -> None:
    """Refuse an object that is no iterable of batches, and a loader that is set up already."""
    if is_wrapped(loader):
        raise MisconfigurationException("A loader is set up already. Set up each once, and use what setup returned.")
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise WrongTypeError(
            f"A loader is of type {type(loader).__name__}, which cannot be iterated. Give a DataLoader, or any "
            "iterable of batches."
        )
    if isinstance(loader, Dataset) and not isinstance(loader, Iterable):
        raise WrongTypeError(
            f"A loader is of type {type(loader).__name__}, a Dataset, whose items are samples and not batches. Give "
            f"DataLoader({type(loader).__name__.lower()}, batch_size=...)."
        )


def check_loggers(loggers: list[Any]) -> list[Any]:
    """Refuse an object that cannot log, and return the loggers."""
    for logger in loggers:
        if isinstance(logger, type) or not callable(getattr(logger, "log_metrics", None)):
            raise MisconfigurationException(
                f"loggers has {logger!r}, which has no method log_metrics. Give Logger objects, such as "
                "CSVLogger('logs')."
            )
    return loggers


def check_ownership(module: Module, optimizer: Optimizer, others: Iterable[Module]) -> None:
    """Refuse an optimizer that holds parameters of neither the model nor the models set up before."""
    own = {id(p) for p in module.parameters()}
    foreign = [(label, p) for label, p in _labelled(optimizer) if id(p) not in own]
    if foreign:  # the rare case: look at the others too
        known = {id(p) for other in others for p in other.parameters()}
        foreign = [(label, p) for label, p in foreign if id(p) not in known]
    if foreign:
        listed = ", ".join(f"{label} of shape {tuple(p.shape)}" for label, p in foreign[:3])
        raise MisconfigurationException(
            f"{type(optimizer).__name__} holds {len(foreign)} parameter(s) that are not those of "
            f"{type(module).__name__}: {listed}{', ...' if len(foreign) > 3 else ''}. Create the optimizer from this "
            "model's parameters(). For one optimizer of several models, call setup_module on each, then "
            "setup_optimizers."
        )


def check_replaced(module: Module, before: Iterable[Tensor], optimizers: Iterable[Optimizer], by: object) -> None:
    """Refuse optimizers of parameters that a precision has replaced.

    Args:
        module: The model as it is now.
        before: The parameters that it had.
        optimizers: Made when it had them.
        by: The precision.
    """
    gone = {id(p) for p in before} - {id(p) for p in module.parameters()}
    for optimizer in optimizers:
        labels = [label for label, p in _labelled(optimizer) if id(p) in gone]
        if labels:
            raise MisconfigurationException(
                f"{type(optimizer).__name__} holds {len(labels)} parameter(s) that {type(by).__name__} has replaced by"
                f" others: {', '.join(labels[:3])}{', ...' if len(labels) > 3 else ''}. Set up the model alone, model ="
                " fabric.setup_module(model), then make the optimizer of what is trained in it, and give that to"
                " fabric.setup_optimizers."
            )


def tell_of_devices(module: Module) -> None:
    """Warn where a module that is to move to one device is spread over several: the user may have placed its parts."""
    first: dict[torch.device, str] = {}
    for name, parameter in module.named_parameters():
        first.setdefault(parameter.device, name)
    if len(first) > 1:
        places = " and ".join(f"{name!r} on {device}" for device, name in first.items())
        rank_zero_warn(
            f"{type(user_module(module)).__qualname__} has parameters on different devices ({places}), and all move to"
            " one now. To leave them where they are: `fabric.setup(..., move_to_device=False)`.",
            category=PossibleUserWarning,
        )


def _labelled(optimizer: Optimizer) -> list[tuple[str, Tensor]]:
    """Return the optimizer's parameters with labels: names where the optimizer has them, otherwise positions."""
    labelled = []
    for i, group in enumerate(optimizer.param_groups):
        names = group.get("param_names")
        for j, parameter in enumerate(group["params"]):
            labelled.append((repr(names[j]) if names else f"number {j} in group {i}", parameter))
    return labelled
