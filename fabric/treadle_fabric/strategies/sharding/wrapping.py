"""Which submodules are groups of their own: their parameters are gathered together, for their forward pass only."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import Module, ModuleList, MultiheadAttention, Sequential
from torch.nn.parameter import is_lazy

from treadle_fabric.errors import MisconfigurationException, near_names
from treadle_fabric.rank_zero import rank_zero_info
from treadle_fabric.strategies.unwrapping import plain_name, uncompiled, user_module, with_plain_names

__all__ = ["Policy", "check_groups", "modules_to_shard", "refuse_lazy", "repeated_blocks", "select_modules"]

Policy: TypeAlias = "type[Module] | Collection[type[Module]] | Callable[..., bool]"
"""Classes; a function ``policy(module) -> bool``; or a policy of FSDP1, which is also asked how many parameters of the
module have no group yet: ``policy(module, recurse, nonwrapped_numel) -> bool``."""

_MAX_NAMED = 5


def modules_to_shard(module: Module, policy: Policy | None = None, ignored: Collection[Tensor] = ()) -> list[Module]:
    """Choose the submodules whose parameters are gathered for the forward pass of that submodule only.

    Left out, because their parameters are needed elsewhere, are submodules that share a parameter with something
    outside of them (the parameter goes into the group of what holds all its places), submodules whose ``forward`` does
    not run (containers such as ``ModuleList``, what is inside of ``MultiheadAttention``), and those without parameters.
    A compiled submodule is chosen by what was compiled, and returned as it is.

    A method other than ``forward``, or another module that takes ``submodule.weight`` itself, finds only this rank's
    part of a chosen submodule: leave such a submodule out of the policy.

    Args:
        module: The user's module. It is no member of the result.
        policy: Default: :func:`repeated_blocks`.
        ignored: Parameters that stay whole on every rank.

    Returns:
        The submodules, the innermost first.

    Raises:
        MisconfigurationException: The policy has classes of which the module has no instance, classes without a
            ``forward``, or asks for what sharding does not have.
    """
    kept = {id(p) for p in ignored}
    chosen = repeated_blocks(module) if policy is None else select_modules(module, policy, ignored)
    around = _common_owners(module)
    tied: list[Module] = []
    groups: list[Module] = []
    for each in chosen:
        parameters = [p for p in each.parameters() if id(p) not in kept]
        if all(id(each) in around[id(p)] for p in parameters):
            if parameters:
                groups.append(each)
        else:
            tied.append(each)
    if tied and policy is not None:
        names = {id(m): name for name, m in module.named_modules()}
        rank_zero_info(
            f"Sharded with the module around them, because they share a parameter with something else: "
            f"{_listed([plain_name(module, names[id(m)]) for m in tied])}."
        )
    return groups


def repeated_blocks(module: Module) -> list[Module]:
    """Return the blocks that a model repeats, such as the layers of a transformer or the stages of a ResNet's blocks.

    Blocks are entries of a ``ModuleList`` or ``Sequential`` that have submodules with parameters, of a class that
    occurs there twice or more. What a block repeats inside of itself stays in its group: experts, for example,
    that not every rank calls, must not be gathered one by one.
    """
    found: list[Module] = []
    visited = set[int]()

    def visit(parent: Module) -> None:
        if id(parent) in visited or isinstance(parent, torch.jit.ScriptModule):
            return
        visited.add(id(parent))
        classes = [type(uncompiled(child)) for child in parent.children()]  # each module once
        for child in parent.children():
            own = uncompiled(child)
            repeats = isinstance(parent, (ModuleList, Sequential)) and classes.count(type(own)) > 1
            if repeats and _is_composite(own) and _runs_forward(own):
                found.append(child)
            else:
                visit(own)

    visit(user_module(module))
    return found


def select_modules(module: Module, policy: Policy, ignored: Collection[Tensor] = ()) -> list[Module]:
    """Return the submodules that a policy names and whose ``forward`` runs, the innermost first, without ``module``.

    Raises:
        MisconfigurationException: See :func:`modules_to_shard`.
    """
    own = user_module(module)
    classes = _classes_of(policy)
    decide: Any
    if classes is not None:
        _check_classes(own, classes)
        decide = lambda m: isinstance(m, classes)  # noqa: E731
    elif hasattr(policy, "_run_policy"):  # torch's policy objects, some of which are no functions
        decide = _answers_of(policy, own)
    elif callable(policy):
        decide = policy
    else:
        raise MisconfigurationException(
            f"policy={policy!r} names no submodules. Give module classes, such as {{Block}}, or a function of a module"
            " that returns whether the module is a group of its own."
        )
    sized = classes is None and _asks_for_size(decide)
    kept = {id(p) for p in ignored}
    found: list[Module] = []
    visited = set[int]()

    def visit(child: Module) -> int:
        """Ask for a module and what is in it; returns how many numbers have a group."""
        inner = uncompiled(child)
        if id(inner) in visited or isinstance(inner, torch.jit.ScriptModule):
            return 0
        visited.add(id(inner))
        size = sum(p.numel() for p in inner.parameters() if id(p) not in kept)
        if sized and not decide(module=inner, recurse=True, nonwrapped_numel=size):
            return 0
        grouped = 0 if isinstance(inner, MultiheadAttention) else sum(visit(each) for each in inner.children())
        if inner is own or not size or not _runs_forward(inner):
            return grouped
        chosen = decide(module=inner, recurse=False, nonwrapped_numel=size - grouped) if sized else decide(inner)
        if not isinstance(chosen, bool):
            raise MisconfigurationException(
                f"The policy {decide!r} returned {chosen!r} for a {type(inner).__name__}: it must return True or False."
            )
        if chosen:
            found.append(child)
        return size if chosen else grouped

    visit(own)
    return found


def refuse_lazy(module: Module) -> None:
    """Refuse parameters without shapes.

    Raises:
        MisconfigurationException: A layer has not had a batch.
    """
    own = user_module(module)
    lazy = [name for name, p in with_plain_names(own, own.named_parameters()) if is_lazy(p)]
    if lazy:
        raise MisconfigurationException(
            f"Parameters that have no shape yet cannot be shared out: {_listed(lazy)}. A lazy layer gets its shape from"
            " its first batch: run a batch through the model first, alike on every rank (in `configure_model` under the"
            " Trainer, before `setup` under Fabric), or give the layer its number of inputs."
        )


def check_groups(module: Module, parts: Collection[Module], ignored: Collection[Tensor]) -> None:
    """Refuse what ``fully_shard`` cannot cut.

    Args:
        module: The user's module.
        parts: Submodules that are groups of their own, the innermost first.
        ignored: Parameters that stay whole.

    Raises:
        MisconfigurationException: A submodule is scripted, or parameters of one group have several dtypes.
    """
    seen = {id(p) for p in ignored}
    for name, each in module.named_modules():
        if isinstance(each, torch.jit.ScriptModule) and any(id(p) not in seen for p in each.parameters()):
            raise MisconfigurationException(
                f"{name!r} is scripted, and parameters of a scripted module cannot be replaced by parts of them. Use"
                " torch.compile instead of torch.jit.script, or leave it whole on every rank:"
                f" ignored_parameters=[model.{name}]."
            )
    for group in (*parts, module):
        dtypes: dict[torch.dtype, str] = {}
        for name, parameter in group.named_parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                if parameter.requires_grad:
                    dtypes.setdefault(parameter.dtype, name)
        if len(dtypes) > 1:
            told = ", ".join(f"{plain_name(group, name)!r} ({dtype})" for dtype, name in dtypes.items())
            raise MisconfigurationException(
                f"{type(group).__name__} has trained parameters of several dtypes, which cannot be gathered together:"
                f" {told}. Give them one dtype, freeze those of the other, or make the submodule that has them a group"
                " of its own with policy=...; or leave them whole on every rank: ignored_parameters=[...]."
            )


def _classes_of(policy: Any) -> tuple[type[Module], ...] | None:
    """The classes, if the policy consists of classes."""
    if isinstance(policy, type):
        policy = {policy}
    if not isinstance(policy, Collection) or isinstance(policy, (str, Module)):
        return None
    wrong = [each for each in policy if not (isinstance(each, type) and issubclass(each, Module))]
    if wrong or not policy:
        raise MisconfigurationException(
            f"policy={policy!r}: {f'{wrong[0]!r} is no class of modules' if wrong else 'there is no class in it'}."
            " Give classes of submodules, such as {torch.nn.TransformerEncoderLayer}."
        )
    return tuple(policy)


def _check_classes(module: Module, classes: tuple[type[Module], ...]) -> None:
    there = {type(m) for m in module.modules()}
    if not any(issubclass(each, classes) for each in there):
        hints = " ".join(near_names(wanted.__name__, {each.__name__ for each in there}) for wanted in classes)
        raise MisconfigurationException(
            f"policy={{{', '.join(c.__name__ for c in classes)}}}: {type(module).__name__} has no module of"
            f" {'this class' if len(classes) == 1 else 'one of these classes'}. {hints}"
            " For several models, name classes of each, or give a function of a module."
        )
    for each in classes:
        if each.forward is Module.forward and not any(issubclass(t, each) and t is not each for t in there):
            raise MisconfigurationException(
                f"policy={{{each.__name__}}}: a {each.__name__} is never called, so its parameters would never be"
                " gathered. Give the class of what is in it."
            )


def _answers_of(policy: Any, module: Module) -> Callable[[Module], bool]:
    """Ask a policy object of torch for all modules at once."""
    answers = policy._run_policy(module, ignored_modules=set(), root_kwargs={})
    for each, arguments in answers.items():
        if arguments:
            raise MisconfigurationException(
                f"{type(policy).__name__} has arguments for {type(each).__name__} alone: {arguments!r}. All groups have"
                " the arguments of the strategy; give a function that returns True or False. For modules with arguments"
                " of their own, call torch.distributed.fsdp.fully_shard in configure_model (Trainer) or before setup."
            )
    return lambda m: m in answers


def _asks_for_size(policy: Callable[..., Any]) -> bool:
    """Whether a function is a policy of FSDP1, of a module, of whether to look into it, and of its size."""
    try:
        signature = inspect.signature(policy)
    except (TypeError, ValueError):
        return False
    if "recurse" in signature.parameters:
        return True
    try:
        signature.bind(object())
    except TypeError:
        return True
    return False


def _is_composite(module: Module) -> bool:
    return any(next(child.parameters(), None) is not None for child in module.children())


def _runs_forward(module: Module) -> bool:
    """Whether calling the module does anything: containers only hold others."""
    forward = getattr(module.forward, "__func__", module.forward)
    return forward is not Module.forward


def _common_owners(module: Module) -> dict[int, set[int]]:
    """For each parameter, by id, the modules that hold every place where the parameter is used."""
    owners: dict[int, set[int]] = {}
    for owner, chain in _chains(module, ()):
        for parameter in owner._parameters.values():
            if parameter is not None:
                ids = owners.setdefault(id(parameter), set(chain))
                ids.intersection_update(chain)
    return owners


def _chains(module: Module, above: tuple[int, ...]) -> Iterator[tuple[Module, tuple[int, ...]]]:
    """Every place of every module, with the ids of the modules around it and its own."""
    chain = (*above, id(module))
    yield module, chain
    for child in module._modules.values():
        if child is not None:
            yield from _chains(child, chain)


def _listed(names: list[str]) -> str:
    more = len(names) - _MAX_NAMED
    return ", ".join(map(repr, names[:_MAX_NAMED])) + (f" and {more} more" if more > 0 else "")
