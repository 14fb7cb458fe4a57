"""What all loops of a run share. Start with ``run.py``.

``dispatch.py`` decides once, and again where that changes, which methods are called at each hook, ``changes.py`` keeps
what a run changes about its module and optimizers, ``progress.py`` has the counters of epochs, batches and steps,
``steps.py`` learns of steps from the optimizers, ``accumulation.py`` says which batches make up a step, ``loss.py``
says what becomes of a loss, ``layer_sync.py`` lets layers share over the ranks, and ``signals.py`` ends a run at the
next batch. Imports callbacks, module, metrics and below.
"""
