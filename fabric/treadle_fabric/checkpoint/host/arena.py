"""One block of host memory, into which the storages of a state are copied, and those of the next state again.

A block of its own for each storage would be rounded up to a power of two where it is pinned, and torch never gives
pinned memory back: what is kept would be up to twice the state.
"""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Sequence
from itertools import accumulate
from typing import Final

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from treadle_fabric.rank_zero import rank_zero_warn

__all__ = ["Arena"]

_ALIGNED: Final = 64
"""Bytes; the address of a storage is a multiple, as that of memory which torch allocates."""
_SPARE: Final = 64
"""A block has one part in so many more than it needs, so that a state that grows by little gets no new block."""
_PORTABLE: Final = 1
"""cudaHostRegisterPortable: pinned for all devices."""


class Arena:
    """Host memory that is used again; it is pinned where what is copied comes from a CUDA device."""

    def __init__(self) -> None:
        self._block: Tensor | None = None
        self._pinned = False
        self._unpin: weakref.finalize | None = None  # type: ignore[type-arg]
        self._given: list[StorageWeakRef] = []

    @property
    def nbytes(self) -> int:
        """The size of the block."""
        return 0 if self._block is None else self._block.nbytes

    def copy(
        self, storages: Sequence[torch.UntypedStorage], tensors: Sequence[Tensor] = ()
    ) -> tuple[list[torch.UntypedStorage], list[Tensor]]:
        """Copy storages and tensors, each into its part of the block; returns when the copies are there.

        Of a tensor no more is copied than its own numbers, whatever else is in its storage. The copies are overwritten
        by the next call, unless somebody still refers to one of them: then that call takes a new block.
        """
        devices = {*(storage.device for storage in storages), *(tensor.device for tensor in tensors)}
        devices = {device for device in devices if device.type == "cuda"}
        sizes = [*(storage.nbytes() for storage in storages), *(tensor.nbytes for tensor in tensors)]
        ends = list(accumulate((-(-size // _ALIGNED) * _ALIGNED for size in sizes), initial=0))
        whole = self._provide(ends[-1], pinned=bool(devices)).untyped_storage()
        nothing = torch.empty(0, dtype=torch.uint8, device="cpu")
        copies = []
        for start, storage in zip(ends, storages, strict=False):
            size = storage.nbytes()
            # an empty part would have the address of the next storage, and torch.save would take both for one
            copy = whole[start : start + size] if size else nothing.clone().untyped_storage()
            copy.copy_(storage, non_blocking=storage.device.type == "cuda")
            copies.append(copy)
        values = []
        for start, tensor in zip(ends[len(storages) :], tensors, strict=False):
            value = torch.empty(0, dtype=tensor.dtype, device="cpu")
            value.set_(whole[start : start + tensor.nbytes], 0, tensor.shape)  # type: ignore[call-overload]
            value.copy_(tensor, non_blocking=tensor.device.type == "cuda")
            values.append(value)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        parts = [*copies, *(value.untyped_storage() for value in values)]
        self._given = [StorageWeakRef(part) for part in parts]  # type: ignore[no-untyped-call]
        return copies, values

    def close(self) -> None:
        """Give the memory back; copies that somebody still refers to stay."""
        if self._unpin is not None:
            self._unpin()
        self._block, self._pinned, self._unpin, self._given = None, False, None, []

    def _provide(self, size: int, *, pinned: bool) -> Tensor:
        """The block, of this size at least, and pinned if asked for; nobody refers to a part of it."""
        referred = self._is_referred_to()
        if referred:
            gc.collect(1)  # torch.save of torch 2.9 leaves what it saved in a cycle
            referred = self._is_referred_to()
        if self._block is None or self._block.nbytes < size or (pinned and not self._pinned) or referred:
            self.close()  # before the new one is there: no more than one is kept
            block = torch.empty(size + size // _SPARE, dtype=torch.uint8, device="cpu")
            self._block, self._pinned = block, pinned
            if pinned and block.nbytes:
                self._unpin = _pin(block)
        return self._block

    def _is_referred_to(self) -> bool:
        return any(not weak.expired() for weak in self._given)  # type: ignore[no-untyped-call]


def _pin(block: Tensor) -> weakref.finalize | None:  # type: ignore[type-arg]
    """Pin memory to its exact size; what ends that is called, too, when nobody refers to ``block`` any more."""
    error = int(torch.cuda.cudart().cudaHostRegister(block.data_ptr(), block.nbytes, _PORTABLE))  # type: ignore[no-untyped-call]
    if error:
        rank_zero_warn(
            f"{block.nbytes / 1e9:.1f} GB of host memory could not be pinned (CUDA error {error}), so copying the state"
            " for a save in the background takes longer. Raise the limit of locked memory (`ulimit -l`)."
        )
        _forget_error()
        return None
    unpin = weakref.finalize(block, _unpin, block.data_ptr(), os.getpid())
    unpin.atexit = False  # the CUDA runtime may have ended before
    return unpin


def _unpin(address: int, process: int) -> None:
    if os.getpid() == process:  # a forked process has none of the parent's CUDA state
        torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


def _forget_error() -> None:
    """The next check of the CUDA runtime would report the error again, as that of something else."""
    try:
        torch.zeros(1, device="cuda")
    except RuntimeError:
        return
