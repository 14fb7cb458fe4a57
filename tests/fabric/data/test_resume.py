"""Where a resumed epoch goes on: a table of layouts, and that no sample comes twice or is left out.

Tests of ``treadle_fabric.data.resume``, ``treadle_fabric.data.epochs``.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from typing import Any

import pytest

from treadle_fabric.data.resume import Layout, NewEpoch, Same, Saved, Shifted, decide

SAMPLES = 48


def saved(**changes: Any) -> Saved:
    """Batch 5 of 12, of 4 samples, in one process that shares its order out."""
    usual: dict[str, Any] = {"world_size": 1, "begun": True, "batches": 5, "per_step": (4,), "seed": 0}
    usual |= {"num_batches": 12, "samples": (SAMPLES,), "samplers": ("RandomSampler",)}
    return Saved(**{**usual, **changes})


def now(at: Saved, **changes: Any) -> Layout:
    """The layout of ``saved()``, with changes; what is left follows from them."""
    usual: dict[str, Any] = {"world_size": 1, "per_step": (4,), "samples": (SAMPLES,), "samplers": ("RandomSampler",)}
    layout = Layout(**{**usual, **changes})
    size = layout.per_step[0]
    if size is None:
        return layout
    left = math.ceil((SAMPLES - at.items) / size)
    return dataclasses.replace(layout, num_batches=math.ceil(SAMPLES / size), left=left)


TWO = {"per_step": (4, 4), "samples": (SAMPLES, 9), "samplers": ("RandomSampler", "RandomSampler"), "start": (0, 0)}
TWO_NOW = {name: TWO[name] for name in ("samples", "samplers")}

# what was saved, what is there now, the decision without its warnings, what the warnings say
TABLE: dict[str, tuple[dict[str, Any], dict[str, Any], Same | Shifted | NewEpoch, list[str]]] = {
    "nothing changed": ({}, {}, Same(), []),
    "saved before the layout was kept": ({"per_step": None, "samples": None, "samplers": None}, {}, Same(), []),
    "another batch size between epochs": ({"begun": False, "batches": 0}, {"per_step": (6,)}, Same(), []),
    "another data set": ({}, {"samples": (50,)}, Same(), ["of an epoch of 48 samples, .* have 50 now"]),
    "another sampler": ({}, {"samplers": ("SequentialSampler",)}, Same(), ["of RandomSampler, .* SequentialSampler"]),
    "both between epochs": ({"begun": False}, {"samples": (50,), "samplers": ("SequentialSampler",)}, Same(), []),
    "two processes, the same batches": ({}, {"world_size": 2}, Shifted(5, 0, (0,)), []),
    "two processes, again": (
        {"base": 3, "start": (8,), "end": 13},
        {"world_size": 2},
        Shifted(5, 3, (8,), 13),
        [],
    ),
    "two processes, another data set": (
        {},
        {"world_size": 2, "samples": (50,)},
        Shifted(5, 0, (0,)),
        ["have 50 now"],
    ),
    "two processes, several loaders": (
        TWO,
        {"world_size": 2, **TWO_NOW, "per_step": (4, 4)},
        Shifted(5, 0, (0, 0)),
        [],
    ),
    "two processes after an epoch": ({"batches": 0}, {"world_size": 2}, NewEpoch(), []),
    "two processes between epochs": ({"begun": False, "batches": 0}, {"world_size": 2}, NewEpoch(), []),
    "larger batches": ({}, {"per_step": (8,)}, Shifted(2, 2, (20,), 6), ["have 8 samples a batch, and had 4"]),
    "smaller batches": ({}, {"per_step": (2,)}, Shifted(10, 10, (20,), 24), ["goes on at sample 20, as batch 10"]),
    "larger batches after an epoch": ({"batches": 0}, {"per_step": (8,)}, NewEpoch(), []),
    "much larger batches": (
        {},
        {"per_step": (16,)},
        Shifted(1, 1, (20,), 3),
        ["at sample 20, as batch 1"],
    ),
    "larger batches in an epoch that was resumed so": (
        {"base": 4, "start": (12,), "end": 13, "batches": 6},
        {"per_step": (6,)},
        Shifted(3, 3, (20,), 8),
        ["at sample 20, as batch 3"],
    ),
    "larger batches, and a limit that leaves half": (
        {"num_batches": 6},
        {"per_step": (8,)},
        Shifted(5, 5, (20,), 6),
        ["as batch 5"],
    ),
    "larger batches, two loaders": (
        TWO,
        {**TWO_NOW, "per_step": (8, 8)},
        NewEpoch(True),
        ["several training loaders: the epoch begins anew"],
    ),
    "two processes, several loaders that only one process had": (
        {**TWO, "seed": None},
        {"world_size": 2, **TWO_NOW, "per_step": (4, 4)},
        NewEpoch(True),
        ["several loaders at once"],
    ),
    "two processes, a stream": (
        {"per_step": (None,), "samples": (None,), "samplers": (None,)},
        {"world_size": 2, "per_step": (None,), "samples": (None,), "samplers": (None,), "shared": False},
        NewEpoch(True),
        ["a stream"],
    ),
    "two processes, shares of the user's": ({}, {"world_size": 2, "shared": False}, NewEpoch(True), ["begins anew"]),
    "two processes, saved before the layout was kept": (
        {"per_step": None},
        {"world_size": 2},
        NewEpoch(True),
        ["does not tell the order"],
    ),
}


@pytest.mark.parametrize("case", TABLE)
def test_table(case: str) -> None:
    before, after, expected, says = TABLE[case]
    at = saved(**before)
    layout = now(at, **after)
    decision = decide(at, layout)
    assert dataclasses.replace(decision, warnings=()) == expected
    assert len(decision.warnings) == len(says)
    for warning, text in zip(decision.warnings, says):
        assert re.search(text, warning), warning


@pytest.mark.parametrize(("size", "other"), [*itertools.permutations([2, 3, 4, 8], 2)])
def test_each_sample_once(size: int, other: int) -> None:
    """From every position: what is done and what follows are all samples."""
    for batches in range(1, SAMPLES // size):
        at = saved(per_step=(size,), batches=batches, num_batches=SAMPLES // size)
        decision = decide(at, now(at, per_step=(other,)))
        assert isinstance(decision, Shifted)
        assert decision.start == (batches * size,)
        assert decision.end is not None
        left = decision.end - decision.base
        assert SAMPLES <= decision.start[0] + left * other < SAMPLES + other


def test_back_and_forth_ends_where_it_should() -> None:
    """Batches of 4, of 6, and of 4 again: each time the epoch goes on at the next sample."""
    at = saved(batches=3)
    first = decide(at, now(at, per_step=(6,)))
    assert first == Shifted(2, 2, (12,), 8, first.warnings)
    again = saved(per_step=(6,), batches=4, base=first.base, start=first.start, end=first.end, num_batches=8)
    second = decide(again, now(again))
    assert second == Shifted(6, 6, (24,), 12, second.warnings)


def test_what_a_checkpoint_tells_is_read_as_it_was_saved() -> None:
    order = {"world_size": 2, "seed": 7, "source": None, "base": 1, "end": None, "start": [3], "per_step": [4]}
    order |= {"samples": [9], "samplers": ["RandomSampler"], "num_batches": 3}
    at = Saved.read(order, world_size=2, begun=True, batches=2)
    assert at == Saved(2, True, 2, (4,), 7, 1, (3,), None, 3, (9,), ("RandomSampler",))
    assert Saved.read({}, world_size=1, begun=True, batches=2) == Saved(1, True, 2, None)
