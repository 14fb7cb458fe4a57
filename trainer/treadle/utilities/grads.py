"""The norms of gradients, where users of a trainer look for them."""

from treadle.numbers.grad_norm import grad_norm

__all__ = ["grad_norm"]
