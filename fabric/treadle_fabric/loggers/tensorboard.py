"""The logger that writes metrics, hyper-parameters and graphs for TensorBoard."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from treadle_fabric.batches import move_data_to_device
from treadle_fabric.checks import require_package
from treadle_fabric.errors import MisconfigurationException, describe_error
from treadle_fabric.loggers.event_files import event_files, newest_scalars, rewind_events
from treadle_fabric.loggers.files import exists
from treadle_fabric.loggers.hyperparameters import flatten, keep_entries, to_dict, to_yaml
from treadle_fabric.loggers.logger import rank_zero_experiment
from treadle_fabric.loggers.media import Figure, Images, Media, Table, Text
from treadle_fabric.loggers.run_folder import FolderLogger, RunFolder
from treadle_fabric.loggers.scalars import add_prefix, to_numbers
from treadle_fabric.rank_zero import rank_zero_only, rank_zero_warn
from treadle_fabric.types import PathLike

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["TensorBoardLogger"]


class TensorBoardLogger(FolderLogger):
    """Writes event files and ``hparams.yaml`` into ``save_dir/name/version_n``.

    At the end of a run that has hyper-parameters, TensorBoard's table of runs (the tab HPARAMS) gets every metric that
    was logged, with its last value, and whether the run failed.

    Args:
        save_dir: The folder above all experiments, a local path or an fsspec URL.
        name: The experiment's name; with None or "" the runs lie in ``save_dir`` itself.
        version: A number n for ``version_n``, or the folder's name as a string. Default: the next free number.
        log_graph: Write the graph of a model that has an ``example_input_array``. Default: False.
        default_hp_metric: Log ``hp_metric = -1`` with the first hyper-parameters, so that TensorBoard lists them.
            Default: True.
        prefix: Put before the name of each metric, with a ``-`` between them. Default: none.
        sub_dir: A folder inside the run's folder to write to. Default: the run's folder itself.
        root_dir: Another name for ``save_dir``.
        **kwargs: For :class:`torch.utils.tensorboard.writer.SummaryWriter`, such as ``flush_secs``.

    Raises:
        MissingPackageError: Neither tensorboard nor tensorboardX is installed.
        MissingArgumentError: No folder is given.
        MisconfigurationException: Two folders are given.
    """

    NAME_HPARAMS_FILE: ClassVar[str] = "hparams.yaml"
    _experiment: SummaryWriter | None

    def __init__(
        self,
        save_dir: PathLike | None = None,
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        log_graph: bool = False,
        default_hp_metric: bool = True,
        prefix: str = "",
        sub_dir: PathLike | None = None,
        *,
        root_dir: PathLike | None = None,
        **kwargs: Any,
    ) -> None:
        if importlib.util.find_spec("tensorboardX") is None:
            require_package(
                "tensorboard", "TensorBoardLogger", "trainer", "tensorboardX will do, and so will CSVLogger."
            )
        super().__init__(RunFolder(save_dir, name, version, sub_dir, root_dir=root_dir))
        self._prefix = prefix
        self._default_hp_metric = default_hp_metric
        self._log_graph = log_graph
        self._kwargs = kwargs
        self._hparams: dict[str, Any] = {}
        self._hparams_changed = False
        self._hp_metric_logged = False
        self._graph_logged = False
        self._earlier = ""  # the hyper-parameters that the resumed run had, as YAML
        self._charts: set[str] = set()  # the folders of charts of several lines
        self._newest: dict[str, list[Any]] = {}  # of each metric the last step and value, which are not written twice
        self._table = _TableOfRuns()

    @property
    def sub_dir(self) -> str | None:
        """The folder inside the run's folder that is written to; None for the run's folder itself."""
        return self._folder.sub_dir

    @property
    def hparams(self) -> dict[str, Any]:
        """All hyper-parameters that were logged."""
        return self._hparams

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """The ``SummaryWriter``; made, with the folder, when it is first needed."""
        if self._experiment is None:
            self._settle()
            self._folder.local_path()
            options = dict(self._kwargs)
            if (state := self._resumed) is not None:
                step = rewind_events(self.log_dir, self._folder.id, state["files"])
                if step is not None:  # a TensorBoard that runs has read what is cut
                    options.setdefault("purge_step", step)
                self._resumed = None
            options["filename_suffix"] = f".{self._folder.id}{options.get('filename_suffix', '')}"
            self._experiment = _backend()[0](log_dir=self.log_dir, **options)
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Record metrics; the values of a nested mapping share a chart.

        Args:
            metrics: Numbers, tensors of one element, or mappings of these.
            step: The step that the values belong to.

        Raises:
            MisconfigurationException: A value is no number.
        """
        writer = self.experiment
        self._begun = True
        summary = _backend()[1]
        values = []
        for name, value in to_numbers(add_prefix(metrics, self._prefix, self.LOGGER_JOIN_CHAR)).items():
            if isinstance(value, Mapping):
                writer.add_scalars(name, dict(value), step)
                continue
            try:
                entry = summary.Value(tag=name, simple_value=float(value))
            except (TypeError, ValueError):
                raise MisconfigurationException(
                    f"The metric {name!r} is {value!r}, a {type(value).__qualname__}, and TensorBoard draws numbers. "
                    "Log a number, or use `logger.log_text` and its like."
                ) from None
            newest = [step, entry.simple_value]
            if self._newest.get(name) != newest:  # a resumed run may call a hook again
                self._newest[name] = newest
                values.append(entry)
            self._table.names[name] = None
        # One event for all values costs a fifth of one add_scalar for each value
        if values:
            writer._get_file_writer().add_summary(summary(value=values), step)

    @rank_zero_only
    def log_hyperparams(self, params: Any, metrics: Any | None = None, step: int | None = None) -> None:
        """Record the settings of the run, for ``hparams.yaml`` and for TensorBoard's table of runs.

        Args:
            params: A mapping, a ``Namespace`` or a dataclass. Nested names are joined with ``/`` in the table.
            metrics: What the table shows: metrics with their first values, or one value for ``hp_metric``.
            step: The step of those values.
        """
        params = to_dict(params)
        changed = {**self._hparams, **params}
        names, values = self._table_metrics(metrics)
        if values:
            self.log_metrics(values, step)
        known = changed == self._hparams or set(to_yaml(changed).splitlines()) <= set(self._earlier.splitlines())
        if names and (values or not known):
            self._write_table(changed, names, chosen=metrics is not None)
        self._hparams, self._hparams_changed = changed, True

    def _table_metrics(self, metrics: Any | None) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Return the metrics that the table shows, and those of them to log now."""
        if metrics is not None:
            metrics = metrics if isinstance(metrics, Mapping) else {"hp_metric": metrics}
            self._hp_metric_logged |= "hp_metric" in metrics
            return metrics, metrics
        if not self._default_hp_metric:
            return {}, {}
        default = {"hp_metric": -1.0}
        now = {} if self._hp_metric_logged else default
        self._hp_metric_logged = True
        return default, now

    def _write_table(self, params: Mapping[str, Any], metrics: Mapping[str, Any], chosen: bool) -> None:
        """Write a line of the table of runs, and its columns if the user chose them.

        The default columns are all that is logged: they follow at the end. TensorBoard takes the first that are there.
        """
        names = add_prefix(metrics, self._prefix, self.LOGGER_JOIN_CHAR)
        columns, line, _ = _backend()[2](flatten(params), dict.fromkeys(names, 0.0))
        events = self.experiment._get_file_writer()
        events.add_summary(line, None)
        if chosen:
            events.add_summary(columns, None)
        self._table.begun, self._table.columns_written = True, self._table.columns_written or chosen
        self._table.names |= dict.fromkeys(names)

    def _end_table(self, status: str) -> None:
        """Complete the table of runs: its columns, and how the run ended."""
        if not self._hparams or self._table.ended or not (names := self._table.columns()):
            return
        if not self._table.begun:  # there was no metric yet when the hyper-parameters came
            self._write_table(self._hparams, {}, chosen=False)
        columns, _, end = _backend()[2](flatten(self._hparams), dict.fromkeys(names, 0.0))
        events = self.experiment._get_file_writer()
        if not self._table.columns_written:
            events.add_summary(columns, None)
        events.add_summary(_failed(end) if status == "failed" else end, None)
        self._table.ended = self._table.columns_written = True

    @rank_zero_only
    def log_graph(self, model: torch.nn.Module, input_array: Any | None = None) -> None:
        """Record the graph of ``model``; a model that cannot be traced gets a warning instead.

        Args:
            model: The module.
            input_array: The input to call the model with. Default: its ``example_input_array`` if ``log_graph=True``,
                else no graph is recorded.
        """
        if input_array is None:
            if not self._log_graph or self._graph_logged:  # by the run that goes on
                return
            input_array = getattr(model, "example_input_array", None)
        if input_array is None:
            rank_zero_warn(
                "Could not log computational graph to TensorBoard: The `model.example_input_array` attribute is not"
                " set, and no `input_array` was given. Set `self.example_input_array` in the model."
            )
            return
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        inputs = move_data_to_device(input_array, device)
        modes = {module: module.training for module in model.modules()}
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about tracing, which the user did not ask for
                model.eval()  # tracing runs the model, and must not change batch statistics
                self.experiment.add_graph(model, inputs)
                self._graph_logged = True
        except Exception as e:
            rank_zero_warn(
                f"Could not log computational graph to TensorBoard: {type(model).__qualname__} cannot be traced:"
                f" {describe_error(e)}"
            )
        finally:
            for module, training in modes.items():
                module.training = training

    def begin_anew(self) -> None:
        self._renew()
        self._hparams, self._hparams_changed, self._hp_metric_logged = {}, False, False
        self._graph_logged, self._earlier, self._newest, self._charts = False, "", {}, set()
        self._table = _TableOfRuns()

    def state_dict(self) -> dict[str, Any]:
        if getattr(rank_zero_only, "rank", 0) != 0:
            return {}
        self.save()
        self._note_charts()
        run_id, files = self._folder.id, (self._resumed or {}).get("files")
        return {
            **self._folder.state_dict(),
            "files": event_files(self.log_dir, run_id, [self.log_dir, *self._charts]) if files is None else files,
            "hparams": keep_entries(self._earlier, to_yaml(self._hparams)),
            "hp_metric": self._hp_metric_logged,
            "graph": self._graph_logged,
            "newest": dict(self._newest),
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on in the folder of the run in ``state``, which :meth:`state_dict` returned when it was saved.

        With the next value, what the event files have that was logged after that moves to files beside them that
        TensorBoard does not read, and the new event file tells a TensorBoard that runs to forget the steps. If the user
        has named another version, or the run's files are not under this logger's folder, the logger begins a run of its
        own (:meth:`branch`).
        """
        if self._begun and self._experiment is not None:
            self.finalize("success")
        if not self._folder.go_on(state, lambda path: any(exists(path(name)) for name in state["files"])):
            self.branch(state)
            return
        self._resumed, self._begun, self._earlier = dict(state), False, state["hparams"]
        self._hp_metric_logged, self._graph_logged = state["hp_metric"], state["graph"]
        self._newest = dict(state["newest"])
        self._table = _TableOfRuns(dict.fromkeys(self._newest))
        self._charts = {self._folder.file(folder) for name in state["files"] if (folder := os.path.dirname(name))}
        if self._experiment is not None:  # in the folder of a run that does not begin
            self.finalize("success")

    @rank_zero_only
    def supersede_nothing(self) -> None:
        if self._resumed is not None:
            self._newest |= newest_scalars(self.log_dir, self._folder.id, self._resumed["files"], _event_class())
            self._resumed = None

    @rank_zero_only
    def save(self) -> None:
        if self._experiment is not None:
            self._experiment.flush()
        if self._hparams_changed:
            self._folder.write(self.NAME_HPARAMS_FILE, keep_entries(self._earlier, to_yaml(self._hparams)).encode())
            self._hparams_changed = False

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._end_table(status)
        self.save()
        if self._experiment is not None:
            self._note_charts()
            self._experiment.close()
            self._experiment = None  # later values open another event file in the same folder

    def _note_charts(self) -> None:
        writers = getattr(self._experiment, "all_writers", None) or {}
        self._charts.update(folder for folder in map(str, writers) if folder != self.log_dir)

    def record_media(self, media: Media) -> bool:
        if isinstance(media, Images):
            import numpy as np  # what TensorBoard's writer takes

            for i, image in enumerate(media.images):
                tag = f"{media.key}/{i}" if len(media.images) > 1 else media.key
                colors = image if image.mode in ("RGB", "RGBA") else image.convert("RGB")
                self.experiment.add_image(tag, np.asarray(colors), media.step, dataformats="HWC")
        elif isinstance(media, Figure) and media.extension == ".png":
            self.experiment.add_figure(media.key, media.figure, media.step, close=False)
        elif isinstance(media, Text):
            self.experiment.add_text(media.key, media.text, media.step)
        elif isinstance(media, Table):
            self.experiment.add_text(media.key, media.to_markdown(), media.step)
        else:
            return False
        return True


@dataclass
class _TableOfRuns:
    """What TensorBoard's table of runs, the tab HPARAMS, is to show of a run."""

    names: dict[str, None] = field(default_factory=dict)
    """All metrics: those that came with the hyper-parameters, and those that were logged."""
    begun: bool = False
    """Whether the hyper-parameters are in the file."""
    columns_written: bool = False
    ended: bool = False

    def columns(self) -> list[str]:
        """Return the names without the epoch, and without the values of steps where there are those of epochs."""
        return [
            name
            for name in self.names
            if name.rpartition("/")[2] != "epoch"
            and not (name.endswith("_step") and f"{name.removesuffix('_step')}_epoch" in self.names)
        ]


def _failed(end: Any) -> Any:
    """Make a summary of how a run ended one of a failure; tensorboardX has no messages for that."""
    if importlib.util.find_spec("tensorboard") is None:
        return end
    plugin = importlib.import_module("tensorboard.plugins.hparams.plugin_data_pb2")
    content = end.value[0].metadata.plugin_data
    data = plugin.HParamsPluginData.FromString(content.content)
    data.session_end_info.status = importlib.import_module("tensorboard.plugins.hparams.api_pb2").STATUS_FAILURE
    content.content = data.SerializeToString()
    return end


@functools.cache
def _backend() -> tuple[Any, Any, Any]:
    """Return the writer class, the class of its summaries, and the function that makes those of hyper-parameters."""
    if importlib.util.find_spec("tensorboard") is not None:
        package, messages = "torch.utils.tensorboard", "tensorboard.compat.proto"
    else:
        package, messages = "tensorboardX", "tensorboardX.proto"
    writer, summary = importlib.import_module(package), importlib.import_module(f"{package}.summary")
    return writer.SummaryWriter, importlib.import_module(f"{messages}.summary_pb2").Summary, summary.hparams


def _event_class() -> Any:
    """Return the class of the events in the files."""
    package = _backend()[1].__module__.removesuffix(".summary_pb2")
    return importlib.import_module(f"{package}.event_pb2").Event
