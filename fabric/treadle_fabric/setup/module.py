"""The wrapper around the user's module: device, precision and the strategy's engine are taken care of."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.nn import Module

from treadle_fabric.errors import MisconfigurationException, near_names
from treadle_fabric.strategies import METHOD_KEYWORD, Strategy

__all__ = ["FabricModule"]


_HOOK_METHODS = [name for name in dir(Module) if name.startswith("register_") and name.endswith("_hook")]


class FabricModule(Module):
    """A module that runs on its device, in its precision, through its strategy's engine.

    Attributes, parameters and state dicts are those of the user's module. Calling the wrapper runs ``forward``.

    Args:
        forward_module: The engine that :meth:`Strategy.setup_module` returned.
        strategy: The strategy.
        original_module: The user's module. Default: ``forward_module``.
    """

    _forward_module: Module
    _original_module: Module
    _called_module: Module
    _strategy: Strategy
    _forward_methods: set[str]
    _run: Callable[..., Any]

    def __init__(self, forward_module: Module, strategy: Strategy, original_module: Module | None = None) -> None:
        original = forward_module if original_module is None else original_module
        fields = self.__dict__  # not registered as submodules, which would put a prefix before every name
        fields["_called_module"] = original
        fields["_original_module"] = getattr(original, "_orig_mod", original)  # torch.compile wraps too
        super().__init__()
        for name in _HOOK_METHODS:
            fields[name] = getattr(self._original_module, name)
        fields["_forward_module"] = forward_module
        fields["_strategy"] = strategy
        fields["_forward_methods"] = set()
        fields["_run"] = self._bind("forward", cast_output=True)
        for name in getattr(original, "forward_methods", ()):
            self.mark_forward_method(name)

    @property
    def module(self) -> Module:
        """The user's module."""
        original: Module = self.__dict__["_original_module"]
        return original

    @property
    def forward_module(self) -> Module:
        """The strategy's engine."""
        engine: Module = self.__dict__["_forward_module"]
        return engine

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's ``forward`` through the engine."""
        # hooks are the user's module's, so there are none to look for here; empty keywords would be copied
        return self._run(*args, **kwargs) if kwargs else self._run(*args)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The same as calling."""
        return self._run(*args, **kwargs)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the user's module in place."""
        self._original_module.compile(*args, **kwargs)

    def mark_forward_method(self, method: str | Callable[..., Any]) -> None:
        """Let a method run through the engine and in the precision, as ``forward`` does.

        Args:
            method: A method of the module, or its name.

        Raises:
            MisconfigurationException: The module has no such method.
        """
        name = method if isinstance(method, str) else getattr(method, "__name__", repr(method))
        if name == "forward":
            raise MisconfigurationException("'forward' needs no mark: calling the module runs it.")
        if not callable(getattr(self.module, name, None)):
            own = [n for n in dir(type(self.module)) if not n.startswith("_") and not hasattr(Module, n)]
            raise MisconfigurationException(
                f"{type(self.module).__name__} has no method {name!r} to mark. {near_names(name, own)}"
            )
        self._forward_methods.add(name)
        self.__dict__[name] = self._bind(name, cast_output=True)

    def method(self, name: str) -> Callable[..., Any]:
        """A method of the module, to be called in a hot loop: through the engine, in the precision.

        What it returns is not cast. Where neither engine nor precision has anything to add, this is the module's
        own bound method.

        Args:
            name: Such as ``"training_step"``.
        """
        return self._bind(name, cast_output=False)

    def _bind(self, name: str, *, cast_output: bool) -> Callable[..., Any]:
        """What calling a method means, decided once instead of at each call."""
        strategy, engine = self._strategy, self._forward_module
        called = self._called_module
        direct = called if name == "forward" else getattr(called, name)
        call = direct
        if strategy.requires_forward_redirect:
            call = _through_engine(engine, strategy, name, direct)
        elif name == "forward":
            call = engine
        precision = strategy.precision
        if not precision.converts:
            return call
        convert_input, convert_output = precision.convert_input, precision.convert_output
        context = precision.forward_context
        cast_input = name == "forward" or not precision.autocasts

        def converted(*args: Any, **kwargs: Any) -> Any:
            if cast_input:
                args, kwargs = convert_input(args), convert_input(kwargs)
            with context():
                output = call(*args, **kwargs)
            return convert_output(output) if cast_output else output

        return functools.update_wrapper(converted, direct) if name != "forward" else converted

    def __reduce__(self) -> Any:
        # functions made for one engine must not be copied along with another
        return _rewrap, (self._forward_module, self._strategy, self._called_module, sorted(self._forward_methods))

    # The user's module answers for what torch would look for in this one

    def __getattr__(self, name: str) -> Any:
        original: Module = self.__dict__["_original_module"]
        value = getattr(original, name)
        strategy = self.__dict__.get("_strategy")
        if (
            strategy is not None
            and strategy.requires_forward_redirect
            and getattr(value, "__self__", None) is original
            and not hasattr(Module, name)
        ):
            return _refusing_forward(value, original)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__ or hasattr(type(self), name):
            object.__setattr__(self, name, value)
        else:
            setattr(self._original_module, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            object.__delattr__(self, name)
        else:
            delattr(self._original_module, name)

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *dir(self._original_module)})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._original_module!r})"

    @property
    def training(self) -> bool:
        """Whether the user's module is in training mode."""
        return bool(self.__dict__["_original_module"].training)

    @training.setter
    def training(self, mode: bool) -> None:
        pass  # only ``train`` changes it, in every submodule

    def train(self, mode: bool = True) -> FabricModule:
        """Switch the module, and the engine, to training or evaluation mode."""
        self._forward_module.train(mode)
        self._original_module.train(mode)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The user's module's."""
        return self._original_module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """The user's module's."""
        return self._original_module.load_state_dict(state_dict, strict=strict, assign=assign)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The user's module's."""
        yield from self._original_module.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """The user's module's."""
        yield from self._original_module.named_buffers(*args, **kwargs)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Module]]:
        """The user's module's."""
        yield from self._original_module.named_modules(*args, **kwargs)

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """The user's module's."""
        yield from self._original_module.named_children()

    def apply(self, fn: Callable[[Module], None]) -> FabricModule:
        """Apply a function to the user's module and its submodules."""
        self._original_module.apply(fn)
        return self

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> FabricModule:
        self._original_module._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _rewrap(engine: Module, strategy: Strategy, original: Module, marked: list[str]) -> FabricModule:
    module = FabricModule(engine, strategy, original)
    for name in marked:
        module.mark_forward_method(name)
    return module


def _through_engine(engine: Module, strategy: Strategy, name: str, direct: Callable[..., Any]) -> Callable[..., Any]:
    chosen = {} if name == "forward" else {METHOD_KEYWORD: name}

    def call(*args: Any, **kwargs: Any) -> Any:
        # Without gradients there is nothing to reduce, and ranks may evaluate different numbers of batches
        if not torch.is_grad_enabled():
            return direct(*args, **kwargs)
        try:
            return engine(*args, **kwargs, **chosen)
        except RuntimeError as error:
            explained = strategy.explain_error(engine, error)
            if explained is None:
                raise
            raise explained from error

    return call


def _refusing_forward(method: Callable[..., Any], module: Module) -> Callable[..., Any]:
    """An unmarked method, which may do anything but run the module with gradients that nobody would reduce."""

    @functools.wraps(method)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return method(*args, **kwargs)
        own = {id(m) for m in module.modules()}

        def refuse(called: Module, inputs: Any) -> None:
            if id(called) in own and torch.is_grad_enabled():
                name = getattr(method, "__name__", repr(method))
                raise MisconfigurationException(
                    f"The method {name!r} runs the forward pass of {type(called).__name__} outside the strategy's "
                    f"engine, so its gradients would not be reduced. Call model.mark_forward_method({name!r}) after "
                    "setup, or run it under torch.no_grad()."
                )

        handle = torch.nn.modules.module.register_module_forward_pre_hook(refuse)
        try:
            return method(*args, **kwargs)
        finally:
            handle.remove()

    return guarded
