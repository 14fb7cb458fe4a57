"""The command `treadle replay`: a batch that was not finite, run again; and what it refuses to run.

Tests of ``treadle.replay``, ``treadle.cli.replay``.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import sysconfig
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from treadle import MisconfigurationException, Trainer
from treadle.cli.main import main
from treadle.replay import replay
from treadle_fabric import NonFiniteError, TorchCheckpointIO

pytestmark = pytest.mark.timeout(60)

SOURCE = '''
from pathlib import Path
import torch
from torch import nn
import treadle as L

Path("imported").touch()


class Net(L.LightningModule):
    """Draws random numbers, normalizes, and fails in the layer `far` once its input is large."""

    def __init__(self, width, far=nn.Identity):
        super().__init__()
        self.save_hyperparameters("width")
        self.near, self.norm, self.drop = nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(0.3)
        self.far = Far()

    def training_step(self, batch, batch_idx):
        self.log("batch", float(batch_idx))
        assert self.trainer.training and self.global_step <= batch_idx
        x = batch["x"] + torch.rand(()) * self.current_epoch
        y = self.far(self.drop(self.norm(self.near(x))), batch["scale"])
        return {"loss": y.square().mean(), "weight": len(x)} if batch["weighted"] else y.square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.1)


class Far(nn.Module):
    def forward(self, x, scale):
        return (x * scale).exp()


class Other(Net):
    def __init__(self):
        super().__init__(3)


class Late(Net):
    def __init__(self):
        super().__init__(3)
        del self.norm

    def setup(self, stage):
        self.norm = nn.BatchNorm1d(3)


class Early(Late):
    def configure_model(self):
        self.setup("fit")


def batches(weighted=False):
    generator = torch.Generator().manual_seed(2)
    found = [{"x": torch.randn(5, 4, generator=generator), "scale": 1.0, "weighted": weighted} for _ in range(6)]
    found[4]["scale"] = 300.0
    return torch.utils.data.DataLoader(found, batch_size=None)
'''
SCRIPT = """
import sys
import treadle as L
{definitions}

def run():
    L.seed_everything(5, verbose=False)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    L.Trainer(accelerator="cpu", devices=1, max_epochs=1, on_nonfinite="raise", **quiet).fit(Net(3), batches())

{guard}
    run()
"""
NAME = "epoch=0-step=4-batch=4-rank=0.replay"


@pytest.fixture
def bundle(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What a run in this process leaves; the model stands in a package below the working directory."""
    name = f"net_{abs(hash(request.node.name))}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    (tmp_path / name / "models.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    models = importlib.import_module(f"{name}.models")
    path = tmp_path / "nonfinite" / NAME
    torch.manual_seed(5)  # of the weights: with others all that overflows may be dropped
    fit(models.Net(3), models.batches())
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    for module in [m for m in sys.modules if m.partition(".")[0] == name]:
        del sys.modules[module]
    (tmp_path / "imported").unlink()
    yield path
    for module in [m for m in sys.modules if m.partition(".")[0] == name]:
        del sys.modules[module]


def fit(model: Any, data: Any, **arguments: Any) -> None:
    torch.manual_seed(5)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    run = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        on_nonfinite="raise",
        enable_model_summary=False,
        **quiet,
        **arguments,
    )
    with pytest.raises(NonFiniteError):
        run.fit(model, data)


def test_the_batch_comes_out_the_same_to_the_last_bit(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = torch.get_rng_state(), list(sys.path)
    assert main(["replay", str(bundle)]) == 0
    assert torch.equal(state[0], torch.get_rng_state()) and state[1] == sys.path
    printed = capsys.readouterr().out
    for words in (
        "epoch 0, batch_idx 4, global_step 4",
        "rank 0 of 1",
        "imports    Net from ",
        "models.py",
        "loss       inf, in the run inf: identical",
        "not finite: identical",
        "'far' (Far): output of shape (5, 3), its input is finite.",
        "result     reproduced",
    ):
        assert words in printed, printed
    assert "near.weight" in printed
    found = replay(bundle)
    assert found.reproduced and found.same_gradients is True
    assert any(name.startswith("near.weight") for name in found.findings.gradients)


def changed(path: Path, **values: Any) -> Path:
    content = TorchCheckpointIO().load_checkpoint(path) | values
    new = path.with_name(f"{uuid.uuid4().hex}.replay")
    TorchCheckpointIO().save_checkpoint(content, new)
    return new


def test_what_comes_out_differently_is_told(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other weights, another batch, other random numbers: each of them shows."""
    saved = TorchCheckpointIO().load_checkpoint(bundle)
    rng = {**saved["rng"], "torch": torch.Generator().manual_seed(9).get_state()}
    batch = {**saved["batch"], "scale": 1.0}
    assert main(["replay", str(changed(bundle, batch=batch))]) == 1
    printed = capsys.readouterr().out
    assert "NOT reproduced" in printed and "no layer has an output" in printed and "inf: different" in printed
    finite = replay(changed(bundle, batch=batch))
    again = {"batch": batch, "loss": finite.findings.loss, "digest": finite.findings.digest}
    assert main(["replay", str(changed(bundle, **again))]) == 0
    assert main(["replay", str(changed(bundle, **again, rng=rng))]) == 1
    parameters = {k: v + 1e-6 for k, v in saved["parameters"].items()}
    assert main(["replay", str(changed(bundle, **again, parameters=parameters))]) == 1
    buffers = {k: v for k, v in saved["buffers"].items() if k != "norm.running_var"}
    capsys.readouterr()
    assert main(["replay", str(changed(bundle, buffers=buffers))]) == 2
    assert "norm.running_var" in capsys.readouterr().err


def test_of_accumulated_and_weighted_batches_the_loss_is_compared(bundle: Path, tmp_path: Path) -> None:
    sys.path.insert(0, str(tmp_path))
    try:
        models = importlib.import_module(f"{next(tmp_path.glob('net_*')).name}.models")
    finally:
        sys.path.remove(str(tmp_path))
    for weighted, accumulate, where in ((True, 1, "step=4"), (False, 3, "step=1")):
        path = tmp_path / "nonfinite" / f"epoch=0-{where}-batch=4-rank=0.replay"
        path.unlink(missing_ok=True)
        fit(models.Net(3), models.batches(weighted), accumulate_grad_batches=accumulate)
        found = replay(path)
        assert found.reproduced and found.same_loss and found.same_gradients is None


def test_another_module_of_the_same_name_is_not_taken_for_the_recorded_file(bundle: Path, tmp_path: Path) -> None:
    """An installed package, say, whose name is that of the working directory's."""
    name = next(tmp_path.glob("net_*")).name
    elsewhere = tmp_path / "elsewhere" / name
    elsewhere.mkdir(parents=True)
    (elsewhere / "__init__.py").touch()
    (elsewhere / "models.py").write_text(SOURCE.replace(".exp()", ".sin()"))
    sys.path.insert(0, str(elsewhere.parent))
    try:
        importlib.import_module(f"{name}.models")
        assert replay(bundle).reproduced
    finally:
        sys.path.remove(str(elsewhere.parent))


@pytest.mark.faults  # takes long
@pytest.mark.timeout(110)
def test_a_script_needs_a_main_guard(tmp_path: Path) -> None:
    def run(guard: str, *command: str) -> Any:
        (tmp_path / "train.py").write_text(SCRIPT.format(definitions=SOURCE, guard=guard))
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        return subprocess.run([sys.executable, *command], env=environ, capture_output=True, text=True, timeout=50)

    with_guard, without = 'if __name__ == "__main__":', "if True:"
    done = run(with_guard, "train.py")
    assert "NonFiniteError: The loss is inf at epoch 0, batch_idx 4, global_step 4" in done.stderr, done.stderr
    replaying = ("-m", "treadle.cli", "replay", f"nonfinite/{NAME}")
    for guard, status in ((with_guard, 0), (without, 2)):
        (tmp_path / "imported").unlink(missing_ok=True)
        done = run(guard, *replaying)
        assert done.returncode == status, done.stdout + done.stderr
        assert (tmp_path / "imported").exists() == (status == 0)
    assert "__main__" in done.stderr


# --------------------------------------------------------------------------------------------------- what is refused


class Runs:
    """Unpickling it runs code."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("owned",)


def test_a_file_runs_nothing_of_its_own(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = torch.load(bundle, weights_only=True)
    torch.save({**content, "batch": Runs()}, "hostile.replay")
    assert main(["replay", "hostile.replay"]) == 2
    assert not Path("owned").exists() and not Path("imported").exists()
    assert "mkdir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "name", "file", "words"),
    [
        ("subprocess", "Popen", subprocess.__file__, "outside the working directory"),
        ("net", "Net", "/nowhere/net.py", "which is not here"),
        ("net", "Net", "", "no file"),
        ("__main__", "f.<locals>.Net", "net.py", "made in a function"),
        ("pytest", "Item", pytest.__file__, "no LightningModule"),
        ("net", "Popen", "here.py", "no LightningModule"),
        ("net", "Missing", "here.py", "no LightningModule"),
        ("net", "Net", "fails.py", "could not be imported"),
    ],
)
def test_code_that_is_not_yours_is_not_imported(
    bundle: Path, capsys: pytest.CaptureFixture[str], module: str, name: str, file: str, words: str
) -> None:
    Path("here.py").write_text("from subprocess import Popen\n")
    Path("fails.py").write_text("raise SystemExit(7)\n")
    file = os.path.abspath(file) if file else ""
    path = changed(bundle, **{"class": {"module": module, "name": name, "file": file}})
    assert main(["replay", str(path)]) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert ("imports" in printed.out) == ("no LightningModule" in words or "imported" in words)


def test_code_elsewhere_is_imported_where_it_is_named(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = next(tmp_path.glob("net_*"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["replay", str(bundle)]) == 2
    assert "outside the working directory" in capsys.readouterr().err
    assert not Path("imported").exists()
    assert main(["replay", str(bundle), "--module", f"../{source.name}/models.py:Net"]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["replay", str(bundle), "--module", f"{source.name}.models:Net"]) == 0
    assert main(["replay", str(bundle), "--module", f"{source.name}.models:Other"]) == 0
    assert sysconfig.get_path("purelib") not in str(source)


def test_layers_of_setup_need_a_subclass_that_makes_them(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = f"{next(tmp_path.glob('net_*')).name}.models"
    assert main(["replay", str(bundle), "--module", f"{models}:Late"]) == 2
    told = capsys.readouterr().err
    assert "does not call `Late.setup`" in told and "configure_model" in told
    assert main(["replay", str(bundle), "--module", f"{models}:Early"]) == 0


def test_misuse_is_told(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    TorchCheckpointIO().save_checkpoint({"state_dict": {}}, "other.ckpt")
    for arguments, words in (
        (["other.ckpt"], "no replay file"),
        (["missing.replay"], "missing.replay"),
        ([str(bundle), "--module", "Net"], "--module 'Net'"),
        ([str(bundle), "--module", "nowhere.at_all:Net"], "could not be imported"),
        ([str(changed(bundle, hyper_parameters={}))], "save_hyperparameters"),
        ([str(changed(bundle, hyper_parameters={"width": 7}))], "near.weight"),
        ([str(changed(bundle, rng=3))], "could not be restored"),
    ):
        assert main(["replay", *arguments]) == 2, arguments
        assert words in capsys.readouterr().err
    with pytest.raises(MisconfigurationException, match="Net"):
        replay(bundle, "Net")
