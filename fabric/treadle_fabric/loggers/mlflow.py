"""The logger that writes to MLflow: a server, or a store on the local disk."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from typing import Any, Literal

from treadle_fabric.checks import require_package
from treadle_fabric.loggers.hyperparameters import flatten, to_dict
from treadle_fabric.loggers.media import Figure, File, Images, Media, Table, Text
from treadle_fabric.loggers.media_files import file_name
from treadle_fabric.loggers.saved_checkpoints import SavedCheckpoint
from treadle_fabric.loggers.scalars import add_prefix, flat, to_numbers
from treadle_fabric.loggers.service import ServiceLogger
from treadle_fabric.rank_zero import rank_zero_only, rank_zero_warn

__all__ = ["MLFlowLogger"]

_STATUS = {"success": "FINISHED", "finished": "FINISHED", "failed": "FAILED"}
_REFUSED = re.compile(r"[^\w\-. /:]")  # what the name of a metric must not have
_LONGEST_PARAMETER = 6000
_BATCH = 100  # parameters that MLflow takes at once, and calls that may be unfinished


class MLFlowLogger(ServiceLogger):
    """Writes metrics, settings, media and checkpoints to MLflow.

    Args:
        experiment_name: The experiment; it is made if it is not there.
        run_name: The name of the run. Default: MLflow chooses one.
        tracking_uri: The server or the store. Default: the environment variable ``MLFLOW_TRACKING_URI``, or else the
            files in ``save_dir``. Where MLflow refuses to write such files (from version 3 on, without
            ``MLFLOW_ALLOW_FILE_STORE=true``), the database ``mlflow.db`` in that folder.
        tags: Tags of the run.
        save_dir: The folder of the local store. Default: ``./mlruns``.
        log_model: Send checkpoints as artifacts: True at the end of the run (at once if the callback keeps all), "all"
            each one when it was saved. Default: False.
        prefix: Put before the name of each metric, with a ``-`` between them. Default: none.
        artifact_location: Where the artifacts of a new experiment go. Default: MLflow's own place.
        run_id: The id of a run, to go on in it.
        synchronous: Whether a call waits for the server. Default: as MLflow is set up.

    Raises:
        MissingPackageError: mlflow is not installed.
        MisconfigurationException: ``log_model`` has no such value.
    """

    LOGGER_JOIN_CHAR = "-"

    def __init__(
        self,
        experiment_name: str = "lightning_logs",
        run_name: str | None = None,
        tracking_uri: str | None = None,
        tags: dict[str, Any] | None = None,
        save_dir: str | None = "./mlruns",
        log_model: Literal[True, False, "all"] = False,
        prefix: str = "",
        artifact_location: str | None = None,
        run_id: str | None = None,
        synchronous: bool | None = None,
    ) -> None:
        require_package("mlflow", "MLFlowLogger", "mlflow")
        super().__init__(prefix, log_model, run_id)
        self._experiment_name = experiment_name
        self._experiment_id: str | None = None
        self._run_name = run_name
        self._uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        self._tags = dict(tags or {})
        self._folder = save_dir or "./mlruns"
        self._artifact_location = artifact_location
        self._synchronous = synchronous
        self._begun = run_id is not None
        self._parameters: dict[str, str] = {}  # those that the run has
        self._running = False

    @property
    def name(self) -> str | None:
        """The id of the experiment."""
        return self.experiment_id

    @property
    def version(self) -> str | None:
        """The id of the run."""
        return self.run_id

    @property
    def experiment_id(self) -> str | None:
        """The id of the experiment, which is made when it is first needed; no run is begun for it."""
        if self._experiment_id is None and getattr(rank_zero_only, "rank", 0) == 0:
            self._experiment_id = self._find_experiment(self._client())
        return self._experiment_id

    @property
    def run_id(self) -> str | None:
        """The id of the run, which is begun when it is first needed."""
        if self._run is None:
            _ = self.experiment
        return self._run

    @property
    def root_dir(self) -> str | None:
        """The folder of a local store; None for a server."""
        if self._uri is None:
            return self._folder
        return self._uri.removeprefix("file:") if self._uri.startswith("file:") else None

    def _open(self) -> Any:
        client = self._client()
        if self._begun:
            run = client.get_run(self._run)
            self._experiment_id, self._parameters = run.info.experiment_id, dict(run.data.params)
            self._running = run.info.status == "RUNNING"
            return client
        from mlflow.tracking.context.registry import resolve_tags  # an extra

        if self._experiment_id is None:
            self._experiment_id = self._find_experiment(client)
        run = client.create_run(self._experiment_id, tags=resolve_tags(self._tags), run_name=self._run_name)
        self._run, self._parameters, self._running = run.info.run_id, {}, True
        return client

    def _running_client(self) -> Any:
        """Return the client; a run that had ended is marked as running again."""
        client = self.experiment
        if not self._running:
            client.update_run(self._run, status="RUNNING")
            self._running = True
        return client

    def _find_experiment(self, client: Any) -> str:
        if self._begun:
            return str(client.get_run(self._run).info.experiment_id)
        found = client.get_experiment_by_name(self._experiment_name)
        if found is not None:
            return str(found.experiment_id)
        location = self._artifact_location or self._default_artifacts(client)
        return str(client.create_experiment(self._experiment_name, artifact_location=location))

    def _client(self) -> Any:
        from mlflow.exceptions import MlflowException  # an extra, a second
        from mlflow.tracking import MlflowClient

        if self._uri is not None:
            return MlflowClient(self._uri)
        folder = pathlib.Path(self._folder.removeprefix("file:")).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return MlflowClient(folder.as_uri())
        except MlflowException:
            if any(folder.glob("*/meta.yaml")):  # runs of before: MLflow's error says how to move them
                raise
        return MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")

    def _default_artifacts(self, client: Any) -> str | None:
        """Keep the artifacts of a local database beside it; MLflow would take the current folder."""
        if self._uri is not None or not client.tracking_uri.startswith("sqlite:"):
            return None
        folder = pathlib.Path(self._folder.removeprefix("file:")).absolute()
        return (folder / "artifacts" / re.sub(r"[^\w.-]", "_", self._experiment_name)).as_uri()

    def _close(self, status: str) -> None:
        if self._experiment is not None and self._running:
            self._wait()
            self._experiment.set_terminated(self._run, _STATUS.get(status, "FINISHED"))
            self._running = False

    def _name_parent(self, parent: str) -> None:
        self.experiment.set_tag(self._run, "mlflow.parentRunId", parent)

    def _send_batch(self, **values: Any) -> None:
        options = {} if self._synchronous is None else {"synchronous": self._synchronous}
        sent = self.experiment.log_batch(self._run, **values, **options)
        if sent is not None:
            self._unfinished.append(sent)
            if len(self._unfinished) >= _BATCH:
                self._wait()

    def _wait(self) -> None:
        """Wait until everything is stored; only without ``synchronous`` there is something to wait for."""
        for sent in self._unfinished:
            sent.wait()
        self._unfinished = []

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self._running_client()
        from mlflow.entities import Metric  # an extra

        now, values = int(time.time() * 1000), []
        for name, value in flat(to_numbers(add_prefix(metrics, self._prefix, self.LOGGER_JOIN_CHAR))).items():
            if not isinstance(value, int | float):
                rank_zero_warn(f"MLflow takes numbers, so that the metric {name!r} = {value!r} is left out.")
                continue
            if _REFUSED.search(name):
                allowed = _REFUSED.sub("_", name)
                rank_zero_warn(
                    f"MLflow takes letters, digits, spaces and -_./: in names, so that the metric {name!r} is called "
                    f"{allowed!r} there."
                )
                name = allowed
            values.append(Metric(key=name, value=float(value), timestamp=now, step=step or 0))
        self._send_batch(metrics=values)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Record the settings of the run; MLflow keeps the first value of each, and a warning names another one."""
        self._running_client()
        from mlflow.entities import Param  # an extra

        given = {_REFUSED.sub("_", k): str(v)[:_LONGEST_PARAMETER] for k, v in flatten(to_dict(params)).items()}
        other = [name for name, value in given.items() if self._parameters.get(name, value) != value]
        if other:
            rank_zero_warn(
                f"MLflow keeps the first value of a parameter, so that {other} have the values of before, and not "
                "those that were logged now."
            )
        new = [Param(name, value) for name, value in given.items() if name not in self._parameters]
        for start in range(0, len(new), _BATCH):
            self._send_batch(params=new[start : start + _BATCH])
        self._parameters = given | self._parameters

    def record_media(self, media: Media) -> bool:
        client = self._running_client()
        if isinstance(media, Images):
            for i, image in enumerate(media.images):
                number = f"_{i}" if len(media.images) > 1 else ""
                if media.step is None:
                    client.log_image(self._run, image, artifact_file=f"media/{file_name(media, '.png', number)}")
                else:  # MLflow draws these over the steps
                    key = file_name(Media(media.key, None), "", number)
                    client.log_image(self._run, image, key=key, step=media.step, synchronous=True)
        elif isinstance(media, Figure):
            client.log_figure(self._run, media.figure, f"media/{file_name(media, media.extension)}")
        elif isinstance(media, Text):
            client.log_text(self._run, media.text, f"media/{file_name(media, '.txt')}")
        elif isinstance(media, Table):
            rows = media.plain_rows()
            data = {name: [row[i] for row in rows] for i, name in enumerate(media.columns)}
            client.log_table(self._run, data, f"media/{file_name(media, '.json')}")
        elif isinstance(media, File):
            with _renamed(media.path, file_name(media)) as (path, folder):
                client.log_artifact(self._run, path, "/".join(part for part in ("media", folder) if part))
        return True

    @rank_zero_only
    def save(self) -> None:
        if self._experiment is not None:
            self._wait()

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Send the checkpoints that wait, and end the run as FINISHED or FAILED; what comes later opens it again."""
        self._send_remaining(status)
        self._close(status)

    def _send(self, checkpoint: SavedCheckpoint) -> None:
        client = self._running_client()
        target = f"model/checkpoints/{checkpoint.stem}"
        with checkpoint.local() as path:
            send = client.log_artifacts if os.path.isdir(path) else client.log_artifact
            send(self._run, path, target)
        # JSON is YAML too
        client.log_text(self._run, json.dumps(checkpoint.metadata, indent=2, default=str), f"{target}/metadata.yaml")
        client.log_text(self._run, str(checkpoint.aliases), f"{target}/aliases.txt")


@contextlib.contextmanager
def _renamed(path: str, name: str) -> Any:
    """Give a copy of a file under another name, and the folder that it is to be put into."""
    folder, _, last = name.rpartition("/")
    if last == os.path.basename(path):
        yield path, folder
        return
    place = tempfile.mkdtemp(prefix="treadle-file-")
    try:
        yield shutil.copyfile(path, os.path.join(place, last)), folder
    finally:
        shutil.rmtree(place, ignore_errors=True)
