"""The logger that writes to Trackio, on the local disk or in a Space of Hugging Face."""

from __future__ import annotations

import contextvars
import os
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from treadle_fabric.checks import require_package
from treadle_fabric.loggers.hyperparameters import plain, to_dict
from treadle_fabric.loggers.media import Figure, File, Images, Media, Table, Text
from treadle_fabric.loggers.saved_checkpoints import SavedCheckpoint
from treadle_fabric.loggers.scalars import add_prefix, flat, to_numbers
from treadle_fabric.loggers.service import ServiceLogger
from treadle_fabric.rank_zero import rank_zero_only

__all__ = ["TrackioLogger"]


class TrackioLogger(ServiceLogger):
    """Writes metrics, settings, media and checkpoints to Trackio, in the folder ``TRACKIO_DIR``.

    Several loggers have a run each, so that the run is that of ``logger.experiment``, and not of ``trackio.log``.

    Args:
        project: The project. Default: "lightning_logs".
        name: The name of the run. Default: Trackio chooses one.
        prefix: Put before the name of each metric, with a ``/`` between them. Default: none.
        log_model: Keep checkpoints as artifacts: True at the end of the run (at once if the callback keeps all), "all"
            each one when it was saved. Default: False.
        checkpoint_name: The name of the artifact. Default: ``model-`` and the name of the run.
        **kwargs: For ``trackio.init``, such as ``group``, ``config``, ``space_id`` and ``auto_log_cpu``; ``resume``
            ("never" by default) says whether a ``name`` that is there already goes on.

    Raises:
        MissingPackageError: trackio is not installed.
        MisconfigurationException: ``log_model`` has no such value.
    """

    own_media: ClassVar[tuple[str, ...]] = ("trackio",)

    def __init__(
        self,
        project: str = "lightning_logs",
        name: str | None = None,
        *,
        prefix: str = "",
        log_model: bool | Literal["all"] = False,
        checkpoint_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        require_package("trackio", "TrackioLogger", "trackio")
        super().__init__(prefix, log_model, name)
        self._project = project
        self._checkpoint_name = checkpoint_name
        self._init = kwargs
        self._settings: dict[str, Any] = dict(kwargs.get("config") or {})

    @property
    def name(self) -> str:
        """The name of the project."""
        return self._project

    @property
    def version(self) -> str:
        """The name of the run, which is begun when it is first needed."""
        if self._run is None:
            _ = self.experiment
        return self._run or ""

    def _open(self) -> Any:
        import trackio  # an extra

        if self._parent is not None:
            self._settings["parent_run"] = self._parent
        given: dict[str, Any] = {"resume": "never", "embed": False} | self._init | {"config": self._settings}
        if self._begun:
            given["resume"] = "allow"
        # In a context of its own: trackio.init ends the run of the context that it is called in
        run = contextvars.Context().run(trackio.init, project=self._project, name=self._run, **given)
        self._run = run.name
        return run

    def _close(self, status: str) -> None:
        if self._experiment is not None:
            self._experiment.finish()
            self._experiment = None

    def _name_parent(self, parent: str) -> None:
        self._configure({"parent_run": parent})

    def _configure(self, settings: Mapping[str, Any]) -> None:
        """Add settings; Trackio takes them with the first values after the run was opened."""
        changed = {**self._settings, **settings}
        if changed != self._settings:
            self._settings = changed
            self._close("finished")

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.experiment.log(flat(to_numbers(add_prefix(metrics, self._prefix, self.LOGGER_JOIN_CHAR))), step=step)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        # a name that begins with _ is Trackio's own
        self._configure({key.lstrip("_") or key: value for key, value in plain(to_dict(params)).items()})

    def record_media(self, media: Media) -> bool:
        import trackio  # an extra

        if isinstance(media, Images):
            values: dict[str, Any] = {}
            for i, image in enumerate(media.images):
                number = f"_{i}" if len(media.images) > 1 else ""
                caption = media.options[i].get("caption")
                values[f"{media.key}{number}"] = image if _own(image) else trackio.Image(image, caption=caption)
            self.experiment.log(values, step=media.step)
        elif isinstance(media, Figure) and media.extension == ".png":
            self.experiment.log({media.key: trackio.Image(media.to_image())}, step=media.step)
        elif isinstance(media, Figure):
            self.experiment.log({media.key: media.figure}, step=media.step)
        elif isinstance(media, Text):
            self.experiment.log({media.key: trackio.Markdown(media.text)}, step=media.step)
        elif isinstance(media, Table):
            table = trackio.Table(columns=list(media.columns), data=media.plain_rows())
            self.experiment.log({media.key: table}, step=media.step)
        elif isinstance(media, File):
            self.experiment.log_artifact(media.path, name=_artifact_name(media.key), type="file")
        return True

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Keep the checkpoints that wait, and write what is still in memory; what comes later opens the run again."""
        self._send_remaining(status)
        self._close(status)

    def _send(self, checkpoint: SavedCheckpoint) -> None:
        import trackio  # an extra

        name = self._checkpoint_name or f"model-{self.version}"
        artifact = trackio.Artifact(name=_artifact_name(name), type="model", metadata=checkpoint.metadata)
        with checkpoint.local() as path:
            if os.path.isdir(path):
                artifact.add_dir(path, name=checkpoint.name)
            else:
                artifact.add_file(path, name=checkpoint.name)
            aliases = [alias for alias in checkpoint.aliases if alias != "latest"]  # Trackio's own
            self.experiment.log_artifact(artifact, aliases=aliases)


def _own(image: Any) -> bool:
    return type(image).__module__.partition(".")[0] == "trackio"


def _artifact_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
