"""Modules of ``torch.compile``, where users of a trainer look for what unwraps them."""

from treadle_fabric import uncompiled

__all__ = ["from_compiled", "to_uncompiled"]

from_compiled = uncompiled  # the Trainer takes what torch.compile returned, and runs it compiled
to_uncompiled = uncompiled
_maybe_unwrap_optimized = uncompiled
