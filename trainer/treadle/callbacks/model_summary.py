"""ModelSummary: prints the table of layers when fit starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from treadle.callbacks.callback import Callback
from treadle.callbacks.summary.formatting import Totals, format_summary
from treadle.callbacks.summary.layers import ModelSummary as Summary
from treadle_fabric import check_integer, rank_zero_info

if TYPE_CHECKING:
    from treadle.contracts import LightningModule, Trainer

__all__ = ["ModelSummary"]


class ModelSummary(Callback):
    """Print the layers of the model with their parameters when fit starts.

    With ``example_input_array`` set in the module, one forward pass adds FLOPs and the sizes of inputs and outputs.

    Args:
        max_depth: how many levels of layers to show: 1 for the top level, -1 for all; 0 prints nothing.
        **summarize_kwargs: passed on to :meth:`summarize`.

    Raises:
        MisconfigurationException: ``max_depth`` is no integer, or below -1.
    """

    def __init__(self, max_depth: int = 1, **summarize_kwargs: Any) -> None:
        self._max_depth = check_integer(
            "ModelSummary: max_depth", max_depth, minimum=-1, meaning="a number of levels, -1 for all"
        )
        self._summarize_kwargs = summarize_kwargs

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Summarize on every rank, since the example of a sharded model runs on all; print on rank 0."""
        if self._max_depth == 0:
            return
        summary = Summary(pl_module, self._max_depth)
        if not trainer.is_global_zero:
            return
        # one by one, so that a command line takes for arguments of this class only what it has beyond these
        parameters, trainable, size, modes, flops = summary.totals()
        self.summarize(summary.columns(), parameters, trainable, size, modes, flops, **self._summarize_kwargs)

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
        """Print the table; override this method to print another one.

        Args:
            summary_data: the columns, each a heading and the cells below it.
            total_parameters: the elements of all parameters.
            trainable_parameters: the elements of those parameters that require a gradient.
            model_size: the megabytes (10^6 bytes) that the parameters take.
            total_training_modes: the number of modules in ``"train"`` and in ``"eval"`` mode.
            total_flops: the floating-point operations of one forward pass of the example input; 0 without one.
            **summarize_kwargs: those of the constructor.
        """
        totals = Totals(total_parameters, trainable_parameters, model_size, total_training_modes, total_flops)
        rank_zero_info("\n" + format_summary(summary_data, totals))
