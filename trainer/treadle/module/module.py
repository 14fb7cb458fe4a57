"""LightningModule: a model together with how it is trained."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from treadle.metrics.sinks import NOT_LOGGING, MetricSink, log_in_fabric
from treadle.metrics.values import flatten_metrics
from treadle.module.export import (
    export_to_onnx,
    export_to_tensorrt,
    export_to_torchscript,
    keep_run_out_of_graphs,
    leave_alone,
)
from treadle.module.hooks import ModuleHooks
from treadle.module.hparams import HyperparametersMixin
from treadle.module.in_fabric import TrainerInFabric
from treadle.module.loading import class_only, load_module_from_checkpoint
from treadle_fabric import Fabric, FabricOptimizer, LRScheduler, MisconfigurationException, PathLike, names_in
from treadle_fabric.loggers import Logger
from treadle_fabric.setup import as_moved

if TYPE_CHECKING:
    from treadle.contracts import Callback, Trainer

__all__ = ["STEP_OUTPUT", "LightningModule", "OptimizerLRScheduler"]

STEP_OUTPUT: TypeAlias = Tensor | Mapping[str, Any] | None
OptimizerLRScheduler: TypeAlias = (
    Any  # an Optimizer, lists of them, two lists, a dict or dicts with "lr_scheduler"; None
)


class LightningModule(HyperparametersMixin, ModuleHooks, nn.Module):
    """A model, its steps, its optimizers and what happens at the hooks of a run.

    Define ``training_step`` and ``configure_optimizers``, and ``validation_step``, ``test_step``, ``predict_step`` as
    needed. The same module runs under :class:`treadle.Trainer`, and in a hand-written loop after
    ``fabric.setup(module)``.
    """

    forward_methods: ClassVar[tuple[str, ...]] = ("training_step", "validation_step", "test_step", "predict_step")
    """Methods that run through the strategy's engine and precision when called on the wrapped module."""
    automatic_optimization: bool = True
    """Whether the trainer steps the optimizer. Set it to False, in ``__init__`` or in the class, if ``training_step``
    steps the optimizer."""
    CHECKPOINT_HYPER_PARAMS_KEY: ClassVar[str] = "hyper_parameters"
    CHECKPOINT_HYPER_PARAMS_NAME: ClassVar[str] = "hparams_name"
    CHECKPOINT_HYPER_PARAMS_TYPE: ClassVar[str] = "hparams_type"
    """Where a checkpoint has hyper-parameters, the argument that held them, and its type (in Lightning's only)."""
    _moved: Tensor | None = None
    example_input_array: Any = None
    """An input of ``forward``, for the graph, the summary and exports."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._trainer: Trainer | None = None
        self._fabric: Fabric | None = None
        self._fabric_optimizers: list[FabricOptimizer] = []  # those that `Fabric.setup` got with this module
        self._metrics: MetricSink = NOT_LOGGING
        self._toggled: dict[int, list[tuple[nn.Parameter, bool]]] = {}
        self._strict_loading: bool | None = None
        self._compiled: nn.Module | None = None

    # ------------------------------------------------------------------------------------------------ where it runs

    @property
    def trainer(self) -> Trainer:
        """The trainer that runs this module; in a Fabric loop what Fabric has of one; else a RuntimeError."""
        if self._trainer is None and self._fabric is not None:
            return TrainerInFabric(self, self._fabric)  # type: ignore[return-value]
        if self._trainer is None:
            raise RuntimeError(
                f"{type(self).__qualname__} is not attached to a `Trainer`: `self.trainer` is there inside "
                "fit, validate, test and predict, and after `fabric.setup`."
            )
        return self._trainer

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        self._trainer = trainer
        for child in self.children():
            if isinstance(child, LightningModule):
                child.trainer = trainer

    @property
    def fabric(self) -> Fabric | None:
        """The Fabric that this module was set up with, in a hand-written loop and under the trainer."""
        return self._fabric

    @fabric.setter
    def fabric(self, fabric: Fabric | None) -> None:
        self._fabric = fabric
        for child in self.children():
            if isinstance(child, LightningModule):
                child.fabric = fabric

    def attach(self, trainer: Trainer | None, metrics: MetricSink = NOT_LOGGING) -> None:
        """Set the trainer, and where :meth:`log` goes.

        The trainer calls this when a run begins and, without ``metrics``, when it ends.
        """
        self.trainer = trainer
        for module in self.modules():
            if isinstance(module, LightningModule):
                module.attach_metrics(metrics)

    def _run_as(self, model: nn.Module) -> None:
        """Set what runs the steps: this module, or its compiled form; the trainer calls this for the given model."""
        if model is not self:
            keep_run_out_of_graphs(LightningModule)
        self.__dict__["_compiled"] = None if model is self else model  # no submodule: it holds this module

    @property
    def _runs(self) -> nn.Module:
        """What runs the steps under a trainer: this module, or its compiled form."""
        return self if self._compiled is None else self._compiled

    def attach_metrics(self, metrics: MetricSink) -> None:
        """Set where :meth:`log` goes; the trainer calls this when a stage begins."""
        self.__dict__["_metrics"] = metrics  # past nn.Module.__setattr__, which is slow

    @property
    def current_epoch(self) -> int:
        """The number of completed epochs; 0 without a trainer."""
        return self._trainer.current_epoch if self._trainer else 0

    @property
    def global_step(self) -> int:
        """The number of optimizer steps so far; 0 without a trainer."""
        return self._trainer.global_step if self._trainer else 0

    @property
    def global_rank(self) -> int:
        """This process's rank among all processes; 0 without a trainer."""
        return self._trainer.global_rank if self._trainer else 0

    @property
    def local_rank(self) -> int:
        """This process's rank on its node; 0 without a trainer."""
        return self._trainer.local_rank if self._trainer else 0

    @property
    def logger(self) -> Logger | None:
        """The first logger, or None."""
        return next(iter(self.loggers), None)

    @property
    def loggers(self) -> list[Logger]:
        """The loggers of the trainer or the Fabric; empty without either."""
        if self._trainer:
            return self._trainer.loggers
        return list(self._fabric.loggers) if self._fabric is not None else []

    @property
    def device(self) -> torch.device:
        """The device of the first parameter or buffer; where there is none, that of the last ``to`` and the like."""
        tensor = next(chain(self.parameters(), self.buffers()), self._moved)
        return torch.device("cpu") if tensor is None else tensor.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point parameter; where there is none, as for :attr:`device`."""
        first = next((p for p in self.parameters() if p.is_floating_point()), self._moved)
        return torch.get_default_dtype() if first is None else first.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Self:
        """Move and convert, as every module; without parameters, an empty tensor takes their place."""
        if next(self.parameters(), None) is None:
            self.__dict__["_moved"] = as_moved(fn, self._moved)
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        return self

    @property
    def on_gpu(self) -> bool:
        """Whether the module is on a CUDA device."""
        return self.device.type == "cuda"

    @property
    def device_mesh(self) -> Any:
        """The strategy's device mesh; None where it has none."""
        return self._trainer.strategy.device_mesh if self._trainer else None

    @property
    def strict_loading(self) -> bool:
        """Whether a checkpoint must have exactly this module's keys. Default: True."""
        return True if self._strict_loading is None else self._strict_loading

    @strict_loading.setter
    def strict_loading(self, strict: bool) -> None:
        self._strict_loading = strict

    # ------------------------------------------------------------------------------------------------ what you define

    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Compute the loss of ``(batch, batch_idx)``: a scalar tensor, a dict with ``loss``, or None to skip the batch.

        The dict may also have a ``weight``, the number of tokens or samples over which the loss is a mean: the batches
        of an accumulation and of all ranks are then averaged by weight.

        A step whose argument is called ``dataloader_iter`` gets the loader's iterator instead of a batch.
        """
        raise MisconfigurationException(f"{type(self).__qualname__} has no `training_step`; fit needs one: define it.")

    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Evaluate ``(batch, batch_idx, dataloader_idx=0)`` of the validation set."""
        raise MisconfigurationException(f"{type(self).__qualname__} has no `validation_step`: define it.")

    def test_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Evaluate ``(batch, batch_idx, dataloader_idx=0)`` of the test set."""
        raise MisconfigurationException(f"{type(self).__qualname__} has no `test_step`: define it.")

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Predict ``(batch, batch_idx, dataloader_idx=0)``. Default: ``self(batch)``."""
        return self(args[0] if args else kwargs["batch"])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizers and schedulers.

        Returns:
            One optimizer; a list; a list of optimizers and a list of schedulers; a dict with ``optimizer`` and
            ``lr_scheduler`` (a scheduler, or a dict: scheduler, interval="epoch", frequency=1, monitor, strict=True,
            name); a list of such dicts; or None to train without an optimizer.
        """
        raise MisconfigurationException(
            f"{type(self).__qualname__} has no `configure_optimizers`; fit needs one: define it (it may return None)."
        )

    def configure_callbacks(self) -> Callback | Iterable[Callback] | None:
        """Return callbacks that this model needs; they replace the Trainer's of the same type. Default: none."""
        return []

    def configure_model(self) -> None:
        """Create layers here, rather than in ``__init__``, when they should be made on their device or sharded."""
        self.configure_sharded_model()

    def configure_sharded_model(self) -> None:
        """The old name of :meth:`configure_model`, which takes its place."""

    def train_dataloader(self) -> Any:
        """Return the training batches: an iterable, or a list, tuple or dict of iterables."""
        raise MisconfigurationException(f"{type(self).__qualname__} has no `train_dataloader`.")

    def val_dataloader(self) -> Any:
        """Return the validation batches: an iterable or a list of iterables."""
        raise MisconfigurationException(f"{type(self).__qualname__} has no `val_dataloader`.")

    def test_dataloader(self) -> Any:
        """Return the test batches: an iterable or a list of iterables."""
        raise MisconfigurationException(f"{type(self).__qualname__} has no `test_dataloader`.")

    def predict_dataloader(self) -> Any:
        """Return the batches to predict: an iterable or a list of iterables."""
        raise MisconfigurationException(f"{type(self).__qualname__} has no `predict_dataloader`.")

    # ------------------------------------------------------------------------------------------------ optimization

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """Return the optimizers, for manual optimization: one, or a list where there are several.

        Args:
            use_pl_optimizer: False gives the plain torch optimizers; their ``step`` skips precision and hooks.
                Default: True.
        """
        found = self.trainer.wrapped_optimizers if use_pl_optimizer else self.trainer.optimizers
        return found[0] if len(found) == 1 else list(found)

    def lr_schedulers(self) -> LRScheduler | list[LRScheduler] | None:
        """Return the learning-rate schedulers: one, a list, or None where there is none."""
        found = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        return found[0] if len(found) == 1 else (found or None)

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run backward on ``loss`` in manual optimization, through precision and strategy."""
        if self._fabric is not None and self._trainer is None:
            self._fabric.strategy.expect_backward(loss)
            self._fabric.backward(loss, *args, **kwargs)
            self._fabric.strategy.after_inner_backward()
            return
        if self.automatic_optimization:
            raise MisconfigurationException(
                "`manual_backward` is for manual optimization: set `self.automatic_optimization = False` in `__init__`."
            )
        self.trainer.manual_backward(loss, *args, **kwargs)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run backward on ``loss``. Override this to change how."""
        loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step ``optimizer``. Override this to change how; the closure runs forward, backward and clipping."""
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Zero the gradients. Override this to change how."""
        optimizer.zero_grad()

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        """Step a scheduler; ``metric`` is the value it monitors, or None."""
        if metric is None:
            scheduler.step()
        else:
            scheduler.step(metric)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients before the step. To change how, override this and call :meth:`clip_gradients`."""
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def clip_gradients(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of ``optimizer`` by global norm or by value.

        Args:
            optimizer: the optimizer whose parameters' gradients are clipped.
            gradient_clip_val: the largest norm or absolute value. Default: the Trainer's; without one, nothing happens.
            gradient_clip_algorithm: "norm" or "value". Default: the Trainer's, else "norm".

        Raises:
            MisconfigurationException: the Trainer has another ``gradient_clip_val``, or the algorithm is unknown.
        """
        self.trainer.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def profile(self, action_name: str) -> AbstractContextManager[Any]:
        """While entered, measure an action with the Trainer's profiler; without a Trainer nothing happens.

        Args:
            action_name: the name of the action in the profiler's report.
        """
        return self._trainer.profiler.profile(action_name) if self._trainer else nullcontext()

    def toggle_optimizer(self, optimizer: Optimizer) -> None:
        """Let only the parameters of ``optimizer`` require gradients, until :meth:`untoggle_optimizer`."""
        mine = {p for group in optimizer.param_groups for p in group["params"]}
        known = [group for each in self.trainer.optimizers for group in each.param_groups]
        others = {p for group in known for p in group["params"] if p not in mine}
        self._toggled[_identity(optimizer)] = [(p, p.requires_grad) for p in others]
        for p in others:
            p.requires_grad_(False)
        self.trainer.strategy.after_trainable_change()

    def untoggle_optimizer(self, optimizer: Optimizer) -> None:
        """Put back what :meth:`toggle_optimizer` changed."""
        for p, required in self._toggled.pop(_identity(optimizer), []):
            p.requires_grad_(required)
        self.trainer.strategy.after_trainable_change()

    @contextmanager
    def toggled_optimizer(self, optimizer: Optimizer) -> Generator[None]:
        """Call :meth:`toggle_optimizer` for the length of a with block, then :meth:`untoggle_optimizer`."""
        self.toggle_optimizer(optimizer)
        try:
            yield
        finally:
            self.untoggle_optimizer(optimizer)

    # ------------------------------------------------------------------------------------------------ logging

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str | Callable[[Any], Any] = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any | None = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Log a value to the progress bar, the loggers and the callbacks.

        Args:
            name: the metric's name.
            value: a number, a tensor of one element, a torchmetrics object, or a (nested) dict of these.
            prog_bar: show it in the progress bar.
            logger: send it to the loggers. Default: True.
            on_step: log the value of each step. Default: True in training batches, else False.
            on_epoch: log the reduction over the epoch. Default: True outside training batches, else False.
                With both, the names are ``name_step`` and ``name_epoch``.
            reduce_fx: "mean" (weighted by ``batch_size``), "min", "max", "sum", or a callable on the stacked values.
            enable_graph: keep the autograd graph of the value.
            sync_dist: not needed: values that go to the loggers or are reduced over the epoch are reduced over all
                ranks, weighted by samples, in one collective for all names.
            sync_dist_group: not needed either.
            add_dataloader_idx: add ``/dataloader_idx_N`` to the name where there are several loaders. False: what
                several loaders log under a name is reduced over all of them.
            batch_size: the weight of this value. Default: the first dimension of the batch's first tensor.
            metric_attribute: the module's attribute that holds the torchmetrics object; not needed.
            rank_zero_only: only rank 0 logs this name; it is never reduced over ranks.

        Raises:
            MisconfigurationException: nothing can be logged in this hook, the value is no scalar, or the name was
                logged in this hook with other options.
        """
        options = (
            prog_bar, logger, on_step, on_epoch, reduce_fx, enable_graph, sync_dist, add_dataloader_idx, rank_zero_only,
        )  # fmt: skip
        self._metrics.log(self, name, value, options, batch_size)

    def log_dict(
        self,
        dictionary: Mapping[str, Any],
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str | Callable[[Any], Any] = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any | None = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Log every entry of a dictionary or a torchmetrics ``MetricCollection``; arguments as in :meth:`log`."""
        options = (
            prog_bar, logger, on_step, on_epoch, reduce_fx, enable_graph, sync_dist, add_dataloader_idx, rank_zero_only,
        )  # fmt: skip
        if self._metrics is NOT_LOGGING and self._trainer is None and self._fabric is not None:
            log_in_fabric(self._fabric, dictionary, options)
            return
        for name, value in flatten_metrics(dictionary):
            self._metrics.log(self, name, value, options, batch_size)

    # ------------------------------------------------------------------------------------------------ other

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on rank 0 only, above the progress bar."""
        runs = self._trainer or self._fabric
        (runs.print if runs is not None else print)(*args, **kwargs)

    def all_gather(self, data: Any, group: Any | None = None, sync_grads: bool = False) -> Any:
        """Gather tensors of every rank: each ``(...)`` becomes ``(world_size, ...)``."""
        fabric = self._fabric or self.trainer.fabric
        return fabric.all_gather(data, group=group, sync_grads=sync_grads)

    def freeze(self) -> None:
        """Let no parameter require a gradient, and switch to evaluation mode."""
        self.requires_grad_(False)
        self.eval()

    def unfreeze(self) -> None:
        """Let every parameter require a gradient, and switch to training mode."""
        self.requires_grad_(True)
        self.train()

    @class_only
    def load_from_checkpoint(
        cls,
        checkpoint_path: PathLike | IO[bytes],
        map_location: Any = None,
        hparams_file: PathLike | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Make the module with the hyper-parameters of a checkpoint and load its weights.

        Args:
            checkpoint_path: a checkpoint of this library or of Lightning 2.x: a path, a URL or an open file.
            map_location: where tensors, and with them the module, go, as in :func:`torch.load`. Default: the device
                that each tensor was saved from, or the CPU if that device is not here.
            hparams_file: a .yaml or .csv file with the hyper-parameters, instead of those in the checkpoint.
            strict: whether keys must match exactly. Default: the module's ``strict_loading``.
            weights_only: False unpickles arbitrary objects; only for files you trust. Default: True.
            **kwargs: arguments of ``__init__`` that replace saved hyper-parameters, or were not saved.

        Raises:
            CheckpointError: the file is missing, damaged or unsafe, or does not match.
            MisconfigurationException: arguments of ``__init__`` are missing.
        """
        return load_module_from_checkpoint(
            cls, checkpoint_path, map_location, hparams_file, strict, weights_only, **kwargs
        )

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As every module's; names may be those of a compiled module where this one is not, and the reverse."""
        return super().load_state_dict(names_in(self, state_dict), *args, **kwargs)

    @torch.no_grad()
    def to_onnx(self, file_path: str | Path | Any = None, input_sample: Any = None, **kwargs: Any) -> Any:
        """Export ``forward`` to ONNX, in evaluation mode; afterwards every submodule has its mode again.

        Args:
            file_path: The file to write. Default: none, the exported program is only returned.
            input_sample: An input of ``forward``: a tuple holds its positional arguments, a dictionary its keyword
                arguments. Default: ``example_input_array``.
            **kwargs: Passed to :func:`torch.onnx.export`, such as ``dynamic_shapes``, or ``external_data=False`` to
                have the weights in the same file.

        Returns:
            A ``torch.onnx.ONNXProgram``.

        Raises:
            MisconfigurationException: There is no input.
            MissingPackageError: A package that the exporter needs is not installed.
        """
        return export_to_onnx(self, file_path, input_sample, **kwargs)

    @torch.no_grad()
    def to_torchscript(
        self,
        file_path: PathLike | None = None,
        method: str | None = "script",
        example_inputs: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Compile ``forward`` to TorchScript, in evaluation mode; :func:`torch.export.export` takes its place.

        Args:
            file_path: The file or URL to write. Default: none.
            method: "script" or "trace".
            example_inputs: An input of ``forward`` for "trace". Default: ``example_input_array``.
            **kwargs: Passed to :func:`torch.jit.script` or :func:`torch.jit.trace`.

        Returns:
            The compiled module.

        Raises:
            MisconfigurationException: The method is unknown, or "trace" has no input.
        """
        return export_to_torchscript(self, file_path, method, example_inputs, **kwargs)

    def to_tensorrt(
        self,
        file_path: Any = None,
        input_sample: Any = None,
        ir: Literal["default", "dynamo", "ts"] = "default",
        output_format: Literal["exported_program", "torchscript"] = "exported_program",
        retrace: bool = False,
        default_device: str | torch.device = "cuda",
        **compile_kwargs: Any,
    ) -> Any:
        """Compile ``forward`` with torch-tensorrt, in evaluation mode.

        Args:
            file_path: The file to write. Default: none.
            input_sample: An input of ``forward``, or a list of them. Default: ``example_input_array``.
            ir, **compile_kwargs: As for ``torch_tensorrt.compile``, which gives what is returned.
            output_format, retrace: As for ``torch_tensorrt.save``.
            default_device: The GPU that a module on another device is moved to.
        """
        return export_to_tensorrt(
            self, file_path, input_sample, ir, output_format, retrace, torch.device(default_device), **compile_kwargs
        )

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        # a copy of the model is not a copy of its run
        nothing = dict.fromkeys(("_trainer", "_fabric", "_compiled"))
        return {**state, **nothing, "_fabric_optimizers": [], "_metrics": NOT_LOGGING, "_toggled": {}}


leave_alone(LightningModule)


def _identity(optimizer: Optimizer) -> int:
    return id(getattr(optimizer, "optimizer", optimizer))
