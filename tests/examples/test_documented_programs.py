"""Programs in the documentation run as they are, and its links lead somewhere."""

from __future__ import annotations

import ast
import gc
import importlib
import importlib.util
import inspect
import re
import runpy
import sqlite3
from pathlib import Path

import pytest
from tests.processes import ROOT, run_in_ranks

import treadle as L

ONE_AFTER_ANOTHER = (
    "callbacks",
    "loss-does-not-fall",
    "migrating",
    "out-of-memory",
    "validation-does-not-run",
)
"""Pages whose programs share their names, as the cells of a notebook do, and assert what the page says."""


def _programs(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / f"docs/{page}.md").read_text(), re.DOTALL)


def _run_all(page: str) -> None:
    gc.freeze()  # what the test run has made by now, which a program that counts objects would go through
    names: dict[str, object] = {"__name__": "__main__"}
    has_accelerate = importlib.util.find_spec("accelerate") is not None
    for program in _programs(page):
        if has_accelerate or "from accelerate" not in program:
            exec(compile(program, f"docs/{page}.md", "exec"), names)
    assert names.get("accelerate_losses") == (names.get("fabric_losses") if has_accelerate else None)


@pytest.mark.parametrize("page", ONE_AFTER_ANOTHER)
def test_the_programs_of_a_page_run_one_after_another(page: str) -> None:
    assert len(_programs(page)) > 0
    run_in_ranks(_run_all, page, devices=1)


def test_one_program_on_one_and_on_two_devices() -> None:
    (program,) = _programs("distributed")
    printed = []
    for devices in (1, 2):
        Path("train.py").write_text(program.replace("DEVICES = 2", f"DEVICES = {devices}"))
        said = run_in_ranks(runpy.run_path, "train.py", None, "__main__", devices=devices)
        printed += re.findall(r"loss [\d.]+ val_loss [\d.]+", said)
    assert len(printed) == 2 and printed[0] == printed[1]


def test_which_lines_run_in_which_process() -> None:
    (program,) = _programs("processes-start-unexpectedly")
    Path("lines.py").write_text(program)
    said = run_in_ranks(runpy.run_path, "lines.py", None, "__main__")
    counts = {"every process": 2, "once": 1, "rank 0, after": 1, "rank 1, after": 1, "run of rank 0": 2}
    assert {line: said.count(line) for line in counts} == counts


def test_the_searches_for_batch_size_and_learning_rate() -> None:
    Path("tune.py").write_text(_programs("tuning")[0])
    run_in_ranks(runpy.run_path, "tune.py", None, "__main__", devices=1)


def test_the_optuna_program(capsys: pytest.CaptureFixture[str]) -> None:
    program = re.search(r"## Optuna\n.*?```python\n(.*?)```", (ROOT / "docs/tuning.md").read_text(), re.DOTALL)
    assert program is not None
    Path("search.py").write_text(program[1])
    runpy.run_path("search.py", run_name="__main__")
    found = re.search(r"best lr ([\d.]+), loss ([\d.e-]+)", capsys.readouterr().out)
    assert found is not None and 0.1 < float(found[1]) <= 1 and float(found[2]) < 0.1
    study = sqlite3.connect("line.db")
    states = [state for (state,) in study.execute("select state from trials")]
    study.close()
    assert len(states) == 12 and set(states) == {"PRUNED", "COMPLETE"}


def _table(page: str, heading: str) -> list[tuple[str, str]]:
    """The rows of the first table with two columns below a heading."""
    below = (ROOT / f"docs/{page}.md").read_text().partition(f"\n{heading}\n")[2].partition("\n#")[0]
    rows = re.findall(r"^\| (.*?) \| (.*) \|$", below, re.MULTILINE)[1:]
    assert len(rows) > 5
    return rows


def test_names_that_lightning_1_had_have_the_new_ones_beside_them() -> None:
    for _, new in _table("migrating", "### Imports"):
        for path in re.findall(r"`(treadle[\w.]*\.\w+)`", new):
            module, _, name = path.rpartition(".")
            assert hasattr(importlib.import_module(module), name), path


def test_arguments_that_lightning_1_had_have_the_new_ones_beside_them() -> None:
    accepted = set(inspect.signature(L.Trainer).parameters)
    found = set()
    for _, new in _table("migrating", "### Arguments of the Trainer"):
        for snippet in re.findall(r"`([^`]*=[^`]*)`", new.replace(", ...", "")):
            call = ast.parse(snippet if re.match(r"[\w.]+\(", snippet) else f"Trainer({snippet})", mode="eval").body
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Trainer":
                found |= {each.arg for each in call.keywords}
    assert len(found) > 10 and found <= accepted, found - accepted


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


def _anchors(page: Path) -> set[str]:
    """The names that the headings of a page have on a web page, as the usual hosts make them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), link
        assert not anchor or anchor in _anchors(there), link
