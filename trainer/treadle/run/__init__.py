"""What all loops of a run share. Start with ``run.py``.

``dispatch.py`` decides once who is called at each hook, ``progress.py`` says how far the run has come, ``loss.py`` what
becomes of a loss, and ``signals.py`` ends a run at the next batch. Imports callbacks, module, metrics and below.
"""
