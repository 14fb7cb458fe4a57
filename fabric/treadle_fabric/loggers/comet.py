"""The logger that writes to Comet, online or into an archive that is sent later."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from torch.nn import Module

from treadle_fabric.checks import require_package
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.loggers.hyperparameters import flatten, to_dict
from treadle_fabric.loggers.media import Figure, File, Images, Media, Table, Text
from treadle_fabric.loggers.media_files import file_name
from treadle_fabric.loggers.saved_checkpoints import SavedCheckpoint
from treadle_fabric.loggers.scalars import add_prefix, flat, to_numbers
from treadle_fabric.loggers.service import ServiceLogger
from treadle_fabric.rank_zero import rank_zero_only

__all__ = ["CometLogger"]

_MODES = (None, "get_or_create", "get", "create")
_OPENED: list[Any] = []  # the experiments that loggers have begun, not the program, and not ended


class CometLogger(ServiceLogger):
    """Writes metrics, settings, media and checkpoints to Comet.

    Offline, Comet writes an archive when the experiment ends: at the end of the program, or of a run that failed.

    Args:
        api_key: The key of the account. Default: Comet's configuration.
        workspace: The workspace. Default: that of the account.
        project: The project. Default: Comet's configuration.
        experiment_key: The key of an experiment, to go on in it (see ``mode``).
        mode: "create" a new experiment, "get" the one that is there, or "get_or_create". Default: "get_or_create".
        online: False writes an archive only. Default: Comet's configuration.
        prefix: Put before the name of each metric, with a ``/`` between them. Default: none.
        log_model: Send checkpoints as models: True at the end of the run (at once if the callback keeps all), "all"
            each one when it was saved. Default: False.
        checkpoint_name: The name of the model. Default: ``model-`` and the key of the experiment.
        **kwargs: For ``comet_ml.ExperimentConfig``, such as ``name``, ``tags`` and ``offline_directory``.

    Raises:
        MissingPackageError: comet_ml is not installed.
        MisconfigurationException: ``mode`` or ``log_model`` has no such value.
    """

    def __init__(
        self,
        *,
        api_key: str | None = None,
        workspace: str | None = None,
        project: str | None = None,
        experiment_key: str | None = None,
        mode: Literal["get_or_create", "get", "create"] | None = None,
        online: bool | None = None,
        prefix: str | None = None,
        log_model: bool | Literal["all"] = False,
        checkpoint_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        require_package("comet_ml", "CometLogger", "comet")
        if mode not in _MODES:
            raise MisconfigurationException(f"mode={mode!r} must be 'get_or_create', 'get', 'create' or None.")
        super().__init__(prefix, log_model, experiment_key)
        self._account: dict[str, Any] = {
            "api_key": api_key,
            "workspace": workspace,
            "project": project,
            "online": online,
        }
        self._mode = mode
        self._config = kwargs
        self._checkpoint_name = checkpoint_name

    @property
    def name(self) -> str:
        """The name of the project."""
        return str(self._account["project"] or "general")

    @property
    def version(self) -> str | None:
        """The key of the experiment, which is begun when it is first needed."""
        if self._run is None:
            _ = self.experiment
        return self._run

    @property
    def root_dir(self) -> str | None:
        """The folder for archives; None if it is Comet's own."""
        folder = self._config.get("offline_directory")
        return None if folder is None else os.fspath(folder)

    def _open(self) -> Any:
        import comet_ml  # an extra, a second

        if self.root_dir is not None:
            os.makedirs(self.root_dir, exist_ok=True)
        mode: str | None = "get" if self._begun else self._mode
        if mode is None and self._run is None and comet_ml.get_running_experiment() in _OPENED:
            mode = "create"  # Comet would give the experiment of another logger
        experiment = comet_ml.start(
            **self._account,
            experiment_key=self._run,
            mode=mode,
            experiment_config=comet_ml.ExperimentConfig(**self._config),
        )
        _OPENED.append(experiment)
        self._run = experiment.get_key()
        experiment.log_other("Created from", "treadle")
        return experiment

    def _close(self, status: str) -> None:
        if self._experiment is not None:
            self._experiment.end()
            _OPENED[:] = [opened for opened in _OPENED if opened is not self._experiment]
            self._experiment = None

    def _name_parent(self, parent: str) -> None:
        self.experiment.log_other("parent_run", parent)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        values = to_numbers(metrics)
        epoch = values.pop("epoch", None)
        named = flat(add_prefix(values, self._prefix, self.LOGGER_JOIN_CHAR))
        self.experiment.log_metrics(named, step=step, epoch=None if epoch is None else int(epoch))

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.experiment.log_parameters(flatten(to_dict(params)))

    @rank_zero_only
    def log_graph(self, model: Module, input_array: Any | None = None) -> None:
        """Record the modules of ``model``."""
        self.experiment.set_model_graph(str(model), overwrite=True)

    def record_media(self, media: Media) -> bool:
        experiment = self.experiment
        if isinstance(media, Images):
            for i, image in enumerate(media.images):
                number = f"_{i}" if len(media.images) > 1 else ""
                experiment.log_image(
                    image, name=f"{media.key}{number}", step=media.step, metadata=dict(media.options[i])
                )
        elif isinstance(media, Figure):
            experiment.log_figure(media.key, media.figure, step=media.step)
        elif isinstance(media, Text):
            experiment.log_text(media.text, step=media.step, metadata={"name": media.key})
        elif isinstance(media, Table):
            rows = media.plain_rows()
            experiment.log_table(file_name(media, ".csv"), tabular_data=rows, headers=list(media.columns))
        elif isinstance(media, File):
            experiment.log_asset(media.path, file_name=file_name(media), step=media.step)
        return True

    @rank_zero_only
    def save(self) -> None:
        """Wait until everything is sent; offline, until it is in the files that become the archive."""
        if self._experiment is not None:
            self._experiment.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Send what waits; the experiment of a run that failed is ended, another one stays open for more."""
        self._send_remaining(status)
        if self._experiment is None:
            return
        self._experiment.log_other("Status", status)
        if status == "failed":
            self._close(status)
        else:
            self._experiment.flush()

    def _send(self, checkpoint: SavedCheckpoint) -> None:
        name = self._checkpoint_name or f"model-{self.experiment.get_key()}"
        with checkpoint.local() as path:
            self.experiment.log_model(name, path, metadata={**checkpoint.metadata, "aliases": checkpoint.aliases})
            if path != checkpoint.path:  # a copy that is about to go
                self.experiment.flush()
