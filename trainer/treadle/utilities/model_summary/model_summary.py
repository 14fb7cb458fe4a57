"""The summary of a module, where users of a trainer look for it."""

from treadle.callbacks.summary.formatting import get_formatted_model_size, get_human_readable_count
from treadle.callbacks.summary.layers import LayerSummary, ModelSummary, parse_batch_shape, summarize

__all__ = [
    "LayerSummary",
    "ModelSummary",
    "get_formatted_model_size",
    "get_human_readable_count",
    "parse_batch_shape",
    "summarize",
]
