"""The number of batches that ``limit_*_batches`` leaves of a loader."""

from __future__ import annotations

import math

from treadle_fabric import MisconfigurationException

__all__ = ["limit_batches"]


def limit_batches(length: int | None, limit: float, name: str) -> float:
    """Compute the number of batches of a loader to use.

    Args:
        length: The loader's length; None where it is unknown.
        limit: An int (batches) or a float (fraction).
        name: The argument's name, for errors.

    Returns:
        The number of batches; infinity where it is unknown and not limited.

    Raises:
        MisconfigurationException: a fraction is asked of an unknown length, or is less than one batch.
    """
    if limit == 0:
        return 0
    if length is None:
        if isinstance(limit, float) and limit != 1.0:
            raise MisconfigurationException(
                f"{name}={limit} is a fraction of a loader whose length is unknown: give a number of batches (an int)."
            )
        return math.inf if isinstance(limit, float) else limit
    if isinstance(limit, int):
        return min(length, limit)
    batches = int(length * limit)
    if batches == 0 and length:
        raise MisconfigurationException(
            f"{name}={limit} of {length} batches is less than one batch: use at least {math.ceil(100 / length) / 100}."
        )
    return batches
