"""The Trainer: the facade, and the parts behind it.

Start with ``trainer.py``. ``settings.py`` checks the arguments; ``preflight.py`` checks, before a run, that module,
loaders and settings fit together; ``session.py`` says what happens when in a run; ``assembly.py`` makes the parts of a
run; ``fitting.py`` has the parts of a fit; ``continuation.py`` keeps what a fit leaves for the next one, and
``view.py`` is ``trainer.fit_loop``; ``outcome.py`` brings the results of other processes back. Imports every layer
below.
"""

from treadle.trainer.trainer import Trainer

__all__ = ["Trainer"]
