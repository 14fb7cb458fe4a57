"""What a strategy is: where the model lives, how processes talk, how its state is saved."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from treadle_fabric.accelerators import Accelerator
from treadle_fabric.batches import move_data_to_device
from treadle_fabric.checkpoint import (
    CheckpointIO,
    DistributedCheckpointIO,
    Keeping,
    TorchCheckpointIO,
)
from treadle_fabric.environments import ClusterEnvironment
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.launchers import Launcher
from treadle_fabric.precision import Precision
from treadle_fabric.strategies.capabilities import Capabilities
from treadle_fabric.strategies.parts import NoInit, Parts
from treadle_fabric.types import PathLike

__all__ = ["Strategy"]


class Strategy(Capabilities, ABC):
    """Sets up module and optimizers for training on one or more devices.

    Args:
        accelerator: The hardware. Default: as Fabric or the Trainer finds it.
        checkpoint_io: Writes and reads files. Default: whole ``torch.save`` files.
        precision: Default: ``32-true``.
        precision_plugin: The same, under the name that strategies of a trainer have for it.

    Raises:
        MisconfigurationException: Both names of the precision are given.
    """

    only_on: ClassVar[str] = ""
    """The name of the only accelerator that the strategy runs on. Default: any without strategies of its own."""

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        if precision is not None and precision_plugin is not None:
            raise MisconfigurationException(
                f"{type(self).__name__}: precision={precision!r} and precision_plugin={precision_plugin!r} are two"
                " names of one argument: give one."
            )
        self._accelerator = accelerator
        self._checkpoint_io = checkpoint_io
        self._precision = precision_plugin if precision is None else precision

    def __deepcopy__(self, memo: dict[int, Any]) -> Strategy:
        return self  # there is one process group and one device, however many copies of a model

    def bind(self, parts: Parts, num_nodes: int = 1) -> None:
        """Fill in what the user did not give; of the devices there is one for each process on this machine."""
        self._accelerator = self._accelerator or parts.accelerator
        precision = self._precision or parts.precision
        self._precision = None if precision is None else self.precision_for(precision)
        if parts.devices and self._precision is not None:
            self._precision.place(parts.devices[0].type)
        self._checkpoint_io = self._checkpoint_io or parts.checkpoint_io
        self.assign_devices(list(parts.devices), parts.environment, num_nodes)

    def forget_devices(self) -> None:
        """Forget accelerator, devices and environment, so that :meth:`bind` gives others. Default: there are none."""

    def move_references(self, copy_of: Callable[[Any], Any]) -> None:
        """Refer to copies in the place of the modules and parameters that the strategy was given. Default: to none.

        Args:
            copy_of: Returns the copy of a module or parameter.
        """

    def precision_for(self, precision: Precision) -> Precision:
        """The precision as the engine carries it out, or an error where it cannot. Default: as it is."""
        return precision

    @property
    @abstractmethod
    def given(self) -> Parts:
        """The parts that the user gave the strategy object, or that :meth:`bind` filled in before."""

    @abstractmethod
    def assign_devices(
        self, devices: list[torch.device], environment: ClusterEnvironment | None, num_nodes: int
    ) -> None:
        """Take the devices and the environment of :meth:`bind`, where the user gave none."""

    @property
    def accelerator(self) -> Accelerator | None:
        """The hardware; ``None`` until bound."""
        return self._accelerator

    @property
    def precision(self) -> Precision:
        """The precision."""
        if self._precision is None:
            self._precision = Precision()
        return self._precision

    @property
    def precision_plugin(self) -> Precision:
        """The precision, under the name that strategies of a trainer have for it."""
        return self.precision

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """Writes and reads checkpoint files."""
        if self._checkpoint_io is None:
            self._checkpoint_io = DistributedCheckpointIO() if self.writes_folders else TorchCheckpointIO()
        return self._checkpoint_io

    @property
    @abstractmethod
    def root_device(self) -> torch.device:
        """This process's device."""

    @property
    @abstractmethod
    def parallel_devices(self) -> list[torch.device]:
        """The devices of this machine, one a process."""

    @property
    @abstractmethod
    def cluster_environment(self) -> ClusterEnvironment | None:
        """Where ranks and addresses come from; ``None`` until bound."""

    @property
    @abstractmethod
    def num_nodes(self) -> int:
        """Number of machines."""

    @property
    @abstractmethod
    def start_method(self) -> str | None:
        """How processes are started: ``"popen"``, ``"spawn"``, ...; ``None`` where there is only this one."""

    @property
    def device_mesh(self) -> Any:
        """The named dimensions along which devices work together; ``None`` where there is no mesh."""
        return None

    @property
    @abstractmethod
    def world_size(self) -> int:
        """Number of processes."""

    @property
    @abstractmethod
    def global_rank(self) -> int:
        """This process among all."""

    @property
    @abstractmethod
    def local_rank(self) -> int:
        """This process among those of its machine."""

    @property
    @abstractmethod
    def node_rank(self) -> int:
        """This machine among all."""

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the first process, which writes files and speaks."""
        return self.global_rank == 0

    @property
    @abstractmethod
    def launcher(self) -> Launcher | None:
        """Starts the processes; ``None`` where there is only this one."""

    @property
    def data_parallel_size(self) -> int:
        """Number of shares that a batch has: fewer than processes where some work together on one share."""
        ranks = self.distributed_sampler_kwargs
        return 1 if ranks is None else int(ranks["num_replicas"])

    @property
    def data_parallel_rank(self) -> int:
        """Which share of a batch this process works on, from 0."""
        ranks = self.distributed_sampler_kwargs
        return 0 if ranks is None else int(ranks["rank"])

    @property
    @abstractmethod
    def distributed_sampler_kwargs(self) -> dict[str, Any] | None:
        """``num_replicas`` and ``rank`` for sharing out samples; ``None`` where there is nothing to share."""

    @abstractmethod
    def setup_environment(self) -> None:
        """Make device and process group ready, in the process where they are used."""

    @abstractmethod
    def leave_environment(self) -> None:
        """Undo :meth:`setup_environment`."""

    def teardown(self) -> None:
        """Free what the strategy and its parts hold."""
        try:
            self.checkpoint_io.teardown()  # first: what the ranks still write together needs them all
        finally:
            self.leave_environment()
            self.precision.teardown()
            if self._accelerator is not None:
                self._accelerator.teardown()

    @abstractmethod
    def wait_for_saves(self, failure: str = "could not write a checkpoint") -> None:
        """Wait until all saves so far have ended; every rank calls this.

        Args:
            failure: What a rank failed to do, for the message on the other ranks.

        Raises:
            CheckpointError: A save failed, and that was not raised before; all ranks raise.
        """

    # Set-up

    def configure_steps(self, accumulate: int, clip_norm: float | None, clip_value: float) -> None:
        """Learn how a trainer steps, before processes start: an engine may be configured otherwise. Default: nothing.

        Args: the number of batches of a step, at first; the largest norm and entry of gradients: 0 any, None unsaid.
        """

    @abstractmethod
    def setup_module(self, module: Module) -> Module:
        """Wrap a module, already on its device, into the engine that runs it."""

    @abstractmethod
    def module_to_device(self, module: Module) -> None:
        """Move a module's parameters and buffers to :attr:`root_device`."""

    def take_over_weights(self, module: Module) -> None:
        """Go on with the values that a module's parameters were given after its set-up. Default: nothing to do."""

    @abstractmethod
    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Prepare an optimizer alone, whose module is set up; not called where both are set up jointly."""

    @abstractmethod
    def setup_module_and_optimizers(
        self, module: Module, optimizers: Iterable[Optimizer], scheduler: Any | None = None
    ) -> tuple[Module, list[Optimizer], Any | None]:
        """Set up a module and its optimizers together.

        Args:
            module: On its device.
            optimizers: Of the module's parameters.
            scheduler: A learning-rate scheduler, for engines that step it themselves.

        Returns:
            The engine, the optimizers to step, and the scheduler to step, if any.
        """

    @contextlib.contextmanager
    def tensor_init_context(self) -> Generator[None]:
        """Tensors created inside are on the device, with the precision's dtype."""
        with self.root_device, self.precision.tensor_init_context():
            yield

    @contextlib.contextmanager
    def module_init_context(self, empty_init: bool | None = None) -> Generator[None]:
        """Modules created inside are on the device, with the precision's dtype.

        Args:
            empty_init: Leave the weights uninitialized, because a checkpoint fills them anyway.
        """
        with ExitStack() as stack:
            if empty_init:
                stack.enter_context(NoInit())
            if empty_init and self.initializes_on_meta:
                stack.enter_context(torch.device("meta"))
            elif not self.shards_parameters:  # a device may not have room for all of what is sharded
                stack.enter_context(self.root_device)
            stack.enter_context(self.precision.module_init_context())
            stack.enter_context(self.engine_init_context())
            yield

    def engine_init_context(self) -> AbstractContextManager[Any]:
        """What the engine adds to :meth:`module_init_context`, where modules are made with their values."""
        return contextlib.nullcontext()

    def process_dataloader(self, dataloader: Any) -> Any:
        """What the strategy has to add to a loader. Default: nothing."""
        return dataloader

    def batch_to_device(self, batch: Any, device: torch.device | None = None) -> Any:
        """Move a batch, by default to :attr:`root_device`."""
        return move_data_to_device(batch, device or self.root_device)

    # The step

    @abstractmethod
    def backward(self, tensor: Tensor, module: Module | None, *args: Any, **kwargs: Any) -> None:
        """Differentiate a loss of the engine ``module``; the other arguments are those of ``Tensor.backward``."""

    def run_batch(
        self, module: Module, batch: Any, window: float = 1, loss: Callable[[Any, Any], Any] | None = None
    ) -> dict[Any, Tensor]:
        """Run forward and backward of a whole batch, where the strategy ``runs_whole_batch``.

        Args:
            module: The engine.
            batch: On this rank's device; the strategy cuts it into micro-batches.
            window: The number of batches of the gradient accumulation; the loss is divided by it before its backward.
            loss: Called with the outputs for a micro-batch and the micro-batch, in the place of the module's ``loss``.
                It returns the mean loss, or a dict of scalars by name with "loss".

        Returns:
            By name, detached scalars, the same on every rank that works on this batch: the mean "loss" over the
            samples, not divided by ``window``, and the means of what else ``loss`` returned.
        """
        raise NotImplementedError(f"{type(self).__name__} runs forward and backward separately.")

    def evaluate_batch(self, module: Module, batch: Any, loss: Callable[..., Any] | None = None) -> dict[Any, Tensor]:
        """Run the forward pass of a whole batch, where the strategy ``runs_whole_batch``: see :meth:`run_batch`."""
        raise NotImplementedError(f"{type(self).__name__} runs the module's own methods.")

    def predict_batch(self, module: Module, batch: Any) -> Any:
        """Return what the model makes of a whole batch, on every rank, where the strategy ``runs_whole_batch``."""
        raise NotImplementedError(f"{type(self).__name__} runs the module's own methods.")

    def expect_backward(self, loss: Tensor) -> None:
        """Called before a backward pass inside a method that runs as the engine's forward (manual optimization)."""

    def after_inner_backward(self) -> None:
        """Called after a backward pass that :meth:`expect_backward` announced. Default: do nothing."""

    def after_trainable_change(self) -> None:
        """Called when parameters of an optimizer were frozen or unfrozen, perhaps in a method that runs."""

    def release_gathered(self) -> None:
        """Free what is gathered of parameters, before parts are read or changed. Default: nothing is gathered."""

    def settle_gradients(self, module: Module) -> None:
        """Reduce what :meth:`no_backward_sync` left unreduced into ``grad`` of the parameters of the engine ``module``.

        Every process calls this, before a checkpoint. Default: all is there.
        """

    def join_forward(self, module: Module, method: str = "forward") -> None:
        """Take part in a forward pass, of the user's ``method``, that others make now. Default: they need no others.

        Args:
            module: The engine; this process may have run no pass before.
        """

    def finish_forward(self, module: Module, method: str) -> None:
        """Take part in what is left of a pass of the user's ``method`` that ended early here, and goes on in others.

        A step may return before it has run the model, for a batch that is of no use. Default: others go on alone.
        """

    def join_backward(self, module: Module, label: str) -> None:
        """Take part, with nothing to learn from, in the backward pass that other processes make now.

        The gradients are then those of the others; where there are none, they stay as they are. Default: no others.

        Args:
            module: The engine, which ran the forward pass.
            label: The same for this backward pass on every process, and for no other one.
        """

    def engine_state(self) -> dict[str, Any]:
        """What the last module's engine keeps from one step to the next: a run resumed exactly needs it."""
        return {}

    def load_engine_state(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`engine_state` returned."""

    @abstractmethod
    def optimizer_step(self, optimizer: Optimizer, **kwargs: Any) -> Any:
        """Step an optimizer; the arguments are those of its ``step``."""

    def before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Raise where gradients are not the same as on the other ranks. Default: do nothing."""

    def after_optimizer_step(self, optimizer: Optimizer) -> None:
        """Take notice that an optimizer has changed parameters. Default: do nothing."""

    @abstractmethod
    def clip_gradients_norm(
        self,
        module: Module | None,
        optimizer: Optimizer,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """Scale the optimizer's gradients so that their joint norm, over all shards, is at most ``max_norm``.

        Args:
            module: The engine whose gradients they are.
            optimizer: Whose parameters' gradients to clip.
            max_norm: The largest norm.
            norm_type: The p of the p-norm.
            error_if_nonfinite: Raise if the norm is NaN or infinite, which waits for the device. Under a gradient
                scaler such steps are normal, and are skipped instead.

        Returns:
            The norm before clipping, a scalar.
        """

    @abstractmethod
    def clip_gradients_value(self, module: Module | None, optimizer: Optimizer, clip_val: float) -> None:
        """Clamp every gradient entry to ``[-clip_val, clip_val]``."""

    @abstractmethod
    def no_backward_sync(self, module: Module, enabled: bool = True) -> AbstractContextManager[Any]:
        """Backward passes inside leave gradients unreduced, for all but the last micro-batch of an accumulation."""

    def explain_error(self, engine: Module | None, error: RuntimeError) -> Exception | None:
        """A clearer exception for what the engine's forward raised, or a backward pass. Default: none.

        Args:
            engine: The engine; None where it is not known whose backward pass it was.
            error: What torch raised.
        """
        return None

    # Communication

    @abstractmethod
    def all_reduce(self, tensor: Tensor, group: Any | None = None, reduce_op: Any = "mean") -> Tensor:
        """Reduce a tensor over all processes. The argument is left as it is.

        Args:
            tensor: Of the same shape everywhere.
            group: A process group. Default: all.
            reduce_op: ``"mean"``, ``"sum"``, ``"max"``, ``"min"``, ``"product"``, or a ``torch.distributed.ReduceOp``.

        Returns:
            A mean of integers or bools in torch's default dtype, a sum or product of them as ``int64``; everything else
            in its own dtype.
        """

    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """:meth:`all_reduce` under the name that a Trainer's strategies have; what is no tensor stays as it is."""
        return self.all_reduce(tensor, group, reduce_op) if isinstance(tensor, Tensor) else tensor

    @abstractmethod
    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        """Stack every process's tensor: shape ``(world_size, *shape)``, or ``shape`` where there is only one process.

        Shapes are the same everywhere. With ``sync_grads``, gradients flow back.
        """

    @abstractmethod
    def barrier(self, name: str | None = None) -> None:
        """Wait until every process is here; ``name`` says, in an error, what is waited for."""

    @abstractmethod
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """The object that process ``src`` has: tensors on its CPU on this one's, others on :attr:`root_device`."""

    @abstractmethod
    def begin_vote(self, decision: bool) -> Callable[[], int]:
        """Begin to count the processes that decided for something; every process calls this.

        The result waits for the votes of all processes, but for no device, and returns the number of those for it.
        """

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all processes decided for it, or with ``all=False`` any."""
        votes = self.begin_vote(decision)()
        return votes == self.world_size if all else votes > 0

    # State

    @abstractmethod
    def save_checkpoint(
        self,
        path: PathLike,
        state: dict[str, Any],
        storage_options: Any | None = None,
        filter: dict[str, Callable[[str, Any], bool]] | None = None,
        keeping: Keeping | None = None,
    ) -> None:
        """Write a state; every process must call this.

        Args:
            path: Where to. Rank 0's counts.
            state: Modules, optimizers, other objects with a ``state_dict``, and values of any kind; may be nested.
            storage_options: For the checkpoint IO.
            filter: For a key of ``state``, which of its entries to keep, by name and value.
            keeping: How values are kept, of a state that is a checkpoint already: modules and optimizers in it are
                values, too. Default: the state is a user's, and the state dicts of its modules and optimizers are kept.
        """

    def remove_checkpoint(self, path: PathLike) -> None:
        """Remove a checkpoint, on rank 0; the other ranks do not wait."""
        if self.is_global_zero:
            self.checkpoint_io.remove_checkpoint(path)

    @abstractmethod
    def load_checkpoint(
        self,
        path: PathLike,
        state: Module | Optimizer | dict[str, Any] | None = None,
        strict: bool = True,
        weights_only: bool | None = None,
        classes: Collection[type] = (),
        together: bool = True,
    ) -> dict[str, Any]:
        """Read a state and restore it in place.

        Args:
            path: What to read.
            state: What to restore; plain values in it are replaced. ``None``: restore nothing.
            strict: Refuse a file that lacks something in ``state``.
            weights_only: Only an explicit ``False`` lets the file run code of its own.
            classes: The dataclasses, enums and named tuples that values may be of; those in ``state`` are known.
            together: Every process calls this at the same time; False: this one may be alone.

        Returns:
            The entries of the file that ``state`` has not; all of them if ``state`` is ``None``.
        """

    @abstractmethod
    def get_module_state_dict(self, module: Module) -> dict[str, Any]:
        """The whole state of the user's module, by its own names, given the module or any wrapper around it."""

    @abstractmethod
    def load_module_state_dict(self, module: Module, state_dict: dict[str, Any], strict: bool = True) -> None:
        """Restore what :meth:`get_module_state_dict` gave, also of a module that was compiled where this one is not."""

    @abstractmethod
    def get_optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state of an optimizer."""

    @abstractmethod
    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Restore what :meth:`get_optimizer_state` gave."""

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Enter the names that this strategy goes by. Default: none."""
