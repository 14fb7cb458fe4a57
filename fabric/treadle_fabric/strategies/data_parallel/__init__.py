"""The parts of DDP, whose strategy is ``ddp.py`` in the folder above.

``ddp_engine.py`` keeps torch's DistributedDataParallel in step with what is trainable in its model. Imports the bases
of strategies and what is below them.
"""

__all__: list[str] = []
