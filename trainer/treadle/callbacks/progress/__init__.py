"""Progress bars."""

from __future__ import annotations

import importlib.util
from functools import cache

from treadle.callbacks.progress.plain_progress import PlainProgressBar
from treadle.callbacks.progress.progress_bar import ProgressBar
from treadle.callbacks.progress.rich_progress import RichProgressBar, RichProgressBarTheme
from treadle.callbacks.progress.tqdm_progress import TQDMProgressBar
from treadle_fabric.rank_zero import rank_zero_info

__all__ = [
    "PlainProgressBar",
    "ProgressBar",
    "RichProgressBar",
    "RichProgressBarTheme",
    "TQDMProgressBar",
    "default_progress_bar",
]


def default_progress_bar() -> ProgressBar:
    """The bar of a Trainer that was given none: tqdm's, else rich's, else plain lines."""
    if importlib.util.find_spec("tqdm") is not None:
        return TQDMProgressBar()
    if importlib.util.find_spec("rich") is not None:
        return RichProgressBar()
    _tell_once()
    return PlainProgressBar()


@cache
def _tell_once() -> None:
    rank_zero_info("Progress is printed as plain lines; `pip install treadle[trainer]` adds a progress bar (tqdm).")
