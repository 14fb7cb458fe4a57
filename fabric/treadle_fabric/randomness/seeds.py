"""Seed Python's, NumPy's and PyTorch's generators, and those of a loader's workers."""

from __future__ import annotations

import hashlib
import os
import random
import sys
from types import ModuleType
from typing import Any

import torch

from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn

__all__ = ["global_seed", "reset_seed", "seed_everything", "worker_init_function"]

_MAX_SEED = 2**32 - 1  # NumPy takes no larger one


def numpy_if_imported() -> ModuleType | None:
    """NumPy, unless it is not installed."""
    try:
        import numpy  # heavy, and torch works without it
    except ImportError:
        return None
    return numpy


def running_xla() -> Any:
    """The module of torch-xla that has the random state of its device, if XLA's runtime runs in this process."""
    torch_xla = sys.modules.get("torch_xla")
    core = sys.modules.get("torch_xla.core.xla_model")
    if core is None or torch_xla is None or not torch_xla._XLAC._xla_runtime_is_initialized():
        return None
    return core


def seed_everything(seed: int | None = None, workers: bool = False, verbose: bool = True) -> int:
    """Seed Python's, NumPy's and PyTorch's (every device's) global random generators.

    Launched processes get the seed through the environment variables ``PL_GLOBAL_SEED`` and ``PL_SEED_WORKERS``.

    Args:
        seed: From 0 to 4294967295. By default ``PL_GLOBAL_SEED``, or 0 with a warning where that is not set.
        workers: Also seed the worker processes of data loaders, each rank and worker differently.
        verbose: Print the seed, and warn where none was given.

    Returns:
        The seed that was set.

    Raises:
        MisconfigurationException: The seed is no integer, or out of range.
    """
    if seed is None:
        source, number = "PL_GLOBAL_SEED", global_seed()
        if verbose and "PL_GLOBAL_SEED" not in os.environ:
            rank_zero_warn("No seed found, seed set to 0: none was given, and PL_GLOBAL_SEED is not set.")
    else:
        source, number = "seed", _integer("seed", seed)
    if not 0 <= number <= _MAX_SEED:
        raise MisconfigurationException(f"{source}={number} is out of range. Give one from 0 to {_MAX_SEED}.")
    if verbose:
        rank_zero_info(f"Seed set to {number}")
    os.environ["PL_GLOBAL_SEED"] = str(number)
    os.environ["PL_SEED_WORKERS"] = str(int(workers))
    random.seed(number)
    torch.manual_seed(number)
    if (xla := running_xla()) is not None:
        xla.set_rng_state(number)
    if (numpy := numpy_if_imported()) is not None:
        numpy.random.seed(number)
    return number


def global_seed() -> int:
    """The seed in ``PL_GLOBAL_SEED``, which :func:`seed_everything` sets; 0 where it is not set.

    Raises:
        MisconfigurationException: It is no integer.
    """
    return _integer("PL_GLOBAL_SEED", os.environ.get("PL_GLOBAL_SEED", 0))


def _integer(source: str, value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise MisconfigurationException(f"{source}={value!r} is no integer. Give one from 0 to {_MAX_SEED}.") from None


def reset_seed() -> None:
    """Set the seed of the last :func:`seed_everything` again; nothing happens if there was none."""
    if "PL_GLOBAL_SEED" in os.environ:
        seed_everything(workers=os.environ.get("PL_SEED_WORKERS", "0") not in ("", "0"), verbose=False)


def worker_init_function(worker_id: int, rank: int | None = None) -> None:
    """A data loader's ``worker_init_fn`` that gives each worker of each rank random numbers of its own.

    Without it, ranks that start from one seed draw the same augmentations. The numbers still depend on the base seed of
    the loader, and so change from epoch to epoch.

    Args:
        worker_id: The index of the worker.
        rank: The global rank; by default ``rank_zero_only.rank``.
    """
    rank = getattr(rank_zero_only, "rank", 0) if rank is None else rank
    base = torch.initial_seed() - worker_id
    digest = hashlib.blake2b(f"{base}/{rank}/{worker_id}".encode(), digest_size=32).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little"))
    random.seed(digest[8:16])
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed([int.from_bytes(digest[i : i + 4], "little") for i in range(16, 32, 4)])
