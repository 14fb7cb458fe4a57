"""Seeds, where users of Lightning Fabric look for them."""

from treadle_fabric.randomness import (
    collect_rng_states,
    isolate_rng,
    seed_everything,
    set_rng_states,
)
from treadle_fabric.randomness import worker_init_function as pl_worker_init_function
from treadle_fabric.randomness.seeds import reset_seed

__all__ = [
    "_collect_rng_states",
    "_set_rng_states",
    "isolate_rng",
    "max_seed_value",
    "min_seed_value",
    "pl_worker_init_function",
    "reset_seed",
    "seed_everything",
]

_collect_rng_states = collect_rng_states
_set_rng_states = set_rng_states
max_seed_value = 2**32 - 1
min_seed_value = 0
