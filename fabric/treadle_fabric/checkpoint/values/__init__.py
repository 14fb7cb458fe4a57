"""Values on their way through a file: every value comes back equal and of its type, or saving says that it will not.

Start with ``packing.py``, which turns any tree of values into a plain one for a file, and ``unpacking.py``, which turns
the plain tree back. A value is kept in the first of these ways that fits:

1. plain: what ``torch.load(weights_only=True)`` gives back equal and of its type;
2. plain, with its type beside it, by path: the fixed kinds of ``kinds.py`` (those of Python and torch are in
   ``standard_kinds.py``, the others in ``numpy_kinds.py`` and ``omegaconf_kinds.py``), and the dataclasses, enums and
   named tuples of ``structures.py`` whose class is known from annotations of the program;
3. pickled, in a part of the file that only an explicit ``weights_only=False`` reads. A default load gives an object of
   ``not_loaded.py`` in its place, whose use raises an error;
4. not at all: refused by name, or left out with a warning.

No class is ever looked up by a name in the file, because importing a module runs code.
"""
