"""The metric bus behind ``self.log``: values go into slots, and leave them together.

Logging a value stores it on its device and returns. Values come to the host in one transfer when a logger writes, the
bar redraws or a callback asks. At the end of an epoch one packed collective reduces the scalars of all slots over the
ranks, weighted by the number of samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import torch
from torch import Tensor

from treadle.metrics.reduction import Kind, Reduced, Row, Told, reduce_over_ranks, reduction_named
from treadle_fabric import (
    Fabric,
    MisconfigurationException,
    compute_alone,
    forget_computed,
    infer_batch_size,
    rank_zero_warn,
    with_plain_names,
)

if TYPE_CHECKING:
    from treadle.contracts import LightningModule
from treadle.metrics.options import GivenOptions, LogOptions, read_options
from treadle.metrics.slot import Slot, stack
from treadle.metrics.values import flatten_metrics, is_metric, metrics_by_path, scalar_on, step_value, whole

__all__ = ["Results"]

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


_KEPT: Final = ("value", "has_value", "fresh", "closed", "pending", "weights", "values", "total", "weight", "dtype")


class Results:
    """The slots of one stage (training, or one evaluation), filled by :meth:`log`."""

    def __init__(self, *, training: bool, fabric: Fabric) -> None:
        self.training = training
        self.hook = ""
        """The hook that is running; the caller of the hook sets it. The defaults of ``log`` depend on it."""
        self.batch: Any = None
        self.batch_size: int | None = None
        self.dataloader_idx: int | None = None
        self.slots: dict[tuple[str, str, int | None], Slot] = {}
        self.open = False
        """Whether something was logged since epoch values were taken the last time."""
        self.published: set[str] = set()
        """The names of all values that have left."""
        self._resumed_samples = 1.0  # of the batch at whose end the checkpoint was saved
        self._fabric = fabric
        self.alone = fabric.world_size == 1
        """Whether there are no other ranks to reduce over."""
        self._roots: list[LightningModule] = []
        """Where torchmetrics objects are looked up by path."""
        self.callbacks: Sequence[Any] = ()
        self.idle: set[int | None] = set()
        """The loaders of which this rank had no batch; None where there is one loader."""
        self._told: set[str] = set()  # names that were asked to go to loggers, where there are none

    def belongs_to(self, module: LightningModule, callbacks: Sequence[Any] = ()) -> None:
        """Set the module whose values are logged here, and the callbacks, which may log through it."""
        self._roots, self.callbacks = [module], callbacks

    def log(
        self, module: LightningModule, name: str, value: Any, options: GivenOptions, batch_size: int | None
    ) -> None:
        """Store a value; see :meth:`treadle.LightningModule.log`."""
        slot = self.slots.get((self.hook, name, self.dataloader_idx))
        if slot is None and self.dataloader_idx is not None and not LogOptions(*options).add_dataloader_idx:
            slot = self._of_all_loaders(name, value)
        if slot is None or slot.options != options:
            if isinstance(value, Mapping) or hasattr(value, "compute_groups"):
                for key, item in flatten_metrics(value, f"{name}/"):
                    self.log(module, key, item, options, batch_size)
                return
            if options[1] and name not in self._told and not module.trainer.loggers:  # asked for, not the default
                self._told.add(name)
                rank_zero_warn(
                    f"You called `self.log({name!r}, ..., logger=True)` but have no logger configured: pass one to the"
                    " Trainer, or leave out `logger=True`."
                )
            slot = self._new_slot(name, LogOptions(*options))
        if isinstance(value, Tensor):
            if type(value) is not Tensor:
                value = whole(value)
            if value.numel() != 1:
                raise MisconfigurationException(
                    f"`self.log({name!r}, ...)` got a tensor of shape {tuple(value.shape)}; one number is logged under"
                    " a name: reduce it first, with `.mean()` say."
                )
            if value.ndim:
                value = value.reshape(())
            if not slot.options.enable_graph:
                value = value.detach().clone()  # the caller may go on to change it in place
        elif not isinstance(value, (int, float)):
            if is_metric(value):
                slot.metric = value
                slot.value = step_value(value, compute_alone) if slot.on_step else None
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

    def _of_all_loaders(self, name: str, value: Any) -> Slot | None:
        """Return the slot of a name that several loaders share; None where none has logged it yet."""
        slot = self.slots.get((self.hook, name, None))
        if slot is not None and slot.loader != self.dataloader_idx:
            if slot.metric is not None and is_metric(value) and slot.metric is not value:
                raise MisconfigurationException(
                    f"`self.log({name!r}, add_dataloader_idx=False)` got another torchmetrics object for another"
                    " dataloader: log one object for all dataloaders, or give each its own name."
                )
            slot.loader = None
        return slot

    def _infer_batch_size(self, slot: Slot) -> int:
        size = 1 if self.batch is None else infer_batch_size(self.batch)
        if size is None and slot.reduce == "mean":
            raise MisconfigurationException(
                f"`self.log({slot.name!r}, ...)` weights its mean over the epoch by the batch size, and the batch (a"
                f" {type(self.batch).__name__}) has no tensor whose size could be used: pass `batch_size`."
            )
        return 1 if size is None else size

    def forget_computed(self) -> None:
        """Have all torchmetrics objects compute anew, on every rank.

        A rank without samples still has the result of the last evaluation, and would not take part in the next one.
        """
        for metric in self._paths().values():
            forget_computed(metric)

    def begin_batch(self, batch: Any) -> None:
        """Set the batch of the values that are logged from now on; None outside batches."""
        self.batch = batch
        self.batch_size = None

    def end_batches(self) -> None:
        """Forget the last batch of the epoch, or that of the run that was resumed."""
        self.begin_batch(None)
        self._resumed_samples = 1.0

    def reset(self) -> None:
        """Forget values and reset metric objects, because the epoch is over."""
        for slot in self.slots.values():
            if slot.metric is not None and slot.on_epoch:
                slot.metric.reset()
        self.slots.clear()
        self.idle.clear()
        self.open = False
        self.end_batches()

    def state_dict(self) -> dict[str, Any]:
        """Return the slots of the unfinished epoch, as tensors and plain containers; every rank calls it.

        A callable reduction cannot be saved: its result so far is, and is used until the callable is passed again.
        """
        slots = []
        everywhere = self._gathered()
        for (hook, name, loader), slot in self.slots.items():
            path = next((name for name, module in self._named_modules() if module is slot.metric), None)
            entry = {"key": (hook, name, loader), "metric": path, **{k: getattr(slot, k) for k in _KEPT}}
            reduction: Any = slot.reduce
            if callable(slot.reduce):
                values = everywhere.get(f"{slot.name}{slot.suffix} in {hook}", slot.values + slot.pending)
                reduction, entry["reduced"] = "", slot.reduce(stack(values)) if values else None
            slots.append({**entry, "options": slot.options._replace(reduce_fx=reduction)._asdict()})
        return {"slots": slots, "samples": self._samples()}

    def _named_modules(self) -> Iterator[tuple[str, Any]]:
        for root in self._roots:
            yield from with_plain_names(root, root.named_modules())

    def _gathered(self) -> dict[str, Any]:
        """Gather the values of all ranks for callable reductions; the ranks may have logged different names."""
        if self.alone:
            return {}
        rows: list[Row] = [
            Row(f"{slot.name}{slot.suffix} in {hook}", "gather", slot.values + slot.pending, 0.0)
            for (hook, _, _), slot in self.slots.items()
            if callable(slot.reduce) and not slot.rank_zero_only
        ]
        return reduce_over_ranks(self._fabric, rows).values

    def load_state_dict(self, state: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; ``metrics`` are the module's torchmetrics objects by path."""
        self.reset()
        for entry in state["slots"]:
            self.hook, name, self.dataloader_idx = entry["key"]
            options = read_options(entry["options"])
            if "reduced" in entry:
                options = options._replace(reduce_fx=_Reduced(entry["reduced"]))
            slot = self._new_slot(name, options)
            for key in _KEPT:
                setattr(slot, key, entry.get(key, getattr(slot, key)))
            slot.metric = metrics.get(entry["metric"]) if entry["metric"] is not None else None
        self.hook, self.dataloader_idx, self.open = "", None, True
        self._resumed_samples = state.get("samples", 1.0)

    def _new_slot(self, name: str, options: LogOptions) -> Slot:
        hook = self.hook
        on_step, on_epoch, reduce_fx = options.on_step, options.on_epoch, options.reduce_fx
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
        reduction = reduction_named(reduce_fx)
        if reduction is None and not callable(reduce_fx):
            raise MisconfigurationException(
                f"`self.log({name!r}, reduce_fx={reduce_fx!r})`: reduce_fx is 'mean', 'min', 'max', 'sum' or a"
                " callable."
            )
        several = self.dataloader_idx is not None and in_batch
        key = (hook, name, None if several and not options.add_dataloader_idx else self.dataloader_idx)
        if key in self.slots and _same_code(self.slots[key].options, options):
            slot = self.slots[key]
            slot.options, slot.reduce = options, reduction or reduce_fx  # type: ignore[assignment]
            return slot
        if key in self.slots:
            both = zip(LogOptions._fields, self.slots[key].options, options, strict=True)
            differ = ", ".join(f"{option}={one!r} and {option}={two!r}" for option, one, two in both if one != two)
            raise MisconfigurationException(
                f"`self.log({name!r}, ...)` was called twice in `{hook}` with different options, {differ}: use the same"
                " options, or another name."
            )
        if options.add_dataloader_idx and "/dataloader_idx_" in name:
            raise MisconfigurationException(
                f"`self.log({name!r}, ...)`: add_dataloader_idx=True adds the loader to the name: leave it out."
            )
        suffix = f"/dataloader_idx_{self.dataloader_idx}" if several and options.add_dataloader_idx else ""
        slot = self.slots[key] = Slot(name, options, on_step, on_epoch)
        slot.suffix = suffix
        slot.loader = self.dataloader_idx
        return slot

    # ------------------------------------------------------------------------------------------------ what leaves

    def latest(self, view: Literal["callback", "logged", "bar"]) -> dict[str, Any]:
        """Return the last value of every name logged on steps, for callbacks, loggers or the progress bar."""
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
        """Return, for the loggers, the values logged on steps since the last call.

        In training they are reduced over the ranks, weighted by the samples of the batch; every rank calls it then.
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
                    for name, value in entries:
                        exact = scalar_on(value if weight else 0.0, torch.float64, self._fabric.device)
                        rows.append(Row(name, slot.reduce, exact * weight, weight, _kind_of(value)))
        if distributed:
            out.update(reduce_over_ranks(self._fabric, rows).values)
        return out

    def _samples(self) -> float:
        if self.batch is None:
            return self._resumed_samples
        size = infer_batch_size(self.batch)
        return 1.0 if size is None else float(size)

    def epoch_metrics(self, *, local: bool = False) -> list[tuple[Slot, Any]]:
        """Return the epoch value of every slot that was not taken yet: scalar tensors on the device, or numbers.

        Unless ``local``, they are reduced over the ranks, and every rank calls it, with or without values.
        """
        self.open = False
        found: list[tuple[Slot, Any]] = []
        rows: list[Row] = []
        distributed = not self.alone and not local
        slots = {k: s for k, s in self.slots.items() if s.on_epoch and s.has_value and not s.closed}
        for key, slot in slots.items():
            if distributed and not slot.rank_zero_only:
                slot.fold()
                name = _row_of(key, slot)
                if slot.metric is not None:  # reduces over the ranks itself, if all have it
                    rows.append(Row(name, "count", None, 1.0))
                elif callable(slot.reduce):
                    rows.append(Row(name, "gather", slot.values, 0.0, slot.kind))
                else:
                    rows.append(Row(name, slot.reduce, slot.sum, slot.weight, slot.kind))
        reduced = reduce_over_ranks(self._fabric, rows, self._tell, rounds=True) if distributed else Reduced()
        values = dict(reduced.values)
        slots.update(self._of_others(reduced, {row.name for row in rows}))
        objects = {_row_of(key, slot): slot for key, slot in slots.items() if slot.metric is not None}
        for name, slot in sorted(objects.items(), key=lambda item: item[0]):  # in one order on all ranks
            together = distributed and not slot.rank_zero_only and self._is_everywhere(slot, values[name], reduced)
            values[name] = slot.metric.compute() if together or self.alone else compute_alone(slot.metric)
        for key, slot in slots.items():
            slot.closed = True
            name = _row_of(key, slot)
            value, kind = values.get(name), reduced.kinds.get(name)
            if kind is not None:  # all ranks round alike
                slot.dtype = torch.float64 if kind is Kind.DOUBLE else torch.float32
            if kind is Kind.NUMBER and isinstance(value, Tensor) and slot.metric is None:
                value = value.item()
            if isinstance(value, list):
                slot.values, value = value, None
            if value is None:
                value = slot.compute()
            if isinstance(value, Tensor) and value.numel() == 1:
                value = value.reshape(())
                if slot.metric is None:
                    value = value.to(slot.dtype)
            found.append((slot, value))
        return found

    def _tell(self) -> Told:
        """Tell ranks that logged other names what they need to know of this rank's."""
        paths = self._paths()
        by_id = {id(metric): path for path, metric in paths.items()}
        facts = {
            _row_of((hook, name, loader), slot): _Facts(
                hook,
                slot.name,
                slot.loader,
                {**slot.options._asdict(), "reduce_fx": slot.reduce if isinstance(slot.reduce, str) else "mean"},
                by_id.get(id(slot.metric)),
                hook not in _EPOCH_HOOKS,
            )
            for (hook, name, loader), slot in self.slots.items()
        }
        return Told(facts, frozenset(self.idle), frozenset(paths))

    def _paths(self) -> dict[str, Any]:
        return metrics_by_path(self._roots[0], self.callbacks) if self._roots else {}

    def _of_others(self, reduced: Reduced, mine: set[str]) -> dict[tuple[str, str, int | None], Slot]:
        """Make slots for what only other ranks logged: this rank had no samples, for example."""
        lacking = {name: facts for told in reduced.told for name, facts in told.facts.items() if name not in mine}
        paths = self._paths() if lacking else {}
        before, found = (self.hook, self.dataloader_idx), {}
        for name, facts in lacking.items():
            value = reduced.values.get(name)
            everywhere = all(facts.path in told.paths for told in reduced.told)
            if isinstance(value, Tensor) or (isinstance(value, int) and everywhere):
                self.hook, self.dataloader_idx = facts.hook, facts.loader
                key = (facts.hook, facts.name, facts.loader)
                slot = self.slots.get(key) or self._new_slot(facts.name, read_options(facts.options))
                slot.metric, found[key] = paths.get(facts.path), slot
        self.hook, self.dataloader_idx = before
        return found

    def _is_everywhere(self, slot: Slot, count: int, reduced: Reduced) -> bool:
        """Return whether all ranks compute this torchmetrics object now, so that it may gather from all."""
        strategy = self._fabric.strategy
        if count == strategy.data_parallel_size * strategy.num_slices:
            return True
        path = next((path for path, metric in self._paths().items() if metric is slot.metric), None)
        return all(path in theirs.paths for theirs in reduced.told)


class _Facts(NamedTuple):
    """What a rank that lacks a slot needs to know of it."""

    hook: str
    name: str
    loader: int | None
    options: dict[str, Any]
    path: str | None
    """Where the rank finds the torchmetrics object, None for a number or an object in no known place."""
    in_batch: bool


def _kind_of(value: Any) -> Kind:
    if not isinstance(value, Tensor):
        return Kind.NUMBER
    return Kind.DOUBLE if value.dtype == torch.float64 else Kind.SINGLE


def _row_of(key: tuple[str, str, int | None], slot: Slot) -> str:
    return f"{slot.name}{slot.suffix} in {key[0]}"


class _Reduced:
    """Stands in for a callable reduction, which a checkpoint cannot keep, and returns its result so far."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def __call__(self, values: Any) -> Any:
        return self.result


def _same_code(one: LogOptions, other: LogOptions) -> bool:
    """Return whether only ``reduce_fx`` differs, because a lambda is made anew each time or training was resumed."""
    code = getattr(one.reduce_fx, "__code__", None)
    same = code is not None and code is getattr(other.reduce_fx, "__code__", None)
    same |= isinstance(one.reduce_fx, _Reduced)
    same |= one.reduce_fx == (reduction_named(other.reduce_fx) or other.reduce_fx)
    return same and one._replace(reduce_fx=other.reduce_fx) == other


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
