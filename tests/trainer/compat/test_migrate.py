"""``treadle migrate``: programs, notebooks and configs for Lightning, before and after; and what is left to do by hand.

Tests of ``treadle.compat.migrate``: ``names``, ``older``, ``findings``, ``tree``, ``configs``, ``notebooks``,
``dependencies``, and in ``python`` ``source``, ``bindings``, ``uses``, ``imports``, ``strings``, ``loggers``,
``outdated``, ``rewriting``; of ``treadle.cli.migrate``.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import stat
import subprocess
import textwrap
import tomllib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

from treadle import Callback, LightningModule, Trainer
from treadle.cli.main import main
from treadle.compat.messages import LOGGER
from treadle.compat.migrate.names import Found, names
from treadle.compat.migrate.python.source import migrate_source
from treadle.names.table import PACKAGES
from treadle_fabric import rank_zero

# A program for Lightning, and the same for Treadle.
PROGRAMS = {
    "the usual alias": (
        """
        import os
        import lightning as L  # the framework

        class Net(L.LightningModule):  # a comment
            def  forward( self,x ): return x   # odd formatting stays
        """,
        """
        import os
        import treadle as L  # the framework

        class Net(L.LightningModule):  # a comment
            def  forward( self,x ): return x   # odd formatting stays
        """,
    ),
    "an alias of both packages": (
        """
        try:
            import lightning.pytorch as pl
        except ImportError:
            import pytorch_lightning as pl
        stop = pl.callbacks.EarlyStopping("loss")
        """,
        """
        try:
            import treadle as pl
        except ImportError:
            import treadle as pl
        stop = pl.callbacks.EarlyStopping("loss")
        """,
    ),
    "a package without an alias": (
        """
        import pytorch_lightning
        import lightning
        made = pytorch_lightning.callbacks.EarlyStopping("loss"), lightning.pytorch.Trainer, lightning.Trainer
        """,
        """
        import treadle
        made = treadle.callbacks.EarlyStopping("loss"), treadle.Trainer, treadle.Trainer
        """,
    ),
    "dotted imports": (
        """
        import lightning.pytorch.callbacks
        import lightning.pytorch.loggers as loggers, json
        made = lightning.pytorch.callbacks.EarlyStopping, loggers.CSVLogger, lightning.pytorch.Trainer
        """,
        """
        import treadle.callbacks
        import treadle.loggers as loggers, json
        made = treadle.callbacks.EarlyStopping, loggers.CSVLogger, treadle.Trainer
        """,
    ),
    "Fabric by way of lightning": (
        """
        def train():
            import lightning as L
            return L.fabric.Fabric(), L.Fabric
        train()
        """,
        """
        def train():
            import treadle as L
            import treadle_fabric
            return treadle_fabric.Fabric(), L.Fabric
        train()
        """,
    ),
    "modules from packages": (
        """
        from lightning import pytorch as pl, fabric
        from lightning.pytorch import callbacks as cb, Trainer, loggers
        made = pl.Trainer, fabric.Fabric, cb.EarlyStopping, loggers.CSVLogger
        """,
        """
        import treadle as pl
        import treadle_fabric as fabric
        from treadle import callbacks as cb, Trainer, loggers
        made = pl.Trainer, fabric.Fabric, cb.EarlyStopping, loggers.CSVLogger
        """,
    ),
    "names that live in different modules": (
        """
        from pytorch_lightning import (
            Trainer,  # runs
            metrics_of_mine,
            LightningModule as Base,  # to derive from
            loggers
        )
        """,
        """
        from treadle import (
            Trainer,  # runs
            LightningModule as Base,  # to derive from
            loggers
        )
        from pytorch_lightning import metrics_of_mine
        """,
    ),
    "names of Lightning 1": (
        """
        from pytorch_lightning.profiler import SimpleProfiler
        from pytorch_lightning.callbacks.base import Callback
        from pytorch_lightning.loggers import LightningLoggerBase as Base
        """,
        """
        from treadle.profilers import SimpleProfiler
        from treadle.callbacks import Callback
        from treadle.loggers import Logger as Base
        """,
    ),
    "all names": (
        """
        from pytorch_lightning import *
        from pytorch_lightning.callbacks import *
        made = Trainer, EarlyStopping
        """,
        """
        from treadle import *
        from treadle.callbacks import *
        made = Trainer, EarlyStopping
        """,
    ),
    "for type checkers, and types in strings": (
        """
        from typing import TYPE_CHECKING, Literal, Optional, cast
        if TYPE_CHECKING:
            import lightning.pytorch
            import lightning.pytorch as pl
        def f(t: "pl.Trainer", u: "Optional[lightning.pytorch.Trainer]" = None, v: Literal["lightning"] = "lightning"):
            return cast("list[lightning.pytorch.Trainer]", t)
        """,
        """
        from typing import TYPE_CHECKING, Literal, Optional, cast
        if TYPE_CHECKING:
            import treadle
            import treadle as pl
        def f(t: "pl.Trainer", u: "Optional[treadle.Trainer]" = None, v: Literal["lightning"] = "lightning"):
            return cast("list[treadle.Trainer]", t)
        """,
    ),
    "a name that something else has, too": (
        """
        try:
            import lightning
        except ImportError:
            lightning = None
        made = lightning is not None and lightning.pytorch.Trainer
        """,
        """
        try:
            import treadle as lightning
        except ImportError:
            lightning = None
        made = lightning is not None and lightning.Trainer
        """,
    ),
    "a name that means something else": (
        """
        import lightning
        def f(lightning):
            return lightning.pytorch.Trainer
        def g():
            lightning = 3
            return lightning, dict(lightning=4)
        made = lightning.pytorch.Trainer
        """,
        """
        import treadle
        def f(lightning):
            return lightning.pytorch.Trainer
        def g():
            lightning = 3
            return lightning, dict(lightning=4)
        made = treadle.Trainer
        """,
    ),
    "one line, and names that are exported": (
        """
        __all__ = ["lightning"]
        import lightning; from pytorch_lightning import Trainer, fit_it; x = 1
        if x: import lightning.fabric as lf; lf.Fabric
        """,
        """
        __all__ = ["lightning"]
        import treadle as lightning; from treadle import Trainer; from pytorch_lightning import fit_it; x = 1
        if x: import treadle_fabric as lf; lf.Fabric
        """,
    ),
    "strings": (
        '''
        """pytorch_lightning.Trainer"""
        import importlib, logging, sys
        import importlib.util
        from unittest import mock
        importlib.import_module("pytorch_lightning")
        found = importlib.util.find_spec('lightning.pytorch'), "lightning_fabric" in sys.modules
        logging.getLogger("lightning.pytorch"), logging.getLogger(name="lightning.qubit")
        with mock.patch("lightning.pytorch.Trainer.fit"): pass
        config = {"class_path": "pytorch_lightning.callbacks.EarlyStopping", "_target_": r"lightning.Trainer"}
        words = "lightning", "lightning.qubit", "lightning.ai", "a pytorch_lightning.Trainer", b"lightning.Trainer"
        ''',
        '''
        """pytorch_lightning.Trainer"""
        import importlib, logging, sys
        import importlib.util
        from unittest import mock
        importlib.import_module("treadle")
        found = importlib.util.find_spec('treadle'), "treadle_fabric" in sys.modules
        logging.getLogger("treadle_fabric"), logging.getLogger(name="lightning.qubit")
        with mock.patch("treadle.Trainer.fit"): pass
        config = {"class_path": "treadle.callbacks.EarlyStopping", "_target_": r"treadle.Trainer"}
        words = "lightning", "lightning.qubit", "lightning.ai", "a pytorch_lightning.Trainer", b"lightning.Trainer"
        ''',
    ),
    "loggers of whole packages": (
        """
        import logging
        logging.getLogger("pytorch_lightning").setLevel(logging.NOTSET)
        log = logging.getLogger('lightning.fabric')
        log.setLevel("NOTSET")
        for name in ("lightning.pytorch", "torch"):
            logging.getLogger(name).setLevel(logging.NOTSET)
        read = [logging.getLogger(each).level for each in ["lightning"]]
        """,
        """
        import logging
        logging.getLogger("treadle_fabric").setLevel(logging.NOTSET)
        log = logging.getLogger('treadle_fabric')
        log.setLevel("NOTSET")
        for name in ("treadle_fabric", "torch"):
            logging.getLogger(name).setLevel(logging.NOTSET)
        read = [logging.getLogger(each).level for each in ["treadle_fabric"]]
        """,
    ),
    "a configuration of loggers": (
        """
        config = {"version": 1, "loggers": {"lightning.pytorch": {"level": "INFO"}, "x": {"()": "lightning.Trainer"}}}
        others = {"loggers": {"lightning.pytorch.loggers.CSVLogger": {"name": "run"}}}
        """,
        """
        config = {"version": 1, "loggers": {"treadle_fabric": {"level": "INFO"}, "x": {"()": "treadle.Trainer"}}}
        others = {"loggers": {"treadle.loggers.CSVLogger": {"name": "run"}}}
        """,
    ),
    "arguments of Lightning 1 whose value says what they are": (
        """
        from pytorch_lightning import Trainer
        def train():
            Trainer(gpus=1, accelerator="ddp", checkpoint_callback=False)  # quick
            Trainer(
                gpus=2,  # both
                distributed_backend='ddp',
                progress_bar_refresh_rate = 0,
                weights_summary=None
            )
            Trainer(checkpoint_callback=True, reload_dataloaders_every_epoch=True, replace_sampler_ddp=False)
        """,
        """
        from treadle import Trainer
        def train():
            Trainer(accelerator="gpu", devices=1, strategy="ddp", enable_checkpointing=False)  # quick
            Trainer(
                accelerator="gpu", devices=2,  # both
                strategy="ddp",
                enable_progress_bar = False,
                enable_model_summary=False
            )
            Trainer(enable_checkpointing=True, reload_dataloaders_every_n_epochs=1, use_distributed_sampler=False)
        """,
    ),
    "comments of an import, for all that it becomes": (
        """
        # what trains
        from lightning import Trainer, pytorch  # noqa: F401
        import lightning as L  # only this one
        L.fabric.Fabric
        """,
        """
        # what trains
        from treadle import Trainer  # noqa: F401
        import treadle as pytorch  # noqa: F401
        import treadle as L  # only this one
        import treadle_fabric
        treadle_fabric.Fabric
        """,
    ),
}


@pytest.fixture(autouse=True)
def _the_logger_stays() -> Iterator[None]:
    """Programs that are run here set its level."""
    logger = logging.getLogger("treadle_fabric")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name: str) -> None:
    before, after = map(textwrap.dedent, PROGRAMS[name])
    done = migrate_source(before)
    assert done.text == after
    assert migrate_source(after).text == after, "a second run changes nothing"
    if not done.findings:
        exec(compile(after, name, "exec"), {"__name__": "program"})


# A program, and for each thing that is left to do in it: the line, what is there, and words of the remedy.
LEFT = {
    "an unknown name": (
        "from lightning.pytorch import Trainer, Nope\nimport pytorch_lightning as pl\npl.nope.Thing\n",
        [(1, "lightning.pytorch.Nope", "nothing in the place"), (3, "pl.nope.Thing", "nothing in the place")],
    ),
    "versions": (
        """
        import importlib.metadata, lightning
        from lightning.pytorch import __version__
        if lightning.__version__ > "2": pass
        importlib.metadata.version("pytorch-lightning")
        """,
        [
            (3, "lightning.pytorch.__version__", "for Lightning 2.6.6"),
            (4, "lightning.__version__", "for Lightning 2.6.6"),
            (5, '"pytorch-lightning"', "for Lightning 2.6.6"),
        ],
    ),
    "a comment between names": (
        "import lightning as L\n(L\n .pytorch  # here\n .Trainer)\n",
        [(2, "L.pytorch.Trainer", "Write `L.Trainer`")],
    ),
    "strings that are made": (
        """
        name = f"lightning.pytorch.callbacks.{3}"
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        type(x).__module__.startswith("pytorch_lightning")
        """,
        [(2, "lightning.pytorch.callbacks", "when the program runs"), (3, "", "message"), (4, "", "treadle_fabric")],
    ),
    "arguments": (
        """
        import pytorch_lightning as pl
        from pytorch_lightning.callbacks import ModelCheckpoint as MC
        def gpus(gpus): ...
        trainer = pl.Trainer(gpus=0, strategy="ddp2", weights_summary="full", max_epochs=3, callbacks=[MC(period=2)])
        trainer.fit(None, train_dataloader=None)
        print(trainer.lr_schedulers, gpus(gpus=3))
        pl.Trainer.from_argparse_args(None)
        """,
        [
            (5, "ModelCheckpoint(period=)", "every_n_epochs"),
            (5, "Trainer(gpus=)", "devices="),
            (5, 'Trainer(strategy="ddp2")', '"ddp"'),
            (5, "Trainer(weights_summary=)", "ModelSummary"),
            (6, "fit(train_dataloader=)", "train_dataloaders"),
            (7, "trainer.lr_schedulers", "lr_scheduler_configs"),
            (8, "pl.Trainer.from_argparse_args", "LightningCLI"),
        ],
    ),
    "arguments whose new name is taken, or may be": (
        """
        from pytorch_lightning import Trainer
        Trainer(gpus=2, accelerator="ddp", strategy="ddp")
        Trainer(**settings, checkpoint_callback=False)
        Trainer(gpus=True, distributed_backend=None, progress_bar_refresh_rate=20, resume_from_checkpoint="a.ckpt")
        """,
        [
            (3, 'Trainer(accelerator="ddp")', "strategy="),
            (3, "Trainer(gpus=)", "devices="),
            (4, "Trainer(checkpoint_callback=)", "enable_checkpointing="),
            (5, "Trainer(distributed_backend=)", "strategy="),
            (5, "Trainer(gpus=)", "devices="),
            (5, "Trainer(progress_bar_refresh_rate=)", "TQDMProgressBar"),
            (5, "Trainer(resume_from_checkpoint=)", "ckpt_path="),
        ],
    ),
    "loggers of single modules": (
        """
        import logging
        logging.getLogger("lightning.pytorch.accelerators.cuda").setLevel(logging.ERROR)
        logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(quiet)
        for name in ["lightning", "lightning.pytorch.core"]: logging.getLogger(name).propagate = False
        config = {"loggers": {"lightning.pytorch.core": {"handlers": []}}}
        """,
        [
            (3, '"lightning.pytorch.accelerators.cuda"', "remove the line"),
            (4, '"pytorch_lightning.utilities.rank_zero"', "if all messages are meant"),
            (5, '"lightning.pytorch.core"', "remove the line"),
            (6, '"lightning.pytorch.core"', "remove the line"),
        ],
    ),
    "loggers of packages that are not alike": (
        """
        import logging
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        log = logging.getLogger("lightning.fabric")
        log.setLevel(logging.INFO)
        logging.getLogger("lightning").name
        """,
        [
            (3, '"lightning.pytorch"', "`lightning.fabric` and `lightning.pytorch` differently"),
            (4, '"lightning.fabric"', "write what is meant for all"),
        ],
    ),
    "methods": (
        """
        import keras
        from pytorch_lightning import Callback, LightningModule
        class Base(LightningModule):
            def validation_epoch_end(self, outputs): self.trainer.progress_bar_dict
            def training_step(self, batch, batch_idx, optimizer_idx): self.hparams = batch
        class Net(Base):
            def training_epoch_end(self, outputs): self.test_epoch_end(outputs)
            def test_epoch_end(self, outputs): ...
            def on_train_epoch_end(self): self.on_epoch_end()
            def on_epoch_end(self): "the program's own"
        class Notes(Callback):
            def on_batch_end(self, trainer, pl_module): trainer.current_epoch, trainer.root_gpu
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx): ...
            def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx): ...
        class Last(Base):
            def on_train_batch_start(self, batch, batch_idx, dataloader_idx): ...
            def on_train_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0): ...
        class Other(keras.Callback):
            def on_epoch_end(self, trainer): trainer.root_gpu
        """,
        [
            (5, "def validation_epoch_end", "on_validation_epoch_end"),
            (5, "trainer.progress_bar_dict", "progress_bar_metrics"),
            (6, "optimizer_idx", "automatic_optimization"),
            (6, "self.hparams = ", "save_hyperparameters"),
            (8, "def training_epoch_end", "on_train_epoch_end"),
            (9, "def test_epoch_end", "on_test_epoch_end"),
            (13, "def on_batch_end", "on_train_batch_end"),
            (13, "trainer.root_gpu", "root_device"),
            (14, "dataloader_idx", "on_train_batch_start(trainer, pl_module, batch, batch_idx)"),
            (17, "dataloader_idx", "on_train_batch_start(batch, batch_idx)"),
            (18, "dataloader_idx", "on_train_batch_end(outputs, batch, batch_idx)"),
        ],
    ),
    "what Lightning 1 had": (
        """
        from pytorch_lightning import metrics
        import pytorch_lightning as pl
        pl.TrainResult, pl.utilities.distributed
        """,
        [
            (2, "pytorch_lightning.metrics", "torchmetrics"),
            (4, "pl.TrainResult", "self.log"),
            (4, "pl.utilities.distributed", "treadle.utilities.rank_zero, or treadle_fabric.utilities.distributed"),
        ],
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left(name: str) -> None:
    before, expected = LEFT[name]
    done = migrate_source(textwrap.dedent(before))
    assert len(done.findings) == len(expected), done.findings
    for finding, (line, what, remedy) in zip(done.findings, expected):
        assert finding.line == line and what in finding.what and remedy in finding.remedy, finding
    again = migrate_source(done.text)
    assert again.text == done.text
    asked = sum("Lightning 2.6.6" in each.remedy for each in done.findings)
    assert len(again.findings) >= len(expected) - asked, "a second run lists what is still to do"


# --- files ---

CONFIGS = {
    "config.yaml": (
        """
        # lightning.pytorch.Trainer
        trainer:
          class_path: lightning.pytorch.Trainer   # runs
          init_args: {gpus: 2, callbacks: [{_target_: 'pytorch_lightning.callbacks.EarlyStopping'}, lightning]}
        lightning.pytorch.Trainer: [ "lightning.Trainer", lightning.pytorch.nope ]
        """,
        """
        # lightning.pytorch.Trainer
        trainer:
          class_path: treadle.Trainer   # runs
          init_args: {gpus: 2, callbacks: [{_target_: 'treadle.callbacks.EarlyStopping'}, lightning]}
        lightning.pytorch.Trainer: [ "treadle.Trainer", lightning.pytorch.nope ]
        """,
        ["5: `gpus` of Trainer", "6: `lightning.pytorch.nope`"],
    ),
    "config.json": (
        '{"lightning.Trainer": "lightning.Trainer", "x": ["pytorch_lightning.callbacks.EarlyStopping", "lightning"]}',
        '{"lightning.Trainer": "treadle.Trainer", "x": ["treadle.callbacks.EarlyStopping", "lightning"]}',
        [],
    ),
    "pyproject.toml": (
        """
        [project]
        keywords = ["lightning"]
        dependencies = [
            "torch", "lightning[pytorch-extra]>=2.1",
            'lightning_fabric',
        ]
        [tool.mine]
        target = "lightning.pytorch.Trainer"
        ignore = ["pytorch_lightning.callbacks.*"]
        """,
        """
        [project]
        keywords = ["lightning"]
        dependencies = [
            "torch", "lightning[pytorch-extra]>=2.1",
            'lightning_fabric',
        ]
        [tool.mine]
        target = "treadle.Trainer"
        ignore = ["pytorch_lightning.callbacks.*"]
        """,
        [
            "5: `lightning[pytorch-extra]`: Write `treadle[trainer,cli]`",
            "6: `lightning_fabric`: Write `treadle`",
            "10:",
        ],
    ),
    "requirements-dev.txt": (
        "torch\npytorch-lightning==1.9  # trains\nlightning-utilities\n# lightning\n",
        "torch\npytorch-lightning==1.9  # trains\nlightning-utilities\n# lightning\n",
        ["2: `pytorch-lightning`: Write `treadle[trainer]`"],
    ),
    "environment.yml": (
        "dependencies:\n- conda-forge::lightning=2\n- pip:\n  - lightning_fabric>2\n",
        "dependencies:\n- conda-forge::lightning=2\n- pip:\n  - lightning_fabric>2\n",
        ["2: `lightning`: Write `treadle[trainer]`", "4: `lightning_fabric`: Write `treadle`"],
    ),
    "setup.py": (
        "setup(keywords=['lightning'],\n install_requires=['torch', 'lightning>=2'])\n",
        "setup(keywords=['lightning'],\n install_requires=['torch', 'lightning>=2'])\n",
        ["2: `lightning`: Write `treadle[trainer]`"],
    ),
    "Dockerfile": ("RUN pip install -U lightning torch\n", "RUN pip install -U lightning torch\n", ["1: `lightning`"]),
}


def migrate(*arguments: object) -> int:
    return main(["migrate", *map(str, arguments)])


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_and_dependencies(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after, left = CONFIGS[name]
    (tmp_path / name).write_text(textwrap.dedent(before))
    assert migrate(tmp_path) == (1 if left else 0)
    assert (tmp_path / name).read_text() == textwrap.dedent(after)
    listed = capsys.readouterr().out.splitlines()[:-1]
    assert len(listed) == len(left)
    for line, expected in zip(listed, left):
        assert line.startswith(f"{tmp_path / name}:{expected}"), line


def test_a_notebook(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def code(*lines: str) -> dict[str, object]:
        source = [f"{line}\n" for line in lines[:-1]] + [lines[-1]]
        return {"cell_type": "code", "execution_count": 3, "metadata": {}, "outputs": [], "source": source}

    def notebook(name: str, base: str, last: str) -> str:
        cells = [
            {"cell_type": "markdown", "metadata": {}, "source": ["import lightning as L\n"]},
            code("!pip install lightning", f"import {name} as L", "%matplotlib inline"),
            code("%%bash", "echo lightning.Trainer"),
            code("if True:", "    files = !ls", f'    trainer = L.Trainer(gpus="é"), {base}.callbacks.EarlyStopping'),
            code(last),
        ]
        return json.dumps({"cells": cells, "nbformat": 4}, indent=1, ensure_ascii=False) + "\n"

    path = tmp_path / "train.ipynb"
    path.write_text(notebook("lightning", "L.pytorch", "from lightning import fabric"), encoding="utf-8")
    assert migrate(path) == 1
    assert path.read_text(encoding="utf-8") == notebook("treadle", "L", "import treadle_fabric as fabric")
    listed = capsys.readouterr().out.splitlines()
    lines = path.read_text(encoding="utf-8").splitlines()
    told = {what: lines[int(line) - 1] for line, what in (each.split(":")[1:3] for each in listed[:-1])}
    assert "gpus" in told[" `Trainer(gpus=)`"] and "!pip" in told[" `lightning`"]
    (tmp_path / "broken.ipynb").write_text('{"lightning": 3}')
    assert migrate(tmp_path / "broken.ipynb") == 1
    assert "is left as it is. This is no Jupyter notebook" in capsys.readouterr().out


def project(folder: Path) -> dict[str, bytes]:
    """A project with files of all kinds; what each is after the migration."""
    program, other = b"import lightning as L\r\nL.Trainer\r\n", b"import treadle as L\r\nL.Trainer\r\n"
    latin = "# -*- coding: latin-1 -*-\n# \xe9\nfrom lightning import %s\n"
    files = {
        "windows.py": (program, other),
        "pkg/marked.py": (b"\xef\xbb\xbf" + program, b"\xef\xbb\xbf" + other),
        "pkg/latin.py": ((latin % "pytorch").encode("latin-1"), None),
        "pkg/bin/run": (b"#!/usr/bin/env python\nimport lightning as L", b"#!/usr/bin/env python\nimport treadle as L"),
        "pkg/broken.py": (b"import lightning as\n", b"import lightning as\n"),
        "notes.txt": (program, program),
        ".git/hook.py": (program, program),
        ".hidden.py": (program, program),
        "env/pyvenv.cfg": (b"", b""),
        "env/lib/thing.py": (program, program),
        "base.py": (b"from lightning import LightningModule\nclass Base(LightningModule): ...\n", None),
        "pkg/heir.py": (b"from base import Base\nclass Net(Base):\n    def on_epoch_end(self): ...\n", None),
    }
    after = {name: second for name, (first, second) in files.items()}
    after["pkg/latin.py"] = "# -*- coding: latin-1 -*-\n# \xe9\nimport treadle as pytorch\n".encode("latin-1")
    after["base.py"] = files["base.py"][0].replace(b"lightning", b"treadle")
    after["pkg/heir.py"] = files["pkg/heir.py"][0]
    for name, (content, _) in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    os.chmod(folder / "pkg/bin/run", 0o750)
    (folder / "link.py").symlink_to("windows.py")
    return after


def contents(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_a_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    monkeypatch.chdir(tmp_path)
    after = project(Path())
    before = contents(Path())
    assert migrate("--dry-run", ".") == 1
    dry = capsysbinary.readouterr()
    assert contents(Path()) == before, "--dry-run writes nothing"

    assert migrate(".") == 1
    assert contents(Path()) == after
    assert stat.S_IMODE(os.stat("pkg/bin/run").st_mode) == 0o750
    assert Path("link.py").is_symlink()
    listed = capsysbinary.readouterr().out.decode().splitlines()
    assert listed[0].startswith("pkg/broken.py:1: this file: It is left as it is. ")
    assert listed[1].startswith("pkg/heir.py:3: `def on_epoch_end`: Name it `on_train_epoch_end`")
    assert listed[2].startswith("5 files of ") and listed[2].endswith(
        " 2 places left to you (1 file could not be read)."
    )
    assert dry.err.decode().replace("would be rewritten", "rewritten").splitlines() == listed

    assert migrate(".") == 1
    assert contents(Path()) == after
    assert capsysbinary.readouterr().out.decode().splitlines()[:2] == listed[:2]

    for name, content in before.items():
        Path(name).write_bytes(content)
    subprocess.run(["patch", "-p1", "--binary"], input=dry.out, check=True, stdout=subprocess.DEVNULL)
    assert contents(Path()) == after, "the diff is a patch"


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "program.py"
    path.write_text("import lightning\n")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert migrate(path) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["program.py"] and path.read_text() == "import lightning\n"


def test_nothing_to_do_and_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "done.py").write_text("import treadle as L\nprint(L.__version__, L.Trainer)\n")
    assert migrate(tmp_path) == 0
    assert capsys.readouterr().out == "0 files of 1 rewritten, 0 places left to you.\n"
    assert migrate(tmp_path / "none") == 2
    assert "There is no file or folder" in capsys.readouterr().err


def test_names() -> None:
    assert set(PACKAGES) == {"lightning", "pytorch_lightning", "lightning_fabric"}
    assert names().find("numpy.array") is None
    assert rank_zero._log.name == LOGGER


def test_what_lightning_1_had_is_there_no_more() -> None:
    entries = tomllib.loads(resources.files("treadle.names").joinpath("older.toml").read_text(encoding="utf-8"))
    found = {
        name
        for kind in ("moved", "removed")
        for name in entries[kind]
        if isinstance(names().find(f"lightning.{name}"), Found)
    }
    assert found == set(entries["moved"])
    assert not set(entries["arguments"]["Trainer"]) & set(inspect.signature(Trainer.__init__).parameters)
    for base in (LightningModule, Callback, Trainer):
        for kind in ("methods", "attributes"):
            assert not [name for name in entries[kind].get(base.__name__, ()) if hasattr(base, name)]
