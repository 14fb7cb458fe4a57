"""Models of torchvision, which need not be installed."""

from __future__ import annotations

import importlib
from typing import Any

from torch.nn import Module

from treadle_fabric import MissingPackageError

__all__ = ["get_torchvision_model"]


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
