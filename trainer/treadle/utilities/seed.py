"""The state of random generators, where users of a trainer look for it."""

from treadle_fabric import isolate_rng, seed_everything

__all__ = ["isolate_rng", "seed_everything"]
