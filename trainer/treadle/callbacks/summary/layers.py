"""The layers of a model: parameters and modes and, with an example input, shapes and FLOPs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from treadle.callbacks.summary.fitting import Column
from treadle.callbacks.summary.formatting import Totals, format_summary, get_human_readable_count, not_counted
from treadle.module.modes import module_modes, restore_modes
from treadle_fabric import check_integer, isolate_rng, move_data_to_device, plain_name, rank_zero_warn, with_plain_names
from treadle_fabric.strategies import elements_here, elements_of

__all__ = ["DeepSpeedSummary", "LayerSummary", "ModelSummary", "parse_batch_shape", "summarize"]

_UNKNOWN = "?"


class LayerSummary:
    """One row: the type of a module, its parameters and, once it has run, its input and output sizes.

    Args:
        module: the module. A hook on it waits for the first forward pass, or for :meth:`detach_hook`.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._in_size: Any = None
        self._out_size: Any = None
        self.size_texts = (_UNKNOWN, _UNKNOWN)
        """The sizes of input and output for the table, which has those in mappings, too."""
        # a scripted module takes no hook that sees Python values
        self._hook = None if isinstance(module, torch.jit.ScriptModule) else self._attach()

    def _attach(self) -> RemovableHandle:
        def record(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            given = args[0] if len(args) == 1 else args
            self._in_size, self._out_size = parse_batch_shape(given), parse_batch_shape(out)
            self.size_texts = _size_text(given), _size_text(out)
            self.detach_hook()

        return self._module.register_forward_hook(record)

    def detach_hook(self) -> None:
        """Remove the hook that waits for a forward pass."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @property
    def in_size(self) -> Any:
        """The shape of the input, a list of shapes for several inputs, ``"?"`` when unknown."""
        return _UNKNOWN if self._in_size is None else self._in_size

    @property
    def out_size(self) -> Any:
        """The shape of the output, a list of shapes for several outputs, ``"?"`` when unknown."""
        return _UNKNOWN if self._out_size is None else self._out_size

    @property
    def layer_type(self) -> str:
        """The name of the module's class."""
        return str(getattr(self._module, "original_name", type(self._module).__name__))

    @property
    def num_parameters(self) -> int:
        """The elements of the parameters; each parameter counts once, an uninitialized (lazy) one not at all."""
        return sum(elements_of(p) for p in self._module.parameters() if not is_lazy(p))

    @property
    def num_parameters_here(self) -> int:
        """The elements that this rank holds of the parameters, where they are shared out."""
        return sum(elements_here(p) for p in self._module.parameters() if not is_lazy(p))

    @property
    def has_uninitialized(self) -> bool:
        """Whether there are parameters that take their shape from the first batch."""
        return any(is_lazy(p) for p in self._module.parameters())

    @property
    def training(self) -> bool:
        """Whether the module is in train mode."""
        return self._module.training


class ModelSummary:
    """The layers of a model with names, types, parameters and modes; with an example input also sizes and FLOPs.

    If the model has an ``example_input_array``, one forward pass runs with that input, in eval mode and without
    gradients: a dictionary gives keyword arguments, a tuple or list positional ones. The random state and the modes of
    the modules are then what they were before.

    Args:
        model: the model.
        max_depth: how many levels of layers to show: 1 for the top level, -1 for all, 0 for the totals alone.

    Raises:
        MisconfigurationException: ``max_depth`` is no integer, or below -1.
    """

    def __init__(self, model: nn.Module, max_depth: int = 1) -> None:
        self._max_depth = check_integer("max_depth", max_depth, minimum=-1, meaning="a number of levels, -1 for all")
        self._model = model
        self._example = getattr(model, "example_input_array", None)
        self._flops: dict[str, dict[Any, int]] = {}
        self._layers = self.summarize()

    def summarize(self) -> dict[str, LayerSummary]:
        """Return the layers by name, after one forward pass if the model has an example input."""
        layers = {name: LayerSummary(module) for name, module in self.named_modules}
        try:
            if self._example is not None:
                self._run_example()
        finally:
            for layer in layers.values():
                layer.detach_hook()
        return layers

    def _run_example(self) -> None:
        from torch.utils.flop_counter import FlopCounterMode  # heavy

        model = self._model
        counter = FlopCounterMode(display=False)
        with ExitStack() as stack, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using `torch.compile", UserWarning)  # the counter's hooks do no harm
            stack.enter_context(isolate_rng())
            stack.callback(restore_modes, module_modes(model))
            model.eval()
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # an example is not worth a compilation
            inputs = move_data_to_device(self._example, _device_of(model))
            fabric = getattr(model, "fabric", None)
            if fabric is not None:
                inputs = fabric.strategy.precision.convert_input(inputs)
                stack.enter_context(fabric.autocast())
            stack.enter_context(counter)
            if isinstance(inputs, Mapping):
                model(**inputs)
            elif isinstance(inputs, (tuple, list)) and not isinstance(inputs, PackedSequence):
                model(*inputs)
            else:
                model(inputs)
        prefix = f"{type(model).__name__}."
        self._flops = {
            plain_name(model, name.removeprefix(prefix)): dict(counts)
            for name, counts in counter.get_flop_counts().items()
            if name != "Global"
        }

    @property
    def has_example(self) -> bool:
        """Whether the model has an example input, so that sizes and FLOPs are known."""
        return self._example is not None

    @property
    def named_modules(self) -> list[tuple[str, nn.Module]]:
        """The layers down to ``max_depth``, without the model itself; of a compiled one, the module inside."""
        layers = dict(with_plain_names(self._model, self._model.named_modules()))
        return [
            (name, module)
            for name, module in layers.items()
            if name and (self._max_depth == -1 or name.count(".") < self._max_depth)
        ]

    @property
    def layer_names(self) -> list[str]:
        """The dotted name of each layer."""
        return list(self._layers)

    @property
    def layer_types(self) -> list[str]:
        """The class name of each layer."""
        return [layer.layer_type for layer in self._layers.values()]

    @property
    def in_sizes(self) -> list[Any]:
        """The input shapes of each layer, ``"?"`` where unknown."""
        return [layer.in_size for layer in self._layers.values()]

    @property
    def out_sizes(self) -> list[Any]:
        """The output shapes of each layer, ``"?"`` where unknown."""
        return [layer.out_size for layer in self._layers.values()]

    @property
    def param_nums(self) -> list[int]:
        """The elements of the parameters of each layer; a parameter that two layers share counts in both."""
        return [layer.num_parameters for layer in self._layers.values()]

    @property
    def training_modes(self) -> list[bool]:
        """Whether each layer is in train mode."""
        return [layer.training for layer in self._layers.values()]

    @property
    def total_training_modes(self) -> dict[str, int]:
        """The number of modules in ``"train"`` and in ``"eval"`` mode, without the model itself."""
        layers = dict(with_plain_names(self._model, self._model.named_modules()))
        modes = [module.training for module in layers.values()][1:]
        return {"train": sum(modes), "eval": len(modes) - sum(modes)}

    @property
    def total_parameters(self) -> int:
        """The elements of all parameters; a shared one counts once, an uninitialized one not at all, with a warning."""
        if n := self.uninitialized_parameters:
            rank_zero_warn(
                "The total number of parameters detected may be inaccurate because the model contains"
                f" {n} `UninitializedParameter`s, whose shape comes from the first batch. Set"
                " `self.example_input_array` to have them counted."
            )
        return sum(map(elements_of, self._parameters()))

    @property
    def trainable_parameters(self) -> int:
        """The elements of those parameters that require a gradient."""
        return sum(elements_of(p) for p in self._parameters() if p.requires_grad)

    @property
    def total_layer_params(self) -> int:
        """The elements of those parameters that belong to one of the layers shown."""
        inside = {id(p): elements_of(p) for _, m in self.named_modules for p in m.parameters() if not is_lazy(p)}
        return sum(inside.values())

    @property
    def model_size(self) -> float:
        """The megabytes (10^6 bytes) that the parameters take in their present dtypes."""
        return sum(elements_of(p) * p.element_size() for p in self._parameters()) / 1e6

    @property
    def uninitialized_parameters(self) -> int:
        """The number of parameters that get their shape from the first batch."""
        return sum(is_lazy(p) for p in self._model.parameters())

    @property
    def flop_counts(self) -> dict[str, dict[Any, int]]:
        """The floating-point operations of each layer in one forward pass of the example, by torch operator."""
        return {name: self._flops.get(name, {}) for name in self._layers}

    @property
    def total_flops(self) -> int:
        """The floating-point operations of one forward pass of the example; 0 without an example."""
        return sum(self._flops.get(type(self._model).__name__, {}).values())

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (p for p in self._model.parameters() if not is_lazy(p))

    def totals(self) -> Totals:
        """Return the numbers of the whole model."""
        return Totals(
            self.total_parameters,
            self.trainable_parameters,
            self.model_size,
            self.total_training_modes,
            self.total_flops,
        )

    def columns(self) -> list[Column]:
        """Return the table, by columns, with a last row for the parameters that belong to no layer shown."""
        counts = [
            get_human_readable_count(n) if n or not layer.has_uninitialized else _UNKNOWN
            for n, layer in zip(self.param_nums, self._layers.values(), strict=True)
        ]
        table: list[Column] = [
            (" ", [str(i) for i in range(len(counts))]),
            ("Name", self.layer_names),
            ("Type", self.layer_types),
            ("Params", counts),
            *self._counts_here(),
            ("Mode", ["train" if training else "eval" for training in self.training_modes]),
        ]
        if self.has_example:
            flops = [get_human_readable_count(sum(counts.values())) for counts in self.flop_counts.values()]
            table += [
                ("FLOPs", flops),
                ("In sizes", [layer.size_texts[0] for layer in self._layers.values()]),
                ("Out sizes", [layer.size_texts[1] for layer in self._layers.values()]),
            ]
        others = self.total_parameters - self.total_layer_params
        if others and self._layers:
            known = {" ": " ", "Name": "other params", "Params": get_human_readable_count(others)}
            for heading, cells in table:
                cells.append(known.get(heading, "n/a"))
        return table

    def _counts_here(self) -> list[Column]:
        """A column of what this rank holds, where an engine has shared parameters out."""
        if not any(elements_here(p) != elements_of(p) for p in self._parameters()):
            return []
        held = [get_human_readable_count(layer.num_parameters_here) for layer in self._layers.values()]
        return [("Params per Device", held)]

    def __str__(self) -> str:
        text = format_summary(self.columns(), self.totals())
        n = self.uninitialized_parameters
        return f"{text}\n{not_counted(n)}" if n else text

    __repr__ = __str__


class DeepSpeedSummary(ModelSummary):
    """The layers of a model of which DeepSpeed's ZeRO 3 has left each rank a part of the parameters.

    :class:`ModelSummary` counts whole parameters, too, and has a column of what this rank holds.

    Args:
        model: the model.
        max_depth: as of :class:`ModelSummary`.
    """

    @property
    def parameters_per_layer(self) -> list[int]:
        """The elements that this rank holds of the parameters of each layer."""
        return [layer.num_parameters_here for layer in self._layers.values()]


def _device_of(model: nn.Module) -> torch.device:
    tensor = next(iter([*model.parameters(), *model.buffers()]), None)
    return torch.device("cpu") if tensor is None else tensor.device


def summarize(lightning_module: nn.Module, max_depth: int = 1) -> ModelSummary:
    """Summarize a module down to ``max_depth`` (-1: all levels); print the result to see the table."""
    return ModelSummary(lightning_module, max_depth)


def parse_batch_shape(batch: Any) -> Any:
    """Return the shape of a tensor as a list, a list of shapes for a tuple or list, ``"?"`` for anything else.

    Example::

        >>> parse_batch_shape((torch.ones(4, 3), torch.ones(4)))
        [[4, 3], [4]]
    """
    if isinstance(batch, Tensor):
        return list(batch.shape)
    if isinstance(batch, (tuple, list)):
        return [parse_batch_shape(item) for item in batch]
    return _UNKNOWN


def _size_text(batch: Any) -> str:
    """Return the shapes as :func:`parse_batch_shape` does, and those of mappings with their keys."""
    if isinstance(batch, Mapping):
        parts = {key: _size_text(value) for key, value in batch.items()}
        known = any(part != _UNKNOWN for part in parts.values())
        return f"{{{', '.join(f'{key}: {part}' for key, part in parts.items())}}}" if known else _UNKNOWN
    if isinstance(batch, (tuple, list)):
        return f"[{', '.join(map(_size_text, batch))}]"
    return str(parse_batch_shape(batch))
