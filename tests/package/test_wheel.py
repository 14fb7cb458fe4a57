"""The wheel, in an environment of its own in which nothing else is installed: `make test-package`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tests.architecture.test_user_types import check_types
from tests.processes import ROOT

pytestmark = [pytest.mark.package, pytest.mark.timeout(600)]

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def run(*command: object, cwd: Path | None = None) -> str:
    """Run a command without this process's search path; returns what it printed."""
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(part) for part in command], env=environ, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that was built from an sdist."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", out, ROOT)
    assert len(list(out.glob("*.tar.gz"))) == 1
    [found] = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs of an environment with the wheel, its extras, and the tested versions of the rest."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    # only what is imported is compiled
    arguments = ["install", "--quiet", "--no-compile", "-c", ROOT / "constraints.txt"]
    run(*PIP, "--python", folder / "bin/python", *arguments, f"treadle[demo,cli] @ {wheel.as_uri()}")
    return folder / "bin"


def test_the_sdist_has_what_the_tree_has(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT)
    [direct] = tmp_path.glob("*.whl")
    assert direct.name == wheel.name and direct.read_bytes() == wheel.read_bytes()
    packed = set(zipfile.ZipFile(wheel).namelist())
    sources = {file.relative_to(top).as_posix() for top in (ROOT / "fabric", ROOT / "trainer") for file in source(top)}
    assert sources == {name for name in packed if not name.partition("/")[0].endswith(".dist-info")}
    assert {"treadle/py.typed", "treadle_fabric/py.typed"} <= packed


def source(top: Path) -> list[Path]:
    return [file for file in top.rglob("*") if file.is_file() and "__pycache__" not in file.parts]


def test_the_quick_start_of_the_readme(programs: Path, tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    (tmp_path / "digits.py").write_text(code[1])
    said = run(programs / "python", "digits.py", cwd=tmp_path)
    assert "`Trainer.fit` stopped: `max_epochs=5` reached" in said, said
    assert list(tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt"))
    where = run(programs / "python", "-c", "import treadle, treadle_fabric as f; print(treadle.__file__, f.__file__)")
    assert all(Path(file).is_relative_to(programs.parent) for file in where.split())


def test_the_example_and_both_commands(programs: Path, tmp_path: Path) -> None:
    shutil.copy(ROOT / "examples/quickstart.py", tmp_path)
    assert "test accuracy" in run(programs / "python", "quickstart.py", "--epochs", "2", cwd=tmp_path)
    treadle, fabric = programs / "treadle", programs / "treadle-fabric"
    assert ": good, " in run(treadle, "checkpoint", "verify", "runs/quickstart/checkpoints", cwd=tmp_path)
    assert "2 runs" in run(treadle, "plot", "runs/quickstart", "-o", "curves.svg", cwd=tmp_path)
    assert (tmp_path / "curves.svg").stat().st_size > 1000
    assert "With accelerator='auto'" in run(fabric, "environment", cwd=tmp_path)
    for command in (treadle, fabric):
        assert "commands:" in run(command, "--help")


def test_a_users_program_type_checks_strictly(programs: Path, tmp_path: Path) -> None:
    check_types(tmp_path, "--python-executable", str(programs / "python"))
