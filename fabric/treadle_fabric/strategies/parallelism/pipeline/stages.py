"""Which rank of a pipeline has which part of a module."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, ModuleList, Parameter, Sequential

from treadle_fabric.checkpoint.distributed.split import is_sharded_tensor, own_part
from treadle_fabric.errors import MisconfigurationException, near_names
from treadle_fabric.strategies.sharding.norms import count_elsewhere

__all__: list[str] = []

_cut: Final[weakref.WeakSet[Module]] = weakref.WeakSet()
"""The modules of which this rank has a part."""


def find_stages(module: Module) -> list[Module]:
    """Return the stages that a module names, in their order.

    Raises:
        MisconfigurationException: The module has no ``pipeline_stages`` or no ``loss``, or what ``pipeline_stages``
            returned is no list of its own submodules.
    """
    name = type(module).__qualname__
    for method, gives in (
        ("pipeline_stages", "the list of its submodules that follow each other"),
        ("loss", "the loss of outputs and their micro-batch: `loss(outputs, batch)`"),
    ):
        if not callable(getattr(module, method, None)):
            raise MisconfigurationException(
                f"{name} has no method `{method}`, which a pipeline needs. It returns {gives}."
                f" {near_names(method, [n for n in dir(type(module)) if not n.startswith('_')])}"
            )
    stages: Any = module.pipeline_stages()  # type: ignore[operator] # a method
    if isinstance(stages, (Sequential, ModuleList)):
        stages = list(stages)
    if not isinstance(stages, (list, tuple)):
        raise MisconfigurationException(
            f"`{name}.pipeline_stages` returned a {type(stages).__name__}: return a list of submodules, in their order."
        )
    own = {id(each): path for path, each in module.named_modules()}
    seen: dict[int, int] = {}
    for place, stage in enumerate(stages):
        if not isinstance(stage, Module) or not own.get(id(stage)):
            what = f"a {type(stage).__name__} that is no submodule of {name}" if stage is not module else "the module"
            raise MisconfigurationException(
                f"`{name}.pipeline_stages` returned {what} in place {place}. Each stage is a submodule, assigned in"
                " `__init__`, so that its parameters have their names in state dicts."
            )
        if id(stage) in seen:
            raise MisconfigurationException(
                f"`{name}.pipeline_stages` returned {own[id(stage)]!r} twice, in the places {seen[id(stage)]} and"
                f" {place}. A submodule is one stage; parameters may be shared by several."
            )
        seen[id(stage)] = place
    return list(stages)


def group_stages(stages: list[Module], count: int, ranks: int, name: str) -> list[list[Module]]:
    """Group neighbours into ``count`` parts of nearly the same number of stages.

    Raises:
        MisconfigurationException: There are fewer stages than parts.
    """
    if len(stages) < count:
        each = f"{ranks} ranks" if count == ranks else f"{ranks} ranks with {count // ranks} parts each"
        raise MisconfigurationException(
            f"`{name}.pipeline_stages` returned {len(stages)} stages, and a pipeline of {each} needs {count} or more:"
            " cut the model into more stages, or use fewer ranks for the pipeline."
        )
    bounds = [len(stages) * part // count for part in range(count + 1)]
    return [stages[begin:end] for begin, end in pairwise(bounds)]


def is_cut(module: Module) -> bool:
    """Whether this rank has a part of a module, because a pipeline was made of the module."""
    return module in _cut


class Placement:
    """Which parameters and buffers this rank has; the others are on the meta device here.

    Of what is in no stage, parameters are the last rank's, whose ``loss`` may use them. Buffers in no stage stay on all
    ranks; rank 0's are saved, so that ``loss`` must not change them.

    Args:
        module: The user's module, whole.
        parts: The stages of each part; part ``k`` is on the rank ``k % ranks``.
        rank: This rank in the pipeline.
        ranks: The number of ranks in the pipeline.
    """

    def __init__(self, module: Module, parts: list[list[Module]], rank: int, ranks: int) -> None:
        self.module, self.rank, self.last = module, rank, ranks - 1
        on: dict[int, set[int]] = {}
        for part, stages in enumerate(parts):
            for stage in stages:
                for tensor in (*stage.parameters(), *stage.buffers()):
                    on.setdefault(id(tensor), set()).add(part % ranks)
        self.parameters: dict[str, tuple[int, ...]] = {}
        """The ranks that have each parameter, by name; a parameter with two names is there twice."""
        names: dict[int, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            self.parameters[name] = tuple(sorted(on.get(id(parameter), {self.last})))
            names.setdefault(id(parameter), []).append(name)
        own = {id(m) for part in range(rank, len(parts), ranks) for stage in parts[part] for m in stage.modules()}
        here = {prefix for prefix, part in module.named_modules(remove_duplicate=False) if id(part) in own}
        self._tied: list[tuple[list[str], tuple[int, ...]]] = []
        """The names of each parameter that this rank and others have, first one in a stage of this rank."""
        for several in names.values():
            if len(ranks_of := self.parameters[several[0]]) > 1 and self.has(several[0]):
                ordered = sorted(several, key=lambda name: name.rpartition(".")[0] not in here)
                self._tied.append((ordered, ranks_of))
        self._foreign_buffers = []
        for name, buffer in module.named_buffers(remove_duplicate=False):
            if rank not in on.get(id(buffer), {rank}):
                self._foreign_buffers.append(name)

    def has(self, name: str) -> bool:
        """Whether this rank has a parameter."""
        return self.rank in self.parameters[name]

    def take(self, device: torch.device) -> None:
        """Give this rank its part, on its device, and free the rest.

        Parameters stay the same objects, for optimizers. A module that was cut before stays as it is.

        Raises:
            MisconfigurationException: torch holds a parameter fast, in a graph of an earlier forward pass.
        """
        if not is_cut(self.module):
            self._free_others()
            _cut.add(self.module)
        self.module._apply(lambda each: each if each.is_meta else each.to(device))  # type: ignore[no-untyped-call]

    def tie(self) -> None:
        """Tie again, after its stage was sharded, what was one parameter before."""
        for names, ranks in self._tied:
            parameter = self.module.get_parameter(names[0])
            if self.rank != ranks[0]:
                count_elsewhere(parameter)
            for name in names[1:]:
                owner, _, last = name.rpartition(".")
                self.module.get_submodule(owner)._parameters[last] = parameter

    def _free_others(self) -> None:
        freed: dict[int, Parameter] = {}
        for name in self.parameters:
            if not self.has(name):
                owner, _, last = name.rpartition(".")
                parameters = self.module.get_submodule(owner)._parameters
                parameter = parameters[last]
                assert parameter is not None
                if id(parameter) not in freed:
                    freed[id(parameter)] = _freed(name, parameter)
                parameters[last] = freed[id(parameter)]
        for name in self._foreign_buffers:
            owner, _, last = name.rpartition(".")
            buffers = self.module.get_submodule(owner)._buffers
            if (buffer := buffers[last]) is not None:
                buffers[last] = torch.empty_like(buffer, device="meta")

    def ties(self) -> list[tuple[Parameter, tuple[int, ...]]]:
        """Return the parameters that this rank and others have, with the ranks; in the same order on all ranks."""
        return [(self.module.get_parameter(names[0]), ranks) for names, ranks in self._tied]


def _freed(name: str, parameter: Parameter) -> Parameter:
    """The parameter, of which nothing but shape and dtype is left; of a DTensor another one, which never was whole."""
    if parameter.is_meta and not is_sharded_tensor(parameter):
        return parameter
    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    held = Parameter(empty, parameter.requires_grad)
    if is_sharded_tensor(parameter):
        return held
    parameter.grad = None
    try:
        torch.utils.swap_tensors(parameter, held)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise MisconfigurationException(
            f"The parameter {name!r} lives on another rank of the pipeline, and its memory cannot be freed here,"
            f" because it is in use: make the module anew before it is set up, and run no forward pass before."
            f" torch: {error}"
        ) from error
    return parameter


class Ties:
    """Sums the gradients of parameters that several ranks have, such as an embedding that is also the head.

    The copies of a parameter begin alike and get the same gradients, so they stay alike.

    Args:
        placement: Who has what.
        group: The ranks of the pipeline.
    """

    def __init__(self, placement: Placement, group: Any) -> None:
        self._placement, self._group = placement, group
        self.any: Final = bool(placement.ties())
        self._before: list[tuple[Parameter, tuple[int, ...], Tensor | None]] = []

    def begin(self) -> None:
        """Put gradients aside that were summed before, in the same accumulation."""
        self._before = [(each, ranks, each.grad) for each, ranks in self._placement.ties() if each.requires_grad]
        for parameter, *_ in self._before:
            parameter.grad = None

    def end(self) -> None:
        """Exchange the new gradients, and add those that were put aside."""
        received = []
        operations: list[Any] = []
        for parameter, ranks, before in self._before:
            mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            sent = own_part(mine).contiguous()
            parts = {self._placement.rank: sent}
            for rank in ranks:
                if rank != self._placement.rank:
                    peer = dist.get_global_rank(self._group, rank)
                    parts[rank] = torch.empty_like(sent)
                    operations.append(dist.P2POp(dist.isend, sent, peer, self._group))
                    operations.append(dist.P2POp(dist.irecv, parts[rank], peer, self._group))
            received.append((parameter, mine, before, parts))
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()
        for parameter, mine, before, parts in received:
            total = _summed(parts)
            own_part(mine).copy_(total)
            parameter.grad = mine if before is None else before.add_(mine)
        self._before = []


def _summed(parts: Mapping[int, Tensor]) -> Tensor:
    """The sum in the order of the ranks, which is the same number on all of them."""
    ordered = [parts[rank] for rank in sorted(parts)]
    total = ordered[0].clone()
    for part in ordered[1:]:
        total += part
    return total


class Sequence(Module):
    """Stages that follow each other on one rank, as one module.

    Args:
        stages: The stages.
        run: Called with the stages' forward and the inputs; what it returns goes to the next part.
    """

    def __init__(self, stages: Iterable[Module], run: Callable[[Callable[..., Any], tuple[Any, ...]], Any]) -> None:
        super().__init__()
        self.stages = ModuleList(stages)
        self._run = run

    def forward(self, *inputs: Any) -> Any:
        return self._run(self.apply_stages, inputs)

    def apply_stages(self, *inputs: Any) -> Any:
        """Run one stage after the other: a tuple that one returns is the arguments of the next."""
        outputs: Any = inputs
        for stage in self.stages:
            outputs = stage(*outputs) if type(outputs) is tuple else stage(outputs)
        return outputs


def whole_loss(module: Module) -> Callable[[Any], Any]:
    """Return what runs all stages in this process, and the loss; for a module that is not cut.

    Returns:
        A function of a batch that returns what the module's ``loss`` returns.
    """
    outputs_of = whole_outputs(module)

    def run(batch: Any) -> Any:
        return module.loss(outputs_of(batch), batch)  # type: ignore[operator] # a method

    return run


def whole_outputs(module: Module) -> Callable[[Any], Any]:
    """Return what runs all stages on a batch in this process."""
    stages = Sequence(find_stages(module), lambda forward, inputs: forward(*inputs))

    def run(batch: Any) -> Any:
        return stages(*inputs_of(module, batch))

    return run


def inputs_of(module: Module, batch: Any) -> tuple[Any, ...]:
    """Return what the first stage gets of a batch: what ``pipeline_inputs`` returns, or the (first) tensor.

    Raises:
        MisconfigurationException: The batch is neither a tensor nor a list or tuple, and the module does not say.
    """
    chosen = getattr(module, "pipeline_inputs", None)
    if callable(chosen):
        inputs = chosen(batch)
        return inputs if type(inputs) is tuple else (inputs,)
    if isinstance(batch, Tensor):
        return (batch,)
    if isinstance(batch, (list, tuple)) and batch:
        return (batch[0],)
    raise MisconfigurationException(
        f"A batch is a {type(batch).__name__}, and {type(module).__qualname__} does not say what of it the first stage"
        " gets: define `pipeline_inputs(batch)`, which returns a tensor or a tuple of arguments."
    )
