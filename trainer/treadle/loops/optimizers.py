"""Read the optimizers and schedulers that ``configure_optimizers`` returned, and step the schedulers."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler as TorchScheduler
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

from treadle.module import LightningModule, LRSchedulerConfig
from treadle.module.overriding import overrides
from treadle_fabric import (
    LRScheduler,
    MisconfigurationException,
    Strategy,
    TreadleError,
    WrongTypeError,
    check_integer,
    is_several,
    near_names,
    one_or_several,
    rank_zero_warn,
    with_plain_names,
)
from treadle_fabric.precision import needs_closure

__all__ = [
    "check_disjoint",
    "check_optimizers",
    "check_together",
    "explained_optimizers",
    "explained_steps",
    "parse_optimizers",
]

_SHAPES = (
    "an optimizer, a list of optimizers, a list of optimizers and a list of schedulers, a dict with 'optimizer' and "
    "'lr_scheduler', a list of such dicts, or None"
)
_KEYS = {"scheduler", "name", "interval", "frequency", "reduce_on_plateau", "monitor", "strict"}
_OPTIMIZER_KEYS = {"optimizer", "lr_scheduler", "monitor"}
_IDLE_BY_HAND = {"reduce_on_plateau", "monitor", "strict"}
"""Keys of a scheduler without an effect where the module steps it; by ``interval`` its rate is logged all the same."""


@contextmanager
def explained_optimizers(module: nn.Module) -> Generator[None]:
    """While entered, explain what torch raises because of the module's parameters and not of the code inside.

    Raises:
        MisconfigurationException: an optimizer got no parameters, or parameters of lazy layers.
    """
    try:
        yield
    except ValueError as error:
        lazy = [name for name, p in with_plain_names(module, module.named_parameters()) if is_lazy(p)]
        if lazy and "uninitialized parameter" in str(error):
            raise MisconfigurationException(
                f"configure_optimizers made an optimizer that asks for the shape of {', '.join(lazy[:5])}, and a lazy"
                " layer gets it from its first batch: run a batch through the model before, in `configure_model` or in"
                " `setup`, or give the layer its number of inputs."
            ) from error
        if "empty parameter list" in str(error):
            every = [p.requires_grad for p in module.parameters()]
            raise MisconfigurationException(
                f"configure_optimizers made an optimizer without parameters: {type(module).__qualname__} has"
                f" {len(every)} parameters, of which {sum(every)} require gradients. Unfreeze what is to be trained,"
                " make layers in `__init__` or `configure_model`, or return None to train nothing."
            ) from error
        raise


@contextmanager
def explained_steps(module: LightningModule) -> Generator[None]:
    """While entered, explain steps that fail for want of a closure, or because of sparse gradients.

    Raises:
        MisconfigurationException: the message has the optimizer's own.
    """
    try:
        yield
    except (TypeError, AssertionError) as error:
        if (optimizer := _without_closure(error, module)) is not None:
            raise MisconfigurationException(
                f"{optimizer}.step needs a closure, and was called without one ({error}): Treadle passes a closure that"
                " runs `training_step` and backward where the optimizer declares it without a default value,"
                " `def step(self, closure)`, or where the module overrides `optimizer_step`."
            ) from error
        raise
    except RuntimeError as error:
        tables = [
            name for name, m in with_plain_names(module, module.named_modules()) if getattr(m, "sparse", None) is True
        ]
        if tables and "sparse" in str(error).lower() and not isinstance(error, TreadleError):
            raise MisconfigurationException(
                f"{error}. The layers with sparse gradients: {', '.join(tables)}. Make them with sparse=False, or give"
                " their parameters to an optimizer of their own that supports them."
            ) from error
        raise


def _without_closure(error: Exception, module: LightningModule) -> str | None:
    """The class of an optimizer whose ``step`` failed because it was called without a closure; None if none did."""
    by_loop = module.automatic_optimization and not overrides(module, "optimizer_step", LightningModule)
    if not by_loop or ("closure" not in str(error) and "'NoneType' object is not callable" not in str(error)):
        return None
    traceback = error.__traceback__
    while traceback is not None:
        found = traceback.tb_frame.f_locals
        optimizer = found.get("self")
        if isinstance(optimizer, Optimizer) and "closure" in found and not needs_closure(optimizer):
            return type(optimizer).__qualname__
        traceback = traceback.tb_next
    return None


def parse_optimizers(returned: Any, module: LightningModule) -> tuple[list[Optimizer], list[LRSchedulerConfig]]:
    """Read the optimizers and schedulers in any of the forms that ``configure_optimizers`` may return.

    Raises:
        MisconfigurationException: the form or a key is unknown, an optimizer holds parameters of another model, a
            plateau scheduler has no monitor, ...
    """
    if returned is None:
        rank_zero_warn(
            f"`{type(module).__qualname__}.configure_optimizers` returned `None`: this fit will run with no optimizer."
            " Return one, unless nothing is to be trained."
        )
        return [], []
    optimizers, schedulers = _unpack(returned)
    check_optimizers(optimizers, module)
    configs = [_scheduler(s, module) for s in schedulers]
    held = {id(getattr(o, "optimizer", o)) for o in optimizers}
    for config in configs:
        owner = getattr(config.scheduler, "optimizer", None)
        if owner is not None and id(owner) not in held:
            raise MisconfigurationException(
                f"The scheduler {type(config.scheduler).__name__} is attached with an optimizer that wasn't returned"
                " from `configure_optimizers`: return that optimizer too, or make the scheduler with one that is."
            )
    return optimizers, configs


def check_optimizers(optimizers: Sequence[Any], module: LightningModule) -> None:
    """Refuse what is no optimizer, and an optimizer of parameters that the module does not have."""
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise MisconfigurationException(
                f"configure_optimizers returned {type(optimizer).__name__} as an optimizer; it may return {_SHAPES}."
            )
        _check_parameters(optimizer, module)


def check_together(optimizers: Sequence[Optimizer], module: LightningModule, strategy: Strategy) -> None:
    """Check that automatic optimization can step several optimizers together.

    Raises:
        MisconfigurationException: a parameter is in two optimizers, an optimizer evaluates the loss itself, or the
            strategy's engine makes the steps.
    """
    kinds = [type(optimizer).__name__ for optimizer in optimizers]
    listed = f"configure_optimizers returned {len(optimizers)} optimizers ({', '.join(kinds)})"
    if strategy.handles_gradient_accumulation or strategy.owns_optimizer_step:
        raise MisconfigurationException(
            f"{listed}, and the engine of {type(strategy).__name__} steps one optimizer by itself: return one optimizer"
            " with several parameter groups, or use another strategy, such as 'ddp'."
        )
    if alone := [kind for kind, optimizer in zip(kinds, optimizers, strict=True) if needs_closure(optimizer)]:
        raise MisconfigurationException(
            f"{listed}. {alone[0]} evaluates the loss several times a step, by a closure, and automatic optimization"
            " computes the gradients of several optimizers once a batch: use another optimizer beside the others, or"
            f" step by hand (`self.automatic_optimization = False`, and `self.optimizers()` in `training_step`)."
        )
    check_disjoint(optimizers, module)


def check_disjoint(optimizers: Sequence[Optimizer], module: nn.Module) -> None:
    """Refuse a parameter in two optimizers that step together: it would move twice a batch.

    Raises:
        MisconfigurationException: the message names the parameters and the optimizers.
    """
    holders: dict[int, list[int]] = {}
    for index, optimizer in enumerate(optimizers):
        for key in {id(p) for group in optimizer.param_groups for p in group["params"]}:
            holders.setdefault(key, []).append(index)
    shared = {key: indices for key, indices in holders.items() if len(indices) > 1}
    if not shared:
        return
    named = with_plain_names(module, module.named_parameters())
    names = [name for name, parameter in named if id(parameter) in shared] or [f"{len(shared)} parameters"]
    both = sorted({index for indices in shared.values() for index in indices})
    holding = " and ".join(f"{type(optimizers[index]).__name__} (number {index})" for index in both)
    raise MisconfigurationException(
        f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''} in {holding}: the optimizers of automatic"
        " optimization step together, each with parameters of its own. Give every parameter to one optimizer; for"
        " steps in turns, as of a GAN, set `self.automatic_optimization = False` and step in `training_step`."
    )


def _unpack(returned: Any) -> tuple[list[Any], list[Any]]:
    if isinstance(returned, Optimizer):
        return [returned], []
    if isinstance(returned, Mapping):
        return _from_dict(returned)
    found = one_or_several(returned)
    if len(found) == 2 and is_several(found[0]):
        return one_or_several(found[0]), one_or_several(found[1])
    if found and all(isinstance(item, Mapping) for item in found):
        pairs = [_from_dict(item) for item in found]
        return [o for os, _ in pairs for o in os], [s for _, ss in pairs for s in ss]
    if found and all(isinstance(item, Optimizer) for item in found):
        return found, []
    raise MisconfigurationException(
        f"Unknown configuration for model optimizers: configure_optimizers returned {returned!r:.200}; it may return"
        f" {_SHAPES}."
    )


def _from_dict(entry: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    if "optimizer" not in entry:
        raise MisconfigurationException(
            f"configure_optimizers returned a dict without the key 'optimizer', with {', '.join(map(repr, entry))}: add"
            f" it.{_hint_of(set(entry) - _OPTIMIZER_KEYS, ['optimizer'])}"
        )
    _tell_of_keys("optimizer configuration", set(entry) - _OPTIMIZER_KEYS, _OPTIMIZER_KEYS)
    found = entry.get("lr_scheduler")
    if found is None:
        return [entry["optimizer"]], []
    schedulers = one_or_several(found)
    if "monitor" in entry:
        schedulers = [
            (
                {"monitor": entry["monitor"], **s}
                if isinstance(s, Mapping)
                else {"scheduler": s, "monitor": entry["monitor"]}
            )
            for s in schedulers
        ]
    return [entry["optimizer"]], schedulers


def _tell_of_keys(what: str, unknown: set[Any], known: set[str]) -> None:
    """Warn of keys that nothing reads."""
    if unknown:
        names = sorted(map(str, unknown))
        rank_zero_warn(
            f"Found unsupported keys in the {what}: {', '.join(map(repr, names))}; they have no effect."
            f"{_hint_of(unknown, known)} Leave them out of what `configure_optimizers` returns.",
            category=RuntimeWarning,
        )


def _hint_of(unknown: set[Any], known: Iterable[str]) -> str:
    """A sentence about misspelled keys, where the known ones are near; else nothing."""
    hints = [hint for name in sorted(map(str, unknown)) if (hint := near_names(name, known)).startswith("Did")]
    return "".join(f" {hint}" for hint in hints)


def _scheduler(entry: Any, module: LightningModule) -> LRSchedulerConfig:
    given = dict(entry) if isinstance(entry, Mapping) else {"scheduler": entry}
    unknown = set(given) - _KEYS
    if "scheduler" not in given:
        raise MisconfigurationException(
            f'The lr scheduler dict must have the key "scheduler", and has {", ".join(map(repr, given))}: add it.'
            f"{_hint_of(unknown, ['scheduler'])}"
        )
    _tell_of_keys("lr scheduler dict", unknown, _KEYS)
    if not module.automatic_optimization and (idle := sorted(given.keys() & _IDLE_BY_HAND)):
        rank_zero_warn(
            f"The lr scheduler dict contains the key(s) {idle}, but the keys will be ignored in manual optimization:"
            " call `self.lr_schedulers().step()` in the module, and leave them out.",
            category=RuntimeWarning,
        )
        given = {key: value for key, value in given.items() if key not in _IDLE_BY_HAND}
    config = LRSchedulerConfig(**{key: value for key, value in given.items() if key in _KEYS})
    if isinstance(config.scheduler, OneCycleLR) and config.interval == "epoch" and isinstance(entry, Mapping):
        rank_zero_warn(
            "A `OneCycleLR` scheduler is using 'interval': 'epoch', so that it takes one of its total_steps an epoch."
            " Set 'interval': 'step' if it is to step after every batch.",
            category=RuntimeWarning,
        )
    scheduler = config.scheduler
    config.reduce_on_plateau = config.reduce_on_plateau or isinstance(scheduler, ReduceLROnPlateau)
    if not isinstance(scheduler, (TorchScheduler, ReduceLROnPlateau)):
        if not all(callable(getattr(scheduler, name, None)) for name in ("state_dict", "load_state_dict")):
            raise WrongTypeError(
                f"The scheduler {type(scheduler).__name__} has no `state_dict` and `load_state_dict`, with which a"
                " checkpoint keeps it: define both."
            )
        steps_itself = module.lr_scheduler_step is None or overrides(module, "lr_scheduler_step", LightningModule)
        if not steps_itself and not _steps_as_torch_does(scheduler):
            raise MisconfigurationException(
                f"{type(scheduler).__name__} is no learning-rate scheduler as torch knows it (step, state_dict,"
                " optimizer): override `lr_scheduler_step` to step it yourself."
            )
    if config.interval not in ("step", "epoch"):
        raise MisconfigurationException(
            f'The "interval" key in lr scheduler dict must be "step" or "epoch", and interval={config.interval!r}.'
            f" {near_names(str(config.interval), ['step', 'epoch'])}"
        )
    config.frequency = check_integer("frequency of a scheduler", config.frequency, minimum=1)
    if config.reduce_on_plateau and config.monitor is None and module.automatic_optimization:
        raise MisconfigurationException(
            "`configure_optimizers` must include a monitor when a `ReduceLROnPlateau` scheduler is used, the name of a"
            " metric: return {'optimizer': ..., 'lr_scheduler': {'scheduler': ..., 'monitor': 'val_loss'}}."
        )
    return config


def _steps_as_torch_does(scheduler: Any) -> bool:
    """Whether a scheduler of another kind has what torch's have, and a ``step`` without arguments."""
    if not isinstance(scheduler, LRScheduler):
        return False
    try:
        inspect.signature(scheduler.step).bind()
    except TypeError:
        return False
    except ValueError:  # there is no signature to look at
        return True
    return True


def _check_parameters(optimizer: Optimizer, module: nn.Module) -> None:
    mine = {id(p) for p in module.parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    foreign = [p for p in held if id(p) not in mine]
    if foreign:
        shapes = ", ".join(str(tuple(p.shape)) for p in foreign[:3])
        raise MisconfigurationException(
            f"{type(optimizer).__name__} holds {len(foreign)} of {len(held)} parameters (shapes {shapes}) that are not"
            f" this {type(module).__qualname__}'s: make it with `self.parameters()`."
        )
