"""What the callbacks that average weights share.

Open ``callback.py`` first: which weights the module has at each hook, and which go into a checkpoint. ``weights.py`` is
the average itself. Imports the runtime and ``callback.py`` of the folder above.
"""

from treadle.callbacks.averaging.callback import AveragingCallback
from treadle.callbacks.averaging.weights import AveragedWeights

__all__ = ["AveragedWeights", "AveragingCallback"]
