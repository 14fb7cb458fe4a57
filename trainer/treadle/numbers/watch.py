"""``Trainer(on_nonfinite=...)``: losses and gradients that are NaN or infinite, found before the optimizer steps."""

from __future__ import annotations

import inspect
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from treadle.checkpoint.exact import moment, restore_metrics
from treadle.metrics.sinks import silenced
from treadle.module import LightningModule
from treadle.module.overriding import overrides
from treadle.numbers.examine import Findings, digest, examine, is_finite, loss_of, trained_parameters
from treadle.run.loss import LossPolicy, gradients_of
from treadle.run.run import Run
from treadle_fabric import (
    CheckpointError,
    NonFiniteError,
    all_gather_objects,
    map_tensors,
    move_data_to_device,
    warn_user,
    with_plain_names,
)
from treadle_fabric.checkpoint import Keeping, TorchCheckpointIO, known_classes, pack
from treadle_fabric.randomness import isolate_rng, own_rng_states, set_rng_states
from treadle_fabric.strategies import local_gradients

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["WatchedLosses"]

_MAX_NAMED: Final = 5
_MAX_TOLD: Final = 3
"""Warnings with an explanation, and files, of one run and rank; later ones are only counted."""
_PLAIN: Final = (type(None), bool, int, float, complex, str, bytes)


@dataclass
class _Record:
    """A micro-batch as it was before its forward pass, and its loss."""

    batch_idx: int
    batch: Any = None
    rng: dict[str, Any] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    loss: Tensor | None = None
    taken: bool = False  # the loss was differentiated
    exact: bool = False  # the loss was differentiated as it is, neither divided nor weighted


class WatchedLosses:
    """Checks losses and gradients before each optimizer step; all ranks come to the same decision.

    Args:
        run: the run.
        losses: the policy that scales the losses.
        mode: "raise", "skip" (no step) or "warn" (a warning, and the step).
        root: the folder whose subfolder ``nonfinite`` gets the files.
    """

    def __init__(self, run: Run, losses: LossPolicy, mode: str, root: str) -> None:
        self._run, self._losses, self._mode = run, losses, mode
        self._folder = os.path.join(root if "://" in root else os.path.abspath(root), "nonfinite")
        self._records: list[_Record] = []
        self._copies = _Copies()
        self._count = 0
        self._observes = self._reruns = False
        self._steps = True  # there is an optimizer
        module = run.module
        self._touched = bool(run.dispatch.listeners("on_after_backward")) or overrides(
            module, "backward", LightningModule
        )

    def observe(self, training_step: Callable[..., Any], *, wants_iterator: bool) -> Callable[..., Any]:
        """Return a ``training_step`` that keeps what is needed to run it once more."""
        progress, module = self._run.progress, self._run.module
        self._observes = True
        # Not where ranks work together: those without the culprit would have to run the same, in the engine
        self._reruns = not wants_iterator and not self._run.fabric.strategy.shards_parameters

        def observed(batch: Any, *rest: Any) -> Any:
            record = _Record(progress.batch)
            if self._reruns:
                record.batch = map_tensors(batch, lambda t: t.detach().clone())
                record.rng = own_rng_states()
                record.buffers = self._copies.of(dict(module.named_buffers()))
            self._records.append(record)
            output = training_step(batch, *rest)
            record.loss = loss_of(output)
            return output

        return observed

    def scale(self, loss: Tensor | None, weight: Any, window: float, first: bool, /) -> Tensor | None:
        """Scale the loss, and note it for the next step."""
        scaled = self._losses.scale(loss, weight, window, first)
        if scaled is None:
            return None
        if not self._observes:  # manual optimization, or an engine that runs the whole batch
            self._records.append(_Record(self._run.progress.batch, loss=scaled.detach(), taken=True))
            return scaled
        record = self._records[-1]
        assert record.loss is not None
        record.taken, record.exact, record.loss = True, scaled is record.loss, record.loss.detach()
        return scaled

    def forget(self) -> None:
        """Drop the records of an accumulation that was left unfinished, or has nothing to look at."""
        self._take_records()

    def _take_records(self) -> list[_Record]:
        """Return the records so far, and begin anew; the memory of their buffers is used again at the next batch."""
        records, self._records = self._records, []
        self._copies.reuse(record.buffers for record in records)
        return records

    def state_dict(self) -> dict[str, Any]:
        """Return what the losses keep."""
        return self._losses.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self._losses.load_state_dict(state)

    def prepare(self, optimizers: Sequence[Optimizer], window: float, done: float, /) -> bool:
        """Look at the losses since the last step, and at the gradients; every rank calls it.

        Under a gradient scaler, which finds infinite gradients itself, only the losses are looked at.

        Returns:
            Whether the optimizer may step.

        Raises:
            NonFiniteError: something is not finite, in the mode "raise".
        """
        if not self._losses.prepare(optimizers, window, done):
            self.forget()  # the weights are all 0
            return False
        self._steps = bool(optimizers)
        records = self._take_records()
        strategy = self._run.fabric.strategy
        losses = [r.loss for r in records if r.taken and r.loss is not None]
        scaled = strategy.precision.requires_fabric_backward
        gradients = [] if scaled else gradients_of(optimizers)
        flags = torch.stack([_any_nonfinite(each, strategy.root_device) for each in (losses, gradients)])
        if strategy.world_size > 1:
            flags = strategy.all_reduce(flags, reduce_op="sum")
        if not any(flags.tolist()):
            return True
        self._count += 1
        if self._mode == "raise" or self._count <= _MAX_TOLD:
            message = self._explain(records, optimizers)
            if self._mode == "raise":
                other = "'skip' would leave such steps out" if optimizers else "'warn' would go on"
                raise NonFiniteError(f"{message} on_nonfinite={other}.")
            what = "The step is skipped." if self._mode == "skip" else "The optimizer steps all the same."
            if not optimizers:
                what = "`configure_optimizers` returned no optimizer that could be held back."
            if strategy.is_global_zero:
                warn_user(f"{message} {what}")
        if self._mode == "warn":
            return True
        buffers = dict(self._run.module.named_buffers())  # running statistics would keep the values for good
        spoilt = [name for name, b in buffers.items() if not is_finite(b)]
        _put_back(buffers, {name: b for name, b in records[0].buffers.items() if name in spoilt} if records else {})
        return False

    def report(self) -> None:
        """Tell at the end of fit how many times something was not finite."""
        if self._count and self._run.fabric.is_global_zero:
            what = "were skipped" if self._mode == "skip" else "were taken all the same"
            text = f"{self._count} optimizer step(s) with a loss or gradients that were not finite {what}."
            if not self._steps:
                text = f"{self._count} time(s) a loss was not finite."
            warn_user(text)

    # ------------------------------------------------------------------------------------------------ the explanation

    def _explain(self, records: list[_Record], optimizers: Sequence[Optimizer]) -> str:
        """Describe what is not finite: the ranks where it began do, and all ranks get the same text."""
        fabric = self._run.fabric
        mine = self._diagnose(records, optimizers)
        if fabric.world_size > 1:
            mine = " ".join(text for text in all_gather_objects(fabric, mine) if text)
        return mine or f"Gradients are not finite {self._where()}: {_listed(self._named(optimizers))}."

    def _diagnose(self, records: list[_Record], optimizers: Sequence[Optimizer]) -> str:
        """Describe the micro-batch and the layer where it began; empty if it did not begin on this rank."""
        fabric = self._run.fabric
        bad = [r for r in records if r.taken and r.loss is not None and not bool(r.loss.isfinite().all())]
        culprit, found = (bad[0] if bad else None), Findings()
        if self._reruns:
            # A step may wait for other ranks (`all_gather`, synchronized batch norm): all of them run all of theirs
            several = fabric.world_size > 1
            for record in records if several or culprit is None else [culprit]:
                now = self._run_again(record)
                if record is culprit or (culprit is None and record.taken and now.gradients):
                    culprit, found = record, now
                    if not several:
                        break
        if culprit is None:
            return ""
        alone = fabric.world_size == 1 and bool(optimizers)  # without one, gradients of earlier batches stay
        names = self._named(optimizers) if alone else found.gradients
        loss = float("nan") if culprit.loss is None else culprit.loss.float().item()
        what = "The loss is" if bad else "Gradients are not finite, with a loss of"
        text = f"{what} {loss} {self._where(culprit.batch_idx)}."
        if names:
            text += f" Parameters with gradients that are not finite: {_listed(names)}."
        if not self._reruns:
            return text
        if found.failure:
            text += f" Running the batch again, to find the layer, failed: {found.failure}."
        else:
            text += f" {found.layer or 'No layer has an output that is not finite: it began in training_step itself.'}"
        if self._count <= _MAX_TOLD:
            exact = culprit.exact and alone and len(records) == 1 and not self._touched
            exact = exact and not fabric.strategy.precision.requires_fabric_backward
            fingerprint = digest({n: p.grad for n, p in trained_parameters(self._run.module)}) if exact else ""
            text += f" {self._save(culprit, found, names, fingerprint)}"
        return text

    def _where(self, batch_idx: int | None = None) -> str:
        progress, fabric = self._run.progress, self._run.fabric
        batch = progress.batch if batch_idx is None else batch_idx
        rank = f", rank {fabric.global_rank}" if fabric.world_size > 1 else ""
        return f"at epoch {progress.epoch}, batch_idx {batch}, global_step {progress.step}{rank}"

    def _named(self, optimizers: Sequence[Optimizer]) -> list[str]:
        held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        return [
            f"{name} {tuple(p.shape)}"
            for name, p in with_plain_names(self._run.module, self._run.module.named_parameters())
            if id(p) in held and any(not is_finite(part) for part in local_gradients([p]))
        ]

    def _run_again(self, record: _Record) -> Findings:
        """Run a micro-batch once more; nothing but attributes that the user's code sets is changed by that."""
        run = self._run
        module, buffers = run.module, dict(run.module.named_buffers())
        before = {name: b.detach().clone() for name, b in buffers.items()}
        metrics = moment(run)["metric_objects"]
        with isolate_rng(), silenced(run.modules):
            _put_back(buffers, record.buffers)
            set_rng_states(record.rng)
            try:
                batch = map_tensors(record.batch, lambda t: t.clone())
                return examine(module, run.fabric.strategy.precision, batch, record.batch_idx)
            finally:
                _put_back(buffers, before)
                restore_metrics(run, metrics)

    # ------------------------------------------------------------------------------------------------ the file

    def _save(self, record: _Record, found: Findings, names: list[str], digest: str) -> str:
        """Write the file of a micro-batch; returns a sentence about the file."""
        run, progress = self._run, self._run.progress
        name = f"epoch={progress.epoch}-step={progress.step}-batch={record.batch_idx}-rank={run.fabric.global_rank}"
        path = os.path.join(self._folder, f"{name}.replay")
        module, device = run.module, run.fabric.device
        foreign = next(_foreign(record.batch), "")
        parameters = dict(with_plain_names(module, module.named_parameters()))
        bundle = {
            "replay": 1,
            "batch": None if foreign else move_data_to_device(record.batch, torch.device("cpu")),
            "foreign": foreign,
            "batch_idx": record.batch_idx,
            "epoch": progress.epoch,
            "step": progress.step,
            "rank": run.fabric.global_rank,
            "world_size": run.fabric.world_size,
            "rng": record.rng,
            "parameters": {n: p.detach().cpu() for n, p in parameters.items()},
            "buffers": {n: b.cpu() for n, b in with_plain_names(module, record.buffers.items())},
            "frozen": [n for n, p in parameters.items() if not p.requires_grad],
            "evaluating": [n for n, m in with_plain_names(module, module.named_modules()) if not m.training],
            "precision": run.fabric.strategy.precision.precision,
            "device": device.type,
            "threads": torch.get_num_threads(),
            "deterministic": [
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            ],
            "class": _origin(type(module)),
            "hyper_parameters": dict(module.hparams),
            "hparams_object": module.hparams_object,
            "hparams_name": getattr(module, "_hparams_name", None),
            "loss": None if record.loss is None else record.loss.detach().cpu(),
            "gradients": names,
            "layer": found.layer,
            "digest": digest,
            "torch": str(torch.__version__),
        }
        try:
            known = known_classes(type(module))
            packed = pack(bundle, Keeping({"hyper_parameters": known, "hparams_object": known}, lenient=True))
            TorchCheckpointIO().save_checkpoint(packed.content, path)
        except CheckpointError as error:
            return f"It could not be kept for a replay: {error}"
        return f"To run it again: `treadle replay {shlex.quote(path)}`."


class _Copies:
    """Copies of buffers: one operation for all of a kind, into memory that is used again."""

    def __init__(self) -> None:
        self._free: list[dict[str, Tensor]] = []

    def of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return copies of tensors by name."""
        kept = self._free.pop() if self._free else {}
        if kept.keys() != tensors.keys() or any(_layout(kept[name]) != _layout(t) for name, t in tensors.items()):
            return {name: tensor.detach().clone() for name, tensor in tensors.items()}
        groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        for name, tensor in tensors.items():
            targets, sources = groups.setdefault((tensor.dtype, tensor.device), ([], []))
            targets.append(kept[name])
            sources.append(tensor.detach())
        for targets, sources in groups.values():
            torch._foreach_copy_(targets, sources)
        return kept

    def reuse(self, copies: Iterable[dict[str, Tensor]]) -> None:
        """Take back copies; they stay what they are until the next call of :meth:`of`."""
        self._free += [each for each in copies if each]


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return type(tensor), tensor.shape, tensor.dtype, tensor.device, tensor.layout


def _put_back(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            if name in tensors:
                tensors[name].copy_(value)


def _origin(cls: type) -> dict[str, str]:
    """Where a class comes from: its module, its name in there and its file."""
    try:
        file = os.path.abspath(inspect.getfile(cls))
    except (TypeError, OSError):  # typed into a prompt
        file = ""
    return {"module": cls.__module__, "name": cls.__qualname__, "file": file}


def _foreign(batch: Any) -> Iterator[str]:
    """The types in a batch that can be loaded from a file only by running code."""
    if type(batch) in (list, tuple):
        for item in batch:
            yield from _foreign(item)
    elif type(batch) is dict:
        for key, value in batch.items():
            yield from _foreign(key)
            yield from _foreign(value)
    elif type(batch) is not Tensor and type(batch) not in _PLAIN:
        yield type(batch).__qualname__


def _any_nonfinite(tensors: list[Tensor], device: torch.device) -> Tensor:
    """1 where any tensor is not finite, otherwise 0; the host does not wait for the device."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            groups.setdefault((tensor.device, tensor.dtype), []).append(tensor.detach())
    largest = [
        torch.stack(torch._foreach_norm(group, float("inf"))).isfinite().all().to(device) for group in groups.values()
    ]
    return 1.0 - torch.stack(largest).all().float() if largest else torch.zeros((), device=device)


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + rest if names else "none by name"
