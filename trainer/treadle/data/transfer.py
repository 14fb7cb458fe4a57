"""Move batches to the device, through the transfer hooks of the module or data module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from treadle.data.lookahead import Transfer
from treadle.module import LightningDataModule, LightningModule
from treadle.module.hooks import DataHooks
from treadle.module.overriding import check_signature, overrides
from treadle_fabric import batch_mover, move_data_to_device, rank_zero_warn

__all__ = ["make_transfer"]


def make_transfer(
    module: LightningModule, datamodule: LightningDataModule | None, device: torch.device, run: Callable[..., Any]
) -> Transfer:
    """Make the function that moves a batch: directly, or through the transfer hooks that the user overrode.

    Args:
        module: May override the hooks.
        datamodule: May override the hooks, too, and is asked first.
        device: The device to move to.
        run: Calls a function under the name of its hook.
    """
    chosen: dict[str, Callable[..., Any]] = {}
    for name in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"):
        for owner in (datamodule, module):
            if owner is not None and overrides(owner, name, DataHooks):
                chosen[name] = getattr(owner, name)
                arguments = (
                    ("batch", "device", "dataloader_idx")
                    if name.startswith("transfer")
                    else ("batch", "dataloader_idx")
                )
                check_signature(chosen[name], name, arguments, type(owner).__qualname__)
                break
    _tell_of_owners(chosen, module, datamodule)
    if not chosen:
        mover = batch_mover(device)
        return lambda batch, dataloader_idx: mover(batch)
    before, move, after = (
        chosen.get(n) for n in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    )

    def transfer(batch: Any, dataloader_idx: int) -> Any:
        if before is not None:
            batch = run("on_before_batch_transfer", before, batch, dataloader_idx)
        if move is not None:
            batch = run("transfer_batch_to_device", move, batch, device, dataloader_idx)
        else:
            batch = move_data_to_device(batch, device)
        if after is not None:
            batch = run("on_after_batch_transfer", after, batch, dataloader_idx)
        return batch

    return transfer


def _tell_of_owners(
    chosen: dict[str, Callable[..., Any]], module: LightningModule, datamodule: LightningDataModule | None
) -> None:
    """Say whose hook runs where module and data module each could have it."""
    for name in chosen if datamodule is not None else ():
        if overrides(module, name, DataHooks) and overrides(datamodule, name, DataHooks):
            rank_zero_warn(
                f"You have overridden `{name}` in both `LightningModule` and `LightningDataModule`: that of"
                f" {type(datamodule).__qualname__} runs. Remove one of them."
            )


def stay(batch: Any, dataloader_idx: int) -> Any:
    """The transfer of a batch that stays where it is."""
    return batch
