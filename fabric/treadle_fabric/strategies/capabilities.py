"""What a strategy declares of itself, so that callers ask for a capability, and never for a strategy's class."""

from __future__ import annotations

from typing import Any, ClassVar

__all__ = ["Capabilities"]


class Capabilities:
    """What an engine does by itself, and what it needs; the methods named here are those of ``Strategy``."""

    uses_process_group: ClassVar[bool] = False
    """There are several processes, or there may be, that talk through a process group."""
    requires_forward_redirect: ClassVar[bool] = False
    """A step with gradients must run inside the engine's forward; see ``METHOD_KEYWORD``."""
    fixes_parameters: ClassVar[bool] = False
    """The engine is made for the parameters that the module has in ``setup_module``: others may not be added in
    passing, but on all ranks before the same step."""
    launches_function: bool = False
    """The launcher needs a function to run: code after ``launch()`` would not run in all processes."""
    sets_up_jointly: ClassVar[bool] = False
    """Module and optimizers are set up in one call, ``setup_module_and_optimizers``, optimizers made before."""
    restores_after_setup: ClassVar[bool] = False
    """Weights are loaded into the engine, after the module's set-up, because they have their shape only then."""
    initializes_on_meta: ClassVar[bool] = False
    """``setup_module`` takes a module on the meta device, and makes its parameters where they belong."""
    shards_parameters: ClassVar[bool] = False
    """A rank holds a part of the parameters, gradients and optimizer state, as DTensors."""
    handles_gradient_accumulation: ClassVar[bool] = False
    """The engine divides the loss and knows when to step: backward and step are called for every micro-batch."""
    handles_gradient_clipping: ClassVar[bool] = False
    """The engine clips gradients in its step, as it was configured."""
    owns_optimizer_step: ClassVar[bool] = False
    """The engine zeroes gradients and steps: nothing else touches gradients between backward and step."""
    brings_optimizer: bool = False
    """The engine makes the optimizer, as its config says, and a scheduler perhaps: a module is set up without one."""
    steps_copies: bool = False
    """The optimizer steps copies of the parameters that were trainable in the set-up: what is trainable, and the
    parameter groups, may not change after it."""
    averages_weights: bool = True
    """Each rank finds its part of the weights in the module's parameters, where callbacks average and exchange them."""
    allows_inference_mode: ClassVar[bool] = True
    """Evaluation may run under ``torch.inference_mode``; False where the engine keeps tensors of its forward."""
    pipeline_stages: int = 1
    """Number of parts of the model, each with as many neighbouring processes, that a share of a batch goes through."""
    runs_whole_batch: bool = False
    """``run_batch`` runs forward and backward of a whole batch, as pipelines do, with the module's ``loss`` and not
    its ``training_step``; ``evaluate_batch`` and ``predict_batch`` run the forward pass."""
    offloads: bool = False
    """Parameters, gradients and optimizer state lie in the memory of the host between steps."""
    forward_is_collective: bool = False
    """Ranks work together in every forward pass, also without gradients: all make the same number of passes. A rank
    that has no batch left calls ``join_forward`` instead."""

    @property
    def num_slices(self) -> int:
        """Number of slices, one a process, of each sequence of a share: they log different numbers."""
        return 1

    @property
    def slice_index(self) -> int:
        """Which slice of each sequence this process has, from 0."""
        return 0

    @property
    def stage_groups(self) -> tuple[Any, ...]:
        """Process groups over which whole parameters are shared out, as over stages of a pipeline."""
        return ()

    @property
    def writes_folders(self) -> bool:
        """Whether checkpoints are folders, to which every rank writes its part, unless a checkpoint IO was given."""
        return False

    @property
    def plain_backward(self) -> bool:
        """Whether ``backward`` is nothing but ``loss.backward()``, so that hot loops may leave it out."""
        return False

    @property
    def plain_step(self) -> bool:
        """Whether ``optimizer_step`` is nothing but ``optimizer.step()``, so that hot loops may leave it out."""
        return False

    @property
    def gradient_layout(self) -> str:
        """How the engine keeps gradients between micro-batches; empty where they are in ``grad`` of the parameters.

        What was accumulated in one layout is of use in no other.
        """
        return ""
