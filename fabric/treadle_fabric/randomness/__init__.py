"""Random numbers: seeds, the random state of a process, and generators apart from the global ones.

Start with ``seeds.py`` (``seed_everything``). ``state.py`` reads and restores the state of Python's, NumPy's and
PyTorch's global generators together, ``generators.py`` the state of a single generator object, and ``private.py`` lets
a loader draw apart from the global generators. Imports only the foundation.
"""

from treadle_fabric.randomness.generators import generator_state, is_generator, set_generator_state
from treadle_fabric.randomness.private import PrivateRandomness
from treadle_fabric.randomness.seeds import seed_everything, worker_init_function
from treadle_fabric.randomness.state import (
    as_own_rng_states,
    collect_rng_states,
    isolate_rng,
    own_rng_states,
    rng_states_of,
    same_rng_states,
    set_rng_states,
)

__all__ = [
    "PrivateRandomness",
    "as_own_rng_states",
    "collect_rng_states",
    "generator_state",
    "is_generator",
    "isolate_rng",
    "own_rng_states",
    "rng_states_of",
    "same_rng_states",
    "seed_everything",
    "set_generator_state",
    "set_rng_states",
    "worker_init_function",
]
