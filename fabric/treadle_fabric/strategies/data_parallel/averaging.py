"""The average of the models of ranks that learn apart between two averages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from treadle_fabric.checks import check_integer
from treadle_fabric.errors import MisconfigurationException

__all__ = ["ModelAveraging"]


class ModelAveraging:
    """Averages the parameters that an optimizer steps, at the first of its local steps and then periodically.

    A local step is one whose gradients were not averaged over all ranks. The average is over all parameters that were
    trainable at a local step since the last one, alike on every rank, also those that are frozen meanwhile or got no
    gradient; they stay where they are in memory.

    Args:
        period: The number of local steps from one average to the next. A dict has several of these numbers, and for
            each the number of ranks whose models are averaged then, such as ``{4: 8, 16: 64}``: of two that fall on one
            step the larger counts, and the last one is of all ranks.

    Raises:
        MisconfigurationException: A number is no integer of at least 1, or they do not ascend.
    """

    def __init__(self, period: int | Mapping[int, int]) -> None:
        name = "model_averaging_period"
        self._sizes: dict[int, int | None] = {}
        if isinstance(period, Mapping):
            for key, size in period.items():
                self._sizes[check_integer(f"a key of {name}", key, minimum=1)] = check_integer(
                    f"{name}[{key!r}]", size, minimum=1
                )
            sizes = [size or 0 for size in self._sizes.values()]
            if not sizes or [*self._sizes] != sorted(self._sizes) or sizes != sorted(sizes):
                raise MisconfigurationException(
                    f"{name}={period!r}: give the numbers of steps in ascending order, with numbers of ranks that"
                    " ascend too, such as {4: 8, 16: 64}."
                )
        else:
            self._sizes[check_integer(name, period, minimum=1)] = None
        self._groups: dict[int, Any] = {}
        self._steps: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self._apart: WeakKeyDictionary[Optimizer, dict[int, Tensor]] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_groups": {}, "_steps": None, "_apart": None}  # of this process

    def __setstate__(self, fields: dict[str, Any]) -> None:
        self.__dict__.update(fields)
        self._steps, self._apart = WeakKeyDictionary(), WeakKeyDictionary()

    def prepare(self) -> None:
        """Make the groups of ranks; every rank calls this.

        Raises:
            MisconfigurationException: The numbers of ranks do not fit the number of processes.
        """
        world = dist.get_world_size()
        sizes = {period: size or world for period, size in self._sizes.items()}
        last = [*sizes.values()][-1]
        if last != world or any(world % size for size in sizes.values()):
            raise MisconfigurationException(
                f"model_averaging_period={sizes} with {world} processes: each number of ranks must divide the number of"
                " processes, and the last one must be that number."
            )
        for period, size in sizes.items():
            if period not in self._groups:
                self._groups[period] = dist.group.WORLD if size == world else dist.new_subgroups(size)[0]  # type: ignore[no-untyped-call]

    def after_step(self, optimizer: Optimizer, local: bool) -> None:
        """Average what the optimizer has stepped, where it is time to.

        Args:
            optimizer: That has made a step.
            local: Whether the gradients of that step were not averaged over all ranks.
        """
        if not local:
            return
        step = self._steps.get(optimizer, 0)
        self._steps[optimizer] = step + 1
        apart = self._apart.setdefault(optimizer, {})
        apart.update((id(p), p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad)
        for period in reversed(self._sizes):
            if step % period == 0:
                _average(apart.values(), self._groups[period])
                if period == [*self._sizes][-1]:
                    apart.clear()
                return

    def are_apart(self, optimizers: Iterable[Optimizer]) -> set[int]:
        """The identities of the parameters that may differ between ranks."""
        return {key for optimizer in optimizers for key in self._apart.get(optimizer, ())}

    def state_of(self, optimizer: Optimizer) -> dict[str, Any]:
        """The number of local steps of an optimizer, and the places of the parameters that may differ."""
        apart = self._apart.get(optimizer, {})
        return {
            "steps": self._steps.get(optimizer, 0),
            "apart": [place for place, p in enumerate(_parameters(optimizer)) if id(p) in apart],
        }

    def load_state_of(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_of` returned; with nothing, begin anew."""
        parameters = _parameters(optimizer)
        self._steps[optimizer] = state.get("steps", 0)
        self._apart[optimizer] = {id(p): p for p in (parameters[place] for place in state.get("apart", ()))}


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@torch.no_grad()
def _average(parameters: Iterable[Tensor], group: Any) -> None:
    """Average parameters over a group, in place: one collective for all of a dtype."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in parameters:
        kinds.setdefault((parameter.device, parameter.dtype), []).append(parameter.detach())
    for each in kinds.values():
        flat = torch.cat([p.reshape(-1) for p in each])
        flat /= dist.get_world_size(group)  # before the sum, which could overflow
        dist.all_reduce(flat, group=group)
        parts = torch.split(flat, [p.numel() for p in each])
        torch._foreach_copy_(each, [part.view(p.shape) for part, p in zip(parts, each, strict=True)])
