"""What goes wrong in a model whose layers are sharded, in the user's terms."""

from __future__ import annotations

import linecache
import math
import re
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch import Tensor
from torch.nn import Module

from treadle_fabric.checkpoint import is_sharded_tensor
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.strategies.unwrapping import class_of, user_module, with_plain_names

__all__ = ["explain_mixed", "explain_not_gathered"]

_MIXED = "got mixed torch.Tensor and DTensor"
_SHAPE = re.compile(r"shape '\[([-\d, ]+)\]' is invalid for input of size (\d+)")
_MAX_NAMED = 4
_BACKWARD = "_engine_run_backward"  # the function of torch that runs a backward pass
_OF_TORCH = Module.__call__.__code__.co_filename  # which calls forward


def explain_mixed(error: BaseException, module: Module | None, tensor_parallel_size: int = 1) -> Exception | None:
    """Explain an error of torch that comes from sharded layers.

    Args:
        error: What was raised.
        module: The user's module or a wrapper, whose layers are named.
        tensor_parallel_size: Over how many ranks layers are sharded.

    Returns:
        A clearer error, to be raised from ``error``; None where it is another one.
    """
    text = str(error)
    if _MIXED in text:
        return MisconfigurationException(_mixed(error, module))
    found = _SHAPE.search(text)
    if found is not None and tensor_parallel_size > 1:
        return _cut_heads(error, module, [int(n) for n in found[1].split(",")], int(found[2]), tensor_parallel_size)
    return None


def explain_not_gathered(error: BaseException, module: Module | None) -> Exception | None:
    """Explain that a parameter was used that is gathered only while a submodule runs, or while a step does.

    Args:
        error: What was raised.
        module: The engine, or the user's module, some of whose submodules are groups of ``fully_shard``.

    Returns:
        A clearer error, to be raised from ``error``; None where it is another one.
    """
    if _MIXED not in str(error):
        return None
    names = _names(module)
    place, in_a_pass = "", False
    for frame, line in _frames(error):
        owner = _owner(frame)
        in_a_pass |= owner is module or frame.f_code.co_name == _BACKWARD
        if id(owner) in names:
            place = f" in {_layer(names, owner)}, {_source(frame, line)}"
    if not in_a_pass:
        return MisconfigurationException(
            f"A sharded parameter, of which each rank has a part (a DTensor), met a plain tensor{place}, outside of the"
            " steps, for which parameters are gathered. To run the model, call trainer.model(...) in a hook of the"
            " Trainer, and in a loop of your own the model, or a method after model.mark_forward_method(...); every"
            " rank calls it. To read a parameter, make it whole with .full_tensor(), on every rank; to set parameters,"
            " use load_state_dict, which takes whole tensors."
        )
    groups = [] if module is None else [m for m in user_module(module).modules() if hasattr(m, "_get_fsdp_state")]
    listed = ", ".join(_layer(names, each) for each in groups[:_MAX_NAMED])
    listed += f" and {len(groups) - _MAX_NAMED} more" if len(groups) > _MAX_NAMED else ""
    return MisconfigurationException(
        f"A parameter that is gathered only while its submodule's forward runs was used elsewhere{place}. Submodules"
        f" whose parameters are gathered by themselves: {listed or 'none'}. Call such a submodule instead of using its"
        " weights; call another method of it through the model's step, after model.mark_forward_method(...); or leave"
        " it out: policy=... takes classes, or a function of a module that returns whether."
    )


def _mixed(error: BaseException, module: Module | None) -> str:
    names = _names(module)
    place, variables, sharded = "", "", ""
    for frame, line in _frames(error):
        owner = _owner(frame)
        if id(owner) in names:
            place = f" in {_layer(names, owner)}, {_source(frame, line)}"
            values = {n: v for n, v in frame.f_locals.items() if isinstance(v, Tensor)}
            kinds = [(n, "a DTensor" if is_sharded_tensor(v) else "plain") for n, v in values.items()]
            variables = f" There, {', '.join(f'{n} is {kind}' for n, kind in kinds)}." if kinds else ""
            mine = [(n, p) for n, p in owner.named_parameters() if is_sharded_tensor(p)]
            sharded = "; ".join(f"{n}: {p.placements}" for n, p in mine[:_MAX_NAMED])
    return (
        f"A sharded tensor (DTensor) and a plain one met in one operation{place}.{variables}"
        + (f" Sharded parameters of this layer: {sharded}." if sharded else "")
        + " A layer of a tensor-parallel plan takes and gives plain tensors where it is called as a module. Do not use"
        " its weight directly (call the layer), give logits that the plan leaves sharded ('colwise_logits') to"
        " F.cross_entropy under loss_parallel=True, and make a DTensor whole with .full_tensor() before other"
        " operations."
    )


def _cut_heads(
    error: BaseException, module: Module | None, shape: list[int], size: int, ranks: int
) -> MisconfigurationException | None:
    wanted = abs(math.prod(shape))
    whole = wanted == size * ranks if -1 not in shape else bool(wanted) and size % wanted != 0
    if not whole:
        return None
    names = _names(module)
    found = [(frame, line) for frame, line in _frames(error) if id(_owner(frame)) in names]
    if not found:
        return None
    frame, line = found[-1]
    owner = _owner(frame)
    if not any(is_sharded_tensor(p) for p in owner.parameters()):
        return None
    return MisconfigurationException(
        f"{_layer(names, owner)}, {_source(frame, line)}: the shape {shape} is that of all heads or features, and under"
        f" tensor parallelism this rank has one {ranks}th of them, {size} numbers. Let the view find out how many"
        " heads there are: x.view(b, t, -1, head_dim)."
    )


def _names(module: Module | None) -> dict[int, str]:
    if module is None:
        return {}
    own = user_module(module)
    return {id(each): name for name, each in with_plain_names(own, own.named_modules())}


def _layer(names: dict[int, str], owner: Any) -> str:
    name, kind = names[id(owner)], class_of(owner)
    return f"{name!r} ({kind.__name__})" if name else kind.__name__


def _frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next


def _owner(frame: FrameType) -> Any:
    """The module whose method runs, whatever the method calls it; None in torch's own methods."""
    first = frame.f_code.co_varnames[:1]
    return frame.f_locals.get(first[0]) if first and frame.f_code.co_filename != _OF_TORCH else None


def _source(frame: FrameType, line: int) -> str:
    code = linecache.getline(frame.f_code.co_filename, line).strip()
    return f"line {line}" + (f" (`{code}`)" if code else "")
