"""ModelSummary: the table of layers at the start of fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from treadle.callbacks.callback import Callback
from treadle.callbacks.summary.layers import ModelSummary as Summary
from treadle.callbacks.summary.layers import format_summary, not_counted
from treadle_fabric import rank_zero_info

if TYPE_CHECKING:
    from treadle.module import LightningModule
    from treadle.trainer import Trainer

__all__ = ["ModelSummary"]


class ModelSummary(Callback):
    """Prints the layers of the model with their parameters when fit starts.

    With ``example_input_array`` set in the module, one forward pass adds FLOPs and the sizes of inputs and outputs.

    Args:
        max_depth: layers of layers to show: 1 for the top level, -1 for all; 0 turns it off.
        **summarize_kwargs: handed on to :meth:`summarize`.
    """

    def __init__(self, max_depth: int = 1, **summarize_kwargs: Any) -> None:
        self._max_depth = max_depth
        self._summarize_kwargs = summarize_kwargs

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Summarize on every rank, since a sharded model runs its example on all; print on rank 0."""
        if self._max_depth == 0:
            return
        summary = Summary(pl_module, self._max_depth)
        if not trainer.is_global_zero:
            return
        self.summarize(
            summary.columns(),
            summary.total_parameters,
            summary.trainable_parameters,
            summary.model_size,
            summary.total_training_modes,
            summary.total_flops,
            **self._summarize_kwargs,
        )
        if n := summary.uninitialized_parameters:
            rank_zero_info(not_counted(n))

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        total_training_modes: dict[str, int],
        total_flops: int,
        **summarize_kwargs: Any,
    ) -> None:
        """Print the table; override it to print another.

        Args:
            summary_data: the columns, each a heading and its cells.
            model_size: megabytes.
            total_training_modes: numbers of modules in ``"train"`` and ``"eval"`` mode.
            total_flops: of one forward pass of the example input; 0 without one.
            **summarize_kwargs: what the constructor was given.
        """
        text = format_summary(
            summary_data, total_parameters, trainable_parameters, model_size, total_training_modes, total_flops
        )
        rank_zero_info("\n" + text)
