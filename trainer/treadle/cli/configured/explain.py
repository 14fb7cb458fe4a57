"""Adds to an error of the parser what the user probably meant."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from treadle.callbacks import Callback
from treadle.module import LightningDataModule, LightningModule
from treadle_fabric import near_names
from treadle_fabric.accelerators import Accelerator
from treadle_fabric.loggers import Logger
from treadle_fabric.strategies import Strategy

__all__ = ["explain"]


def explain(message: str, parser: Any) -> str:
    return message
