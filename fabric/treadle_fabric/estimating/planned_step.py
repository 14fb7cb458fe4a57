"""Memory and traffic of a rank in a training step, for a layout that this machine does not have."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, ModuleList, Sequential
from torch.optim import Optimizer

from treadle_fabric.accelerators import CPUAccelerator
from treadle_fabric.checks import check_integer
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.estimating.collectives import KINDS, Call, wire_bytes
from treadle_fabric.estimating.ghost import ghost_of, made, refused_values, tensors_in
from treadle_fabric.estimating.recorder import Recorder
from treadle_fabric.estimating.results import Estimate, Memory, Traffic
from treadle_fabric.estimating.step import Loss, Step, optimizers_of
from treadle_fabric.estimating.world import MAX_RANKS, PlannedEnvironment, ghost_world
from treadle_fabric.estimating.zero import Sizes, precision_alone, share_out, zero_of
from treadle_fabric.precision import Precision, canonical_precision, make_precision
from treadle_fabric.strategies import STRATEGY_REGISTRY, Parts, Strategy

__all__ = ["Alone", "estimate", "estimate_with", "planned_nodes"]

Alone = dict[str, tuple[Estimate, Sizes]]
"""Estimates on one device by precision, of one module, optimizer and batch, which layouts by arithmetic share."""


def estimate(
    module: Module | Callable[[], Module],
    optimizer: Any = None,
    strategy: str | Strategy = "ddp",
    world_size: int = 1,
    precision: str | int | Precision | None = None,
    batch: Any = None,
    *,
    loss: Loss | None = None,
    num_nodes: int | None = None,
    accumulate: int = 1,
    foreach: bool = True,
) -> Estimate:
    """Say what memory a rank needs in a training step, and what it exchanges with others.

    One step of the module runs here, under the strategy's own code, as the first rank of ``world_size`` ranks. Its
    tensors have no memory, and its process group sends nothing. So this needs neither devices nor memory for the
    model, and sees what the strategy makes of this very module. See ``docs/estimate.md``.

    Args:
        module: A module, on any device, the meta device too; or a function that returns one. A module with a
            ``training_step``, such as a LightningModule, runs it. The module is not changed.
        optimizer: An optimizer of the module's parameters, a class such as ``torch.optim.AdamW``, or a function of
            parameters that returns an optimizer or a list. Default: the module's ``configure_optimizers``.
        strategy: A name or an object, as for ``Fabric``.
        world_size: The number of ranks, from 1 to 4,096.
        precision: As for ``Fabric``. Default: the strategy object's, or ``"32-true"``.
        batch: What one rank gets at once, a micro-batch: tensors on any device, or a function that returns it. A module
            without ``training_step`` gets it as arguments: a dict by name, a list or tuple by position.
        loss: A function of the module's output and the batch that returns the loss, for a module without
            ``training_step``. Default: the output, or its "loss"; else the mean of the output.
        num_nodes: The number of machines. Default: eight ranks a machine.
        accumulate: The number of micro-batches of a step.
        foreach: Whether optimizers step all parameters at once, torch's default on CUDA, which needs memory for
            intermediate results as large as the parameters. False: one after the other, torch's default on the CPU.

    Returns:
        Bytes by part and by kind of collective; ``print`` shows them as a table.

    Raises:
        MisconfigurationException: An argument is wrong; the step needs values of tensors; this process is in a process
            group; or the strategy cannot be estimated.
    """
    options: dict[str, Any] = {"loss": loss, "accumulate": accumulate, "foreach": foreach}
    return estimate_with({}, module, optimizer, strategy, world_size, precision, batch, num_nodes=num_nodes, **options)


def estimate_with(
    known: Alone,
    module: Module | Callable[[], Module],
    optimizer: Any,
    strategy: str | Strategy,
    world_size: int,
    precision: str | int | Precision | None,
    batch: Any,
    *,
    num_nodes: int | None,
    accumulate: int = 1,
    **options: Any,
) -> Estimate:
    """Do what :func:`estimate` does, and use what is known of the same module, optimizer and batch on one device.

    Args:
        known: What is known, which is added to.
        module: As there, and the rest, too.
    """
    world_size = check_integer("world_size", world_size, minimum=1)
    accumulate = check_integer("accumulate", accumulate, minimum=1)
    if world_size > MAX_RANKS:
        raise MisconfigurationException(f"world_size={world_size}: at most {MAX_RANKS:,} ranks can be estimated.")
    nodes = planned_nodes(num_nodes, world_size)
    chosen, name = _strategy(strategy)
    zero = zero_of(chosen)
    if zero is None and not chosen.uses_process_group and world_size > 1:
        raise MisconfigurationException(
            f"strategy={name!r} runs in one process, and world_size={world_size}. Give 'ddp' or 'fsdp', for example, or"
            " world_size=1."
        )
    options = {"accumulate": accumulate, "loss": None, "foreach": True, **options}
    _check_given(module, optimizer, options["loss"])
    if zero is not None:
        said = canonical_precision(precision.precision if isinstance(precision, Precision) else precision)
        own = precision_alone(said)
        if own not in known:
            one = STRATEGY_REGISTRY.get("single_device")
            known[own] = _estimated(module, optimizer, one, name, 1, 1, own, batch, **options)
        alone, sizes = known[own]
        return share_out(alone, zero, name, said, world_size, nodes, sizes)
    return _estimated(module, optimizer, chosen, name, world_size, nodes, precision, batch, **options)[0]


def _estimated(
    module: Any,
    optimizer: Any,
    chosen: Strategy,
    name: str,
    world_size: int,
    nodes: int,
    precision: Any,
    batch: Any,
    *,
    loss: Loss | None,
    accumulate: int,
    foreach: bool,
) -> tuple[Estimate, Sizes]:
    """The estimate, and the sizes of the whole parameters."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # for those who plan

    if chosen.runs_whole_batch:
        raise MisconfigurationException(
            f"{name} with a pipeline: its ranks have different parts of the model, and what each needs depends on what"
            " the others send, which one rank alone cannot find out. Estimate a stage as a model of its own."
        )
    mode: Any = FakeTensorMode(allow_non_fake_inputs=True)
    with ExitStack() as stack:
        stack.enter_context(ghost_world(0, world_size))
        per_node = world_size // nodes
        environment = PlannedEnvironment(0, world_size, per_node)
        parts = Parts(
            CPUAccelerator(),
            (torch.device("cpu"),) * per_node,
            _precision(precision, chosen),
            None,
            environment,
        )
        bound = copy.copy(chosen)  # of the user's object, which stays as it is
        bound.forget_devices()
        bound.bind(parts, nodes)
        _ = bound.device_mesh  # made of values, so not among tensors that have none
        whole = made(module, mode) if not isinstance(module, Module) else module
        _check_made(whole, optimizer, batch)
        own, given, copy_of = _ghosts(whole, optimizer, bound.precision, mode)
        bound.move_references(copy_of)
        del copy_of  # it would keep whole parameters alive that a strategy cuts up
        micro_batch = ghost_of(made(batch, mode) if callable(batch) else batch, mode, {})
        count = sum(p.numel() for p in own.parameters())
        whole_sizes = _sizes(own)
        recorder = Recorder()
        stack.enter_context(mode)
        stack.enter_context(recorder)
        with refused_values("The step"):
            step = Step(own, _maker(given, foreach), bound, loss)
            sizes = _second_step(step, micro_batch, recorder, accumulate)
        result = Estimate(
            strategy=_described(name, bound),
            world_size=world_size,
            num_nodes=nodes,
            precision=bound.precision.precision,
            parameters=count,
            memory=_memory(recorder, sizes, bound.offloads),
            traffic=_traffic(recorder.calls, per_node),
            notes=_notes(recorder),
        )
        return result, whole_sizes


def _check_given(module: Any, optimizer: Any, loss: Any) -> None:
    """Refuse what is none of the kinds that an argument takes.

    Raises:
        MisconfigurationException: An argument is something else.
    """
    if not isinstance(module, Module) and not callable(module):
        raise MisconfigurationException(f"module={module!r}: give a torch module, or a function that returns one.")
    if not isinstance(optimizer, Optimizer) and optimizer is not None and not callable(optimizer):
        raise MisconfigurationException(
            f"optimizer={optimizer!r}: give a class such as torch.optim.AdamW, an optimizer of the module's parameters,"
            " or a function of the parameters that returns one or several."
        )
    if loss is not None and not callable(loss):
        raise MisconfigurationException(f"loss={loss!r}: give a function of the module's output and the batch.")


def _check_made(module: Any, optimizer: Any, batch: Any) -> None:
    """Refuse a module that is none, an optimizer of another one, and a missing batch.

    Raises:
        MisconfigurationException: One of them is there.
    """
    if not isinstance(module, Module):
        raise MisconfigurationException(f"module made {type(module).__name__}, which is no torch module.")
    if batch is None and not hasattr(module, "training_step"):
        raise MisconfigurationException(
            f"batch is missing: give what {type(module).__name__} gets on one rank, or a function that returns it."
        )
    if isinstance(optimizer, Optimizer):
        own = {id(p) for p in module.parameters()}
        foreign = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in own]
        if foreign:
            raise MisconfigurationException(
                f"{type(optimizer).__name__} has a parameter of shape {tuple(foreign[0].shape)} that is not one of the"
                f" {type(module).__name__} to be estimated. Give the optimizer's class, or make it of that module's"
                " parameters."
            )


def _ghosts(
    module: Module, optimizer: Any, precision: Precision, mode: Any
) -> tuple[Module, Any, Callable[[Any], Any]]:
    """Copies of a module, in its precision, and of its optimizer, if that is one already; and what finds a copy."""
    first: dict[int, Any] = {}
    on_meta = ghost_of(module, None, first)
    stepped = ghost_of(optimizer, None, first) if isinstance(optimizer, Optimizer) else optimizer
    configure: Any = getattr(on_meta, "configure_model", None)
    if callable(configure):
        with refused_values("configure_model"), torch.device("meta"):
            configure()
    converted = precision.convert_module(on_meta)
    second: dict[int, Any] = {}
    ghost = ghost_of(converted, mode, second)

    def copy_of(given: Any) -> Any:
        found = second.get(id(first.get(id(given))))
        if found is None:
            shape = f" of shape {tuple(given.shape)}" if isinstance(given, Tensor) else ""
            raise MisconfigurationException(
                f"The strategy was given a {type(given).__name__}{shape} that is not in the {type(module).__name__} to"
                " be estimated. Give the module itself, of which it is a part, and no function that makes another one."
            )
        return found

    return ghost, ghost_of(stepped, mode, second) if isinstance(optimizer, Optimizer) else optimizer, copy_of


def _second_step(step: Step, batch: Any, recorder: Recorder, accumulate: int) -> dict[str, int]:
    """Run two steps, and let the recorder know the second: the first makes what the later ones find."""
    for _ in range(2):
        sizes = {
            "parameters": recorder.label(step.parameters, "parameters"),
            "buffers": recorder.label(step.buffers, "buffers"),
            "inputs": recorder.label(tensors_in(batch), "inputs"),
        }
        recorder.restart("forward")
        sizes |= step.run(batch, recorder, accumulate)
    return sizes


def _memory(recorder: Recorder, sizes: dict[str, int], offloads: bool) -> Memory:
    host = ("parameters", "gradients", "optimizer_state") if offloads else ()
    peak = recorder.peak(without=host)
    return Memory(
        **sizes,
        activations=recorder.most("activations", ("forward", "backward")),
        communication=recorder.most("communication"),
        peak=peak.total,
        peak_parts=peak.parts,
        peak_phase=peak.phase,
        host=sum(sizes[name] for name in host),
    )


def _traffic(calls: Iterable[tuple[str, Call]], per_node: int) -> dict[str, Traffic]:
    sums: dict[str, list[float]] = {}
    for _, call in calls:
        sent = wire_bytes(call.kind, call.payload, len(call.ranks))
        far = len({rank // per_node for rank in call.ranks}) > 1
        entry = sums.setdefault(call.kind, [0, 0, 0, 0])
        for index, amount in enumerate((1, call.payload, sent, sent if far else 0)):
            entry[index] += amount
    return {kind: Traffic(*(round(amount) for amount in sums[kind])) for kind in KINDS if kind in sums}


def _notes(recorder: Recorder) -> tuple[str, ...]:
    if not recorder.values_read:
        return ()
    return (
        f"{recorder.values_read} values were read from tensors, as by item(), and taken for 1, or False: a step that"
        " decides by them may do something else.",
    )


def _layers(module: Module) -> Iterator[Module]:
    """What is gathered at a time: the children, and those of lists of children."""
    for child in module.children():
        yield from (child.children() if isinstance(child, ModuleList | Sequential) else (child,))


def _sizes(module: Module) -> Sizes:
    trained, frozen = (tuple(p.numel() for p in module.parameters() if p.requires_grad is on) for on in (True, False))
    return Sizes(trained, frozen, max((_size(child) for child in _layers(module)), default=0))


def _size(module: Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _described(name: str, strategy: Strategy) -> str:
    mesh = strategy.device_mesh
    if mesh is None or mesh.ndim < 2:
        return name
    sizes = ((size, each) for size, each in zip(mesh.shape, mesh.mesh_dim_names) if size > 1)
    return f"{name} ({' x '.join(f'{each}={size}' for size, each in sizes)})"


def _strategy(given: str | Strategy) -> tuple[Strategy, str]:
    if isinstance(given, Strategy):
        return given, type(given).__name__
    if given == "auto":
        given = "ddp"
    return STRATEGY_REGISTRY.get(given), given


def _precision(given: str | int | Precision | None, strategy: Strategy) -> Precision:
    own = strategy.given.precision
    if isinstance(given, Precision):
        return given
    if given is None and own is not None:
        return own
    name = canonical_precision(given)
    if own is not None and own.precision != name:
        raise MisconfigurationException(
            f"precision={given!r}, and the strategy has a {type(own).__name__} of {own.precision!r}. Give one."
        )
    return own or make_precision(name, "cpu")


def _maker(given: Any, foreach: bool) -> Callable[[Module], list[Optimizer]]:
    """Makes the optimizers of a module that is ready for them."""

    def make(module: Module) -> list[Optimizer]:
        if isinstance(given, Optimizer):
            optimizers = [given]
        elif given is not None:
            optimizers = optimizers_of(given(module.parameters()))
        elif callable(getattr(module, "configure_optimizers", None)):
            configure: Any = module.configure_optimizers
            optimizers = optimizers_of(configure())
        else:
            raise MisconfigurationException(
                f"{type(module).__name__} has no configure_optimizers: give optimizer=, such as torch.optim.AdamW."
            )
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            if group.get("foreach", False) is None and not group.get("fused"):
                group["foreach"] = foreach
        return optimizers

    return make


def planned_nodes(given: int | None, world_size: int) -> int:
    """The number of machines: what was given, or with eight ranks each.

    Raises:
        MisconfigurationException: The machines would have different numbers of ranks.
    """
    nodes = ceil(world_size / 8) if given is None else check_integer("num_nodes", given, minimum=1)
    if given is None and world_size % nodes:
        nodes = 1
    if world_size % nodes:
        raise MisconfigurationException(
            f"world_size={world_size} ranks on num_nodes={nodes} machines: the machines must have the same number of"
            " ranks each."
        )
    return nodes
