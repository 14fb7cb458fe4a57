"""What reads objects, where users of a trainer look for it."""

from treadle_fabric import AttributeDict, is_picklable

__all__ = ["AttributeDict", "is_picklable"]
