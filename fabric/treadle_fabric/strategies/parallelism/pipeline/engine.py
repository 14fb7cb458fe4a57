"""The engine of a pipeline: a module whose stages are on several ranks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import Module

from treadle_fabric.batches import map_tensors, move_data_to_device
from treadle_fabric.checkpoint.distributed.split import is_sharded_tensor
from treadle_fabric.coordination import host_group
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.precision import Precision
from treadle_fabric.rank_zero import rank_zero_warn
from treadle_fabric.strategies.parallelism.pipeline.microbatches import cut, form_of, size_of
from treadle_fabric.strategies.parallelism.pipeline.schedule import Form, Order, make_step
from treadle_fabric.strategies.parallelism.pipeline.sharing import Sharing
from treadle_fabric.strategies.parallelism.pipeline.stages import (
    Placement,
    Sequence,
    Ties,
    find_stages,
    group_stages,
    inputs_of,
)
from treadle_fabric.strategies.sharding.engine import Engine, ShardedEngine
from treadle_fabric.strategies.unwrapping import inside

__all__ = ["PipelineEngine"]

_PLANS: Final = 8  # forms of batches whose schedules and receive buffers are kept


class _Job:
    """One batch on its way through the pipeline.

    Args:
        parts: The micro-batches.
        finish: What becomes of the outputs of the last stage, and their micro-batch.
    """

    def __init__(self, parts: list[Any], finish: Callable[[Any, Any], Tensor]) -> None:
        self.parts, self.finish = parts, finish
        self.turns: dict[int, int] = {}
        """The number of micro-batches that each part of the model has begun."""
        self.error: Exception | None = None


class PipelineEngine(Engine):
    """A module of which each rank of a pipeline has some stages.

    The module gives ``pipeline_stages()``, its own submodules in their order: a tensor that one returns, or a tuple of
    tensors, is what the next one gets. ``loss(outputs, batch)`` gets what the last stage returned for a micro-batch,
    and the micro-batch; it returns the mean loss of its samples, or a dict of numbers with "loss". The optional
    ``pipeline_inputs(batch)`` returns what the first stage gets; without it, that is a batch that is a tensor, or the
    first entry of a list or tuple.

    Every rank of the pipeline is given the same batches.

    Args:
        module: The user's module, whole. What belongs to other ranks goes to the meta device.
        mesh: The ranks of the pipeline, a mesh of one dimension.
        order: How micro-batches run.
        parallelize: Gets each stage of this rank, and returns the module to run: it may apply tensor parallelism or
            sharding inside of the stage.
        device: This rank's. Default: the CPU.
        precision: The precision. Default: ``32-true``.

    Raises:
        MisconfigurationException: The module or the arguments do not fit.
    """

    running = False  # no method of the module does

    def __init__(
        self,
        module: Module,
        mesh: Any,
        order: Order,
        *,
        parallelize: Callable[[Module], Module] | None = None,
        device: torch.device | None = None,
        precision: Precision | None = None,
    ) -> None:
        super().__init__()
        ranks, self.order = order.ranks, order
        parts = group_stages(find_stages(module), self.order.parts, ranks, type(module).__qualname__)
        self.module = module
        self.group, rank = mesh.get_group(), mesh.get_local_rank()
        self.device = torch.device("cpu") if device is None else device
        self._placement = Placement(module, parts, rank, ranks)
        self._placement.take(self.device)
        self._precision = Precision() if precision is None else precision
        own = {place: part for place, part in enumerate(parts) if place % ranks == rank}
        if parallelize is not None:
            own = {place: [parallelize(stage) for stage in part] for place, part in own.items()}
        self._placement.tie()
        self._trained = [[parameter for stage in part for parameter in stage.parameters()] for part in parts]
        self._own = {place: Sequence(part, self._runner(place)) for place, part in own.items()}
        self._ties = Ties(self._placement, self.group)
        self._share = Sharing(self.group, rank, ranks, self.device)
        self._plans: OrderedDict[Any, Callable[[], None]] = OrderedDict()
        self._sharded = [stage for part in own.values() for stage in part if isinstance(stage, ShardedEngine)]
        self._last: Any = None
        self._job: _Job | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: no rank has the whole module.

        Raises:
            MisconfigurationException: Always.
        """
        raise MisconfigurationException(
            f"{type(self.module).__qualname__} was called, and no rank has all of it: it is cut into pipeline stages."
            " Train with fabric.run_batch(model, batch), and evaluate with fabric.evaluate_batch(model, batch) or"
            " fabric.predict_batch(model, batch), on all ranks."
        )

    def run(self, batch: Any, window: float = 1, loss: Callable[[Any, Any], Any] | None = None) -> dict[Any, Tensor]:
        """Add the gradients of a batch to those that are there.

        Args:
            batch: On this rank's device, the same on all ranks of the pipeline.
            window: The number of batches of the accumulation, by which the loss is divided for its backward pass.
            loss: Called in the place of the module's ``loss``.

        Returns:
            By name, the means over the samples of what ``loss`` returned, "loss" among them; detached, on all ranks of
            the pipeline.
        """
        order, parts = self._cut(batch)
        step = self._plan(order, parts, backward=True)
        found = _Means(self._loss(loss))
        share = 1 / (order.microbatches * window)

        def run(factor: Tensor) -> None:  # by which the precision scales losses
            def finish(outputs: Any, part: Any) -> Tensor:
                return (found.add(outputs, part).to(torch.float32) * (factor * share)).reshape(1)

            with self._running(_Job(parts, finish)):
                step()

        self._ties.begin()
        self._precision.backward_by(run, torch.ones((), device=self.device))
        self._ties.end()
        return self._share(found.values())

    def evaluate(self, batch: Any, loss: Callable[[Any, Any], Any] | None = None) -> dict[Any, Tensor]:
        """Run a batch forward; arguments and result as of :meth:`run`."""
        found = _Means(self._loss(loss))

        def finish(outputs: Any, part: Any) -> Tensor:
            found.add(outputs, part)
            return torch.zeros(1, device=self.device)

        self._run_forward(batch, finish)
        return self._share(found.values())

    def predict(self, batch: Any) -> Any:
        """Run a batch forward.

        Args:
            batch: As of :meth:`run`.

        Returns:
            What the last stage returns for the whole batch, on all ranks of the pipeline.
        """
        outputs: list[Any] = []

        def finish(output: Any, part: Any) -> Tensor:
            outputs.append(output)
            return torch.zeros(1, device=self.device)

        self._run_forward(batch, finish)
        whole = map_tensors(_joined(outputs), lambda each: each.cpu()) if outputs else None
        return move_data_to_device(self._share.object(whole), self.device)

    def expect_backward(self, loss: Tensor) -> None:
        """Do nothing: nothing runs through the engine but whole batches."""

    def refresh(self) -> None:
        for engine in self._sharded:
            engine.refresh()

    def keep_trainable(self) -> None:
        for engine in self._sharded:
            engine.keep_trainable()

    def join_forward(self, method: str) -> None:
        """Run the last batch again, and make nothing of it.

        Raises:
            MisconfigurationException: There was none.
        """
        if self._last is None:
            raise MisconfigurationException(
                "A rank has no batch at all, and ranks with other shares of the data have one: the stages of a pipeline"
                " whose parameters are sharded run in step: give loaders with a batch for each share."
            )
        self._run_forward(self._last, lambda outputs, part: torch.zeros(1, device=self.device))

    def finish_forward(self, method: str, grad: bool) -> None:
        """Do nothing: a pass ends with the last micro-batch."""

    def _run_forward(self, batch: Any, finish: Callable[[Any, Any], Tensor]) -> None:
        with torch.no_grad():
            order, parts = self._cut(batch)
            step = self._plan(order, parts, backward=False)
            with self._running(_Job(parts, finish)):
                step()

    def _loss(self, given: Callable[[Any, Any], Any] | None) -> Callable[[Any, Any], Any]:
        loss: Any = self.module.loss if given is None else given
        return loss  # type: ignore[no-any-return]

    @contextmanager
    def _running(self, job: _Job) -> Generator[None]:
        """Let the parts of the model work on a job; raise what a stage raised, which torch wraps."""
        self._job = job
        try:
            yield
        except RuntimeError:
            if job.error is not None:
                raise job.error from None
            raise
        finally:
            self._job = None

    def _runner(self, place: int) -> Callable[[Callable[..., Any], tuple[Any, ...]], Any]:
        """What runs a part of the model on the next micro-batch of the job."""
        first, last = place == 0, place == self.order.parts - 1
        precision = self._precision
        context = precision.forward_context if precision.converts else nullcontext
        casts = precision.converts and not precision.autocasts

        def run(forward: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
            job = self._job
            if job is None:  # a trial
                with context():
                    return _sent(forward(*inputs))
            try:
                turn = job.turns[place] = job.turns.get(place, -1) + 1
                if first:
                    inputs = inputs_of(self.module, job.parts[turn])
                    inputs = precision.convert_input(inputs) if casts else inputs
                with context():
                    outputs = forward(*inputs)
                    if last:
                        return job.finish(outputs, job.parts[turn])
                return _sent(outputs)
            except Exception as error:
                job.error = error
                raise

        return run

    def _cut(self, batch: Any) -> tuple[Order, list[Any]]:
        """Cut a batch into the micro-batches that the schedule can run."""
        if self._sharded:  # a rank that has no batch left runs this one again
            self._last = batch
        size = size_of(batch)
        order = self.order.for_batch(size)
        if self._sharded:  # ranks with other shares of the data gather parameters in each micro-batch, too
            largest, smallest = host_group().largest([size, -size])
            order = order if largest == -smallest else self.order.for_batch(1)
        if order is not self.order and not self.__dict__.get("_told"):
            self.__dict__["_told"] = True
            rank_zero_warn(
                f"A batch of {size} samples cannot be cut into {self.order.microbatches} micro-batches of the same"
                f" size: it runs as {order.microbatches}, as others like it will, with longer waits of the ranks for"
                " each other. pipeline_microbatches should divide the batch size; drop_last=True leaves out the smaller"
                " batch at the end of an epoch."
            )
        return order, cut(batch, order.microbatches)

    def _plan(self, order: Order, parts: list[Any], *, backward: bool) -> Callable[[], None]:
        """Return the schedule for micro-batches of this form; one that was not seen before is tried out."""
        trained = tuple(any(parameter.requires_grad for parameter in part) for part in self._trained)
        key = (order, form_of(parts[0]), backward, trained)
        new = key not in self._plans
        if new or self._sharded:
            new_anywhere = bool(host_group().largest([int(new)])[0]) if self._sharded else new
            forms = self._forms(parts[0], backward=backward) if new_anywhere else []
        if not new:
            self._plans.move_to_end(key)
            return self._plans[key]
        step = make_step(order, self._own, forms, self.group, self.device, backward=backward)
        self._plans[key] = step
        if len(self._plans) > _PLANS:
            self._plans.popitem(last=False)
        return step

    def _forms(self, part: Any, *, backward: bool) -> list[tuple[Form, ...]]:
        """Run each part but the last once, one after the other, to learn the forms of what it sends.

        The first part gets a real micro-batch, the others zeros. Buffers and random state are as before afterwards.
        """
        forms: list[tuple[Form, ...]] = []
        ranks = self.order.ranks
        for place in range(self.order.parts - 1):
            found: Any = None
            if place in self._own:
                try:
                    found = self._try(place, part, forms[-1] if forms else None, backward=backward)
                except Exception as error:
                    error.add_note(f"It happened in part {place} of {self.order.parts} of the pipeline.")
                    self._share.object(f"{type(error).__name__}: {error}", self._global_rank(place % ranks))
                    raise
            found = self._share.object(found, self._global_rank(place % ranks))
            if isinstance(found, str):
                raise MisconfigurationException(
                    f"Part {place} of {self.order.parts} of the pipeline failed on another rank. {found}"
                )
            forms.append(found)
        return forms

    def _global_rank(self, rank: int) -> int:
        from torch.distributed import get_global_rank  # heavy

        return get_global_rank(self.group, rank)

    def _try(self, place: int, part: Any, received: tuple[Form, ...] | None, *, backward: bool) -> tuple[Form, ...]:
        own = self._own[place]
        inputs: tuple[Any, ...]
        if received is None:
            inputs = inputs_of(self.module, part)
            if self._precision.converts and not self._precision.autocasts:
                inputs = self._precision.convert_input(inputs)
        else:
            inputs = tuple(form.make(self.device) for form in received)
        kept = [(buffer, buffer.clone()) for buffer in own.buffers() if not buffer.is_meta]
        devices = [] if self.device.type == "cpu" else [self.device]
        with torch.random.fork_rng(devices, device_type=self.device.type if devices else "cuda"):
            with torch.set_grad_enabled(backward):
                forms = Form.of(own(*inputs), f"{type(own.stages[-1]).__name__} (the last of part {place})")
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)
        for engine in self._sharded:  # no backward pass comes that would free what was gathered
            for sharded in engine.sharded_modules():
                sharded.reshard()
        return forms


def _sent(outputs: Any) -> Any:
    """What a part sends to the next: whole tensors without gaps in memory; what is no tensor as it is."""
    tensors = outputs if type(outputs) is tuple else (outputs,)
    whole = (each.full_tensor() if is_sharded_tensor(each) else each for each in tensors)
    return tuple(each.contiguous() if isinstance(each, Tensor) else each for each in whole)


class _Means:
    """The means over micro-batches of the same size of what a loss function returns."""

    def __init__(self, loss: Callable[[Any, Any], Any]) -> None:
        self._loss = loss
        self._sums: dict[Any, Tensor] = {}
        self._counts: dict[Any, int] = {}

    def add(self, outputs: Any, part: Any) -> Tensor:
        """Compute the loss of a micro-batch, and return it with its graph."""
        returned = self._loss(outputs, part)
        values = returned if isinstance(returned, Mapping) else {"loss": returned}
        loss = values.get("loss")
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = type(loss).__name__ if not isinstance(loss, Tensor) else f"a tensor of the shape {tuple(loss.shape)}"
            keys = "" if values is not returned else f" under 'loss', among {sorted(map(str, values))}"
            raise MisconfigurationException(
                f"`loss(outputs, batch)` returned {what}{keys}: a pipeline needs a scalar tensor for each micro-batch,"
                " or a dict with such a tensor under 'loss'."
            )
        for name, value in values.items():
            number = torch.as_tensor(value, device=loss.device).detach()
            if number.numel() != 1:
                raise MisconfigurationException(
                    f"`loss(outputs, batch)` returned a tensor of the shape {tuple(number.shape)} under {name!r}: only"
                    " scalars are averaged over micro-batches and sent to all ranks."
                )
            number = number.reshape(()).to(torch.float64 if number.device.type != "mps" else torch.float32)
            self._sums[name] = self._sums[name] + number if name in self._sums else number
            self._counts[name] = self._counts.get(name, 0) + 1
        return loss

    def values(self) -> dict[Any, Tensor]:
        """Return the means, on the rank of the last stage; nothing on others."""
        return {name: total / self._counts[name] for name, total in self._sums.items()}


def _joined(outputs: list[Any]) -> Any:
    """The outputs of micro-batches as those of one batch."""
    first = outputs[0]
    if len(outputs) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(outputs) if first.dim() else torch.stack(outputs)
    if isinstance(first, Mapping):
        return {key: _joined([each[key] for each in outputs]) for key in first}
    if isinstance(first, tuple):
        joined = [_joined(list(each)) for each in zip(*outputs, strict=True)]
        return type(first)(*joined) if hasattr(first, "_fields") else tuple(joined)
    if isinstance(first, list):
        return [item for each in outputs for item in each]
    return first


@inside.register
def _(engine: PipelineEngine) -> Module:
    return engine.module
