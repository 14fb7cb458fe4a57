"""Loggers: what they leave on the disk, read back as their users read it.

Tests of ``treadle_fabric.loggers.csv``, ``treadle_fabric.loggers.hyperparameters``,
``treadle_fabric.loggers.logger``, ``treadle_fabric.loggers.run_folder``, ``treadle_fabric.loggers.scalars``,
``treadle_fabric.loggers.tensorboard``.
"""

from __future__ import annotations

import csv
import os
import pickle
import re
import subprocess
import sys
import textwrap
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from treadle_fabric.attribute_dict import AttributeDict
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.loggers import CSVLogger, DummyLogger, Logger, TensorBoardLogger, rank_zero_experiment
from treadle_fabric.rank_zero import rank_zero_only

FileLogger = type[CSVLogger] | type[TensorBoardLogger]
both = pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])


def rows(logger: CSVLogger) -> list[dict[str, str]]:
    """The rows of metrics.csv, without the cells that are empty."""
    with open(os.path.join(logger.log_dir, "metrics.csv"), newline="") as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def events(folder: str | Path) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


def scalars(folder: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Every chart as its (step, value) points."""
    loaded = events(folder)
    return {tag: [(e.step, e.value) for e in loaded.Scalars(tag)] for tag in loaded.Tags()["scalars"]}


def hparams_yaml(logger: Logger) -> str:
    assert logger.log_dir is not None
    return Path(logger.log_dir, "hparams.yaml").read_text()


# --- where the files go ---


@both
def test_versions_count_up_from_what_is_there(kind: FileLogger, tmp_path: Path) -> None:
    first = kind(tmp_path)
    assert (first.name, first.version) == ("lightning_logs", 0)
    assert first.log_dir == str(tmp_path / "lightning_logs" / "version_0")
    assert first.save_dir == str(tmp_path) and first.root_dir == str(tmp_path / "lightning_logs")
    assert kind(root_dir=tmp_path).root_dir == str(tmp_path)
    first.log_metrics({"a": 1})
    first.finalize("success")
    (tmp_path / "lightning_logs" / "version_7").mkdir()
    (tmp_path / "lightning_logs" / "version_x").mkdir()
    (tmp_path / "lightning_logs" / "version_9").touch()
    assert kind(tmp_path).version == 8
    assert first.version == 0


@both
@pytest.mark.parametrize(
    ("name", "version", "expected"),
    [
        ("n", 3, "n/version_3"),
        ("n", "v", "n/v"),
        ("", None, "version_0"),
        (None, "v", "v"),
        ("a/b", 0, "a/b/version_0"),
    ],
)
def test_name_and_version_make_the_folder(kind: FileLogger, name: Any, version: Any, expected: str) -> None:
    logger = kind("logs", name=name, version=version)
    assert logger.log_dir == os.path.join("logs", expected)
    assert logger.name == (name or "")
    logger.log_metrics({"a": 1.0}, 0)
    logger.finalize("success")
    assert os.listdir(logger.log_dir)


@both
def test_both_vocabularies_name_one_folder(kind: FileLogger, tmp_path: Path) -> None:
    assert kind(save_dir=tmp_path).log_dir == kind(root_dir=tmp_path).log_dir
    assert kind(root_dir=tmp_path, save_dir=str(tmp_path)).root_dir == str(tmp_path)
    with pytest.raises(MisconfigurationException, match=r"root_dir='b'.*save_dir='a'"):
        kind("a", root_dir="b")
    with pytest.raises(TypeError, match="needs a folder"):
        kind()


def test_tensorboard_writes_to_a_sub_folder(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, version=0, sub_dir="fold_1")
    assert logger.sub_dir == "fold_1"
    assert logger.log_dir == str(tmp_path / "lightning_logs" / "version_0" / "fold_1")
    logger.log_metrics({"a": 1}, 1)
    logger.finalize("success")
    assert scalars(logger.log_dir) == {"a": [(1, 1.0)]}


@both
def test_nothing_is_written_before_something_is_logged(kind: FileLogger, tmp_path: Path) -> None:
    logger = kind(tmp_path)
    logger.save()
    logger.finalize("success")
    assert os.listdir(tmp_path) == []


@both
def test_only_rank_zero_writes(kind: FileLogger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = kind(tmp_path)
    logger.log_metrics({"a": 1}, 0)
    logger.log_hyperparams({"lr": 1})
    logger.experiment.add_text("x", "y")
    logger.experiment[0].anything()
    logger.log_graph(torch.nn.Linear(1, 1), torch.ones(1, 1))
    logger.save()
    logger.finalize("success")
    assert os.listdir(tmp_path) == []


@both
def test_a_logger_travels_to_another_process_and_goes_on_after_finalize(kind: FileLogger, tmp_path: Path) -> None:
    logger = kind(tmp_path, version=0)
    logger.log_metrics({"a": 1}, 0)
    logger.finalize("success")
    assert pickle.loads(pickle.dumps(logger)).log_dir == logger.log_dir
    for first in Path(str(logger.log_dir)).glob("events.*"):  # files are read in the order of the times in their names
        first.rename(first.with_name("events.out.tfevents.1.host"))
    logger.log_metrics({"a": 2}, 1)
    logger.finalize("success")
    if isinstance(logger, CSVLogger):
        assert rows(logger) == [{"step": "0", "a": "1"}, {"step": "1", "a": "2"}]
    else:
        assert scalars(logger.log_dir) == {"a": [(0, 1.0), (1, 2.0)]}


@both
def test_remote_folders_work_like_local_ones(kind: FileLogger) -> None:
    fs, root = fsspec.filesystem("memory"), f"logs-of-{kind.__name__}"
    fs.makedirs(f"/{root}/lightning_logs/version_4")
    logger = kind(f"memory://{root}")
    assert logger.version == 5
    logger.log_hyperparams({"lr": 1})
    logger.log_metrics({"a": 1.5}, 0)
    logger.save()
    logger.log_metrics({"b": 2.5}, 1)
    logger.finalize("success")
    base = f"/{root}/lightning_logs/version_5"
    assert fs.cat(f"{base}/hparams.yaml") == b"lr: 1\n"
    if kind is CSVLogger:
        assert fs.cat(f"{base}/metrics.csv") == b"step,a,b\n0,1.5,\n1,,2.5\n"
        again = kind(f"memory://{root}", version=5)
        again.log_metrics({"a": 1}, 0)
        with pytest.warns(UserWarning, match=r"earlier run.*metrics_0\.csv"):
            again.finalize("success")
        assert fs.cat(f"{base}/metrics_0.csv") == b"step,a,b\n0,1.5,\n1,,2.5\n"
        assert fs.cat(f"{base}/metrics.csv") == b"step,a\n0,1\n"
    else:
        assert any("events.out" in name for name in fs.ls(base, detail=False))
    fs.rm(f"/{root}", recursive=True)


# --- hyper-parameters ---


@dataclass
class Settings:
    lr: float = 1e-5
    sizes: list[int] = field(default_factory=lambda: [1, 2])


FORMS: list[tuple[Any, str]] = [
    ({"lr": 0.1, "name": "x"}, 'lr: 0.1\nname: "x"\n'),
    (Namespace(lr=1, deep=Namespace(a=True)), 'lr: 1\ndeep: {"a": true}\n'),
    (Settings(), "lr: 1.0e-05\nsizes: [1, 2]\n"),
    (AttributeDict(a=None, b={"c": (1, "d")}), 'a: null\nb: {"c": [1, "d"]}\n'),
    ({"t": torch.tensor(2.5), "f": torch.float32, "p": Path("a/b")}, 't: 2.5\nf: "torch.float32"\np: "a/b"\n'),
    ({"inf": float("inf"), "nan": float("nan")}, "inf: .inf\nnan: .nan\n"),
    ({"on": 1, "a b": 2, 3: 4, "k:": "é\u2028"}, '"on": 1\n"a b": 2\n"3": 4\n"k:": "é\\u2028"\n'),
]


@both
@pytest.mark.parametrize(("params", "text"), FORMS)
def test_hyper_parameters_of_every_form_are_written_as_yaml(
    kind: FileLogger, tmp_path: Path, params: Any, text: str
) -> None:
    logger = kind(tmp_path)
    logger.log_hyperparams(params)
    logger.save()
    assert hparams_yaml(logger) == text


@both
def test_later_hyper_parameters_are_added(kind: FileLogger, tmp_path: Path) -> None:
    logger = kind(tmp_path)
    logger.log_hyperparams({"a": 1, "b": 1})
    logger.save()
    logger.log_hyperparams({"b": 2})
    logger.finalize("success")
    assert hparams_yaml(logger) == "a: 1\nb: 2\n"
    assert not list(Path(logger.log_dir).glob("*.tmp"))


@both
def test_what_has_no_names_is_refused(kind: FileLogger, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"this is a list.*Give a dictionary"):
        kind(tmp_path).log_hyperparams([1, 2])


def hparams_table(folder: str) -> tuple[list[dict[str, Any]], set[str]]:
    """What TensorBoard's table of runs shows: the hyper-parameters as they were logged, and the metrics."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    runs, metrics = [], set()
    for path in sorted(Path(folder).glob("events*")):
        found = EventAccumulator(str(path)).Reload().summary_metadata
        for metadata in found.values():
            if metadata.plugin_data.plugin_name == "hparams":
                data = HParamsPluginData.FromString(metadata.plugin_data.content)
                if data.HasField("session_start_info"):
                    values = data.session_start_info.hparams
                    runs.append({k: getattr(v, v.WhichOneof("kind")) for k, v in values.items()})
                metrics |= {info.name.tag for info in data.experiment.metric_infos}
    return runs, metrics


def test_tensorboard_lists_the_run_with_flat_names_and_one_default_metric(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    params = {"lr": 0.1, "model": {"sizes": [1, 2], "act": None, "deep": {"p": 3}}}
    for _ in range(2):  # fit, then test
        logger.log_hyperparams(params)
    logger.finalize("success")
    assert scalars(logger.log_dir) == {"hp_metric": [(0, -1.0)]}
    runs, metrics = hparams_table(logger.log_dir)
    assert runs == [{"lr": 0.1, "model/sizes": "[1, 2]", "model/act": "None", "model/deep/p": 3.0}]
    assert metrics == {"hp_metric"}


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [({"acc": 0.5}, {"acc": [(2, 0.5)]}), (0.25, {"hp_metric": [(2, 0.25)]}), ({}, {})],
)
def test_tensorboard_takes_metrics_with_the_hyper_parameters(tmp_path: Path, metrics: Any, expected: Any) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.log_hyperparams({"lr": 0.1}, metrics, step=2)
    logger.save()
    logger.finalize("success")
    assert expected == (scalars(logger.log_dir) if expected else {})
    if expected:
        assert hparams_table(logger.log_dir) == ([{"lr": 0.1}], set(expected))


def test_the_default_metric_can_be_turned_off(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    logger.log_hyperparams({"lr": 0.1})
    logger.finalize("success")
    assert os.listdir(logger.log_dir) == ["hparams.yaml"]


# --- metrics, TensorBoard ---


def test_tensorboard_draws_numbers_tensors_and_groups(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, prefix="run")
    metrics = {"a": 1, "b": torch.tensor([2.0]), "c": torch.tensor(3, requires_grad=False), "d": True}
    logger.log_metrics(metrics, 5)
    logger.log_metrics({"loss": {"train": torch.tensor(0.5), "val": 0.25}}, 6)
    logger.finalize("success")
    assert scalars(logger.log_dir) == {
        "run-a": [(5, 1.0)],
        "run-b": [(5, 2.0)],
        "run-c": [(5, 3.0)],
        "run-d": [(5, 1.0)],
    }
    assert scalars(Path(logger.log_dir, "run-loss_train")) == {"run-loss": [(6, 0.5)]}
    assert scalars(Path(logger.log_dir, "run-loss_val")) == {"run-loss": [(6, 0.25)]}


@pytest.mark.parametrize("value", ["text", None, [1]])
def test_tensorboard_refuses_what_is_no_number(tmp_path: Path, value: Any) -> None:
    logger = TensorBoardLogger(tmp_path)
    with pytest.raises(MisconfigurationException, match=rf"'acc' is {re.escape(repr(value))}.*draws numbers"):
        logger.log_metrics({"acc": value}, 0)
    logger.finalize("failed")


@both
def test_a_tensor_of_many_numbers_is_refused(kind: FileLogger, tmp_path: Path) -> None:
    logger = kind(tmp_path)
    with pytest.raises(MisconfigurationException, match=r"'acc' has shape \(2, 3\).*mean"):
        logger.log_metrics({"acc": torch.ones(2, 3)}, 0)
    logger.finalize("failed")


def test_the_summary_writer_is_the_users_too(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, filename_suffix=".mine")
    logger.experiment.add_text("note", "hello", 1)
    logger.experiment.add_scalar("own", 1.0, 2)
    logger.finalize("success")
    assert [name for name in os.listdir(logger.log_dir) if name.endswith(".mine")]
    assert "note/text_summary" in events(logger.log_dir).Tags()["tensors"]
    assert scalars(logger.log_dir) == {"own": [(2, 1.0)]}


def test_saved_means_readable_while_the_run_goes_on(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"a": 1}, 0)
    logger.save()
    assert scalars(logger.log_dir) == {"a": [(0, 1.0)]}
    logger.finalize("success")


def test_the_graph_is_drawn_and_the_model_stays_as_it_was(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 1))
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    logger = TensorBoardLogger(tmp_path)
    logger.log_graph(model, torch.rand(3, 2))
    logger.finalize("success")
    assert events(logger.log_dir).Tags()["graph"]
    assert [module.training for module in model] == [True, False]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_graph_without_an_input_is_drawn_only_if_asked_for(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 1)
    silent = TensorBoardLogger(tmp_path, name="silent")
    silent.log_graph(model)
    assert not os.path.exists(silent.log_dir)
    asked = TensorBoardLogger(tmp_path, name="asked", log_graph=True)
    with pytest.warns(UserWarning, match="example_input_array"):
        asked.log_graph(model)
    model.example_input_array = torch.ones(1, 2)
    asked.log_graph(model)
    asked.finalize("success")
    assert events(asked.log_dir).Tags()["graph"]


def test_a_model_that_cannot_be_traced_does_not_end_the_run(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    with pytest.warns(UserWarning, match="Could not log computational graph to TensorBoard: Linear"):
        logger.log_graph(torch.nn.Linear(2, 1), torch.ones(1, 5))
    logger.finalize("success")


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)


def test_without_tensorboard_the_constructor_says_how_to_get_it() -> None:
    done = run("""
        import sys
        sys.modules["tensorboard"] = sys.modules["tensorboardX"] = None  # as if not installed
        from treadle_fabric.loggers import CSVLogger, TensorBoardLogger
        CSVLogger("logs").log_metrics({"a": 1})
        TensorBoardLogger("logs")
    """)
    assert "MissingPackageError" in done.stderr.splitlines()[-1]
    assert "pip install treadle[trainer]" in done.stderr


def test_tensorboard_is_imported_by_the_first_value_and_not_before() -> None:
    done = run("""
        import sys
        from treadle_fabric.loggers import TensorBoardLogger
        logger = TensorBoardLogger("logs")
        print(logger.log_dir, "tensorboard" in sys.modules)
        logger.log_metrics({"a": 1})
        print("tensorboard" in sys.modules)
        logger.finalize("success")
    """)
    assert done.stdout.split() == [os.path.join("logs", "lightning_logs", "version_0"), "False", "True"], done.stderr


# --- metrics, CSV ---


def test_a_row_holds_what_was_logged_at_its_step(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, prefix="p")
    logger.log_metrics({"a": 0.1, "b": torch.tensor(2)}, 0)
    logger.log_metrics({"c": {"d": 1.5}}, 0)
    logger.log_metrics({"a": 0.2})
    logger.log_metrics({"a": 0.3}, 10)
    logger.log_metrics({"a": 0.4})
    logger.save()
    assert rows(logger) == [
        {"step": "0", "p-a": "0.1", "p-b": "2", "p-c/d": "1.5"},
        {"step": "1", "p-a": "0.2"},
        {"step": "10", "p-a": "0.3"},
        {"step": "11", "p-a": "0.4"},
    ]


def test_a_step_keeps_its_one_row_across_flushes(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    expected: dict[int, dict[str, str]] = {}
    order = [0, 0, 1, 2, 2, 1, 0, 3, 7, 3, 5]
    for i, step in enumerate(order):
        name = "xyz"[i % 3]
        logger.log_metrics({name: i}, step)
        expected.setdefault(step, {"step": str(step)})[name] = str(i)
        assert rows(logger) == list(expected.values())


def test_a_shorter_value_in_the_last_row_leaves_no_rest_behind(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    for value in ("a long text, with a comma\nand a line", "short"):
        logger.log_metrics({"a": value}, 0)
        logger.save()
        assert rows(logger) == [{"step": "0", "a": value}]


def test_columns_that_come_later_are_added_to_the_rows_before(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    for step in range(50):
        logger.log_metrics({"a": step, **({"b": -step} if step > 20 else {}), **({"c": 0} if step == 45 else {})}, step)
        if step % 10 == 9:
            logger.save()
    got = rows(logger)
    assert [row["a"] for row in got] == [str(step) for step in range(50)]
    assert [row["step"] for row in got if "b" in row] == [str(step) for step in range(21, 50)]
    assert [row["step"] for row in got if "c" in row] == ["45"]
    assert os.listdir(logger.log_dir) == ["metrics.csv"]


def test_rows_reach_the_disk_every_n_steps_and_at_the_end(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=10)
    path = Path(logger.log_dir, "metrics.csv")
    for step in range(9):
        logger.log_metrics({"a": step}, step)
    assert not path.exists()
    logger.log_metrics({"a": 9}, 9)
    assert len(rows(logger)) == 10
    logger.log_metrics({"a": 0}, 15)
    assert len(rows(logger)) == 10
    logger.log_metrics({"a": 0}, 50)  # a trainer logs every so many steps only
    assert len(rows(logger)) == 12
    logger.log_metrics({"a": 0}, 51)
    logger.finalize("failed")
    assert len(rows(logger)) == 13


def test_the_file_of_an_earlier_run_is_kept_under_another_name(tmp_path: Path) -> None:
    for run_number in range(3):
        logger = CSVLogger(tmp_path, version="mine")
        logger.log_metrics({"a": run_number}, 0)
        if run_number:
            with pytest.warns(UserWarning, match=rf"earlier run.*metrics_{run_number - 1}\.csv"):
                logger.save()
        else:
            logger.save()
        assert rows(logger) == [{"step": "0", "a": str(run_number)}]
    assert sorted(os.listdir(logger.log_dir)) == ["metrics.csv", "metrics_0.csv", "metrics_1.csv"]
    assert Path(logger.log_dir, "metrics_0.csv").read_text() == "step,a\n0,0\n"


def test_a_process_killed_between_flushes_leaves_whole_rows(tmp_path: Path) -> None:
    done = run(f"""
        import os, signal
        from treadle_fabric.loggers import CSVLogger
        logger = CSVLogger({str(tmp_path)!r}, flush_logs_every_n_steps=10)
        for step in range(35):
            logger.log_metrics({{"a": step, **({{"b": 1}} if step > 25 else {{}})}}, step)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert done.returncode == -9, done.stderr
    text = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert text.count("\n") == 31
    assert text.endswith("29,29,1\n")


@pytest.mark.parametrize("n", [0, -1])
def test_flushing_less_than_never_is_refused(tmp_path: Path, n: int) -> None:
    with pytest.raises(MisconfigurationException, match=f"flush_logs_every_n_steps={n}"):
        CSVLogger(tmp_path, flush_logs_every_n_steps=n)


@pytest.mark.gpu
@both
def test_values_on_the_gpu_come_over_exactly(kind: FileLogger, tmp_path: Path) -> None:
    logger = kind(tmp_path)
    metrics = {
        "a": torch.tensor(0.5).cuda(),
        "n": torch.tensor(2**24 + 2).cuda(),
        "b": 1.5,
        "h": torch.tensor(2.0).half().cuda(),
    }
    logger.log_metrics(metrics, 0)
    logger.finalize("success")
    if isinstance(logger, CSVLogger):
        assert rows(logger) == [{"step": "0", "a": "0.5", "n": "16777218.0", "b": "1.5", "h": "2.0"}]
    else:
        points = {tag: values[0][1] for tag, values in scalars(logger.log_dir).items()}
        assert points == {"a": 0.5, "n": 16777218.0, "b": 1.5, "h": 2.0}


# --- loggers of one's own, and none ---


class Memory(Logger):
    """The least that a logger has to have."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    @property
    @rank_zero_experiment
    def experiment(self) -> list[Any]:
        return self.seen

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.experiment.append((step, metrics))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.experiment.append(params)


def test_a_logger_of_ones_own_needs_four_members(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = Memory()
    logger.log_metrics({"a": 1}, 3)
    logger.log_graph(torch.nn.Linear(1, 1))
    logger.save()
    logger.after_save_checkpoint(None)
    logger.finalize("success")
    assert (logger.root_dir, logger.log_dir, logger.save_dir, logger.group_separator) == (None, None, None, "/")
    monkeypatch.setattr(rank_zero_only, "rank", 3)
    logger.log_hyperparams({"b": 1})
    assert logger.seen == [(3, {"a": 1})]


def test_save_dir_follows_the_root_dir_of_a_subclass() -> None:
    class Rooted(Memory):
        @property
        def root_dir(self) -> str:
            return "somewhere"

    assert Rooted().save_dir == "somewhere"


def test_the_dummy_has_everything_and_does_nothing() -> None:
    logger = pickle.loads(pickle.dumps(DummyLogger()))
    assert isinstance(logger, Logger)
    logger.log_metrics({"a": 1}, 0)
    logger.log_hyperparams({"a": 1}, 2, x=3)
    logger.experiment.add_figure("x", None)
    logger.experiment["run"]["x"] = 1
    logger.watch(torch.nn.Linear(1, 1))
    assert logger[0] is logger
    assert (logger.name, logger.version, logger.log_dir) == ("", "", None)
    assert os.listdir() == []


# --- the cost ---


@pytest.fixture
def per_call(tmp_path: Path) -> Iterator[Callable[[Logger], float]]:
    """Microseconds that logging five metrics takes, at best."""
    made: list[Logger] = []

    def measure(logger: Logger) -> float:
        made.append(logger)
        metrics = {f"m{i}": 1.5 for i in range(5)}
        best, step = float("inf"), 0
        for _ in range(20):
            start = time.perf_counter()
            for _ in range(50):
                logger.log_metrics(metrics, step)
                step += 1
            best = min(best, (time.perf_counter() - start) / 50)
        return best * 1e6

    yield measure
    for logger in made:
        logger.finalize("success")


@pytest.mark.alone
def test_logging_is_cheap(per_call: Callable[[Logger], float], tmp_path: Path) -> None:
    assert per_call(CSVLogger(tmp_path, name="csv", flush_logs_every_n_steps=10_000)) < 25
    assert per_call(TensorBoardLogger(tmp_path, name="tb")) < 150
