"""Check, before a run starts, that the module, its loaders and the settings fit together."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from treadle.data.find import check_loader, defines_loader, gives_loaders
from treadle.module import LightningDataModule, LightningModule
from treadle.module.hparams import CLASS_PATH, MAKER
from treadle.module.overriding import overrides
from treadle.run.hook_names import refuse_removed_hooks, tell_of_near_names
from treadle.stages import TrainerFn, TrainerState, TrainerStatus
from treadle.trainer.settings import Settings
from treadle_fabric import (
    Fabric,
    MisconfigurationException,
    PossibleUserWarning,
    UnusableResultError,
    WrongTypeError,
    is_wrapped,
    rank_zero_info,
    rank_zero_warn,
    uncompiled,
    user_module,
)
from treadle_fabric.accelerators import ACCELERATOR_REGISTRY, Accelerator
from treadle_fabric.coordination import first_different
from treadle_fabric.data import CombinedLoader, several_loaders
from treadle_fabric.strategies import Strategy

__all__: list[str] = []

_MODULE_METHODS = frozenset(
    """training_step validation_step test_step predict_step configure_optimizers train_dataloader
    val_dataloader""".split()
)


def split_datamodule(loaders: Any, datamodule: Any) -> tuple[Any, Any]:
    """Tell loaders from a data module, which may be passed in the place of the loaders."""
    if isinstance(loaders, LightningDataModule):
        if datamodule is not None:
            raise MisconfigurationException("Two data modules were passed, one as the dataloaders: pass one.")
        loaders, datamodule = None, loaders
    if datamodule is not None and not isinstance(datamodule, LightningDataModule):
        raise MisconfigurationException(
            f"datamodule is a {type(datamodule).__name__}; it must derive from `treadle.LightningDataModule`."
        )
    if loaders is not None and datamodule is not None:
        raise MisconfigurationException("Both dataloaders and a datamodule were passed: pass one of them.")
    return loaders, datamodule


def check_alone(datamodule: Any, **loaders: Any) -> None:
    """Refuse loaders beside a data module, which gives all loaders of a stage."""
    for name, given in loaders.items():
        if datamodule is not None and given is not None:
            raise MisconfigurationException(f"Both {name} and a datamodule were passed: pass one of them.")


def check_same_call(fabric: Fabric, stage: str, datamodule: Any, ckpt_path: Any, *, auto_resume: bool) -> None:
    """Raise, on every rank, if the ranks do not run the same stage with the same kind of arguments.

    Of different checkpoints that are named, rank 0's counts.
    """
    name_of_data = None if datamodule is None else type(datamodule).__name__
    call = {"stage": stage, "datamodule": name_of_data, "auto_resume": auto_resume}
    rank = first_different(fabric, {**call, "ckpt_path": ckpt_path is not None})
    path = None if ckpt_path is None else str(ckpt_path)
    if rank is not None:
        call["ckpt_path"] = path
        first, other = fabric.broadcast(call), fabric.broadcast(call, rank)
        name = next(name for name in ("stage", "datamodule", "ckpt_path", "auto_resume") if first[name] != other[name])
        raise MisconfigurationException(
            f"Rank 0 runs {first['stage']} with {name}={first[name]!r}, but rank {rank} runs {other['stage']} with"
            f" {name}={other[name]!r}: every rank must make the same call. Pass the same on every rank."
            + " To start from a checkpoint if there is one, use Trainer(auto_resume=True) or ckpt_path='last', with"
            " which rank 0 looks for all ranks." * (name == "ckpt_path")
        )
    if path is not None and (rank := first_different(fabric, path)) is not None:
        there = fabric.broadcast(path, rank)
        rank_zero_warn(f"ckpt_path is {path!r} on rank 0, but {there!r} on rank {rank}: all ranks start from rank 0's.")


def check_model(model: Any, what: str) -> LightningModule:
    """Return the user's module of a model, which may be compiled.

    Raises:
        MisconfigurationException: it is no LightningModule, or its ``__init__`` does not call that of the base class.
    """
    module = uncompiled(model)
    if isinstance(module, LightningModule):
        if "_metrics" not in module.__dict__:
            raise MisconfigurationException(
                f"{type(module).__qualname__}.__init__ does not call `super().__init__()`: call it first."
            )
        refuse_removed_hooks(module)
        module._run_as(model)
        return module
    if isinstance(model, type):
        hint = f"`{model.__name__}` is a class: pass an instance."
    elif is_wrapped(model):
        hint = "it was set up by Fabric already: pass the module itself."
    elif isinstance(user_module(module), LightningModule):
        hint = "the trainer wraps the module itself, as `strategy` says: pass the module that is inside."
    elif isinstance(module, torch.nn.Module):
        hint = (
            "a plain nn.Module has no `training_step`: derive from `treadle.LightningModule`, or use"
            " `treadle_fabric.Fabric`."
        )
    else:
        hint = "derive from `treadle.LightningModule`."
    raise WrongTypeError(f"Trainer.{what} got a model of type {type(module).__name__}; {hint}")


def model_or_last(model: Any, last: LightningModule | None, what: str) -> LightningModule:
    """Return the model that was passed, or the one of the last run."""
    if model is None:
        if last is None:
            raise WrongTypeError(f"Trainer.{what} got no model, and this trainer has not run one before: pass it.")
        return last
    return check_model(model, what)


def best_checkpoint(callbacks: Sequence[Any], fn: TrainerFn) -> str | None:
    """Return which checkpoint is evaluated where neither a model nor a checkpoint was passed, and say so."""
    if not any(getattr(callback, "best_model_path", "") for callback in callbacks):
        return None
    rank_zero_warn(
        f"`.{fn.value}(ckpt_path=None)` was called without a model, so that the best checkpoint of the `fit` before is"
        f" loaded: the same as {fn.value}(ckpt_path='best'). Pass that, 'last', a path, or the model with the weights"
        " that it has."
    )
    return "best"


def check_idle(state: TrainerState, fn: TrainerFn) -> None:
    """Refuse a run inside a run: a trainer has one set of loops and counters."""
    if state.status is TrainerStatus.RUNNING:
        raise MisconfigurationException(
            f"Trainer.{fn.value} was called inside {state.fn}: make another Trainer for it. If a stream of predictions"
            " was not read to its end, call its `close()` first."
        )


def check_loaders(**loaders: Any) -> None:
    """Refuse loaders that cannot be iterated."""
    for name, given in loaders.items():
        if given is None or isinstance(given, (CombinedLoader, Mapping)):
            continue
        for loader in several_loaders(given) or (given,):
            if not isinstance(loader, (list, tuple, Mapping, torch.Tensor)):
                check_loader(loader, name)


def _has(module: LightningModule, name: str) -> bool:

    return overrides(module, name, LightningModule)


def _near_method(module: LightningModule, name: str) -> str:
    own = [n for n in vars(type(module)) if not n.startswith("_") and n not in _MODULE_METHODS]
    near = difflib.get_close_matches(name, own, n=1)
    return f" (It has `{near[0]}`: is that a misspelling?)" if near else ""


def _has_loader(name: str, given: Any, module: LightningModule, datamodule: LightningDataModule | None) -> bool:
    return given is not None or defines_loader(gives_loaders(module, datamodule), name)


_GOT_OPTIMIZER_IDX = (
    "training_step", "backward", "optimizer_step", "optimizer_zero_grad", "lr_scheduler_step",
    "configure_gradient_clipping", "toggle_optimizer", "untoggle_optimizer", "training_step_end",
)  # fmt: skip
"""The methods that got ``optimizer_idx`` in Lightning before 2.0."""


def _refuse_optimizer_idx(module: LightningModule) -> None:
    """Refuse a module whose methods ask which of several optimizers is meant, which the trainer does not tell."""
    for method in _GOT_OPTIMIZER_IDX:
        try:
            asks = "optimizer_idx" in inspect.signature(getattr(module, method, None)).parameters  # type: ignore[arg-type]
        except (TypeError, ValueError):  # there is none, or a mock
            continue
        if asks:
            raise MisconfigurationException(
                f"`{type(module).__qualname__}.{method}` asks for `optimizer_idx`, which the trainer does not give: in"
                " automatic optimization one loss is for all optimizers, which step together. For a loss and steps of"
                " each optimizer, as of a GAN, set `self.automatic_optimization = False` in `__init__`, and in"
                " `training_step` use `self.optimizers()`, `self.toggle_optimizer`, `self.manual_backward` and"
                " `optimizer.step()`. Then remove `optimizer_idx`."
            )


def _check_step(module: LightningModule, step: str, needs: str, strategy: Strategy) -> None:
    """Refuse a module without the method that a stage calls for each batch: ``step``, or those of whole batches."""
    name = type(module).__qualname__
    if not strategy.runs_whole_batch:
        if not _has(module, step):
            raise MisconfigurationException(
                f"No `{step}()` method defined to run `Trainer.{needs}`: {name} needs one.{_near_method(module, step)}"
            )
        return
    for method in ("pipeline_stages", "loss"):
        if not callable(getattr(module, method, None)):
            raise MisconfigurationException(
                f"{name} has no `{method}`, which {needs} needs under {type(strategy).__name__} in the place of"
                f" `{step}`, because it runs whole batches: define `pipeline_stages(self)`, the list of submodules that"
                f" follow each other, and `loss(self, outputs, batch)`.{_near_method(module, method)}"
            )


def check_training(
    module: LightningModule,
    settings: Settings,
    train: Any,
    datamodule: LightningDataModule | None,
    strategy: Strategy,
) -> None:
    """Refuse training that cannot work, before it starts."""
    name = type(module).__qualname__
    _check_step(module, "training_step", "fit", strategy)
    if not _has(module, "configure_optimizers"):
        near = _near_method(module, "configure_optimizers")
        raise MisconfigurationException(
            f"No `configure_optimizers()` method defined to run `Trainer.fit`: {name} needs one.{near}"
        )
    if strategy.runs_whole_batch:
        _check_whole_batches(module, strategy)
    _refuse_optimizer_idx(module)
    if not _has_loader("train_dataloader", train, module, datamodule):
        raise _no_batches("fit", "train_dataloader")
    if not module.automatic_optimization:
        if settings.gradient_clip_val:
            raise MisconfigurationException(
                "Automatic gradient clipping is not supported for manual optimization: remove"
                f" `Trainer(gradient_clip_val={settings.gradient_clip_val})`, and call `self.clip_gradients` in"
                " `training_step`."
            )
        if settings.accumulate_grad_batches != 1:
            raise MisconfigurationException(
                "Automatic gradient accumulation is not supported for manual optimization: remove"
                f" `Trainer(accumulate_grad_batches={settings.accumulate_grad_batches})`, and accumulate in"
                " `training_step`."
            )


def _no_batches(stage: str, loader: str) -> WrongTypeError:
    argument = "train_dataloaders" if stage == "fit" else "dataloaders"
    return WrongTypeError(
        f"{stage} has no batches. Either pass the dataloader to the `.{stage}()` method ({argument}=..., or a"
        f" datamodule) OR implement `def {loader}(self):` in your LightningModule/LightningDataModule."
    )


def _check_whole_batches(module: LightningModule, strategy: Strategy) -> None:
    """Refuse a module that wants to do itself what a strategy that runs whole batches does."""
    name, kind = type(module).__qualname__, type(strategy).__name__
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"{name} sets automatic_optimization=False, and {kind} runs forward and backward of whole batches, without"
            " `training_step`: leave it True, or write the loop with Fabric and fabric.run_batch."
        )
    if _has(module, "backward"):
        raise MisconfigurationException(
            f"{name} defines `backward`, and {kind} runs the backward passes itself, one a micro-batch: remove it."
        )


def check_fit(
    module: LightningModule,
    settings: Settings,
    train: Any,
    val: Any,
    datamodule: LightningDataModule | None,
    strategy: Strategy,
) -> None:
    """Refuse a fit that cannot work, before it starts, and tell of what may not be meant."""
    check_training(module, settings, train, datamodule, strategy)
    tell_of_near_names(module, datamodule)
    _tell_of_validation(module, settings, _has_loader("val_dataloader", val, module, datamodule), strategy)
    _tell_of_clipping(module, settings)
    _tell_of_what_never_comes(module, settings, train, val, datamodule)
    if settings.durations.max_epochs_assumed:
        rank_zero_warn(
            f"`max_epochs` was not set: training for {settings.durations.max_epochs} epochs. Set `max_epochs=-1` to"
            " train without end.",
            category=PossibleUserWarning,
        )


def _tell_of_validation(module: LightningModule, settings: Settings, has_val: bool, strategy: Strategy) -> None:
    """Warn of a fit that has one of the two things that validation needs."""
    has_step = _has(module, "validation_step")
    if strategy.runs_whole_batch or not settings.limits["val"] or has_val == has_step:
        return
    if has_val:
        rank_zero_warn(
            "You passed in a `val_dataloader` but have no `validation_step`, so that fit does not validate. Define it"
            f" in {type(module).__qualname__}, or set limit_val_batches=0.{_near_method(module, 'validation_step')}"
        )
    else:
        rank_zero_warn(
            "You defined a `validation_step` but have no `val_dataloader`, so that fit does not validate. Pass"
            " `val_dataloaders`, or set limit_val_batches=0.",
            category=PossibleUserWarning,
        )


def _tell_of_clipping(module: LightningModule, settings: Settings) -> None:
    algorithm = settings.gradient_clip_algorithm
    clips = settings.gradient_clip_val or not module.automatic_optimization
    if algorithm is not None and not clips and not _has(module, "configure_gradient_clipping"):
        rank_zero_warn(
            f"gradient_clip_algorithm={algorithm!r} has no effect without a gradient_clip_val: set one, or leave the"
            " algorithm out.",
            category=PossibleUserWarning,
        )


def _tell_of_what_never_comes(
    module: LightningModule, settings: Settings, train: Any, val: Any, datamodule: LightningDataModule | None
) -> None:
    """Warn of validations and of reloads that the arguments put off for ever."""
    every, epochs = settings.check_val_every_n_epoch, settings.durations.max_epochs
    has_val = _has_loader("val_dataloader", val, module, datamodule)
    if every is not None and 0 < epochs < every and has_val and settings.limits["val"] and not settings.fast_dev_run:
        rank_zero_warn(
            f"check_val_every_n_epoch={every} is more than max_epochs={epochs}, so that fit does not validate: lower"
            " it.",
            category=PossibleUserWarning,
        )
    reloads = settings.reload_dataloaders_every_n_epochs
    if reloads and train is not None and (val is not None or not has_val):
        rank_zero_warn(
            f"reload_dataloaders_every_n_epochs={reloads} has no effect on loaders that are passed to fit: define"
            " `train_dataloader` in the module or a data module, or leave it out.",
            category=PossibleUserWarning,
        )


def tell_of_devices(accelerator: Accelerator) -> None:
    """Say which devices there are and are used, and warn of a GPU or TPU that is not."""
    kinds = [ACCELERATOR_REGISTRY.class_of(name) for name in ("cuda", "mps", "tpu") if name in ACCELERATOR_REGISTRY]
    there = [kind for kind in kinds if not kind.is_emulated() and kind.is_available()]
    gpu = next((f" ({kind.name()})" for kind in there if kind.name() != "tpu"), "")
    used = accelerator.name()
    rank_zero_info(f"GPU available: {bool(gpu)}{gpu}, used: {used in ('cuda', 'mps')}")
    if any(isinstance(accelerator, kind) for kind in there):
        return
    for kind in there:
        what, name = ("TPU", "tpu") if kind.name() == "tpu" else ("GPU", "gpu")
        rank_zero_warn(
            f"{what} available but not used: this run is on accelerator={used!r}. Trainer(accelerator={name!r}) uses"
            " it.",
            category=PossibleUserWarning,
        )


def check_evaluation(
    module: LightningModule, fn: TrainerFn, given: Any, datamodule: LightningDataModule | None, strategy: Strategy
) -> None:
    """Refuse a validation or test without its step or its batches."""
    step, loader = (
        ("validation_step", "val_dataloader") if fn is TrainerFn.VALIDATING else ("test_step", "test_dataloader")
    )
    _check_step(module, step, fn.value, strategy)
    tell_of_near_names(module, datamodule)
    if not _has_loader(loader, given, module, datamodule):
        raise _no_batches(fn.value, loader)


def check_predict(
    module: LightningModule, given: Any, datamodule: LightningDataModule | None, strategy: Strategy
) -> None:
    """Refuse a prediction without a step or batches."""
    if strategy.runs_whole_batch:
        _check_step(module, "predict_step", "predict", strategy)
    elif module.predict_step is None or not (
        _has(module, "predict_step") or overrides(module, "forward", torch.nn.Module)
    ):
        raise MisconfigurationException(
            f"`Trainer.predict` requires `forward` method to run, or a `predict_step`, and {type(module).__qualname__}"
            " has neither: define one."
        )
    tell_of_near_names(module, datamodule)
    if not _has_loader("predict_dataloader", given, module, datamodule):
        raise _no_batches("predict", "predict_dataloader")


def check_stage(
    module: LightningModule,
    fn: TrainerFn,
    settings: Settings,
    given: Any,
    datamodule: LightningDataModule | None,
    strategy: Strategy,
) -> None:
    """Refuse a stage that cannot work, before it starts; ``given``: its loaders, of fit those of training."""
    if fn is TrainerFn.FITTING:
        check_training(module, settings, given, datamodule, strategy)
    elif fn is TrainerFn.PREDICTING:
        check_predict(module, given, datamodule, strategy)
    else:
        check_evaluation(module, fn, given, datamodule, strategy)


def check_return_predictions(value: Any, strategy: Strategy) -> None:
    """Refuse a value of ``return_predictions`` that is unknown, or that the strategy cannot do."""
    if value not in (None, True, False, "stream"):
        raise MisconfigurationException(f"return_predictions={value!r} must be True, False or 'stream'.")
    if value == "stream" and strategy.launches_function:
        raise MisconfigurationException(
            "return_predictions='stream' cannot reach out of the processes that this strategy starts for each call: use"
            " strategy='ddp', which runs the script in all of them, or a single device."
        )


def merged_hyperparameters(module: LightningModule, datamodule: LightningDataModule | None) -> dict[str, Any]:
    """Return the hyper-parameters to log: the module's and the data module's.

    Raises:
        MisconfigurationException: both have one of the same name with different values.
    """
    mine = dict(module.hparams_initial) if getattr(module, "_log_hyperparams", False) else {}
    other = dict(datamodule.hparams_initial) if getattr(datamodule, "_log_hyperparams", False) else {}  # type: ignore[union-attr]
    for mark in (MAKER, CLASS_PATH):  # each has its own, and `load_from_checkpoint` of the module reads the logged ones
        other.pop(mark, None)
    for key in mine.keys() & other.keys():
        if mine[key] is not other[key] and str(mine[key]) != str(other[key]):
            raise UnusableResultError(
                f"The module and the data module both have the hyper-parameter {key!r}, with the values {mine[key]!r}"
                f" and {other[key]!r}: rename one, or leave it out with `save_hyperparameters(logger=False)`."
            )
    return {**mine, **other}


@contextmanager
def backend_flags(settings: Settings) -> Generator[None]:
    """Set torch's flags for ``deterministic`` and ``benchmark`` during the run, and restore them afterwards."""
    deterministic, benchmark = settings.deterministic, settings.benchmark
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
    )
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=deterministic == "warn")
        torch.backends.cudnn.benchmark = False
    if benchmark is not None:
        torch.backends.cudnn.benchmark = benchmark
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = before[2]


def instead_of(name: str) -> str:
    """Return what took the place of an argument that the Trainer had in Lightning 1; empty for any other."""
    from treadle.names.older import older  # for those who ask

    return older().argument("Trainer", name)
