"""Numbers of the training itself: what becomes of losses, gradient norms, and values that are not finite.

Start with ``losses.py``, which chooses the loss policy of a run. ``watch.py`` is ``on_nonfinite``; ``examine.py`` finds
the first layer with an output that is not finite, and ``grad_norm.py`` has the norms of gradients. Imports checkpoint,
run and below.
"""
