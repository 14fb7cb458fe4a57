"""What is measured, how long each run is, and the bar it has to pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

__all__ = ["ITEMS", "Item", "select"]


@dataclass(frozen=True)
class Item:
    """One row of the table.

    Args:
        key: The name on the command line.
        title: The name in the table.
        kind: ``"slope"`` (two run lengths, microseconds per unit), ``"ddp"`` (the same over two processes, as a
            percentage of the raw step), ``"import"`` (one fresh interpreter per sample), ``"frames"`` (a count) or
            ``"instructions"`` (two run lengths, counted by valgrind, as a percentage of the raw step).
        unit: The unit of the numbers in the row.
        contestants: Who takes part, the hand-written loop (or bare ``import torch``) first.
        short: Units in the short run.
        long: Units in the long run.
        ratio: The most that Treadle's cost may be as a share of Lightning's, if there is such a bar.
        limit: The most that Treadle's cost may be in ``unit``, if there is such a bar.
        explain: What a unit consists of.
    """

    key: str
    title: str
    kind: str
    unit: str
    contestants: tuple[str, ...]
    short: int = 0
    long: int = 0
    ratio: float | None = None
    limit: float | None = None
    explain: str = ""

    @property
    def bar(self) -> str:
        """The bar as the table prints it."""
        parts = [f"ratio <= {self.ratio:.2f}"] if self.ratio is not None else []
        parts += [f"<= {self.limit:g} {self.unit}"] if self.limit is not None else []
        return ", ".join(parts) or "none"

    def passed(self, lightning: float | None, treadle: float | None) -> bool | None:
        """Whether Treadle is within the bars; None where a number or every bar is missing."""
        if treadle is None or (self.ratio is None and self.limit is None):
            return None
        if self.ratio is not None and (lightning is None or lightning <= 0):
            return None
        within_ratio = self.ratio is None or treadle / (lightning or 1.0) <= self.ratio
        within_limit = self.limit is None or treadle <= self.limit
        return within_ratio and within_limit


_TRAINERS = ("raw", "lightning", "treadle")
_RUNTIMES = ("raw", "lightning", "treadle", "accelerate")

ITEMS: tuple[Item, ...] = (
    Item(
        "step",
        "Trainer step, bare",
        "slope",
        "us",
        _TRAINERS,
        100,
        1600,
        ratio=0.1,
        explain="zero, forward, backward, SGD step and the next batch; no logger, bar, checkpoint or self.log",
    ),
    Item(
        "defaults",
        "Trainer step, defaults",
        "slope",
        "us",
        _TRAINERS,
        100,
        900,
        ratio=0.1,
        explain=(
            "a Trainer with nothing switched off: progress bar on a pseudo-terminal, TensorBoard, checkpointing, "
            "self.log(prog_bar=True); the raw loop has its own tqdm (updated each step, redrawn with the loss at "
            "tqdm's pace) and a SummaryWriter that gets a scalar every 50 steps"
        ),
    ),
    Item(
        "val",
        "validation batch",
        "slope",
        "us",
        _TRAINERS,
        100,
        1600,
        ratio=0.1,
        explain="Trainer.validate with one self.log per batch; the raw loop sums the same loss",
    ),
    Item(
        "epoch",
        "epoch of 4 + 2 batches",
        "slope",
        "us",
        _TRAINERS,
        10,
        130,
        ratio=0.1,
        explain="4 training and 2 validation batches, each with one self.log, in a bare Trainer",
    ),
    Item(
        "fabric",
        "Fabric step",
        "slope",
        "us",
        _RUNTIMES,
        100,
        2100,
        ratio=0.2,
        explain="the raw loop with model, optimizer and loader set up by the runtime, and its backward()",
    ),
    Item(
        "ddp",
        "DDP step, two processes",
        "ddp",
        "%",
        _TRAINERS,
        50,
        650,
        explain="a bare Trainer over gloo; raw is DistributedDataParallel by hand; costs in percent of the raw step",
    ),
    Item(
        "import",
        "import, time",
        "import",
        "ms",
        _RUNTIMES,
        limit=250.0,
        explain="on top of `import torch`, in a fresh interpreter with compiled bytecode",
    ),
    Item("rss", "import, peak memory", "import", "MB", _RUNTIMES, limit=25.0, explain="on top of `import torch`"),
    Item(
        "fabric-import",
        "import of Fabric, time",
        "import",
        "ms",
        _TRAINERS,
        explain="only the runtime (`lightning.fabric`, `treadle_fabric`), on top of `import torch`",
    ),
    Item(
        "frames",
        "frames, fit to training_step",
        "frames",
        "frames",
        ("lightning", "treadle"),
        limit=8.0,
        explain="frames of the library on the stack, `fit` counted, `training_step` not",
    ),
    Item(
        "instructions-step",
        "instructions, Trainer step",
        "instructions",
        "%",
        _TRAINERS,
        50,
        450,
        limit=6.0,
        explain=(
            "as 'Trainer step, bare', but counted once by valgrind instead of timed, so that a busy machine changes"
            " nothing; raw in thousands of instructions, costs in percent of it"
        ),
    ),
    Item(
        "instructions-iterable",
        "instructions, Trainer step, iterable",
        "instructions",
        "%",
        _TRAINERS,
        50,
        450,
        limit=6.0,
        explain="the same with an iterable of batches that is no DataLoader and does not know its length",
    ),
    Item(
        "instructions-fabric",
        "instructions, Fabric step",
        "instructions",
        "%",
        _TRAINERS,
        50,
        450,
        limit=1.0,
        explain="the same for 'Fabric step'",
    ),
)


def select(keys: Sequence[str], without: Sequence[str] = ()) -> tuple[Item, ...]:
    """The items with these keys, all of them when there are none; ``"instructions"`` is all that count instructions.

    Args:
        keys: Of the items, or of kinds of items.
        without: Contestants to leave out.

    Raises:
        ValueError: For a key that is not an item, or a contestant that there is not or that all others are compared to.
    """
    chosen: dict[str, Item] = {}
    for key in keys or [item.key for item in ITEMS]:
        found = [item for item in ITEMS if item.key == key] or [item for item in ITEMS if item.kind == key]
        if not found:
            raise ValueError(f"--only {key} is not an item; the items are {', '.join(item.key for item in ITEMS)}")
        chosen |= {item.key: item for item in found}
    for name in without:
        if name not in _RUNTIMES[1:]:
            raise ValueError(f"--without {name} is not a contestant; they are {', '.join(_RUNTIMES[1:])}")
    return tuple(
        replace(item, contestants=tuple(c for c in item.contestants if c not in without)) for item in chosen.values()
    )
