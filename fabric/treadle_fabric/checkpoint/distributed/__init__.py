"""One checkpoint, one folder: all processes write it together, each process its part.

Start with ``saving.py``; what is written here is read by ``stored/``, beside this folder. ``split.py`` decides which
part of a state goes to which file, ``pieces.py`` which pieces of its tensors a rank writes, ``ranks.py`` makes the
ranks fail together, and ``torch_index.py`` makes the index by which torch's own tools read a folder.
"""
