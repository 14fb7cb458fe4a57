"""Tensors that an engine keeps in files of its own beside the rest of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from treadle_fabric.errors import CheckpointError

__all__ = ["EngineWriter", "KeptTensor", "are_kept", "kept_by_engines"]

_kept: ContextVar[bool] = ContextVar("treadle_kept_by_engines", default=False)

_LOOKS: Final = frozenset(
    "size dim numel nelement element_size is_floating_point is_complex stride ndimension __len__ __repr__ "
    "__hash__ is_contiguous storage_offset is_conj is_neg".split()
)
"""What looks at the form of a tensor only."""


@contextmanager
def kept_by_engines() -> Iterator[None]:
    """A state that is made inside is saved at once: tensors that an engine writes itself are marked, and not gathered.

    In the place of each is then a :class:`KeptTensor`, if checkpoints are folders.
    """
    token = _kept.set(True)
    try:
        yield
    finally:
        _kept.reset(token)


def are_kept() -> bool:
    """Whether this is inside of :func:`kept_by_engines`."""
    return _kept.get()


class EngineWriter(Protocol):
    """Writes the files of an engine into a checkpoint folder."""

    def write(self, destination: Any) -> Mapping[str, tuple[int, int]]:
        """Write the files of this rank; every rank calls this.

        Args:
            destination: A :class:`Destination`.

        Returns:
            Size and CRC-32 of each file, by its name in the folder.
        """


class KeptTensor(Tensor):
    """A tensor without content, in the place of one that an engine writes in its own format.

    Saved, a name takes its place by which the content is found in the engine's files. It lies on the meta device.

    Args:
        writer: Writes the engine's files.
        key: The name, the same on every rank.
        shape: That of the whole tensor.
        dtype: As it is kept.
    """

    writer: EngineWriter
    key: str

    @staticmethod
    def __new__(cls, writer: EngineWriter, key: str, shape: Sequence[int], dtype: torch.dtype) -> KeptTensor:
        found: KeptTensor = torch.empty(tuple(shape), dtype=dtype, device="meta").as_subclass(cls)
        found.writer, found.key = writer, key
        return found

    def __init__(self, writer: EngineWriter, key: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("detach", "__get__", "data"):
            found = (
                args[0] if name == "detach" else torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})
            )
            return found
        if name in _LOOKS:
            return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})
        raise CheckpointError(
            f"A hook called {name!r} on a tensor of a state that is sharded by DeepSpeed, and its values are not here: "
            "each rank has a part. Change the model before it is saved, or the file after `treadle-fabric consolidate`."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> KeptTensor:
        return self
