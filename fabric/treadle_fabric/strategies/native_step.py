"""Strategies whose step is PyTorch's own: backward, optimizer step and clipping, as the precision has them."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from treadle_fabric.batches import move_data_to_device
from treadle_fabric.checkpoint import placed_like
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.precision import Precision, needs_closure
from treadle_fabric.strategies.sharding.norms import clip_norm, clip_value, unscale
from treadle_fabric.strategies.strategy import Strategy
from treadle_fabric.strategies.unwrapping import user_module, with_plain_names

__all__ = ["OTHER_OPTIMIZERS", "NativeStepStrategy", "replace_parameters"]

OTHER_OPTIMIZERS: Final = (
    "Take an optimizer that treats each number of a parameter by itself, such as AdamW or SGD, with foreach=False if it"
    " has that; or a strategy that keeps parameters whole, such as 'ddp'."
)

_NO_SHARDED_FORM: Final = re.compile(r"(?:Sharding propagation failed for (?:Op\(op=)?|Operator |^)(aten\.[\w.]+)")


class NativeStepStrategy(Strategy):
    """A strategy without an engine of its own for the step; set-up of module and optimizers is separate."""

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        self.precision.validate_optimizer(optimizer)
        if self.runs_whole_batch and needs_closure(optimizer):
            raise MisconfigurationException(
                f"{type(optimizer).__name__}.step computes the loss again by a closure, and a rank of a pipeline has a"
                " part of the parameters only: use an optimizer that steps once a batch."
            )
        if self.shards_parameters and self.precision.requires_fabric_backward:
            self.precision.unscale_by(functools.partial(unscale, groups=self.stage_groups), bool(self.stage_groups))
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for parameter, state in optimizer.state.items():
            if isinstance(parameter, Tensor):
                for name, value in state.items():
                    device = parameter.device
                    if name == "step" and isinstance(value, Tensor):
                        device = _device_of_counter(value, parameter, groups.get(id(parameter), {}))
                    state[name] = move_data_to_device(value, device)
        self.note_optimizer(optimizer)
        return optimizer

    def note_optimizer(self, optimizer: Optimizer) -> None:
        """Take notice of an optimizer that is set up. Default: do nothing."""

    def setup_module_and_optimizers(
        self, module: Module, optimizers: Iterable[Optimizer], scheduler: Any | None = None
    ) -> tuple[Module, list[Optimizer], Any | None]:
        own = user_module(module)
        optimizers, before = list(optimizers), dict(with_plain_names(own, own.named_parameters()))
        engine = self.setup_module(module)
        replace_parameters(optimizers, before, dict(with_plain_names(own, own.named_parameters())))
        return engine, [self.setup_optimizer(optimizer) for optimizer in optimizers], scheduler

    @property
    def plain_backward(self) -> bool:
        precision = self.precision
        return (
            type(self).backward is NativeStepStrategy.backward
            and type(precision).backward is Precision.backward
            and not precision.watches_backward
            and not precision.requires_fabric_backward
        )

    @property
    def plain_step(self) -> bool:
        return (
            type(self).optimizer_step is NativeStepStrategy.optimizer_step
            and type(self).before_optimizer_step is Strategy.before_optimizer_step
            and type(self).after_optimizer_step is Strategy.after_optimizer_step
            and type(self.precision).optimizer_step is Precision.optimizer_step
            and not self.precision.requires_fabric_backward
        )

    def backward(self, tensor: Tensor, module: Module | None, *args: Any, **kwargs: Any) -> None:
        precision = self._precision or self.precision
        if not precision.watches_backward:
            precision.backward(tensor, module, *args, **kwargs)
            return
        precision.pre_backward(tensor, module)
        precision.backward(tensor, module, *args, **kwargs)
        precision.post_backward(tensor, module)

    def optimizer_step(self, optimizer: Optimizer, **kwargs: Any) -> Any:
        self.before_optimizer_step(optimizer)
        try:
            result = (self._precision or self.precision).optimizer_step(optimizer, **kwargs)
        except RuntimeError as error:
            if (found := _NO_SHARDED_FORM.search(str(error))) is None or not self.shards_parameters:
                raise
            raise MisconfigurationException(
                f"{type(optimizer).__name__} cannot step sharded parameters: it uses {found[1]}, which torch cannot run"
                f" on them (DTensors). {OTHER_OPTIMIZERS}"
            ) from error
        self.after_optimizer_step(optimizer)
        return result

    def clip_gradients_norm(
        self,
        module: Module | None,
        optimizer: Optimizer,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        precision = self.precision
        precision.unscale_gradients(optimizer)
        strict = error_if_nonfinite and not precision.requires_fabric_backward
        parameters = list(precision.main_params(optimizer))
        if self.shards_parameters:
            if (norm := self.clip_parts(parameters, max_norm, norm_type, strict)) is not None:
                return norm
            return clip_norm(parameters, max_norm, norm_type, self.stage_groups, strict)
        try:
            return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type=norm_type, error_if_nonfinite=strict)
        except NotImplementedError:  # torch has no norm of sparse gradients
            return clip_norm(parameters, max_norm, norm_type, (), strict)

    def clip_parts(
        self, parameters: Sequence[Tensor], max_norm: float, norm_type: float, strict: bool
    ) -> Tensor | None:
        """Clip gradients that are parts, and no DTensors, by their joint norm, and return that. Default: none are.

        Args:
            parameters: Whose gradients.
            max_norm: The largest norm.
            norm_type: The p of the p-norm.
            strict: Raise if the norm is NaN or infinite.
        """
        return None

    def clip_gradients_value(self, module: Module | None, optimizer: Optimizer, clip_val: float) -> None:
        self.precision.unscale_gradients(optimizer)
        parameters = list(self.precision.main_params(optimizer))
        if self.shards_parameters:
            clip_value(parameters, clip_val)
            return
        try:
            torch.nn.utils.clip_grad_value_(parameters, clip_val)
        except NotImplementedError:
            clip_value(parameters, clip_val)


def replace_parameters(
    optimizers: Iterable[Optimizer], before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> None:
    """Let optimizers that were made for a module's parameters step with those that took their places.

    Args:
        optimizers: Whose states are empty, or come from the parameters before.
        before: The parameters by name.
        after: Those that the module has now. A parameter that was tied has one name.

    Raises:
        MisconfigurationException: An optimizer has stepped already.
    """
    new = {id(p): after[name] for name, p in before.items() if name in after and after[name] is not p}
    if not new:
        return
    for optimizer in optimizers:
        states = {p: state for p, state in optimizer.state.items() if id(p) in new}
        if any(map(_has_stepped, states.values())):
            raise MisconfigurationException(
                f"{type(optimizer).__name__} has stepped before the module was set up, and its state is that of whole "
                "parameters. Set up before the first step; a checkpoint is loaded after."
            )
        for p, state in states.items():  # that the constructor made
            now = new[id(p)]
            whole = {name for name, v in state.items() if isinstance(v, Tensor) and v.shape == now.shape and v.ndim}
            if any(state[name].is_meta for name in whole) and not now.is_meta:
                raise MisconfigurationException(
                    f"{type(optimizer).__name__} was made for parameters on the meta device, and has a state without "
                    "values there: set up the module first, and make the optimizer after."
                )
            del optimizer.state[p]
            optimizer.state[now] = {n: placed_like(v, now) if n in whole else v for n, v in state.items()}
        for group in optimizer.param_groups:  # in the list itself, which some optimizers have under another name, too
            group["params"][:] = [new.get(id(p), p) for p in group["params"]]


def _has_stepped(state: Any) -> bool:
    """Whether the state of a parameter is more than what the optimizer's constructor made of it."""
    step = state.get("step") if isinstance(state, Mapping) else None
    return step is None or bool(step)


def _device_of_counter(step: Tensor, parameter: Tensor, group: dict[str, Any]) -> torch.device:
    """Where an optimizer expects the number of its steps: as torch's own optimizers when they load a state."""
    if group.get("fused") or group.get("capturable"):
        return parameter.device  # read by the kernels
    if "capturable" in group or step.device.type == "cpu":
        return torch.device("cpu")  # read by the host at each step, which would wait for another device
    return parameter.device
