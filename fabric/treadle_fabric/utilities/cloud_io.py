"""File systems, where users of Lightning Fabric look for them."""

from treadle_fabric.checkpoint.torch_file import get_filesystem

__all__ = ["get_filesystem"]
