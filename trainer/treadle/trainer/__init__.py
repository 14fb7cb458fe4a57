"""The Trainer: the facade, and what it is put together from.

Start with ``trainer.py``. ``settings.py`` checks the arguments, ``preflight.py`` what does not fit together before a
run, ``assembly.py`` makes the parts of a run, ``view.py`` is what a trainer shows of itself, and ``outcome.py``
brings the results of other processes back. Imports every layer below.
"""

from treadle.trainer.trainer import Trainer

__all__ = ["Trainer"]
