"""A table of a model's layers: parameters, modes, and with an example input shapes and FLOPs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from treadle_fabric import MisconfigurationException, move_data_to_device
from treadle_fabric.seed import isolate_rng

__all__ = [
    "LayerSummary",
    "ModelSummary",
    "get_formatted_model_size",
    "get_human_readable_count",
    "parse_batch_shape",
    "summarize",
]

UNKNOWN_SIZE = "?"
NOT_APPLICABLE = "n/a"
_UNITS = ("", "K", "M", "B", "T")

Column = tuple[str, list[str]]


class LayerSummary:
    """One row: a module's type, its parameters and, once it has run, its input and output sizes.

    Args:
        module: what to summarize. A hook on it waits for the first forward pass, until :meth:`detach_hook`.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._in_size: Any = None
        self._out_size: Any = None
        # a scripted module takes no hook that sees Python values
        self._hook = None if isinstance(module, torch.jit.ScriptModule) else self._attach()

    def _attach(self) -> RemovableHandle:
        def record(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            self._in_size = parse_batch_shape(args[0] if len(args) == 1 else args)
            self._out_size = parse_batch_shape(out)
            self.detach_hook()

        return self._module.register_forward_hook(record)

    def detach_hook(self) -> None:
        """Wait no longer for a forward pass."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @property
    def in_size(self) -> Any:
        """Shape of the input, a list of them for several inputs, ``"?"`` when unknown."""
        return UNKNOWN_SIZE if self._in_size is None else self._in_size

    @property
    def out_size(self) -> Any:
        """Shape of the output, a list of them for several outputs, ``"?"`` when unknown."""
        return UNKNOWN_SIZE if self._out_size is None else self._out_size

    @property
    def layer_type(self) -> str:
        """The class name."""
        return str(getattr(self._module, "original_name", type(self._module).__name__))

    @property
    def num_parameters(self) -> int:
        """Elements of its parameters, each counted once, uninitialized (lazy) ones not at all."""
        return sum(p.numel() for p in self._module.parameters() if not is_lazy(p))

    @property
    def has_uninitialized(self) -> bool:
        """Whether it has parameters that take their shape from the first batch."""
        return any(is_lazy(p) for p in self._module.parameters())

    @property
    def training(self) -> bool:
        """Whether it is in train mode."""
        return self._module.training


class ModelSummary:
    """Layers of a model with names, types, parameters and modes; with an example input also sizes and FLOPs.

    If the model has an ``example_input_array``, one forward pass runs with it, in eval mode and without gradients: a
    dictionary as keyword arguments, a tuple or list as positional ones. Random state and modes are left as they were.

    Args:
        model: the model.
        max_depth: layers of layers to show: 1 for the top level, -1 for all, 0 for the totals alone.

    Raises:
        MisconfigurationException: ``max_depth`` is below -1.
    """

    def __init__(self, model: nn.Module, max_depth: int = 1) -> None:
        if not isinstance(max_depth, int) or max_depth < -1:
            raise MisconfigurationException(f"max_depth={max_depth!r}: a number of levels, 0 or more, or -1 for all.")
        self._model = model
        self._max_depth = max_depth
        self._example = getattr(model, "example_input_array", None)
        self._flops: dict[str, dict[Any, int]] = {}
        self._layers = self.summarize()

    def summarize(self) -> dict[str, LayerSummary]:
        """Look at the layers, running the model once if it has an example input."""
        layers = {name: LayerSummary(module) for name, module in self.named_modules}
        try:
            if self._example is not None:
                self._run_example()
        finally:
            for layer in layers.values():
                layer.detach_hook()
        return layers

    def _run_example(self) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        model = self._model
        counter = FlopCounterMode(display=False)
        with ExitStack() as stack, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using `torch.compile", UserWarning)  # the counter's hooks are no cause
            stack.enter_context(isolate_rng())
            stack.enter_context(_eval_mode(model))
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
            elif isinstance(inputs, (tuple, list)):
                model(*inputs)
            else:
                model(inputs)
        root = type(model).__name__
        self._flops = {name: dict(counts) for name, counts in counter.get_flop_counts().items() if name != "Global"}
        self._flops = {name.removeprefix(f"{root}."): counts for name, counts in self._flops.items()}

    @property
    def has_example(self) -> bool:
        """Whether sizes and FLOPs are known."""
        return self._example is not None

    @property
    def named_modules(self) -> list[tuple[str, nn.Module]]:
        """The layers down to ``max_depth``, without the model itself."""
        return [
            (name, module)
            for name, module in self._model.named_modules()
            if name and (self._max_depth == -1 or name.count(".") < self._max_depth)
        ]

    @property
    def layer_names(self) -> list[str]:
        """Dotted names."""
        return list(self._layers)

    @property
    def layer_types(self) -> list[str]:
        """Class names."""
        return [layer.layer_type for layer in self._layers.values()]

    @property
    def in_sizes(self) -> list[Any]:
        """Input shapes, ``"?"`` where unknown."""
        return [layer.in_size for layer in self._layers.values()]

    @property
    def out_sizes(self) -> list[Any]:
        """Output shapes, ``"?"`` where unknown."""
        return [layer.out_size for layer in self._layers.values()]

    @property
    def param_nums(self) -> list[int]:
        """Parameters of each layer; one that two layers share counts in both."""
        return [layer.num_parameters for layer in self._layers.values()]

    @property
    def training_modes(self) -> list[bool]:
        """Whether each layer is in train mode."""
        return [layer.training for layer in self._layers.values()]

    @property
    def total_training_modes(self) -> dict[str, int]:
        """How many modules of the model, itself not counted, are in ``"train"`` and in ``"eval"`` mode."""
        modes = [module.training for module in self._model.modules()][1:]
        return {"train": sum(modes), "eval": len(modes) - sum(modes)}

    @property
    def total_parameters(self) -> int:
        """Elements of all parameters, shared ones counted once, uninitialized ones not at all."""
        return sum(p.numel() for p in self._parameters())

    @property
    def trainable_parameters(self) -> int:
        """Those of :attr:`total_parameters` that require a gradient."""
        return sum(p.numel() for p in self._parameters() if p.requires_grad)

    @property
    def total_layer_params(self) -> int:
        """Those of :attr:`total_parameters` that belong to one of the layers shown."""
        inside = {id(p): p.numel() for _, m in self.named_modules for p in m.parameters() if not is_lazy(p)}
        return sum(inside.values())

    @property
    def model_size(self) -> float:
        """Megabytes (10^6 bytes) that the parameters take in their present dtypes."""
        return sum(p.numel() * p.element_size() for p in self._parameters()) / 1e6

    @property
    def uninitialized_parameters(self) -> int:
        """How many parameters wait for the first batch to get a shape."""
        return sum(is_lazy(p) for p in self._model.parameters())

    @property
    def flop_counts(self) -> dict[str, dict[Any, int]]:
        """For each layer, floating-point operations of one forward pass of the example, by torch operator."""
        return {name: self._flops.get(name, {}) for name in self._layers}

    @property
    def total_flops(self) -> int:
        """Floating-point operations of one forward pass of the example; 0 without one."""
        return sum(self._flops.get(type(self._model).__name__, {}).values())

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (p for p in self._model.parameters() if not is_lazy(p))

    def columns(self) -> list[Column]:
        """The table: a heading and a cell per layer, and a last row for parameters that belong to no layer."""
        counts = [
            get_human_readable_count(n) if n or not layer.has_uninitialized else UNKNOWN_SIZE
            for n, layer in zip(self.param_nums, self._layers.values(), strict=True)
        ]
        table: list[Column] = [
            (" ", [str(i) for i in range(len(counts))]),
            ("Name", self.layer_names),
            ("Type", self.layer_types),
            ("Params", counts),
            ("Mode", ["train" if training else "eval" for training in self.training_modes]),
        ]
        if self.has_example:
            flops = [get_human_readable_count(sum(counts.values())) for counts in self.flop_counts.values()]
            table += [
                ("FLOPs", flops),
                ("In sizes", [str(size) for size in self.in_sizes]),
                ("Out sizes", [str(size) for size in self.out_sizes]),
            ]
        others = self.total_parameters - self.total_layer_params
        if others and self._layers:
            known = {
                " ": " ",
                "Name": "other params",
                "Params": get_human_readable_count(others),
            }
            for heading, cells in table:
                cells.append(known.get(heading, NOT_APPLICABLE))
        return table

    def __str__(self) -> str:
        text = format_summary(
            self.columns(),
            self.total_parameters,
            self.trainable_parameters,
            self.model_size,
            self.total_training_modes,
            self.total_flops,
        )
        n = self.uninitialized_parameters
        return f"{text}\n{not_counted(n)}" if n else text

    __repr__ = __str__


def _device_of(model: nn.Module) -> torch.device:
    tensor = next(iter([*model.parameters(), *model.buffers()]), None)
    return torch.device("cpu") if tensor is None else tensor.device


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def summarize(lightning_module: nn.Module, max_depth: int = 1) -> ModelSummary:
    """Summarize a module down to ``max_depth`` (-1: all the way); print the result to see the table."""
    return ModelSummary(lightning_module, max_depth)


def totals(
    total_parameters: int, trainable_parameters: int, model_size: float, modes: Mapping[str, int], total_flops: int
) -> list[tuple[str, str]]:
    """What stands below the table: label and value. FLOPs only if there are any."""
    rows = [
        ("Trainable params", get_human_readable_count(trainable_parameters)),
        ("Non-trainable params", get_human_readable_count(total_parameters - trainable_parameters)),
        ("Total params", get_human_readable_count(total_parameters)),
        ("Total estimated model params size (MB)", get_formatted_model_size(model_size)),
        ("Modules in train mode", str(modes["train"])),
        ("Modules in eval mode", str(modes["eval"])),
    ]
    return [*rows, ("Total FLOPs", get_human_readable_count(total_flops))] if total_flops else rows


def not_counted(uninitialized: int) -> str:
    """The line about parameters without a shape."""
    return f"{uninitialized:<9} Uninitialized parameters, not counted: their shape comes from the first batch"


def format_summary(
    columns: list[Column],
    total_parameters: int,
    trainable_parameters: int,
    model_size: float,
    modes: Mapping[str, int],
    total_flops: int,
) -> str:
    """The table and the totals as text."""
    lines = []
    if columns and columns[0][1]:
        widths = [max(map(len, [heading, *cells])) for heading, cells in columns]
        rows = [[heading for heading, _ in columns], *zip(*(cells for _, cells in columns), strict=True)]
        table = [
            " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        rule = "-" * max(map(len, table))
        lines += [table[0], rule, *table[1:], rule]
    lines += [
        f"{value:<9} {label}"
        for label, value in totals(total_parameters, trainable_parameters, model_size, modes, total_flops)
    ]
    return "\n".join(lines)


def parse_batch_shape(batch: Any) -> Any:
    """The shape of a tensor as a list, a list of shapes for a tuple or list, ``"?"`` for anything else.

    Example::

        >>> parse_batch_shape((torch.ones(4, 3), torch.ones(4)))
        [[4, 3], [4]]
    """
    if isinstance(batch, Tensor):
        return list(batch.shape)
    if isinstance(batch, (tuple, list)):
        return [parse_batch_shape(item) for item in batch]
    return UNKNOWN_SIZE


def get_formatted_model_size(total_model_size: float) -> str:
    """Megabytes with three decimals."""
    return f"{total_model_size:,.3f}"


def get_human_readable_count(number: int) -> str:
    """A count in thousands (K), millions (M), billions (B) or trillions (T).

    Example::

        >>> [get_human_readable_count(n) for n in (123, 1234, 2_000_000, 5 * 10**15)]
        ['123  ', '1.2 K', '2.0 M', '5,000 T']

    Raises:
        MisconfigurationException: ``number`` is negative.
    """
    if number < 0:
        raise MisconfigurationException(f"get_human_readable_count({number}): a count is 0 or more.")
    power = min((len(str(int(number))) - 1) // 3, len(_UNITS) - 1)
    value = number / 1000**power
    text = f"{int(value):,d}" if power == 0 or value >= 100 else f"{value:,.1f}"
    return f"{text} {_UNITS[power] or ' '}"
