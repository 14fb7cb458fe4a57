"""What all loops of a run share. Start with ``run.py``.

``dispatch.py`` decides once which methods are called at each hook, ``progress.py`` counts epochs, batches and steps,
``loss.py`` says what becomes of a loss, and ``signals.py`` ends a run at the next batch. Imports callbacks, module,
metrics and below.
"""
