"""The summary of a module, where users of a trainer look for it."""

from typing import TYPE_CHECKING

from treadle.callbacks.summary.formatting import get_formatted_model_size, get_human_readable_count
from treadle.callbacks.summary.layers import LayerSummary, ModelSummary, parse_batch_shape, summarize
from treadle_fabric import not_yet

__all__ = [
    "LayerSummary",
    "ModelSummary",
    "get_formatted_model_size",
    "get_human_readable_count",
    "parse_batch_shape",
    "summarize",
]

if not TYPE_CHECKING:  # which tell of any other name
    __getattr__ = not_yet(__name__, {"DeepSpeedSummary"})
