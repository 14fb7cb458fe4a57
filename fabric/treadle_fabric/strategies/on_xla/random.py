"""Random numbers that devices of XLA draw."""

from __future__ import annotations

import torch

__all__ = ["seed_device"]


def seed_device() -> None:
    """Seed the device of this process as torch's generator of the host was seeded; torch does not reach it."""
    import torch_xla.core.xla_model as xm  # an extra

    xm.set_rng_state(torch.initial_seed() % 2**31)
