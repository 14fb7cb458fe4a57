"""RayTrainReportCallback: reports metrics and checkpoints of a run to Ray Train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from treadle.callbacks.reporting.to_ray import RayReport
from treadle_fabric import MisconfigurationException, RayEnvironment

if TYPE_CHECKING:
    from treadle.contracts import Trainer

__all__ = ["RayTrainReportCallback"]


class RayTrainReportCallback(RayReport):
    """Report metrics, and a checkpoint of the run, to Ray Train after each validation; the sanity check does not count.

    Without validation, the end of a training epoch reports. Every worker reports, as Ray wants it; Ray keeps what
    rank 0 says. With the metrics goes a checkpoint of the whole run, which Ray copies to its storage. When Ray
    starts the workers again, after one has failed, the run goes on exactly from :attr:`ckpt_path`: the checkpoint that
    was reported last before. It stays the same while the workers run.

    The checkpoint of a strategy that shards, which is a folder that all ranks write, needs ranks on one machine, or a
    shared folder as Ray's storage.

    Args:
        metrics: the names of logged metrics, or a mapping from reported to logged names. Default: all that were logged,
            and ``epoch`` and ``step``.
        save_checkpoints: report a checkpoint, too.
        filename: the checkpoint's name in Ray's folder.

    Raises:
        MissingPackageError: ray is not installed.
        MisconfigurationException: this process is no worker of Ray Train; or a metric was not logged when it is
            reported; or the ranks have no folder in common for a checkpoint that all write.

    Example::

        def train_loop_per_worker(config):
            report = RayTrainReportCallback()
            trainer = Trainer(max_epochs=10, callbacks=report, enable_progress_bar=False)
            trainer.fit(Net(**config), train_loader, val_loader, ckpt_path=report.ckpt_path)

        TorchTrainer(train_loop_per_worker, scaling_config=ScalingConfig(num_workers=4)).fit()
    """

    def __init__(
        self,
        metrics: str | Sequence[str] | Mapping[str, str] | None = None,
        save_checkpoints: bool = True,
        filename: str = "checkpoint.ckpt",
    ) -> None:
        super().__init__(metrics, save_checkpoints, filename, "ray")
        if RayEnvironment.detect():
            _checkpoint_of_start()  # before this run reports any

    def _newest_folder(self) -> str | None:
        checkpoint = _checkpoint_of_start() if RayEnvironment.detect() else None
        if checkpoint is None:
            return None
        return str(checkpoint.path if checkpoint.filesystem.type_name == "local" else checkpoint.to_directory())

    def _check(self, trainer: Trainer) -> None:
        if not RayEnvironment.detect():
            raise MisconfigurationException(
                "RayTrainReportCallback reports to Ray Train, and this process is no worker of Ray Train's. Call fit "
                "in the function that ray.train.torch.TorchTrainer(...) runs. In a trial of Ray Tune without workers, "
                "use RayTuneReport."
            )
        strategy = trainer.strategy
        if self.save_checkpoints and strategy.num_nodes > 1 and strategy.writes_folders and _shared_folder() is None:
            raise MisconfigurationException(
                f"RayTrainReportCallback with {type(strategy).__name__} on {strategy.num_nodes} machines: all ranks "
                "write the checkpoint, and Ray's storage is no folder that they share. Use "
                "RunConfig(storage_path=<a shared folder>), or RayTrainReportCallback(save_checkpoints=False) and "
                "ModelCheckpoint(dirpath=<a URL>, save_last=True) with fit(ckpt_path='last')."
            )

    def _staging(self, trainer: Trainer) -> str | None:
        return _shared_folder() if trainer.strategy.num_nodes > 1 else None

    def _tell(self, trainer: Trainer, metrics: dict[str, float], folder: str | None) -> None:
        import ray.train  # an extra, and heavy

        if self.metrics is None:
            metrics = {"epoch": trainer.current_epoch, "step": trainer.global_step, **metrics}
        has_it = folder is not None and trainer.is_global_zero
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder) if has_it else None)


@cache
def _checkpoint_of_start() -> Any:
    """The checkpoint with which Ray started the workers, the same for all; later, each has what it reported itself."""
    import ray.train  # an extra, and heavy

    return ray.train.get_checkpoint()


def _shared_folder() -> str | None:
    """Ray's folder of the run, where its storage is a file system of this machine; machines have to share it."""
    import ray.train  # an extra, and heavy

    storage = ray.train.get_context().get_storage()
    return str(storage.experiment_fs_path) if storage.storage_filesystem.type_name == "local" else None
