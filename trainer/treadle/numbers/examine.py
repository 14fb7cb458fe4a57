"""Find the first layer whose output or gradient is not finite."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from treadle.metrics.values import is_metric
from treadle.module.module import LightningModule
from treadle.module.steps.arguments import TRAINING_ARGUMENTS, bind_step
from treadle_fabric import Precision, describe_error, leaves, with_plain_names

__all__ = ["Findings", "examine", "same_values"]


@dataclass
class Findings:
    """What a run of a micro-batch showed."""

    loss: Tensor | None = None
    layer: str = ""
    """A description of the first layer with an output that is not finite; empty where there is none."""
    gradients: list[str] = field(default_factory=list)
    """The parameters whose gradients of this micro-batch are not finite."""
    digest: str = ""
    """The hash of all gradients of this micro-batch."""
    failure: str = ""
    """Why the micro-batch could not be run; the other fields are empty then."""


def examine(module: LightningModule, precision: Precision, batch: Any, batch_idx: int) -> Findings:
    """Run the forward and backward of a micro-batch, in this process only; gradients of parameters stay as they are.

    Args:
        module: with the state that it had before the step.
        precision: the precision of the run.
        batch: on the module's device.
        batch_idx: the number of the batch in its epoch.

    Raises:
        MisconfigurationException: ``training_step`` takes other arguments than the trainer gives.
    """
    found, given = Findings(), (batch, batch_idx)
    step, _ = bind_step(module.training_step, module.training_step, TRAINING_ARGUMENTS)
    try:
        with torch.enable_grad(), _layers(module, found):
            if precision.converts:
                with precision.forward_context():
                    output = step(*(given if precision.autocasts else precision.convert_input(given)))
            else:
                output = step(*given)
            loss = loss_of(output)
            if loss is None or not loss.requires_grad:
                return found
            trained = dict(trained_parameters(module))
            values = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    except Exception as error:  # the user's code may not be able to run twice
        return Findings(failure=describe_error(error))
    gradients = dict(zip(trained, values, strict=True))
    found.loss = loss.detach()
    found.gradients = [
        f"{name} {tuple(g.shape)}" for name, g in gradients.items() if g is not None and not is_finite(g)
    ]
    found.digest = digest(gradients)
    return found


def same_values(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are equal to the last bit; all NaNs count as equal."""
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and one.shape == other.shape and _bytes(one.cpu()) == _bytes(other.cpu())


@contextmanager
def _layers(module: nn.Module, found: Findings) -> Generator[None]:
    """Describe in ``found`` the first layer with an output that is not finite."""
    handles = []

    def hook(name: str) -> Callable[..., None]:
        def look(layer: nn.Module, inputs: Any, output: Any) -> None:
            if found.layer:
                return
            bad = next((t for t in _floats(output) if not is_finite(t)), None)
            if bad is None:
                return
            came_in = "finite" if all(map(is_finite, _floats(inputs))) else "not finite either"
            weights = [n for n, p in layer.named_parameters(recurse=False) if not is_finite(p)]
            found.layer = (
                f"The first layer with an output that is not finite is {name!r} ({type(layer).__name__}): output of"
                f" shape {tuple(bad.shape)}, its input is {came_in}"
                + (f", its {' and '.join(weights)} not finite" if weights else "")
                + "."
            )

        return look

    for name, layer in with_plain_names(module, module.named_modules()):
        if name and not is_metric(layer):
            handles.append(layer.register_forward_hook(hook(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def loss_of(output: Any) -> Tensor | None:
    """The loss in what ``training_step`` returned; None where there is none."""
    found = output.get("loss") if isinstance(output, Mapping) else output
    return found if isinstance(found, Tensor) else None


def trained_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that require a gradient, with their names."""
    return ((name, p) for name, p in with_plain_names(module, module.named_parameters()) if p.requires_grad)


def values_of(tensor: Tensor) -> Tensor:
    """The values of a sparse tensor; a dense one as it is."""
    return tensor.coalesce().values() if tensor.layout == torch.sparse_coo else tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether no value of a tensor is NaN or infinite; waits for the device."""
    return bool(values_of(tensor.detach()).isfinite().all())


def _floats(value: Any) -> list[Tensor]:
    tensors = leaves(value, lambda leaf: isinstance(leaf, Tensor))
    return [tensor for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()]


def _bytes(tensor: Tensor) -> bytes:
    """The bytes of a tensor, with the same NaN for all NaNs."""
    values = values_of(tensor.detach()).cpu().contiguous()
    if values.is_floating_point():
        values = values.masked_fill(values.isnan(), float("nan"))
    return ctypes.string_at(values.data_ptr(), values.nbytes) if values.nbytes else b""


def digest(gradients: Mapping[str, Tensor | None]) -> str:
    """A hash of gradients by name, which all NaNs enter as the same one."""
    whole = hashlib.sha256()
    for name, gradient in gradients.items():
        whole.update(name.encode())
        if gradient is not None:
            whole.update(f"{gradient.dtype}{tuple(gradient.shape)}".encode())
            whole.update(_bytes(gradient))
    return whole.hexdigest()
