"""Seeds, where users of Lightning Fabric look for them."""

from treadle_fabric.randomness import isolate_rng, seed_everything
from treadle_fabric.randomness import worker_init_function as pl_worker_init_function
from treadle_fabric.randomness.seeds import reset_seed

__all__ = ["isolate_rng", "pl_worker_init_function", "reset_seed", "seed_everything"]
