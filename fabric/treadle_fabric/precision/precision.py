"""The base class of precisions, which decide the dtypes of weights, inputs and outputs, and the scaling of losses."""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.overrides import TorchFunctionMode

from treadle_fabric.batches import map_tensors
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.precision.closures import needs_closure

__all__ = ["Precision", "cast_floating", "cast_module", "default_dtype", "half_init"]


class Precision:
    """Single precision, and the hooks that other precisions implement.

    Precisions cast real floating-point numbers. Everything else stays what it is, in weights, buffers, inputs and
    outputs: integers, booleans, complex and quantized numbers.

    A subclass implements its contexts and conversions. The scaling of losses and gradients is implemented once, here;
    a ``scaler`` switches it on.
    """

    precision: str = "32-true"
    """The canonical name, such as ``"bf16-mixed"``."""
    converts: bool = False
    """Whether :meth:`forward_context`, :meth:`convert_input` and :meth:`convert_output` do anything; if not, wrappers
    do not call them."""
    autocasts: bool = False
    """Whether each operation picks its own dtype. If so, a step gets its batch unrounded, because the batch may hold
    targets."""

    replaces_parameters: bool = False
    """Whether :meth:`convert_module` may put other parameters in the places of a module's."""

    def __init__(self) -> None:
        self._scaling = _Scaling(None)
        self._guards: dict[int, Any] = {}  # handles of the hooks of guarded parameters, by the parameters' ids
        self._turns: deque[weakref.ref[Tensor]] = deque()  # parameters that are guarded in turns, now the last of them
        self._at_steps: Any = None  # the handle of a hook of all optimizers
        self.watches_backward = any(
            getattr(type(self), name) is not getattr(Precision, name) for name in ("pre_backward", "post_backward")
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_guards": {}, "_turns": deque(), "_at_steps": None}  # of modules of this process

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The gradient scaler, updated after every finished step; ``None`` without scaling."""
        self._scaling.settle()
        return self._scaling.scaler

    @property
    def requires_fabric_backward(self) -> bool:
        """Whether ``loss.backward()`` would be wrong, because the loss has to be scaled first."""
        return self._scaling.scaler is not None

    def place(self, device: str) -> None:
        """Learn on which type of devices, such as ``"cuda"``, a run is; before anything else. Default: nothing."""

    def convert_module(self, module: Module) -> Module:
        """Cast the module's weights to this precision's dtype, and return the module."""
        return module

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """Return a context in which new tensors have this precision's dtype."""
        return contextlib.nullcontext()

    def module_init_context(self) -> AbstractContextManager[Any]:
        """Return a context in which the weights of new modules have this precision's dtype."""
        return contextlib.nullcontext()

    def forward_context(self) -> AbstractContextManager[Any]:
        """Return the context that surrounds a forward pass."""
        return contextlib.nullcontext()

    def step_context(self) -> AbstractContextManager[Any]:
        """Return :meth:`forward_context` for code that may change weights between two uses of them.

        Autocast keeps the cast of a weight until its outermost context ends, and does not see that the weight changes:
        in this context no cast is kept.
        """
        return _without_cache(self.forward_context()) if self.autocasts else self.forward_context()

    def convert_input(self, data: Any) -> Any:
        """Cast the floating-point tensors that go into a forward pass."""
        return data

    def convert_output(self, data: Any) -> Any:
        """Cast the floating-point tensors that come out of a forward pass."""
        return data

    def pre_backward(self, tensor: Tensor, module: Module | None) -> Any:
        """Called before :meth:`backward`; by default nothing happens."""

    def backward(self, tensor: Tensor, model: Module | None, *args: Any, **kwargs: Any) -> None:
        """Differentiate ``tensor``, scaled if there is a scaler; the arguments are those of ``Tensor.backward``."""
        self.backward_by(Tensor.backward, tensor, *args, **kwargs)

    def backward_by(self, function: Callable[..., Any], tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        """Differentiate with the caller's ``function``, which gets the tensor, scaled if there is a scaler."""
        scaling = self._scaling
        if scaling.scaler is None:
            function(tensor, *args, **kwargs)
        else:
            if scaling.reached:
                self._move_guards()
            with scaling.activated():
                function(scaling.scale(tensor), *args, **kwargs)

    def post_backward(self, tensor: Tensor, module: Module | None) -> Any:
        """Called after :meth:`backward`; by default nothing happens."""

    def optimizer_step(self, optimizer: Optimizer, **kwargs: Any) -> Any:
        """Step the optimizer; with a scaler, unscale the gradients first, and step only if all of them are finite.

        Args:
            optimizer: The optimizer, unwrapped.
            **kwargs: Arguments of the optimizer's ``step``, such as ``closure``.

        Returns:
            What the optimizer's ``step`` returned; with a scaler and a closure, the closure's result.
        """
        if self._scaling.scaler is None:
            return optimizer.step(**kwargs)
        return self._scaling.step(optimizer, **kwargs)

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Divide gradients by the scale, for reading or clipping; a second call within a step changes nothing."""
        if self._scaling.scaler is not None:
            self._scaling.unscale(optimizer)

    def unscale_by(self, function: Callable[[torch.amp.GradScaler, Optimizer], None], everywhere: bool = False) -> None:
        """Unscale with the caller's ``function``, where other processes hold parts of the gradients.

        Args:
            function: Divides the optimizer's gradients by the scale, and notes in the scaler whether one of any process
                is not finite.
            everywhere: Call it also where this process has no gradients, because others may have some.
        """
        self._scaling.unscaler, self._scaling.everywhere = function, everywhere

    def validate_optimizer(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer that cannot work in this precision.

        Raises:
            MisconfigurationException: Gradients are scaled, and the optimizer evaluates its closure itself, or has
                complex parameters.
        """
        if self._scaling.scaler is None:
            return
        if any(p.is_complex() and p.requires_grad for p in self.main_params(optimizer)):
            raise MisconfigurationException(
                f"{type(optimizer).__name__} has complex parameters, and precision={self.precision!r} scales "
                "gradients, which torch's GradScaler cannot undo for complex ones. Use precision='bf16-mixed' or "
                "'32-true', or make the parameters real, and complex (torch.view_as_complex) in forward."
            )
        if needs_closure(optimizer):
            raise MisconfigurationException(
                f"{type(optimizer).__name__} evaluates its closure several times in one step, and "
                f"precision={self.precision!r} scales gradients once per step. Use precision='bf16-mixed' or "
                "'32-true', or another optimizer."
            )

    def guard_module(self, module: Module) -> None:
        """Watch over a module that is trained: what goes past the wrappers must not make its numbers wrong.

        In a precision that autocasts, casts of weights are forgotten after each step of any optimizer, in autocast
        contexts of the user's own, too.

        With a scaler, the backward pass of an unscaled loss into the module's parameters is an error.
        Gradients that do not go into the parameters, such as those of ``torch.autograd.grad``, are not checked.

        Every parameter is watched until a scaled loss has reached it, and on to the next scaled loss: an unscaled one
        beside it is found in the first iteration. Of the parameters that one backward pass reaches for the first time,
        the first and the last are watched for good. The others take turns, one at each scaled loss: an unscaled loss
        that comes later, and begins and ends in the middle of the model, is found after some steps. A hook for each
        parameter would take the interpreter's lock for each at every backward pass.
        """
        if self.autocasts and self._at_steps is None:
            self._at_steps = register_optimizer_step_post_hook(_forget_casts)
            weakref.finalize(self, self._at_steps.remove)
        scaling = self._scaling
        for parameter in module.parameters():
            parameter.__dict__.pop("_treadle_guard", None)  # left by an earlier run
            if scaling.scaler is not None and parameter.requires_grad:
                parameter.__dict__["_treadle_guard"] = id(scaling)
                self._guard(parameter)
                scaling.unseen.add(id(parameter))

    def _guard(self, parameter: Tensor) -> None:
        scaling, name = self._scaling, self.precision

        def refuse(parameter: Tensor) -> None:
            if scaling.active:
                scaling.reached.append(weakref.ref(parameter))
            elif parameter.__dict__.get("_treadle_guard") == id(scaling):
                raise MisconfigurationException(
                    f"loss.backward() with precision={name!r} accumulates gradients of a loss that was not scaled, and "
                    "the step would divide them by the scale. Call fabric.backward(loss) instead."
                )

        trained = parameter.requires_grad
        parameter.requires_grad_(True)  # one that is frozen for now; torch takes no hook of those
        handle: Any = parameter.register_post_accumulate_grad_hook(refuse)  # type: ignore[no-untyped-call]
        parameter.requires_grad_(trained)
        self._guards[id(parameter)] = handle

    def _move_guards(self) -> None:
        """Watch on the first and the last of the parameters that the last scaled loss was the first to reach, and of
        all others the one whose turn it is.
        """
        unseen, reached, turns = self._scaling.unseen, self._scaling.reached, self._turns
        self._scaling.reached = []
        alive = {id(p): p for each in reached if (p := each()) is not None}
        first_time = [p for key, p in alive.items() if key in unseen]
        unseen.difference_update(alive)
        left = [last] if turns and (last := turns[-1]()) is not None else []
        for given_up in (*left, *first_time[1:-1]):
            self._guards.pop(id(given_up)).remove()
        turns.extendleft(map(weakref.ref, first_time[1:-1]))
        while turns:
            turns.rotate(-1)
            if (parameter := turns[-1]()) is not None:
                self._guard(parameter)
                return
            turns.pop()  # its module is gone

    def main_params(self, optimizer: Optimizer) -> Iterator[torch.nn.Parameter]:
        """Iterate over the parameters that the optimizer updates."""
        for group in optimizer.param_groups:
            yield from group["params"]

    def state_dict(self) -> dict[str, Any]:
        """Return the scaler's state; empty without a scaler."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        if self._scaling.scaler is not None and state_dict:
            self._scaling.scaler.load_state_dict(dict(state_dict))

    def teardown(self) -> None:
        """Undo what the precision set up: ``loss.backward()`` is allowed again on guarded modules."""
        if self._at_steps is not None:
            self._at_steps.remove()
            self._at_steps = None
        for guard in self._guards.values():
            guard.remove()
        self._guards.clear()
        self._turns.clear()
        self._scaling.unseen.clear()
        self._scaling.reached.clear()
        self._scaling.forget()


def _forget_casts(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    torch.clear_autocast_cache()


@contextlib.contextmanager
def _without_cache(autocast: AbstractContextManager[Any]) -> Generator[None]:
    with autocast:
        before = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(before)


class _Scaling:
    """A gradient scaler whose scale changes only between iterations.

    An iteration may step several optimizers. If the scale changed before all of them have stepped, the gradients of
    the later ones would be divided by another scale than they were multiplied with. So the scale is updated when the
    next loss is scaled: the iteration is certainly over then.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None) -> None:
        self.scaler: Final = scaler
        self.active = False  # a scaled loss is being differentiated, perhaps by another thread
        self._unscaled: dict[int, Optimizer] = {}  # optimizers that have not stepped since
        self._stepped = False
        self.unseen: set[int] = set()  # ids of watched parameters that no scaled loss has reached
        self.reached: list[weakref.ref[Tensor]] = []  # the watched parameters that the last scaled loss reached
        self.unscaler: Callable[[torch.amp.GradScaler, Optimizer], None] | None = None  # for parts of gradients
        self.everywhere = False  # the unscaler is called also without gradients

    def __getstate__(self) -> dict[str, Any]:
        """The scaler with the scale that it has; a copy begins between two iterations."""
        scaler = None if self.scaler is None else _between_iterations(self.scaler)
        left = {"unscaler": None, "everywhere": False}  # of this process's groups
        return {
            **left,
            "scaler": scaler,
            "active": False,
            "_unscaled": {},
            "_stepped": False,
            "unseen": set(),
            "reached": [],
        }

    @contextlib.contextmanager
    def activated(self) -> Generator[None]:
        self.active = True
        try:
            yield
        finally:
            self.active = False

    def settle(self) -> None:
        """Update the scale, unless an optimizer is between unscaling and stepping."""
        if self._stepped and not self._unscaled and self.scaler is not None:
            self.scaler.update()
            self._stepped = False

    def forget(self) -> None:
        """Forget optimizers that were unscaled and never stepped, because the run is over."""
        if self._unscaled:
            self._unscaled.clear()
            self._stepped = True

    def scale(self, loss: Tensor) -> Tensor:
        assert self.scaler is not None
        for key, optimizer in tuple(self._unscaled.items()):
            if not _has_gradients(optimizer):
                del self._unscaled[key]  # the optimizer never stepped, and its gradients are gone
                self._stepped = True
        self.settle()
        return self.scaler.scale(loss)

    def unscale(self, optimizer: Optimizer) -> None:
        assert self.scaler is not None
        if id(optimizer) not in self._unscaled and (self.everywhere or _has_gradients(optimizer)):
            if self.unscaler is None:
                self.scaler.unscale_(optimizer)
            else:
                self.unscaler(self.scaler, optimizer)
            self._unscaled[id(optimizer)] = optimizer

    def step(self, optimizer: Optimizer, **kwargs: Any) -> Any:
        assert self.scaler is not None
        closure = kwargs.pop("closure", None)
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        if not (
            self.everywhere or _has_gradients(optimizer)
        ):  # no loss was differentiated: a step would change nothing
            return result
        if self.unscaler is not None:
            self.unscale(optimizer)
        done = self.scaler.step(optimizer, **kwargs)
        self._unscaled.pop(id(optimizer), None)
        self._stepped = True
        return done if closure is None else result


def _between_iterations(scaler: torch.amp.GradScaler) -> torch.amp.GradScaler:
    """The same scaler, without what it knows of the gradients of an iteration; torch refuses to pickle that."""
    other = object.__new__(type(scaler))
    vars(other).update(vars(scaler))
    states: Any = scaler._per_optimizer_states  # a defaultdict
    other._per_optimizer_states = type(states)(states.default_factory)
    return other


def _has_gradients(optimizer: Optimizer) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def _is_real_floating(tensor: Tensor) -> bool:
    """Whether a precision casts the tensor.

    It does not cast integers, booleans, complex and quantized numbers; nor formats of 8 bits or less, which store
    quantized numbers without their scale, nor tensors in MKL-DNN's layout, which has no other dtypes.
    """
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1 and not tensor.is_mkldnn


def cast_floating(data: Any, dtype: torch.dtype) -> Any:
    """Cast every tensor of real floating-point numbers in a collection; the same object where nothing changes."""
    return map_tensors(data, lambda t: t.to(dtype) if _is_real_floating(t) else t)


def cast_module(module: Module, dtype: torch.dtype) -> Module:
    """Cast the parameters and buffers of real floating-point numbers, in place, and return the module.

    ``module.to(dtype)`` would make real numbers of complex ones, without their imaginary parts.

    The states of torchmetrics objects stay in single precision where the type is a half one: sums in bfloat16 grow no
    more from 256 on when ones are added, those in float16 from 2048 on.
    """

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if _is_real_floating(tensor) else tensor

    if dtype.itemsize < torch.float32.itemsize:
        cast.__qualname__ = "Module.type"  # by this name torchmetrics tells casts, which it does not follow, from moves
    module._apply(cast)  # type: ignore[no-untyped-call]
    return module


@contextlib.contextmanager
def half_init(dtype: torch.dtype) -> Generator[None]:
    """Make the half type ``dtype`` that of new floating-point tensors, and complex64 that of new complex ones.

    Torch has no complex type for bfloat16, and that for float16 has few operations.
    """
    with default_dtype(dtype), _SingleComplex():
        yield


class _SingleComplex(TorchFunctionMode):
    """Functions that make complex tensors without being told the dtype make complex64."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and kwargs.get("dtype") is None:
            with default_dtype(torch.float32):
                made = func(*args, **kwargs)
            if made.is_complex():
                return made
        elif func in (torch.complex, torch.polar):
            args = tuple(cast_floating(a, torch.float32) if _is_half(a) else a for a in args)
        return func(*args, **kwargs)


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Generator[None]:
    """Make ``dtype`` torch's default dtype inside, that of new floating-point tensors."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
