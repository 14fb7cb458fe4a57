"""What the user's own module is inside of wrappers (DDP, ``torch.compile``, Fabric's own), and its names there.

Wrappers may be around each other in any order. A layer that has a wrapper of its own registers it with :func:`inside`.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, TypeVar

from torch.nn import DataParallel, Module
from torch.nn.parallel import DistributedDataParallel

from treadle_fabric.checkpoint import StoredTensor, in_memory

__all__ = [
    "class_of",
    "compiled_like",
    "inside",
    "layers_of",
    "load_module_state",
    "module_state",
    "name_in",
    "names_in",
    "plain_name",
    "uncompiled",
    "user_module",
    "with_plain_names",
]

T = TypeVar("T")

_COMPILED: Final = "_orig_mod"  # the name under which a compiled module holds the module that was compiled


@functools.singledispatch
def inside(module: Any) -> Module | None:
    """The module that a wrapper runs; None for what is no wrapper. ``inside.register`` makes a class a wrapper."""
    return None


@inside.register(DataParallel)
@inside.register(DistributedDataParallel)
def _(module: Any) -> Module:
    inner: Module = module.module
    return inner


def _is_compiled(module: Any) -> bool:
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")  # slow to import, and imported by the first compilation
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def layers_of(module: Module) -> Iterator[Module]:
    """Iterate over a module, the module inside of it if it is a wrapper, and so on down to the user's own module."""
    layer: Module | None = module
    while layer is not None:
        yield layer
        layer = layer._modules[_COMPILED] if _is_compiled(layer) else inside(layer)


def user_module(module: Module) -> Module:
    """Return the user's own module.

    Args:
        module: A module, in any number of wrappers: that of ``fabric.setup``, the strategy's engine,
            ``DistributedDataParallel``, ``torch.compile``.

    Returns:
        The module inside; ``module`` if it is no wrapper.
    """
    *_, own = layers_of(module)
    return own


def class_of(module: Module) -> type[Module]:
    """Return the user's class of a module, before which ``fully_shard`` puts one of its own."""
    kind = type(module)
    return kind.__bases__[-1] if hasattr(module, "_get_fsdp_state") and kind.__name__.startswith("FSDP") else kind


def uncompiled(module: Any) -> Any:
    """Return the module that ``torch.compile`` was given; ``module`` itself if it is not compiled."""
    while _is_compiled(module):
        module = module._modules[_COMPILED]
    return module


def compiled_like(module: Module, method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of the user's module, compiled as ``module`` is; the method itself if ``module`` is not."""
    for layer in layers_of(module):
        if _is_compiled(layer):
            compiled: Callable[..., Any] = layer.dynamo_ctx(method)  # type: ignore[operator] # no submodule
            return compiled
    return method


def plain_name(module: Module, name: str) -> str:
    """Return the name that a part of ``module`` would have if nothing in ``module`` were compiled or wrapped.

    Args:
        module: The user's module, whose submodules may be compiled.
        name: Of a parameter, a buffer or a submodule in it, such as ``"head._orig_mod.weight"``.

    Returns:
        Such as ``"head.weight"``.
    """
    parts: list[str] = []
    owner: Any = module
    for part in name.split("."):
        if part != _inner_name(owner):
            parts.append(part)
        owner = _child(owner, part)
    return ".".join(parts)


def with_plain_names(module: Module, named: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
    """Give what ``module.named_parameters()``, for example, gives, with plain names."""
    return ((plain_name(module, name), part) for name, part in named)


def name_in(module: Module, name: str) -> str:
    """Return the name that torch has for a part of ``module``: the inverse of :func:`plain_name`.

    Args:
        module: The user's module, whose submodules may be compiled.
        name: Of the part in a file, whether what wrote the file was compiled or not: ``"head.weight"`` or
            ``"head._orig_mod.weight"``.

    Returns:
        ``"head._orig_mod.weight"`` if the head of ``module`` is compiled, otherwise ``"head.weight"``.
    """
    parts: list[str] = []
    owner: Any = module
    for part in name.split("."):
        inner: str | None = None
        while inner != part and (inner := _inner_name(owner)) is not None:
            parts.append(inner)
            owner = owner._modules[inner]
        if inner == part:  # the name has the wrapper already
            continue
        child = _child(owner, part)
        if part != _COMPILED or child is not None:
            parts.append(part)
            owner = child
    return ".".join(parts)


def _inner_name(owner: Any) -> str | None:
    """The name under which a wrapper holds the module inside of it; None for what is no wrapper."""
    if _is_compiled(owner):
        return _COMPILED
    if not isinstance(owner, Module) or (inner := inside(owner)) is None:
        return None
    return next((name for name, child in owner._modules.items() if child is inner), None)


def _child(module: Any, name: str) -> Any:
    children: Any = module._modules if isinstance(module, Module) else {}
    return children[name] if name in children else None  # noqa: SIM401 # those of a scripted module have no get()


def module_state(module: Module) -> dict[str, Any]:
    """Return the state dict of the user's module, with its plain names."""
    own = user_module(module)
    state: dict[str, Any] = _renamed(own.state_dict(), functools.partial(plain_name, own))
    return state


def load_module_state(module: Module, state: Mapping[str, Any], strict: bool = True) -> Any:
    """Load a state dict into the user's module, whether what wrote the state was compiled or not.

    Args:
        module: The user's module, or a wrapper.
        state: Of :func:`module_state`, or of a module's own ``state_dict``.
        strict: Refuse missing and unexpected names. Default: True.

    Returns:
        What the module's ``load_state_dict`` returned.
    """
    own = user_module(module)
    state = _read_where_kept(own, names_in(own, state))
    # without strict where it need not be there: overrides may not take it
    return own.load_state_dict(state) if strict else own.load_state_dict(state, strict=False)


def _read_where_kept(module: Module, state: Any) -> Any:
    """Read the tensors of a folder that a module's own way of loading may keep, rather than copy into parameters."""
    if not isinstance(state, dict) or not any(isinstance(value, StoredTensor) for value in state.values()):
        return state
    if _is_own(type(module), "load_state_dict"):
        return in_memory(state)
    kept = [path for path, each in module.named_modules() if _is_own(type(each), "_load_from_state_dict")]
    prefixes = tuple(f"{path}." if path else "" for path in kept)
    names = [name for name, value in state.items() if isinstance(value, StoredTensor) and name.startswith(prefixes)]
    if not names:
        return state
    changed = copy.copy(state)
    changed.update(in_memory({name: state[name] for name in names}))
    return changed


def _is_own(kind: type[Module], method: str) -> bool:
    """Whether a class has a method that is not torch's."""
    home = next(each for each in kind.__mro__ if method in vars(each))
    return not home.__module__.startswith("torch.")


def names_in(module: Module, state: Mapping[str, Any]) -> Any:
    """Return a state dict with the names that torch has in ``module``; the same object if it has these names."""
    return _renamed(state, functools.partial(name_in, module))


def _renamed(state: Any, rename: Callable[[str], str]) -> Any:
    """Rename the entries of a state dict, and those of the versions that torch keeps beside them."""
    if not isinstance(state, Mapping):  # a module may return what it likes
        return state
    names = {key: rename(key) for key in state if isinstance(key, str)}
    if all(old == new for old, new in names.items()):
        return state
    renamed: Any = OrderedDict((names.get(key, key), value) for key, value in state.items())
    versions = getattr(state, "_metadata", None)
    if versions is not None:
        renamed._metadata = OrderedDict((rename(f"{path}.")[:-1], entry) for path, entry in versions.items())
    return renamed
