"""Programs that were written for Lightning give the same losses on Treadle, to the last bit: `make test-lightning`.

``programs/`` has them, each in the style of another author. Each runs three times: with Lightning 2.6.6; by
``treadle run``, unchanged; and without either, after ``treadle migrate`` has rewritten a copy. What differs is in
``docs/differences.md``, and :class:`Program` names the row.

Tests of ``treadle.compat``.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.processes import ROOT

pytestmark = [pytest.mark.lightning, pytest.mark.timeout(400)]

PROGRAMS = Path(__file__).parent / "programs"


class Program(NamedTuple):
    """A program, and what of its results differs."""

    command: tuple[str, ...]
    differs: Mapping[str, str] = {}
    """A pattern of paths into the results, and the row of docs/differences.md that says why they differ."""


TABLE = {
    "digits_mlp": Program(("digits_mlp.py",)),
    "textgen": Program(("-m", "textgen")),
    "autoencoder": Program(("autoencoder.py",)),
    "cli": Program(("cli/main.py", "fit", "--config", "cli/config.yaml")),
    "callbacks_zoo": Program(("callbacks_zoo.py",), {"averaging/": "averaged weights"}),
    "manual_accumulation": Program(("manual_accumulation.py",), {"steps": "global step"}),
    "gan": Program(("gan.py",), {"global step": "global step"}),
    "fabric_loop": Program(("fabric_loop.py", "--shuffle")),
    "fabric_loop, two processes": Program(("fabric_loop.py", "--devices", "2")),
    "custom_logger": Program(("custom_logger.py",)),
    "ddp_arguments": Program(
        ("ddp_arguments.py",), {"losses|gathered|metrics|saved": "the order of samples on several ranks"}
    ),
    "ddp_arguments, own sampler": Program(
        ("ddp_arguments.py", "--own-sampler"), {"metrics/train_step": "logged values on several ranks"}
    ),
    "transformer": Program(("transformer.py",), {"a shorter accumulation/": "the end of an epoch while accumulating"}),
    "resuming": Program(("resuming.py",)),
}
WAYS = ("treadle run", "treadle migrate")


def cases() -> Iterator[Any]:
    """The programs, each with all of its ways on one worker of pytest-xdist, which keeps what Lightning gave."""
    for name in TABLE:
        for way in WAYS:
            yield pytest.param(name, way, id=f"{name}, {way}", marks=pytest.mark.xdist_group(name))


def run(command: tuple[str, ...], folder: Path, *paths: Path | str, programs: Path = PROGRAMS) -> Any:
    """Run Python with a search path in an empty folder; returns what the program wrote."""
    folder.mkdir(parents=True)
    result = folder / "losses.json"
    environ = dict(os.environ)
    environ["LOSSES"] = str(result)
    environ["PYTHONPATH"] = os.pathsep.join(map(str, [*paths, programs, os.environ.get("PYTHONPATH", "")])).rstrip(":")
    found = [str(programs / word) if (programs / word).is_file() else word for word in command]
    done = subprocess.run(
        [sys.executable, *found], cwd=folder, env=environ, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, f"{command} in {folder}:\n{done.stderr[-3000:]}"
    return json.loads(result.read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What Lightning gives for a program: run once, and kept."""
    folder = tmp_path_factory.mktemp("lightning")
    return functools.cache(lambda name: run(TABLE[name].command, folder / name))


@pytest.fixture(scope="module")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of all programs that ``treadle migrate`` has rewritten, and packages that stand where Lightning does."""
    folder = tmp_path_factory.mktemp("migrated")
    shutil.copytree(PROGRAMS, folder / "programs", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-m", "treadle.cli", "migrate", str(folder / "programs")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr  # nothing is left to do by hand
    for package in ("lightning", "pytorch_lightning", "lightning_fabric"):
        (folder / "nothing" / package).mkdir(parents=True)
        text = f"raise ImportError('{package} is imported by a program that was rewritten')"
        (folder / "nothing" / package / "__init__.py").write_text(text)
    return folder


def differences(a: Any, b: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the paths at which two results differ, with both values."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in {**a, **b}:
            yield from differences(a.get(key), b.get(key), f"{path}/{key}" if path else key)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differences(x, y, f"{path}/{i}")
    elif a != b:
        yield path, a, b


def check(name: str, lightning: Any, treadle: Any, predicted: Mapping[str, str]) -> None:
    """Compare results: each difference has its row, and each row its difference."""
    found = list(differences(lightning, treadle))
    surprises = [each for each in found if not any(re.match(pattern, each[0]) for pattern in predicted)]
    assert not surprises, f"{name}: {len(surprises)} differences that no row predicts: {surprises[:10]}"
    for pattern, row in predicted.items():
        assert any(re.match(pattern, path) for path, *_ in found), f"{name} does not differ in {pattern!r}: {row!r}"


@pytest.mark.parametrize(("name", "way"), [*cases()])
def test_a_program_has_the_losses_of_lightning(
    name: str, way: str, results: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    program = TABLE[name]
    if way == "treadle run":
        mine = run(("-m", "treadle.cli", "run", *program.command), tmp_path / "run")
    else:
        folder = request.getfixturevalue("migrated")
        mine = run(program.command, tmp_path / "run", folder / "nothing", programs=folder / "programs")
    check(f"{name} by {way}", results(name), mine, program.differs)


@pytest.mark.xdist_group("resuming")
def test_a_run_goes_on_from_a_checkpoint_of_the_other_library(results: Any, tmp_path: Path) -> None:
    """After two epochs in one library, two more in either: the same losses, callbacks and schedulers."""
    by_lightning = ("resuming.py",)
    by_treadle = ("-m", "treadle.cli", "run", "resuming.py")
    run(by_lightning, tmp_path / "lightning")
    run(by_treadle, tmp_path / "treadle")
    ends = {}
    for writer in ("lightning", "treadle"):
        (path,) = (tmp_path / writer / "ckpt").glob("epoch=1-*.ckpt")
        for reader, command in (("lightning", by_lightning), ("treadle", by_treadle)):
            ends[writer, reader] = run((*command, str(path)), tmp_path / f"from {writer} in {reader}")
    expected = ends["lightning", "lightning"]
    check("Lightning's file in Treadle", expected, ends["lightning", "treadle"], {})
    check("Treadle's file in Lightning", expected, ends["treadle", "lightning"], {})
    # Treadle's own file has the random numbers of the first run, which Lightning's begins anew
    assert ends["treadle", "treadle"]["at"] == expected["at"]


def test_the_rows_that_predict_differences_are_there() -> None:
    rows = [
        line.split("|")[1].strip() for line in (ROOT / "docs/differences.md").read_text().splitlines() if "|" in line
    ]
    for program in TABLE.values():
        assert {*program.differs.values()} <= {*rows}
