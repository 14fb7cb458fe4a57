"""One training batch. Start with ``automatic.py``: automatic optimization, made of the parts beside it.

``gradients.py`` is forward, zero, scale and backward; ``backward.py`` the backward pass with its hooks;
``preparation.py`` makes gradients ready for the optimizer; ``clipping.py`` clips them. ``manual.py`` is manual
optimization.
"""
