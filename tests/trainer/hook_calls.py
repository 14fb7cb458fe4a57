"""Writes down which hooks a run calls, in which order and within which other calls, as text for a person to read."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOOK = re.compile(
    r"on_|configure_(?!sharded_model)|transfer_batch_to_device|prepare_data|setup$|teardown$|(load_)?state_dict$|\w+_step$|\w+_dataloader$"
    r"|backward$|clip_gradients$|optimizer_zero_grad$"
)
BATCH = re.compile(r"(?<=batch )\d+")
SHORTEST_FOLDED = 6  # shorter repetitions are easier to read as they are


@dataclass(frozen=True)
class Call:
    depth: int  # the number of recorded calls that it happened within
    text: str
    hook: str


CALLS: list[Call] = []
_within: list[int] = []  # the positions in CALLS of the calls that go on


def forget() -> None:
    CALLS.clear()
    _within.clear()


@contextmanager
def call(who: str, hook: str, detail: str = "") -> Iterator[None]:
    """Write down a call, and those that happen until it ends as being within it; an error is written beside it."""
    position, depth = len(CALLS), len(_within)
    text = f"{who}.{hook}" + (f"({detail})" if detail else "")
    CALLS.append(Call(depth, text, hook))
    _within.append(position)
    try:
        yield
    except BaseException as error:
        CALLS[position] = Call(depth, f"{text} raises {type(error).__name__}", hook)
        raise
    finally:
        _within.pop()


def hooks_of(base: type) -> list[str]:
    """Every method of a class that is a hook by its name, so that a new hook is recorded too."""
    return [name for name in dir(base) if HOOK.match(name) and name[0] != "_" and callable(getattr(base, name))]


def recording(base: type, who: str, hooks: list[str]) -> Any:
    """A subclass of ``base`` that writes down each call of ``hooks`` and does what ``base`` does."""

    def recorded(hook: str) -> Callable[..., Any]:
        original = getattr(base, hook)
        names = list(inspect.signature(original).parameters)

        @functools.wraps(original)  # the trainer looks at signatures
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            with call(who, hook, _detail({**dict(zip(names, (self, *args))), **kwargs})):
                return original(self, *args, **kwargs)

        return method

    return type(f"Recorded{base.__name__}", (base,), {hook: recorded(hook) for hook in hooks})


def _detail(arguments: dict[str, Any]) -> str:
    """What tells calls of one hook apart: the stage, the loader unless it is the first, the batch, the file."""
    found = [str(arguments["stage"])] if "stage" in arguments else []
    if arguments.get("dataloader_idx"):
        found.append(f"loader {arguments['dataloader_idx']}")
    if "batch_idx" in arguments:
        found.append(f"batch {arguments['batch_idx']}")
    if "path" in arguments:
        found.append(Path(arguments["path"]).name)
    return ", ".join(found)


def as_text() -> str:
    """The calls so far, one a line; indented within a call, and between ``on_..._start`` and ``on_..._end``."""
    lines: list[str] = []
    stages: list[str] = []
    opening: str | None = None
    for made in CALLS:
        stage, _, point = made.hook.rpartition("_")
        if opening is not None and (stage, point) != (opening, "start"):
            stages.append(opening)
            opening = None
        if point in ("start", "end") and stage in stages:
            del stages[stages.index(stage) :]
        if point == "start":
            opening = stage
        lines.append("  " * (len(stages) + made.depth) + made.text)
    # First the batches of an epoch, and then epochs that are alike.
    return "\n".join(_folded(_folded(lines, numbered=True), numbered=False)) + "\n"


def _folded(lines: list[str], numbered: bool) -> list[str]:
    """Each run of equal blocks as its first block and one line that says what follows; nothing is lost.

    ``numbered``: blocks are equal if the batches in each are a fixed number later than in the one before.
    """
    start = 0
    shapes, indents = [BATCH.sub("#", line) for line in lines], [len(line) - len(line.lstrip()) for line in lines]
    while start < len(lines):
        for length in range(SHORTEST_FOLDED, (len(lines) - start) // 2 + 1):
            end = start + length
            if shapes[start] != shapes[end] or shapes[start:end] != shapes[end : end + length]:
                continue
            block = lines[start:end]
            batches = sorted({int(number) for line in block for number in BATCH.findall(line)})
            if numbered != bool(numbered and batches) or min(indents[start:end]) < indents[start]:
                continue
            shift = batches[-1] - batches[0] + 1 if numbered else 0
            times = 1
            while _later(block, times * shift) == lines[start + times * length : start + (times + 1) * length]:
                times += 1
            if times > 1:
                more = ", ".join(str(batch + time * shift) for time in range(1, times) for batch in batches)
                how = f"with batch {more}" if numbered else "once more" if times == 2 else f"{times - 1} times more"
                lines[end : start + times * length] = [f"{' ' * indents[start]}... these {length} lines {how}"]
                return [*lines[:end], *_folded(lines[end:], numbered)]
        start += 1
    return lines


def _later(block: list[str], shift: int) -> list[str]:
    return [BATCH.sub(lambda found: str(int(found.group()) + shift), line) for line in block]
