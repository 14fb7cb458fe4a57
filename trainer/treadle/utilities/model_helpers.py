"""What reads a module's class, where users of a trainer look for it."""

from __future__ import annotations

import importlib
from typing import Any

from torch.nn import Module

from treadle.run.dispatch import is_overridden
from treadle_fabric import MissingPackageError

__all__ = ["get_torchvision_model", "is_overridden"]


def get_torchvision_model(model_name: str, **kwargs: Any) -> Module:
    """Make a model of torchvision by its name.

    Args:
        model_name: "resnet18", say.
        **kwargs: As for ``torchvision.models.get_model``.

    Raises:
        MissingPackageError: torchvision is not installed.
    """
    if importlib.util.find_spec("torchvision") is None:
        raise MissingPackageError("get_torchvision_model needs torchvision: `pip install torchvision`.")
    model: Module = importlib.import_module("torchvision.models").get_model(model_name, **kwargs)
    return model
