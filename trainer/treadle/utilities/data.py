"""What is known of loaders, where users of a trainer look for it."""

from treadle.data.lengths import extract_batch_size
from treadle_fabric import has_len, sized_len
from treadle_fabric.data import has_iterable_dataset, suggested_max_num_workers

__all__ = ["extract_batch_size", "has_iterable_dataset", "has_len", "sized_len", "suggested_max_num_workers"]
