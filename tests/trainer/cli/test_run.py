"""The command ``treadle run``: programs start as by ``python``, with Treadle in place of Lightning.

Tests of ``treadle.cli.run``.
"""

from __future__ import annotations

import os
import signal
import sys
import textwrap
from pathlib import Path

import pytest

from treadle.cli.main import main
from treadle.compat import SHIM

pytestmark = pytest.mark.timeout(60)

TELL = "import sys; print(sys.argv, sys.path[0], __name__)\n"


def run(*arguments: str, given: str = "") -> tuple[int, str]:
    """Run the command in a fork, whose place the program takes; returns its status and what it printed."""
    Path("given").write_text(given)
    if (pid := os.fork()) == 0:
        try:
            out = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(os.open("given", os.O_RDONLY), 0)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.stdout = os.fdopen(1, "w", closefd=False)
            sys.stderr = os.fdopen(2, "w", closefd=False)
            status = main(["run", *arguments])
            sys.stderr.flush()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), Path("said").read_text()


def test_a_script_is_started_as_by_python() -> None:
    Path("there").mkdir()
    Path("there/script.py").write_text(TELL + "sys.exit(3)")
    status, said = run("there/script.py", "a", "--lr", "1", "-m", "x", "--", "--help")
    assert status == 3
    assert said.split("] ") == [
        "['there/script.py', 'a', '--lr', '1', '-m', 'x', '--', '--help'",
        f"{Path.cwd() / 'there'} __main__\n",
    ]


def test_modules_code_and_the_standard_input() -> None:
    Path("module.py").write_text(TELL)
    assert run("-m", "module", "-c", "1") == (0, f"['{Path.cwd()}/module.py', '-c', '1'] {Path.cwd()} __main__\n")
    assert run("-c", TELL, "-m")[1] == "['-c', '-m']  __main__\n"
    assert run("-", "a", given=TELL)[1] == "['-', 'a']  __main__\n"


def test_a_signal_ends_the_program_itself() -> None:
    assert run("-c", "import os; os.kill(os.getpid(), 9)")[0] == -signal.SIGKILL


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no.py"], "treadle: There is no file 'no.py' to run.\n"),
        ([], "treadle: There is nothing to run: give a script, -m and a module, or -c and code.\n"),
    ],
)
def test_what_cannot_be_run(arguments: list[str], said: str) -> None:
    assert run(*arguments) == (2, said)


def test_processes_of_the_program_have_treadle_for_lightning() -> None:
    """A child by `spawn`, and one by `subprocess`; none of them imports it, which would take seconds."""
    program = """
        import importlib.metadata, importlib.util, multiprocessing, subprocess, sys

        def tell(kind):
            origin = importlib.util.find_spec("pytorch_lightning").origin
            print(kind, origin, importlib.metadata.version("lightning"), flush=True)

        if __name__ == "__main__":
            tell("here")
            child = multiprocessing.get_context("spawn").Process(target=tell, args=("spawn",))
            child.start(), child.join()
            subprocess.run([sys.executable, "-c", "import program; program.tell('subprocess')"], check=True)
    """
    Path("program.py").write_text(textwrap.dedent(program))
    status, said = run("program.py")
    origin = SHIM / "pytorch_lightning/__init__.py"
    assert (status, said) == (0, "".join(f"{kind} {origin} 2.6.6\n" for kind in ("here", "spawn", "subprocess")))


def test_a_program_of_lightning_trains() -> None:
    program = """
        import lightning as L, pytorch_lightning, torch, treadle
        from lightning.pytorch.callbacks.early_stopping import EarlyStopping
        from torch.utils.data import DataLoader, TensorDataset

        class Net(L.LightningModule):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Linear(4, 1)
            def training_step(self, batch, batch_idx):
                loss = self.layer(batch[0]).square().mean()
                self.log("loss", loss)
                return loss
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        stop = EarlyStopping("loss", check_on_train_epoch_end=True)
        trainer = L.Trainer(max_epochs=2, callbacks=stop, logger=False, enable_checkpointing=False)
        trainer.fit(Net(), DataLoader(TensorDataset(torch.ones(8, 4)), batch_size=4))
        assert isinstance(trainer, treadle.Trainer) and pytorch_lightning.Trainer is L.Trainer
        print("steps", trainer.global_step)
    """
    Path("program.py").write_text(textwrap.dedent(program))
    status, said = run("program.py")
    assert status == 0 and "steps 4\n" in said, said
