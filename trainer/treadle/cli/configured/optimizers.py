"""The optimizer and the scheduler that were chosen on the command line become the module's ``configure_optimizers``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

from jsonargparse import ArgumentParser, Namespace

from treadle.cli.configured.parser import AUTOMATIC, LightningArgumentParser, class_paths
from treadle.cli.configured.types import LRSchedulerCallable, OptimizerCallable
from treadle.module import LightningModule
from treadle.module.overriding import overrides
from treadle_fabric import MisconfigurationException, rank_zero_warn

__all__ = ["add_configure_optimizers", "link_chosen"]

Groups: TypeAlias = dict[str, tuple[type | tuple[type, ...], str]]


def link_chosen(parser: LightningArgumentParser) -> None:
    """Link optimizers and schedulers that are for arguments of the module."""
    for key, (classes, link_to) in {**parser._optimizers, **parser._lr_schedulers}.items():
        if link_to != AUTOMATIC:
            parser.link_arguments(key, link_to, compute_fn=None if isinstance(classes, tuple) else class_paths(classes))


def add_configure_optimizers(
    module: LightningModule,
    parser: LightningArgumentParser,
    get: Callable[[str], Any],
    configure: Callable[..., Any],
) -> None:
    """Give a module its ``configure_optimizers``, if an optimizer was chosen for it.

    Args:
        module: The module.
        parser: The parser, which knows the optimizers.
        get: Returns the value of a key in the config.
        configure: ``LightningCLI.configure_optimizers`` or what overrides it.

    Raises:
        MisconfigurationException: Several optimizers or schedulers are for it, or there is a scheduler alone.
    """
    optimizer = _automatic(parser._optimizers, get, "optimizer")
    lr_scheduler = _automatic(parser._lr_schedulers, get, "lr_scheduler")
    if optimizer is None and lr_scheduler is None:
        return
    name = type(module).__name__
    if optimizer is None:
        raise MisconfigurationException(
            f"A learning-rate scheduler was chosen, but no optimizer for it: {name}.configure_optimizers decides. "
            "Choose one, with --optimizer=Adam for example, or leave the scheduler out."
        )
    if overrides(module, "configure_optimizers", LightningModule):
        rank_zero_warn(
            f"`{name}.configure_optimizers` will be overridden by `LightningCLI.configure_optimizers`, because the"
            " command line or the config has an optimizer. Leave one of them out."
        )
    make_optimizer = _maker(optimizer, OptimizerCallable)
    make_scheduler = None if lr_scheduler is None else _maker(lr_scheduler, LRSchedulerCallable)
    # a partial and not a method of the CLI, so that copies of the module have one of their own
    module.configure_optimizers = functools.partial(  # type: ignore[method-assign]
        _configure_optimizers, module, configure, make_optimizer, make_scheduler
    )


def _configure_optimizers(
    module: LightningModule,
    configure: Callable[..., Any],
    make_optimizer: Callable[..., Any],
    make_scheduler: Callable[..., Any] | None,
) -> Any:
    optimizer = make_optimizer(module.parameters())
    if make_scheduler is None:
        return configure(module, optimizer)
    return configure(module, optimizer, make_scheduler(optimizer))


def _automatic(groups: Groups, get: Callable[[str], Any], what: str) -> Any:
    """The one that was chosen for ``configure_optimizers``, as class path and arguments; None where none was."""
    automatic = {key: classes for key, (classes, link_to) in groups.items() if link_to == AUTOMATIC}
    if len(automatic) > 1:
        raise MisconfigurationException(
            f"The CLI gives a module one {what}, and there are {len(automatic)}: {', '.join(automatic)}. Link them to "
            f"arguments of the module with link_to=, and make them in its configure_optimizers."
        )
    for key, classes in automatic.items():
        chosen = get(key)
        if chosen is not None:
            return chosen if isinstance(classes, tuple) else class_paths(classes)(chosen)
    return None


def _maker(chosen: Any, kind: Any) -> Callable[..., Any]:
    """What makes the optimizer or scheduler from its first argument; objects in its other arguments are made here."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--made", type=kind)
    values = chosen.as_dict() if isinstance(chosen, Namespace) else chosen
    made: Callable[..., Any] = parser.instantiate(parser.parse_object({"made": values})).made
    return made
