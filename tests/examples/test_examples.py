"""Every example runs as its docstring says, and does what it promises."""

from __future__ import annotations

import csv
import difflib
import os
import re
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.tensor.parallel  # heavy; the forks inherit it
from tests.processes import run_in_ranks

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
RUNGS = ["ladder/1_raw.py", "ladder/2_fabric.py", "ladder/3_trainer.py"]
LAUNCHED = [
    *RUNGS,
    "callbacks.py",
    "char_gpt.py",
    *("clusters/fabric_loop.py", "clusters/slurm_submitit.py", "clusters/train.py"),  # in test_clusters.py
    "clusters/ray_train.py",  # in tests/ray
    "ddp_cpu.py",
    "lr_schedule.py",
    "migrate_module.py",
    "model_parallel_cpu.py",
    "quickstart.py",
    "validation_and_test.py",
]


def run(example: str, *arguments: str | Path, launcher: tuple[str, ...] = ()) -> str:
    """The example's standard output, run in the current folder, which is the test's own."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, *launcher, str(EXAMPLES / example), *map(str, arguments)]
    result = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=110)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    assert "Traceback" not in result.stderr, result.stderr
    return result.stdout


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, f"{pattern!r} is not in:\n{text}"
    return float(found[1])


def losses(text: str) -> list[float]:
    return [float.fromhex(line) for line in text.split()]


def test_the_first_program_of_the_readme(tmp_path: Path) -> None:
    program = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    (tmp_path / "first.py").write_text(program)
    run(str(tmp_path / "first.py"))
    (saved,) = tmp_path.rglob("checkpoints/*.ckpt")
    assert saved.name == "epoch=4-step=145.ckpt"


def test_the_programs_of_the_page_on_torchmetrics(tmp_path: Path) -> None:
    import torchmetrics  # noqa: F401  # takes seconds, which the forks below need not spend

    programs = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "torchmetrics.md").read_text(), re.DOTALL)
    found = []
    for i, program in enumerate(programs):
        for devices in (1, 2):
            (file := tmp_path / f"program{i}.py").write_text(program.replace("devices=2", f"devices={devices}"))
            found.append(run_in_ranks(partial(runpy.run_path, run_name="__main__"), file, devices=devices))
    module, modules, loop, loops = found
    assert number(r"mean_score +([\d.]+)", modules) == number(r"mean_score +([\d.]+)", module)
    assert "val_BinaryPrecision" in modules
    assert "auroc 1.000\n" in loop
    assert loops.count("auroc 1.000\n") == 1


def test_every_example_is_run_here() -> None:
    assert sorted(str(file.relative_to(EXAMPLES)) for file in EXAMPLES.rglob("*.py")) == sorted(LAUNCHED)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The losses of the hand-written loop, and what it printed."""
    file = tmp_path_factory.mktemp("ladder") / "raw.txt"
    out = run(RUNGS[0], "--epochs", "2", "--losses", file)
    assert number(r"test accuracy ([\d.]+)", out) > 0.9
    return file.read_text(), out


@pytest.mark.parametrize("rung", RUNGS[1:])
def test_ladder_gives_the_same_losses_to_the_last_bit(rung: str, raw: tuple[str, str]) -> None:
    out = run(rung, "--epochs", "2", "--losses", "losses.txt")
    assert len(raw[0].split()) == 44
    assert Path("losses.txt").read_text() == raw[0]
    assert out == raw[1], "the same test accuracy"


@pytest.mark.faults  # takes long
@pytest.mark.parametrize("rung", RUNGS[1:])
def test_ladder_on_two_processes_sees_the_same_batches(rung: str, raw: tuple[str, str]) -> None:
    out = run(rung, "--epochs", "2", "--devices", "2", "--batch-size", "32", "--losses", "losses.txt")
    assert losses(Path("losses.txt").read_text()) == pytest.approx(losses(raw[0]), rel=1e-4)
    assert out.count("test accuracy") == 1


@pytest.mark.parametrize(("lower", "upper"), [(0, 1), (1, 2)])
def test_each_rung_is_a_small_change(lower: int, upper: int) -> None:
    before, after = ((EXAMPLES / RUNGS[i]).read_text().partition("from __future__")[2] for i in (lower, upper))
    diff = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0)
    changed = [line for line in diff if line[:1] in "+-" and line[1:].strip() and line[:3] not in ("+++", "---")]
    assert len(changed) <= 60, "\n".join(changed)


def test_quickstart() -> None:
    out = run("quickstart.py")
    assert number(r"test accuracy +([\d.]+)", out) >= 0.97
    folder = Path("runs/quickstart")
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list(folder.glob("tensorboard/version_0/events.out.tfevents.*"))
    with (folder / "csv/version_0/metrics.csv").open(newline="") as file:
        columns = csv.DictReader(file).fieldnames
    assert columns is not None
    assert {"epoch", "step", "train_loss", "train_acc", "val_loss", "val_acc"} <= set(columns)
    checkpoints = list(folder.glob("checkpoints/*.ckpt"))
    assert len(checkpoints) == 1, "only the best is kept"
    assert f"best checkpoint  {checkpoints[0]}" in out.replace(f"{Path.cwd()}/", "")
    assert torch.load(checkpoints[0], weights_only=True)["hyper_parameters"]["width"] == 32


def test_validation_and_test() -> None:
    out = run("validation_and_test.py")
    assert number(r"clean: [\d.]+ before training, ([\d.]+) after", out) > 0.95
    assert number(r"noisy: [\d.]+ before training, ([\d.]+) after", out) > 0.7
    assert number(r"test accuracy: ([\d.]+)", out) > 0.93
    assert "test_acc" in out.partition("test accuracy:")[0], "trainer.test prints its own table"
    assert number(r"(\d+) predictions", out) == 360


def test_callbacks() -> None:
    out = run("callbacks.py")
    epochs = number(r"\nstopped after (\d+) epochs", out)
    assert epochs < 100
    assert out.count("training begins") == 2
    folder = Path("runs/callbacks")
    kept = re.findall(r"kept (\S+)", out)
    assert len(kept) == 3
    assert "last.ckpt" in {file.name for file in folder.glob("checkpoints/*")}
    assert "lr-SGD" in (folder / "log/version_0/metrics.csv").read_text().splitlines()[0]
    found = re.search(r"resumed, and stopped after (\d+) epochs; (\d+) measured in all", out)
    assert found and int(found[1]) == int(found[2]) == epochs


def test_lr_schedule() -> None:
    out = run("lr_schedule.py", "--epochs", "8")
    one_cycle, cosine, plateau = (
        [float(number) for number in re.findall(r"([\d.e-]+)(?=[,;])", line)] for line in out.strip().splitlines()
    )
    assert one_cycle[0] == pytest.approx(0.4 / 25, rel=1e-2)
    assert one_cycle[1] == pytest.approx(0.4, rel=1e-2)
    assert one_cycle[2] < 1e-3
    assert cosine[0] == cosine[1] == 0.2
    assert 0 < cosine[2] < 0.02
    assert plateau[0] == plateau[1] == 0.2


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param((), marks=pytest.mark.faults),
        ("-m", "torch.distributed.run", "--nproc-per-node", "2"),
    ],  # it takes long
)
def test_ddp_cpu(launcher: tuple[str, ...]) -> None:
    out = run("ddp_cpu.py", launcher=launcher)
    assert len(set(re.findall(r"rank \d \(process (\d+)\)", out))) == 2
    assert "weights equal on all 2 ranks: True" in out
    assert number(r"on (\d+) images$", out.strip()) == 361, "each image is tested exactly once"
    assert number(r"test accuracy ([\d.]+)", out) > 0.9


def _run_here(example: str, *arguments: str) -> None:
    sys.argv = [example, *arguments]
    runpy.run_path(str(EXAMPLES / example), run_name="__main__")


def test_model_parallel_cpu() -> None:
    """Layers or sequences that two processes share, and one process alone: the same losses."""
    layouts = {"tensor": (2, "1"), "sequence": (2, "2"), "one process": (1, "1")}
    printed = {
        name: run_in_ranks(
            _run_here,
            "model_parallel_cpu.py",
            "--epochs",
            "1",
            "--devices",
            str(devices),
            "--sequence",
            sequence,
            devices=devices,
        )
        for name, (devices, sequence) in layouts.items()
    }
    found = {name: number(r"epoch 1: loss ([\d.]+)", text) for name, text in printed.items()}
    assert found["tensor"] < 6.0 and len(set(found.values())) == 1, found


@pytest.mark.faults  # takes long
def test_char_gpt() -> None:
    out = run("char_gpt.py", "--steps", "80", "--no-progress")
    assert "80 optimizer steps of 32 windows" in out
    assert number(r"validation: ([\d.]+) bits", out) < 4.0
    assert len(out.partition("sample: ")[2]) > 200


def test_migrate_module() -> None:
    out = run("migrate_module.py", "--epochs", "3")
    assert re.findall(r"epoch (\d): validation", out) == ["0", "1", "2"]
    assert number(r"epoch 2: validation accuracy ([\d.]+)", out) > 0.85
    assert number(r"self.log wrote (\d+) rows", out) == 3 * 45
    with next(Path("runs/migrate/fabric").glob("*/metrics.csv")).open(newline="") as file:
        logged = [float(row["train_loss"]) for row in csv.DictReader(file)]
    assert logged[-1] < logged[0] / 2


@pytest.mark.faults  # takes long
def test_migrate_module_under_the_trainer() -> None:
    assert number(r"train_loss ([\d.]+)", run("migrate_module.py", "--epochs", "3", "--trainer")) < 1.5
