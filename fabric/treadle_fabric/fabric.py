"""Fabric: what a hand-written loop needs to run anywhere."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from treadle_fabric.accelerators import Accelerator
from treadle_fabric.batches import map_tensors
from treadle_fabric.checkpoint import is_sharded_tensor
from treadle_fabric.checks import check_loss, is_several, one_or_several
from treadle_fabric.coordination import as_tensors, check_alike, patient_barrier
from treadle_fabric.data.resumable import wrap_loader
from treadle_fabric.data.several import several_loaders
from treadle_fabric.errors import (
    MisconfigurationException,
    NothingThereError,
    NotLaunchedError,
    WrongTypeError,
    suggests_arguments,
)
from treadle_fabric.failures import call_at_looks
from treadle_fabric.loggers import Logger, check_scalars, to_numbers
from treadle_fabric.randomness.seeds import seed_everything as _seed_everything
from treadle_fabric.rank_zero import rank_zero_warn, writes_here
from treadle_fabric.resolve import build, launched_by_run, resolve
from treadle_fabric.setup.checks import (
    check_loader,
    check_loggers,
    check_module,
    check_optimizer,
    check_ownership,
    check_replaced,
    tell_of_devices,
)
from treadle_fabric.setup.metrics import gather_metrics
from treadle_fabric.setup.module import FabricModule
from treadle_fabric.setup.optimizer import FabricOptimizer
from treadle_fabric.setup.stateless import left_out, without_stateless
from treadle_fabric.setup.whole_batch import evaluate_batch, predict_batch, run_batch
from treadle_fabric.setup.wrapped import given_engine, given_module, is_wrapped, put_back, unwrap
from treadle_fabric.strategies import Plugin, Strategy, check_reduce_op, reduction_of, user_module, with_plain_names
from treadle_fabric.types import PathLike

__all__ = ["Fabric"]

T = TypeVar("T")


def _nothing(fabric: Fabric) -> None:
    """Do nothing: what :meth:`Fabric.launch` runs by default."""


class Fabric:
    """Runs a hand-written training loop on any device, in any precision, in any number of processes.

    Args:
        accelerator: ``"cpu"``, ``"cuda"``, ``"mps"``, ``"gpu"`` or ``"auto"``.
        strategy: A name such as ``"ddp"``, or a strategy. ``"auto"``: one process, or DDP for several devices.
        devices: The devices of each machine: a number, or a list of indices; -1 or ``"auto"`` for all. On the CPU, the
            number of processes; -1 and ``"auto"`` mean one.
        num_nodes: The number of machines. Default: 1.
        precision: A name such as ``"bf16-mixed"``. Default: ``"32-true"``.
        plugins: One object or a list: a precision, a cluster environment and a checkpoint IO that replace the defaults.
        callbacks: An object or a list of objects whose methods :meth:`call` runs.
        loggers: A logger or a list of loggers that :meth:`log` writes to.

    Raises:
        MisconfigurationException: An argument, or a combination of arguments, cannot work.
    """

    @suggests_arguments
    def __init__(
        self,
        *,
        accelerator: str | Accelerator = "auto",
        strategy: str | Strategy = "auto",
        devices: int | str | Iterable[int] = "auto",
        num_nodes: int = 1,
        precision: int | str | None = None,
        plugins: Plugin | Iterable[Plugin] | None = None,
        callbacks: Any | None = None,
        loggers: Logger | Iterable[Logger] | None = None,
    ) -> None:
        plan = resolve(
            accelerator=accelerator,
            strategy=strategy,
            devices=devices,
            num_nodes=num_nodes,
            precision=precision,
            plugins=plugins,
        )
        self._strategy: Strategy = build(plan)
        self._callbacks: list[Any] = one_or_several(callbacks)
        self._loggers: list[Any] = check_loggers(one_or_several(loggers))
        self._launched = False
        # the modules that were set up, by id: modules of one class may be equal
        self._modules: weakref.WeakValueDictionary[int, Module] = weakref.WeakValueDictionary()
        self._plain_backward = self._strategy.plain_backward
        self._told: set[tuple[str, type]] = set()  # what was left out of checkpoints

    def __getstate__(self) -> dict[str, Any]:
        # in the process that unpickles this object, nothing is set up yet
        return {**self.__dict__, "_modules": None, "_launched": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _modules=weakref.WeakValueDictionary())

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "run" in cls.__dict__:
            cls.run = _launching(cls.__dict__["run"])  # type: ignore[method-assign]

    # Who and where

    @property
    def accelerator(self) -> Accelerator:
        """The accelerator: the hardware of this run."""
        accelerator = self._strategy.accelerator
        assert accelerator is not None  # the plan names one
        return accelerator

    @property
    def strategy(self) -> Strategy:
        """The strategy: how devices and processes work together."""
        return self._strategy

    @property
    def device(self) -> torch.device:
        """This process's device."""
        return self._strategy.root_device

    @property
    def global_rank(self) -> int:
        """This process's rank among all processes, from 0."""
        return self._strategy.global_rank

    @property
    def local_rank(self) -> int:
        """This process's rank among those of its machine, from 0."""
        return self._strategy.local_rank

    @property
    def node_rank(self) -> int:
        """This machine's rank among all machines, from 0."""
        return self._strategy.node_rank

    @property
    def world_size(self) -> int:
        """The number of processes on all machines."""
        return self._strategy.world_size

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the process of rank 0."""
        return self._strategy.is_global_zero

    @property
    def callbacks(self) -> list[Any]:
        """The objects whose methods :meth:`call` runs."""
        return self._callbacks

    @property
    def loggers(self) -> list[Any]:
        """All loggers."""
        return self._loggers

    @property
    def logger(self) -> Any:
        """The first logger.

        Raises:
            NothingThereError: There is no logger.
        """
        if not self._loggers:
            raise NothingThereError("There is no logger. Pass one: Fabric(loggers=CSVLogger('logs')).")
        return self._loggers[0]

    # Start-up

    def launch(self, function: Callable[..., Any] = _nothing, *args: Any, **kwargs: Any) -> Any:
        """Start the processes.

        Args:
            function: Runs in every process, with this object and then the arguments. Default: none, and the code after
                this call runs in every process; strategies that spawn or fork need a function.
            *args: For the function.
            **kwargs: For the function.

        Returns:
            What the function returns; if it ran in other processes, rank 0's result.

        Raises:
            MisconfigurationException: The strategy needs a function and got none, or ``function`` is not callable.
        """
        if not callable(function):
            raise WrongTypeError(
                f"launch({function!r}): this must be a function that takes the Fabric object first, or left out."
            )
        if not self._launched and function is _nothing and self._strategy.launches_function:
            raise WrongTypeError(
                "This strategy runs a function in new processes, so launch() needs one: fabric.launch(train), where "
                "train(fabric) contains the loop. Or use strategy='ddp', which runs the script again."
            )
        return self._launch(function, self, *args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the loop: override this method. Calling it launches the processes first."""

    def _launch(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        if self._launched:
            return function(*args, **kwargs)
        launcher = self._strategy.launcher
        if launcher is None:
            return self._enter(False, function, *args, **kwargs)
        result: T = launcher.launch(self._enter, self._strategy.launches_function, function, *args, **kwargs)
        return result

    def _enter(self, new_process: bool, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Set up this process, then run the function; every process begins here."""
        self._strategy.setup_environment()
        self._launched = True
        result = function(*args, **kwargs)
        if new_process:
            self._strategy.checkpoint_io.teardown()
            self._strategy.leave_environment()
        return result

    def _validate_launched(self) -> None:
        """Refuse to go on before :meth:`launch` where there are processes to start; subclasses call it in methods."""
        self._require_launch("A method that needs all processes")

    def _require_launch(self, what: str) -> None:
        if self._launched:
            return
        if self._strategy.launcher is not None and launched_by_run():
            self._launch(_nothing, self)  # `treadle-fabric run` has started the processes
            return
        if self._strategy.launcher is not None:
            raise NotLaunchedError(
                f"{what} was called before launch(), and there are {self._strategy.world_size} processes to start. "
                "Call fabric.launch() once, before anything that the processes do together."
            )
        self._strategy.setup_environment()  # one process needs no launch
        self._launched = True

    @staticmethod
    def seed_everything(seed: int | None = None, workers: bool | None = None, verbose: bool = True) -> int:
        """Seed everything as :func:`treadle_fabric.seed_everything` does; by default the workers of loaders, too."""
        return _seed_everything(seed, workers=True if workers is None else workers, verbose=verbose)

    def sharded_model(self) -> AbstractContextManager[Any]:
        """Return a context for the construction of a model that the strategy shards; no strategy needs it so far."""
        return nullcontext()

    def init_tensor(self) -> AbstractContextManager[Any]:
        """Return a context in which new tensors are on the device and have the precision's dtype."""
        return self._strategy.tensor_init_context()

    def init_module(self, empty_init: bool | None = None) -> AbstractContextManager[Any]:
        """Return a context in which new modules are on the device and have the precision's dtype.

        Args:
            empty_init: Leave the weights uninitialized, for a checkpoint that is loaded next. Default: False.
        """
        self._require_launch("init_module")
        return self._strategy.module_init_context(empty_init=empty_init)

    # Set-up

    def setup(
        self,
        module: Module,
        *optimizers: Optimizer,
        scheduler: Any | None = None,
        move_to_device: bool = True,
        _reapply_compile: bool = True,
    ) -> Any:
        """Prepare a model and its optimizers.

        Args:
            module: The model.
            *optimizers: Optimizers of its parameters, or lists of some.
            scheduler: A learning-rate scheduler, for strategies that step it themselves.
            move_to_device: Move the model to :attr:`device`. Default: True.
            _reapply_compile: Not used; accepted as Lightning's. A compiled model is run compiled, whatever wraps it.

        Returns:
            The wrapped model. With optimizers, a tuple: the wrapped model, the wrapped optimizers (a list for a list
            of them), and the scheduler if there is one.

        Raises:
            MisconfigurationException: A model or an optimizer is set up already, or an optimizer holds parameters of
                another model.
        """
        self._require_launch("setup")
        check_module(module)
        flat, counts = _spread(optimizers, lambda each: list(each) if is_several(each) else None)
        for optimizer in flat:
            check_optimizer(optimizer)
            check_ownership(module, optimizer, self._modules.values())
        before = [*module.parameters()] if flat and self._strategy.precision.replaces_parameters else []
        module = self._prepare(module, move_to_device)
        if before:
            check_replaced(module, before, flat, self._strategy.precision)
        engine, stepped, scheduler = self._strategy.setup_module_and_optimizers(module, flat, scheduler)
        wrapped = self._wrap_module(engine, module)
        if not stepped:
            return wrapped if scheduler is None else (wrapped, scheduler)
        made = map(self._wrap_optimizer, stepped)
        result = (wrapped, *(_like(counts, made) if flat else made))  # perhaps one that the engine made
        if _takes_fabric(type(wrapped.module)):
            steps = [each for given in result[1:] for each in (given if isinstance(given, list) else [given])]
            wrapped.module.__dict__["_fabric_optimizers"] = steps  # for its `optimizers`
        return result if scheduler is None else (*result, scheduler)

    def setup_module(self, module: Module, move_to_device: bool = True, _reapply_compile: bool = True) -> FabricModule:
        """Prepare a model as :meth:`setup` does, without optimizers; these go to :meth:`setup_optimizers`."""
        self._require_launch("setup_module")
        check_module(module)
        module = self._prepare(module, move_to_device)
        return self._wrap_module(self._strategy.setup_module(module), module)

    def setup_optimizers(self, *optimizers: Optimizer) -> Any:
        """Prepare optimizers of one or several models.

        Returns:
            The wrapped optimizer, or a tuple of several; a list for a list of optimizers.
        """
        self._require_launch("setup_optimizers")
        if self._strategy.sets_up_jointly:
            raise MisconfigurationException(
                f"setup_optimizers() was called, but {type(self._strategy).__name__} sets up a module and its "
                "optimizers together: use model, optimizer = fabric.setup(model, optimizer)."
            )
        if not optimizers:
            raise MisconfigurationException("setup_optimizers() got no optimizer.")
        flat, counts = _spread(optimizers, lambda each: list(each) if is_several(each) else None)
        for optimizer in flat:
            check_optimizer(optimizer)
        stepped = [self._strategy.setup_optimizer(optimizer) for optimizer in flat]
        wrapped = tuple(_like(counts, map(self._wrap_optimizer, stepped)))
        return wrapped[0] if len(wrapped) == 1 else wrapped

    def setup_dataloaders(
        self,
        *dataloaders: Any,
        use_distributed_sampler: bool = True,
        move_to_device: bool = True,
        resumable: bool = False,
    ) -> Any:
        """Prepare loaders: each rank gets its share of the samples, on its device.

        Of a ``DataLoader`` with indexed samples all ranks get the same number of batches, for evaluation, too: samples
        of the beginning come again at the end. Other iterables have to see to that themselves where ranks work together
        in each forward pass, as they do where parameters are sharded.

        Args:
            *dataloaders: ``DataLoader`` objects, or any iterables of batches, which must share out samples themselves;
                or lists of these.
            use_distributed_sampler: Share out the samples of a ``DataLoader``, in the order of its own sampler.
                Default: True.
            move_to_device: Move batches to :attr:`device`. Default: True.
            resumable: Return loaders whose position :meth:`save` and :meth:`load` can keep: see
                :class:`ResumableDataLoader`. Default: False.

        Returns:
            The wrapped loader, or a list of several; a list for a list of loaders.
        """
        self._require_launch("setup_dataloaders")
        gather_metrics(self._strategy)
        if not dataloaders:
            raise MisconfigurationException("setup_dataloaders() got no loader.")
        flat, counts = _spread(dataloaders, _several)
        for loader in flat:
            check_loader(loader)
        where = self.device if move_to_device else None
        wrap = functools.partial(
            wrap_loader, strategy=self._strategy, share=use_distributed_sampler, device=where, resumable=resumable
        )
        wrapped = _like(counts, map(wrap, flat))
        return wrapped[0] if len(wrapped) == 1 else wrapped

    def _prepare(self, module: Module, move_to_device: bool) -> Module:
        gather_metrics(self._strategy, module)
        if not self._strategy.shards_parameters:
            self._refuse_sharded(module)
        module = self._strategy.precision.convert_module(module)
        if any(each.is_meta for each in module.parameters()):
            if not self._strategy.initializes_on_meta:
                own = user_module(module)
                named = with_plain_names(own, own.named_parameters())
                name = next(name for name, each in named if each.is_meta)
                raise MisconfigurationException(
                    f"The parameter {name!r} is on the meta device, so it has no values, and "
                    f"{type(self._strategy).__name__} does not make any. Give the module values first: "
                    "module.to_empty(device=...), and an initialization or a checkpoint."
                )
        elif move_to_device:
            tell_of_devices(module)
            self._strategy.module_to_device(module)
        return module

    def _refuse_sharded(self, module: Module) -> None:
        """Raise where an earlier strategy has left this process a part of the module."""
        if any(is_sharded_tensor(each) for each in module.parameters()):
            raise MisconfigurationException(
                f"The parameters of {type(user_module(module)).__name__} are shared out over processes, as a strategy "
                f"such as FSDPStrategy left them, and {type(self._strategy).__name__} needs all of them in each "
                "process. Make the module anew and load a checkpoint into it, or go on with the strategy that it had."
            )

    def _wrap_module(self, engine: Module, module: Module) -> FabricModule:
        self._strategy.precision.guard_module(module)
        wrapped = FabricModule(engine, self._strategy, module)
        own = wrapped.module
        if _takes_fabric(type(own)):  # such as a LightningModule: it logs, and has hooks
            own.fabric = self  # type: ignore[assignment]
            if not any(callback is own for callback in self._callbacks):
                self._callbacks.append(own)
        self._modules[id(own)] = own
        self.call("on_after_setup", fabric=self, module=wrapped)
        return wrapped

    def _wrap_optimizer(self, optimizer: Optimizer) -> FabricOptimizer:
        listened = any(hasattr(callback, "on_after_optimizer_step") for callback in self._callbacks)
        return FabricOptimizer(optimizer, self._strategy, after_step=self._after_step if listened else None)

    def _after_step(self, optimizer: Optimizer) -> None:
        self.call("on_after_optimizer_step", strategy=self._strategy, optimizer=optimizer)

    # The step

    def backward(self, tensor: Tensor, *args: Any, model: FabricModule | None = None, **kwargs: Any) -> None:
        """Differentiate a loss: ``loss.backward()``, scaled where the precision needs it.

        Args:
            tensor: The loss.
            *args: For ``Tensor.backward``.
            model: The model that the loss belongs to. Strategies that run the backward pass themselves need it if
                there are several models.
            **kwargs: For ``Tensor.backward``.

        Raises:
            MisconfigurationException: ``tensor`` is no tensor, is not one number, or depends on no parameter that
                requires a gradient; or the model is not set up.
        """
        if not isinstance(tensor, Tensor):
            raise MisconfigurationException(
                f"backward got a {type(tensor).__name__}, and needs the loss as a tensor. A float, such as .item() "
                "returns, has no gradient; of a dict or tuple, pass the loss in it."
            )
        engine = None if model is None else given_engine(model, "backward")
        try:
            if self._plain_backward and not args and not kwargs:
                tensor.backward()  # type: ignore[no-untyped-call]
            else:
                self._strategy.backward(tensor, engine, *args, **kwargs)
        except RuntimeError as error:
            if not args and not kwargs:
                check_loss(tensor, "backward got")
            if (explained := self._strategy.explain_error(engine, error)) is not None:
                raise explained from error
            raise

    def run_batch(self, model: FabricModule, batch: Any, window: float = 1) -> dict[str, Tensor]:
        """Run forward and backward of a whole batch, of a model that is cut into pipeline stages.

        The model has two methods. ``pipeline_stages()`` returns its own submodules in their order; what one returns, a
        tensor or a tuple of tensors, is what the next one gets. ``loss(outputs, batch)`` returns the mean loss of the
        last stage's outputs, or a dict of scalars by name with "loss". What the first stage gets is the batch if that
        is a tensor, or the first entry of a list or tuple, or what the optional ``pipeline_inputs(batch)`` returns.

        In a pipeline, micro-batches go through it. Under every other strategy the stages run one after the other, so
        that the same loop runs anywhere. All ranks that work together on a share of the batch call this with the same
        batch.

        Args:
            model: The model that :meth:`setup` returned.
            batch: On :attr:`device`.
            window: The number of batches of a gradient accumulation, by which the loss is divided. Default: 1.

        Returns:
            The detached mean "loss" of the batch, not divided, and the means of what else ``loss`` returned, by name;
            in a pipeline, on all of its ranks.

        Raises:
            MisconfigurationException: The model is not set up, or does not have these methods.
        """
        engine = given_engine(model, "run_batch")
        return run_batch(self._strategy, given_module(model), engine, batch, window, self.backward)

    def evaluate_batch(self, model: FabricModule, batch: Any) -> dict[str, Tensor]:
        """Run a whole batch forward, without gradients; arguments and result as of :meth:`run_batch`."""
        engine = given_engine(model, "evaluate_batch")
        return evaluate_batch(self._strategy, given_module(model), engine, batch)

    def predict_batch(self, model: FabricModule, batch: Any) -> Any:
        """Return what the last stage returns for a whole batch, without gradients; arguments: see :meth:`run_batch`."""
        engine = given_engine(model, "predict_batch")
        return predict_batch(self._strategy, given_module(model), engine, batch)

    def clip_gradients(
        self,
        module: Module,
        optimizer: Optimizer,
        clip_val: float | None = None,
        max_norm: float | None = None,
        norm_type: float | int = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor | None:
        """Clip gradients, after unscaling them where the precision scales.

        Args:
            module: The model, as :meth:`setup` returned it or as it was before.
            optimizer: The optimizer whose parameters' gradients are clipped.
            clip_val: Clamp each entry to ``[-clip_val, clip_val]``.
            max_norm: Scale all gradients so that their joint norm is at most this.
            norm_type: The p of the p-norm. Default: 2.
            error_if_nonfinite: Raise a RuntimeError if the norm is NaN or infinite. Default: True.

        Returns:
            With ``max_norm``, the norm before clipping, a scalar; with ``clip_val``, None.

        Raises:
            MisconfigurationException: Both or neither of ``clip_val`` and ``max_norm`` are given, or one is negative.
        """
        if (clip_val is None) == (max_norm is None):
            raise MisconfigurationException(
                f"clip_gradients(clip_val={clip_val!r}, max_norm={max_norm!r}): give exactly one of the two."
            )
        limit = clip_val if max_norm is None else max_norm
        if isinstance(limit, Tensor) and limit.numel() == 1:
            limit = limit.item()
        if not isinstance(limit, (int, float)) or isinstance(limit, bool) or not limit >= 0:
            name = "clip_val" if max_norm is None else "max_norm"
            raise MisconfigurationException(f"clip_gradients({name}={limit!r}): must be a number of at least 0.")
        engine = given_engine(module, "clip_gradients") if is_wrapped(module) else module
        inner = optimizer.optimizer if isinstance(optimizer, FabricOptimizer) else optimizer
        if max_norm is not None:
            return self._strategy.clip_gradients_norm(engine, inner, limit, norm_type, error_if_nonfinite)
        self._strategy.clip_gradients_value(engine, inner, limit)
        return None

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context that surrounds the forward pass, for computations outside of the model.

        In a precision that autocasts, optimizers may step in it, and weights may change.
        """
        return self._strategy.precision.step_context()

    def to_device(self, obj: Any) -> Any:
        """Move a module (in place), a tensor or a batch to :attr:`device`, and return it."""
        self._require_launch("to_device")
        if isinstance(obj, Module):
            gather_metrics(self._strategy, obj)
            self._strategy.module_to_device(obj)
            return obj
        return self._strategy.batch_to_device(obj)

    def no_backward_sync(self, module: FabricModule, enabled: bool = True) -> AbstractContextManager[Any]:
        """Return a context in which gradients accumulate without being reduced over the ranks.

        Enter it around forward and backward of each micro-batch; ``enabled`` is False for the last of an accumulation.
        """
        return self._strategy.no_backward_sync(given_engine(module, "no_backward_sync"), enabled)

    # Communication

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on the first process of each machine."""
        if self.local_rank == 0:
            print(*args, **kwargs)

    def barrier(self, name: str | None = None) -> None:
        """Wait until every process has called this."""
        self._require_launch("barrier")
        self._strategy.barrier(name)

    def broadcast(self, obj: T, src: int = 0) -> T:
        """Return, on every process, the object that the process of rank ``src`` passed."""
        self._require_launch("broadcast")
        received: T = self._strategy.broadcast(obj, src)
        return received

    def all_gather(self, data: Any, group: Any | None = None, sync_grads: bool = False) -> Any:
        """Gather the tensors of every process, stacked along a new first dimension.

        Shapes must be the same on every process. They are compared at the first call of each line, and under
        ``torch.autograd.detect_anomaly`` at every call.

        Args:
            data: A tensor, a number of Python or NumPy, an array, or containers of these. Strings, bytes, None and
                other objects in them stay as they are on each process: see :func:`treadle_fabric.all_gather_objects`.
            group: A process group. Default: all processes.
            sync_grads: Let gradients flow back. Default: False.

        Returns:
            The same structure, with tensors of the shapes ``(world_size, *shape)``; with one process, of unchanged
            shapes. Numbers and arrays become tensors with one process, too: an int ``int64``, a float torch's default
            dtype, a bool ``bool``, and what is NumPy's keeps its dtype.

        Raises:
            MisconfigurationException: Shapes, dtypes or structures differ between the processes; or a tensor is sparse
                or nested, or an array has a dtype that torch has not.
        """
        self._require_launch("all_gather")
        data = as_tensors(data, self.device, "all_gather")
        if self._strategy.uses_process_group:
            check_alike(data, group, "all_gather", call_at_times=call_at_looks)
        return map_tensors(data, lambda t: self._strategy.all_gather(t, group, sync_grads))

    def all_reduce(self, data: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """Reduce tensors over all processes.

        Shapes must be the same on every process; they are compared as in :meth:`all_gather`.

        Args:
            data: A tensor, a number of Python or NumPy, an array, or containers of these. It is not changed.
            group: A process group. Default: all processes.
            reduce_op: ``"mean"`` (default), ``"sum"``, ``"max"``, ``"min"``, ``"product"``, or a
                ``torch.distributed.ReduceOp``.

        Returns:
            The same structure with the reduced tensors, of unchanged shapes. A mean of integers or bools has torch's
            default dtype, and a sum or product of them is ``int64``; everything else keeps its dtype. With one process
            the types are the same.

        Raises:
            MisconfigurationException: Something in ``data`` is no number, such as a string or None; shapes, dtypes or
                structures differ between the processes; or numbers of a dtype have no such reduction.
        """
        self._require_launch("all_reduce")
        check_reduce_op(reduce_op)
        reduction = functools.partial(reduction_of, reduce_op)
        data = as_tensors(data, self.device, "all_reduce", reduction)
        if self._strategy.uses_process_group:
            check_alike(data, group, "all_reduce", lambda dtype: reduction(dtype).result, call_at_times=call_at_looks)
        return map_tensors(data, lambda t: self._strategy.all_reduce(t, group, reduce_op))

    @contextmanager
    def rank_zero_first(self, local: bool = False) -> Generator[None]:
        """Let rank 0 run the block first, then the other ranks; with ``local``, the first process of each machine.

        The block may take longer than the timeout of collectives.
        """
        self._require_launch("rank_zero_first")
        rank = self.local_rank if local else self.global_rank
        if rank > 0:
            patient_barrier("rank_zero_first")
        yield
        if rank == 0:
            patient_barrier("rank_zero_first")
        patient_barrier("the end of rank_zero_first")

    # Files

    def save(
        self, path: PathLike, state: Mapping[str, Any], filter: dict[str, Callable[[str, Any], bool]] | None = None
    ) -> None:
        """Write a checkpoint, whole or not at all; every process must call this.

        A model's and an optimizer's state dict are written. Which parameters require gradients is in neither, nor are
        the names in parameter groups: a program that changes them in its loop makes the same changes, as far as it had
        come, before it calls :meth:`load`. Keep in ``state`` what it needs to know for that, such as the epoch.

        Args:
            path: The path to write to.
            state: A dict of models, optimizers, other objects with a ``state_dict``, and values of any kind; may be
                nested. Of a loader without a state, that of its dataset and sampler; loaders, samplers and datasets
                that have none are left out, with a warning. A value that needs a pickle is kept apart, with a warning:
                see ``weights_only`` of :meth:`load`.
            filter: For a name in ``state``, a function of an entry's name and value that returns whether to keep it.

        Raises:
            CheckpointError: The file cannot be written, or a value cannot be pickled; an earlier file of that name is
                intact.
            MisconfigurationException: ``state`` or ``filter`` are not as described here.
        """
        self._require_launch("save")
        for place, value in left_out(state):
            if (place, type(value)) not in self._told:
                self._told.add((place, type(value)))
                rank_zero_warn(
                    f"{place} ({type(getattr(value, 'dataloader', value)).__name__}) has no state, and is left out of "
                    f"{str(path)!r}; loading leaves it as it is. For a loader that goes on in mid-epoch, use "
                    "fabric.setup_dataloaders(loader, resumable=True)."
                )
        self._strategy.save_checkpoint(path, unwrap(without_stateless(state)), filter=filter)
        self._strategy.barrier()

    def load(
        self,
        path: PathLike,
        state: Any | None = None,
        strict: bool = True,
        *,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint, and restore a state in place; every process must call this.

        Args:
            path: The path to read.
            state: A state as in :meth:`save`; values in it are replaced, and what has no state stays as it is.
                Dataclasses, enums and named tuples of the classes in it can be loaded. Default: ``None``, restore
                nothing.
            strict: Refuse a file that lacks something in ``state``. Default: True.
            weights_only: ``False`` lets the file run code of its own; only for files you trust. Default: ``True``.

        Returns:
            The entries of the file that ``state`` does not name; all entries if ``state`` is ``None`` or empty. In
            the place of a value that needs a pickle is, unless ``weights_only=False``, an object whose use raises an
            error.

        Raises:
            CheckpointError: The file is missing, damaged or unsafe, or does not fit ``state``.
        """
        self._require_launch("load")
        wanted = without_stateless(state)
        unwrapped = None if isinstance(wanted, Mapping) and not wanted else unwrap(wanted)
        remainder = self._strategy.load_checkpoint(path, unwrapped, strict=strict, weights_only=weights_only)
        self._strategy.barrier()
        if isinstance(state, dict) and unwrapped is not None and unwrapped is not state:
            put_back(state, unwrapped)
        return remainder

    def load_raw(
        self, path: PathLike, obj: Module | Optimizer, strict: bool = True, *, weights_only: bool | None = None
    ) -> None:
        """Load a file that holds nothing but a module's or an optimizer's state dict; arguments as in :meth:`load`.

        One process may call this alone, so each that does checks the file by itself.
        """
        self._require_launch("load_raw")
        if not isinstance(obj, (Module, Optimizer)):
            raise MisconfigurationException(
                f"load_raw(obj={type(obj).__name__}): must be a module or an optimizer. For a dict, use load."
            )
        self._strategy.load_checkpoint(path, unwrap(obj), strict=strict, weights_only=weights_only, together=False)

    # Callbacks and loggers

    def call(self, hook_name: str, *args: Any, **kwargs: Any) -> None:
        """Call a method with these arguments on every callback that has the method, in their order.

        Of the keywords, each callback gets those that its method takes.
        """
        for callback in tuple(self._callbacks):
            method = getattr(callback, hook_name, None)
            if callable(method):
                method(*args, **_taken(method, kwargs))
            elif method is not None:
                rank_zero_warn(
                    f"Skipping the callback `{type(callback).__name__}.{hook_name}` because it is not callable."
                )

    def log(self, name: str, value: Any, step: int | None = None) -> None:
        """Write a number, or a tensor with one element, to all loggers."""
        self.log_dict({name: value}, step)

    def log_dict(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write several values, by name, to all loggers; they get tensors as numbers.

        Raises:
            MisconfigurationException: A tensor has more or less than one element.
        """
        writing = [each for each in self._loggers if writes_here(each.log_metrics)]
        if self._loggers and not writing:
            check_scalars(metrics)  # the same error on every rank, and none waits for its GPU
        numbers = to_numbers(metrics) if writing else {}
        for logger in writing:
            logger.log_metrics(metrics=numbers, step=step)


_KEYWORDS: weakref.WeakKeyDictionary[Any, frozenset[str] | None] = weakref.WeakKeyDictionary()
"""The keywords that the functions of methods take; None: all."""


def _taken(method: Callable[..., Any], keywords: dict[str, Any]) -> dict[str, Any]:
    """Those of some keywords that a method takes."""
    if not keywords:
        return keywords
    function = getattr(method, "__func__", None)  # the same for every object of a class, and as long as the class
    if not isinstance(function, FunctionType):
        names = _keywords_of(method)
    elif function in _KEYWORDS:
        names = _KEYWORDS[function]
    else:
        names = _KEYWORDS[function] = _keywords_of(method)
    return keywords if names is None else {name: value for name, value in keywords.items() if name in names}


def _keywords_of(method: Callable[..., Any]) -> frozenset[str] | None:
    """The keywords that a method takes; None: all."""
    try:
        parameters = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):  # written in C
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return frozenset(parameter.name for parameter in parameters if parameter.kind in named)


def _launching(run: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a user's ``run`` so that it runs in all processes."""

    @functools.wraps(run)
    def launched(self: Fabric, *args: Any, **kwargs: Any) -> Any:
        if self._launched:
            return run(self, *args, **kwargs)
        return self._launch(getattr(self, run.__name__), *args, **kwargs)

    return launched


def _takes_fabric(cls: type[Module]) -> bool:
    """Whether a module of this class gets the Fabric object; a method of that name, say, is the user's own."""
    declared = getattr(cls, "fabric", None)
    return declared.fset is not None if isinstance(declared, property) else hasattr(cls, "fabric") and not declared


def _spread(arguments: Iterable[Any], several: Callable[[Any], list[Any] | None]) -> tuple[list[Any], list[int | None]]:
    """All objects in arguments that take one or several, and of each argument the length of its list, if it is one."""
    given = [(each, several(each)) for each in arguments]
    flat = [each for one, found in given for each in ([one] if found is None else found)]
    return flat, [None if found is None else len(found) for _, found in given]


def _like(counts: Iterable[int | None], objects: Iterable[Any]) -> list[Any]:
    """Put objects into lists where the arguments that they come from were lists."""
    rest = iter(objects)
    return [next(rest) if count is None else list(islice(rest, count)) for count in counts]


def _several(loaders: Any) -> list[Any] | None:
    """As :func:`several_loaders`, but a list of lists is one loader, as it has always been here."""
    found = several_loaders(loaders)
    return None if found is None or any(isinstance(each, (list, tuple)) for each in found) else found
