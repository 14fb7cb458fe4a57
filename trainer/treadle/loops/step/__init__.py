"""One training batch. Start with ``single.py``: automatic optimization with one optimizer, a leaf of ``automatic.py``.

``several.py`` steps several optimizers together; ``choose.py`` chooses. ``gradients.py`` is forward, zero, scale and
backward; ``backward.py`` the backward pass with its hooks; ``preparation.py`` makes gradients ready for an optimizer;
``clipping.py`` clips them. ``manual.py`` is manual optimization.
"""
