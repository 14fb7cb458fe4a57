"""SpikeDetection: ends a fit whose loss jumps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from treadle.callbacks.callback import Callback
from treadle_fabric import PathLike
from treadle_fabric.measuring import SpikeDetection as OfFabric

if TYPE_CHECKING:
    from treadle.contracts import LightningModule, Trainer

__all__ = ["SpikeDetection"]


class SpikeDetection(Callback):
    """End a fit whose loss is far worse than the mean of the last ones.

    What counts as a spike, and what is written to the JSON file, tells the class of the same name for Fabric,
    :class:`treadle_fabric.utilities.SpikeDetection`; the arguments are its arguments. The loss is what
    ``training_step`` returned. A checkpoint keeps the last losses.

    Args:
        mode: "min" (default) where a smaller loss is a better one, "max" where a larger one is.
        window: The number of losses whose mean is compared. Default: 10.
        warmup: The number of batches at the beginning that are no spikes whatever their loss. Default: 1.
        atol: The smallest difference of a spike. Default: None, any.
        rtol: The same as a multiple of the mean. Default: 2.0; None: any.
        exclude_batches_path: The JSON file, or a folder for ``skip_batches.json``. Default: the working directory.
        finite_only: Whether a loss that is NaN or infinite is a spike. Default: True. False: it is passed over.

    Raises:
        MisconfigurationException: An argument is out of range, or both tolerances are None.
        TrainingSpikeException: During fit, the loss is a spike; on every rank.
    """

    def __init__(
        self,
        mode: Literal["min", "max"] = "min",
        window: int = 10,
        warmup: int = 1,
        atol: float | None = None,
        rtol: float | None = 2.0,
        exclude_batches_path: PathLike | None = None,
        finite_only: bool = True,
    ) -> None:
        self._detection = OfFabric(mode, window, warmup, atol, rtol, exclude_batches_path, finite_only)

    @property
    def bad_batches(self) -> list[int]:
        """The numbers of the batches to leave out."""
        return self._detection.bad_batches

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the loss of the batch."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        self._detection.check(trainer.strategy, loss, batch_idx)

    def state_dict(self) -> dict[str, Any]:
        """Return the last losses and the batches to be left out."""
        return self._detection.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self._detection.load_state_dict(state_dict)
