"""Progress bars.

Open ``progress_bar.py`` first: the base that users subclass, and below it what the bars here have in common.
``display.py`` has the parts of a bar; ``tqdm_progress.py``, ``rich_progress.py`` and ``plain_progress.py`` draw it.

These modules import the runtime, and of the callbacks only the base ``callbacks/callback.py``.
"""

from __future__ import annotations

import importlib.util
from functools import cache

from treadle.callbacks.progress.plain_progress import PlainProgressBar
from treadle.callbacks.progress.progress_bar import ProgressBar
from treadle.callbacks.progress.rich_progress import RichProgressBar, RichProgressBarTheme
from treadle.callbacks.progress.tqdm_progress import TQDMProgressBar
from treadle_fabric import rank_zero_info

__all__ = [
    "PlainProgressBar",
    "ProgressBar",
    "RichProgressBar",
    "RichProgressBarTheme",
    "TQDMProgressBar",
    "default_progress_bar",
]


def default_progress_bar() -> ProgressBar:
    """Return the bar of a Trainer for which the user chose none: tqdm's, else rich's, else plain lines."""
    if importlib.util.find_spec("tqdm") is not None:
        return TQDMProgressBar()
    if importlib.util.find_spec("rich") is not None:
        return RichProgressBar()
    _tell_once()
    return PlainProgressBar()


@cache
def _tell_once() -> None:
    rank_zero_info("Progress is printed as plain lines; `pip install treadle[trainer]` adds a progress bar (tqdm).")
