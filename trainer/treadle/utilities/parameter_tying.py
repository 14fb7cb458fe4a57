"""Parameters that modules share, where users of a trainer look for them."""

from treadle.module.shared_parameters import find_shared_parameters, set_shared_parameters

__all__ = ["find_shared_parameters", "set_shared_parameters"]
