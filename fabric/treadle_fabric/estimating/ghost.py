"""Copies of modules, optimizers and batches whose tensors have shapes and dtypes, and no memory."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from treadle_fabric.containers import leaves
from treadle_fabric.errors import MisconfigurationException, TreadleError

__all__ = ["ghost_of", "made", "refused_values", "tensors_in", "without_memory"]

_FEW = 4096
_SILENCED = ("log", "log_dict")
"""Methods of a LightningModule that need a run, and that a step calls without using what they return."""


def ghost_of(value: Any, mode: Any, memo: dict[int, Any]) -> Any:
    """Copy an object of any kind, with tensors that have no memory in the place of its own.

    Args:
        value: A module, an optimizer, a batch; on any device, the meta device too.
        mode: The ``FakeTensorMode`` of the copies, which say that they are on the CPU; None: they are on the meta
            device, where modules can be changed in place.
        memo: As for ``copy.deepcopy``: copies by the ids of the originals, which is filled.

    Raises:
        MisconfigurationException: Something in the object cannot be copied.
    """
    try:
        with _Haunting(mode, memo):
            for each in _tensors_of(value):  # a parameter copies itself past all modes
                _remembered(each, mode, memo)
            ghost = copy.deepcopy(value, memo)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise MisconfigurationException(
            f"estimate() works on a copy of {type(value).__name__} without memory, and it cannot be copied:"
            f" {type(error).__name__}: {error}. Give a function that makes the object."
        ) from error
    if isinstance(ghost, Module) and hasattr(ghost, "training_step"):
        for name in _SILENCED:
            ghost.__dict__[name] = _nothing
    return ghost


def made(function: Any, mode: Any) -> Any:
    """Call a user's function with tensors that have no memory, but for those of a few numbers, which may be read.

    Raises:
        MisconfigurationException: The function needs the values of tensors.
    """
    with refused_values(f"{getattr(function, '__qualname__', repr(function))}()"), mode, _FewNumbers():  # type: ignore[no-untyped-call]
        return function()


@contextmanager
def refused_values(what: str) -> Generator[None]:
    """Say that something, which runs inside, needs the values of tensors; and of other errors how it is run.

    Raises:
        MisconfigurationException: Torch could not go on without the values.
    """
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException  # heavy

    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise MisconfigurationException(
            f"{what} reads the values of a tensor ({error.func}), and estimate() runs it with tensors that have none."
            " Compute such numbers with Python or NumPy; instead of selecting by a mask, multiply by it or use"
            " torch.where, for an estimate at least."
        ) from error
    except Exception as error:
        if not isinstance(error, TreadleError):
            error.add_note(
                f"{what} ran for estimate(), on a copy whose tensors have shapes and no memory, without a trainer and"
                " without the hook `setup`. Where configure_optimizers needs one of them, give optimizer=."
            )
        raise


def without_memory(function: Any) -> Any:
    """Call a user's function once, with tensors that have no memory, for several estimates."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # for those who plan

    return made(function, FakeTensorMode(allow_non_fake_inputs=True))


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Take the place of ``self.log``: there is no run, and no value, to log."""


class _FewNumbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets tensors of a few numbers have values, among those without memory: constructors read rates of layers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch._subclasses.fake_tensor import FakeTensor  # for those who plan

        kwargs = kwargs or {}
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if any(isinstance(each, FakeTensor) for each in given):
            return func(*args, **kwargs)
        if not given:
            made = func(*args, **kwargs)
            if not isinstance(made, Tensor) or made.numel() > _FEW or made.device.type != "cpu":
                return made
        with _disable_current_modes():
            return func(*args, **kwargs)


class _Haunting(TorchFunctionMode):
    """Lets ``copy.deepcopy`` make fake tensors of tensors."""

    def __init__(self, mode: Any, memo: dict[int, Any]) -> None:
        super().__init__()
        self._mode = mode
        self._memo = memo

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            return _remembered(args[0], self._mode, self._memo)
        return func(*args, **(kwargs or {}))


def _tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Module):
        for module in value.modules():
            for each in (*module._parameters.values(), *module._buffers.values()):
                if each is not None:
                    yield each
    elif isinstance(value, Optimizer):
        yield from (p for group in value.param_groups for p in group["params"])


def _remembered(tensor: Tensor, mode: Any, memo: dict[int, Any]) -> Tensor:
    if id(tensor) not in memo:
        with torch._C.DisableTorchFunction():
            memo[id(tensor)] = _without_memory(tensor, mode)
        memo.setdefault(id(memo), []).append(tensor)  # as copy.deepcopy keeps them: their ids stay theirs
    copied: Tensor = memo[id(tensor)]
    return copied


def _without_memory(tensor: Tensor, mode: Any) -> Tensor:
    """A tensor of the same shape, strides, dtype and class, of this mode or on the meta device."""
    from torch._subclasses.fake_tensor import FakeTensor  # for those who plan

    if is_lazy(tensor):
        raise MisconfigurationException(
            "A parameter has no shape yet, as in torch.nn.LazyLinear. Run the module on a batch before estimate(), or"
            " give its layers their sizes."
        )
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise MisconfigurationException(
            f"A tensor of shape {tuple(tensor.shape)} is {'quantized' if tensor.is_quantized else tensor.layout}:"
            " estimate() knows dense tensors only."
        )
    with mode or nullcontext():
        device = "cpu" if mode else "meta"
        made: Tensor = torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device=device)
    if isinstance(tensor, Parameter):
        made = Parameter(made, requires_grad=tensor.requires_grad)
        ours = set(vars(made)) | (set(vars(tensor)) if isinstance(tensor, FakeTensor) else set())
        vars(made).update({name: each for name, each in vars(tensor).items() if name not in ours})
    elif tensor.is_leaf:
        made.requires_grad_(tensor.requires_grad)
    return made


def tensors_in(batch: Any) -> list[Tensor]:
    """The tensors in a batch."""
    return [each for each in leaves(batch) if isinstance(each, Tensor)]
