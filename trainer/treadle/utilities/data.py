"""What is known of loaders, where users of a trainer look for it."""

from treadle_fabric import has_len, sized_len
from treadle_fabric import infer_batch_size as extract_batch_size
from treadle_fabric.data import suggested_max_num_workers

__all__ = ["extract_batch_size", "has_len", "sized_len", "suggested_max_num_workers"]
