"""Loggers that go on in the run of a checkpoint: by hand, as a loop of one's own does it.

Tests of ``treadle_fabric.loggers.rewinding``, ``treadle_fabric.loggers.event_files``, ``treadle_fabric.loggers.csv``,
``treadle_fabric.loggers.tensorboard`` and ``treadle_fabric.loggers.run_folder``.
"""

from __future__ import annotations

import csv
import json
import pickle
import random
import warnings
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from treadle_fabric.checkpoint import read_quickly
from treadle_fabric.loggers import CSVLogger, TensorBoardLogger, rewinding, run_folder


def saved(logger: Any) -> Any:
    """The state of a logger, as it comes back from a file."""
    return json.loads(json.dumps(logger.state_dict()))


def read(logger: Any, name: str = "metrics.csv") -> str:
    with fsspec.open(f"{logger.log_dir}/{name}", "r", newline="") as file:
        return file.read()


def superseded(logger: CSVLogger) -> list[list[str]]:
    """The rows of the side file, without the time at which the file was written."""
    rows = csv.reader(read(logger, "metrics_superseded.csv").splitlines())
    return [[number, *rest] for number, _, _, *rest in rows]


@pytest.mark.parametrize("root", ["logs", "memory://rewound"])
def test_rows_columns_and_merged_values_after_the_state_are_taken_back(root: str) -> None:
    logger = CSVLogger(root, flush_logs_every_n_steps=2)
    for step in range(4):
        logger.log_metrics({"a": step}, step)
    state = saved(logger)
    whole = read(logger)
    for step in range(3, 6):
        logger.log_metrics({"a": -step, "b": 1}, step)
    logger.log_metrics({"c": 7}, 1)  # into a row that the checkpoint has
    logger.log_metrics({"c": 8}, 1)
    logger.finalize("failed")
    assert read(logger) == "step,a,b,c\n0,0,,\n1,1,,8\n2,2,,\n3,-3,1,\n4,-4,1,\n5,-5,1,\n"

    again = CSVLogger(root)
    again.resume(state)
    assert again.version == 0
    assert read(again) == read(logger)  # until a row is written
    assert saved(again) == state
    again.log_metrics({"d": 1}, 4)
    again.save()
    assert read(again) == whole.replace("a\n", "a,d\n").replace("\n", ",\n").replace("d,", "d") + "4,,1\n"
    assert superseded(again) == [
        ["resume", "step", "a", "b", "c"],
        ["1", "1", "", "", "8"], ["1", "3", "-3", "1", ""], ["1", "4", "-4", "1", ""], ["1", "5", "-5", "1", ""],
    ]  # fmt: skip

    more = CSVLogger(root)
    more.resume({**state, "global_step": 9, "checkpoint": "x.ckpt"})
    more.log_metrics({"d": 1}, 4)
    more.save()
    assert superseded(more)[5:] == [["2", "4", "", "", "", "1"]]
    assert read(more, "metrics_superseded.csv").splitlines()[-1].startswith("2,9,")
    if "://" in root:
        fsspec.filesystem("memory").rm("/rewound", recursive=True)


class Stopped(BaseException):
    """In the place of a kill."""


@pytest.mark.parametrize("at", ["side file", "metrics.csv", "journal"])
def test_a_kill_while_the_file_is_taken_back_leaves_it_whole(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def logged() -> tuple[CSVLogger, Any]:
        logger = CSVLogger("logs")
        for step in range(3):
            logger.log_metrics({"a": step}, step)
        state = saved(logger)
        logger.log_metrics({"a": 3}, 3)
        logger.log_metrics({"b": 1}, 0)
        logger.save()
        return logger, state

    def stop(*_: Any) -> None:
        raise Stopped

    whole, state = logged()
    before = read(whole)
    again = CSVLogger("logs")
    again.resume(state)
    again.log_metrics({"a": 3}, 3)
    with monkeypatch.context() as patch:
        if at == "side file":
            patch.setattr(run_folder.os, "replace", stop)
        elif at == "metrics.csv":
            write = rewinding._keep
            patch.setattr(rewinding, "_keep", lambda *args: (write(*args), stop()))
        else:
            patch.setattr("treadle_fabric.loggers.csv.cut_journal", stop)
        with pytest.raises(Stopped):
            again.save()
    assert read(whole) == ("step,a\n0,0\n1,1\n2,2\n" if at == "journal" else before)
    more = CSVLogger("logs")
    more.resume(state)
    more.log_metrics({"a": 3}, 3)
    more.log_metrics({"b": 2}, 0)
    more.save()
    assert read(more) == "step,a,b\n0,0,2\n1,1,\n2,2,\n3,3,\n"
    assert superseded(more) == [["resume", "step", "a", "b"], ["1", "0", "", "1"], ["1", "3", "3", ""]]
    assert len(read(more, rewinding.JOURNAL).splitlines()) == 1
    assert not list(Path(more.log_dir).glob("*.tmp"))


def test_random_rows_are_taken_back_to_any_checkpoint(tmp_path: Path) -> None:
    for seed in range(30):
        rng = random.Random(seed)
        root = tmp_path / str(seed)
        logger = CSVLogger(root, flush_logs_every_n_steps=rng.choice([1, 3, 100]))
        states: list[tuple[Any, str]] = []
        for _ in range(40):
            name, step = rng.choice("abcdé"), rng.randint(0, 12)
            logger.log_metrics({name: rng.choice([rng.random(), float("nan"), 'x,"\n', ""])}, step)
            if rng.random() < 0.2:
                logger.save()  # a resumed logger leaves the file as it is until then
                states.append((saved(logger), read(logger)))
            if rng.random() < 0.1 and states:
                states = states[: rng.randint(1, len(states))]
                logger = CSVLogger(root)
                logger.resume(states[-1][0])
        logger.save()
        for state, expected in reversed(states):
            again = CSVLogger(root)
            again.resume(state)
            again.log_metrics({"z": 1}, 99)
            again.save()
            content = [[*row, ""] for row in csv.reader(expected.splitlines(keepends=True))]
            content[0][-1] = "z"
            found = list(csv.reader(read(again).splitlines(keepends=True)))
            assert found == [*content, ["99", *[""] * (len(content[0]) - 2), "1"]], seed


def test_rows_that_were_lost_with_the_machine_are_no_error(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    for step in range(4):
        logger.log_metrics({"a": step}, step)
    state = saved(logger)
    Path(logger.log_dir, "metrics.csv").write_text("step,a\n0,0\n1,")
    again = CSVLogger(tmp_path)
    again.resume(state)
    again.log_metrics({"a": 4}, 4)
    again.save()
    assert read(again) == "step,a\n0,0\n1,\n3,3\n4,4\n"


def test_another_runs_file_is_set_aside(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 1}, 5)
    state = saved(logger)
    Path(logger.log_dir, "metrics.csv").write_text("step,other\n0,0\n")
    again = CSVLogger(tmp_path)
    again.resume(state)
    again.log_metrics({"a": 4}, 4)
    with pytest.warns(UserWarning, match=r"earlier run.*metrics_0\.csv"):
        again.save()
    assert read(again) == "step,a\n4,4\n"


def test_a_copy_of_a_resumed_logger_takes_nothing_back(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 0}, 0)
    state = saved(logger)
    again = CSVLogger(tmp_path)
    again.resume(state)
    sent = pickle.loads(pickle.dumps(again))  # to the process that trains
    sent.log_metrics({"a": 1}, 1)
    sent.save()
    assert read(again) == "step,a\n0,0\n1,1\n"
    copy = pickle.loads(pickle.dumps(sent))
    copy.log_metrics({"a": 2}, 2)
    with pytest.warns(UserWarning, match="earlier run"):
        copy.save()
    assert read(copy, "metrics_0.csv") == "step,a\n0,0\n1,1\n"


def test_the_journal_of_an_earlier_run_in_the_folder_is_not_believed(tmp_path: Path) -> None:
    for value in (1, 2):
        logger = CSVLogger(tmp_path, version="mine", flush_logs_every_n_steps=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the file of the first is set aside
            for step in range(3):
                logger.log_metrics({"a": value}, step)
        state = saved(logger)
        logger.log_metrics({"b": 1}, 0)
    again = CSVLogger(tmp_path, version="mine")
    again.resume(state)
    again.log_metrics({"a": 2}, 3)
    again.save()
    assert read(again) == "step,a\n0,2\n1,2\n2,2\n3,2\n"


@pytest.mark.parametrize("version", ["../elsewhere", "/elsewhere"])
def test_a_checkpoint_does_not_choose_a_folder_elsewhere(version: str, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 1}, 5)
    state = saved(logger)
    again = CSVLogger(tmp_path)
    again.resume({**state, "version": version})
    assert again.version == 1


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_hyper_parameters_of_the_run_are_kept(kind: Any, tmp_path: Path) -> None:
    logger = kind(tmp_path)
    logger.log_hyperparams({"extra: x": [1, 2], "on": True})
    logger.log_hyperparams({"lr": 0.1})
    logger.log_metrics({"a": 1}, 0)
    state = saved(logger)
    logger.finalize("failed")
    again = kind(tmp_path)
    again.resume(state)
    again.log_hyperparams({"lr": 0.2})
    again.log_metrics({"a": 1}, 1)
    again.finalize("success")
    assert read(again, "hparams.yaml") == 'lr: 0.2\n"extra: x": [1, 2]\n"on": true\n'


# --- TensorBoard ---


def scalars(events: EventAccumulator) -> dict[str, list[tuple[int, float]]]:
    # files whose names have the same second may come in another order than they were written
    return {tag: sorted((e.step, e.value) for e in events.Scalars(tag)) for tag in events.Reload().Tags()["scalars"]}


def test_a_tensorboard_that_runs_sees_each_step_once_and_so_does_one_that_starts(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    for step in range(4):
        logger.log_metrics({"a": step, "chart": {"x": step, "y": -step}}, step)
    logger.experiment.add_scalar("by samples", 1.0, 1000)
    state = saved(logger)
    running = EventAccumulator(logger.log_dir)
    scalars(running)
    again = TensorBoardLogger(tmp_path)
    again.resume(state)
    for step in range(1001, 1003):
        logger.log_metrics({"a": step, "chart": {"x": step}}, step)
    logger.save()
    assert len(scalars(running)["a"]) == 6
    written = next(Path(logger.log_dir).glob("*tfevents*"))
    cut = written.stat().st_size - state["files"][written.name]
    again.log_metrics({"a": -1, "chart": {"x": -1}}, 1001)
    again.finalize("success")
    expected = {"a": [*((step, float(step)) for step in range(4)), (1001, -1.0)], "by samples": [(1000, 1.0)]}
    assert scalars(running) == expected
    assert scalars(EventAccumulator(logger.log_dir)) == expected
    assert scalars(EventAccumulator(logger.log_dir, purge_orphaned_data=False)) == expected
    chart = scalars(EventAccumulator(str(Path(logger.log_dir, "chart_x"))))["chart"]
    assert chart == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (1001, -1.0)]
    beside = [path for path in Path(logger.log_dir).rglob("*superseded*") if path.parent.name != "chart_x"]
    assert [path.stat().st_size for path in beside] == [cut]
    logger.finalize("failed")


def test_graph_hyper_parameters_and_default_metric_are_not_recorded_twice(tmp_path: Path) -> None:
    class Drawn(torch.nn.Linear):
        example_input_array = torch.ones(1, 2)

    def begin(logger: TensorBoardLogger) -> None:
        logger.log_hyperparams({"lr": 0.1, "n": 3})
        logger.log_graph(Drawn(2, 1))
        logger.save()

    logger = TensorBoardLogger(tmp_path, log_graph=True)
    begin(logger)
    logger.log_metrics({"a": 1}, 0)
    state = saved(logger)
    again = TensorBoardLogger(tmp_path, log_graph=True)
    again.resume(state)
    begin(again)
    assert len(list(Path(again.log_dir).glob("*tfevents*"))) == 1
    again.log_metrics({"a": 1, "b": 1}, 1)
    again.finalize("success")
    logger.finalize("failed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of more than one graph
        found = scalars(EventAccumulator(again.log_dir))
    assert found == {"hp_metric": [(0, -1.0)], "a": [(0, 1.0), (1, 1.0)], "b": [(1, 1.0)]}


def test_a_tensorboard_folder_that_is_remote(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    try:
        logger = TensorBoardLogger("memory://board")
        logger.log_metrics({"a": 1}, 0)
        logger.save()
        files = fs.glob("/board/lightning_logs/version_0/*")
        if not files:
            pytest.skip("this TensorBoard writes local files only")
        state = saved(logger)
        logger.log_metrics({"a": 2}, 1)
        logger.finalize("failed")
        again = TensorBoardLogger("memory://board")
        again.resume(state)
        again.log_metrics({"a": 3}, 1)
        again.finalize("success")
        fs.get("/board/lightning_logs/version_0/", str(tmp_path / "copy"), recursive=True)
        assert scalars(EventAccumulator(str(tmp_path / "copy"))) == {"a": [(0, 1.0), (1, 3.0)]}
    finally:
        if fs.exists("/board"):
            fs.rm("/board", recursive=True)


# --- the checkpoint ---


def test_a_look_into_a_large_file_reads_a_small_part_of_it(tmp_path: Path) -> None:
    torch.save({"treadle": {"loggers": {"a": 1}}, "state_dict": torch.zeros(2**23)}, tmp_path / "large.ckpt")

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = bytes_read()
    assert read_quickly(tmp_path / "large.ckpt")["treadle"] == {"loggers": {"a": 1}}
    assert bytes_read() - before < 2**20
    (tmp_path / "torn.ckpt").write_bytes((tmp_path / "large.ckpt").read_bytes()[:1000])
    assert read_quickly(tmp_path / "torn.ckpt") == read_quickly(tmp_path / "none.ckpt") == {}
