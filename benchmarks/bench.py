"""What Treadle and Lightning cost over the hand-written loop: ``python benchmarks/bench.py`` (``make bench``).

Contestants run in processes of their own and take turns, so that a busy moment of the machine hits all of them. The
table is printed; a full run also writes it, every number and a chart to ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

from items import ITEMS, Item, select
from measure import Result, measure
from report import machine_facts, remarks, table, write

_ROUNDS = 12
_QUICK_ROUNDS = 3
_BUSY = 0.3  # load per core
_SHARE = {"ddp": 0.25, "import": 0.5}  # of the rounds: a round of these starts interpreters and lasts longer


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=None, help=f"turns of each contestant (default: {_ROUNDS})")
    parser.add_argument(
        "--quick", action="store_true", help=f"{_QUICK_ROUNDS} rounds and runs of half the length, nothing written"
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="ITEM",
        help=f"one of {', '.join(i.key for i in ITEMS)}, or instructions for all of these; repeatable",
    )
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="CONTESTANT",
        help="leave out lightning, treadle or accelerate; nothing is written; repeatable",
    )
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, for a look on a busy machine"
    )
    parser.add_argument("--write", action="store_true", help="write the results of a partial or quick run too")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a bar is missed")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results", help="the folder of the results"
    )
    options = parser.parse_args()
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds {options.rounds} is not a number of turns: give 1 or more")
    try:
        options.items = select(options.only, options.without)
    except ValueError as error:
        parser.error(str(error))
    return options


def _shorter(item: Item) -> Item:
    return dataclasses.replace(item, long=item.short + (item.long - item.short) // 2) if item.long else item


def _run(items: tuple[Item, ...], rounds: int, quick: bool, clock: str) -> list[Result]:
    results: list[Result] = []
    together = tuple(_shorter(item) if quick else item for item in items if item.kind == "instructions")
    for item in items:
        start = time.perf_counter()
        turns = max(1, round(rounds * _SHARE.get(item.kind, 1.0)))
        results.append(measure(_shorter(item) if quick else item, turns, clock, together))
        print(f"{item.title}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return results


def main() -> int:
    """Runs the command line; the exit status is 1 only with ``--check`` and a bar missed."""
    options = _arguments()
    rounds = options.rounds or (_QUICK_ROUNDS if options.quick else _ROUNDS)
    facts = machine_facts() | ({"clock": options.clock} if options.clock != "wall" else {})
    timed = any(item.kind not in ("frames", "instructions") for item in options.items)
    if timed and facts["load_before"] > _BUSY * (facts["cores"] or 1):
        print(f"The machine is busy (load {facts['load_before']}): believe --clock cpu, or wait.", file=sys.stderr)
    results = _run(options.items, rounds, options.quick, options.clock)
    print(table(results))
    for line in remarks(results):
        print(line)
    if options.write or not (options.quick or options.only or options.without):
        for path in write(results, facts, rounds, options.output, "-".join(options.only)):
            print(f"wrote {path}")
    return int(options.check and any(result.ok is False for result in results))


if __name__ == "__main__":
    sys.exit(main())
