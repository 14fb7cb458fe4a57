"""The metric bus behind ``self.log``: values go into slots, and leave them together.

Logging a value stores it on its device and returns. Values come to the host in one transfer when a logger writes, the
bar redraws or a callback asks. At the end of an epoch one packed collective reduces the scalars of all slots over the
ranks, weighted by the number of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from treadle.reduction import REDUCTIONS, Reduction, Row, compute_alone, reduce_over_ranks
from treadle_fabric import MisconfigurationException, rank_zero_warn
from treadle_fabric.data import infer_batch_size
from treadle_fabric.loggers.scalars import to_numbers

if TYPE_CHECKING:
    from treadle.module import LightningModule
    from treadle_fabric import Fabric

__all__ = ["NOT_LOGGING", "NOWHERE", "MetricSink", "Results", "flatten_metrics", "to_floats"]

_OPTIONS: Final = (
    "prog_bar", "logger", "on_step", "on_epoch", "reduce_fx", "enable_graph", "sync_dist", "add_dataloader_idx",
    "rank_zero_only",
)  # fmt: skip
LogOptions: TypeAlias = tuple[
    bool, bool | None, bool | None, bool | None, str | Callable[[Any], Any], bool, bool, bool, bool
]

_STEP_HOOKS: Final = frozenset(
    """training_step on_train_batch_start on_train_batch_end on_before_zero_grad optimizer_zero_grad on_before_backward
    backward on_after_backward on_before_optimizer_step optimizer_step configure_gradient_clipping clip_gradients
    lr_scheduler_step""".split()
)
_EVAL_STEP_HOOKS: Final = frozenset(
    """validation_step on_validation_batch_start on_validation_batch_end
    test_step on_test_batch_start on_test_batch_end""".split()
)
_EPOCH_HOOKS: Final = frozenset(
    """on_train_start on_train_epoch_start on_train_epoch_end on_validation_start on_validation_epoch_start
    on_validation_epoch_end on_test_start on_test_epoch_start on_test_epoch_end""".split()
)
_ON_TENSORS: Final[dict[str, Callable[[Tensor], Tensor]]] = {"sum": torch.sum, "min": torch.amin, "max": torch.amax}
_ON_NUMBERS: Final[dict[str, Callable[[list[Any]], Any]]] = {"sum": sum, "min": min, "max": max}
_FOLD_EVERY: Final = 256  # pending values are summed in one operation, this many at a time


class MetricSink(Protocol):
    """What ``self.log`` writes to."""

    def log(
        self, module: LightningModule, name: str, value: Any, options: LogOptions, batch_size: int | None
    ) -> None: ...


class _NotLogging:
    """Where values go without a trainer: to the Fabric that set the module up, if any."""

    def log(self, module: LightningModule, name: str, value: Any, options: LogOptions, batch_size: int | None) -> None:
        if module.fabric is None or module._trainer is not None:
            where = "without a Trainer or a Fabric" if module._trainer is None else "outside a run of its Trainer"
            rank_zero_warn(
                f"`self.log({name!r}, ...)` was called {where}; the value is dropped. Log in a hook of a run, or after"
                " `fabric.setup(module)`."
            )
        elif options[1] is not False:
            for key, scalar in flatten_metrics({name: value}):
                module.fabric.log(key, _step_value(scalar) if is_metric(scalar) else scalar)


NOT_LOGGING: Final = _NotLogging()


class _Nowhere:
    """Where values go when a batch runs again."""

    def log(self, *args: Any) -> None:
        pass


NOWHERE: Final = _Nowhere()


def flatten_metrics(dictionary: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The entries of a dictionary, of nested ones joined by ``/``, or of a torchmetrics collection."""
    if hasattr(dictionary, "compute_groups"):
        items: Iterable[tuple[Any, Any]] = dictionary.items(keep_base=False, copy_state=False)
    elif isinstance(dictionary, Mapping):
        items = dictionary.items()
    else:
        raise MisconfigurationException(
            f"log_dict got {type(dictionary).__name__}; it takes a dictionary of names and values: use `self.log` for"
            " one value."
        )
    for name, value in items:
        if isinstance(value, Mapping) or hasattr(value, "compute_groups"):
            yield from flatten_metrics(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def to_floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The same names and floats, in one transfer to the host for every device and dtype among the tensors."""
    return {name: float(value) for name, value in to_numbers(metrics).items()}


def is_metric(value: Any) -> bool:
    """Whether it is a torchmetrics object, or behaves like one."""
    return callable(getattr(value, "compute", None)) and callable(getattr(value, "reset", None))


def _step_value(metric: Any) -> Any:
    """What a torchmetrics object computed of the last batch; of all so far where it was only updated."""
    cached = getattr(metric, "_forward_cache", None)
    return metric.compute() if cached is None else cached


class Slot:
    """One logged name in one hook (and loader): its latest value, and what its epoch value is made of."""

    __slots__ = (
        "closed", "forked", "fresh", "has_value", "loader", "logger", "metric", "name", "on_epoch", "on_step",
        "options", "pending", "prog_bar", "rank_zero_only", "reduce", "suffix", "total", "value", "values",
        "weight", "weights",
    )  # fmt: skip

    def __init__(self, name: str, options: LogOptions, on_step: bool, on_epoch: bool) -> None:
        self.name, self.suffix = name, ""
        self.options = options
        self.on_step, self.on_epoch, self.forked = on_step, on_epoch, on_step and on_epoch
        self.prog_bar, self.logger = options[0], options[1] is not False
        self.reduce: Reduction | Callable[[Tensor], Any] = REDUCTIONS.get(options[4], options[4])  # type: ignore[arg-type]
        self.rank_zero_only = options[8]
        self.metric: Any = None
        self.loader: int | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the epoch."""
        self.value: Any = None
        self.has_value = self.fresh = self.closed = False
        self.pending: list[Any] = []
        self.weights: list[float] = []
        self.values: list[Any] = []  # all of them, for a callable reduction
        self.total: Any = None
        self.weight = 0.0

    def entries(self, value: Any, fork: str = "") -> list[tuple[str, Any]]:
        """A value under the names it leaves with; ``fork`` is added where step and epoch values both do."""
        end = (fork if self.forked else "") + self.suffix
        if isinstance(value, Mapping):  # a torchmetrics object may compute several
            return [(name + end, scalar) for name, scalar in flatten_metrics(value, f"{self.name}/")]
        return [(self.name + end, value)]

    def accumulate(self, value: Any, weight: float) -> None:
        """Take a value into the epoch's reduction."""
        if not weight and self.reduce == "mean":
            return  # of no samples: it counts for nothing, and may be NaN
        self.pending.append(value)
        self.weights.append(weight)
        if len(self.pending) >= _FOLD_EVERY:
            self.fold()

    def fold(self) -> None:
        """Reduce what is pending in one operation, without waiting for the device."""
        if not self.pending:
            return
        values, weights = self.pending, self.weights
        self.pending, self.weights = [], []
        if callable(self.reduce):
            self.values += values
            return
        among = any(isinstance(v, Tensor) for v in values)
        part = self._of_tensors(values, weights) if among else self._of_numbers(values, weights)
        if self.total is None:
            self.total = part
        elif self.reduce in ("min", "max"):
            pair = _stack([self.total, part])
            self.total = _ON_TENSORS[self.reduce](pair)
        else:
            self.total = self.total + part
        self.weight += sum(weights)

    def _of_numbers(self, values: list[Any], weights: list[float]) -> Any:
        if self.reduce == "mean":
            return sum(v * w for v, w in zip(values, weights, strict=True))
        return _ON_NUMBERS[self.reduce](values)  # type: ignore[index]

    def _of_tensors(self, values: list[Any], weights: list[float]) -> Tensor:
        """With tensors among them it is one, whichever kind of value was logged last."""
        if self.reduce in ("mean", "sum") and all(map(_is_at_hand, values)):
            numbers = [v.item() if isinstance(v, Tensor) else v for v in values]
            return torch.tensor(float(self._of_numbers(numbers, weights)), dtype=torch.float64)
        stacked = _stack(values)
        if self.reduce == "mean":
            alike = weights.count(weights[0]) == len(weights)  # to send several to the device would wait for it
            return stacked.sum() * weights[0] if alike else stacked @ stacked.new_tensor(weights)
        return _ON_TENSORS[self.reduce](stacked)  # type: ignore[index]

    def compute(self) -> Any:
        """The epoch's value on this rank."""
        if self.metric is not None:
            return self.metric.compute()
        self.fold()
        if callable(self.reduce):
            return self.reduce(_stack(self.values))
        if self.total is None:  # a mean over no samples
            return float("nan")
        return self.total / self.weight if self.reduce == "mean" else self.total


def _is_at_hand(value: Any) -> bool:
    """Whether it costs nothing to have it as a Python number, which is as exact as float64."""
    return not isinstance(value, Tensor) or (value.is_cpu and not value.requires_grad and not value.is_complex())


def _stack(values: list[Any]) -> Tensor:
    """Scalars of any kind as one vector, in double precision where the device has it."""
    device = next((v.device for v in values if isinstance(v, Tensor) and v.device.type != "cpu"), torch.device("cpu"))
    dtype = torch.float32 if device.type == "mps" else torch.float64
    if all(isinstance(v, Tensor) and v.device == device and v.dtype == values[0].dtype for v in values):
        return torch.stack([v.reshape(()) for v in values]).to(dtype)
    return torch.stack([torch.as_tensor(v, dtype=dtype, device=device).reshape(()) for v in values])


_KEPT: Final = ("value", "has_value", "fresh", "closed", "pending", "weights", "values", "total", "weight")


class Results:
    """The slots of one stage (training, or one evaluation), filled by :meth:`log`."""

    def __init__(self, *, training: bool, fabric: Fabric) -> None:
        self.training = training
        self.hook = ""
        """The hook that is running, set by whoever calls it: the defaults of ``log`` depend on it."""
        self.batch: Any = None
        self.batch_size: int | None = None
        self.dataloader_idx: int | None = None
        self.slots: dict[tuple[str, str, int | None], Slot] = {}
        self.open = False
        """Whether something was logged since epoch values were taken the last time."""
        self._resumed_samples = 1.0  # of the batch that a checkpoint was saved in the end of
        self._names: dict[str, str] = {}  # a final name -> the hook that logs it
        self._fabric = fabric
        self.alone = fabric.world_size == 1
        """Whether there are no other ranks to reduce over."""
        self._roots: list[LightningModule] = []
        """Where torchmetrics objects are looked up by path."""

    def belongs_to(self, module: LightningModule) -> None:
        """The module whose values are logged here."""
        self._roots = [module]

    def log(self, module: LightningModule, name: str, value: Any, options: LogOptions, batch_size: int | None) -> None:
        """Store a value; see :meth:`treadle.LightningModule.log`."""
        slot = self.slots.get((self.hook, name, self.dataloader_idx))
        if slot is None or slot.options != options:
            if isinstance(value, Mapping) or hasattr(value, "compute_groups"):
                for key, item in flatten_metrics(value, f"{name}/"):
                    self.log(module, key, item, options, batch_size)
                return
            slot = self._new_slot(name, options)
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise MisconfigurationException(
                    f"`self.log({name!r}, ...)` got a tensor of shape {tuple(value.shape)}; one number is logged under"
                    " a name: reduce it first, with `.mean()` say."
                )
            if value.ndim:
                value = value.reshape(())
            if not options[5]:
                value = value.detach().clone()  # the caller may go on to change it in place
        elif not isinstance(value, (int, float)):
            if is_metric(value):
                slot.metric = value
                slot.value = _step_value(value) if slot.on_step else None
                slot.has_value = slot.fresh = self.open = True
                return
            value = _number(name, value)
        slot.value = value
        slot.has_value = slot.fresh = True
        if slot.on_epoch:
            self.open = True
            if batch_size is None:
                batch_size = self.batch_size
                if batch_size is None:
                    batch_size = self.batch_size = self._infer_batch_size(slot)
            slot.accumulate(value, batch_size)

    def _infer_batch_size(self, slot: Slot) -> int:
        size = 1 if self.batch is None else infer_batch_size(self.batch)
        if size is None and slot.reduce == "mean":
            raise MisconfigurationException(
                f"`self.log({slot.name!r}, ...)` weights its mean over the epoch by the batch size, and the batch (a"
                f" {type(self.batch).__name__}) has no tensor that would tell it: pass `batch_size`."
            )
        return 1 if size is None else size

    def begin_batch(self, batch: Any) -> None:
        """The batch that values logged from now on belong to; None outside batches."""
        self.batch = batch
        self.batch_size = None

    def reset(self) -> None:
        """Forget values and metric objects' states; the epoch is over."""
        for slot in self.slots.values():
            if slot.metric is not None and slot.on_epoch:
                slot.metric.reset()
        self.slots.clear()
        self.open = False
        self._names.clear()
        self.begin_batch(None)

    def state_dict(self) -> dict[str, Any]:
        """The slots of the unfinished epoch, as tensors and plain containers; every rank calls it.

        Of a callable reduction its result so far is kept, which counts until the callable is passed again.
        """
        slots = []
        everywhere = self._gathered()
        for (hook, name, loader), slot in self.slots.items():
            path = next((n for m in self._roots for n, child in m.named_modules() if child is slot.metric), None)
            entry = {"key": (hook, name, loader), "metric": path, **{k: getattr(slot, k) for k in _KEPT}}
            reduction: Any = slot.reduce
            if callable(slot.reduce):
                values = everywhere.get(f"{slot.name}{slot.suffix} in {hook}", slot.values + slot.pending)
                reduction, entry["reduced"] = "", slot.reduce(_stack(values)) if values else None
            slots.append({**entry, "options": (*slot.options[:4], reduction, *slot.options[5:])})
        return {"slots": slots, "samples": self._samples()}

    def _gathered(self) -> dict[str, Any]:
        """The values of all ranks for callable reductions; the ranks may have logged different names."""
        if self.alone:
            return {}
        rows: list[Row] = [
            (f"{slot.name}{slot.suffix} in {hook}", "gather", slot.values + slot.pending, 0.0)
            for (hook, _, _), slot in self.slots.items()
            if callable(slot.reduce) and not slot.rank_zero_only
        ]
        return reduce_over_ranks(self._fabric, rows)

    def load_state_dict(self, state: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave; ``metrics`` are the module's torchmetrics objects by path."""
        self.reset()
        for entry in state["slots"]:
            self.hook, name, self.dataloader_idx = entry["key"]
            options = tuple(entry["options"])
            if "reduced" in entry:
                options = (*options[:4], _Reduced(entry["reduced"]), *options[5:])
            slot = self._new_slot(name, options)
            for key in _KEPT:
                setattr(slot, key, entry[key])
            slot.metric = metrics.get(entry["metric"]) if entry["metric"] is not None else None
        self.hook, self.dataloader_idx, self.open = "", None, True
        self._resumed_samples = state.get("samples", 1.0)

    def _new_slot(self, name: str, options: LogOptions) -> Slot:
        hook = self.hook
        _, _, on_step, on_epoch, reduce_fx, _, _, add_idx, _ = options
        if not isinstance(name, str):
            raise MisconfigurationException(f"`self.log` got the name {name!r}; a name is a string.")
        if hook not in _STEP_HOOKS and hook not in _EVAL_STEP_HOOKS and hook not in _EPOCH_HOOKS:
            raise MisconfigurationException(
                f"`self.log({name!r}, ...)` was called in `{hook or 'code outside the hooks of a run'}`, where nothing"
                " can be logged: log in a step or an epoch hook, or use `self.logger` directly."
            )
        in_batch = hook not in _EPOCH_HOOKS
        if on_step and not in_batch:
            raise MisconfigurationException(
                f"`self.log({name!r}, on_step=True)` was called in `{hook}`, which has no steps: use on_epoch=True."
            )
        on_step = (self.training and in_batch) if on_step is None else on_step
        on_epoch = (not (self.training and in_batch)) if on_epoch is None else on_epoch
        if not on_step and not on_epoch:
            raise MisconfigurationException(
                f"`self.log({name!r}, on_step=False, on_epoch=False)` logs nothing: set one of them."
            )
        if reduce_fx not in REDUCTIONS and not callable(reduce_fx):
            raise MisconfigurationException(
                f"`self.log({name!r}, reduce_fx={reduce_fx!r})`: reduce_fx is 'mean', 'min', 'max', 'sum' or a"
                " callable."
            )
        key = (hook, name, self.dataloader_idx)
        if key in self.slots and _same_code(self.slots[key].options, options):
            slot = self.slots[key]
            slot.options, slot.reduce = options, REDUCTIONS.get(reduce_fx, reduce_fx)  # type: ignore[arg-type]
            return slot
        if key in self.slots:
            both = zip(_OPTIONS, self.slots[key].options, options, strict=True)
            differ = ", ".join(f"{option}={one!r} and {option}={two!r}" for option, one, two in both if one != two)
            raise MisconfigurationException(
                f"`self.log({name!r}, ...)` was called twice in `{hook}` with different options, {differ}: use the same"
                " options, or another name."
            )
        if add_idx and "/dataloader_idx_" in name:
            raise MisconfigurationException(
                f"`self.log({name!r}, ...)`: add_dataloader_idx=True adds the loader to the name: leave it out."
            )
        several = self.dataloader_idx is not None and in_batch
        suffix = f"/dataloader_idx_{self.dataloader_idx}" if several and add_idx else ""
        final = name + suffix
        if several and not add_idx and final in self._names:
            raise MisconfigurationException(
                f"`self.log({name!r}, add_dataloader_idx=False)` was called for a second dataloader: give each its own"
                " name."
            )
        self._names.setdefault(final, hook)
        slot = self.slots[key] = Slot(name, options, on_step, on_epoch)
        slot.suffix = suffix
        slot.loader = self.dataloader_idx
        return slot

    # ------------------------------------------------------------------------------------------------ what leaves

    def latest(self, view: Literal["callback", "logged", "bar"]) -> dict[str, Any]:
        """The last value of every step-logged name, as one of the three sees it in the middle of an epoch."""
        out: dict[str, Any] = {}
        for slot in self.slots.values():
            if not (slot.on_step and slot.has_value):
                continue
            if view == "callback":
                if not self.training:
                    continue
                if slot.forked and not slot.closed:
                    out.update(slot.entries(slot.value))
            elif not (slot.logger if view == "logged" else slot.prog_bar):
                continue
            out.update(slot.entries(slot.value, "_step"))
        return out

    def take_step_metrics(self) -> dict[str, Any]:
        """For the loggers: what was logged on steps since the last call.

        In training it is reduced over the ranks, weighted by the samples of the batch; every rank has to ask then.
        """
        out: dict[str, Any] = {}
        rows: list[Row] = []
        distributed = self.training and not self.alone  # evaluation may be uneven over ranks
        samples = self._samples() if distributed else 1.0
        for slot in self.slots.values():
            if slot.on_step and slot.fresh and slot.logger:
                slot.fresh = False
                entries = slot.entries(slot.value, "_step")
                out.update(entries)
                if distributed and not slot.rank_zero_only and slot.metric is None and not callable(slot.reduce):
                    weight = samples if slot.reduce == "mean" else 1.0
                    rows += [(name, slot.reduce, value * weight if weight else 0.0, weight) for name, value in entries]
        if distributed:
            out.update(reduce_over_ranks(self._fabric, rows))
        return out

    def _samples(self) -> float:
        if self.batch is None:
            return self._resumed_samples
        size = infer_batch_size(self.batch)
        return 1.0 if size is None else float(size)

    def epoch_metrics(self, *, local: bool = False) -> list[tuple[Slot, Any]]:
        """The value of every epoch-logged slot that was not asked for yet: scalar tensors on the device, or numbers.

        They are reduced over the ranks unless ``local``; every rank has to ask then, with or without values.
        """
        self.open = False
        found: list[tuple[Slot, Any]] = []
        rows: list[Row] = []
        distributed = not self.alone and not local
        slots = {k: s for k, s in self.slots.items() if s.on_epoch and s.has_value and not s.closed}
        for (hook, _, _), slot in slots.items():
            if distributed and not slot.rank_zero_only:
                slot.fold()
                name = f"{slot.name}{slot.suffix} in {hook}"
                if slot.metric is not None:  # reduces over the ranks itself, if all have it
                    rows.append((name, "count", None, 1.0))
                elif callable(slot.reduce):
                    rows.append((name, "gather", slot.values, 0.0))
                else:
                    rows.append((name, slot.reduce, 0.0 if slot.total is None else slot.total, slot.weight))
        reduced = reduce_over_ranks(self._fabric, rows) if distributed else {}
        for (hook, _, _), slot in slots.items():
            slot.closed = True
            value = reduced.get(f"{slot.name}{slot.suffix} in {hook}")
            if slot.metric is not None:
                value = (
                    slot.metric.compute() if value in (None, self._fabric.world_size) else compute_alone(slot.metric)
                )
            elif isinstance(value, list):
                slot.values, value = value, None
            if value is None:
                value = slot.compute()
            if isinstance(value, Tensor) and value.numel() == 1:
                value = value.reshape(())
                if value.dtype == torch.float64 and slot.metric is None:
                    value = value.to(torch.get_default_dtype())
            found.append((slot, value))
        mine = {row[0] for row in rows}
        return found + [_elsewhere(n, v) for n, v in reduced.items() if n not in mine and isinstance(v, Tensor)]


class _Reduced:
    """Stands for a callable reduction that a checkpoint could not keep."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def __call__(self, values: Any) -> Any:
        return self.result


def _same_code(one: LogOptions, other: LogOptions) -> bool:
    """Whether only ``reduce_fx`` differs, and only because a lambda is made anew each time or training was resumed."""
    code = getattr(one[4], "__code__", None)
    same = code is not None and code is getattr(other[4], "__code__", None)
    same |= isinstance(one[4], _Reduced) or one[4] == REDUCTIONS.get(other[4], other[4])
    return same and one[:4] + one[5:] == other[:4] + other[5:]


def _elsewhere(row: str, value: Tensor) -> tuple[Slot, Any]:
    """What only other ranks logged, because this one had no samples say; every rank is to know it."""
    label, _, _ = row.rpartition(" in ")
    name, mark, loader = label.partition("/dataloader_idx_")
    slot = Slot(name, (False, False, None, None, "mean", False, False, True, False), on_step=False, on_epoch=True)
    slot.suffix, slot.loader = mark + loader, int(loader) if mark else None
    return slot, value.to(torch.get_default_dtype())


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, str):
            raise TypeError
        return float(value)  # numpy scalars among others
    except (TypeError, ValueError):
        raise MisconfigurationException(
            f"`self.log({name!r}, ...)` got {type(value).__name__}; a number, a tensor of one element, a torchmetrics"
            " object or a dictionary of these can be logged."
        ) from None
