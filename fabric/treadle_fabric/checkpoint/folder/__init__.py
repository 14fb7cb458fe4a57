"""A checkpoint that is a folder: which files it has, its manifest, and how it takes its name.

Start with ``layout.py``. ``manifest.py`` lists the files with their checksums, ``placing.py`` puts a finished folder in
place, whole or not at all. Imports only the foundation.
"""

from treadle_fabric.checkpoint.folder.layout import (
    MANIFEST,
    PLAIN,
    has_manifest,
    identity,
    is_sharded,
    rank_file,
    refuse_foreign,
    representative,
    size_of,
    unmixed,
)
from treadle_fabric.checkpoint.folder.manifest import checksum, read_manifest, verify, write_manifest
from treadle_fabric.checkpoint.folder.placing import (
    bring_back,
    forget_asides,
    link_folder,
    lock_folder,
    make_temporary,
    put_in_place,
    remove_folder,
)

__all__ = [
    "MANIFEST",
    "PLAIN",
    "bring_back",
    "checksum",
    "forget_asides",
    "has_manifest",
    "identity",
    "is_sharded",
    "link_folder",
    "lock_folder",
    "make_temporary",
    "put_in_place",
    "rank_file",
    "read_manifest",
    "refuse_foreign",
    "remove_folder",
    "representative",
    "size_of",
    "unmixed",
    "verify",
    "write_manifest",
]
