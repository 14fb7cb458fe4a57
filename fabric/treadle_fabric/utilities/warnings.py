"""Warnings of what may be meant, where users of Lightning Fabric look for them."""

from treadle_fabric.rank_zero import PossibleUserWarning, disable_possible_user_warnings

__all__ = ["PossibleUserWarning", "disable_possible_user_warnings"]
