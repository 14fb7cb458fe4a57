"""What the last stage found, on all ranks of a pipeline."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

__all__: list[str] = []

_PACKET: Final = 34  # doubles that are sent in one piece: a checksum, a count and 32 values


class Sharing:
    """Sends numbers from the last rank of a pipeline to all of its ranks, in one broadcast.

    Names go along when they change. The other ranks read on the host whether they have: once a batch, when the
    pipeline is empty.

    Args:
        group: The ranks of the pipeline.
        rank: This rank in the group.
        ranks: Their number.
        device: Where the group's backend reaches tensors.
    """

    def __init__(self, group: Any, rank: int, ranks: int, device: torch.device) -> None:
        self._group, self._device = group, device
        self._is_source = rank == ranks - 1
        self._source = dist.get_global_rank(group, ranks - 1)
        self._known: dict[float, list[Any]] = {}

    def __call__(self, values: Mapping[Any, Tensor] | None) -> dict[Any, Tensor]:
        """Share scalars.

        Args:
            values: By name, of any kind that can be pickled; those of the last rank count.

        Returns:
            The values of the last rank, by name, in torch's default dtype.
        """
        packet = torch.zeros(_PACKET, dtype=torch.float64, device=self._device)
        names: list[Any] = []
        all_values = packet[:0]
        if self._is_source:
            names = list(values or {})
            all_values = torch.stack([value.reshape(()).to(packet) for value in (values or {}).values()])
            packet[0], packet[1] = float(zlib.crc32(repr(names).encode())), float(len(names))
            key = (zlib.crc32(repr(names).encode()), len(names))
            first = all_values[: _PACKET - 2]
            packet[2 : 2 + len(first)] = first
        dist.broadcast(packet, self._source, group=self._group)
        if not self._is_source:
            checksum, count = packet[:2].tolist()
            key = (int(checksum), int(count))
        names = self._names(key, names)
        shared = packet[2:]
        if len(names) > len(shared):
            rest = all_values[len(shared) :] if self._is_source else packet.new_empty(len(names) - len(shared))
            dist.broadcast(rest, self._source, group=self._group)
            shared = torch.cat([shared, rest])
        return dict(zip(names, shared.to(torch.get_default_dtype()).unbind(), strict=False))

    def _names(self, key: Any, names: list[Any]) -> list[Any]:
        """Return the names that belong to a packet; the first time they are sent."""
        if key not in self._known:
            self._known[key] = self.object(names)
        return self._known[key]

    def object(self, value: Any, source: int | None = None) -> Any:
        """Return, on every rank, what one has: the last one, or that of the global rank ``source``."""
        box = [value]
        dist.broadcast_object_list(
            box, self._source if source is None else source, group=self._group, device=self._device
        )
        return box[0]
