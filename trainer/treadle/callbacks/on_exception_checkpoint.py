"""OnExceptionCheckpoint: saves when an exception ends training."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from treadle.callbacks.checkpoint import Checkpoint, await_others_at_the_end, end_of_training, has_trained
from treadle.callbacks.checkpoints.names import check_length
from treadle.callbacks.checkpoints.paths import path_exists
from treadle_fabric import MisconfigurationException, PathLike, describe_error, rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from treadle.contracts import LightningModule, Trainer

__all__ = ["OnExceptionCheckpoint"]


class OnExceptionCheckpoint(Checkpoint):
    """Save one checkpoint when an exception, Ctrl+C included, ends training; a later run that ends well removes it.

    Args:
        dirpath: the folder of the checkpoint.
        filename: the name of the checkpoint, without extension.

    Raises:
        MisconfigurationException: ``filename`` is empty, or too long for a file system.
    """

    FILE_EXTENSION = ".ckpt"

    def __init__(self, dirpath: PathLike, filename: str = "on_exception") -> None:
        super().__init__()
        if not filename:
            raise MisconfigurationException(
                "OnExceptionCheckpoint(filename=''): the file needs a name, such as the default 'on_exception'."
            )
        check_length(filename, f"OnExceptionCheckpoint(filename={filename!r})")
        self.dirpath = os.fspath(dirpath)
        self.filename = filename
        self._saved = False

    @property
    def ckpt_path(self) -> str:
        """The path of the checkpoint."""
        return os.path.join(self.dirpath, self.filename + self.FILE_EXTENSION)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin a run: nothing has been saved in it."""
        self._saved = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the state, in place of an earlier checkpoint."""
        if not has_trained(trainer) or trainer.fast_dev_run:
            return
        try:
            await_others_at_the_end(trainer)
            trainer.save_checkpoint(self.ckpt_path)
        except Exception as error:  # the exception that ends the run is the one to report
            rank_zero_warn(
                f"{end_of_training(exception)} OnExceptionCheckpoint could not save: {describe_error(error)}"
            )
            return
        self._saved = True
        rank_zero_info(f"{end_of_training(exception)} The state was saved as {self.ckpt_path!r}.")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the checkpoint of an earlier run when training ended well: it is of no use any more."""
        if stage == "fit" and not self._saved and trainer.is_global_zero and path_exists(self.ckpt_path):
            trainer.strategy.checkpoint_io.remove_checkpoint(self.ckpt_path)
