"""A checkpoint folder at a URL, read whole."""

from __future__ import annotations

import json
from typing import Any

import fsspec

from treadle_fabric import DistributedCheckpointIO


def load(url: str) -> dict[str, Any]:
    """Read all of a folder at a URL, every byte of it checked."""
    fs, where = fsspec.url_to_fs(url)
    manifest = json.loads(fs.cat_file(f"{where}/manifest.json"))
    assert manifest["version"] == 3 and len(manifest["prefix"]) == 33
    assert all(fs.exists(f"{where}/{manifest['prefix']}{name}") for name in manifest["files"])
    return DistributedCheckpointIO().load_checkpoint(url)
