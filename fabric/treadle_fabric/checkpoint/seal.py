"""A checksum for the bytes of a checkpoint file that no other checksum covers.

The archive that ``torch.save`` writes has a table of contents with the size and the CRC-32 of each record, and these
are compared on every load. They do not cover the headers, the padding between them and the table itself. The CRC-32 of
those bytes is written into the comment at the end of the archive, which every reader of zip files skips; so no second
file is needed.
"""

from __future__ import annotations

import os
import re
import struct
import zipfile
import zlib
from typing import IO

__all__ = ["seal", "seal_is_broken"]

_MARK = b"treadle-crc32:"
_COMMENT = re.compile(re.escape(_MARK) + rb"([0-9a-f]{8})")
_COMMENT_SIZE = len(_MARK) + 8
_LOCAL_HEADER = 30  # bytes before the name; the sizes of name and padding are its last two fields
_END = b"PK\x05\x06"
_END_SIZE = 22  # bytes of the end record; the size of the comment is its last field


def seal(file: IO[bytes]) -> None:
    """Add the comment to the archive that was just written to ``file``, open for reading and writing."""
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
    file.seek(size - 2)
    file.write(struct.pack("<H", _COMMENT_SIZE))
    checksum = _structure_checksum(file, records, size)
    file.seek(size)
    file.write(_MARK + b"%08x" % checksum)


def seal_is_broken(file: IO[bytes], archive: zipfile.ZipFile) -> bool:
    """Whether the comment says something else than the archive; an archive without one cannot tell."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _END_SIZE - 2 * _COMMENT_SIZE))
    tail = file.read()
    end = tail.rfind(_END)
    if end < 0:  # a long comment, of another program
        return False
    comment = tail[end + _END_SIZE :]
    if tail[end + _END_SIZE - 2 : end + _END_SIZE] != struct.pack("<H", len(comment)):
        return True
    if len(comment) != _COMMENT_SIZE:  # torch.save leaves none
        return False
    found = _COMMENT.fullmatch(comment)
    if not found:
        return True
    try:
        return _structure_checksum(file, archive.infolist(), size - _COMMENT_SIZE) != int(found[1], 16)
    except (struct.error, ValueError, OverflowError):
        return True


def _structure_checksum(file: IO[bytes], records: list[zipfile.ZipInfo], end: int) -> int:
    """The CRC-32 of all bytes before ``end`` that are not the data of a record."""
    checksum = position = 0
    for record in sorted(records, key=lambda r: r.header_offset):
        file.seek(position)
        before = file.read(record.header_offset - position + _LOCAL_HEADER)
        names, padding = struct.unpack("<HH", before[-4:])
        checksum = zlib.crc32(file.read(names + padding), zlib.crc32(before, checksum))
        position = record.header_offset + _LOCAL_HEADER + names + padding + record.compress_size
    file.seek(position)
    return zlib.crc32(file.read(end - position), checksum)
