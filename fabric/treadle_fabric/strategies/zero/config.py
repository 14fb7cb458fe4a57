"""DeepSpeed's config, made of a strategy's arguments, a dict or a JSON file: what contradicts is refused here.

Nothing in this module needs DeepSpeed, or a process group.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from treadle_fabric.checks import check_integer, is_number
from treadle_fabric.errors import MisconfigurationException, near_names

__all__ = ["CONFIG_VARIABLE", "Steps", "check_config", "config_of", "engine_config", "read_config", "stage_of"]

Config = dict[str, Any]

CONFIG_VARIABLE: Final = "PL_DEEPSPEED_CONFIG_PATH"
"""The environment variable that names a JSON file, for a strategy that is given no config."""

_ZERO, _OPTIMIZER, _PARAMETERS = "zero_optimization", "offload_optimizer", "offload_param"
_PLACES: Final[dict[str, tuple[str, ...]]] = {
    "stage": (_ZERO, "stage"),
    "contiguous_gradients": (_ZERO, "contiguous_gradients"),
    "overlap_comm": (_ZERO, "overlap_comm"),
    "allgather_partitions": (_ZERO, "allgather_partitions"),
    "reduce_scatter": (_ZERO, "reduce_scatter"),
    "allgather_bucket_size": (_ZERO, "allgather_bucket_size"),
    "reduce_bucket_size": (_ZERO, "reduce_bucket_size"),
    "sub_group_size": (_ZERO, "sub_group_size"),
    "zero_allow_untested_optimizer": ("zero_allow_untested_optimizer",),
    "logging_batch_size_per_gpu": ("train_micro_batch_size_per_gpu",),
    "offload_optimizer_device": (_ZERO, _OPTIMIZER, "device"),
    "optimizer_buffer_count": (_ZERO, _OPTIMIZER, "buffer_count"),
    "offload_params_device": (_ZERO, _PARAMETERS, "device"),
    "params_buffer_count": (_ZERO, _PARAMETERS, "buffer_count"),
    "params_buffer_size": (_ZERO, _PARAMETERS, "buffer_size"),
    "max_in_cpu": (_ZERO, _PARAMETERS, "max_in_cpu"),
    "block_size": ("aio", "block_size"),
    "queue_depth": ("aio", "queue_depth"),
    "single_submit": ("aio", "single_submit"),
    "overlap_events": ("aio", "overlap_events"),
    "thread_count": ("aio", "thread_count"),
    "partition_activations": ("activation_checkpointing", "partition_activations"),
    "cpu_checkpointing": ("activation_checkpointing", "cpu_checkpointing"),
    "contiguous_memory_optimization": ("activation_checkpointing", "contiguous_memory_optimization"),
    "synchronize_checkpoint_boundary": ("activation_checkpointing", "synchronize_checkpoint_boundary"),
    "loss_scale": ("fp16", "loss_scale"),
    "initial_scale_power": ("fp16", "initial_scale_power"),
    "loss_scale_window": ("fp16", "loss_scale_window"),
    "hysteresis": ("fp16", "hysteresis"),
    "min_loss_scale": ("fp16", "min_loss_scale"),
}
"""Where in the config each argument goes that is one entry of it."""
_BLOCKS: Final = {"float16": "fp16", "bfloat16": "bf16", "float32": None}
_BLOCKS_OF_CONFIG: Final[dict[tuple[str, ...], str]] = {
    (_ZERO,): "{'stage': 2}",
    (_ZERO, _OPTIMIZER): "{'device': 'cpu'}",
    (_ZERO, _PARAMETERS): "{'device': 'cpu'}",
    ("optimizer",): "{'type': 'AdamW', 'params': {'lr': 1e-4}}",
    ("scheduler",): "{'type': 'WarmupLR', 'params': {}}",
    ("fp16",): "{'enabled': True}",
    ("bf16",): "{'enabled': True}",
    ("activation_checkpointing",): "{'partition_activations': True}",
    ("aio",): "{'thread_count': 1}",
}
"""The entries of a config that are dicts, with an example of each."""
_SCHEDULERS: Final = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
_DEVICES: Final = ("cpu", "nvme", "none")


class Steps(NamedTuple):
    """How a trainer steps, of which DeepSpeed's config says something, too."""

    accumulate: int = 1
    """The number of batches of an optimizer step, at first."""
    clip_norm: float | None = None
    """The largest norm of the gradients; 0: any; None: the trainer does not say."""


def read_config(config: Any, environ: Mapping[str, str] | None = None) -> Config | None:
    """Return a config as a dict of its own: a copy of one, or the content of a JSON file.

    Args:
        config: A dict, the path of a file, or None.
        environ: Environment variables, where the file may be named that is read for None. Default: this process's.

    Raises:
        MisconfigurationException: There is no such file, or it holds no JSON object; or ``config`` is something else.
    """
    source = "config"
    if config is None:
        config, source = (os.environ if environ is None else environ).get(CONFIG_VARIABLE), CONFIG_VARIABLE
    if config is None or isinstance(config, Mapping):
        return None if config is None else copy.deepcopy(dict(config))
    if not isinstance(config, str) and not hasattr(config, "__fspath__"):
        raise MisconfigurationException(
            f"DeepSpeedStrategy(config={config!r}): must be a dict, or the path of a JSON file."
        )
    said = f"DeepSpeedStrategy: {source}={str(config)!r}"
    try:
        with open(config, encoding="utf-8") as file:
            found = json.load(file, object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise MisconfigurationException(
            f"{said} cannot be read: {error.strerror}. Give the path of a JSON file, or the config as a dict."
        ) from error
    except ValueError as error:
        raise MisconfigurationException(
            f"{said} holds no JSON: {error}. Correct the file; DeepSpeed's config is a JSON object."
        ) from error
    if not isinstance(found, dict):
        raise MisconfigurationException(
            f"{said} holds a {type(found).__name__}, and DeepSpeed's config is a JSON object, {{...}}."
        )
    return found


def _without_duplicates(pairs: list[tuple[str, Any]]) -> Config:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} comes twice")
    return found


def config_of(given: Config | None, arguments: Mapping[str, Any], defaults: Mapping[str, Any]) -> Config:
    """Make the config that a strategy was asked for, in which the parts that a run decides are still missing.

    Without a config of the user's, all arguments go into it. With one, those that differ from their defaults are added,
    where the config does not say the same already.

    Args:
        given: What :func:`read_config` returned.
        arguments: The strategy's arguments, by name.
        defaults: Their defaults.

    Raises:
        MisconfigurationException: An argument and the config say different things, or cannot go together.
    """
    _check_arguments(arguments)
    own = {name: arguments[name] for name in _PLACES}
    if given is None:
        config: Config = {}
        left_out = {"logging_batch_size_per_gpu"} if own["logging_batch_size_per_gpu"] in (None, "auto") else set()
        if not arguments["zero_optimization"]:
            left_out |= {name for name, place in _PLACES.items() if place[0] == _ZERO}
        for device, block in (("offload_optimizer", _OPTIMIZER), ("offload_parameters", _PARAMETERS)):
            if not arguments[device]:
                left_out |= {name for name, place in _PLACES.items() if place[1:2] == (block,)}
        left_out |= {name for name, place in _PLACES.items() if place[0] == "fp16"}  # only where a run is in 16 bits
        for name in own.keys() - left_out:
            _put(config, _PLACES[name], own[name])
    else:
        config = given
        for name, value in own.items():
            if value != defaults[name]:
                _add(config, name, _PLACES[name], value)
        if not arguments["zero_optimization"]:
            _add(config, "zero_optimization", (_ZERO, "stage"), 0)
        for name, block in (("offload_optimizer", _OPTIMIZER), ("offload_parameters", _PARAMETERS)):
            if arguments[name] and _at(config, (_ZERO, block, "device")) in (None, "none"):
                _add(config, name, (_ZERO, block, "device"), arguments[f"{_WHERE[name]}_device"])
    for block in (_OPTIMIZER, _PARAMETERS):
        if (offload := _at(config, (_ZERO, block))) is not None and isinstance(offload, dict):
            offload.setdefault("pin_memory", arguments["pin_memory"])
            if offload.get("device") == "nvme":
                offload.setdefault("nvme_path", arguments["nvme_path"])
    config.setdefault("zero_allow_untested_optimizer", arguments["zero_allow_untested_optimizer"])
    check_config(config)
    return config


_WHERE: Final = {"offload_optimizer": "offload_optimizer", "offload_parameters": "offload_params"}


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    for name in ("offload_params_device", "offload_optimizer_device", "remote_device"):
        value = arguments[name]
        if value not in (*_DEVICES, *([None] if name == "remote_device" else [])):
            raise MisconfigurationException(
                f"DeepSpeedStrategy({name}={value!r}): must be one of {', '.join(map(repr, _DEVICES))}."
            )
    if arguments["zero_optimization"]:
        stage = check_integer("DeepSpeedStrategy: stage", arguments["stage"], minimum=0)
        if stage > 3:
            raise MisconfigurationException(f"DeepSpeedStrategy(stage={stage}): ZeRO has the stages 0, 1, 2 and 3.")


def _add(config: Config, name: str, place: tuple[str, ...], value: Any) -> None:
    """Add an argument to the user's config.

    Raises:
        MisconfigurationException: The config has another value there.
    """
    there = _at(config, place)
    if there is not None and there != "auto" and there != value:
        raise MisconfigurationException(
            f"DeepSpeedStrategy({name}={value!r}), and the config has {'.'.join(place)}={there!r}. Leave one of them"
            " out, or make them equal."
        )
    _put(config, place, value)


def _at(config: Mapping[str, Any], place: tuple[str, ...]) -> Any:
    """The entry of a config, or None."""
    found: Any = config
    for name in place:
        if not isinstance(found, Mapping) or name not in found:
            return None
        found = found[name]
    return found


def _put(config: Config, place: tuple[str, ...], value: Any) -> None:
    for name in place[:-1]:
        config = config.setdefault(name, {})
    config[place[-1]] = value


def stage_of(config: Mapping[str, Any]) -> int:
    """The stage of ZeRO, as DeepSpeed reads it: 0 unless the config has one."""
    return int(_at(config, (_ZERO, "stage")) or 0)


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse a config that contradicts itself.

    Raises:
        MisconfigurationException: Something in it cannot work.
    """
    _check_kinds(config)
    stage = _at(config, (_ZERO, "stage"))
    if stage is not None and stage not in (0, 1, 2, 3):
        raise MisconfigurationException(
            f"The DeepSpeed config has zero_optimization.stage={stage!r}: ZeRO has the stages 0, 1, 2 and 3."
        )
    if _enabled(config, "fp16") and _enabled(config, "bf16"):
        raise MisconfigurationException("The DeepSpeed config enables fp16 and bf16: enable one of them.")
    scheduler = _at(config, ("scheduler", "type"))
    if scheduler is not None and scheduler not in _SCHEDULERS:
        raise MisconfigurationException(
            f"The DeepSpeed config has scheduler.type={scheduler!r}, and an engine of DeepSpeed has"
            f" {', '.join(_SCHEDULERS)}. {near_names(str(scheduler), _SCHEDULERS)} One of torch's schedulers goes with"
            " an optimizer of your own: make both in the program, and leave them out of the config."
        )
    for block, least, what in ((_OPTIMIZER, 1, "the optimizer state"), (_PARAMETERS, 3, "parameters")):
        device = _at(config, (_ZERO, block, "device"))
        if device in (None, "none"):
            continue
        if device not in _DEVICES:
            raise MisconfigurationException(
                f"The DeepSpeed config has zero_optimization.{block}.device={device!r}. {near_names(device, _DEVICES)}"
            )
        needed = 3 if device == "nvme" else least
        if stage_of(config) < needed:
            raise MisconfigurationException(
                f"{block} to {device!r} with stage {stage_of(config)} of ZeRO: DeepSpeed offloads {what} to it from"
                f" stage {needed} on. Use stage={needed}, or leave the offload out."
            )
        path = _at(config, (_ZERO, block, "nvme_path"))
        if device == "nvme" and not (path is not None and os.path.isdir(path)):
            raise MisconfigurationException(
                f"{block} to 'nvme' needs a folder on such a disk, and nvme_path={path!r} is none. Make it on every"
                " machine, or give another one: DeepSpeedStrategy(nvme_path=...)."
            )


def _check_kinds(config: Mapping[str, Any]) -> None:
    """Refuse what is no dict, or no number, where DeepSpeed's config has one."""
    for place, example in _BLOCKS_OF_CONFIG.items():
        block = _at(config, place)
        if block is not None and not isinstance(block, Mapping):
            raise MisconfigurationException(
                f"The DeepSpeed config has {'.'.join(place)}={block!r}, and needs a dict there: {example}, for example."
            )
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if config.get(name) not in (None, "auto"):
            check_integer(f"The DeepSpeed config: {name}", config[name], minimum=1)
    clip = config.get("gradient_clipping")
    if clip not in (None, "auto") and (not is_number(clip) or not clip >= 0):
        raise MisconfigurationException(
            f"The DeepSpeed config has gradient_clipping={clip!r}, and needs a number from 0, the largest norm, there."
        )


def _enabled(config: Mapping[str, Any], block: str) -> bool:
    return bool(_at(config, (block, "enabled")))


def check_precision(config: Mapping[str, Any], precision: str, dtype: str) -> None:
    """Refuse a precision that is not the one of the config.

    Args:
        config: The config.
        precision: Its name, such as ``"bf16-mixed"``.
        dtype: That of the weights: ``"float32"``, ``"float16"`` or ``"bfloat16"``.

    Raises:
        MisconfigurationException: The config says another one.
    """
    wanted = _BLOCKS[dtype]
    for block, instead in (("fp16", "16-mixed"), ("bf16", "bf16-mixed")):
        said = _at(config, (block, "enabled"))
        if said not in (None, "auto") and bool(said) != (block == wanted):
            raise MisconfigurationException(
                f"precision={precision!r}, and the DeepSpeed config has {block}.enabled={said!r}. "
                + (f"Give precision={instead!r}, or leave {block!r} out." if said else f"Leave {block!r} out.")
            )


def check_steps(config: Mapping[str, Any], steps: Steps) -> None:
    """Refuse what a trainer was asked for and the config says otherwise.

    Raises:
        MisconfigurationException: They accumulate or clip differently.
    """
    said = config.get("gradient_accumulation_steps")
    if said not in (None, "auto", 1) and said != steps.accumulate:
        raise MisconfigurationException(
            f"accumulate_grad_batches={steps.accumulate}, and the DeepSpeed config has"
            f" gradient_accumulation_steps={said!r}. Leave it out of the config: the Trainer accumulates."
        )
    clip = config.get("gradient_clipping")
    if clip not in (None, "auto", steps.clip_norm) and steps.clip_norm is not None:
        raise MisconfigurationException(
            f"gradient_clip_val={steps.clip_norm}, and the DeepSpeed config has gradient_clipping={clip!r}."
            " Leave one of them out, or make them equal."
        )


def check_batch(config: Mapping[str, Any], world_size: int) -> None:
    """Refuse numbers of samples that DeepSpeed's rule does not allow.

    Raises:
        MisconfigurationException: The batch is not the product of its parts.
    """
    batch, micro = config.get("train_batch_size"), config.get("train_micro_batch_size_per_gpu")
    steps = config.get("gradient_accumulation_steps")
    steps = 1 if steps in (None, "auto") else steps
    if batch in (None, "auto") or micro in (None, "auto"):
        if batch not in (None, "auto") and batch % (world_size * steps):
            raise MisconfigurationException(
                f"The DeepSpeed config has train_batch_size={batch}, which {world_size} processes with"
                f" gradient_accumulation_steps={steps} cannot share out evenly. Leave it out: the batch size is that of"
                " the loader."
            )
        return
    if batch != micro * steps * world_size:
        raise MisconfigurationException(
            f"The DeepSpeed config has train_batch_size={batch}, and train_micro_batch_size_per_gpu={micro} x"
            f" gradient_accumulation_steps={steps} x {world_size} processes is {micro * steps * world_size}. Leave"
            " train_batch_size out."
        )


def engine_config(
    config: Config, *, dtype: str, scaling: Mapping[str, Any], world_size: int, batch: int | None, steps: Steps | None
) -> Config:
    """Make the config for an engine: what a run has decided, added.

    Where the config accumulates nothing itself, gradients accumulate until the optimizer steps.

    Args:
        config: What :func:`config_of` made.
        dtype: That of the weights.
        scaling: How losses are scaled in float16: the arguments ``loss_scale`` and following.
        world_size: The number of processes.
        batch: The number of samples of a loader's batch, if it is known.
        steps: How a trainer steps; None in a loop by hand.
    """
    made = copy.deepcopy(config)
    if (block := _BLOCKS[dtype]) is not None:
        _put(made, (block, "enabled"), True)
    if block == "fp16":
        for name, value in scaling.items():
            made["fp16"].setdefault(_PLACES[name][1], value)
    made.setdefault("zero_force_ds_cpu_optimizer", False)  # the user's own optimizer steps, on the host too
    accumulate = made.get("gradient_accumulation_steps")
    if steps is not None or accumulate in (None, "auto", 1):
        accumulate = 1
        made.setdefault("managed_gradient_accumulation", False)
        if stage_of(made) < 2 and isinstance(made.get(_ZERO), dict):
            made[_ZERO]["overlap_comm"] = False  # gradients are reduced when the optimizer steps
    made["gradient_accumulation_steps"] = accumulate
    if steps is not None and steps.clip_norm is not None:
        made["gradient_clipping"] = steps.clip_norm
    if made.get("gradient_clipping") in (None, "auto"):
        made["gradient_clipping"] = 0.0  # DeepSpeed would clip at 1
    for name in [name for name, value in made.items() if value == "auto"]:
        del made[name]
    total = made.get("train_batch_size")
    shares = accumulate * world_size
    micro = made.get("train_micro_batch_size_per_gpu") or (total // shares if total else batch or 1)
    made |= {"train_micro_batch_size_per_gpu": micro, "train_batch_size": micro * shares}
    return made
