"""Norms of gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from treadle_fabric import MisconfigurationException, with_plain_names

__all__ = ["grad_norm"]


def grad_norm(module: nn.Module, norm_type: float | str, group_separator: str = "/") -> dict[str, Tensor]:
    """The p-norm of each parameter's gradient, and of all of them as one vector.

    Args:
        module: Its parameters that have a gradient are measured.
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
    norms = {
        f"grad_{p}_norm{group_separator}{name}": torch.linalg.vector_norm(_entries(gradient.detach()), p)
        for name, gradient in gradients.items()
    }
    device = next(iter(norms.values())).device
    # ||(||x||_p, ||y||_p)||_p is ||(x, y)||_p
    norms[f"grad_{p}_norm_total"] = torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms.values()]), p)
    return norms


def _entries(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient
