"""DeepSpeed's engine around a module, or one of its methods."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from treadle_fabric.checks import require_package
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.strategies.parts import METHOD_KEYWORD
from treadle_fabric.strategies.unwrapping import inside

__all__ = ["ZeroEngine", "deepspeed_for", "start"]


def require_deepspeed() -> None:
    """Refuse a run without the package.

    Raises:
        MissingPackageError: DeepSpeed is not installed.
    """
    require_package("deepspeed", "DeepSpeedStrategy", "deepspeed")


def deepspeed_for(device: torch.device, level: int) -> Any:
    """Import DeepSpeed, for an accelerator, and let it use the process group that is there.

    Args:
        device: That of this process.
        level: From which level on DeepSpeed logs.

    Raises:
        MissingPackageError: DeepSpeed is not installed.
        MisconfigurationException: DeepSpeed runs on another accelerator in this process.
    """
    require_deepspeed()
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    logging.getLogger("DeepSpeed").setLevel(level)
    deepspeed: Any = importlib.import_module("deepspeed")  # some seconds, and an extra
    deepspeed.utils.logger.setLevel(level)
    name = deepspeed.accelerator.get_accelerator().device_name()
    if name != device.type:
        raise MisconfigurationException(
            f"DeepSpeed runs on {name!r} in this process (DS_ACCELERATOR={os.environ['DS_ACCELERATOR']!r}), and the"
            f" run is on {device.type!r}. Use accelerator={name!r}, or set DS_ACCELERATOR={device.type} before"
            " DeepSpeed is imported."
        )
    deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False, verbose=False)
    return deepspeed


@contextmanager
def local_rank_told(rank: int) -> Generator[None]:
    """Tell DeepSpeed the local rank as its launcher does, by a variable of the environment."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(rank)
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before


class ZeroEngine(Module):
    """Runs a module, or one of its methods, through DeepSpeed's engine.

    Every attribute of :attr:`deepspeed` is one of this engine too.

    Args:
        engine: DeepSpeed's.
        module: What the engine runs: the user's module, or its compiled form.
    """

    deepspeed: Any
    """DeepSpeed's engine."""

    def __init__(self, engine: Any, module: Module) -> None:
        super().__init__()
        self.module = module
        fields = self.__dict__  # past Module.__setattr__, which is slow, and would register the engine as a submodule
        fields["deepspeed"] = engine
        fields["running"] = False  # a method of the module runs as the engine's forward
        zero = engine.optimizer
        fields["_zero"] = zero if hasattr(zero, "clear_backward_seen_flag") else None
        fields["_counts_passes"] = engine.zero_optimization_stage() == 3 and fields["_zero"] is not None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's ``forward``, or the method ``treadle_method`` of it."""
        method = kwargs.pop(METHOD_KEYWORD, None)
        if method is None:
            return self.deepspeed(*args, **kwargs)
        module, fields = self.module.__dict__, self.__dict__
        before = module.get("forward")

        def restore() -> None:
            if before is None:
                module.pop("forward", None)
            else:
                module["forward"] = before

        def run(*args: Any, **kwargs: Any) -> Any:
            restore()  # the method may call the module
            return method(*args, **kwargs)

        module["forward"], fields["running"] = run, True
        try:
            return self.deepspeed(*args, **kwargs)
        finally:
            restore()
            fields["running"] = False

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Differentiate a loss; the other arguments are those of ``Tensor.backward``."""
        engine = self.deepspeed
        if self._counts_passes:
            self._zero.clear_backward_seen_flag()  # or the next pass would take the place of the last one's gradients
        if self.running:  # DeepSpeed gets ready for a backward pass by the outputs of the forward, which is not over
            engine._backward_prologue()
        if args or not kwargs.keys() <= {"retain_graph"}:
            engine.scale(loss).backward(*args, **kwargs)
        else:
            engine.backward(loss, retain_graph=bool(kwargs.get("retain_graph")))

    def step(self) -> None:
        """Step the optimizer with what the backward passes have left; without any, do nothing."""
        engine = self.deepspeed
        if engine.managed_gradient_accumulation() or engine._unmanaged_backward_count:
            engine.step()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            engine = self.__dict__.get("deepspeed")
            if engine is None:
                raise
            return getattr(engine, name)


@inside.register
def _(engine: ZeroEngine) -> Module:
    return engine.module


def start(
    deepspeed: Any,
    module: Module,
    optimizer: Optimizer | None,
    scheduler: Any | None,
    config: dict[str, Any],
    device: torch.device,
    local_rank: int,
) -> ZeroEngine:
    """Make the engine of a module.

    Args:
        deepspeed: The package, with its process group.
        module: On its device.
        optimizer: Of its parameters; None: that of the config, if there is one.
        scheduler: A learning-rate scheduler that the engine steps; None: that of the config, if there is one.
        config: Whole.
        device: That of this process.
        local_rank: That of this process.
    """
    index = local_rank if device.index is None else device.index
    with local_rank_told(local_rank):
        engine, *_ = deepspeed.initialize(
            args=_Arguments(index),
            model=module,
            optimizer=optimizer,
            model_parameters=list(trained(module)) if optimizer is None else None,
            lr_scheduler=scheduler,
            dist_init_required=False,
            config=config,
        )
    return ZeroEngine(engine, module)


def trained(module: Module) -> Iterator[Tensor]:
    """The parameters that require a gradient."""
    return (p for p in module.parameters() if p.requires_grad)


class _Arguments:
    """What DeepSpeed takes for a command line: the number of the device."""

    def __init__(self, device_rank: int) -> None:
        self.device_rank = device_rank
