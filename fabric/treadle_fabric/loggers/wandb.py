"""The logger that writes to Weights & Biases, online or offline."""

from __future__ import annotations

import os
import random
import shutil
import string
import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch.nn import Module

from treadle_fabric.checks import require_package
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.loggers.hyperparameters import plain, to_dict
from treadle_fabric.loggers.media import Figure, File, Images, Media, Table, Text, to_options
from treadle_fabric.loggers.media_files import file_name
from treadle_fabric.loggers.saved_checkpoints import SavedCheckpoint
from treadle_fabric.loggers.scalars import add_prefix, to_numbers
from treadle_fabric.loggers.service import ServiceLogger
from treadle_fabric.rank_zero import rank_zero_info, rank_zero_only
from treadle_fabric.types import PathLike

__all__ = ["WandbLogger"]

_STEP = "trainer/global_step"
_OPENED: weakref.WeakSet[Any] = weakref.WeakSet()  # the runs that loggers began, not the user


class WandbLogger(ServiceLogger):
    """Writes metrics, settings, media and checkpoints to Weights & Biases.

    A run that the program has begun itself with ``wandb.init`` is used. Several loggers have a run each.

    Args:
        name: The name of the run. Default: W&B chooses one.
        save_dir: The folder for W&B's files. Default: the current folder.
        version: The id of the run, to go on in it.
        offline: Write files only; ``wandb sync`` sends them later. Default: False.
        dir: Another name for ``save_dir``.
        id: Another name for ``version``.
        anonymous: Passed on to ``wandb.init``.
        project: The project. Default: the environment variable ``WANDB_PROJECT``, or "lightning_logs".
        log_model: Send checkpoints as artifacts: True at the end of the run (at once if the callback keeps all), "all"
            each one when it was saved. Default: False.
        experiment: A run of the client to write to.
        prefix: Put before the name of each metric, with a ``-`` between them. Default: none.
        checkpoint_name: The name of the artifact. Default: ``model-`` and the id of the run.
        add_file_policy: Whether W&B copies a checkpoint to a cache before it is sent ("mutable"), or takes the file
            itself, which must not change then ("immutable").
        **kwargs: For ``wandb.init``, such as ``entity``, ``group``, ``tags``, ``config`` and ``settings``.

    Raises:
        MissingPackageError: wandb is not installed.
        MisconfigurationException: ``log_model`` or ``add_file_policy`` has no such value.
    """

    LOGGER_JOIN_CHAR = "-"
    own_media: ClassVar[tuple[str, ...]] = ("wandb",)

    def __init__(
        self,
        name: str | None = None,
        save_dir: PathLike = ".",
        version: str | None = None,
        offline: bool = False,
        dir: PathLike | None = None,
        id: str | None = None,
        anonymous: bool | None = None,
        project: str | None = None,
        log_model: Literal["all"] | bool = False,
        experiment: Any = None,
        prefix: str = "",
        checkpoint_name: str | None = None,
        add_file_policy: Literal["mutable", "immutable"] = "mutable",
        **kwargs: Any,
    ) -> None:
        require_package("wandb", "WandbLogger", "wandb")
        if add_file_policy not in ("mutable", "immutable"):
            raise MisconfigurationException(f"add_file_policy={add_file_policy!r} must be 'mutable' or 'immutable'.")
        run = experiment.id if experiment is not None else version or id or os.environ.get("WANDB_RUN_ID")
        super().__init__(prefix, log_model, run)
        self._project = experiment.project if experiment is not None else project or os.environ.get("WANDB_PROJECT")
        self._save_dir = os.fspath(save_dir if dir is None else dir)
        self._checkpoint_name = checkpoint_name
        self._policy = add_file_policy
        given = {"name": name, "anonymous": anonymous, "mode": "offline" if offline else None}
        self._init: dict[str, Any] = {key: value for key, value in given.items() if value is not None} | kwargs
        self._users_run = experiment is not None
        if experiment is not None:
            self._experiment = self._defined(experiment)
            self._begun = True

    @property
    def name(self) -> str:
        """The name of the project."""
        return str(self._init.get("project") or self._project or "lightning_logs")

    @property
    def version(self) -> str:
        """The id of the run."""
        if self._run is None:
            active = sys.modules["wandb"].run if "wandb" in sys.modules else None
            if active is not None and active not in _OPENED:
                self._run = str(active.id)
            else:  # known before the run begins, for the folder of the checkpoints
                letters = string.ascii_lowercase + string.digits
                self._run = "".join(random.SystemRandom().choices(letters, k=8))
        return self._run

    @property
    def root_dir(self) -> str:
        """The folder for W&B's files."""
        return self._save_dir

    def _open(self) -> Any:
        import wandb  # an extra, half a second

        run = self.version
        for opened in _OPENED:  # of the logger that this one is a copy of
            if opened.id == run and not opened._is_finished:
                return opened
        if wandb.run is not None and wandb.run not in _OPENED:
            if wandb.run.id != run:
                rank_zero_info(
                    f"The program has begun the W&B run {wandb.run.id!r}, and WandbLogger writes to it. Call "
                    "`wandb.finish()` before for a run of its own."
                )
            self._run, self._users_run = str(wandb.run.id), True
            return self._defined(wandb.run)
        settings: dict[str, Any] = {
            "project": self.name,
            "dir": self._save_dir,
            "id": run,
            "resume": "allow",
        } | self._init
        if wandb.run is not None:
            settings.setdefault("reinit", "create_new")
        if "://" not in self._save_dir:
            os.makedirs(self._save_dir, exist_ok=True)
        experiment = wandb.init(**settings)
        _OPENED.add(experiment)
        self._run = str(experiment.id)
        return self._defined(experiment)

    @staticmethod
    def _defined(experiment: Any) -> Any:
        """Draw everything over the trainer's steps."""
        if callable(getattr(experiment, "define_metric", None)):
            experiment.define_metric(_STEP)
            experiment.define_metric("*", step_metric=_STEP, step_sync=True)
        return experiment

    def _close(self, status: str) -> None:
        if self._experiment is not None and not self._users_run:
            self._experiment.finish(exit_code=1 if status == "failed" else 0)
        self._experiment, self._users_run = None, False

    def _name_parent(self, parent: str) -> None:
        self.experiment.config.update({"parent_run": parent}, allow_val_change=True)

    @rank_zero_only
    def watch(self, model: Module, log: str | None = "gradients", log_freq: int = 100, log_graph: bool = True) -> None:
        """Record gradients or parameters of a model as histograms, and its graph.

        Args:
            model: The module.
            log: "gradients", "parameters", "all", or None for the graph only.
            log_freq: Once in this number of batches.
            log_graph: Record the graph.
        """
        self.experiment.watch(model, log=log, log_freq=log_freq, log_graph=log_graph)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self._log(to_numbers(add_prefix(metrics, self._prefix, self.LOGGER_JOIN_CHAR)), step)

    def _log(self, values: Mapping[str, Any], step: int | None) -> None:
        self.experiment.log(dict(values) if step is None else {**values, _STEP: step})

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.experiment.config.update(plain(to_dict(params)), allow_val_change=True)

    def record_media(self, media: Media) -> bool:
        import wandb  # an extra

        if isinstance(media, Images):
            images = [
                image if isinstance(image, wandb.Image) and not options else wandb.Image(image, **options)
                for image, options in zip(media.images, media.options)
            ]
            self._log({media.key: images}, media.step)
        elif isinstance(media, Figure):
            drawn = wandb.Image(media.to_image()) if media.extension == ".png" else wandb.Plotly(media.figure)
            self._log({media.key: drawn}, media.step)
        elif isinstance(media, Text):
            self._log({media.key: wandb.Table(columns=["text"], data=[[media.text]])}, media.step)
        elif isinstance(media, Table):
            rows = [list(row) for row in media.rows]
            self._log({media.key: wandb.Table(columns=list(media.columns), data=rows)}, media.step)
        elif isinstance(media, File):
            self._save_file(media)
        return True

    def _save_file(self, file: File) -> None:
        """Copy a file into the folder that W&B sends; what has the same name is replaced."""
        folder = self.experiment.dir
        target = os.path.join(folder, "media", "files", file_name(file))
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.copyfile(file.path, target)
        self.experiment.save(target, base_path=folder, policy="now")

    @rank_zero_only
    def log_audio(self, key: str, audios: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Record sounds.

        Args:
            key: The name.
            audios: A list of what ``wandb.Audio`` takes: paths, or arrays (with a ``sample_rate`` for each).
            step: The step that they belong to.
            **kwargs: Lists with one entry for each sound: ``caption``, ``sample_rate``.

        Raises:
            MisconfigurationException: ``audios`` is no list, or another list has another length.
        """
        self._log_each("log_audio", "Audio", key, audios, step, kwargs)

    @rank_zero_only
    def log_video(self, key: str, videos: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Record videos.

        Args:
            key: The name.
            videos: A list of what ``wandb.Video`` takes: paths, or arrays of frames (which need moviepy).
            step: The step that they belong to.
            **kwargs: Lists with one entry for each video: ``caption``, ``fps``, ``format``.

        Raises:
            MisconfigurationException: ``videos`` is no list, or another list has another length.
        """
        self._log_each("log_video", "Video", key, videos, step, kwargs)

    def _log_each(
        self, method: str, kind: str, key: str, items: Sequence[Any], step: int | None, kwargs: Mapping[str, Any]
    ) -> None:
        import wandb  # an extra

        if not isinstance(items, list | tuple):
            raise MisconfigurationException(f"{method} takes a list, and this is a {type(items).__qualname__}.")
        make = getattr(wandb, kind)
        values = [make(item, **options) for item, options in zip(items, to_options(kwargs, len(items)))]
        name = next(iter(add_prefix({key: None}, self._prefix, self.LOGGER_JOIN_CHAR)))
        self._log({name: values}, step)

    def use_artifact(self, artifact: str, artifact_type: str | None = None) -> Any:
        """Note that the run takes an artifact as its input, and return the artifact.

        Args:
            artifact: Its name, such as ``"model-abc:best"``.
            artifact_type: Its type.
        """
        return self.experiment.use_artifact(artifact, type=artifact_type)

    @staticmethod
    @rank_zero_only
    def download_artifact(
        artifact: str,
        save_dir: PathLike | None = None,
        artifact_type: str | None = None,
        use_artifact: bool | None = True,
    ) -> str:
        """Download an artifact, and return the path of the folder.

        Args:
            artifact: Its name, such as ``"entity/project/model-abc:best"``.
            save_dir: The folder to write to. Default: W&B chooses one.
            artifact_type: Its type.
            use_artifact: Note that the run that is going on takes the artifact as its input.
        """
        import wandb  # an extra

        if wandb.run is not None and use_artifact:
            found = wandb.run.use_artifact(artifact, type=artifact_type)
        else:
            found = wandb.Api().artifact(artifact, type=artifact_type)
        return str(found.download(root=None if save_dir is None else os.fspath(save_dir)))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Send the checkpoints that wait; a run that failed is ended as failed, another one stays open for more."""
        self._send_remaining(status)
        if status == "failed" and not self._users_run:
            self._close(status)

    def _send(self, checkpoint: SavedCheckpoint) -> None:
        import wandb  # an extra

        name = self._checkpoint_name or f"model-{self.experiment.id}"
        artifact = wandb.Artifact(name=name, type="model", metadata=checkpoint.metadata)
        with checkpoint.local() as path:
            if os.path.isdir(path):
                artifact.add_dir(path, name="model.ckpt", policy=self._policy)
            else:
                # W&B would take the file itself later, when a copy of a remote file is gone
                policy = self._policy if path == checkpoint.path else "mutable"
                artifact.add_file(path, name="model.ckpt", policy=policy)
            self.experiment.log_artifact(artifact, aliases=checkpoint.aliases)
