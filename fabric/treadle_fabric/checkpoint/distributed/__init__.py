"""One checkpoint, one folder that all processes write, each its part.

Start with ``saving.py`` and ``loading.py``. ``split.py`` takes a state apart, ``ranks.py`` lets the ranks fail
together, and ``dcp.py`` is all that is used of torch.distributed.checkpoint.
"""
