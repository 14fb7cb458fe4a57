"""A training step of one rank: forward, backward and the optimizer's step, through the strategy."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from treadle_fabric.containers import leaves
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.estimating.recorder import Recorder
from treadle_fabric.precision import needs_closure
from treadle_fabric.setup.module import FabricModule, engine_of, method_of
from treadle_fabric.setup.optimizer import FabricOptimizer
from treadle_fabric.strategies import Strategy

__all__ = ["Step", "optimizers_of"]

Loss = Callable[[Any, Any], Tensor]
"""Makes the loss of the module's output and the batch."""


class Step:
    """Sets up a module and its optimizers, and runs training steps.

    Args:
        module: The user's module in its precision, on its device; a copy that may be changed.
        optimizers: Of its parameters; or a function that makes some of a module.
        strategy: Bound to its devices.
        loss: The loss where the module has no ``training_step``, and its output is no loss.
    """

    def __init__(
        self,
        module: Module,
        optimizers: Callable[[Module], list[Optimizer]],
        strategy: Strategy,
        loss: Loss | None = None,
    ) -> None:
        self.strategy = strategy
        self._loss = loss
        if _learns(module) and getattr(module, "automatic_optimization", True) is False:
            raise MisconfigurationException(
                f"{type(module).__name__} has automatic_optimization=False: its training_step runs backward passes and"
                " steps itself, through a trainer that estimate() does not have. Estimate a module whose forward"
                " returns the loss, with optimizer=."
            )
        module.train()
        made = optimizers(module)
        closures = [type(each).__name__ for each in made if needs_closure(each)]
        if closures:
            raise MisconfigurationException(
                f"{closures[0]} evaluates the loss several times in a step, as often as the values say, which an"
                " estimate does not have. Estimate the step of another optimizer, such as SGD."
            )
        engine, stepped, _ = strategy.setup_module_and_optimizers(module, made)
        for group in (group for each in stepped for group in each.param_groups):
            if len({hasattr(p, "to_local") for p in group["params"]}) > 1:  # torch steps these one after the other only
                group["foreach"] = False
        self.module = FabricModule(engine, strategy, module)
        self.optimizers = [FabricOptimizer(each, strategy) for each in stepped]
        own = self.module.module
        self._run = method_of(self.module, "training_step") if _learns(own) else self.module
        self._arguments = _arguments_of(getattr(own, "training_step" if _learns(own) else "forward"))

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters of this rank."""
        return list(self.module.module.parameters())

    @property
    def buffers(self) -> list[Tensor]:
        """The buffers of this rank."""
        return list(self.module.module.buffers())

    @property
    def gradients(self) -> list[Tensor]:
        """The gradients that there are."""
        return [p.grad for p in self.parameters if p.grad is not None]

    @property
    def optimizer_state(self) -> list[Tensor]:
        """The tensors of the optimizers' states."""
        states = (state for optimizer in self.optimizers for state in optimizer.optimizer.state.values())
        return [each for state in states for each in leaves(state) if isinstance(each, Tensor)]

    def run(self, batch: Any, recorder: Recorder, accumulate: int = 1) -> dict[str, int]:
        """Run one step of the optimizers, on the same batch for each micro-batch.

        Returns:
            The bytes of the gradients, and of the optimizers' states.
        """
        engine = engine_of(self.module)
        for index in range(accumulate):
            with self.strategy.no_backward_sync(engine, enabled=index < accumulate - 1):
                recorder.enter("forward")
                loss = self._forward(batch)
                recorder.enter("backward")
                self.strategy.backward(loss / accumulate if accumulate > 1 else loss, engine)
                del loss
        sizes = {"gradients": recorder.label(self.gradients, "gradients")}
        recorder.enter("optimizer")
        for optimizer in self.optimizers:
            optimizer.step()
        sizes["optimizer_state"] = recorder.label(self.optimizer_state, "optimizer_state")
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        return sizes

    def _forward(self, batch: Any) -> Tensor:
        args, kwargs = self._arguments(batch)
        output = self._run(*args, **kwargs)
        found = _loss_in(output)
        if self._loss is not None and not _learns(self.module.module):
            found = self._loss(output, batch)
        elif found is None:
            outputs = [t for t in leaves(output) if isinstance(t, Tensor) and t.requires_grad]
            found = torch.stack([t.float().mean() for t in outputs]).sum() if outputs else None
        if not isinstance(found, Tensor) or not found.requires_grad or found.numel() != 1:
            raise MisconfigurationException(
                f"The step returned {type(output).__name__}, and there is no loss in it that depends on parameters. Let"
                " training_step return the loss; or give loss=, a function of the module's output and the batch."
            )
        return found


def optimizers_of(given: Any) -> list[Optimizer]:
    """Find the optimizers in what a ``configure_optimizers``, or the user's function, returned.

    Raises:
        MisconfigurationException: There is something else in it.
    """
    if isinstance(given, Mapping):
        given = given.get("optimizer")
    if isinstance(given, list | tuple):
        if len(given) == 2 and all(isinstance(each, list | tuple) for each in given):
            given = given[0]  # with schedulers
        return [optimizer for each in given for optimizer in optimizers_of(each)]
    if not isinstance(given, Optimizer):
        raise MisconfigurationException(
            f"optimizer: {type(given).__name__} is no optimizer. Give a torch optimizer, a class of one such as"
            " torch.optim.AdamW, or a function of the parameters that returns one."
        )
    return [given]


def _learns(module: Module) -> bool:
    return callable(getattr(module, "training_step", None))


def _loss_in(output: Any) -> Tensor | None:
    if isinstance(output, Mapping):
        output = output.get("loss")
    elif not isinstance(output, Tensor):
        output = getattr(output, "loss", None)
    return output if isinstance(output, Tensor) and output.numel() == 1 and output.requires_grad else None


def _arguments_of(function: Callable[..., Any]) -> Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]]:
    """How a batch is passed to a function: as a training step's, or as a module's arguments."""
    signature = inspect.signature(function)
    if function.__name__ == "training_step":
        first, *others = signature.parameters.values() or (None,)
        if first is not None and first.name == "dataloader_iter":
            return lambda batch: ((iter([(batch, 0, 0)]),), {})
        required = (
            each.name for each in others if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD
        )
        extra = dict.fromkeys([*required, *({"batch_idx", "dataloader_idx"} & signature.parameters.keys())], 0)
        return lambda batch: ((batch,), extra)

    def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if isinstance(batch, Mapping) and _binds(signature, (), batch):
            return (), dict(batch)
        if isinstance(batch, list | tuple):
            for count in range(len(batch), 0, -1):  # the targets may be for the loss
                if _binds(signature, batch[:count], {}):
                    return tuple(batch[:count]), {}
        return (batch,), {}

    return arguments


def _binds(signature: inspect.Signature, args: Iterable[Any], kwargs: Mapping[str, Any]) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True
