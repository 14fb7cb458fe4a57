"""What is about several processes, where users of Lightning Fabric look for it."""

from treadle_fabric.measuring import is_shared_filesystem

__all__ = ["is_shared_filesystem"]
