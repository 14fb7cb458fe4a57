"""A device that is not there, and a count of the times that the host waits for it.

:class:`CountedDevice` is a context. In it, tensors that are sent to :data:`DEVICE` (or made there) are
:class:`DeviceTensor` objects: their numbers are in the memory of the CPU, they only say that they are elsewhere. Each
operation on them goes through a dispatch mode, which counts the operations for which a host waits for a real device::

    with CountedDevice() as device:
        trainer = Trainer(accelerator=CountedAccelerator(), devices=1, ...)
        trainer.fit(model, loader)
    assert device.counts() == {"read": 4}

What counts as a wait:

"read"     a number goes to the host: ``item()``, ``float(t)``, ``int(t)``, ``bool(t)``, ``if t > 0``, ``tolist()``
"fetch"    a tensor is copied to the host, not ``non_blocking``
"send"     a tensor is copied to the device, not ``non_blocking``: the copy comes after all that is queued
"shape"    the shape of the result depends on the values: ``nonzero``, ``unique``, indexing by a mask
"compare"  ``torch.equal``
"await"    ``torch.cuda.synchronize()``
"event"    an event is awaited: the host waits for what was queued before the event, not for all that is queued

What is not modelled: streams, pinned memory (copies that are ``non_blocking`` never wait), kernels that wait inside.
A tensor of the CPU that has dimensions, in an operation together with tensors of the device, is an error as on a GPU.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from treadle_fabric.accelerators import Accelerator

__all__ = ["DEVICE", "CountedAccelerator", "CountedDevice", "DeviceTensor", "Wait", "elsewhere"]

DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten
_READS = {aten._local_scalar_dense, aten.item}
_SHAPES = {
    aten.nonzero, aten.masked_select, aten.unique_consecutive, aten.unique_dim, aten._unique, aten._unique2,
    aten.bincount, aten.repeat_interleave, aten.argwhere,
}  # fmt: skip
_COPIES = {aten._to_copy, aten.copy_, aten._foreach_copy_}
_OF_DTYPES = {torch.bool, torch.uint8}


class Wait(NamedTuple):
    """One wait: its kind, what :attr:`CountedDevice.moment` gave, and the lines that led to it, from the innermost."""

    kind: str
    moment: Any
    stack: tuple[str, ...]

    def passes(self, file: str) -> bool:
        """Return whether a line of the file, given by the end of its path, led to the wait."""
        return any(line.rpartition(":")[0].endswith(file) for line in self.stack)


class CountedDevice(TorchDispatchMode):
    """While entered, the device is there, and waits for it are counted.

    Attributes:
        waits: the waits so far, in their order.
        moment: gives what each wait remembers, such as the number of the step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []
        self.moment: Callable[[], Any] = lambda: None
        self._patches = [
            mock.patch("torch.cuda._lazy_init", lambda: None),
            mock.patch("torch.cuda.synchronize", lambda *_: self.note("await")),
            mock.patch("torch.Event", _Event),
            mock.patch("torch.cuda.Event", _Event),
            mock.patch("torch._C._group_tensors_by_device_and_dtype", _grouped),
            # `module.to(device)` makes new parameters: of the old ones only the storage would be replaced
            mock.patch("torch.__future__._overwrite_module_params_on_conversion", True),
        ]

    def counts(self) -> dict[str, int]:
        """Return the number of waits of each kind."""
        return dict(Counter(wait.kind for wait in self.waits))

    def note(self, kind: str) -> None:
        """Count a wait."""
        frame, stack = sys._getframe(1), []
        while frame is not None:
            if frame.f_code.co_filename != __file__:
                stack.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
            frame = frame.f_back  # type: ignore[assignment]
        self.waits.append(Wait(kind, self.moment(), tuple(stack)))

    def __enter__(self) -> CountedDevice:
        for patch in self._patches:
            patch.start()
        super().__enter__()
        _devices.append(self)
        return self

    def __exit__(self, *exception: Any) -> None:
        _devices.remove(self)
        super().__exit__(*exception)
        for patch in self._patches:
            patch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


_devices: list[CountedDevice] = []


_group = torch._C._group_tensors_by_device_and_dtype  # type: ignore[attr-defined]


def _grouped(lists: Any, with_indices: bool = False) -> Any:
    """Group tensors as torch does, which does not ask them in Python where they are."""
    groups = _group(lists, with_indices)
    return {(DEVICE if _is_there(g[0][0][0]) else key[0], key[1]): g for key, g in groups.items()}


class _Event:
    """An event of the device; the device has always come past it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _note("event")


def _note(kind: str) -> None:
    if _devices:
        _devices[-1].note(kind)


class DeviceTensor(Tensor):
    """A tensor that says that it is on :data:`DEVICE`."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> DeviceTensor:
        made: DeviceTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            requires_grad=False,
        )
        made.numbers = numbers
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    is_cpu = property(lambda self: False)
    is_cuda = property(lambda self: True)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(
            *args, **{k: v for k, v in kwargs.items() if k != "copy"}
        )
        moved: Any = self if dtype is None else Tensor.to(self, dtype)
        if device is None or device.type != "cpu":
            return moved.clone() if kwargs.get("copy") and moved is self else moved
        if not non_blocking:
            _note("fetch")
        return moved.detach().numbers.clone()

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        moved: Tensor = self.to("cpu")
        return moved

    def cuda(self, *args: Any, **kwargs: Any) -> DeviceTensor:
        return self

    def tolist(self) -> Any:
        _note("read")
        return self.detach().numbers.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __deepcopy__(self, memo: dict[int, Any]) -> DeviceTensor:
        copy = self.detach().clone()
        copy.__dict__.update({k: v for k, v in self.__dict__.items() if k != "numbers"})
        memo[id(self)] = copy.requires_grad_(self.requires_grad)
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        _note("fetch")
        return self.detach().numbers.__reduce_ex__(protocol)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.detach().numbers})"


def elsewhere(tensor: Tensor) -> DeviceTensor:
    """Put a tensor on the device, without a count."""
    return DeviceTensor(tensor.detach().clone())


def _is_there(value: Any) -> bool:
    return isinstance(value, DeviceTensor)


def _here(value: Any) -> Any:
    return value.numbers if isinstance(value, DeviceTensor) else value


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the numbers; count it if a host would wait; its results are on the device if it was."""
    packet = func.overloadpacket
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = any(map(_is_there, leaves))
    wanted = kwargs.get("device")
    if wanted is not None:
        kwargs = {**kwargs, "device": "cpu"}
    goes = wanted is not None and torch.device(wanted).type != "cpu"
    if packet in _COPIES:
        _count_copy(packet, args, kwargs, there, goes)
    elif there:
        if packet in _READS:
            _note("read")
        elif packet is aten.equal:
            _note("compare")
        elif packet in _SHAPES or (packet in (aten.index, aten.index_put_, aten.index_put) and _by_mask(args)):
            _note("shape")
        if packet is not aten.lift_fresh and (stray := [x for x in leaves if not _is_there(x) and x.dim()]):
            raise RuntimeError(
                f"{func}: expected all tensors to be on the same device, found {DEVICE} and a tensor of shape"
                f" {tuple(stray[0].shape)} on the CPU"
            )
    result = func(*tree_map(_here, args), **tree_map(_here, kwargs))
    if func._schema.is_mutable and not func._schema.returns:
        return result
    if any(alias is not None and alias.is_write for alias in (r.alias_info for r in func._schema.returns)):
        return kwargs["out"] if "out" in kwargs else args[0]  # changed in place
    if goes or there:  # out of C++, where they seem to be on the CPU, tensors of the device are copied to the "CPU"
        return tree_map(lambda x: DeviceTensor(x) if isinstance(x, Tensor) else x, result)
    return result


def _count_copy(packet: Any, args: Any, kwargs: dict[str, Any], there: bool, goes: bool) -> None:
    non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
    if packet is aten._to_copy:
        if goes and not there and not non_blocking:  # for the way back, see `DeviceTensor.to`
            _note("send")
        return
    pairs = zip(args[0], args[1], strict=True) if packet is aten._foreach_copy_ else [(args[0], args[1])]
    for target, source in pairs:
        if _is_there(target) != _is_there(source) and not non_blocking:
            _note("send" if _is_there(target) else "fetch")


def _by_mask(args: Any) -> bool:
    return any(isinstance(x, Tensor) and x.dtype in _OF_DTYPES for x in tree_leaves(args[1]))


class CountedAccelerator(Accelerator):
    """An accelerator with one device, :data:`DEVICE`."""

    @staticmethod
    def name() -> str:
        return "counted"

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return 1

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [DEVICE]

    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    def get_device_stats(self, device: torch.device | str | int) -> dict[str, Any]:
        return {}
