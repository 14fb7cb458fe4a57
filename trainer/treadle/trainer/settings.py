"""Check the Trainer's arguments once, before anything starts, and fill in their defaults."""

from __future__ import annotations

import ast
import functools
import inspect
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, cast, overload

from treadle.callbacks import Callback, Checkpoint, ModelCheckpoint, ModelSummary, ProgressBar, Timer
from treadle.callbacks.progress import default_progress_bar
from treadle.loops.schedule import Durations, check_limit, check_validation_arguments, resolve_durations
from treadle.run.dispatch import check_callbacks, reorder_callbacks
from treadle.run.layer_sync import LayerSync, TorchSyncBatchNorm
from treadle.stages import RunningStage
from treadle_fabric import (
    MisconfigurationException,
    WrongTypeError,
    check_flag,
    check_integer,
    near_names,
    one_or_several,
    rank_zero_info,
    rank_zero_warn,
)
from treadle_fabric.loggers import CSVLogger, DummyLogger, Logger, TensorBoardLogger

if TYPE_CHECKING:
    from treadle.contracts import Trainer

__all__ = [
    "Setting",
    "Settings",
    "StageFlag",
    "checked_loggers",
    "choose_callbacks",
    "choose_loggers",
    "reads_environment",
    "resolve_settings",
]

T = TypeVar("T")


class Setting(Generic[T]):
    """An attribute of the Trainer that is one of its settings. It may be set: for the next run, or the next epoch.

    Args:
        doc: what it is.
    """

    def __init__(self, doc: str) -> None:
        self.__doc__ = doc
        self._name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, trainer: None, owner: type) -> Setting[T]: ...

    @overload
    def __get__(self, trainer: Trainer, owner: type) -> T: ...

    def __get__(self, trainer: Trainer | None, owner: type) -> Setting[T] | T:
        if trainer is None:
            return self
        settings, name = trainer._settings, self._name
        found = settings.limits[name.split("_")[1]] if name.startswith("limit_") else getattr(settings, name)
        return cast("T", found)

    def __set__(self, trainer: Trainer, value: T) -> None:
        before = getattr(trainer._settings, self._name, None)
        trainer._settings.change(self._name, value)
        if self._name.startswith("gradient_clip_"):
            try:
                trainer._configure_steps()
            except MisconfigurationException:  # the strategy cannot do so
                trainer._settings.change(self._name, before)
                raise


class StageFlag:
    """An attribute of the Trainer that tells whether a stage runs; setting it says that the stage runs, or none.

    Args:
        stage: the stage.
        doc: what it tells.
    """

    def __init__(self, stage: RunningStage, doc: str) -> None:
        self._stage, self.__doc__ = stage, doc

    @overload
    def __get__(self, trainer: None, owner: type) -> StageFlag: ...

    @overload
    def __get__(self, trainer: Trainer, owner: type) -> bool: ...

    def __get__(self, trainer: Trainer | None, owner: type) -> StageFlag | bool:
        return self if trainer is None else trainer.state.stage is self._stage

    def __set__(self, trainer: Trainer, value: bool) -> None:
        trainer.state.stage = self._stage if value else None


@dataclass
class Settings:
    """The Trainer's arguments with their defaults filled in. Callbacks may change ``accumulate_grad_batches``."""

    durations: Durations
    limits: dict[str, int | float]
    overfit_batches: int | float
    fast_dev_run: int
    val_check_interval: Any
    check_val_every_n_epoch: int | None
    num_sanity_val_steps: int | float
    log_every_n_steps: int
    accumulate_grad_batches: int
    gradient_clip_val: float | None
    gradient_clip_algorithm: str | None
    deterministic: bool | str | None
    benchmark: bool | None
    inference_mode: bool
    use_distributed_sampler: bool
    detect_anomaly: bool
    layer_sync: LayerSync | None
    reload_dataloaders_every_n_epochs: int
    default_root_dir: str
    enable_checkpointing: bool
    enable_progress_bar: bool
    enable_model_summary: bool
    enable_autolog_hparams: bool
    barebones: bool
    auto_resume: bool
    on_save_error: str
    on_nonfinite: str | None
    changes: int = 0
    """How often a setting was changed; a fit takes changes over before each epoch."""

    def change(self, name: str, value: Any) -> None:
        """Change a setting: it is checked as the constructor's argument of this name is.

        Raises:
            MisconfigurationException: the message has the setting, the value and the rule.
        """
        if name in ("val_check_interval", "check_val_every_n_epoch"):
            both = {"interval": self.val_check_interval, "every_n_epochs": self.check_val_every_n_epoch}
            both["interval" if name == "val_check_interval" else "every_n_epochs"] = value
            check_validation_arguments(**both)
        elif name in _CHECKED:
            value = _CHECKED[name](value, name)
        if name.startswith("limit_"):
            self.limits[name.split("_")[1]] = value
        else:
            setattr(self, name, value)
        self.changes += 1

    def sanity_batches(self, num_batches: list[float]) -> list[float]:
        """Return the sanity check's batches of each validation loader, given the number that each loader has."""
        steps = self.num_sanity_val_steps
        return [min(n, steps) for n in num_batches]


_AS_GIVEN = (
    "deterministic", "benchmark", "inference_mode", "use_distributed_sampler", "detect_anomaly",
    "enable_autolog_hparams", "barebones", "auto_resume", "on_save_error", "on_nonfinite",
)  # fmt: skip


def _barebones(given: dict[str, Any]) -> None:
    """Turn off, for ``barebones``, everything that costs time; refuse arguments that ask for some of it."""
    expected: dict[str, tuple[Any, ...]] = {
        "enable_checkpointing": (None, False),
        "logger": (None, False),
        "enable_progress_bar": (None, False),
        "enable_model_summary": (None, False),
        "num_sanity_val_steps": (None, 0),
        "log_every_n_steps": (None, 0),
        "fast_dev_run": (False, 0),
        "detect_anomaly": (False,),
        "profiler": (None,),
    }
    for name, allowed in expected.items():
        if given[name] not in allowed:
            raise MisconfigurationException(
                f"Trainer(barebones=True, {name}={given[name]!r}): barebones turns {name} off. Leave one of them out."
            )
    rank_zero_info(
        f"You are running in `Trainer(barebones=True)` mode, to measure speed. It turns off: {', '.join(expected)}."
    )
    given.update(
        enable_checkpointing=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def _check_flags(given: dict[str, Any]) -> None:
    """Check the arguments that do not depend on others."""
    for name in (
        "inference_mode",
        "use_distributed_sampler",
        "detect_anomaly",
        "sync_batchnorm",
        "enable_autolog_hparams",
        "auto_resume",
    ):
        check_flag(name, given[name])
    for name in ("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "benchmark"):
        check_flag(name, given[name], optional=True)
    if given["on_save_error"] not in ("raise", "warn"):
        raise MisconfigurationException(
            f"on_save_error={given['on_save_error']!r} must be 'raise' or 'warn'."
            f" {near_names(str(given['on_save_error']), ['raise', 'warn'])}"
        )
    if given["on_nonfinite"] not in (None, "raise", "skip", "warn"):
        raise MisconfigurationException(
            f"on_nonfinite={given['on_nonfinite']!r} must be 'raise', 'skip' or 'warn', or None for no check."
            f" {near_names(str(given['on_nonfinite']), ['raise', 'skip', 'warn'])}"
        )
    if given["deterministic"] not in (None, True, False, "warn"):
        raise MisconfigurationException(f"deterministic={given['deterministic']!r} must be True, False or 'warn'.")
    if not isinstance(given["default_root_dir"], (str, os.PathLike, type(None))):
        raise MisconfigurationException(f"default_root_dir={given['default_root_dir']!r} must be a path, or None.")
    if given["deterministic"] and given["benchmark"]:
        rank_zero_warn(
            "You passed `deterministic=True` and `benchmark=True`: the benchmark may choose other algorithms in each"
            " run, and cuDNN is then not deterministic. Leave one of them out."
        )
    if given["detect_anomaly"]:
        rank_zero_info(
            "You have turned on `Trainer(detect_anomaly=True)`, which makes every step much slower: it is for"
            " debugging."
        )


_ONE = {"val_check_interval": ("validation runs after every batch", "validation runs at the end of each epoch")}
"""What 1 and 1.0 mean for an argument, which is easily mistaken; else it is one batch, and all of them."""


def _tell_of_one(given: dict[str, Any]) -> None:
    """Say what was meant by an argument that counts batches as an int, and is a fraction as a float."""
    for name in ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches",
                 "overfit_batches", "val_check_interval"):  # fmt: skip
        value = given[name]
        if type(value) in (int, float) and value == 1:
            meaning = _ONE.get(name, ("1 batch is used", "100% of the batches are used"))[isinstance(value, float)]
            rank_zero_info(f"`Trainer({name}={value!r})` was configured so {meaning}.")


def _overfit(given: dict[str, Any], limits: dict[str, int | float], overfit: int | float) -> None:
    """Limit training and validation to ``overfit_batches``; a limit of the user's that is smaller stays."""
    for stage in ("train", "val"):
        name, own = f"limit_{stage}_batches", given[f"limit_{stage}_batches"]
        if own is None or type(own) is not type(overfit):
            if own not in (None, 0, 1.0):
                rank_zero_warn(f"overfit_batches={overfit!r} decides, and not {name}={own!r}: leave one of them out.")
            limits[stage] = 0 if own == 0 else overfit
        else:
            limits[stage] = min(own, overfit)


def _check_clip_value(value: Any, name: str = "gradient_clip_val") -> float | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise WrongTypeError(f"{name}={value!r} must be a number of at least 0, or None.")
    if value is not None and not value >= 0:
        raise MisconfigurationException(f"{name}={value!r} must be a number of at least 0.")
    return cast("float | None", value)


def _check_clip_algorithm(value: Any) -> str | None:
    if value is not None and str(value).lower() not in ("norm", "value"):
        raise MisconfigurationException(
            f"gradient_clip_algorithm={value!r} must be 'norm' or 'value'. {near_names(str(value), ['norm', 'value'])}"
        )
    return None if value is None else str(value).lower()


def _limit(value: Any, name: str) -> int | float:
    value = 1.0 if value is None else value
    check_limit(value, name)
    return cast("int | float", value)


def _whole(default: int, minimum: int) -> Callable[[Any, str], int]:
    """Return the function that checks a whole number, and fills in the default for None."""
    return lambda value, name: default if value is None else check_integer(name, value, minimum=minimum)


def _sanity_steps(value: Any, name: str) -> int | float:
    return math.inf if value in (-1, math.inf) else _whole(2, -1)(value, name)


_CHECKED: dict[str, Callable[[Any, str], Any]] = {
    **dict.fromkeys([f"limit_{stage}_batches" for stage in ("train", "val", "test", "predict")], _limit),
    "overfit_batches": _limit,
    "fast_dev_run": lambda value, name: int(value) if isinstance(value, bool) else _whole(0, 0)(value, name),
    "num_sanity_val_steps": _sanity_steps,
    "log_every_n_steps": _whole(50, 0),
    "reload_dataloaders_every_n_epochs": _whole(0, 0),
    "gradient_clip_val": _check_clip_value,
    "gradient_clip_algorithm": lambda value, name: _check_clip_algorithm(value),
}
"""What checks an argument that does not depend on others, and fills in its default: takes the value and the name."""


def resolve_settings(given: dict[str, Any]) -> Settings:
    """Check the constructor's arguments and fill in defaults.

    Args:
        given: the constructor's arguments by name; ``logger`` and the ``enable_*`` flags may be changed in it.

    Raises:
        MisconfigurationException: the message has the argument, its value, the rule and the remedy.
    """
    check_flag("barebones", given["barebones"])
    if given["barebones"]:
        _barebones(given)
    _check_flags(given)
    checked = {name: check(given[name], name) for name, check in _CHECKED.items()}
    fast, overfit = checked["fast_dev_run"], checked["overfit_batches"]
    limits = {stage: checked.pop(f"limit_{stage}_batches") for stage in ("train", "val", "test", "predict")}
    if overfit:
        _overfit(given, limits, overfit)
    _tell_of_one(given)
    interval = 1.0 if given["val_check_interval"] is None else given["val_check_interval"]
    check_validation_arguments(interval, given["check_val_every_n_epoch"])
    max_epochs, max_steps = given["max_epochs"], given["max_steps"]
    if fast:
        max_epochs, max_steps, interval = 1, fast, 1.0
        checked.update(num_sanity_val_steps=0, log_every_n_steps=1)
        limits = {stage: fast if limits[stage] else limits[stage] for stage in limits}  # 0 is "leave it out"
        rank_zero_info(
            f"Running in `fast_dev_run` mode: {fast} batch{'es' if fast > 1 else ''} of everything; nothing is logged,"
            " no checkpoints."
        )
    return Settings(
        durations=resolve_durations(max_epochs, given["min_epochs"], max_steps, given["min_steps"], given["max_time"]),
        limits=limits,
        layer_sync=_take_layer_sync(given),
        val_check_interval=interval,
        check_val_every_n_epoch=1 if fast else given["check_val_every_n_epoch"],
        accumulate_grad_batches=check_integer("accumulate_grad_batches", given["accumulate_grad_batches"], minimum=1),
        default_root_dir=os.path.expanduser(
            os.getcwd() if given["default_root_dir"] is None else given["default_root_dir"]
        ),
        enable_checkpointing=given["enable_checkpointing"] is not False,
        enable_progress_bar=given["enable_progress_bar"] is not False,
        enable_model_summary=given["enable_model_summary"] is not False,
        **checked,
        **{name: given[name] for name in _AS_GIVEN},
    )


def _take_layer_sync(given: dict[str, Any]) -> LayerSync | None:
    """Take the plugin that syncs layers out of ``plugins``: it is the Trainer's, and the others are the runtime's."""
    plugins = one_or_several(given["plugins"])
    found = [each for each in plugins if isinstance(each, LayerSync)]
    if len(found) + given["sync_batchnorm"] > 1:
        both = " and sync_batchnorm=True" if given["sync_batchnorm"] else ""
        names = ", ".join(type(each).__name__ for each in found)
        raise MisconfigurationException(f"plugins has {names}{both}, and one plugin syncs layers: keep one.")
    if found:
        given["plugins"] = [each for each in plugins if each is not found[0]] or None
        return found[0]
    given["plugins"] = plugins or None
    return TorchSyncBatchNorm() if given["sync_batchnorm"] else None


P = ParamSpec("P")


def reads_environment(init: Callable[P, None]) -> Callable[P, None]:
    """Decorate the Trainer's constructor, so that ``PL_TRAINER_<ARGUMENT>`` is the default of an argument.

    A value is a Python literal, such as ``3``, ``0.5``, ``None`` or ``{"hours": 1}``, and a string where it is none. An
    argument that is passed wins, also where it is passed as None. Names that no argument has are ignored.
    """
    variables = {f"PL_TRAINER_{name.upper()}": name for name in list(inspect.signature(init).parameters)[1:]}

    @functools.wraps(init)
    def with_environment(*args: P.args, **kwargs: P.kwargs) -> None:
        found = {name: os.environ[key] for key, name in variables.items() if os.environ.get(key)}
        init(*args, **{**{name: _literal(name, text) for name, text in found.items()}, **kwargs})

    return with_environment


def _literal(name: str, text: str) -> Any:
    """The value that an environment variable stands for, for the argument ``name``."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):  # text, such as "ddp"
        value = {"true": True, "false": False, "none": None}.get(text.strip().lower(), text)
    is_flag = name.startswith("enable_") or name in _FLAGS
    return bool(value) if is_flag and value in (0, 1) else value


_FLAGS = (
    "logger", "benchmark", "inference_mode", "use_distributed_sampler", "detect_anomaly", "barebones", "sync_batchnorm",
    "auto_resume",
)  # fmt: skip


def choose_loggers(logger: Any, settings: Settings) -> list[Logger]:
    """Return the user's loggers, or the default one: TensorBoard, or CSV where TensorBoard is not installed.

    With ``fast_dev_run`` one that writes nothing is in their place, so that what a module does with its logger runs.
    """
    if logger is False:
        return []
    if logger is None or logger is True:
        if settings.fast_dev_run:
            return [DummyLogger()]
        root = settings.default_root_dir
        if find_spec("tensorboard") is not None or find_spec("tensorboardX") is not None:
            return [TensorBoardLogger(root)]
        rank_zero_info(
            "Logging to CSV files, since TensorBoard is not installed: `pip install treadle[trainer]` adds it and the "
            "progress bars."
        )
        return [CSVLogger(root)]
    loggers = checked_loggers(logger)
    return [DummyLogger()] if loggers and settings.fast_dev_run else loggers


def checked_loggers(logger: Any) -> list[Logger]:
    """Return a logger, or several, as a list; None is none.

    Raises:
        MisconfigurationException: one of them is no logger.
    """
    loggers = one_or_several(logger)
    for item in loggers:
        if not isinstance(item, Logger):
            raise MisconfigurationException(
                f"logger has {item!r} of type {type(item).__name__}: pass a Logger, a list of them, True or False."
            )
    return loggers


def choose_callbacks(callbacks: Any, settings: Settings) -> list[Callback]:
    """Return the user's callbacks and the default ones: checkpoint, progress bar, model summary, timer."""
    found = one_or_several(callbacks)
    check_callbacks(found)
    flags = {Checkpoint: "enable_checkpointing", ProgressBar: "enable_progress_bar"}
    for kind, flag in flags.items():
        mine = [c for c in found if isinstance(c, kind)]
        if mine and not getattr(settings, flag):
            raise MisconfigurationException(
                f"{flag}=False, but callbacks has {type(mine[0]).__name__}: leave it out, or set {flag}=True."
            )
    if sum(isinstance(c, ProgressBar) for c in found) > 1:
        raise MisconfigurationException("callbacks has several progress bars; the terminal has room for one: keep one.")
    if settings.durations.max_time is not None:
        if any(isinstance(c, Timer) for c in found):
            rank_zero_info(
                "`Trainer(max_time=...)` has no effect, callbacks list already contains a Timer: leave one of them out."
            )
        else:
            found.append(Timer(settings.durations.max_time))
    if settings.enable_checkpointing and not any(isinstance(c, Checkpoint) for c in found):
        found.append(ModelCheckpoint())
    if settings.enable_progress_bar and not any(isinstance(c, ProgressBar) for c in found):
        found.append(default_progress_bar())
    if settings.enable_model_summary and not any(isinstance(c, ModelSummary) for c in found):
        found.append(ModelSummary())
    return reorder_callbacks(found)
