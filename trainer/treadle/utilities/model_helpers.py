"""What reads a module's class, where users of a trainer look for it."""

from treadle.run.dispatch import is_overridden

__all__ = ["is_overridden"]
