"""Turn the user's arguments and the environment into a plan, and the plan into a strategy.

:func:`resolve` is pure where ``environ``, ``available`` and ``interactive`` are given, so that each combination can be
a row in a test; :func:`build` makes the objects.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from treadle_fabric.accelerators import ACCELERATOR_REGISTRY, Accelerator
from treadle_fabric.accelerators.accelerator import parse_indices
from treadle_fabric.checkpoint import CheckpointIO
from treadle_fabric.checks import check_integer, is_several, one_or_several
from treadle_fabric.environments import ClusterEnvironment, Detection, detect, refuse_contradiction
from treadle_fabric.errors import DeviceUnavailableError, MisconfigurationException, unknown_name
from treadle_fabric.launchers import in_notebook, settle
from treadle_fabric.precision import Precision, canonical_precision, make_precision, refuse_device
from treadle_fabric.rank_zero import PossibleUserWarning, rank_zero_info, rank_zero_warn
from treadle_fabric.strategies import STRATEGY_REGISTRY, Parts, Strategy

__all__ = ["LauncherKind", "Plan", "available_devices", "build", "launched_by_run", "resolve", "run_variables"]

T = TypeVar("T")
_PLUGINS = {
    Precision: ("precision", "precision"),
    CheckpointIO: ("checkpoint_io", "checkpoint IO"),
    ClusterEnvironment: ("environment", "cluster environment"),
}
# The options of `treadle-fabric run` with their defaults; a script that leaves the default gets what the command says.
_RUN_OPTIONS: dict[str, Any] = {
    "accelerator": "auto",
    "strategy": "auto",
    "devices": "auto",
    "num_nodes": 1,
    "precision": None,
}
_RUN_PREFIX = "TREADLE_RUN_"
_LAUNCHED = f"{_RUN_PREFIX}LAUNCHED"
LauncherKind = Literal["none", "external", "subprocess", "spawn", "fork", "forkserver"]


@dataclass(frozen=True)
class Plan:
    """What will run: everything that is decided before any work starts."""

    accelerator: Accelerator
    devices: tuple[torch.device, ...]
    """One for each process on this machine; the same one several times where each process sees it under that index."""
    num_nodes: int
    strategy: str | Strategy
    """A registered name, or the user's object."""
    start_method: str | None
    """How the strategy starts processes; None where there is one process."""
    environment: ClusterEnvironment
    launcher: LauncherKind
    precision: str | Precision
    """A full name, or the user's object."""
    checkpoint_io: CheckpointIO | None
    notes: tuple[str, ...] = ()
    """Messages for the user about choices that may surprise."""
    warnings: tuple[str, ...] = ()
    """What is probably a mistake in how the processes were started."""

    @property
    def num_processes(self) -> int:
        """The number of processes on this machine."""
        return len(self.devices)

    @property
    def world_size(self) -> int:
        """The number of processes on all machines."""
        return self.num_processes * self.num_nodes


def resolve(
    *,
    accelerator: str | Accelerator = "auto",
    strategy: str | Strategy = "auto",
    devices: Iterable[int] | str | int = "auto",
    num_nodes: int = 1,
    precision: str | int | Precision | None = None,
    plugins: Any = None,
    environ: Mapping[str, str] | None = None,
    available: Mapping[str, int] | None = None,
    interactive: bool | None = None,
) -> Plan:
    """Decide what will run.

    Args:
        accelerator: A registered name, ``"gpu"`` for any GPU, ``"auto"`` for the best there is, or an object.
        strategy: A registered name, ``"auto"``, or an object.
        devices: A number, a list of indices, ``"auto"``, or -1 for all.
        num_nodes: The number of machines.
        precision: Any name that :func:`canonical_precision` knows, or an object.
        plugins: One object or a list: at most one precision, one checkpoint IO and one cluster environment.
        environ: The environment variables. Default: those of this process.
        available: The number of devices on this machine by accelerator name. Default: they are counted.
        interactive: Whether this is a notebook. Default: it is found out.

    Raises:
        MisconfigurationException: A value or a combination cannot work.
        DeviceUnavailableError: This machine does not have the devices.
    """
    if environ is None:
        settle()
    own = strategy.given if isinstance(strategy, Strategy) else Parts()
    given = _sort(plugins)
    detection = _find_environment(own, given, environ)
    environment, notes = detection.environment, list(detection.notes)
    said: dict[str, Any] = {
        "accelerator": accelerator,
        "strategy": strategy,
        "devices": devices,
        "num_nodes": num_nodes,
        "precision": own.precision or given.precision or precision,
    }
    asked, words = _with_run_options(said, os.environ if environ is None else environ)
    accelerator, strategy = asked["accelerator"], asked["strategy"]
    devices, num_nodes = asked["devices"], asked["num_nodes"]
    precision = asked["precision"] if said["precision"] is None else precision
    notes += words
    interactive = in_notebook() if interactive is None else interactive
    available = available_devices() if available is None else available
    num_nodes = check_integer("num_nodes", num_nodes, minimum=1)
    num_nodes = environment.started_nodes() or 1 if num_nodes == 1 else num_nodes
    devices = list(devices) if is_several(devices) else devices  # type: ignore[arg-type]
    sample = _sample(strategy)
    checkpoint_io = _one("checkpoint IO", own.checkpoint_io, given.checkpoint_io)
    hardware = _choose_accelerator(accelerator, own, environment, available)
    chosen = _choose_devices(devices, hardware, own, environment, available)
    if sample is None:
        if interactive and devices == "auto" and len(chosen) > 1 and not environment.creates_processes_externally:
            notes.append(
                f"In a notebook one of {len(chosen)} devices is used, because several need processes of their own. "
                f"For all of them: {_in_notebook(hardware, len(chosen))}."
            )
            chosen = chosen[:1]
        several = len(chosen) * num_nodes > 1 or environment.started_processes() > 1
        strategy = hardware.automatic_strategies[several]
        strategy = "ddp_fork" if interactive and strategy == "ddp" else strategy
        sample = _sample(strategy)
    elif not sample.uses_process_group:
        chosen = _single(chosen, devices, num_nodes, strategy)
    assert sample is not None
    _check_hardware(strategy, sample, hardware)
    start_method = sample.start_method
    launcher = _choose_launcher(start_method, environment)
    _check_processes(len(chosen), num_nodes, strategy, hardware, launcher, interactive)
    if sample.uses_process_group:
        environment.validate_settings(len(chosen), num_nodes)
    return Plan(
        accelerator=hardware,
        devices=tuple(chosen),
        num_nodes=num_nodes,
        strategy=strategy,
        start_method=start_method,
        environment=environment,
        launcher=launcher,
        precision=_choose_precision(precision, own, given, hardware, sample),
        checkpoint_io=checkpoint_io,
        notes=tuple(notes),
        warnings=detection.warnings,
    )


def build(plan: Plan) -> Strategy:
    """Make the strategy of a plan, with all its parts, ready to launch."""
    for note in plan.notes:
        rank_zero_info(note)
    for warning in plan.warnings:
        rank_zero_warn(warning, category=PossibleUserWarning)
    strategy = STRATEGY_REGISTRY.get(plan.strategy) if isinstance(plan.strategy, str) else plan.strategy
    precision = plan.precision
    if isinstance(precision, str):
        precision = make_precision(precision, plan.devices[0].type)
    parts = Parts(plan.accelerator, plan.devices, precision, plan.checkpoint_io, plan.environment)
    strategy.bind(parts, plan.num_nodes)
    return strategy


def available_devices() -> dict[str, int]:
    """Count this machine's devices of each registered accelerator, in the order of preference."""
    kinds = sorted(_accelerators(), key=lambda entry: entry[1].is_emulated())
    return {name: kind.auto_device_count() if kind.is_available() else 0 for name, kind in kinds}


def _accelerators() -> list[tuple[str, type[Accelerator]]]:
    """The accelerators by name."""
    return [(name, ACCELERATOR_REGISTRY.class_of(name)) for name in ACCELERATOR_REGISTRY]


def _find_environment(own: Parts, given: Parts, environ: Mapping[str, str] | None) -> Detection:
    """The cluster environment that was given, or the one that is detected, with what to tell of it."""
    environment = _one("cluster environment", own.environment, given.environment)
    if environment is None:
        return detect(environ)
    refuse_contradiction(environment, environ)
    return Detection(environment, "")


def run_variables(options: Mapping[str, Any], *, launched: bool = False) -> dict[str, str]:
    """Return the environment variables by which Fabric and the Trainer in a script learn of a command's options.

    Args:
        options: The options of ``treadle-fabric run`` that were given, by name.
        launched: Whether the script runs in every process already.
    """
    variables = {f"{_RUN_PREFIX}{name.upper()}": str(value) for name, value in options.items()}
    return {**variables, _LAUNCHED: "1"} if launched else variables


def launched_by_run(environ: Mapping[str, str] | None = None) -> bool:
    """Whether ``treadle-fabric run`` runs the script in every process, so that the script need not launch."""
    return _LAUNCHED in (os.environ if environ is None else environ)


def _with_run_options(said: dict[str, Any], environ: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Return the arguments of a script, those that it left open as ``treadle-fabric run`` has them, and what to tell.

    Raises:
        MisconfigurationException: The script asks for another number of processes than the command.
    """
    found, notes = dict(said), []
    for name, default in _RUN_OPTIONS.items():
        value, own = environ.get(f"{_RUN_PREFIX}{name.upper()}"), said[name]
        option = f"`treadle-fabric run --{name.replace('_', '-')} {value}`"
        if value is None:
            continue
        if own is default or own == default:
            found[name] = int(value) if name == "num_nodes" else value
        elif name in ("devices", "num_nodes") and _count(own) != _count(value):
            raise MisconfigurationException(
                f"The script says {name}={own!r}, and it runs under {option}. Leave one out, or make them equal."
            )
        elif name != "devices" and str(getattr(own, "precision", own)) != value:
            notes.append(f"The script says {name}={own!r}, and {option} does not change that.")
    if _LAUNCHED in environ and isinstance(found["strategy"], str | Strategy):
        sample = _sample(found["strategy"])
        if sample is not None and not sample.uses_process_group:
            raise MisconfigurationException(
                f"The script says strategy={said['strategy']!r}, which is for one process, and `treadle-fabric run` "
                "started several. Leave the strategy out, or run the script with --devices 1."
            )
    return found, notes


def _count(devices: Any) -> int | None:
    """The number of devices that an argument asks for; None where it depends on the machine, or is no such argument."""
    if isinstance(devices, str):
        text = devices.strip()
        if "," in text:
            return len([part for part in text.split(",") if part.strip()])
        devices = int(text) if text.removeprefix("-").isdecimal() else None
    if isinstance(devices, int):
        return devices if devices >= 0 else None
    return len(devices) if is_several(devices) else None


def _sort(plugins: Any) -> Parts:
    """Sort the plugins into the parts of a strategy."""
    found: dict[str, Any] = {}
    for plugin in one_or_several(plugins):
        for kind, (name, what) in _PLUGINS.items():
            if isinstance(plugin, kind):
                found[name] = _one(what, found.get(name), plugin)
                break
        else:
            raise MisconfigurationException(
                f"plugins has {plugin!r}, and takes a Precision, a CheckpointIO and a ClusterEnvironment, one "
                "object of each. Names of precisions go into precision=."
            )
    return Parts(**found)


def _one(what: str, first: T | None, second: T | None) -> T | None:
    """Return the object that was given, if any, and refuse two different ones.

    The same object given twice is no conflict, because a strategy may be used again.
    """
    if first is not None and second is not None and first is not second:
        raise MisconfigurationException(
            f"Two objects for the {what} were given: {type(first).__name__} and {type(second).__name__}. Give one, "
            "either in plugins or to the strategy."
        )
    return second if first is None else first


def _sample(strategy: Any) -> Strategy | None:
    """Return a strategy object whose capabilities can be read; None for ``"auto"``."""
    if strategy == "auto" or isinstance(strategy, Strategy):
        return None if strategy == "auto" else strategy
    if isinstance(strategy, str):
        if strategy in STRATEGY_REGISTRY.available_strategies():
            return STRATEGY_REGISTRY.get(strategy)
        names = ["auto", *STRATEGY_REGISTRY.available_strategies()]
        raise unknown_name("strategy", strategy, names)
    raise MisconfigurationException(f"strategy={strategy!r} is neither a name nor a Strategy object.")


def _choose_accelerator(
    accelerator: Any, own: Parts, environment: ClusterEnvironment, available: Mapping[str, int]
) -> Accelerator:
    if own.accelerator is not None and accelerator not in ("auto", own.accelerator, own.accelerator.name()):
        raise MisconfigurationException(
            f"accelerator={accelerator!r}, but the strategy object has {type(own.accelerator).__name__}. Give one."
        )
    if own.accelerator is not None:
        return own.accelerator
    if isinstance(accelerator, Accelerator):
        return accelerator
    if not isinstance(accelerator, str):
        raise MisconfigurationException(f"accelerator={accelerator!r} is neither a name nor an Accelerator object.")
    there = [name for name, count in available.items() if count > 0]
    if accelerator == "auto":
        given = own.devices[0] if own.devices else environment.assigned_device()
        name = there[0] if given is None else _accelerator_of(given.type)
    elif accelerator == "gpu":
        gpus = [name for name in there if ACCELERATOR_REGISTRY.class_of(name).is_gpu]
        if not gpus:
            raise DeviceUnavailableError(f"accelerator='gpu', but this machine has none. There is: {', '.join(there)}.")
        name = gpus[0]
    else:
        name = accelerator
    if name not in ACCELERATOR_REGISTRY:
        names = ["auto", "gpu", *ACCELERATOR_REGISTRY]
        raise unknown_name("accelerator", accelerator, names)
    if available.get(name, 1) == 0:
        ACCELERATOR_REGISTRY.class_of(name).check_installed()
        raise DeviceUnavailableError(
            f"accelerator={accelerator!r}, but this machine has no {name} device. There is: {', '.join(there)}."
        )
    return ACCELERATOR_REGISTRY.get(name)


def _accelerator_of(device_type: str) -> str:
    """The name of the accelerator whose devices have a type of torch's."""
    names = (name for name, kind in _accelerators() if kind.device_type == device_type)
    return next(names, device_type)


def _check_hardware(strategy: str | Strategy, sample: Strategy, hardware: Accelerator) -> None:
    """Refuse a strategy on hardware that is not its own, where one of them is made for the other."""
    name, own = strategy if isinstance(strategy, str) else type(strategy).__name__, hardware.name()
    if sample.only_on not in ("", own):
        raise MisconfigurationException(
            f"strategy={name!r} runs on accelerator={sample.only_on!r} only, and the accelerator is {own!r}. Use "
            f"strategy='auto', or accelerator={sample.only_on!r}."
        )
    if hardware.has_own_strategies and sample.only_on != own:
        single, several = hardware.automatic_strategies
        raise MisconfigurationException(
            f"strategy={name!r} does not run on accelerator={own!r}, which has strategies of its own. Use "
            f"strategy='auto', {single!r} or {several!r}."
        )


def _choose_devices(
    devices: Any, hardware: Accelerator, own: Parts, environment: ClusterEnvironment, available: Mapping[str, int]
) -> list[torch.device]:
    if own.devices and devices in ("auto", len(own.devices)):
        return list(own.devices)
    if (given := _assigned(devices, hardware, environment)) is not None:
        return given
    if (shared := _one_visible(devices, hardware, environment, available)) is not None:
        return shared
    if devices == "auto":
        devices = environment.processes_per_node() or available.get(hardware.name(), hardware.auto_device_count())
    if hardware.is_gpu:
        indices = parse_indices(devices, hardware.name(), available.get(hardware.name(), 0))
        return [torch.device(hardware.name(), index) for index in indices]
    return hardware.get_parallel_devices(hardware.parse_devices(devices))


def _assigned(devices: Any, hardware: Accelerator, environment: ClusterEnvironment) -> list[torch.device] | None:
    """Return the device that the environment gave to this process, once for each on this machine; None without one.

    Which devices the others have, only they know.
    """
    device, started = environment.assigned_device(), environment.processes_per_node() or 1
    if (
        device is None
        or device.type != hardware.name()
        or is_several(devices)
        or _count(devices) not in (None, started)
    ):
        return None  # the number is refused where the environment is asked for it
    return [device] * started


def _one_visible(
    devices: Any, hardware: Accelerator, environment: ClusterEnvironment, available: Mapping[str, int]
) -> list[torch.device] | None:
    """Return the device of each process where each was started to see one GPU, which has index 0 in all; else None.

    SLURM's ``--gpus-per-task`` does that, and a CUDA_VISIBLE_DEVICES by rank. Where it is in truth one GPU that all
    see, the ranks find out when they meet.
    """
    name = hardware.name()
    if not hardware.is_gpu or not hardware.has_process_group or available.get(name, 0) != 1:
        return None
    if not environment.creates_processes_externally:
        return None
    count = int(devices) if isinstance(devices, str) and devices.strip().removeprefix("-").isdecimal() else devices
    started = environment.processes_per_node()
    if started is None:  # only the user knows the number
        started = count if isinstance(count, int) and not isinstance(count, bool) and count > 1 else 1
    if started == 1:
        return None
    if isinstance(count, bool) or count not in ("auto", -1, 1, started):
        raise DeviceUnavailableError(
            f"devices={devices!r}, but {started} processes were started on this machine, and each of them sees one "
            f"{name} device, as number 0. Use devices='auto', or devices={started}."
        )
    return [torch.device(name, 0)] * started


def _single(chosen: list[torch.device], devices: Any, num_nodes: int, strategy: Any) -> list[torch.device]:
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    if num_nodes > 1 or (devices not in ("auto", -1, "-1", 1, "1") and len(chosen) > 1):
        raise MisconfigurationException(
            f"strategy={name!r} uses one device, and devices={devices!r} with num_nodes={num_nodes} asks for more. "
            "Use strategy='auto', or devices=1 and num_nodes=1."
        )
    return chosen[:1]


def _in_notebook(hardware: Accelerator, number: int) -> str:
    """What runs several processes from a notebook."""
    if hardware.has_own_strategies:
        return f"a script, with devices={number}"
    return f"devices={number}, strategy='ddp_notebook'"


def _choose_launcher(start_method: str | None, environment: ClusterEnvironment) -> LauncherKind:
    if start_method is None:
        return "none"
    if environment.creates_processes_externally:
        return "external"
    return "subprocess" if start_method == "popen" else start_method  # type: ignore[return-value]


def _check_processes(
    num_processes: int, num_nodes: int, strategy: Any, hardware: Accelerator, launcher: LauncherKind, interactive: bool
) -> None:
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    if launcher != "none" and not hardware.has_process_group:
        raise MisconfigurationException(
            f"strategy={name!r} needs a process group, and torch has none for accelerator={hardware.name()!r}. Use "
            "strategy='auto' and devices=1, or accelerator='cpu'."
        )
    if launcher in ("spawn", "fork", "forkserver") and num_nodes > 1:
        raise MisconfigurationException(
            f"strategy={name!r} starts processes on one machine only, and num_nodes={num_nodes}. Use strategy='ddp'."
        )
    if interactive and num_processes > 1 and launcher in ("subprocess", "spawn", "forkserver"):
        raise MisconfigurationException(
            f"strategy={name!r} cannot start its {num_processes} processes from a notebook, which is no script. Use "
            f"{_in_notebook(hardware, num_processes)}."
        )


def _choose_precision(
    precision: Any, own: Parts, given: Parts, hardware: Accelerator, strategy: Strategy
) -> str | Precision:
    chosen = _one("precision", own.precision, given.precision)
    if isinstance(precision, Precision):
        chosen = _one("precision", chosen, precision)
        precision = None
    if chosen is not None:
        if precision is not None and canonical_precision(precision) != chosen.precision:
            raise MisconfigurationException(
                f"precision={precision!r}, and a {type(chosen).__name__} object was given as well. Give one."
            )
        if chosen.replaces_parameters and strategy.shards_parameters:
            raise MisconfigurationException(
                f"{type(strategy).__name__} shares parameters out over the processes, and those that "
                f"{type(chosen).__name__} makes cannot be cut. Use strategy='ddp', or another precision."
            )
        return chosen
    name = canonical_precision(precision)
    refuse_device(name, hardware.name())
    if name == "64-true" and not hardware.has_float64:
        raise MisconfigurationException(
            f"precision={precision!r}, but accelerator={hardware.name()!r} has no 64-bit floating point. "
            "Use '32-true' or accelerator='cpu'."
        )
    return name
