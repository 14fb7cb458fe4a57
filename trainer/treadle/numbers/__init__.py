"""Numbers of the training itself: weighted losses, gradient norms, and what is not finite.

Start with ``watch.py`` (``on_nonfinite``) or ``loss_weights.py``. ``examine.py`` finds the first layer that is not
finite. Imports run and below.
"""
