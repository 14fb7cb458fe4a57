"""The parts of DDP, whose strategy is ``ddp.py`` in the folder above.

``ddp_engine.py`` keeps torch's DistributedDataParallel in step with what is trainable in its model.
``communication.py`` has the hooks that exchange gradients and what they remember, ``hook_checks.py`` refuses what does
not fit together, and ``averaging.py`` averages the models of ranks that learn apart. Imports the bases of strategies
and what is below them.
"""

__all__: list[str] = []
