"""One checkpoint, one folder: all processes write it together, each process its part.

Start with ``saving.py``; what is written here is read by ``stored/``, beside this folder. ``split.py`` decides which
part of a state goes to which file, ``ranks.py`` makes the ranks fail together, and ``dcp.py`` has everything that is
used of torch.distributed.checkpoint.
"""
