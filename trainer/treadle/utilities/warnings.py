"""Warnings of what may be meant, where users of a trainer look for them."""

from treadle_fabric import PossibleUserWarning, disable_possible_user_warnings

__all__ = ["PossibleUserWarning", "disable_possible_user_warnings"]
