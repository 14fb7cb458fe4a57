"""What ``Fabric.setup`` returns: the user's module and optimizer, with device and precision taken care of."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.utils.data import Dataset

from treadle_fabric.errors import MisconfigurationException, near_names
from treadle_fabric.loaders import WrappedLoader
from treadle_fabric.strategies import METHOD_KEYWORD, Strategy

__all__ = [
    "FabricModule",
    "FabricOptimizer",
    "check_loader",
    "check_loggers",
    "check_module",
    "check_optimizer",
    "check_ownership",
    "engine_of",
    "is_wrapped",
    "put_back",
    "unwrap",
]


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
        return self._run(*args, **kwargs)  # hooks are the user's module's, so there are none to look for here

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


class FabricOptimizer:
    """An optimizer whose ``step`` goes through strategy and precision; everything else is the user's optimizer.

    Instances also are of the class of the user's optimizer.

    Args:
        optimizer: The user's optimizer.
        strategy: The strategy.
        before_step: Called with the user's optimizer before each step.
        after_step: The same after it.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        strategy: Strategy,
        before_step: Callable[[Optimizer], None] | None = None,
        after_step: Callable[[Optimizer], None] | None = None,
    ) -> None:
        fields = self.__dict__
        self.optimizer: Optimizer = optimizer
        fields["_strategy"] = strategy
        fields["_before_step"] = before_step
        fields["_after_step"] = after_step
        fields["_plain_step"] = strategy.plain_step
        cls = type(optimizer)
        for name in dir(cls):
            # Bound once: a method found on the class would run with the wrapper as its self
            if name != "step" and not name.startswith("__") and callable(getattr(cls, name)):
                fields[name] = getattr(optimizer, name)
        self.__class__ = _also(type(self), cls)  # type: ignore[arg-type] # classes are hashable

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Step the optimizer.

        Args:
            closure: Evaluates the loss anew and returns it, for optimizers that need that.
            **kwargs: What else the optimizer's own ``step`` takes.
        """
        if self._before_step is not None:
            self._before_step(self.optimizer)
        if closure is not None:
            kwargs["closure"] = closure
        if self._plain_step:
            result: Any = self.optimizer.step(**kwargs)
        else:
            result = self._strategy.optimizer_step(self.optimizer, **kwargs)
        if self._after_step is not None:
            self._after_step(self.optimizer)
        return result

    # Loading a state replaces these in the user's optimizer, so they are looked up each time

    @property
    def state(self) -> Any:
        """The user's optimizer's."""
        return self.optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.optimizer.state = value

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The user's optimizer's."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The user's optimizer's."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.optimizer.defaults = value

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # not there yet: being copied or unpickled
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __repr__(self) -> str:
        return f"Fabric{self.optimizer!r}"

    def __reduce__(self) -> Any:
        return FabricOptimizer, (self.optimizer, self._strategy, self._before_step, self._after_step)


@functools.cache
def _also(wrapper: type, cls: type) -> type:
    """A class that is both; ``step`` and what it needs come from the wrapper."""
    return type(f"Fabric{cls.__name__}", (wrapper, cls), {"__doc__": wrapper.__doc__, "__module__": wrapper.__module__})


def is_wrapped(obj: object) -> bool:
    """Whether an object is what ``Fabric.setup`` or ``setup_dataloaders`` returned."""
    return isinstance(obj, (FabricModule, FabricOptimizer, WrappedLoader))


def engine_of(module: Any, what: str) -> Module:
    """The engine of a wrapped module; ``what`` names the caller for the error."""
    if not isinstance(module, FabricModule):
        raise MisconfigurationException(
            f"{what} needs the model that setup returned, and got {type(module).__name__}. "
            "Call model = fabric.setup(model) first."
        )
    return module.forward_module


def unwrap(state: Any) -> Any:
    """Engines and users' optimizers in place of wrappers; a container without any is the same object."""
    if isinstance(state, FabricModule):
        return state.forward_module
    if isinstance(state, FabricOptimizer):
        return state.optimizer
    if isinstance(state, WrappedLoader):
        return _saveable(state)
    if isinstance(state, dict):
        new = {key: unwrap(value) for key, value in state.items()}
        return state if all(new[key] is value for key, value in state.items()) else new
    if type(state) in (list, tuple):
        items = [unwrap(value) for value in state]
        return state if all(a is b for a, b in zip(items, state, strict=True)) else type(state)(items)
    return state


def _saveable(loader: WrappedLoader) -> Any:
    """What a checkpoint gets of a loader: its own state, or that of the loader inside."""
    for candidate in (loader, loader.dataloader):
        if callable(getattr(type(candidate), "state_dict", None)):
            return candidate
    raise MisconfigurationException(
        f"The state holds a loader ({type(loader.dataloader).__name__}) that does not keep its position. Set it up "
        "with fabric.setup_dataloaders(loader, resumable=True), or leave it out."
    )


def put_back(state: dict[str, Any], loaded: dict[str, Any]) -> None:
    """Give the user's dict the plain values that loading put into its unwrapped copy."""
    for key, old in list(state.items()):
        if isinstance(old, dict) and unwrap(old) is not old:
            put_back(old, loaded[key])
        elif unwrap(old) is old:
            state[key] = loaded[key]


# What cannot be set up is refused before any work


def check_module(module: Any) -> None:
    """Refuse what is no module, or is set up already."""
    if not isinstance(module, Module):
        raise MisconfigurationException(
            f"The model is of type {type(module).__name__}, and must be a torch.nn.Module. Optimizers come after it: "
            "fabric.setup(model, optimizer)."
        )
    inside = [] if is_wrapped(module) else [name for name, m in module.named_modules() if is_wrapped(m)]
    inside += [name for name, m in getattr(module, "_modules", {}).items() if is_wrapped(m)]
    if is_wrapped(module) or inside:
        where = f" (in {inside[0]!r})" if inside else ""
        raise MisconfigurationException(
            f"This {type(module).__name__} is set up already{where}. Set up each model once, and use what setup "
            "returned."
        )


def check_optimizer(optimizer: Any) -> None:
    """Refuse what is no optimizer, or is set up already."""
    if is_wrapped(optimizer):
        raise MisconfigurationException(
            f"{type(optimizer).__name__} is set up already. Set up each optimizer once, and use what setup returned."
        )
    if not isinstance(optimizer, Optimizer):
        raise MisconfigurationException(
            f"An optimizer is of type {type(optimizer).__name__}, and must be a torch.optim.Optimizer. Give several "
            "one by one: fabric.setup(model, optimizer_1, optimizer_2)."
        )


def check_loader(loader: Any) -> None:
    """Refuse what is no iterable, or is set up already."""
    if is_wrapped(loader):
        raise MisconfigurationException("A loader is set up already. Set up each once, and use what setup returned.")
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise MisconfigurationException(
            f"A loader is of type {type(loader).__name__}, which cannot be iterated. Give a DataLoader, or any "
            "iterable of batches."
        )
    if isinstance(loader, Dataset) and not isinstance(loader, Iterable):
        raise MisconfigurationException(
            f"A loader is of type {type(loader).__name__}, a Dataset, whose items are samples and not batches. Give "
            f"DataLoader({type(loader).__name__.lower()}, batch_size=...)."
        )


def check_loggers(loggers: list[Any]) -> list[Any]:
    """Refuse what cannot log."""
    for logger in loggers:
        if isinstance(logger, type) or not callable(getattr(logger, "log_metrics", None)):
            raise MisconfigurationException(
                f"loggers has {logger!r}, which has no method log_metrics. Give Logger objects, such as "
                "CSVLogger('logs')."
            )
    return loggers


def check_ownership(module: Module, optimizer: Optimizer, others: Iterable[Module]) -> None:
    """Refuse an optimizer with parameters of neither the model nor those set up before it."""
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


def _labelled(optimizer: Optimizer) -> list[tuple[str, Tensor]]:
    """Parameters with their names where the optimizer knows them, otherwise their places."""
    labelled = []
    for i, group in enumerate(optimizer.param_groups):
        names = group.get("param_names")
        for j, parameter in enumerate(group["params"]):
            labelled.append((repr(names[j]) if names else f"number {j} in group {i}", parameter))
    return labelled
