"""Norms of gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from treadle_fabric import MisconfigurationException, with_plain_names
from treadle_fabric.strategies import norms

__all__ = ["grad_norm"]


def grad_norm(module: nn.Module, norm_type: float | str, group_separator: str = "/") -> dict[str, Tensor]:
    """The p-norm of each parameter's gradient, and of all of them as one vector.

    Args:
        module: Its parameters that have a gradient are measured, whole ones and those of which ranks hold parts; every
            rank calls this.
        norm_type: p > 0, or ``"inf"``.
        group_separator: Between the norm's name and the parameter's.

    Returns:
        ``grad_{p}_norm/{parameter}`` and ``grad_{p}_norm_total`` as scalar tensors, ready for ``self.log_dict``; empty
        if there are no gradients.

    Raises:
        MisconfigurationException: If ``norm_type`` is not positive.
    """
    p = float(norm_type)
    if not p > 0:
        raise MisconfigurationException(f"norm_type={norm_type!r} is not a positive number, nor 'inf'.")
    named = with_plain_names(module, module.named_parameters())
    gradients = {name: param.grad for name, param in named if param.grad is not None}
    if not gradients:
        return {}
    each = norms(gradients.values(), p)
    found = {f"grad_{p}_norm{group_separator}{name}": norm for name, norm in zip(gradients, each, strict=True)}
    found[f"grad_{p}_norm_total"] = torch.linalg.vector_norm(each, p)  # ||(||x||_p, ||y||_p)||_p is ||(x, y)||_p
    return found
