"""The wrapper around the user's module: device, precision and the strategy's engine are taken care of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, Final

import torch
from torch.nn import Module, Parameter, Sequential

from treadle_fabric.containers import leaves
from treadle_fabric.errors import MisconfigurationException, NoSuchNameError, WrongTypeError, near_names
from treadle_fabric.strategies import METHOD_KEYWORD, Strategy
from treadle_fabric.strategies.unwrapping import (
    class_of,
    compiled_like,
    inside,
    layers_of,
    names_in,
    plain_name,
    user_module,
)

__all__ = ["FabricModule", "engine_of", "method_of", "through_engine"]


@dataclass(frozen=True)
class _Parts:
    """What a wrapper is made of."""

    engine: Module
    strategy: Strategy
    called: Module
    """What the user gave to ``setup``: the user's module, or its compiled form."""
    module: Module
    """The user's module."""
    marked: set[str] = field(default_factory=set)


class FabricModule(Module):
    """A module that runs on its device, in its precision, through its strategy's engine.

    Calling the wrapper runs ``forward``. Everything else is the user's module: attributes and methods, also private
    ones, what is registered or assigned, parameters, state dicts. Only :attr:`module` and :meth:`mark_forward_method`
    belong to the wrapper, whatever the user's module has under these names. Special methods, such as ``__len__``, are
    there if the class of the user's module has them.

    Args:
        forward_module: The engine that :meth:`Strategy.setup_module` returned.
        strategy: The strategy.
        original_module: The user's module, or its compiled form. Default: ``forward_module``.
    """

    # Names that begin with two underscores are mangled, so that none can hide one of the user's module.
    __parts: _Parts
    __run: Callable[..., Any]

    def __new__(cls, forward_module: Module, strategy: Strategy, original_module: Module | None = None) -> FabricModule:
        """Make an object of a subclass that has the special methods of the user's class."""
        own = user_module(forward_module if original_module is None else original_module)
        made: FabricModule = super().__new__(_with_special_methods(cls, _special_methods(type(own))))  # type: ignore[arg-type] # classes are hashable
        return made

    def __init__(self, forward_module: Module, strategy: Strategy, original_module: Module | None = None) -> None:
        # without Module.__init__, whose registries of parameters, submodules and hooks would hide the user's module's
        called = forward_module if original_module is None else original_module
        parts = _Parts(forward_module, strategy, called, user_module(called))
        self.__dict__[_PARTS] = parts
        self.__dict__[_RUN] = _bind(parts, "forward", cast_output=True)
        declared = getattr(type(parts.module), "forward_methods", ())  # a module may have something else by this name
        for name in declared if isinstance(declared, tuple) else ():
            if getattr(parts.module, name, None) is not None:  # a method that was set to None is not there
                self.mark_forward_method(name)

    @property
    def module(self) -> Module:
        """The user's module."""
        return self.__parts.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's ``forward`` through the engine."""
        # hooks are the user's module's, so there are none to look for here; empty keywords would be copied
        return self.__run(*args, **kwargs) if kwargs else self.__run(*args)

    forward = _call_impl = _wrapped_call_impl = __call__

    def mark_forward_method(self, method: str | Callable[..., Any]) -> None:
        """Let a method run through the engine and in the precision, as ``forward`` does.

        Args:
            method: A method of the module, or its name.

        Raises:
            NoSuchNameError: The module has no such method.
            WrongTypeError: ``method`` is neither a method nor a name.
        """
        parts = self.__parts
        if not isinstance(method, str) and not callable(method):
            raise WrongTypeError(f"mark_forward_method({method!r}): give a method of the module, or its name.")
        name = method if isinstance(method, str) else getattr(method, "__name__", repr(method))
        if name == "forward":
            raise MisconfigurationException("'forward' needs no mark: calling the module runs it.")
        if not callable(getattr(parts.module, name, None)):
            own = [n for n in dir(type(parts.module)) if not n.startswith("_") and not hasattr(Module, n)]
            raise NoSuchNameError(
                f"{type(parts.module).__name__} has no method {name!r} to mark. {near_names(name, own)}"
            )
        parts.marked.add(name)
        self.__dict__[name] = _bind(parts, name, cast_output=True, changes_weights=True)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The user's module's; names may be those of a compiled module where this one is not, and the reverse."""
        module = self.__parts.module
        named = {key: names_in(module, value) for key, value in kwargs.items()}
        return module.load_state_dict(*(names_in(module, value) for value in args), **named)

    def __reduce__(self) -> Any:
        # functions made for one engine must not be copied along with another
        parts = self.__parts
        if any(hasattr(each, "_get_fsdp_state") for each in parts.engine.modules()) or parts.strategy.runs_whole_batch:
            raise MisconfigurationException(
                f"{type(parts.module).__name__} cannot be copied or pickled: this rank has a part of it. Write it with"
                " fabric.save; make copies before setup; for an average of its weights, copy its parameters,"
                " {name: p.detach().clone() for name, p in model.named_parameters()}."
            )
        return _rewrap, (parts.engine, parts.strategy, parts.called, sorted(parts.marked))

    def __getattr__(self, name: str) -> Any:
        parts = _parts(self)
        try:
            value = getattr(parts.module, name)
        except AttributeError:
            if name not in _GIVING_WAY:
                raise
            return _GIVING_WAY[name](self)
        if not isinstance(value, MethodType) or value.__self__ is not parts.module:
            return value
        if parts.strategy.requires_forward_redirect:
            return _guarded(value, self)
        return MethodType(_of_wrapper(value.__func__), self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            raise AttributeError(
                "The class of the wrapper that setup returned cannot be set. torch.nn.utils.parametrize sets the class "
                f"of what it is given: give it model.module, or the {type(self.module).__name__} before setup."
            )
        if name in _WRAPPERS_OWN:
            raise AttributeError(
                f"{name!r} is a name of the wrapper that setup returned, and cannot be set. For the attribute of your "
                f"own module, set model.module.{name}."
            )
        if isinstance(value, (Module, Parameter)):
            _refuse_new_parameters(self.__parts, f"model.{name} = ...", value)
        setattr(self.__parts.module, name, value)
        _mark_again(self, name)

    def __delattr__(self, name: str) -> None:
        delattr(self.__parts.module, name)
        _mark_again(self, name)

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *dir(self.__parts.module)})

    def __repr__(self) -> str:
        return f"FabricModule({self.__parts.module!r})"


_PARTS: Final = "_FabricModule__parts"
_RUN: Final = "_FabricModule__run"
_WRAPPERS_OWN: Final = frozenset({"module", "mark_forward_method", "__dict__"})
# Methods that give a module another parameter or submodule.
_ADDING: Final = frozenset(
    {"add_module", "register_module", "register_parameter", "set_submodule", "__setitem__", "__iadd__", "__imul__"}
)
# Special methods whose arguments are kept or looked up in the module, and may be wrappers there.
_OF_CONTENTS: Final = frozenset({"__contains__", "__getitem__", "__setitem__", "__delitem__"})
# Special methods that are about the object itself, or that a class must not have because of what is in it.
_NOT_FORWARDED: Final = frozenset(
    """__new__ __init__ __del__ __call__ __repr__ __dir__ __getattr__ __getattribute__ __setattr__ __delattr__
    __reduce__ __reduce_ex__ __getstate__ __setstate__ __getnewargs__ __getnewargs_ex__ __copy__ __deepcopy__
    __class__ __init_subclass__ __subclasshook__ __class_getitem__ __torch_function__ __sizeof__
    __get__ __set__ __delete__ __set_name__""".split()
)


def engine_of(module: FabricModule) -> Module:
    """Return the engine of the strategy that runs a wrapped module."""
    return _parts(module).engine


def method_of(module: FabricModule, name: str, *, changes_weights: bool = False) -> Callable[..., Any]:
    """Return a method of a wrapped module for a hot loop: it runs through the engine, in the precision.

    What it returns is not cast. Where neither engine nor precision has anything to add, this is the user's module's
    own bound method.

    Args:
        module: The wrapped module.
        name: Such as ``"training_step"``.
        changes_weights: Whether the method may change weights and use them again, as a step that optimizes manually.
    """
    return _bind(_parts(module), name, cast_output=False, changes_weights=changes_weights)


def through_engine(module: FabricModule, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that runs the user's module as :func:`method_of` returns a method."""
    return _bound(_parts(module), function, forward=False, cast_output=False)


def _parts(module: FabricModule) -> _Parts:
    parts: _Parts = module.__dict__[_PARTS]
    return parts


# Names that scripts look for in the wrapper, Lightning's private ones among them, unless the user's module has them.
_GIVING_WAY: Final[dict[str, Callable[[FabricModule], Any]]] = {
    "forward_module": engine_of,
    "method": lambda module: functools.partial(method_of, module),
    "_forward_module": engine_of,
    "_original_module": lambda module: module.module,
    "_strategy": lambda module: _parts(module).strategy,
}


@inside.register
def _(wrapper: FabricModule) -> Module:
    return _parts(wrapper).called


def _mark_again(module: FabricModule, name: str) -> None:
    """Bind a marked method anew, which has become another one or is gone."""
    parts = _parts(module)
    if name in parts.marked:
        parts.marked.remove(name)
        del module.__dict__[name]
        if callable(getattr(parts.module, name, None)):
            module.mark_forward_method(name)


def _bind(parts: _Parts, name: str, *, cast_output: bool, changes_weights: bool = False) -> Callable[..., Any]:
    """What calling a method means, decided once instead of at each call."""
    forward = name == "forward"
    direct = parts.called if forward else compiled_like(parts.called, getattr(parts.module, name))
    return _bound(parts, direct, forward=forward, cast_output=cast_output, changes_weights=changes_weights)


def _bound(
    parts: _Parts, direct: Callable[..., Any], *, forward: bool, cast_output: bool, changes_weights: bool = False
) -> Callable[..., Any]:
    strategy, engine = parts.strategy, parts.engine
    call = direct
    if strategy.requires_forward_redirect:
        call = _through_engine(engine, strategy, direct, {} if forward else {METHOD_KEYWORD: direct})
    elif forward:
        call = engine
    precision = strategy.precision
    if not precision.converts:
        return call
    convert_input, convert_output = precision.convert_input, precision.convert_output
    context = precision.step_context if changes_weights else precision.forward_context
    cast_input = forward or not precision.autocasts

    def converted(*args: Any, **kwargs: Any) -> Any:
        if cast_input:
            args, kwargs = convert_input(args), convert_input(kwargs)
        with context():
            output = call(*args, **kwargs)
        return convert_output(output) if cast_output else output

    return converted if forward else functools.update_wrapper(converted, direct)


def _through_engine(
    engine: Module, strategy: Strategy, direct: Callable[..., Any], chosen: dict[str, Any]
) -> Callable[..., Any]:
    always = strategy.shards_parameters or strategy.forward_is_collective

    def call(*args: Any, **kwargs: Any) -> Any:
        # Without gradients there is nothing to reduce, and ranks may evaluate different numbers of batches
        if not always and not torch.is_grad_enabled():
            return direct(*args, **kwargs)
        try:
            return engine(*args, **kwargs, **chosen)
        except RuntimeError as error:
            explained = strategy.explain_error(engine, error)
            if explained is None:
                raise
            raise explained from error

    return call


@functools.lru_cache(1024)
def _of_wrapper(function: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the user's class, called on the wrapper: a method that returns the module returns the wrapper."""

    @functools.wraps(function)
    def method(self: FabricModule, *args: Any, **kwargs: Any) -> Any:
        module = _parts(self).module
        result = function(module, *args, **kwargs)
        return self if result is module else result

    return method


def _guarded(method: Callable[..., Any], wrapper: FabricModule) -> Callable[..., Any]:
    """An unmarked method, which may do anything but run the module with gradients that nobody would reduce."""
    parts, name = _parts(wrapper), getattr(method, "__name__", repr(method))
    adds = (
        getattr(method, "__module__", "") == Sequential.__module__
    )  # append, extend, update, ... of torch's containers

    def returned(result: Any) -> Any:
        return wrapper if result is parts.module else result

    @functools.wraps(method)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if adds:
            _refuse_new_parameters(parts, f"model.{name}(...)", (args, kwargs))
        if not torch.is_grad_enabled():
            try:
                return returned(method(*args, **kwargs))
            except RuntimeError as error:
                explained = parts.strategy.explain_error(parts.engine, error)
                if explained is None:
                    raise
                raise explained from error
        own = {id(m) for m in parts.module.modules()}

        def refuse(called: Module, inputs: Any) -> None:
            if id(called) in own and torch.is_grad_enabled():
                raise MisconfigurationException(
                    f"The method {name!r} runs the forward pass of {class_of(called).__name__} outside the strategy's "
                    f"engine, so its gradients would not be reduced. Call model.mark_forward_method({name!r}) after "
                    + ("setup." if parts.strategy.shards_parameters else "setup, or run it under torch.no_grad().")
                )

        handle = torch.nn.modules.module.register_module_forward_pre_hook(refuse)
        try:
            return returned(method(*args, **kwargs))
        finally:
            handle.remove()

    return guarded


def _refuse_new_parameters(parts: _Parts, what: str, values: Any) -> None:
    """Refuse parameters whose gradients the engine does not reduce as it is.

    Raises:
        MisconfigurationException: ``values`` holds parameters, also of modules, that require a gradient and are not the
            module's yet.
    """
    if not parts.strategy.fixes_parameters:
        return
    known = {id(p) for p in parts.module.parameters()}
    for value in leaves(values, lambda each: isinstance(each, (Module, Parameter))):
        for name, parameter in value.named_parameters() if isinstance(value, Module) else [("", value)]:
            if parameter.requires_grad and id(parameter) not in known:
                which = f"the parameter {plain_name(value, name)!r} of the new module" if name else "a new parameter"
                raise MisconfigurationException(
                    f"{what} adds {which} after setup, and {type(parts.strategy).__name__} averages the gradients of "
                    "the parameters that the model had then. Add it before fabric.setup, or freeze it first with "
                    "requires_grad_(False). To train it from now on, add it to model.module and to the optimizer, on "
                    "all ranks before the same step: the strategy then averages its gradients, too."
                )


def _follow_mode(parts: _Parts) -> None:
    """Give the wrappers between engine and user's module the mode of the module, which has switched its submodules."""
    for layer in layers_of(parts.engine):
        if layer is not parts.module and "training" in layer.__dict__:
            layer.__dict__["training"] = parts.module.training


def _rewrap(engine: Module, strategy: Strategy, called: Module, marked: list[str]) -> FabricModule:
    module = FabricModule(engine, strategy, called)
    for name in marked:
        module.mark_forward_method(name)
    return module


# The user's module answers for all that torch would look for in the wrapper


def _forwarded(name: str) -> Callable[..., Any]:
    """A method that calls the user's module's, with what the caller passed and nothing else."""
    adds, switches = name in _ADDING, name in ("train", "eval")
    compares = name.startswith("__") and name not in _OF_CONTENTS

    def method(self: FabricModule, *args: Any, **kwargs: Any) -> Any:
        parts = _parts(self)
        if adds:
            _refuse_new_parameters(parts, f"model.{name}(...)", (args, kwargs))
        if compares:  # model == other compares, and model + other adds, the users' modules
            args = tuple(each.module if isinstance(each, FabricModule) else each for each in args)
        result = getattr(parts.module, name)(*args, **kwargs)
        if switches:
            _follow_mode(parts)
        return self if result is parts.module else result

    known = getattr(Module, name, None)
    return functools.wraps(known)(method) if known is not None else method


def _forwarded_attribute(name: str) -> property:
    def get(self: FabricModule) -> Any:
        return getattr(_parts(self).module, name)

    return property(get)


def _forward_everything() -> None:
    for name, member in vars(Module).items():
        if not name.startswith("__") and name not in vars(FabricModule):
            setattr(FabricModule, name, _forwarded(name) if callable(member) else _forwarded_attribute(name))


_forward_everything()


def _special_methods(cls: type[Module]) -> frozenset[str]:
    """The special methods of a class that modules do not have in general."""
    return frozenset(
        name
        for name in dir(cls)
        if name.startswith("__")
        and name.endswith("__")
        and name not in _NOT_FORWARDED
        and callable(getattr(cls, name))
        and getattr(cls, name) is not getattr(Module, name, None)
    )


@functools.cache
def _with_special_methods(cls: type[FabricModule], names: frozenset[str]) -> type[FabricModule]:
    """A subclass that has these special methods, which Python looks for in the class only."""
    if not names:
        return cls
    members = {name: _forwarded(name) for name in names}
    members.setdefault("__hash__", cls.__hash__)  # a class with __eq__ would have none
    return type(cls.__name__, (cls,), {**members, "__doc__": cls.__doc__, "__module__": cls.__module__})
