"""Values for a module from the meta device: drawn one module at a time, of which each rank keeps its part."""

from __future__ import annotations

import functools
import inspect
import mmap
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.utils._pytree import tree_map_only

from treadle_fabric.checkpoint import own_part
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.precision import Precision
from treadle_fabric.randomness import own_rng_states, same_rng_states, set_rng_states
from treadle_fabric.rank_zero import rank_zero_info
from treadle_fabric.strategies.unwrapping import plain_name, uncompiled, user_module, with_plain_names

__all__ = ["give_values", "materialize"]

_INITIALIZERS = ("reset_parameters", "_reset_parameters", "init_weights", "_init_weights")
"""Methods without arguments that give a module its values, under the names that modules have for it."""
_MAX_NAMED = 10
_MAPPED = 1 << 20  # bytes


def materialize(
    module: Module,
    device: torch.device,
    keep_on: torch.device | None = None,
    broadcast: Callable[[Any], Any] | None = None,
) -> list[str]:
    """Give the parameters and buffers that are on the meta device memory and values, in place.

    A module is called in the order in which modules are made, submodules before what holds them: ``reset_parameters``
    (or ``_reset_parameters``, ``init_weights``, ``_init_weights``) without arguments, and ``_init_weights(submodule)``
    for each submodule where a module has such a method. In a method, a parameter is whole from its first use to the
    end of the method, and then this rank's part of it is kept. So a rank needs memory for its parts and for what one
    method writes; and with the same seed the values are bit for bit those of the module made without the meta device,
    as far as its constructors give values by these methods.

    Values that are there are kept. Tied parameters stay tied. All ranks draw with the random state of rank 0.

    Args:
        module: The user's module; its parameters are whole, or DTensors after ``fully_shard``.
        device: Where values are drawn, and where they are kept.
        keep_on: Where parameters are kept, if elsewhere (the CPU, if parameters are offloaded).
        broadcast: Returns what rank 0 has. Default: this is the only rank.

    Returns:
        The names of parameters and buffers for which the module has no such method. They are NaN (integers: their
        lowest value), until a checkpoint is loaded: see :func:`give_values`.

    Raises:
        MisconfigurationException: A buffer gets no value that no checkpoint has either, because it is not persistent.
    """
    own = user_module(module)
    mine = own_rng_states()
    first = mine if broadcast is None else broadcast(mine)
    set_rng_states(first)
    drawing = _Drawing(own, device, keep_on or device)
    try:
        with torch.no_grad(), device:
            drawing.visit(own)
        without = drawing.fill_missing()
    finally:
        drawing.finish()
    if not same_rng_states(mine, first):
        set_rng_states(mine)  # this rank had random numbers of its own, and goes on with them
    return without


class _Drawing:
    """A module whose tensors are stand-ins, which become whole where a method uses them."""

    def __init__(self, module: Module, device: torch.device, keep_on: torch.device) -> None:
        self._module = module
        self._open: list[_Place] = []  # those that the method of now has used
        self._places: dict[int, _Place] = {}  # by the tensor's id
        self._by_owner: dict[int, list[tuple[dict[str, Any], str, _Place]]] = {}
        self._visited: set[int] = set()
        for owner in module.modules():
            mine = self._by_owner.setdefault(id(owner), [])
            for entries in cast("tuple[dict[str, Any], ...]", (owner._parameters, owner._buffers)):
                for key, tensor in entries.items():
                    if tensor is not None:
                        place = self._places.get(id(tensor))
                        if place is None:
                            place = self._places[id(tensor)] = _Place(tensor, device, keep_on, self._open)
                        mine.append((entries, key, place))
        for mine in self._by_owner.values():
            for entries, key, place in mine:
                entries[key] = place.stand_in

    def visit(self, module: Module) -> bool:
        """Give the tensors in a module values, submodules first; returns whether some had none."""
        if id(module) in self._visited:
            return False
        self._visited.add(id(module))
        needs = any(not place.given for _, _, place in self._by_owner.get(id(module), ()))
        for child in module.children():
            needs |= self.visit(uncompiled(child))
        if not needs:
            return False
        of_each = _initializer_of_each(module)
        for name in _INITIALIZERS[: 2 if of_each else None]:
            method = getattr(module, name, None)
            if callable(method) and _takes(method, 0):
                self._call(module, method)
                break
        if of_each is not None:
            for each in _children_first(module, set()):
                self._call(each, functools.partial(of_each, each), last=True)
        return True

    def _call(self, module: Module, method: Callable[[], object], last: bool = False) -> None:
        own = {id(place): place for _, _, place in self._by_owner.get(id(module), ())}
        drawn = [] if last else [place for place in own.values() if place.part is not None and not place.given]
        for place in drawn:
            place.given = True  # tied, and drawn by its first module: what this one draws is not kept
        method()
        for owner in module.modules():
            self._take_over(self._by_owner.get(id(owner), []))
        for place in self._open:
            place.close()
        self._open.clear()
        for place in drawn:
            place.given = False

    def _take_over(self, own: list[tuple[dict[str, Any], str, _Place]]) -> None:
        """Where the method put another tensor into a module, take its value."""
        for i, (entries, key, place) in enumerate(own):
            current = entries.get(key)
            if current is place.stand_in or current is None:
                continue
            if isinstance(current, _StandIn):  # tied by the method
                own[i] = (entries, key, current.place)
            else:
                place.take(current)
                entries[key] = place.stand_in

    def fill_missing(self) -> list[str]:
        """Make what has no value NaN; returns its names."""
        missing: list[str] = []
        for owner_name, owner in self._module.named_modules():
            lost = owner._non_persistent_buffers_set
            names = [key for key, value in vars(owner).items() if isinstance(value, Tensor) and value.is_meta]
            names += [k for _, k, place in self._by_owner.get(id(owner), ()) if place.part is None and k in lost]
            if names:
                raise MisconfigurationException(
                    f"{', '.join(_name(self._module, owner_name, key) for key in names)}: made on the meta device, so"
                    f" without values, and no checkpoint has them. Compute them in {type(owner).__name__}"
                    ".reset_parameters(), or make the module in init_module(empty_init=False)."
                )
            for _, key, place in self._by_owner.get(id(owner), ()):
                if place.part is None:
                    place.fill()
                    missing.append(_name(self._module, owner_name, key))
        return missing

    def finish(self) -> None:
        """Register tensors again in the place of stand-ins."""
        for own in self._by_owner.values():
            for entries, key, place in own:
                if key in entries:
                    entries[key] = place.result()


class _Place:
    """A parameter or buffer, in all its places in the module."""

    def __init__(self, tensor: Tensor, device: torch.device, keep_on: torch.device, used: list[_Place]) -> None:
        from torch.distributed.tensor import DTensor  # half a second to import

        self.tensor = tensor
        self.given = not tensor.is_meta
        self.is_sharded = isinstance(tensor, DTensor)
        self.device = device
        self._keep_on = keep_on if self.is_sharded else device
        self._used = used
        self._whole: Tensor | None = None
        self.written = False  # perhaps, since it is whole
        self.part: Tensor | None = None if tensor.is_meta else tensor
        self.stand_in: Tensor = _StandIn(self)
        if isinstance(tensor, Parameter):
            self.stand_in = Parameter(self.stand_in, requires_grad=tensor.requires_grad)
        self._result: Tensor | None = tensor if self.given else None

    def whole(self) -> Tensor:
        """The whole tensor, until :meth:`close`: its values, or memory for them."""
        if self._whole is None:
            self._used.append(self)
            self._whole = self._gathered()
        return self._whole

    def _gathered(self) -> Tensor:
        if self.part is None:
            make = _memory_for if self.is_sharded else _kept_memory_for
            return make(self.tensor, self.device)
        kept: Any = self.result().detach()  # torch 2.9 gathers nothing inside of an operation that requires gradients
        whole: Tensor = kept.full_tensor() if self.is_sharded else kept
        return whole.to(self.device, copy=True)

    def close(self) -> None:
        """Keep this rank's part of the whole tensor, if something was written into it."""
        whole, self._whole = self._whole, None
        if whole is not None and self.written and not self.given:
            self._keep(whole)
        self.written = False

    def take(self, value: Tensor) -> None:
        """Take the value of a tensor that was put into the place of this one."""
        if self.given:
            return
        if isinstance(self.tensor, Parameter):
            if value.shape != self.tensor.shape:
                raise MisconfigurationException(
                    f"An initialization replaced a parameter of shape {tuple(self.tensor.shape)} by one of shape"
                    f" {tuple(value.shape)}: the shapes must be those that the constructor made."
                )
            value = value.to(self.tensor.dtype)
        self._whole = None
        self._keep(value.detach().to(self.device))

    def _keep(self, whole: Tensor) -> None:
        part = whole
        if self.is_sharded:
            sharded: Any = self.tensor
            # as torch's checkpoints find the part of a rank
            from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

            shape, start = compute_local_shape_and_global_offset(sharded.shape, sharded.device_mesh, sharded.placements)
            part = whole[tuple(slice(a, a + n) for a, n in zip(start, shape))]
            if part.numel() < whole.numel():
                part = part.clone(memory_format=torch.contiguous_format)  # lets go of the whole tensor
        self.part, self._result = part.to(self._keep_on), None

    def fill(self) -> None:
        """Values that no initialization draws, of the shape of this rank's part."""
        if self.is_sharded:
            local: Any = self.tensor
            shape = local.to_local().shape
        else:
            shape = self.tensor.shape
        dtype = self.tensor.dtype
        if dtype.is_floating_point or dtype.is_complex:
            value: Any = float("nan")
        else:
            value = True if dtype == torch.bool else torch.iinfo(dtype).min
        self.part = torch.full(shape, value, dtype=dtype, device=self._keep_on)

    def result(self) -> Tensor:
        """The tensor to register in the module: the same object until there is another value."""
        if self._result is None:
            if self.part is None:
                return self.tensor
            self._result = self._registered(self.part)
        return self._result

    def _registered(self, part: Tensor) -> Tensor:
        made: Any = part
        if self.is_sharded:
            from torch.distributed.tensor import DTensor  # heavy

            old: Any = self.tensor
            made = DTensor.from_local(
                part, old.device_mesh, old.placements, run_check=False, shape=old.shape, stride=old.stride()
            )
        if isinstance(self.tensor, Parameter):
            made = Parameter(made, requires_grad=self.tensor.requires_grad)
            vars(made).update(vars(self.tensor))
        return made  # type: ignore[no-any-return]


def _memory_for(like: Tensor, device: torch.device) -> Tensor:
    """A tensor that is needed for a short time only.

    On the host its memory is mapped: C's ``free`` keeps what lies between parts that are kept, up to half as much
    again as these.
    """
    size = like.nbytes
    if device.type != "cpu" or size < _MAPPED or not hasattr(mmap, "MAP_PRIVATE"):
        return _kept_memory_for(like, device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=like.dtype).view(like.shape)


def _kept_memory_for(like: Tensor, device: torch.device) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=device)


class _StandIn(Tensor):
    """Shape and dtype of a tensor, whose first operation makes it whole."""

    place: _Place

    @staticmethod
    def __new__(cls, place: _Place) -> _StandIn:
        like = place.tensor
        made: _StandIn = Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=place.device)
        made.place = place
        return made

    def __init__(self, place: _Place) -> None: ...

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.data.__set__:  # type: ignore[attr-defined]
            return args[0].place.take(args[1])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].place)
        used: dict[int, Tensor] = {}

        # or gives a view, into which the method may write
        writes = func._schema.is_mutable or any(each.alias_info is not None for each in func._schema.returns)

        def whole(stand_in: _StandIn) -> Tensor:
            tensor = stand_in.place.whole()
            stand_in.place.written |= writes
            used[id(tensor)] = stand_in
            return tensor

        args, kwargs = tree_map_only(_StandIn, whole, (args, kwargs or {}))
        result = func(*args, **kwargs)
        return tree_map_only(Tensor, lambda t: used.get(id(t), t), result)


def _initializer_of_each(module: Module) -> Callable[[Module], object] | None:
    """``_init_weights(submodule)``, the method of a model that gives each of its submodules values."""
    method = getattr(module, "_init_weights", None)
    return method if callable(method) and _takes(method, 1) and not _takes(method, 0) else None


def _children_first(module: Module, seen: set[int], top: bool = True) -> Iterator[Module]:
    """What ``module.apply`` visits, without the submodules of which another one gives the values."""
    if id(module) in seen or (not top and _initializer_of_each(module) is not None):
        return
    seen.add(id(module))
    for child in module.children():
        yield from _children_first(uncompiled(child), seen, top=False)
    yield module


def _takes(method: Callable[..., Any], count: int) -> bool:
    """Whether a method can be called with so many arguments by position."""
    try:
        inspect.signature(method).bind(*[None] * count)
    except (TypeError, ValueError):
        return False
    return True


def _name(module: Module, owner: str, key: str) -> str:
    return plain_name(module, f"{owner}.{key}" if owner else key)


def give_values(
    engine: Module,
    precision: Precision,
    device: torch.device,
    broadcast: Callable[[Any], Any],
    keep_on: torch.device | None = None,
) -> None:
    """Give an engine's module, made on the meta device, values; what gets none has to be loaded before it is used.

    Args:
        engine: Its module is sharded. Its first forward pass raises if there is a tensor without value.
        precision: As the module was made.
        device: See :func:`materialize`, as for the other arguments.
        broadcast: Returns what rank 0 has.
        keep_on: Where parameters are kept. Default: ``device``.
    """
    own = user_module(engine)
    # by the device, which is not "meta" where tensors have no memory because the run is only planned
    if not any(t.device.type == "meta" for t in (*own.parameters(), *own.buffers())):
        return
    with precision.module_init_context():
        names = materialize(own, device, keep_on, broadcast)
    if not names:
        return
    rank_zero_info(
        f"Made on the meta device, and without values until a checkpoint is loaded, because no reset_parameters() gives"
        f" them any: {_listed(names)}."
    )

    def check(*_: Any) -> None:
        handle.remove()
        tensors = {
            **dict(with_plain_names(own, own.named_parameters())),
            **dict(with_plain_names(own, own.named_buffers())),
        }
        without = [name for name in names if name in tensors and _has_no_value(tensors[name])]
        if without:
            raise MisconfigurationException(
                f"Without values: {_listed(without)}. They were made on the meta device, their"
                " modules have no reset_parameters() that gives them any, and no checkpoint was loaded since. Load one,"
                " write reset_parameters(), or make the module in init_module(empty_init=False)."
            )

    handle = engine.register_forward_pre_hook(check, prepend=True)


def _listed(names: list[str]) -> str:
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


@torch.no_grad()
def _has_no_value(tensor: Any) -> bool:
    part = own_part(tensor)
    if not part.numel():
        return False
    if part.is_floating_point() or part.is_complex():
        return bool(part.isnan().all())
    return part.dtype != torch.bool and bool((part == torch.iinfo(part.dtype).min).all())
