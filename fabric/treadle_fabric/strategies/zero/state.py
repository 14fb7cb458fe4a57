"""Strategies whose engine is DeepSpeed's: what a checkpoint gets of it and gives back."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from treadle_fabric.checkpoint import in_memory
from treadle_fabric.checkpoint.distributed.split import map_leaves
from treadle_fabric.checkpoint.values.kept import KeptTensor, are_kept
from treadle_fabric.checkpoint.zero.ours import state_key, weight_key
from treadle_fabric.errors import CheckpointMismatchError
from treadle_fabric.strategies.parts import own_groups
from treadle_fabric.strategies.states.checkpointing import CheckpointingStrategy
from treadle_fabric.strategies.states.whole_state import complete_state, load_complete_state
from treadle_fabric.strategies.unwrapping import (
    load_module_state,
    module_state,
    names_in,
    user_module,
    with_plain_names,
)
from treadle_fabric.strategies.zero.accumulating import engine_buffers, fill_engine_buffers
from treadle_fabric.strategies.zero.partitioned import (
    Held,
    base_optimizer,
    full_shape,
    gathered,
    held_parts,
    is_partitioned,
    master_dtype,
    put_part,
    put_weight,
    renew_whole_copies,
    trained,
)
from treadle_fabric.strategies.zero.writing import ZeroWriter

__all__ = ["ZeroStateStrategy"]

_COUNTERS: Final = ("global_steps", "global_samples", "skipped_steps", "micro_steps")


class ZeroStateStrategy(CheckpointingStrategy):
    """A strategy under which DeepSpeed's engine holds parameters, gradients and optimizer state, in parts.

    A checkpoint folder has DeepSpeed's own files in it, which DeepSpeed loads, too. Whole tensors are put together from
    them when the folder is read, so that it is a checkpoint like any other for every strategy and number of processes;
    and each rank takes its part of whole tensors, wherever they come from.

    With a checkpoint IO that writes single files, the tensors are gathered one after the other, and rank 0 keeps them
    on the host.
    """

    @property
    @abstractmethod
    def engine(self) -> Any:
        """The ``DeepSpeedEngine`` that was set up last; ``None`` before."""

    @property
    @abstractmethod
    def leaves_frozen_out(self) -> bool:
        """Whether checkpoints have no frozen parameters."""

    @property
    def writes_folders(self) -> bool:
        return True

    def get_module_state_dict(self, module: Module) -> dict[str, Any]:
        """The state of the user's module, with whole parameters on rank 0, and on the meta device on other ranks.

        Every rank calls this. In a save to a folder, DeepSpeed's files have the parameters, and none is gathered; see
        :func:`kept_by_engines`.
        """
        state, engine = module_state(module), self.engine
        if self.leaves_frozen_out:
            for name in self._frozen(module):
                state.pop(name, None)
        if engine is None or not self._is_of(module) or not is_partitioned(engine):
            return state
        own, writer, trains = user_module(module), self._writer(), trained(engine)
        for name, parameter in with_plain_names(own, own.named_parameters(remove_duplicate=False)):
            if name in state and parameter in engine.param_names and parameter.numel() + _numel(parameter):
                dtype = master_dtype(engine) if id(parameter) in trains else parameter.dtype
                key = weight_key(engine.param_names[parameter])
                state[name] = KeptTensor(writer, key, full_shape(parameter), dtype)
        return self.as_stored(state)

    def load_module_state_dict(self, module: Module, state_dict: dict[str, Any], strict: bool = True) -> None:
        engine = self.engine
        if engine is None or not self._is_of(module):
            load_module_state(module, state_dict, strict=strict)
            return
        own = user_module(module)
        state = dict(names_in(own, state_dict))
        parameters = dict(own.named_parameters(remove_duplicate=False))
        parts = {id(held.parameter): held for held in held_parts(engine)} if is_partitioned(engine) else {}
        _check_shapes(state, parameters)
        with torch.no_grad():
            for name, parameter in parameters.items():
                value = state.get(name)
                if not isinstance(value, Tensor):
                    continue
                held = parts.get(id(parameter))
                if held is not None or hasattr(parameter, "ds_tensor"):
                    whole = in_memory(value)
                    put_weight(engine, parameter, whole)
                    if held is not None:
                        put_part(held, held.flat, whole)
                if hasattr(parameter, "ds_tensor"):
                    state[name] = parameter.detach()  # of no element here: the rank has its part already
            if self.leaves_frozen_out:
                state = {**{name: parameters[name].detach() for name in self._frozen(module)}, **state}
            load_module_state(module, state, strict=strict)
            renew_whole_copies(engine)

    def get_optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of an optimizer as torch has it: by parameters, with their shapes."""
        engine = self.engine
        if engine is None or optimizer is not base_optimizer(engine):
            return complete_state(optimizer)
        counters = {"engine": _counters(engine)}
        if not is_partitioned(engine):
            return {**complete_state(optimizer), **counters}
        writer, parts = self._writer(), {id(held.parameter): held for held in held_parts(engine)}
        scalars, flats = _entries(optimizer, list(parts.values()))
        states: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        trains = trained(engine)
        for group, parameters in zip(optimizer.param_groups, own_groups(optimizer), strict=True):
            first = sum(len(each["params"]) for each in groups)
            for key, parameter in enumerate(parameters, first):
                if id(parameter) in trains and (scalars or flats):
                    name, shape = engine.param_names[parameter], full_shape(parameter)
                    kept = {k: KeptTensor(writer, state_key(name, k), shape, dtype) for k, dtype in flats.items()}
                    states[key] = {**{k: _copied(v) for k, v in scalars.items()}, **kept}  # each has its own count
            options = {key: value for key, value in group.items() if key != "params"}
            groups.append({**options, "params": list(range(first, first + len(parameters)))})
        return self.as_stored({"state": states, "param_groups": groups, **counters})

    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        engine = self.engine
        if engine is None or optimizer is not base_optimizer(engine):
            load_complete_state(optimizer, in_memory(state))
            return
        if is_partitioned(engine):
            self._load_parts(optimizer, state)
        else:
            load_complete_state(optimizer, in_memory(state))
        _set_counters(engine, in_memory(state.get("engine", {})))

    def _load_parts(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        engine, groups = self.engine, state["param_groups"]
        have = own_groups(optimizer)
        if [len(group["params"]) for group in groups] != list(map(len, have)):
            raise ValueError("loaded state dict contains parameter groups that do not match the optimizer's")
        for group, saved in zip(optimizer.param_groups, groups, strict=True):
            group.update({key: in_memory(value) for key, value in saved.items() if key != "params"})
        keys = [key for group in groups for key in group["params"]]
        by_parameter = {id(p): key for p, key in zip((p for each in have for p in each), keys, strict=True)}
        by_flat: dict[int, list[Held]] = {}
        for held in held_parts(engine):
            by_flat.setdefault(id(held.flat), []).append(held)
        with torch.no_grad():
            for parts in by_flat.values():
                found = [(held, state["state"].get(by_parameter[id(held.parameter)], {})) for held in parts]
                optimizer.state[parts[0].flat] = _state_of_flat(optimizer.state.get(parts[0].flat, {}), found)
        if hasattr(engine.optimizer, "_link_all_hp_params"):
            engine.optimizer._link_all_hp_params()

    def as_stored(self, content: dict[str, Any]) -> dict[str, Any]:
        if self.checkpoint_io.sharded and are_kept():
            return content
        engine = self.engine
        parts: dict[int, Held] = {}
        by_name: dict[str, Any] = {}

        def gather(value: Any, name: str) -> Any:
            if not isinstance(value, KeptTensor):
                return value
            if not by_name:
                parts.update({id(held.parameter): held for held in held_parts(engine)})
                by_name.update({name: parameter for parameter, name in engine.param_names.items()})
            kind, _, rest = value.key.partition("/")
            entry, _, of_state = rest.partition("/")
            which, key = (rest, None) if kind == "weight" else (of_state, entry)
            whole = gathered(engine, parts, by_name[which], key)
            return whole.cpu() if self.is_global_zero else whole.to("meta")

        found: dict[str, Any] = map_leaves(content, gather, "")
        return found

    @property
    def gradient_layout(self) -> str:
        engine = self.engine
        if engine is None or not is_partitioned(engine):
            return ""
        offload = ", in memory of the host" if getattr(engine.optimizer, "cpu_offload", False) else ""
        offload = ", in memory of the host" if getattr(engine.optimizer, "offload_optimizer", False) else offload
        return f"ZeRO {engine.zero_optimization_stage()} on {self.world_size} processes{offload}"

    def engine_state(self) -> dict[str, Any]:
        """What DeepSpeed's engine keeps from one micro-batch to the next, on this rank."""
        engine = self.engine
        return {} if engine is None else {"counters": _counters(engine), **engine_buffers(engine)}

    def load_engine_state(self, state: Mapping[str, Any]) -> None:
        engine = self.engine
        if engine is not None and state:
            _set_counters(engine, state.get("counters", {}))
            fill_engine_buffers(engine, state)

    def _is_of(self, module: Module) -> bool:
        """Whether a module is the one in the engine, or a wrapper of it."""
        return user_module(module) is user_module(self.engine.module) or user_module(module) is self.engine

    def take_over_weights(self, module: Module) -> None:
        """The optimizer steps copies of the parameters, which get their values."""
        engine = self.engine
        if engine is not None and self._is_of(module):
            with torch.no_grad():
                for held in held_parts(engine) if is_partitioned(engine) else ():
                    put_part(held, held.flat, held.parameter)
                renew_whole_copies(engine)

    @staticmethod
    def _frozen(module: Module) -> list[str]:
        own = user_module(module)
        named = with_plain_names(own, own.named_parameters(remove_duplicate=False))
        return [name for name, parameter in named if not parameter.requires_grad]

    def _writer(self) -> ZeroWriter:
        engine = self.engine
        found: ZeroWriter | None = getattr(engine, "_treadle_writer", None)
        if found is None:
            found = engine._treadle_writer = ZeroWriter(engine, self.leaves_frozen_out)
        return found


def _numel(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", 0))


def _check_shapes(state: Mapping[str, Any], parameters: Mapping[str, Parameter]) -> None:
    unlike = [
        f"{name}: {list(value.shape)} in the checkpoint, {list(full_shape(parameters[name]))} here"
        for name, value in state.items()
        if name in parameters and isinstance(value, Tensor) and value.shape != full_shape(parameters[name])
    ]
    if unlike:
        raise RuntimeError(f"shapes differ: {'; '.join(unlike[:5])}")


def _entries(optimizer: Optimizer, parts: list[Held]) -> tuple[dict[str, Any], dict[str, torch.dtype]]:
    """The entries of a partition's state: those that are one value for all of it, and those that lie as it does."""
    for held in parts:
        state = optimizer.state.get(held.flat)
        if state:
            flat = {k: v.dtype for k, v in state.items() if isinstance(v, Tensor) and v.shape == held.flat.shape}
            return {k: v for k, v in state.items() if k not in flat}, flat
    return {}, {}


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _state_of_flat(before: Mapping[str, Any], found: Sequence[tuple[Held, Mapping[str, Any]]]) -> dict[str, Any]:
    """The state of a partition, out of the states of the parameters that have a part in it."""
    state: dict[str, Any] = {}
    for held, entries in found:
        for key, value in entries.items():
            shaped = isinstance(value, Tensor) and value.shape == full_shape(held.parameter) and key != "step"
            if shaped:
                if key not in state:
                    flat = before.get(key)
                    state[key] = torch.zeros_like(held.flat, dtype=value.dtype) if flat is None else flat
                    state[key].zero_()
                put_part(held, state[key], value)
            elif isinstance(value, Tensor) and value.numel() > 1:
                raise CheckpointMismatchError(
                    f"The optimizer keeps {key!r} in the shape {list(value.shape)} for a parameter of the shape "
                    f"{list(full_shape(held.parameter))}, and ZeRO cuts states as it cuts parameters. Begin with a new "
                    "optimizer: load the weights only."
                )
            elif key not in state:
                state[key] = _like(before.get(key), in_memory(value))
    return state


def _like(before: Any, value: Any) -> Any:
    """A value of the kind that the optimizer has in its place: a count is a number in some, and a tensor in others."""
    if isinstance(value, Tensor) and isinstance(before, (int, float)):
        return type(before)(value.item())
    return value.clone() if isinstance(value, Tensor) else value


def _scaler(engine: Any) -> Any:
    return getattr(engine.optimizer, "loss_scaler", None)


def _counters(engine: Any) -> dict[str, Any]:
    scaler = (
        {key: value for key, value in vars(_scaler(engine)).items() if isinstance(value, (bool, int, float))}
        if (hasattr(_scaler(engine), "__dict__"))
        else {}
    )
    return {**{name: int(getattr(engine, name, 0)) for name in _COUNTERS}, "loss_scaler": scaler}


def _set_counters(engine: Any, state: Mapping[str, Any]) -> None:
    for name in _COUNTERS:
        if name in state:
            setattr(engine, name, state[name])
    if hasattr(_scaler(engine), "__dict__"):
        with contextlib.suppress(AttributeError):
            vars(_scaler(engine)).update(state.get("loss_scaler", {}))
