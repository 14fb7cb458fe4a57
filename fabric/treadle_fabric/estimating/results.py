"""What an estimate says, and how it is printed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Estimate", "Memory", "Traffic", "in_bytes", "table"]


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank allocates.

    The first five are what lies there from one step to the next (``gradients``: at the end of a backward pass). The
    next two are the largest of their kind in a step. ``peak`` is the largest sum of all at one time, which may be less
    than the sum of the lines.
    """

    parameters: int
    """This rank's parameters, or its parts of them."""
    gradients: int
    """Their gradients, after they were reduced."""
    optimizer_state: int
    """The optimizer's state after a step."""
    buffers: int
    """The module's buffers."""
    inputs: int
    """The batch."""
    activations: int
    """The most that a forward and a backward pass hold of their own: what is saved for the backward pass, outputs,
    gradients of activations, gradients that are not reduced yet, casts of weights."""
    communication: int
    """The most of gathered parameters and of the buffers of collectives, such as DDP's buckets."""
    peak: int
    """The most that is allocated at one time on the device."""
    peak_parts: Mapping[str, int] = field(default_factory=dict)
    """What the peak consists of, by the names above."""
    peak_phase: str = "backward"
    """When the peak is: ``"forward"``, ``"backward"`` or ``"optimizer"``."""
    host: int = 0
    """What lies in the memory of the host in place of the device, with offload; not in ``peak``."""


@dataclass(frozen=True)
class Traffic:
    """What one rank exchanges in one step, by one kind of collective."""

    calls: int
    """The number of collectives."""
    payload: int
    """Bytes of the messages: of an all-reduce, broadcast or send the tensor; of an all-gather all that is gathered; of
    a reduce-scatter all that is scattered."""
    wire: int
    """Bytes that this rank sends for it, where a collective runs as a ring."""
    between_machines: int = 0
    """The part of ``wire`` of collectives whose ranks are on several machines."""


@dataclass(frozen=True)
class Estimate:
    """Memory and traffic of one rank in a training step.

    ``print(estimate)`` shows a table.
    """

    strategy: str
    """The strategy's name or class, and the sizes of its mesh."""
    world_size: int
    """The number of ranks."""
    num_nodes: int
    """The number of machines."""
    precision: str
    """The full name of the precision, such as ``"bf16-mixed"``."""
    parameters: int
    """The number of parameters of the model, all ranks together."""
    memory: Memory
    """Bytes that a rank allocates."""
    traffic: Mapping[str, Traffic]
    """What a rank exchanges in a step, by kind of collective: ``"all_reduce"``, ``"all_gather"``,
    ``"reduce_scatter"``, ``"all_to_all"``, ``"broadcast"``, ``"send"``, ``"recv"``."""
    rank: int = 0
    """Whose memory and traffic these are."""
    notes: tuple[str, ...] = ()
    """What the numbers leave out, or were computed from."""

    @property
    def payload(self) -> int:
        """Bytes of all messages of a step."""
        return sum(each.payload for each in self.traffic.values())

    @property
    def wire(self) -> int:
        """Bytes that this rank sends in a step, where collectives run as rings."""
        return sum(each.wire for each in self.traffic.values())

    @property
    def between_machines(self) -> int:
        """The part of :attr:`wire` of collectives whose ranks are on several machines."""
        return sum(each.between_machines for each in self.traffic.values())

    def fits(self, memory: int) -> bool:
        """Whether the peak is at most so many bytes."""
        return self.memory.peak <= memory

    def as_dict(self) -> dict[str, Any]:
        """Plain containers, for JSON."""
        sums = {"payload": self.payload, "wire": self.wire, "between_machines": self.between_machines}
        return {**asdict(self), "notes": list(self.notes), "sums": sums}

    def __str__(self) -> str:
        machines = f" on {self.num_nodes} machines" if self.num_nodes > 1 else ""
        ranks = f"{self.world_size:,} ranks{machines}" if self.world_size > 1 else "one rank"
        title = f"{self.strategy}, {ranks}, {self.precision}: {self.parameters:,} parameters"
        memory = self.memory
        lines = [
            (name.replace("_", " "), in_bytes(getattr(memory, name)), in_bytes(memory.peak_parts.get(name, 0)))
            for name in (
                "parameters", "gradients", "optimizer_state", "buffers", "inputs", "communication", "activations"
            )
        ]  # fmt: skip
        lines.append(("peak, on the device", "", in_bytes(memory.peak)))
        if memory.host:
            lines.append(("on the host", in_bytes(memory.host), ""))
        text = [title, "", *table((f"memory of rank {self.rank}", "most", f"at the peak ({memory.peak_phase})"), lines)]
        sent = [
            (kind, f"{t.calls:,}", in_bytes(t.payload), in_bytes(t.wire), in_bytes(t.between_machines))
            for kind, t in self.traffic.items()
        ]
        if sent:
            sums = in_bytes(self.payload), in_bytes(self.wire), in_bytes(self.between_machines)
            sent.append(("all", f"{sum(t.calls for t in self.traffic.values()):,}", *sums))
            text += ["", *table(("exchanged a step", "calls", "messages", "sent", "between machines"), sent)]
        return "\n".join([*text, *([""] if self.notes else []), *(f"Note: {note}" for note in self.notes)])


def in_bytes(size: float) -> str:
    """Write a number of bytes for people: ``"1.50 GiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:,.0f} B" if unit == "B" else f"{size:,.2f} {unit}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Lines of a table whose first column is text, and whose others are numbers."""
    cells = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    ruled = [*cells[:1], ["-" * width for width in widths], *cells[1:]]
    return [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip()
        for row in ruled
    ]
