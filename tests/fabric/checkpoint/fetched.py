"""A checkpoint folder at a URL, copied to the local disk with the names that its manifest has."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import fsspec

from treadle_fabric import DistributedCheckpointIO


def load(url: str, scratch: Path) -> dict[str, Any]:
    """Read all of a folder at a URL, every byte of it checked."""
    fs, where = fsspec.url_to_fs(url)
    manifest = json.loads(fs.cat_file(f"{where}/manifest.json"))
    manifest.pop("crc32")
    prefix = manifest.pop("prefix")
    assert manifest["version"] == 3 and len(prefix) == 33
    copy = scratch / "fetched"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for name in manifest["files"]:
        (copy / name).write_bytes(fs.cat_file(f"{where}/{prefix}{name}"))
    body = json.dumps({**manifest, "version": 2})[1:].encode()
    (copy / "manifest.json").write_bytes(b'{"crc32": "%08x",\n' % zlib.crc32(body) + body)
    return DistributedCheckpointIO().load_checkpoint(copy)
