"""The running average of a module's weights, and its exchange with the weights of training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn

from treadle_fabric import check_flag, name_in, plain_name, rank_zero_warn, with_plain_names
from treadle_fabric.checkpoint import is_sharded_tensor, own_part, placed_like, sharded_like
from treadle_fabric.strategies import is_elsewhere

__all__ = ["AveragedWeights", "MultiAverage"]

MultiAverage: TypeAlias = Callable[[Any, Any, Any], None]
"""Updates the tensors of the first list by those of the second, given how many models were averaged so far."""
_CONVERTED: Final = 1 << 26
"""The most numbers that are converted at a time where the average is on another device or of another dtype."""


class AveragedWeights:
    """The average of a module's parameters and, if asked for, of its persistent buffers.

    What is no floating-point number, such as the counters of batch norm, is not averaged but copied. Weights of 16 bits
    are averaged in 32 bits, in which small changes are not lost. What is averaged is found by name at each update, so
    that a parameter that comes later joins with its present value. Of a weight of which ranks hold parts, each rank
    averages its part; rules work on each number of a tensor alone.

    :class:`torch.optim.swa_utils.AveragedModel` would copy the whole module, truncate averages of integers, and let the
    host wait for the device at each update.

    Args:
        average: The rule of the average, such as :func:`torch.optim.swa_utils.get_ema_multi_avg_fn` returns it.
        device: Where the average is kept. Default: where the weights are.
        use_buffers: Whether buffers are averaged. Otherwise an exchange leaves them as they are.
    """

    def __init__(self, average: MultiAverage, device: torch.device | None, use_buffers: bool) -> None:
        check_flag("use_buffers", use_buffers)
        self._rule, self._device, self._use_buffers = average, device, use_buffers
        self._average: dict[str, Tensor] = {}
        self._training: dict[str, Tensor] = {}  # what the exchange has replaced
        self.count = 0
        """The number of updates; while it is 0, there is no average."""

    @property
    def exchanged(self) -> bool:
        """Whether the module has the averaged weights, or some of them, in the place of its own."""
        return bool(self._training)

    def forget(self) -> None:
        """Begin anew, with the weights that the module has now."""
        self._average, self._training, self.count = {}, {}, 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take the weights of ``module`` into the average; the first ones become the average."""
        groups: dict[Any, list[tuple[Tensor, Tensor]]] = {}
        for name, whole in self._tensors(module):
            tensor = own_part(whole)
            average = self._average.get(name)
            if average is None:
                self._average[name] = self._place(whole)
            elif self.count and (tensor.is_floating_point() or tensor.is_complex()):
                key = average.device, average.dtype, tensor.device, tensor.dtype
                groups.setdefault(key, []).append((average, tensor))
            else:
                average.copy_(tensor)
        count = torch.tensor(self.count)  # on the CPU: its use does not wait for a device
        for key, pairs in groups.items():
            for part in (pairs,) if key[:2] == key[2:] else _in_parts(pairs):
                averages = [average for average, _ in part]
                self._rule(averages, [tensor.to(key[0], key[1]) for _, tensor in part], count)
        self.count += 1

    @torch.no_grad()
    def exchange(self, module: nn.Module) -> None:
        """Give ``module`` the averaged weights and keep its own; nothing happens before the first update.

        What is replaced is kept first, so that :meth:`restore` undoes an exchange that ended in the middle.
        """
        if self.exchanged:
            return
        for name, whole in self._tensors(module):
            if (average := self._average.get(name)) is not None:
                tensor = own_part(whole)
                self._training[name] = tensor.to(average.device, copy=True)
                tensor.copy_(average)

    @torch.no_grad()
    def restore(self, module: nn.Module) -> None:
        """Give ``module`` back the weights that :meth:`exchange` replaced."""
        if self._training:
            for name, tensor in self._tensors(module):
                if (kept := self._training.get(name)) is not None:
                    own_part(tensor).copy_(kept)
            self._training = {}

    def is_in(self, module: nn.Module) -> bool:
        """Whether ``module`` has exactly the averaged weights, this rank's parts; waits for the device."""
        return all(
            torch.equal(own := own_part(tensor), average.to(own))
            for name, tensor in self._tensors(module)
            if (average := self._average.get(name)) is not None
        )

    def keep_weights(self) -> None:
        """Let the weights that the module has now be those of training."""
        self._training = {}

    @torch.no_grad()
    def take_buffers(self, module: nn.Module) -> None:
        """Let the buffers of ``module`` be the averaged ones."""
        for name, tensor in self._buffers(module):
            if name in self._average:
                self._average[name].copy_(own_part(tensor))

    @torch.no_grad()
    def share_buffers(self, module: nn.Module, broadcast: Callable[[Any], Any]) -> None:
        """Let the ranks have one rank's averages of buffers, which differ between ranks, and of which a checkpoint has
        those of the first rank with this part of the model.

        Args:
            module: The module.
            broadcast: Gives all ranks, which call it, what one of them has.
        """
        whole = (name for name, buffer in self._buffers(module) if not is_sharded_tensor(buffer))
        mine = {name: average for name in whole if (average := self._average.get(name)) is not None}
        if any(True for _ in module.buffers()):
            for name, value in broadcast({name: average.cpu() for name, average in mine.items()}).items():
                if name in mine:
                    mine[name].copy_(value)

    def saved(self, module: nn.Module, state: Mapping[str, Any]) -> tuple[Any, Any]:
        """Make two state dicts of one.

        Args:
            module: The module.
            state: Its state dict now, under plain names.

        Returns:
            The state dict with the averaged weights, and the one with the weights of training.
        """
        names, tensors = self._names_in(module, state), dict(self._tensors(module))
        copies = {n for n, p in with_plain_names(module, module.named_parameters()) if is_elsewhere(p)}
        averages, trained = (
            {name: sharded_like(part, tensors[name]) for name, part in parts.items() if name in tensors.keys() - copies}
            for parts in (self._average, self._training)
        )
        return _replaced(state, names, averages), _replaced(state, names, trained)

    @torch.no_grad()
    def load(self, module: nn.Module, state: Mapping[str, Any], count: int) -> None:
        """Take over an average.

        Args:
            module: The module, with the weights of training.
            state: Its state dict with the averaged weights.
            count: The number of models in the average.
        """
        self.forget()
        found = {name: state[key] for key, name in self._names_in(module, state).items()}
        tensors = dict(self._tensors(module))
        self._average = {name: self._place(tensor, found.get(name)) for name, tensor in tensors.items()}
        self.count = count
        if missing := sorted(tensors.keys() - found.keys()):
            rank_zero_warn(
                f"The checkpoint has no averages of {', '.join(missing[:5])}: they begin with the present values."
            )

    def _place(self, tensor: Tensor, value: Tensor | None = None) -> Tensor:
        """Copy this rank's part of a tensor to where its average is kept; ``value``, where given, in its place."""
        dtype = torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
        own = own_part(tensor)
        device = own.device if self._device is None else self._device
        if value is not None:
            own = own_part(placed_like(value, tensor))
        return own.to(device, dtype, copy=True)

    def _tensors(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The tensors that are averaged, each once, detached, and with its plain name.

        One on the meta device is another rank's, as those of the other stages of a pipeline.
        """
        for name, parameter in with_plain_names(module, module.named_parameters()):
            if not parameter.is_meta:
                yield name, parameter.detach()
        if self._use_buffers:
            yield from self._buffers(module)

    def _buffers(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        seen: set[int] = set()
        for prefix, owner in module.named_modules():
            for name, buffer in owner.named_buffers(recurse=False):
                if name not in owner._non_persistent_buffers_set and id(buffer) not in seen and not buffer.is_meta:
                    seen.add(id(buffer))
                    yield plain_name(module, f"{prefix}.{name}" if prefix else name), buffer.detach()

    def _names_in(self, module: nn.Module, state: Mapping[str, Any]) -> dict[str, str]:
        """The keys of a state dict, with the names that their tensors have here: a tied weight has several keys.

        A hook of the module's may have given an entry another key; then the entry is known by its memory.
        """
        tensors = dict(self._tensors(module))
        alias = {_place_of(tensor): name for name, tensor in tensors.items() if own_part(tensor).numel()}
        names = {name: name for name in tensors}
        for name, parameter in with_plain_names(module, module.named_parameters(remove_duplicate=False)):
            names.setdefault(name, alias.get(_place_of(parameter), name))
        found: dict[str, str] = {}
        for key, value in state.items():
            if isinstance(value, Tensor):
                name = names.get(plain_name(module, name_in(module, key))) or alias.get(_place_of(value), "")
                if name in tensors and tensors[name].shape == value.shape:
                    found[key] = name
        return found


def _place_of(tensor: Tensor) -> tuple[Any, ...]:
    tensor = own_part(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _replaced(state: Mapping[str, Any], names: Mapping[str, str], values: Mapping[str, Tensor]) -> Any:
    """A copy of a state dict in which tensors have other values."""
    other: Any = copy.copy(state)
    for key, name in names.items():
        if name in values:
            other[key] = values[name]
    return other


def _in_parts(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Split what has to be converted, so that its copies are never all there at once."""
    part: list[tuple[Tensor, Tensor]] = []
    numbers = 0
    for pair in pairs:
        part.append(pair)
        numbers += pair[1].numel()
        if numbers >= _CONVERTED:
            yield part
            part, numbers = [], 0
    if part:
        yield part
