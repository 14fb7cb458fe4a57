"""The order in which micro-batches run forward and backward, and torch's schedules for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from treadle_fabric.checks import check_integer
from treadle_fabric.errors import MisconfigurationException, near_names

__all__: list[str] = []

SCHEDULES = ("1f1b", "interleaved", "gpipe")
_VIRTUAL_STAGES = 2  # of each rank, under "interleaved"


class Order(NamedTuple):
    """The order in which a pipeline runs the micro-batches of a batch."""

    schedule: str
    microbatches: int
    ranks: int
    parts: int
    """The number of parts of the model, over all ranks."""

    @classmethod
    def checked(cls, schedule: Any, microbatches: Any, virtual_stages: Any, ranks: int) -> Order:
        """Check the arguments of a pipeline.

        Args:
            schedule: "1f1b", "interleaved" (each rank has several parts of the model) or "gpipe".
            microbatches: The number of micro-batches of a batch. Default (None): twice the number of ranks.
            virtual_stages: Under "interleaved", the number of parts that each rank has. Default (None): 2.
            ranks: The ranks of the pipeline.

        Raises:
            MisconfigurationException: The schedule is unknown, or cannot run this number of micro-batches.
        """
        if schedule not in SCHEDULES:
            raise MisconfigurationException(
                f"pipeline_schedule={schedule!r} is unknown. {near_names(str(schedule), SCHEDULES)}"
            )
        if microbatches is None:
            microbatches = 2 * ranks
        if virtual_stages is None:
            virtual_stages = _VIRTUAL_STAGES if schedule == "interleaved" else 1
        check_integer("pipeline_microbatches", microbatches, minimum=1)
        check_integer("pipeline_virtual_stages", virtual_stages, minimum=1)
        if schedule != "interleaved" and virtual_stages != 1:
            raise MisconfigurationException(
                f"pipeline_virtual_stages={virtual_stages} is for pipeline_schedule='interleaved', and the schedule is"
                f" {schedule!r}: change one of them."
            )
        order = cls(schedule, microbatches, ranks, ranks * virtual_stages)
        if not order.permits(microbatches):
            rule = f"at least {ranks}, the number of ranks of the pipeline"
            if microbatches >= ranks:
                rule = f"a multiple of {microbatches // ranks}, the number of whole rounds over {ranks} ranks"
            raise MisconfigurationException(
                f"pipeline_microbatches={microbatches} with pipeline_schedule={schedule!r}: must be {rule}."
            )
        return order

    def permits(self, microbatches: int) -> bool:
        """Whether torch's schedule can run a number of micro-batches, and is of use with it."""
        if self.schedule == "gpipe":
            return True
        rounds = max(1, microbatches // self.ranks)
        return microbatches >= self.ranks and (self.schedule == "1f1b" or microbatches % rounds == 0)

    def for_batch(self, size: int) -> Order:
        """Return the order for a batch of ``size`` samples: with the most micro-batches of the same size.

        Where too few are left for the schedule, all forward passes come before the backward passes, as in "gpipe".
        """
        if size % self.microbatches == 0:
            return self
        divisors = [count for count in range(min(self.microbatches, size), 0, -1) if size % count == 0]
        for count in divisors:
            if self.permits(count):
                return self._replace(microbatches=count)
        return self._replace(schedule="gpipe", microbatches=divisors[0])


class Form(NamedTuple):
    """The form of a tensor that one part sends to the next."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @classmethod
    def of(cls, outputs: Any, stage: str) -> tuple[Form, ...]:
        """Return the forms of what a stage returned.

        Raises:
            MisconfigurationException: It is no tensor, and no tuple of tensors.
        """
        tensors = outputs if type(outputs) is tuple else (outputs,)
        for each in tensors:
            if not isinstance(each, Tensor):
                raise MisconfigurationException(
                    f"The pipeline stage {stage} returned {'a tuple with ' if tensors is outputs else ''}"
                    f"a {type(each).__name__}: what goes to the next rank is a tensor or a tuple of tensors."
                )
        return tuple(cls(tuple(each.shape), each.dtype, each.requires_grad) for each in tensors)

    def make(self, device: torch.device | str) -> Tensor:
        """Make a tensor of zeros of this form."""
        return torch.zeros(self.shape, dtype=self.dtype, device=device, requires_grad=self.requires_grad)


def make_step(
    order: Order,
    parts: Mapping[int, Module],
    forms: Sequence[tuple[Form, ...]],
    group: Any,
    device: torch.device,
    *,
    backward: bool,
) -> Callable[[], None]:
    """Build a schedule of torch for micro-batches of one form.

    Args:
        order: How to run.
        parts: This rank's parts of the model, by their places. The first part of all gets a number that it does not
            need; the last part of all returns the loss, of the shape ``(1,)``.
        forms: What each part but the last sends.
        group: The ranks of the pipeline.
        device: This rank's.
        backward: Whether to run backward passes.

    Returns:
        What runs all micro-batches once.
    """
    from torch.distributed.pipelining import (  # heavy
        PipelineStage,
        Schedule1F1B,
        ScheduleGPipe,
        ScheduleInterleaved1F1B,
        ScheduleLoopedBFS,
    )

    number = (Form((1,), torch.int64, requires_grad=False),)
    ends = [*forms, (Form((1,), torch.float32, requires_grad=backward),)]
    stages = [
        PipelineStage(
            part,
            place,
            order.parts,
            device,
            input_args=tuple(form.make("meta") for form in (ends[place - 1] if place else number)),
            output_args=tuple(form.make("meta") for form in ends[place]),
            group=group,
        )
        for place, part in parts.items()
    ]
    for stage in stages:
        # torch empties the gradients of sharded parts where it has tried out shapes, and also where it has not
        if hasattr(stage, "_post_metadata_inference_cleanup"):
            stage._post_metadata_inference_cleanup = lambda: None  # type: ignore[method-assign]
        if not hasattr(stage, "_warmup_forward_vote"):
            stage._get_init_p2p_neighbors_ops = partial(_first_messages, stage)  # type: ignore[method-assign]
    arguments: Any = {"loss_fn": _loss_of_last_part if backward else None, "scale_grads": False}
    if len(stages) > 1:
        kind: Any = ScheduleInterleaved1F1B if order.schedule == "interleaved" and backward else ScheduleLoopedBFS
        schedule: Any = kind(stages, order.microbatches, **arguments)
    else:
        kind = Schedule1F1B if order.schedule == "1f1b" and backward else ScheduleGPipe
        try:
            schedule = kind(stages[0], order.microbatches, **arguments)
        except ValueError:  # torch 2.9 refuses fewer micro-batches than stages, and yet can run them
            schedule = kind(stages[0], order.parts, **arguments)
            schedule._n_microbatches = order.microbatches
    numbers = torch.arange(order.microbatches, device=device)
    inputs = (numbers,) if 0 in parts else ()
    target = numbers if backward and order.parts - 1 in parts else None

    def step() -> None:
        schedule.step(*inputs, target=target)

    return step


def _first_messages(stage: Any) -> list[Any]:
    """What a stage of torch 2.9 sends and receives at first: there, 8 bytes that arrive where 4 are expected."""
    messages: list[Any] = type(stage)._get_init_p2p_neighbors_ops(stage)
    for message in messages:
        message.tensor = message.tensor.float()
    return messages


def _loss_of_last_part(output: Tensor, target: Tensor) -> Tensor:
    return output
